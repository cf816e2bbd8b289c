# SPDX-License-Identifier: GPL-2.0-only
"""The free scanner of compaction: where pages are moved to (mm/compaction.c isolate_freepages).

It comes down from the end of the zone and takes free pages as targets, out of pageblocks that hold movable pages and
are not free as a whole. A request for a block first looks at the free lists for something in the upper quarter of what
lies between the scanners. A pageblock seen to its end gets its skip bit, and the zone's cached position moves below it.

Targets leave the buddy lists whole, as PG_held frames, and wait on `freepages` lists, one for each order.

Counting follows Linux: a free block or a compound page that is stepped over counts with all of its pages, so more
pages can be counted as scanned than a range has.
"""

from kernelsim.compact_control import (
    COMPACT_CLUSTER_MAX,
    MIGRATE_ASYNC,
    CompactControl,
    VmArrays,
)
from kernelsim.jit import njit
from kernelsim.list_head import list_add, list_add_tail, list_del
from kernelsim.migrate import is_target
from kernelsim.mmzone import (
    MIGRATE_HIGHATOMIC,
    MIGRATE_MOVABLE,
    MIGRATE_TYPES,
    NR_LRU_LISTS,
    NR_PAGE_ORDERS,
    WMARK_MIN,
    pageblock_nr_pages,
    pageblock_order,
)
from kernelsim.page import (
    Pages,
    PG_buddy,
    PG_head,
    PG_held,
    PG_nopage,
)
from kernelsim.page_alloc import del_page_from_free_list, free_list, set_pageblock_migratetype, zone_watermark_ok
from kernelsim.trace_key import (
    MM_COMPACTION_FAST_ISOLATE_FREEPAGES,
    MM_COMPACTION_ISOLATE_FREEPAGES,
    trace_key,
    trace_row,
)

BLOCK_MASK = pageblock_nr_pages - 1


@njit
def pageblock_start_pfn(pfn: int) -> int:
    return pfn & ~BLOCK_MASK


@njit
def pageblock_end_pfn(pfn: int) -> int:
    return (pfn | BLOCK_MASK) + 1


@njit
def freepages_list(v: VmArrays, zone: int, order: int) -> int:
    """Head of the list of targets of one order; these come below the LRU lists."""
    before = len(v.zones) * NR_PAGE_ORDERS * MIGRATE_TYPES + len(v.nodes) * NR_LRU_LISTS
    return len(v.pages) - 1 - (before + zone * NR_PAGE_ORDERS + order)


@njit
def compact_scanners_met(cc: CompactControl) -> bool:
    c = cc[0]
    return bool(c.free_pfn >> pageblock_order <= c.migrate_pfn >> pageblock_order)


@njit
def block_exists(v: VmArrays, start: int, end: int) -> bool:
    """Both ends are memory (pageblock_pfn_to_page); zones do not interleave here."""
    return bool(v.pages[start].flags & PG_nopage == 0 and v.pages[end - 1].flags & PG_nopage == 0)


@njit
def isolation_suitable(v: VmArrays, cc: CompactControl, pfn: int) -> bool:
    return bool(cc[0].ignore_skip_hint or v.skip[pfn >> pageblock_order] == 0)


@njit
def _suitable_migration_target(v: VmArrays, cc: CompactControl, pfn: int) -> bool:
    """A pageblock to put pages in: not free as a whole, and for movable pages."""
    if v.pages[pfn].flags & PG_buddy:
        order = cc[0].order if cc[0].order > 0 else pageblock_order
        if v.pages[pfn].order >= order:
            return False
    return bool(cc[0].ignore_block_suitable or is_target(v.pages, v.blocks, pfn))


@njit
def isolate_free_page(v: VmArrays, pfn: int) -> int:
    """Take a free block as a target; its number of pages, or 0 if the zone is too low on memory (__isolate_free_page).

    A block of half a pageblock or more makes its pageblocks movable.
    """
    zone = int(v.pages[pfn].zone)
    order = int(v.pages[pfn].order)
    if not zone_watermark_ok(v.zones, zone, 0, v.zones[zone].watermark[WMARK_MIN] + (1 << order), 0, True):
        return 0
    del_page_from_free_list(v.pages, v.zones, v.blocks, pfn)
    for page in range(pfn, pfn + (1 << order)):
        v.pages[page].flags = PG_held
    v.zones[zone].held_pages += 1 << order
    v.pages[pfn].order = order
    list_add_tail(v.pages, pfn, freepages_list(v, zone, order))
    if order >= pageblock_order - 1:
        for block in range(pfn >> pageblock_order, ((pfn + (1 << order) - 1) >> pageblock_order) + 1):
            if v.blocks[block] < MIGRATE_HIGHATOMIC and v.blocks[block] != MIGRATE_MOVABLE:
                set_pageblock_migratetype(v.pages, v.zones, v.blocks, zone, block, MIGRATE_MOVABLE)
    return 1 << order


