# SPDX-License-Identifier: GPL-2.0-only
"""/proc/zoneinfo: each zone's size, watermarks, counters and per-CPU page lists (mm/vmstat.c zoneinfo_show_print).

Every node shows every zone that the kernel was built with, also those it has no pages of; the counters of the node
itself come with its first populated zone.

Where it differs from Linux: counters are exact, so the threshold up to which a CPU would keep changes to itself is 0.
A machine without per-CPU page lists (pcp.py) shows for each CPU what a kernel has before it sets them up, lists that
hold nothing: high 0, batch 1.
"""

from collections.abc import Callable
from typing import Any

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.kconfig import Kconfig
from kernelsim.mmzone import MAX_NR_ZONES, ZONE_MOVABLE, Mem, zone_names
from kernelsim.vmstat import node_items, unlisted, zone_items

_STAT_THRESHOLD = 0
_MIN_MOVABLE_WMARK = 32  # SWAP_CLUSTER_MAX, also of a zone without pages
_SIZES = ("boost", "min", "low", "high", "promo", "spanned", "present", "managed", "cma")
_SIZE_LINES = "".join(
    ["  pages free     %d\n"]
    + [f"        {name:<8s} %d\n" for name in _SIZES]
    + [f"        protection: ({', '.join(['%d'] * MAX_NR_ZONES)})\n"]
)
_PAGESET = ("count", "high", "batch", "high_min", "high_max")
_PAGESET_LINES = "".join(
    ["    cpu: %d\n"]
    + [f"              {name + ':':<9s} %d\n" for name in _PAGESET]
    + [f"  vm stats threshold: {_STAT_THRESHOLD}\n"]
)
_BOOT_PAGESET = (0, 0, 1, 0, 0)


class Zoneinfo(Kobject):
    """The file. `hopeless(nid)`: kswapd has given up on the node."""

    zoneinfo = Attr(Text(), doc="Size, watermarks, counters and per-CPU lists of each zone.")

    def __init__(self, mem: Mem, nr_cpus: int, kconfig: Kconfig, hopeless: Callable[[int], bool]) -> None:
        self.mem = mem
        self.nr_cpus = nr_cpus
        self.absent = unlisted(kconfig)
        self.hopeless = hopeless

    @zoneinfo.show
    def _zoneinfo(self) -> str:
        return "".join([self._node(nid) for nid in range(self.mem.nr_nodes)])

    def _node(self, nid: int) -> str:
        zones = self.mem.zones
        by_type = {int(zones["type"][zone]): zone for zone in self.mem.zones_of(nid) if zones["present"][zone]}
        first = min(by_type, default=-1)
        text = ""
        for zone_type in range(MAX_NR_ZONES):
            text += f"Node {nid}, zone {zone_names[zone_type]:>8s}\n"
            if zone_type == first:
                text += "  per-node stats\n" + self._items(node_items(self.mem.nodes[nid : nid + 1]))
            text += self._zone(by_type[zone_type]) if zone_type in by_type else _empty_zone(zone_type)
        return text

    def _zone(self, zone: int) -> str:
        record = self.mem.zones[zone]
        start, end = int(record["start_pfn"]), int(record["end_pfn"])
        sizes = (0, *record["watermark"].tolist(), end - start)  # nothing boosts watermarks here
        managed = (int(record["present"]), int(record["managed"]), int(record["cma_pages"]))
        return (
            _SIZE_LINES % (record["free_pages"], *sizes, *managed, *record["reserve"].tolist())
            + self._items(zone_items(self.mem.zones[zone : zone + 1]))
            + f"  pagesets\n{self._pagesets(zone)}"
            + f"  node_unreclaimable:  {int(self.hopeless(int(record['node'])))}\n  start_pfn:           {start}\n"
        )

    def _items(self, items: Any) -> str:
        return "".join([f"      {name:<12s} {value}\n" for name, value in items if not name.startswith(self.absent)])

    def _pagesets(self, zone: int) -> str:
        pagesets = [tuple(pageset[name] for name in _PAGESET) for pageset in self.mem.pagesets[zone]]
        pagesets += [_BOOT_PAGESET] * (self.nr_cpus - len(pagesets))
        return "".join([_PAGESET_LINES % (cpu, *pageset) for cpu, pageset in enumerate(pagesets)])


def _empty_zone(zone_type: int) -> str:
    mark = _MIN_MOVABLE_WMARK if zone_type == ZONE_MOVABLE else 0
    return _SIZE_LINES % (0, 0, *[mark] * 4, 0, 0, 0, 0, *[0] * MAX_NR_ZONES)
