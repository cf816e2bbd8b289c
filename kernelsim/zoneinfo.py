# SPDX-License-Identifier: GPL-2.0-only
"""/proc/zoneinfo: each zone's size, watermarks, counters and per-CPU page lists (mm/vmstat.c zoneinfo_show_print).

Every node shows every zone that the kernel was built with, also those it has no pages of; the counters of the node
itself come with its first populated zone.

Where it differs from Linux: counters are exact, so the threshold up to which a CPU would keep changes to itself is 0.
A machine without per-CPU page lists (pcp.py) shows for each CPU what a kernel has before it sets them up, lists that
hold nothing: high 0, batch 1.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.kconfig import Kconfig
from kernelsim.kswapd import MAX_RECLAIM_RETRIES
from kernelsim.mmzone import MAX_NR_ZONES, ZONE_MOVABLE, Mem, pageset_dtype, zone_dtype, zone_names
from kernelsim.seq_counters import CounterFile, CounterText, Number, Words, number
from kernelsim.vmstat import Item, node_items, populated, unlisted, word, zone_items

_STAT_THRESHOLD = 0
_MIN_MOVABLE_WMARK = 32  # SWAP_CLUSTER_MAX, also of a zone without pages
_PAGESET = ("count", "high", "batch", "high_min", "high_max")
_PAGESET_LINES = "".join(
    ["    cpu: %d\n"]
    + [f"              {name + ':':<9s} %d\n" for name in _PAGESET]
    + [f"  vm stats threshold: {_STAT_THRESHOLD}\n"]
)
_BOOT_PAGESET = (0, 0, 1, 0, 0)

_MARKS, _SIZES = ("min", "low", "high", "promo"), ("spanned", "present", "managed", "cma")
_SIZE_LINES = "".join(
    ["  pages free     %d\n", "        boost    0\n"]  # nothing boosts watermarks here
    + [f"        {name:<8s} %d\n" for name in (*_MARKS, *_SIZES)]
    + [f"        protection: ({', '.join(['%d'] * MAX_NR_ZONES)})\n"]
)
_PAGESET_WORDS = [word(pageset_dtype, name) for name in _PAGESET]

Piece = tuple[str, Sequence[Number]]
"""Part of the text, and the numbers that go into it."""


class Zoneinfo(Kobject):
    """The file. `failures`, int64[nid]: rounds of kswapd that freed nothing; after so many it has given up on the node.

    Monitors read this file often: it is described once for the zones that have pages (seq_counters.py).
    """

    zoneinfo = Attr(Text(), doc="Size, watermarks, counters and per-CPU lists of each zone.", kept="memory")

    def __init__(self, mem: Mem, nr_cpus: int, kconfig: Kconfig, failures: NDArray[np.int64]) -> None:
        self.mem = mem
        self.nr_cpus = nr_cpus
        self.kconfig = kconfig
        self.failures = failures
        self._now = CounterFile(self._describe)

    @zoneinfo.counters
    def _zoneinfo(self) -> CounterText:
        return self._now.now()

    def _describe(self) -> CounterText:
        return _Description(self.mem, self.nr_cpus, unlisted(self.kconfig), self.failures).text()


class _Description:
    """What the text is made of, for the zones that have pages now."""

    def __init__(self, mem: Mem, nr_cpus: int, absent: tuple[str, ...], failures: NDArray[np.int64]) -> None:
        self._mem, self._nr_cpus, self._absent = mem, nr_cpus, absent
        self._zones, self._nodes, self._pagesets = Words(mem.zones), Words(mem.nodes), Words(mem.pagesets)
        self._failures = Words(failures)

    def text(self) -> CounterText:
        pieces = list(self._pieces())
        conditions = populated(self._zones, (self._mem.zones["present"] > 0).tolist())
        arrays = self._zones, self._nodes, self._pagesets, self._failures
        form, numbers = "".join([text for text, _ in pieces]), [each for _, numbers in pieces for each in numbers]
        return CounterText(form, numbers, conditions, arrays)

    def _pieces(self) -> Iterator[Piece]:
        zones = self._mem.zones
        columns = zip(zones["node"].tolist(), zones["type"].tolist(), zones["present"].tolist(), strict=True)
        zone_of = {(node, of_type): zone for zone, (node, of_type, present) in enumerate(columns) if present}
        for nid in range(self._mem.nr_nodes):
            node_shown = False
            for zone_type, name in enumerate(zone_names):
                yield f"Node {nid}, zone {name:>8s}\n", ()
                zone = zone_of.get((nid, zone_type))
                if zone is None:
                    yield _EMPTY[zone_type], ()
                    continue
                if not node_shown:
                    yield "  per-node stats\n", ()
                    yield self._lines(node_items(self._nodes, [nid]))
                    node_shown = True
                yield from self._zone(nid, zone)

    def _zone(self, nid: int, zone: int) -> Iterator[Piece]:
        yield _SIZE_LINES, list(self._sizes(zone))
        yield self._lines(zone_items(self._zones, [zone]))
        yield "  pagesets\n", ()
        nr_pagesets = self._mem.pagesets.shape[1]
        for cpu in range(self._nr_cpus):
            lines = _PAGESET_LINES.replace("%d", str(cpu), 1)
            if cpu < nr_pagesets:
                row = zone * nr_pagesets + cpu
                yield lines, [number([self._pagesets.at(row, at)]) for at in _PAGESET_WORDS]
            else:
                yield lines % _BOOT_PAGESET, ()
        yield "  node_unreclaimable:  %d\n", [number([self._failures.at(nid, 0)], limit=MAX_RECLAIM_RETRIES)]
        yield "  start_pfn:           %d\n", [self._of_zone(zone, "start_pfn")]

    def _of_zone(self, zone: int, name: str, index: int = 0) -> Number:
        return number([self._zones.at(zone, word(zone_dtype, name, index))])

    def _sizes(self, zone: int) -> Iterator[Number]:
        """What goes into _SIZE_LINES."""
        start, end = (self._zones.at(zone, word(zone_dtype, name)) for name in ("start_pfn", "end_pfn"))
        yield self._of_zone(zone, "free_pages")
        yield from [self._of_zone(zone, "watermark", mark) for mark in range(len(_MARKS))]
        yield Number([(end, 1), (start, -1)])
        yield from [self._of_zone(zone, name) for name in ("present", "managed", "cma_pages")]
        yield from [self._of_zone(zone, "reserve", above) for above in range(MAX_NR_ZONES)]

    def _lines(self, items: Iterator[Item]) -> Piece:
        listed = [item for item in items if not item[0].startswith(self._absent)]
        return "".join([f"      {name:<12s} %d\n" for name, _ in listed]), [of for _, of in listed]


def _empty_zone(zone_type: int) -> str:
    mark = _MIN_MOVABLE_WMARK if zone_type == ZONE_MOVABLE else 0
    return _SIZE_LINES % (0, *[mark] * 4, 0, 0, 0, 0, *[0] * MAX_NR_ZONES)


_EMPTY = [_empty_zone(zone_type) for zone_type in range(MAX_NR_ZONES)]
