# SPDX-License-Identifier: GPL-2.0-only
"""compact_zone()'s loop: isolate, find targets, migrate, until the scanners meet or the request can be met.

migrate_pages() follows mm/migrate.c for one batch: every folio gets a target and its PTEs become migration entries; one
TLB flush for each mm; then contents, identity and PTEs pass to the targets, and the vacated pages are freed. A folio
that somebody else holds goes back where it was. A large folio that is mapped in part only, and so due to be split, is
split first of all; one for which there is no target of its size is split too. Their pages come last. If the targets run
out, what has one is moved and the rest put back: on a real machine it is mostly a dirty large folio of the page cache,
which cannot be split, that ends a compaction so (`contended`).

A freed page goes to the per-CPU lists of the compacting CPU where the machine has such lists (pcp.py), else to the
buddy lists, where a direct compaction catches the block it was started for (compaction_capture()).

Between two calls of compact_zone_slice() nothing is isolated; only targets are held.
"""

from kernelsim.compact_control import (
    COMPACT_COMPLETE,
    COMPACT_CONTENDED,
    COMPACT_CONTINUE,
    COMPACT_NO_SUITABLE_PAGE,
    COMPACT_PARTIAL_SKIPPED,
    COMPACT_SUCCESS,
    MIGRATE_SYNC,
    CompactControl,
    VmArrays,
)
from kernelsim.compaction_free import compact_scanners_met, freepages_list, isolate_freepages, pageblock_start_pfn
from kernelsim.compaction_scan import isolate_migratepages, putback_movable_pages
from kernelsim.content import folio_copy
from kernelsim.extfrag import fragmentation_score_zone
from kernelsim.huge_memory import split_folio
from kernelsim.jit import njit
from kernelsim.list_head import list_add, list_del
from kernelsim.lruvec import folio_isolate_lru, folio_putback_lru
from kernelsim.migrate import flush_touched, folio_migrate, putback_or_free
from kernelsim.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    NR_PAGE_ORDERS,
    Zones,
    pageblock_nr_pages,
    pageblock_order,
)
from kernelsim.page import PG_anon, PG_isolated, PG_lru, PG_partially_mapped, PG_private
from kernelsim.page_alloc import (
    del_page_from_free_list,
    find_buddy_head,
    free_range,
    zone_watermark_ok,
)
from kernelsim.pcp import drain_pages_zone, free_frozen_pages
from kernelsim.rmap import remove_migration_ptes, try_to_migrate
from kernelsim.trace_key import (
    MM_COMPACTION_FINISHED,
    MM_COMPACTION_MIGRATEPAGES,
    MM_MIGRATE_PAGES,
    MM_MIGRATE_PAGES_START,
    trace_key,
    trace_row,
)

_MR_COMPACTION = 0  # enum migrate_reason
_MIGRATE_COST = 64  # moving a page takes about as long as looking at so many


# Targets.


@njit
def _take_target(v: VmArrays, cc: CompactControl, order: int) -> int:
    """A held block of that order off the freepages lists, split if need be; -1 if there is none (compaction_alloc)."""
    zone = int(cc[0].zone)
    for current in range(order, NR_PAGE_ORDERS):
        head = freepages_list(v, zone, current)
        pfn = int(v.pages[head].next)
        if pfn == head:
            continue
        list_del(v.pages, pfn)
        v.pages[pfn].order = 0
        while current > order:
            current -= 1
            upper = pfn + (1 << current)
            v.pages[upper].order = current
            list_add(v.pages, upper, freepages_list(v, zone, current))
        cc[0].nr_freepages -= 1 << order
        return pfn
    return -1


@njit
def _compaction_alloc(v: VmArrays, cc: CompactControl, order: int) -> int:
    """A target, looking for more free pages if there is none; -1."""
    pfn = _take_target(v, cc, order)
    if pfn < 0:
        isolate_freepages(v, cc)
        pfn = _take_target(v, cc, order)
    if pfn >= 0:
        cc[0].nr_migratepages -= 1 << order
    return pfn