@njit
def _isolate_freepages_block(v: VmArrays, cc: CompactControl, pfn: int, end: int, stride: int) -> tuple[int, int]:
    """Take free blocks from pfn on until there are as many targets as pages to move; (pfn reached, pages taken)."""
    c = cc[0]
    start = pfn
    nr_scanned = 0
    total = 0
    while pfn < end:
        nr_scanned += 1
        page = v.pages[pfn]
        if page.flags & PG_buddy:
            taken = isolate_free_page(v, pfn)
            if taken == 0:
                break
            nr_scanned += taken - 1
            total += taken
            c.nr_freepages += taken
            if c.nr_migratepages <= c.nr_freepages:
                pfn += taken
                break
            pfn += taken - 1
        elif page.flags & PG_head and pfn + (1 << page.order) <= end:
            nr_scanned += (1 << page.order) - 1
            pfn += (1 << page.order) - 1
        pfn += stride
    if trace_key() & MM_COMPACTION_ISOLATE_FREEPAGES:
        trace_row(MM_COMPACTION_ISOLATE_FREEPAGES, start, min(pfn, end), nr_scanned, total)
    c.total_free_scanned += nr_scanned
    v.events[0].compact_isolated += total
    return min(pfn, end), total


@njit
def isolate_freepages(v: VmArrays, cc: CompactControl) -> None:
    """Find targets for the pages that are isolated, downwards from free_pfn."""
    c = cc[0]
    fast_isolate_freepages(v, cc)
    if c.nr_freepages:
        return
    zone_end = v.zones[c.zone].end_pfn
    at = int(c.free_pfn)
    block_start = pageblock_start_pfn(at)
    block_end = min(block_start + pageblock_nr_pages, zone_end)
    low_pfn = pageblock_end_pfn(c.migrate_pfn)
    stride = COMPACT_CLUSTER_MAX if c.mode == MIGRATE_ASYNC else 1
    while block_start >= low_pfn:
        if (
            block_exists(v, block_start, block_end)
            and _suitable_migration_target(v, cc, block_start)
            and isolation_suitable(v, cc, block_start)
        ):
            at, nr_isolated = _isolate_freepages_block(v, cc, at, block_end, stride)
            if at == block_end:
                _update_pageblock_skip(v, cc, block_start)
            if c.nr_freepages >= c.nr_migratepages:
                if at >= block_end:
                    at = block_start - pageblock_nr_pages
                break
            if at < block_end:
                break  # out of memory: no use in going on
            stride = 1 if nr_isolated else min(COMPACT_CLUSTER_MAX, stride << 1)
        block_end = block_start
        block_start -= pageblock_nr_pages
        at = block_start
    c.free_pfn = at


@njit
def _update_pageblock_skip(v: VmArrays, cc: CompactControl, block_start: int) -> None:
    """The free scanner has seen all of this pageblock."""
    v.skip[block_start >> pageblock_order] = 1
    below = block_start - pageblock_nr_pages
    zone = v.zones[cc[0].zone]
    zone.compact_cached_free_pfn = min(zone.compact_cached_free_pfn, below)


# The fast search: look at the free lists instead of every page.


@njit
def freelist_scan_limit(cc: CompactControl) -> int:
    return (COMPACT_CLUSTER_MAX >> int(min(cc[0].fast_search_fail, 63))) + 1


@njit
def make_first(pages: Pages, head: int, entry: int) -> None:
    """Rotate a list so that it begins with `entry`, for the next search to see others."""
    list_del(pages, head)
    list_add_tail(pages, head, entry)


@njit
def make_last(pages: Pages, head: int, entry: int) -> None:
    list_del(pages, head)
    list_add(pages, head, entry)


@njit
def _next_search_order(cc: CompactControl, order: int) -> int:
    """Downwards, round robin; -1 when all were tried."""
    c = cc[0]
    order -= 1
    if order < 0:
        order = c.order - 1
    if order == c.search_order:
        c.search_order -= 1
        if c.search_order < 0:
            c.search_order = c.order - 1
        return -1
    return order


