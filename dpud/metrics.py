# SPDX-License-Identifier: GPL-2.0-only
"""The machine's state for Prometheus, at http://LISTEN/metrics (`[metrics] listen`, `pip install dpud[metrics]`).

Theory of operation
    Nothing is kept between scrapes: each reads the files that users read, one after the other, and holds the machine
    for one file at a time. So a scrape is no snapshot: counters of different files may be a moment apart. What a
    file's values mean is said (HELP) by the file's own declaration. Times are seconds; modelled and measured ones are
    different metrics, or have a label that says so.
"""

import re
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from dpud import __version__
from dpud import status_files as state
from dpud.errors import UserError
from dpud.metrics_compaction import compaction
from dpud.metrics_gpu import gpu
from dpud.metrics_server import Server
from fs.kernfs import Tree
from kernelsim.attr import File, Registry

_NODE_KB = re.compile(r"(MemTotal|MemFree):\s+([0-9]+) kB")


class MachineCollector(Collector):
    """Reads the tree's files, which `registry` declares."""

    def __init__(self, registry: Registry, tree: Tree) -> None:
        self._registry = registry
        self._files = state.TreeFiles(tree)

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        yield InfoMetricFamily("dpud_build", "The version of dpud.", value={"version": __version__})
        yield from _zones(self._files, self._doc)
        yield from _nodes(self._files)
        yield from _vmstat(self._files, self._doc)
        yield from compaction(self._files, self._doc)
        yield from gpu(self._files)

    def _doc(self, path: str) -> str:
        """What the file's declaration says of it."""
        node = self._registry.nodes.get(path)
        return f"{path}: {node.attr.doc}" if isinstance(node, File) else path


def serve(listen: str, registry: Registry, tree: Tree) -> int:
    """Answer scrapes on threads of their own -> the port. Raises UserError."""
    host, _, port = listen.rpartition(":")
    answers = CollectorRegistry(auto_describe=False)
    answers.register(MachineCollector(registry, tree))
    try:
        server = Server(host.strip("[]"), int(port), make_wsgi_app(answers))
    except OSError as error:
        raise UserError(f"metrics.listen: {listen}: {error.strerror}") from error
    server.start()
    return int(server.server_port)


def _zones(files: state.Files, doc: Callable[[str], str]) -> Iterator[Metric]:
    blocks = GaugeMetricFamily("dpud_buddy_free_blocks", doc(state.BUDDYINFO), labels=("node", "zone", "order"))
    for zone in state.zones(files):
        for order, count in enumerate(zone.nr_free):
            blocks.add_metric((str(zone.node), zone.name, str(order)), count)
    yield blocks
    unusable = GaugeMetricFamily("dpud_unusable_index_ratio", doc(state.UNUSABLE), labels=("node", "zone", "order"))
    for (node, name), shares in (state.unusable_index(files) or {}).items():
        for order, share in enumerate(shares):
            unusable.add_metric((str(node), name, str(order)), share)
    yield unusable


def _nodes(files: state.Files) -> Iterator[Metric]:
    total = GaugeMetricFamily(
        "dpud_node_memory_bytes", "Memory of the node: MemTotal of its meminfo.", labels=("node",)
    )
    free = GaugeMetricFamily("dpud_node_memory_free_bytes", "Free memory of the node: MemFree.", labels=("node",))
    for name in files.names(state.NODES):
        kb = dict(_NODE_KB.findall(state.text_or(files, f"{state.NODES}/{name}/meminfo")))
        if kb:
            node = (name.removeprefix("node"),)
            total.add_metric(node, int(kb["MemTotal"]) << 10)
            free.add_metric(node, int(kb["MemFree"]) << 10)
    yield from (total, free)


def _vmstat(files: state.Files, doc: Callable[[str], str]) -> Iterator[Metric]:
    """Linux names page counters nr_*; the others only go up."""
    pages = GaugeMetricFamily("dpud_vmstat_pages", doc(state.VMSTAT), labels=("counter",))
    events = CounterMetricFamily("dpud_vmstat_events", doc(state.VMSTAT), labels=("event",))
    for name, value in state.pairs(files, state.VMSTAT).items():
        (pages if name.startswith("nr_") else events).add_metric((name,), value)
    yield from (pages, events)
