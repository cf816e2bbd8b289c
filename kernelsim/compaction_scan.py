# SPDX-License-Identifier: GPL-2.0-only
"""The migrate scanner of compaction: which pages are moved (mm/compaction.c isolate_migratepages).

It goes up from the start of the zone, pageblock by pageblock, and isolates what can be moved: up to a cluster of 32
pages at a time, a whole pageblock the second time it meets the same one. A request for a block looks at the free lists
first, for a pageblock that is partly free already. A pageblock that gave nothing gets its skip bit, which later runs
honour, and the zone's cached positions move past it.

Differences from Linux: nothing else runs while a batch is isolated, so there are no locks to contend, no throttling for
too many isolated pages, and no folio that disappears between two looks.
"""

from kernelsim.compact_control import (
    COMPACT_CLUSTER_MAX,
    MAX_MIGRATE_PAGES,
    MIGRATE_ASYNC,
    MIGRATE_SYNC,
    CompactControl,
    VmArrays,
)
from kernelsim.compaction_free import (
    BLOCK_MASK,
    block_exists,
    freelist_scan_limit,
    isolation_suitable,
    make_last,
    pageblock_end_pfn,
    pageblock_start_pfn,
)
from kernelsim.jit import njit
from kernelsim.lruvec import folio_isolate_lru
from kernelsim.migrate import putback_or_free
from kernelsim.mmzone import (
    MIGRATE_MOVABLE,
    pageblock_nr_pages,
    pageblock_order,
)
from kernelsim.page import (
    Pages,
    PG_anon,
    PG_buddy,
    PG_head,
    PG_huge,
    PG_lru,
    PG_swapcache,
    PG_tail,
    PG_unevictable,
    PG_writeback,
)
from kernelsim.page_alloc import PAGE_ALLOC_COSTLY_ORDER, free_list
from kernelsim.trace_key import MM_COMPACTION_ISOLATE_MIGRATEPAGES, trace_key, trace_row

_NO_FAST_START = -1


@njit
def _reinit_migrate_pfn(cc: CompactControl) -> int:
    """Once, go back to the lowest block that a fast search found."""
    c = cc[0]
    if c.fast_start_pfn == 0 or c.fast_start_pfn == _NO_FAST_START:
        return int(c.migrate_pfn)
    c.migrate_pfn = c.fast_start_pfn
    c.fast_start_pfn = _NO_FAST_START
    return int(c.migrate_pfn)


@njit
def _found_migrateblock(v: VmArrays, cc: CompactControl, pfn: int) -> int:
    c = cc[0]
    if c.fast_start_pfn != _NO_FAST_START:
        c.fast_start_pfn = pfn if c.fast_start_pfn == 0 else min(c.fast_start_pfn, pfn)
    c.fast_search_fail = 0
    return max(pageblock_start_pfn(pfn), int(v.zones[c.zone].start_pfn))


@njit
def fast_find_migrateblock(v: VmArrays, cc: CompactControl) -> int:
    """A pageblock that is partly free already, near the migrate scanner; else where the scanner is."""
    c = cc[0]
    pfn = int(c.migrate_pfn)
    zone_start = v.zones[c.zone].start_pfn
    if c.ignore_skip_hint or c.finish_pageblock or (pfn != zone_start and pfn & BLOCK_MASK):
        return pfn
    if c.order <= PAGE_ALLOC_COSTLY_ORDER or (c.direct_compaction and c.migratetype != MIGRATE_MOVABLE):
        return pfn
    distance = (c.free_pfn - pfn) >> 1
    if pfn != zone_start:
        distance >>= 2
    high_pfn = pageblock_start_pfn(pfn + distance)
    limit = freelist_scan_limit(cc)
    nr_scanned = 0
    found = -1
    order = c.order - 1
    while order >= PAGE_ALLOC_COSTLY_ORDER and found < 0 and nr_scanned < limit:
        head = free_list(v.pages, c.zone, order, MIGRATE_MOVABLE)
        entry = int(v.pages[head].next)
        while entry != head:
            nr_scanned += 1
            if nr_scanned > limit:
                make_last(v.pages, head, entry)
                break
            if entry < high_pfn and v.skip[entry >> pageblock_order] == 0:
                make_last(v.pages, head, entry)
                found = _found_migrateblock(v, cc, entry)
                break
            entry = int(v.pages[entry].next)
        order -= 1
    c.total_migrate_scanned += nr_scanned
    if found < 0:
        c.fast_search_fail += 1
        return _reinit_migrate_pfn(cc)
    return found


@njit
def _update_cached_migrate(v: VmArrays, cc: CompactControl, pfn: int) -> None:
    cached = v.zones[cc[0].zone].compact_cached_migrate_pfn
    pfn = pageblock_end_pfn(pfn)
    cached[0] = max(cached[0], pfn)
    if cc[0].mode != MIGRATE_ASYNC:
        cached[1] = max(cached[1], pfn)


@njit
def _has_mapping(pages: Pages, pfn: int) -> bool:
    """folio_mapping(): a file's page, or one in the swap cache."""
    if pages[pfn].flags & PG_anon:
        return bool(pages[pfn].flags & PG_swapcache)
    return bool(pages[pfn].mapping != 0)


@njit
def may_isolate(v: VmArrays, cc: CompactControl, pfn: int) -> bool:
    """Whether an LRU folio is worth isolating. A file page's pins show only when it is to be moved."""
    c = cc[0]
    page = v.pages[pfn]
    mapping = _has_mapping(v.pages, pfn)
    if page.flags & PG_writeback and c.mode != MIGRATE_SYNC:
        return False
    if not mapping and page.refcount > max(page.mapcount, 1):
        return False
    if mapping and not c.may_enter_fs:
        return False
    return bool(c.unevictable_allowed or page.flags & PG_unevictable == 0)


