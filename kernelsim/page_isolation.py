# SPDX-License-Identifier: GPL-2.0-only
"""Taking pageblocks out of use: MIGRATE_ISOLATE (mm/page_isolation.c).

Nothing is allocated from an isolated pageblock and whatever is freed there stays there, so a range of them can be
emptied (contig.py). `start_isolate_page_range` isolates every pageblock that overlaps a range, or none of them: a page
in the range that can never move refuses. `undo_isolate_page_range` gives the pageblocks their types back.

A free block of order 10 covers two pageblocks; where only one of them is isolated it is cut in two, and put together
again when the isolation ends.

Invariants (debug_vm): a zone's nr_isolate_pageblock counts its isolated pageblocks; the free pages in them do not count
as free memory.

Differences from Linux: the types are kept by who isolated the range, not in a bit of their own beside the type, which
6.16 introduced; the outcome is the same, each pageblock gets its own type back. Pages are judged where the range
overlaps a pageblock, as Linux does since 5.18. A page that a batch is moving does not refuse: it will be on an LRU list
again, and who empties the range waits for it.
"""

import errno
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit
from kernelsim.mmzone import (
    MAX_PAGE_ORDER,
    MIGRATE_CMA,
    MIGRATE_ISOLATE,
    Blocks,
    Mem,
    Zones,
    pageblock_nr_pages,
    pageblock_order,
)
from kernelsim.page import (
    Pages,
    PG_buddy,
    PG_head,
    PG_held,
    PG_huge,
    PG_isolated,
    PG_lru,
    PG_nopage,
    PG_reserved,
    PG_tail,
    compound_head,
)
from kernelsim.page_alloc import (
    add_to_free_list,
    del_page_from_free_list,
    find_buddy_head,
    free_one_page,
    set_pageblock_migratetype,
)
from kernelsim.printk import KERN_WARNING, Printk


class RangeBusy(OSError):
    """EBUSY, and the first page that is in the way."""

    def __init__(self, pfn: int, why: str) -> None:
        super().__init__(errno.EBUSY, why)
        self.pfn = pfn


@dataclass(frozen=True)
class IsolatedRange:
    """Pageblocks of a zone, from pfn `start` to `end` (multiples of a pageblock), and the types they had, uint8[]."""

    zone: int
    start: int
    end: int
    types: NDArray[np.uint8]


@njit
def has_unmovable_pages(pages: Pages, start: int, end: int) -> int:
    """The first page of a range that can never move, or -1: neither free, nor on an LRU list, nor a hugetlb page.

    Pins are no reason: Linux finds them only when it tries to move the page.
    """
    pfn = start
    while pfn < end:
        flags = pages[pfn].flags
        if flags & PG_buddy:
            pfn += 1 << pages[pfn].order
        elif flags & (PG_head | PG_tail):
            head = compound_head(pages, pfn)
            if pages[head].flags & (PG_lru | PG_isolated | PG_huge) == 0:
                return pfn
            pfn = head + (1 << pages[head].order)
        elif flags & (PG_nopage | PG_reserved):
            return pfn
        elif flags & (PG_lru | PG_isolated | PG_held) or pages[pfn].refcount == 0:
            pfn += 1
        else:
            return pfn
    return -1


@njit
def _split_free_block(pages: Pages, zones: Zones, blocks: Blocks, pfn: int) -> None:
    """Cut the free block that begins before, or reaches beyond, the pageblock at `pfn` into pageblocks."""
    head = find_buddy_head(pages, pfn)
    if head < 0 or pages[head].order <= pageblock_order:
        return
    order = del_page_from_free_list(pages, zones, blocks, head)
    for part in range(head + (1 << order) - pageblock_nr_pages, head - 1, -pageblock_nr_pages):
        add_to_free_list(pages, zones, blocks, part, pageblock_order)


@njit
def set_migratetype_isolate(pages: Pages, zones: Zones, blocks: Blocks, zone: int, block: int) -> None:
    """Isolate one pageblock of a zone; its free pages change lists."""
    _split_free_block(pages, zones, blocks, max(block << pageblock_order, zones[zone].start_pfn))
    set_pageblock_migratetype(pages, zones, blocks, zone, block, MIGRATE_ISOLATE)
    zones[zone].nr_isolate_pageblock += 1


