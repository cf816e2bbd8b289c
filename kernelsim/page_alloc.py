# SPDX-License-Identifier: GPL-2.0-only
"""The buddy allocator: free blocks by order and migratetype, split on allocation, merged on free.

A free block of order o starts at a multiple of 2^o, its head carries PG_buddy and its order, and it is linked into the
list of its pageblock's migratetype. Freeing merges it with its buddy (pfn ^ 2^o) as long as that one is free, of the
same order and in the same zone, up to order 10; at order >= 9 the two pageblocks must be of the same type or both of a
type that may be merged, and then take the type of the first.

When the wanted type's lists are empty, a block of a fallback type is stolen: the whole pageblock if at least half of it
is free or already of the wanted kind, else just the block (mm/page_alloc.c try_to_claim_block).

Free CMA pages serve movable requests only: first while they are more than half of the zone's free memory, else when the
movable lists are empty, before any other type is stolen from (mm/page_alloc.c __rmqueue). No request is served from
isolated pageblocks, whose free pages do not count as free memory either (page_isolation.py).

Differences from Linux: per-CPU lists are apart (pcp.py), freed blocks always go to the list's front, no HighAtomic
reserve.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from kernelsim.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL_ACCOUNT
from kernelsim.jit import njit
from kernelsim.list_head import list_add, list_del
from kernelsim.mmzone import (
    MAX_PAGE_ORDER,
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_TYPES,
    MIGRATE_UNMOVABLE,
    NR_PAGE_ORDERS,
    WMARK_LOW,
    WMARK_MIN,
    Blocks,
    Zones,
    pageblock_nr_pages,
    pageblock_order,
)
from kernelsim.page import Pages, PG_buddy, PG_head, PG_held, PG_lru, PG_tail
from kernelsim.trace_key import (
    MM_PAGE_ALLOC,
    MM_PAGE_ALLOC_EXTFRAG,
    MM_PAGE_ALLOC_ZONE_LOCKED,
    MM_PAGE_FREE,
    trace_key,
    trace_row,
)

ENOMEM = errno.ENOMEM

ALLOC_NO_RESERVE, ALLOC_MIN_RESERVE, ALLOC_NON_BLOCK = 0, 1, 2  # how far below a watermark a request may go
PAGE_ALLOC_COSTLY_ORDER = 3

# For each migratetype the two to steal from, in order of preference (mm/page_alloc.c fallbacks).
_FALLBACKS = np.array(
    [
        [MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE],
        [MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE],
        [MIGRATE_UNMOVABLE, MIGRATE_MOVABLE],
    ],
    dtype=np.int64,
)


@njit
def free_list(pages: Pages, zone: int, order: int, migratetype: int) -> int:
    """Head of a free list."""
    return len(pages) - 1 - ((zone * NR_PAGE_ORDERS + order) * MIGRATE_TYPES + migratetype)


@njit
def account_freepages(zones: Zones, zone: int, nr_pages: int, migratetype: int) -> None:
    """Count pages that came to (or, negative, left) a free list of that type as free memory, unless it is isolated."""
    if migratetype == MIGRATE_ISOLATE:
        return
    zones[zone].free_pages += nr_pages
    if migratetype == MIGRATE_CMA:
        zones[zone].free_cma += nr_pages


@njit
def add_to_free_list(pages: Pages, zones: Zones, blocks: Blocks, pfn: int, order: int) -> None:
    """Link a block of cleared pages, at the front of its pageblock's list."""
    zone = pages[pfn].zone
    migratetype = blocks[pfn >> pageblock_order]
    pages[pfn].flags = PG_buddy
    pages[pfn].order = order
    list_add(pages, pfn, free_list(pages, zone, order, migratetype))
    zones[zone].nr_free[order, migratetype] += 1
    account_freepages(zones, zone, 1 << order, migratetype)