@njit
def _suitable_migration_source(v: VmArrays, cc: CompactControl, pfn: int) -> bool:
    c = cc[0]
    page = v.pages[pfn]
    if page.flags & (PG_head | PG_tail) and page.order >= pageblock_order:
        return False
    if c.mode != MIGRATE_ASYNC or not c.direct_compaction:
        return True
    return bool(v.blocks[pfn >> pageblock_order] == c.migratetype)


@njit
def putback_movable_pages(v: VmArrays, cc: CompactControl) -> None:
    """Give up what is isolated."""
    for i in range(cc[0].nr_src):
        putback_or_free(v.pages, v.zones, v.blocks, v.nodes, v.src[i])
    cc[0].nr_src = 0
    cc[0].nr_migratepages = 0


@njit
def _isolate(v: VmArrays, cc: CompactControl, pfn: int, nr: int) -> None:
    c = cc[0]
    folio_isolate_lru(v.pages, v.zones, v.nodes, pfn)
    v.src[c.nr_src] = pfn
    c.nr_src += 1
    c.nr_migratepages += nr


@njit
def _was_skipped(v: VmArrays, cc: CompactControl, block: int) -> bool:
    """Set a pageblock's skip bit at its first isolated page; True if it is to be left because it had it already."""
    c = cc[0]
    if c.ignore_skip_hint:
        return False
    before = v.skip[block]
    v.skip[block] = 1
    return bool(before and not c.finish_pageblock)


@njit
def isolate_migratepages_block(v: VmArrays, cc: CompactControl, low_pfn: int, end: int) -> int:
    """Isolate from low_pfn on, within a pageblock, into `src`; returns how many pages. migrate_pfn is where it stopped.

    Async direct compaction gives an aligned chunk of the wanted order up at the first page in it that must stay.
    """
    c = cc[0]
    nr_scanned = 0
    nr_isolated = 0
    block = low_pfn >> pageblock_order
    # who begins in the middle of a pageblock has dealt with its skip bit before
    hinted = low_pfn & BLOCK_MASK == 0 or low_pfn == v.zones[c.zone].start_pfn
    skip_on_failure = c.direct_compaction and c.mode == MIGRATE_ASYNC and c.order > 0
    chunk = 1 << max(c.order, 0)
    chunk_end = (low_pfn | (chunk - 1)) + 1
    while low_pfn < end:
        if skip_on_failure and low_pfn >= chunk_end:
            if nr_isolated:
                break
            chunk_end = (low_pfn | (chunk - 1)) + 1
        nr_scanned += 1
        flags = v.pages[low_pfn].flags
        nr = 1 << v.pages[low_pfn].order if flags & (PG_buddy | PG_head) else 1
        if flags & PG_buddy:
            nr_scanned += nr - 1
            low_pfn += nr
            continue
        too_large = nr > 1 and ((c.order != -1 and nr >= chunk) or nr >= pageblock_nr_pages)
        if flags & PG_huge or too_large:
            nr_scanned += nr - 1
            low_pfn += nr
        elif flags & PG_lru and c.nr_src < MAX_MIGRATE_PAGES and may_isolate(v, cc, low_pfn):
            if hinted and _was_skipped(v, cc, block):
                low_pfn = end
                break
            hinted = False
            _isolate(v, cc, low_pfn, nr)
            nr_isolated += nr
            nr_scanned += nr - 1
            low_pfn += nr
            if c.nr_migratepages >= COMPACT_CLUSTER_MAX and not c.finish_pageblock:
                break
            continue
        else:
            low_pfn += 1
        if skip_on_failure:
            if nr_isolated:
                putback_movable_pages(v, cc)
                nr_isolated = 0
            if low_pfn <= chunk_end:
                low_pfn = chunk_end
                chunk_end += chunk
    low_pfn = min(low_pfn, end)
    if low_pfn == end and (nr_isolated == 0 or c.finish_pageblock):
        if hinted:
            v.skip[block] = 1
        _update_cached_migrate(v, cc, low_pfn)
    c.total_migrate_scanned += nr_scanned
    v.events[0].compact_isolated += nr_isolated
    c.migrate_pfn = low_pfn
    return nr_isolated


@njit
def isolate_migratepages(v: VmArrays, cc: CompactControl) -> int:
    """Go on to the next pageblock that gives something, not beyond the free scanner; returns how many pages."""
    c = cc[0]
    zone = v.zones[c.zone]
    low_pfn = fast_find_migrateblock(v, cc)
    fast_find_block = low_pfn != c.migrate_pfn and c.fast_search_fail == 0
    block_start = max(pageblock_start_pfn(low_pfn), int(zone.start_pfn))
    block_end = pageblock_end_pfn(low_pfn)
    while block_end <= c.free_pfn:
        if block_exists(v, block_start, block_end):
            at_start = low_pfn & BLOCK_MASK == 0 or low_pfn == zone.start_pfn
            if not at_start or fast_find_block or isolation_suitable(v, cc, low_pfn):
                if _suitable_migration_source(v, cc, low_pfn):
                    before = c.total_migrate_scanned
                    nr_isolated = isolate_migratepages_block(v, cc, low_pfn, block_end)
                    if trace_key() & MM_COMPACTION_ISOLATE_MIGRATEPAGES:
                        nr_scanned = c.total_migrate_scanned - before
                        trace_row(MM_COMPACTION_ISOLATE_MIGRATEPAGES, low_pfn, c.migrate_pfn, nr_scanned, nr_isolated)
                    return nr_isolated
                _update_cached_migrate(v, cc, block_end)
        fast_find_block = False
        low_pfn = block_end
        c.migrate_pfn = low_pfn
        block_start = block_end
        block_end += pageblock_nr_pages
    return 0
