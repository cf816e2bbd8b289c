# SPDX-License-Identifier: GPL-2.0-only
"""The loops of DPU compaction: find what can move in a region, take it apart, lay it out, put it together again.

Order in a region, all in ascending address order:
  survey    where the first possible target and the last movable page are: nothing outside has to be touched
  isolate   free blocks become held frames; movable pages above a target leave the LRU and become migration entries
  layout    fragment i goes to the i-th target; a target is a held frame or a fragment's own, in a movable pageblock
  commit    identity passes to the new frames (moves that retired) or back to the old ones (moves that did not)

A page is isolated only if a target below it is left, so every fragment moves strictly downwards and the target of a
move is always free or vacated by an earlier one.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit
from kernelsim.lruvec import folio_isolate_lru
from kernelsim.migrate import (
    MOVABLE,
    SKIP_FREE,
    flush_touched,
    folio_migrate,
    is_target,
    putback_or_free,
    skip_reasons,
    why_not_movable,
)
from kernelsim.mmzone import Blocks, Nodes, Zones
from kernelsim.page import Pages, PG_buddy, PG_held
from kernelsim.page_alloc import find_buddy_head, hold_free_block
from kernelsim.pgtable import PageTables
from kernelsim.rmap import Avcs, Vmas, remove_migration_ptes, restore_pte, try_to_migrate
from kernelsim.tlb import Tlbs
from kernelsim.vmstat import Events

Fragments = np.ndarray[tuple[int], np.dtype[np.void]]

fragment_dtype = np.dtype(
    [
        ("old_pfn", np.int64),
        ("new_pfn", np.int64),
        ("ptep", np.int64),  # of the one PTE, where is_mapped is 1
        ("vma", np.int32),  # the mm is the VMA's
        ("is_mapped", np.int32),  # number of PTEs that map the page
        ("vacates", np.int32),  # 1 if the frame it leaves may take another fragment
    ]
)

NR_SKIP_REASONS = len(skip_reasons)


@njit
def survey_region(pages: Pages, blocks: Blocks, start: int, end: int) -> tuple[int, int, int]:
    """(first target, end of the last movable page above it, number of movable pages in between); counts 0 if none.

    Both ends are exact unless a page is pinned or busy, so the count is an upper bound.
    """
    first = -1
    last = start
    nr = 0
    pfn = start
    head = find_buddy_head(pages, start)
    if head >= 0:
        pfn = head + (1 << pages[head].order)
        if is_target(pages, blocks, start):
            first = start
    while pfn < end:
        if pages[pfn].flags & PG_buddy:
            if first < 0 and is_target(pages, blocks, pfn):
                first = pfn
            pfn += 1 << pages[pfn].order
        else:
            if first >= 0 and why_not_movable(pages, pfn) == MOVABLE:
                nr += 1
                last = pfn + 1
            pfn += 1
    return first, last, nr


@njit
def dpu_compact_add_fragment(
    fragments: Fragments, nr: int, pfn: int, vma: int, ptep: int, is_mapped: int, vacates: int
) -> int:
    """Append one isolated page; returns the new number of fragments."""
    fragments[nr].old_pfn = pfn
    fragments[nr].new_pfn = -1
    fragments[nr].vma = vma
    fragments[nr].ptep = ptep
    fragments[nr].is_mapped = is_mapped
    fragments[nr].vacates = vacates
    return nr + 1


@njit
def isolate_range(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    touched: NDArray[np.uint8],
    fragments: Fragments,
    skipped: NDArray[np.int64],
    pfn: int,
    pause: int,
    end: int,
    nr: int,
    nr_targets: int,
) -> tuple[int, int, int]:
    """Isolate what can move from `pfn` on, with `nr` fragments and `nr_targets` unused targets so far.

    Stops at `pause`, to be called again; free blocks are held up to `end`, where the region's last fragment ends.
    Counts the pages that stay, by reason, in `skipped` (int64[NR_SKIP_REASONS]). Returns (pfn reached, nr, nr_targets).
    """
    head = find_buddy_head(pages, pfn)  # the first block may begin before pfn: outside the region, or freed since
    while pfn < pause and nr < len(fragments):
        if head < 0 and pages[pfn].flags & PG_buddy:
            head = pfn
        if head >= 0:
            stop = head + (1 << pages[head].order)
            if is_target(pages, blocks, pfn):
                nr_targets += hold_free_block(pages, zones, blocks, head, pfn, min(stop, end))
            pfn = stop
            head = -1
            continue
        if nr_targets > 0:
            why = why_not_movable(pages, pfn)
            if why == MOVABLE:
                folio_isolate_lru(pages, zones, nodes, pfn)
                mapped, vma, ptep = try_to_migrate(pages, zones, nodes, vmas, avcs, pt, touched, pfn)
                vacates = 1 if is_target(pages, blocks, pfn) else 0
                nr = dpu_compact_add_fragment(fragments, nr, pfn, vma, ptep, mapped, vacates)
                nr_targets += vacates - 1
            elif why != SKIP_FREE:
                skipped[why] += 1
        pfn += 1
    flush_touched(tlbs, events, touched)
    return pfn, nr, nr_targets


@njit
def layout_region(pages: Pages, fragments: Fragments, nr: int, start: int, skip_runs: NDArray[np.uint64]) -> int:
    """Give every fragment its new frame and list what lies between the targets; returns the number of skip runs.

    `skip_runs` uint64[n, 2] takes (first byte address, pages) of each run, from `start` to the last target.
    """
    nr_runs = 0
    open_run = -1
    pfn = start
    passed = 0  # the first fragment not below pfn
    for i in range(nr):
        while True:
            if fragments[passed].old_pfn < pfn:
                passed += 1
            if pages[pfn].flags & PG_held or (fragments[passed].old_pfn == pfn and fragments[passed].vacates):
                break
            if open_run < 0:
                open_run = pfn
            pfn += 1
        if open_run >= 0:
            skip_runs[nr_runs, 0] = np.uint64(open_run) << np.uint64(12)
            skip_runs[nr_runs, 1] = np.uint64(pfn - open_run)
            nr_runs += 1
            open_run = -1
        fragments[i].new_pfn = pfn
        pfn += 1
    return nr_runs


@njit
def build_addr_list(fragments: Fragments, nr: int, addrs: NDArray[np.uint64]) -> None:
    """What the device gets: the fragments' byte addresses."""
    for i in range(nr):
        addrs[i] = np.uint64(fragments[i].old_pfn) << np.uint64(12)


