# SPDX-License-Identifier: GPL-2.0-only
"""The kernel configuration: what this kernel was built with.

An option that is off is not there: its files are absent (ENOENT), its counters are not listed, its lines are not in the
log, as on a kernel built without it. /proc/config.gz shows the outcome.

Options come in two sorts. Those of OPTIONS can be chosen, and something hangs on each of them. Those of FIXED say what
this emulation is; giving them another value is refused, because nothing would follow from it.

Choosing goes as in Kconfig, with the two rules that matter here:
- `depends_on`: an option can only be y where all of these are y.
- `selects`: an option that is y makes these y.
What was asked for is never overruled silently: asking for the impossible is a ValueError that names both options. What
was not asked for has its default, or is n where its default would go against what was asked for. So
CONFIG_COMPACTION = "n" alone is enough for a kernel that has neither compaction nor what needs it; Kconfig would keep
it y as long as CONFIG_TRANSPARENT_HUGEPAGE selects it.

Source of names, dependencies and selects: mm/Kconfig, fs/Kconfig, lib/Kconfig.debug of Linux 6.12; of the DPU options:
the design this project began with.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kernelsim.attr import Attr, Kobject, Text

VALUES = ("y", "n")
_GZIP = 16 + zlib.MAX_WBITS  # with gzip's header and trailer, and no date


@dataclass(frozen=True)
class Option:
    """One bool option. `help` says what is gone without it."""

    name: str
    help: str
    default: bool = True
    depends_on: tuple[str, ...] = ()
    selects: tuple[str, ...] = ()


OPTIONS: Mapping[str, Option] = {
    option.name: option
    for option in (
        Option("CONFIG_NUMA", "Several nodes; /sys/devices/system/node and the numa_* counters."),
        Option("CONFIG_MIGRATION", "Pages can move to other frames; the pgmigrate_* counters."),
        Option(
            "CONFIG_COMPACTION",
            "Linux's own compaction: compact_memory and its sysctls, node*/compact, debugfs extfrag.",
            selects=("CONFIG_MIGRATION",),
        ),
        Option(
            "CONFIG_DPU_COMPACTION",
            "Compaction by the DPU: the dpu_compact_* sysctls, node*/compact_dpu, debugfs dpu_compact.",
            depends_on=("CONFIG_COMPACTION", "CONFIG_MIGRATION"),
        ),
        Option(
            "CONFIG_DPU_COMPACTION_DEFAULT_ON",
            "dpu_compact_enabled is 1 at boot, otherwise 0.",
            depends_on=("CONFIG_DPU_COMPACTION",),
        ),
        Option(
            "CONFIG_TRANSPARENT_HUGEPAGE",
            "Huge pages for anonymous memory: sysfs transparent_hugepage, the thp_* counters, AnonHugePages.",
            selects=("CONFIG_COMPACTION",),
        ),
        Option(
            "CONFIG_CMA",
            "CMA areas; follows from whether a node has one.",
            default=False,
            selects=("CONFIG_MIGRATION",),
        ),
        Option(
            "CONFIG_KSM",
            "Pages with the same content are merged: sysfs ksm, /proc/PID/ksm_stat, cow_ksm; needs contents.",
        ),
        Option("CONFIG_HUGETLB_PAGE", "The pool of 2 MiB pages: nr_hugepages, HugePages_* in meminfo."),
        Option("CONFIG_DEBUG_FS", "/sys/kernel/debug."),
        Option("CONFIG_FTRACE", "/sys/kernel/tracing, its events, and the link to it in debugfs."),
        Option(
            "CONFIG_FUNCTION_TRACER",
            "The tracer `function`: current_tracer, set_ftrace_filter, sysctl ftrace_enabled.",
            depends_on=("CONFIG_FTRACE",),
        ),
        Option(
            "CONFIG_FUNCTION_GRAPH_TRACER",
            "The tracer `function_graph`.",
            depends_on=("CONFIG_FUNCTION_TRACER",),
        ),
        Option("CONFIG_DYNAMIC_DEBUG", "dynamic_debug/control, in debugfs and /proc; pr_debug() can be switched on."),
        Option("CONFIG_DEBUG_VM", "Check every invariant after each step, and log what is violated.", default=False),
    )
}

FIXED: Mapping[str, bool] = {
    "CONFIG_64BIT": True,
    "CONFIG_MMU": True,
    "CONFIG_SMP": True,
    "CONFIG_IKCONFIG": True,
    "CONFIG_IKCONFIG_PROC": True,
    "CONFIG_MEMCG": True,
    "CONFIG_MEM_SOFT_DIRTY": False,
    "CONFIG_NO_PAGE_MAPCOUNT": True,
    "CONFIG_IDLE_PAGE_TRACKING": False,
    "CONFIG_SWAP": False,
    "CONFIG_PAGE_REPORTING": True,
    "CONFIG_PRINTK": True,
    "CONFIG_PROC_FS": True,
    "CONFIG_PROC_SYSCTL": True,
    "CONFIG_PROC_PAGE_MONITOR": True,
    "CONFIG_SYSFS": True,
    "CONFIG_CONFIGFS_FS": True,
    "CONFIG_VM_EVENT_COUNTERS": True,
    "CONFIG_ZONE_DEVICE": False,
}
"""What this emulation always has, or never: none of these can be chosen."""


@dataclass(frozen=True)
class Kconfig:
    """`given` maps names to "y" or "n". ValueError, `NAME: why`, if there is no such kernel."""

    given: Mapping[str, object] = field(default_factory=dict)
    enabled: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            _check(name, value)
        asked = {name: value == "y" for name, value in self.given.items() if name in OPTIONS}
        enabled = _resolve(asked)
        for name in asked:
            _check_honoured(name, asked, enabled)
        object.__setattr__(self, "enabled", frozenset(enabled))

    def IS_ENABLED(self, name: str) -> bool:
        """Is the option y? KeyError for a name that is no option here."""
        if name in FIXED:
            return FIXED[name]
        return OPTIONS[name].name in self.enabled

    def for_machine(self, nr_nodes: int, has_cma: bool, has_contents: bool = True) -> "Kconfig":
        """The same for a machine of so many nodes, with CMA areas or not, and with something in its pages or not.

        ValueError if it cannot run this kernel.
        """
        if nr_nodes > 1 and not self.IS_ENABLED("CONFIG_NUMA"):
            raise ValueError(f"CONFIG_NUMA: is needed for {nr_nodes} nodes")
        if has_cma != (self.given.get("CONFIG_CMA", "y" if has_cma else "n") == "y"):
            raise ValueError(f"CONFIG_CMA: there is {'a' if has_cma else 'no'} CMA area")
        if not has_contents and self.given.get("CONFIG_KSM") == "y":
            raise ValueError("CONFIG_KSM: needs the contents of pages (memory.bytes)")
        follows = ({"CONFIG_CMA": "y"} if has_cma else {}) | ({} if has_contents else {"CONFIG_KSM": "n"})
        return Kconfig({**self.given, **follows}) if follows else self

    def text(self) -> str:
        """The .config, in the format that the kernel's own build writes."""
        lines = ["#", "# Automatically generated file; DO NOT EDIT.", "# Linux/dpud emulated kernel configuration", "#"]
        for name in sorted([*FIXED, *OPTIONS]):
            lines.append(f"{name}=y" if self.IS_ENABLED(name) else f"# {name} is not set")
        return "\n".join(lines) + "\n"