@njit
def _compaction_free(v: VmArrays, cc: CompactControl, pfn: int, order: int) -> None:
    """Give an unused target back to the lists."""
    v.pages[pfn].order = order
    list_add(v.pages, pfn, freepages_list(v, int(cc[0].zone), order))
    cc[0].nr_freepages += 1 << order
    cc[0].nr_migratepages += 1 << order


@njit
def _free_held(v: VmArrays, cc: CompactControl, pfn: int, order: int) -> None:
    """Free a held block for good."""
    zone = int(cc[0].zone)
    for page in range(pfn, pfn + (1 << order)):
        v.pages[page].flags = 0
    v.pages[pfn].order = 0
    v.zones[zone].held_pages -= 1 << order
    free_frozen_pages(v.pages, v.zones, v.blocks, v.nodes, v.pagesets, int(cc[0].cpu), pfn, order)
    if cc[0].capture_wanted and cc[0].captured < 0:
        _capture(v, cc, pfn)


@njit
def _capture(v: VmArrays, cc: CompactControl, pfn: int) -> None:
    """Catch the block that freeing pfn completed, if it is what the request wants (compaction_capture)."""
    c = cc[0]
    head = find_buddy_head(v.pages, pfn)
    if head < 0 or v.pages[head].order < c.order:
        return
    migratetype = v.blocks[pfn >> pageblock_order]
    if migratetype >= MIGRATE_HIGHATOMIC:
        return
    if c.order < pageblock_order and migratetype == MIGRATE_MOVABLE and c.migratetype != MIGRATE_MOVABLE:
        return
    wanted = pfn & ~((1 << c.order) - 1)
    end = head + (1 << v.pages[head].order)
    del_page_from_free_list(v.pages, v.zones, v.blocks, head)
    free_range(v.pages, v.zones, v.blocks, head, wanted)
    free_range(v.pages, v.zones, v.blocks, wanted + (1 << c.order), end)
    v.pages[wanted].refcount = 1
    v.zones[c.zone].pgalloc += 1 << c.order
    c.captured = wanted


@njit
def release_free_list(v: VmArrays, cc: CompactControl) -> None:
    """Free the targets that were not used; the free scanner will start above them next time."""
    c = cc[0]
    zone = v.zones[c.zone]
    highest = 0
    for order in range(NR_PAGE_ORDERS):
        head = freepages_list(v, int(c.zone), order)
        while v.pages[head].next != head:
            pfn = int(v.pages[head].next)
            list_del(v.pages, pfn)
            highest = max(highest, pfn)
            _free_held(v, cc, pfn, order)
    c.nr_freepages = 0
    highest = pageblock_start_pfn(highest)
    zone.compact_cached_free_pfn = max(zone.compact_cached_free_pfn, highest)


# Migration of a batch.


@njit
def _only_expected_references(v: VmArrays, pfn: int) -> bool:
    """After unmapping: the isolation's, those of the page cache, one for private data (folio_expected_refs)."""
    page = v.pages[pfn]
    cached = 1 << page.order if page.flags & PG_anon == 0 and page.mapping != 0 else 0
    private = 1 if page.flags & PG_private else 0
    return bool(page.mapcount == 0 and page.refcount == 1 + cached + private + (page.mapping == 0))


@njit
def _move_folio(v: VmArrays, cc: CompactControl, src: int, dst: int) -> None:
    order = int(v.pages[src].order)
    folio_copy(v.memory, dst, src, 1 << order)
    v.events[0].thp_migration_success += order >= pageblock_order
    folio_migrate(v.pages, v.zones, v.nodes, v.avcs, v.i_pages, src, dst)
    remove_migration_ptes(v.pages, v.zones, v.nodes, v.vmas, v.avcs, v.pt, src, dst)
    putback_or_free(v.pages, v.zones, v.blocks, v.nodes, dst)
    _free_held(v, cc, src, order)
    cc[0].nr_succeeded += 1 << order


@njit
def _restore_folio(v: VmArrays, src: int) -> None:
    remove_migration_ptes(v.pages, v.zones, v.nodes, v.vmas, v.avcs, v.pt, src, src)
    putback_or_free(v.pages, v.zones, v.blocks, v.nodes, src)