@njit
def layout_agrees(fragments: Fragments, nr: int, addrs: NDArray[np.uint64]) -> bool:
    """The device came to the same layout on its own."""
    for i in range(nr):
        if addrs[i] != np.uint64(fragments[i].new_pfn) << np.uint64(12):
            return False
    return True


@njit
def dpu_compact_update_pte(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    fragments: Fragments,
    i: int,
    new: int,
) -> int:
    """Point the PTEs of fragment i at `new`; returns how many. A single PTE is where isolation found it."""
    old = fragments[i].old_pfn
    if fragments[i].is_mapped == 0:
        return 0
    if fragments[i].is_mapped == 1:
        return 1 if restore_pte(pages, zones, nodes, pt, fragments[i].ptep, old, new) else 0
    return remove_migration_ptes(pages, zones, nodes, vmas, avcs, pt, old, new)


@njit
def commit_range(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    events: Events,
    i_pages: NDArray[np.int64],
    fragments: Fragments,
    first: int,
    last: int,
    nr_retired: int,
) -> int:
    """Finish fragments first .. last-1: those below `nr_retired` in their new frames, the others in their old ones.

    Returns the number of PTEs that changed to a new frame.
    """
    nr_ptes = 0
    for i in range(first, last):
        old = fragments[i].old_pfn
        if i < nr_retired:
            new = fragments[i].new_pfn
            folio_migrate(pages, zones, nodes, avcs, i_pages, old, new)
            nr_ptes += dpu_compact_update_pte(pages, zones, nodes, vmas, avcs, pt, fragments, i, new)
            putback_or_free(pages, zones, blocks, nodes, new)
            events[0].pgmigrate_success += 1
        else:
            dpu_compact_update_pte(pages, zones, nodes, vmas, avcs, pt, fragments, i, old)
            putback_or_free(pages, zones, blocks, nodes, old)
            events[0].pgmigrate_fail += 1
    return nr_ptes