@njit
def del_page_from_free_list(pages: Pages, zones: Zones, blocks: Blocks, pfn: int) -> int:
    """Unlink a free block and clear its head; returns its order."""
    zone = pages[pfn].zone
    order = pages[pfn].order
    migratetype = blocks[pfn >> pageblock_order]
    list_del(pages, pfn)
    pages[pfn].flags = 0
    pages[pfn].order = 0
    zones[zone].nr_free[order, migratetype] -= 1
    account_freepages(zones, zone, -(1 << order), migratetype)
    return int(order)


@njit
def _may_merge(blocks: Blocks, pfn: int, buddy: int, order: int) -> bool:
    """Below a pageblock always; from there on only among equal or mergeable types."""
    if order < pageblock_order:
        return True
    a = blocks[pfn >> pageblock_order]
    b = blocks[buddy >> pageblock_order]
    return bool(a == b or (a < MIGRATE_HIGHATOMIC and b < MIGRATE_HIGHATOMIC))


@njit
def free_one_page(pages: Pages, zones: Zones, blocks: Blocks, pfn: int, order: int) -> None:
    """Put a block of cleared pages on the lists, merged as far as it goes (mm/page_alloc.c __free_one_page)."""
    zone = pages[pfn].zone
    start = zones[zone].start_pfn
    end = zones[zone].end_pfn
    while order < MAX_PAGE_ORDER:
        buddy = pfn ^ (1 << order)
        if buddy < start or buddy >= end:
            break
        if pages[buddy].flags & PG_buddy == 0 or pages[buddy].order != order:
            break
        if not _may_merge(blocks, pfn, buddy, order):
            break
        del_page_from_free_list(pages, zones, blocks, buddy)
        pfn &= buddy
        order += 1
    for block in range((pfn >> pageblock_order) + 1, (pfn + (1 << order)) >> pageblock_order):
        blocks[block] = blocks[pfn >> pageblock_order]
    add_to_free_list(pages, zones, blocks, pfn, order)


@njit
def clear_page(pages: Pages, pfn: int) -> None:
    """Forget owner and state; the page is nobody's and on no list."""
    page = pages[pfn]
    page.flags = 0
    page.refcount = 0
    page.mapcount = 0
    page.mapping = 0
    page.index = 0
    page.order = 0
    page.mlock_count = 0


@njit
def free_pages(pages: Pages, zones: Zones, blocks: Blocks, pfn: int, order: int) -> None:
    """Free an allocated block, whatever its refcount says: the caller held the last reference."""
    for page in range(pfn, pfn + (1 << order)):
        clear_page(pages, page)
    if trace_key() & MM_PAGE_FREE:
        trace_row(MM_PAGE_FREE, pfn, order)
    zones[pages[pfn].zone].pgfree += 1 << order
    free_one_page(pages, zones, blocks, pfn, order)


@njit
def free_range(pages: Pages, zones: Zones, blocks: Blocks, start: int, end: int) -> None:
    """Put the cleared pages start .. end-1 (of one zone) on the lists, in the largest aligned blocks."""
    pfn = start
    while pfn < end:
        order = 0
        while order < MAX_PAGE_ORDER and (pfn & ((2 << order) - 1)) == 0 and pfn + (2 << order) <= end:
            if not _may_merge(blocks, pfn, pfn + (1 << order), order):
                break
            order += 1
        free_one_page(pages, zones, blocks, pfn, order)
        pfn += 1 << order


@njit
def _expand(pages: Pages, zones: Zones, blocks: Blocks, pfn: int, low: int, high: int) -> None:
    """Give back the upper halves of a block of order `high` of which order `low` is kept."""
    while high > low:
        high -= 1
        add_to_free_list(pages, zones, blocks, pfn + (1 << high), high)


@njit
def _rmqueue_smallest(pages: Pages, zones: Zones, blocks: Blocks, zone: int, order: int, migratetype: int) -> int:
    for current in range(order, NR_PAGE_ORDERS):
        if zones[zone].nr_free[current, migratetype] == 0:
            continue
        pfn = int(pages[free_list(pages, zone, current, migratetype)].next)
        del_page_from_free_list(pages, zones, blocks, pfn)
        _expand(pages, zones, blocks, pfn, order, current)
        if trace_key() & MM_PAGE_ALLOC_ZONE_LOCKED:
            trace_row(MM_PAGE_ALLOC_ZONE_LOCKED, pfn, order, migratetype)
        return pfn
    return -1