@njit
def _split_isolated(v: VmArrays, head: int) -> bool:
    """Make isolated single pages of an isolated folio (try_split_folio); False if it cannot be split."""
    order = int(v.pages[head].order)
    if order == 0:
        return False
    folio_putback_lru(v.pages, v.zones, v.nodes, head)
    if split_folio(v.pages, v.zones, v.blocks, v.nodes, v.vmas, v.avcs, v.pt, v.events, head):
        folio_isolate_lru(v.pages, v.zones, v.nodes, head)
        return False
    v.events[0].thp_migration_split += order >= pageblock_order
    for pfn in range(head, head + (1 << order)):
        if v.pages[pfn].flags & PG_lru:
            folio_isolate_lru(v.pages, v.zones, v.nodes, pfn)
    return True


@njit
def _take_split(v: VmArrays, cc: CompactControl, first: int, nr: int) -> None:
    """Let src be the pages of those folios of src[first..nr-1] that were split, the first split last."""
    nr_folios = 0
    at = 0
    for i in range(first, nr):
        if v.dst[i] < 0:
            v.src[nr_folios], v.dst[nr_folios] = v.src[i], v.dst[i]
            nr_folios += 1
            at += 1 << (-1 - v.dst[i])
    nr_pages = at
    for i in range(nr_folios - 1, -1, -1):  # from the back: what is written lies behind what is still to be read
        head, size = v.src[i], 1 << (-1 - v.dst[i])
        at -= size
        for k in range(size):
            v.src[at + (size - k) % size] = head + k
    kept = 0
    for i in range(nr_pages):
        if v.pages[v.src[i]].flags & PG_isolated:  # the others nobody had mapped: they were freed
            v.src[kept] = v.src[i]
            kept += 1
    cc[0].nr_src = kept


@njit
def _due_to_split(v: VmArrays, head: int) -> bool:
    """An anonymous folio some of whose pages nobody maps any more, which waits to be split (_deferred_list)."""
    return bool(v.pages[head].order > 1 and v.pages[head + 1].flags & PG_partially_mapped)


@njit
def _unmap_batch(v: VmArrays, cc: CompactControl) -> tuple[int, int]:
    """Give the folios of src targets, the last first, and unmap them; (the first that has one, how many were split).

    A folio that was split has -1 - order in dst; its pages are isolated, and to be moved later.
    """
    first = int(cc[0].nr_src)
    nr_split = 0
    while first > 0:
        src = v.src[first - 1]
        order = int(v.pages[src].order)
        split = _due_to_split(v, src) and _split_isolated(v, src)
        dst = -1 if split else _compaction_alloc(v, cc, order)
        if dst >= 0:
            try_to_migrate(v.pages, v.zones, v.nodes, v.vmas, v.avcs, v.pt, v.touched, src)
        elif split or _split_isolated(v, src):
            dst = -1 - order
            nr_split += 1
        else:
            break
        first -= 1
        v.dst[first] = dst
    flush_touched(v.tlbs, v.events, v.touched)
    return first, nr_split


@njit
def _migrate_batch(v: VmArrays, cc: CompactControl) -> tuple[int, int]:
    """Move the folios of src, the last first, as far as there are targets. Returns (pages that failed, folios split).

    nr_src becomes the number of folios not tried; of these the last found no target.
    """
    c = cc[0]
    nr = int(c.nr_src)
    first, nr_split = _unmap_batch(v, cc)
    nr_failed = 0
    for i in range(nr - 1, first - 1, -1):
        src = v.src[i]
        if v.dst[i] < 0:
            continue
        if _only_expected_references(v, src):
            _move_folio(v, cc, src, v.dst[i])
        else:
            nr_failed += 1 << v.pages[src].order
            _restore_folio(v, src)
            _compaction_free(v, cc, v.dst[i], int(v.pages[src].order))
    c.nr_src = first
    if first > 0:
        nr_failed += 1 << v.pages[v.src[first - 1]].order  # the rest was not tried and does not count
    return nr_failed, nr_split


