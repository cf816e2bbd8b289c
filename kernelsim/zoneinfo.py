# SPDX-License-Identifier: GPL-2.0-only
"""/proc/zoneinfo: each zone's size, watermarks, counters and per-CPU page lists (mm/vmstat.c zoneinfo_show_print).

Every node shows every zone that the kernel was built with, also those it has no pages of; the counters of the node
itself come with its first populated zone.

Where it differs from Linux: counters are exact, so the threshold up to which a CPU would keep changes to itself is 0.
A machine without per-CPU page lists (pcp.py) shows for each CPU what a kernel has before it sets them up, lists that
hold nothing: high 0, batch 1.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.kconfig import Kconfig
from kernelsim.mmzone import MAX_NR_ZONES, ZONE_MOVABLE, Mem, zone_names
from kernelsim.vmstat import is_listed, node_items, zone_items

_STAT_THRESHOLD = 0
_MIN_MOVABLE_WMARK = 32  # SWAP_CLUSTER_MAX, also of a zone without pages
_BOOT_PAGESET = {"count": 0, "high": 0, "batch": 1, "high_min": 0, "high_max": 0}


class Zoneinfo(Kobject):
    """The file. `hopeless(nid)`: kswapd has given up on the node."""

    zoneinfo = Attr(Text(), doc="Size, watermarks, counters and per-CPU lists of each zone.")

    def __init__(self, mem: Mem, nr_cpus: int, kconfig: Kconfig, hopeless: Callable[[int], bool]) -> None:
        self.mem = mem
        self.nr_cpus = nr_cpus
        self.kconfig = kconfig
        self.hopeless = hopeless

    @zoneinfo.show
    def _zoneinfo(self) -> str:
        return "".join(line for nid in range(self.mem.nr_nodes) for line in self._node(nid))

    def _node(self, nid: int) -> Iterator[str]:
        by_type = {int(self.mem.zones["type"][zone]): zone for zone in self.mem.zones_of(nid)}
        populated = [t for t, zone in by_type.items() if self.mem.zones["present"][zone]]
        for zone_type in range(MAX_NR_ZONES):
            yield f"Node {nid}, zone {zone_names[zone_type]:>8s}\n"
            if zone_type == min(populated, default=-1):
                yield "  per-node stats\n"
                yield from self._items(node_items(self.mem.nodes[nid : nid + 1]))
            if zone_type not in populated:
                yield _empty_zone(zone_type)
                continue
            zone = by_type[zone_type]
            yield _sizes(self.mem.zones[zone])
            yield from self._items(zone_items(self.mem.zones[zone : zone + 1]))
            yield from self._pagesets(zone)
            yield f"  node_unreclaimable:  {int(self.hopeless(nid))}\n"
            yield f"  start_pfn:           {self.mem.zones['start_pfn'][zone]}\n"

    def _items(self, items: Iterable[tuple[str, int]]) -> Iterator[str]:
        for name, value in items:
            if is_listed(self.kconfig, name):
                yield f"      {name:<12s} {value}\n"

    def _pagesets(self, zone: int) -> Iterator[str]:
        yield "  pagesets\n"
        pagesets = self.mem.pagesets[zone]
        for cpu in range(self.nr_cpus):
            pageset = pagesets[cpu] if cpu < len(pagesets) else _BOOT_PAGESET
            yield f"    cpu: {cpu}\n"
            yield f"              count:    {pageset['count']}\n"
            yield f"              high:     {pageset['high']}\n"
            yield f"              batch:    {pageset['batch']}\n"
            yield f"              high_min: {pageset['high_min']}\n"
            yield f"              high_max: {pageset['high_max']}\n"
            yield f"  vm stats threshold: {_STAT_THRESHOLD}\n"


def _sizes(zone: Any) -> str:
    """From `pages free` to the protection line; a CMA kernel counts its areas' pages here."""
    low, span = zone["watermark"], zone["end_pfn"] - zone["start_pfn"]
    return _size_lines(
        int(zone["free_pages"]), low, span, zone["present"], zone["managed"], zone["cma_pages"], zone["reserve"]
    )


def _empty_zone(zone_type: int) -> str:
    mark = _MIN_MOVABLE_WMARK if zone_type == ZONE_MOVABLE else 0
    return _size_lines(0, [mark] * 4, 0, 0, 0, 0, [0] * MAX_NR_ZONES)


def _size_lines(free: int, marks: Any, spanned: int, present: int, managed: int, cma: int, reserve: Any) -> str:
    names = ("boost", "min", "low", "high", "promo", "spanned", "present", "managed", "cma")
    values = (0, *marks, spanned, present, managed, cma)  # nothing boosts watermarks here
    lines = "".join(f"        {name:<8s} {value}\n" for name, value in zip(names, values, strict=True))
    return f"  pages free     {free}\n{lines}        protection: ({', '.join(map(str, reserve))})\n"