@njit
def _block_span(zones: Zones, zone: int, block: int) -> tuple[int, int]:
    """The part of a pageblock that lies in the zone."""
    start = max(block << pageblock_order, zones[zone].start_pfn)
    end = min((block + 1) << pageblock_order, zones[zone].end_pfn)
    return start, end


@njit
def _relink(pages: Pages, zones: Zones, pfn: int, old: int, new: int) -> None:
    """Carry one free block over from the list of one migratetype to the front of another's."""
    zone = pages[pfn].zone
    order = pages[pfn].order
    list_del(pages, pfn)
    list_add(pages, pfn, free_list(pages, zone, order, new))
    zones[zone].nr_free[order, old] -= 1
    zones[zone].nr_free[order, new] += 1
    account_freepages(zones, zone, -(1 << order), old)
    account_freepages(zones, zone, 1 << order, new)


@njit
def set_pageblock_migratetype(
    pages: Pages, zones: Zones, blocks: Blocks, zone: int, block: int, migratetype: int
) -> None:
    """Change a pageblock's type; the free blocks that begin in it change lists (move_freepages_block)."""
    pfn, end = _block_span(zones, zone, block)
    old = blocks[block]
    while pfn < end:
        if pages[pfn].flags & PG_buddy:
            _relink(pages, zones, pfn, old, migratetype)
            pfn += 1 << pages[pfn].order
        else:
            pfn += 1
    blocks[block] = migratetype


@njit
def _block_is_claimable(pages: Pages, zones: Zones, zone: int, block: int, wanted: int, old: int) -> bool:
    """At least half of the pageblock is free, or in use in a way that suits the wanted type."""
    pfn, end = _block_span(zones, zone, block)
    nr_free = 0
    nr_movable = 0
    while pfn < end:
        if pages[pfn].flags & PG_buddy:
            nr_free += 1 << pages[pfn].order
            pfn += 1 << pages[pfn].order
        else:
            step = 1 << pages[pfn].order  # a large folio counts whole
            if pages[pfn].flags & PG_lru:
                nr_movable += step
            pfn += step
    nr_alike = 0
    if wanted == MIGRATE_MOVABLE:
        nr_alike = nr_movable
    elif old == MIGRATE_MOVABLE:
        nr_alike = pageblock_nr_pages - nr_free - nr_movable
    return nr_free + nr_alike >= pageblock_nr_pages // 2


@njit
def _claim(pages: Pages, zones: Zones, blocks: Blocks, zone: int, pfn: int, wanted: int) -> None:
    """Turn the pageblocks of a fallback block to the wanted type, if that is due."""
    block = pfn >> pageblock_order
    order = pages[pfn].order
    if order >= pageblock_order:
        _relink(pages, zones, pfn, blocks[block], wanted)
        for claimed in range(block, block + (1 << (order - pageblock_order))):
            blocks[claimed] = wanted
    elif (order >= pageblock_order // 2 or wanted != MIGRATE_MOVABLE) and _block_is_claimable(
        pages, zones, zone, block, wanted, blocks[block]
    ):
        set_pageblock_migratetype(pages, zones, blocks, zone, block, wanted)


