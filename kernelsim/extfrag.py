# SPDX-License-Identifier: GPL-2.0-only
"""How fragmented a zone's free memory is: the indices that compaction decides by, and their debugfs files.

All are integers, scaled by 1000 or 100, rounded as mm/vmstat.c and mm/compaction.c round them:

    extfrag_index(order)    -1000: a block is free; else from 0 (an allocation fails for lack of memory) to 1000 (it
                            fails for fragmentation), or below 0 if all that is free is one smaller block
    unusable_index(order)   the part of free memory that is of no use to an allocation of that order
    fragmentation_score     per cent of free memory in blocks smaller than a huge page; proactive compaction watches it
"""

from collections.abc import Callable

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.jit import njit
from kernelsim.mmzone import NR_PAGE_ORDERS, Mem, Zones, pageblock_order

COMPACTION_HPAGE_ORDER = pageblock_order


@njit
def free_area_nr(zones: Zones, zone: int, order: int) -> int:
    """Free blocks of an order, all migratetypes."""
    nr = 0
    for migratetype in range(zones[zone].nr_free.shape[1]):
        nr += zones[zone].nr_free[order, migratetype]
    return nr


@njit
def fill_contig_page_info(zones: Zones, zone: int, suitable_order: int) -> tuple[int, int, int]:
    """(free pages, free blocks, blocks of `suitable_order` that could be cut from them)."""
    nr_pages = 0
    nr_blocks = 0
    nr_suitable = 0
    for order in range(NR_PAGE_ORDERS):
        nr = free_area_nr(zones, zone, order)
        nr_blocks += nr
        nr_pages += nr << order
        if order >= suitable_order:
            nr_suitable += nr << (order - suitable_order)
    return nr_pages, nr_blocks, nr_suitable


@njit
def fragmentation_index(zones: Zones, zone: int, order: int) -> int:
    """extfrag_index, -1000..1000."""
    nr_pages, nr_blocks, nr_suitable = fill_contig_page_info(zones, zone, order)
    if nr_blocks == 0:
        return 0
    if nr_suitable > 0:
        return -1000
    return 1000 - (1000 + nr_pages * 1000 // (1 << order)) // nr_blocks


@njit
def unusable_free_index(zones: Zones, zone: int, order: int) -> int:
    """unusable_index, 0..1000."""
    nr_pages, _, nr_suitable = fill_contig_page_info(zones, zone, order)
    if nr_pages == 0:
        return 1000
    return (nr_pages - (nr_suitable << order)) * 1000 // nr_pages


@njit
def fragmentation_score_zone(zones: Zones, zone: int) -> int:
    """0..100 (extfrag_for_order)."""
    nr_pages, _, nr_suitable = fill_contig_page_info(zones, zone, COMPACTION_HPAGE_ORDER)
    if nr_pages == 0:
        return 0
    return (nr_pages - (nr_suitable << COMPACTION_HPAGE_ORDER)) * 100 // nr_pages


def fragmentation_score_node(mem: Mem, nid: int) -> int:
    """0..100: the zones' scores weighted by their share of the node."""
    zones = mem.zones_of(nid)
    node_present = sum(int(mem.zones["present"][zone]) for zone in zones)
    return sum(
        int(mem.zones["present"][zone]) * fragmentation_score_zone(mem.zones, zone) // (node_present + 1)
        for zone in zones
    )


def fragmentation_score_wmark(proactiveness: int, low: bool) -> int:
    """Where proactive compaction stops (low) and starts."""
    wmark_low = max(100 - proactiveness, 5)
    return wmark_low if low else min(wmark_low + 10, 100)


class ExtfragDebugfs(Kobject):
    """/sys/kernel/debug/extfrag."""

    extfrag_index = Attr(
        Text(), doc="Of each zone by order: why an allocation would fail; -1.000: it would not.", kept="memory"
    )
    unusable_index = Attr(
        Text(), doc="Of each zone by order: the part of free memory that is of no use to it.", kept="memory"
    )

    def __init__(self, mem: Mem) -> None:
        self.mem = mem

    @extfrag_index.show
    def _extfrag_index(self) -> str:
        return self._lines(fragmentation_index, 2)

    @unusable_index.show
    def _unusable_index(self) -> str:
        return self._lines(unusable_free_index, 1)

    def _lines(self, index: Callable[[Zones, int, int], int], width: int) -> str:
        text = ""
        for zone, record in enumerate(self.mem.zones):
            if record["present"]:
                text += f"Node {record['node']}, zone {self.mem.zone_name(zone):>8s} "
                text += "".join(_fixed(index(self.mem.zones, zone, order), width) for order in range(NR_PAGE_ORDERS))
                text += "\n"
        return text


def _fixed(index: int, width: int) -> str:
    """Thousandths, as C divides and prints them: -500, the index of a single free block, is ` 0.-500`."""
    whole = -(-index // 1000) if index < 0 else index // 1000
    return f"{whole:{width}d}.{index - 1000 * whole:03d} "