@njit
def migrate_pages(v: VmArrays, cc: CompactControl) -> tuple[int, bool]:
    """Move what is isolated, the last isolated first. Returns (pages that failed, whether targets ran out).

    The pages of large folios that were split are tried once the others are done. As on Linux a folio that was split
    counts as one failure, and its pages as none for that, whatever becomes of them; pgmigrate_fail has what failed.
    """
    c = cc[0]
    nr = int(c.nr_src)
    if trace_key() & MM_MIGRATE_PAGES_START:
        trace_row(MM_MIGRATE_PAGES_START, c.mode, _MR_COMPACTION)
    before = c.nr_succeeded
    nr_thps, nr_thp_splits = v.events[0].thp_migration_success, v.events[0].thp_migration_split
    nr_failed, nr_split = _migrate_batch(v, cc)
    nr_reported = nr_failed + nr_split
    first = int(c.nr_src)
    no_targets = first > 0
    for i in range(first):
        putback_or_free(v.pages, v.zones, v.blocks, v.nodes, v.src[i])
    _take_split(v, cc, first, nr)
    if not no_targets:
        nr_failed += _migrate_batch(v, cc)[0]
    putback_movable_pages(v, cc)
    v.events[0].pgmigrate_fail += nr_failed
    if trace_key() & MM_MIGRATE_PAGES:
        nr_thps = v.events[0].thp_migration_success - nr_thps
        nr_thp_splits = v.events[0].thp_migration_split - nr_thp_splits
        moved = c.nr_succeeded - before
        trace_row(MM_MIGRATE_PAGES, moved, nr_failed, nr_thps, 0, nr_thp_splits, nr_split, c.mode, _MR_COMPACTION)
    return nr_reported, no_targets


# The loop.


@njit
def _reset_cached_positions(v: VmArrays, zone: int) -> None:
    z = v.zones[zone]
    z.compact_cached_migrate_pfn[0] = z.start_pfn
    z.compact_cached_migrate_pfn[1] = z.start_pfn
    z.compact_cached_free_pfn = pageblock_start_pfn(z.end_pfn - 1)


@njit
def _suitable_page_free(v: VmArrays, cc: CompactControl) -> bool:
    """A free block that the request may have, or steal without making a mess."""
    c = cc[0]
    for order in range(c.order, NR_PAGE_ORDERS):
        nr_free = v.zones[c.zone].nr_free
        if nr_free[order, c.migratetype] > 0:
            return True
        if c.migratetype == MIGRATE_MOVABLE and nr_free[order, MIGRATE_CMA] > 0:
            return True
        may_steal = order >= pageblock_order // 2 or c.migratetype != MIGRATE_MOVABLE
        if may_steal:
            for migratetype in range(MIGRATE_HIGHATOMIC):
                if nr_free[order, migratetype] > 0:
                    return True
    return False


@njit
def zone_blocks_ok(zones: Zones, zone: int, order: int, mark: int, highest_type: int) -> bool:
    """zone_watermark_ok(), counting only what is free in whole pageblocks (NR_FREE_PAGES_BLOCKS)."""
    in_blocks = 0
    for large in range(pageblock_order, NR_PAGE_ORDERS):
        for migratetype in range(MIGRATE_ISOLATE):
            in_blocks += zones[zone].nr_free[large, migratetype] << large
    return zone_watermark_ok(zones, zone, order, mark + zones[zone].free_pages - in_blocks, highest_type)


@njit
def compact_finished(v: VmArrays, cc: CompactControl) -> int:
    c = cc[0]
    if compact_scanners_met(cc):
        _reset_cached_positions(v, c.zone)
        if c.direct_compaction:
            v.zones[c.zone].compact_blockskip_flush = 1
        return COMPACT_COMPLETE if c.whole_zone else COMPACT_PARTIAL_SKIPPED
    if c.proactive_mark >= 0:
        return COMPACT_CONTINUE if fragmentation_score_zone(v.zones, c.zone) > c.proactive_mark else COMPACT_SUCCESS
    if c.order == -1 or c.migrate_pfn & (pageblock_nr_pages - 1):
        return COMPACT_CONTINUE
    if c.blocks_mark >= 0:
        enough = zone_blocks_ok(v.zones, c.zone, c.order, c.blocks_mark, c.highest_type)
        return COMPACT_SUCCESS if enough else COMPACT_CONTINUE
    return COMPACT_SUCCESS if _suitable_page_free(v, cc) else COMPACT_NO_SUITABLE_PAGE