@njit
def _search_free_list(
    v: VmArrays, cc: CompactControl, order: int, low_pfn: int, min_pfn: int, limit: int, highest: int
) -> tuple[int, int, int, int]:
    """Look for a block above low_pfn, or at least above min_pfn, from the list's tail: (pfn or -1, limit, scanned,
    highest pageblock seen)."""
    c = cc[0]
    head = free_list(v.pages, c.zone, order, MIGRATE_MOVABLE)
    pfn = int(v.pages[head].prev)
    found = -1
    candidate = 0
    scanned = 0
    while pfn != head:
        scanned += 1
        if pfn >= highest:
            highest = max(pageblock_start_pfn(pfn), v.zones[c.zone].start_pfn)
        if pfn >= low_pfn:
            c.fast_search_fail = 0
            c.search_order = order
            found = pfn
            break
        if pfn >= min_pfn and pfn > candidate:
            candidate = pfn
            limit >>= 1
        if scanned >= limit:
            break
        pfn = int(v.pages[pfn].prev)
    if found < 0 and candidate:
        found = candidate
    if found >= 0:
        make_first(v.pages, head, found)
    elif pfn != head:
        make_first(v.pages, head, pfn)
    return found, limit, scanned, highest


@njit
def fast_isolate_freepages(v: VmArrays, cc: CompactControl) -> None:
    """Take targets from the free lists, from the upper quarter (at worst half) of what is left between the scanners."""
    c = cc[0]
    if c.order <= 0:
        return
    zone = v.zones[c.zone]
    limit = max(1, freelist_scan_limit(cc) >> 1)
    scan_start = c.free_pfn >= zone.compact_init_free_pfn
    if scan_start:
        limit = pageblock_nr_pages >> 1
    distance = c.free_pfn - c.migrate_pfn
    low_pfn = pageblock_start_pfn(c.free_pfn - (distance >> 2))
    min_pfn = pageblock_start_pfn(c.free_pfn - (distance >> 1))
    highest = 0
    found = -1
    nr_scanned = 0
    nr_isolated = 0
    c.search_order = min(c.order - 1, c.search_order)
    order = int(c.search_order)
    while found < 0 and order >= 0:
        order_scanned = 0
        if zone.nr_free[order, MIGRATE_MOVABLE]:
            found, limit, order_scanned, highest = _search_free_list(v, cc, order, low_pfn, min_pfn, limit, highest)
            nr_scanned += order_scanned
            if found >= 0:
                taken = isolate_free_page(v, found)
                if taken:
                    nr_scanned += taken - 1
                    nr_isolated += taken
                    c.nr_freepages += taken
                    v.events[0].compact_isolated += taken
                else:
                    found = -1
                    c.search_order = (c.search_order if c.search_order > 0 else c.order) - 1
                    break
            if c.nr_freepages >= c.nr_migratepages:
                break
            if order_scanned >= limit:
                limit = max(1, limit >> 1)
        order = _next_search_order(cc, order)
    if trace_key() & MM_COMPACTION_FAST_ISOLATE_FREEPAGES:
        trace_row(MM_COMPACTION_FAST_ISOLATE_FREEPAGES, min_pfn, c.free_pfn, nr_scanned, nr_isolated)
    if found < 0:
        found = _fast_search_failed(v, cc, scan_start, highest, min_pfn)
    if highest and highest >= zone.compact_cached_free_pfn:
        zone.compact_cached_free_pfn = highest - pageblock_nr_pages
    c.total_free_scanned += nr_scanned
    if found >= 0:
        _fast_isolate_around(v, cc, found)


@njit
def _fast_search_failed(v: VmArrays, cc: CompactControl, scan_start: bool, highest: int, min_pfn: int) -> int:
    """At the start of a scan, go on from the best that was seen; a pageblock to look around in, or -1."""
    c = cc[0]
    c.fast_search_fail += 1
    if not scan_start:
        return -1
    if highest >= min_pfn:
        c.free_pfn = highest
        return highest
    if not c.direct_compaction or min_pfn < v.zones[c.zone].start_pfn:
        return -1
    c.free_pfn = min_pfn
    end = min(pageblock_end_pfn(min_pfn), v.zones[c.zone].end_pfn)
    if block_exists(v, min_pfn, end) and _suitable_migration_target(v, cc, min_pfn):
        return min_pfn
    return -1


@njit
def _fast_isolate_around(v: VmArrays, cc: CompactControl, pfn: int) -> None:
    """Take the rest of the targets from the same pageblock."""
    c = cc[0]
    if c.nr_freepages >= c.nr_migratepages or (c.direct_compaction and c.mode == MIGRATE_ASYNC):
        return
    start = max(pageblock_start_pfn(pfn), v.zones[c.zone].start_pfn)
    end = min(pageblock_end_pfn(pfn), v.zones[c.zone].end_pfn)
    if not block_exists(v, start, end):
        return
    at, _ = _isolate_freepages_block(v, cc, start, end, 1)
    if at == end:
        v.skip[start >> pageblock_order] = 1