@njit
def _rmqueue_fallback(pages: Pages, zones: Zones, blocks: Blocks, zone: int, order: int, wanted: int) -> int:
    """The largest block of a fallback type, so that stealing leaves few mixed pageblocks behind."""
    for current in range(MAX_PAGE_ORDER, order - 1, -1):
        for choice in range(2):
            fallback = _FALLBACKS[wanted, choice]
            if zones[zone].nr_free[current, fallback] == 0:
                continue
            pfn = int(pages[free_list(pages, zone, current, fallback)].next)
            _claim(pages, zones, blocks, zone, pfn, wanted)
            if trace_key() & MM_PAGE_ALLOC_EXTFRAG:
                owned = int(blocks[pfn >> pageblock_order] == wanted)
                trace_row(MM_PAGE_ALLOC_EXTFRAG, pfn, order, current, wanted, fallback, owned)
            del_page_from_free_list(pages, zones, blocks, pfn)
            _expand(pages, zones, blocks, pfn, order, current)
            return pfn
    return -1


@njit
def rmqueue(pages: Pages, zones: Zones, blocks: Blocks, zone: int, order: int, migratetype: int) -> int:
    """Take a block from one zone, whatever its watermarks; -1 if there is none. Its first page has refcount 1."""
    cma = migratetype == MIGRATE_MOVABLE and zones[zone].free_cma > 0
    pfn = -1
    if cma and zones[zone].free_cma > zones[zone].free_pages // 2:
        pfn = _rmqueue_smallest(pages, zones, blocks, zone, order, MIGRATE_CMA)
    if pfn < 0:
        pfn = _rmqueue_smallest(pages, zones, blocks, zone, order, migratetype)
    if pfn < 0 and cma:
        pfn = _rmqueue_smallest(pages, zones, blocks, zone, order, MIGRATE_CMA)
    if pfn < 0:
        pfn = _rmqueue_fallback(pages, zones, blocks, zone, order, migratetype)
    if pfn >= 0:
        pages[pfn].refcount = 1
        zones[zone].pgalloc += 1 << order
    return pfn


@njit
def zone_watermark_ok(
    zones: Zones, zone: int, order: int, mark: int, highest_type: int, alloc_cma: bool = False
) -> bool:
    """Free pages stay above the mark and the reserve for others, and a block large enough is there.

    Free CMA pages count only for a request that may use them (ALLOC_CMA: a movable one).
    """
    free_pages = zones[zone].free_pages - ((1 << order) - 1)
    if not alloc_cma:
        free_pages -= zones[zone].free_cma
    if free_pages <= mark + zones[zone].reserve[highest_type]:
        return False
    if order == 0:
        return True
    for current in range(order, NR_PAGE_ORDERS):
        for migratetype in range(MIGRATE_HIGHATOMIC):
            if zones[zone].nr_free[current, migratetype] > 0:
                return True
        if alloc_cma and zones[zone].nr_free[current, MIGRATE_CMA] > 0:
            return True
    return False


@njit
def alloc_mark(zones: Zones, zone: int, wmark: int, reserve: int) -> int:
    """The mark that a request must leave standing: half of it for ALLOC_MIN_RESERVE, a quarter less of that for those
    who cannot block either (__zone_watermark_ok)."""
    mark = zones[zone].watermark[wmark]
    if reserve & ALLOC_MIN_RESERVE:
        mark -= mark // 2
        if reserve & ALLOC_NON_BLOCK:
            mark -= mark // 4
    return int(mark)


@njit
def get_page_from_zonelist(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    zonelist: NDArray[np.int32],
    order: int,
    migratetype: int,
    highest_type: int,
    wmark: int,
    reserve: int,
) -> int:
    """Allocate 2^order pages from the first zone of the list that stays above one of its watermarks.

    `highest_type`: the highest zone type that the request may use, `reserve`: ALLOC_* bits. Returns the first pfn,
    whose refcount is 1, or -ENOMEM. Contents are what was left there.
    """
    alloc_cma = migratetype == MIGRATE_MOVABLE
    for zone in zonelist:
        mark = alloc_mark(zones, zone, wmark, reserve)
        if not zone_watermark_ok(zones, zone, order, mark, highest_type, alloc_cma):
            continue
        pfn = rmqueue(pages, zones, blocks, zone, order, migratetype)
        if pfn >= 0:
            if zones[zone].node == zones[zonelist[0]].node:
                zones[zone].numa_hit += 1
            else:
                zones[zone].numa_miss += 1
                zones[zonelist[0]].numa_foreign += 1
            return pfn
    return -ENOMEM