@njit
def unset_migratetype_isolate(
    pages: Pages, zones: Zones, blocks: Blocks, zone: int, block: int, migratetype: int
) -> None:
    """Put one pageblock back to use."""
    _split_free_block(pages, zones, blocks, max(block << pageblock_order, zones[zone].start_pfn))
    set_pageblock_migratetype(pages, zones, blocks, zone, block, migratetype)
    zones[zone].nr_isolate_pageblock -= 1


@njit
def _merge_again(pages: Pages, zones: Zones, blocks: Blocks, pfn: int) -> None:
    """Free a whole free pageblock once more, so that it joins its neighbour."""
    if pages[pfn].flags & PG_buddy and pageblock_order <= pages[pfn].order < MAX_PAGE_ORDER:
        order = del_page_from_free_list(pages, zones, blocks, pfn)
        free_one_page(pages, zones, blocks, pfn, order)


@njit
def test_pages_isolated(pages: Pages, blocks: Blocks, start: int, end: int) -> int:
    """The first page of a range that is not free in an isolated pageblock, or `end`. `start` may lie in a block."""
    head = find_buddy_head(pages, start)
    pfn = start if head < 0 else head
    while pfn < end:
        if pages[pfn].flags & PG_buddy == 0 or blocks[pfn >> pageblock_order] != MIGRATE_ISOLATE:
            return pfn
        pfn += 1 << pages[pfn].order
    return end


def start_isolate_page_range(
    mem: Mem, start: int, end: int, *, cma: bool = False, report_to: Printk | None = None
) -> IsolatedRange:
    """Isolate the pageblocks that overlap the pages start .. end-1, all of one zone.

    RangeBusy, and nothing changed, if a page cannot move, if a pageblock is isolated already, or if it is a CMA
    area's and the caller is not (PB_ISOLATE_MODE_CMA_ALLOC). `report_to`, a log (REPORT_FAILURE), is told which page.
    """
    zone = int(mem.pages["zone"][start])
    first, last = start >> pageblock_order, -(-end // pageblock_nr_pages)
    pfn = has_unmovable_pages(mem.pages, start, end)
    if pfn >= 0:
        if report_to is not None:
            dump_page(mem, pfn, "unmovable page", report_to)
        raise RangeBusy(pfn, "a page in the range cannot move")
    types = mem.blocks[first:last].copy()
    if (types == MIGRATE_ISOLATE).any() or (not cma and (types == MIGRATE_CMA).any()):
        raise RangeBusy(start, "the range is somebody else's")
    for block in range(first, last):
        set_migratetype_isolate(mem.pages, mem.zones, mem.blocks, zone, block)
    return IsolatedRange(zone, first << pageblock_order, last << pageblock_order, types)


def undo_isolate_page_range(mem: Mem, isolated: IsolatedRange) -> None:
    """End an isolation: the pageblocks get their types back, and what is free in them merges with its surroundings."""
    zone = isolated.zone
    first = isolated.start >> pageblock_order
    for i, migratetype in enumerate(isolated.types.tolist()):
        unset_migratetype_isolate(mem.pages, mem.zones, mem.blocks, zone, first + i, migratetype)
    for pfn in range(isolated.start, isolated.end, pageblock_nr_pages):
        _merge_again(mem.pages, mem.zones, mem.blocks, pfn)


def dump_page(mem: Mem, pfn: int, reason: str, printk: Printk) -> None:
    """What the kernel's dump_page() says of a page, in its words (mm/debug.c)."""
    page = mem.pages[pfn]
    printk(
        f"page: refcount:{page['refcount']} mapcount:{page['mapcount']} mapping:{int(page['mapping']):016x} "
        f"index:{int(page['index']):#x} pfn:{pfn:#x}",
        KERN_WARNING,
    )
    printk(f"page dumped because: {reason}", KERN_WARNING)