@njit
def _keep_cached_in_sync(v: VmArrays, cc: CompactControl) -> None:
    """As long as an async run finds nothing, a sync run would find nothing either."""
    if cc[0].update_cached:
        cached = v.zones[cc[0].zone].compact_cached_migrate_pfn
        cached[1] = cached[0]


@njit
def _one_round(v: VmArrays, cc: CompactControl) -> int:
    """Isolate and migrate once; COMPACT_CONTINUE or the result to stop with."""
    c = cc[0]
    c.finish_pageblock = pageblock_start_pfn(c.last_migrated_pfn) == pageblock_start_pfn(c.migrate_pfn)
    while True:
        if isolate_migratepages(v, cc) == 0:
            _keep_cached_in_sync(v, cc)
            return COMPACT_CONTINUE
        c.update_cached = 0
        c.last_migrated_pfn = max(int(v.zones[c.zone].start_pfn), pageblock_start_pfn(c.migrate_pfn - 1))
        nr_migratepages, before = c.nr_migratepages, c.nr_succeeded
        nr_failed, no_targets = migrate_pages(v, cc)
        if trace_key() & MM_COMPACTION_MIGRATEPAGES:
            moved = c.nr_succeeded - before
            trace_row(MM_COMPACTION_MIGRATEPAGES, moved, nr_migratepages - moved)
        c.nr_failed += nr_failed
        if no_targets and not compact_scanners_met(cc):
            return COMPACT_CONTENDED
        again = (
            nr_failed > 0
            and c.migrate_pfn & (pageblock_nr_pages - 1) != 0
            and not c.ignore_skip_hint
            and not c.finish_pageblock
            and c.mode < MIGRATE_SYNC
        )
        if not again:
            break
        c.finish_pageblock = 1  # so that the block gets its skip bit
        if c.order == pageblock_order:
            c.last_migrated_pfn = 0
    return COMPACT_SUCCESS if c.captured >= 0 else COMPACT_CONTINUE


@njit
def _drain_what_was_left(v: VmArrays, cc: CompactControl) -> None:
    """Once the migrate scanner has left the chunk of the wanted order that it moved pages out of, what was freed there
    must merge for compact_finished() to see it."""
    c = cc[0]
    if c.order > 0 and 0 < c.last_migrated_pfn < c.migrate_pfn & ~((1 << c.order) - 1):
        if v.pagesets.shape[1]:
            drain_pages_zone(v.pages, v.zones, v.blocks, v.nodes, v.pagesets, int(c.zone), int(c.cpu))
        c.last_migrated_pfn = 0


@njit
def compact_zone_slice(v: VmArrays, cc: CompactControl, budget: int) -> int:
    """Go on for about `budget` pages looked at; COMPACT_CONTINUE if there is more to do."""
    c = cc[0]
    begin = c.total_migrate_scanned + c.total_free_scanned + _MIGRATE_COST * c.nr_succeeded
    before = c.nr_succeeded
    result = COMPACT_CONTINUE
    while True:
        result = compact_finished(v, cc)
        if trace_key() & MM_COMPACTION_FINISHED:
            zone = v.zones[c.zone]
            trace_row(MM_COMPACTION_FINISHED, zone.node, zone.type, c.order, result)
        if result == COMPACT_NO_SUITABLE_PAGE:
            result = COMPACT_CONTINUE
        if result != COMPACT_CONTINUE:
            break
        result = _one_round(v, cc)
        if result != COMPACT_CONTINUE:
            break
        _drain_what_was_left(v, cc)
        spent = c.total_migrate_scanned + c.total_free_scanned + _MIGRATE_COST * c.nr_succeeded - begin
        if spent > budget:
            break
    v.events[0].pgmigrate_success += c.nr_succeeded - before
    return result
