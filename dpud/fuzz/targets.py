# SPDX-License-Identifier: GPL-2.0-only
"""All that is fuzzed. `share`: how many of a run's inputs each gets, in proportion; slow ones get fewer."""

from dpud.errors import UserError
from dpud.fuzz import binaries, captures, images, stream, texts, tree
from dpud.fuzz.target import Target

_CONFIG = ("dpud.config", "dpud.config_lines", "dpud.config_text", "tomllib._parser", "tomllib._re")
_UNITS = (
    "kernelsim.trace_filter",
    "kernelsim.dynamic_debug",
    "kernelsim.kinds",
    "kernelsim.gfp",
    "kernelsim.mm_configfs",
)

TARGETS = (
    Target("files", "every file of the tree, on a machine that lives on", tree.Machine, life=3000, share=120),
    Target("config", "configurations, one or two above each other", texts.config_world, share=12, modules=_CONFIG),
    Target("topology", "NUMA topologies", texts.topology_world, share=25, modules=("dpud.gpu.numa.topology",)),
    Target(
        "properties", "profile strings of the SDK", texts.properties_world, share=120, modules=("dpud.dpu.properties",)
    ),
    Target("units", "sizes, lists, masks, filters, queries", texts.units_world, share=300, modules=_UNITS),
    Target("trace", "ftrace, trace-cmd and perf texts", texts.trace_world, share=30, modules=("dpud.trace_text",)),
    Target("rmm", "logs of RMM's", texts.rmm_world, share=110, modules=("dpud.bench.gpu.usage",)),
    Target("decisions", "the QoS decision log", texts.decisions_world, share=30, modules=("dpud.gpu.qos.replay",)),
    Target(
        "capture", "captured folders", captures.capture_world, share=6, modules=("dpud.proctext", "dpud.rawcapture")
    ),
    Target("journal", "the state directory", binaries.journal_world, share=25, modules=("dpud.journal", "dpud.state")),
    Target(
        "image",
        "checkpoints of the machine",
        images.image_world,
        share=15,
        modules=("dpud.checkpoint_file", "dpud.state_segments"),
    ),
    Target("promises", "the journals of migrations", binaries.promises_world, share=6),
    Target("checkpoint", "checkpoints of GPU clients", binaries.checkpoint_world, share=20),
    Target("blob", "compressed pages", binaries.blob_world, share=170, modules=("dpud.gpu.compression.planes",)),
    Target("slots", "files of swap tiers", binaries.slots_world, share=10),
    Target("incoming", "a migration's source that means harm", stream.Incoming, share=8),
    Target("outgoing", "a migration's destination that means harm", stream.Outgoing, share=8),
)


def named(name: str) -> Target:
    """Raises UserError."""
    for target in TARGETS:
        if target.name == name:
            return target
    raise UserError(f"no target {name}: there are {', '.join(target.name for target in TARGETS)}")