@njit
def get_page_from_freelist(
    pages: Pages, zones: Zones, blocks: Blocks, zonelist: NDArray[np.int32], order: int, migratetype: int
) -> int:
    """What a page fault tries on its own: every zone above its low watermark, then every zone above min.

    Returns a pfn as get_page_from_zonelist() does, or -ENOMEM: then it is the slow path's turn (alloc_slowpath.py).
    """
    highest_type = zones[zonelist[0]].type
    for wmark in (WMARK_LOW, WMARK_MIN):
        pfn = get_page_from_zonelist(
            pages, zones, blocks, zonelist, order, migratetype, highest_type, wmark, ALLOC_NO_RESERVE
        )
        if pfn >= 0:
            if trace_key() & MM_PAGE_ALLOC:
                gfp = GFP_HIGHUSER_MOVABLE if migratetype == MIGRATE_MOVABLE else GFP_KERNEL_ACCOUNT
                trace_row(MM_PAGE_ALLOC, pfn, order, gfp, migratetype)
            return pfn
    return -ENOMEM


@njit
def any_zone_ok(
    zones: Zones, zonelist: NDArray[np.int32], order: int, wmark: int, highest_type: int, movable: bool
) -> bool:
    """Some zone of the list could give a block of this order, to a movable request or not, and stay above the mark."""
    for zone in zonelist:
        if zone_watermark_ok(zones, zone, order, zones[zone].watermark[wmark], highest_type, movable):
            return True
    return False


@njit
def prep_compound_page(pages: Pages, pfn: int, order: int, flags: int) -> None:
    """Make an allocated block one compound page; `flags` go on every page of it (PG_huge, PG_thp)."""
    pages[pfn].flags |= PG_head | flags
    pages[pfn].order = order
    for tail in range(pfn + 1, pfn + (1 << order)):
        pages[tail].flags = PG_tail | flags
        pages[tail].index = pfn


@njit
def find_buddy_head(pages: Pages, pfn: int) -> int:
    """Head of the free block that holds pfn, or -1."""
    for order in range(NR_PAGE_ORDERS):
        head = pfn & ~((1 << order) - 1)
        if pages[head].flags & PG_buddy:
            return head if head + (1 << pages[head].order) > pfn else -1
    return -1


@njit
def hold_free_block(pages: Pages, zones: Zones, blocks: Blocks, head: int, start: int, end: int) -> int:
    """Take what of a free block lies in start .. end-1 off the lists, marked PG_held; the rest stays free.

    Held pages are free pages that only their holder may fill. Returns how many were held.
    """
    order = del_page_from_free_list(pages, zones, blocks, head)
    stop = head + (1 << order)
    lo = max(head, start)
    hi = min(stop, end)
    for pfn in range(lo, hi):
        pages[pfn].flags = PG_held
    zones[pages[lo].zone].held_pages += hi - lo
    free_range(pages, zones, blocks, head, lo)
    free_range(pages, zones, blocks, hi, stop)
    return hi - lo


@njit
def release_held(pages: Pages, zones: Zones, blocks: Blocks, start: int, end: int) -> None:
    """Give every PG_held page in start .. end-1 back to the lists, runs in the largest aligned blocks."""
    pfn = start
    while pfn < end:
        if pages[pfn].flags & PG_held == 0:
            pfn += 1
            continue
        stop = pfn
        while stop < end and pages[stop].flags & PG_held:
            pages[stop].flags = 0
            stop += 1
        zones[pages[pfn].zone].held_pages -= stop - pfn
        free_range(pages, zones, blocks, pfn, stop)
        pfn = stop


@njit
def init_range(pages: Pages, start: int, end: int, flags: int, refcount: int) -> None:
    """Give boot-time pages their first state."""
    for pfn in range(start, end):
        pages[pfn].flags = flags
        pages[pfn].refcount = refcount