def _check(name: str, value: object) -> None:
    if name not in OPTIONS and name not in FIXED:
        raise ValueError(f"{name}: no such option here")
    if value not in VALUES:
        raise ValueError(f'{name}: must be "y" or "n"; there are no modules')
    if name in FIXED and FIXED[name] != (value == "y"):
        raise ValueError(f"{name}: is always {'y' if FIXED[name] else 'n'} here")


def _resolve(asked: Mapping[str, bool]) -> set[str]:
    """What is y: what was asked for with what that selects, and the defaults that fit in."""
    enabled: set[str] = set()
    for name in [name for name, on in asked.items() if on]:
        _enable(name, enabled)
    barred = {name for name, on in asked.items() if not on}
    for _ in OPTIONS:  # a default may wait for one that is declared later
        for option in OPTIONS.values():
            ready = all(needed in enabled for needed in option.depends_on)
            if option.default and option.name not in barred and ready and not barred & set(_selected(option.name)):
                _enable(option.name, enabled)
    return enabled


def _selected(name: str) -> Iterable[str]:
    """All that `name` selects, directly or not."""
    for selected in OPTIONS[name].selects:
        yield selected
        yield from _selected(selected)


def _enable(name: str, enabled: set[str]) -> None:
    enabled.update((name, *_selected(name)))


def _check_honoured(name: str, asked: Mapping[str, bool], enabled: set[str]) -> None:
    """Raises ValueError if the outcome is not what was asked for."""
    if not asked[name] and name in enabled:
        by = next(other for other in enabled if name in _selected(other))
        raise ValueError(f"{name}: is selected by {by}")
    missing = [needed for needed in OPTIONS[name].depends_on if needed not in enabled]
    if asked[name] and missing:
        raise ValueError(f"{name}: depends on {missing[0]}")


class IkConfig(Kobject):
    """/proc/config.gz (kernel/configs.c)."""

    config_gz = Attr(Text(), name="config.gz", mode=0o444, doc="The kernel configuration, compressed; `zcat` shows it.")

    def __init__(self, kconfig: Kconfig) -> None:
        self._image = zlib.compress(kconfig.text().encode(), wbits=_GZIP)

    @config_gz.show
    def _show(self) -> bytes:
        return self._image
