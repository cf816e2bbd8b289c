# SPDX-License-Identifier: GPL-2.0-only
"""The loops of DPU compaction: find what can move in a region, take it apart, lay it out, put it together again.

Order in a region, all in ascending address order:
  survey    where the first possible target and the last movable page are: nothing outside has to be touched
  isolate   free blocks become held frames; what is movable and has a place below it gets that place, leaves the LRU and
            is mapped by migration entries from then on
  layout    what lies between the places that were given, for the device, which works out the same places itself
  commit    identity passes to the new frames (moves that retired) or back to the old ones (moves that did not)

A fragment is a folio: one page or 2^order of them. Its place is the next run of targets, aligned to its size, behind
the place of the fragment before. A target is a held frame, or one that an earlier fragment leaves, in a movable
pageblock. The place must end below the fragment, so every fragment moves strictly downwards and the target of a move is
always free or vacated by an earlier one. A large folio without such a place stays, whole; only if it is due to be split
anyway (partially mapped) is it split here, and its pages go on as fragments of their own.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.huge_memory import split_folio
from kernelsim.jit import njit
from kernelsim.lruvec import folio_isolate_lru
from kernelsim.migrate import (
    MOVABLE,
    SKIP_COMPOUND,
    SKIP_FREE,
    count_migrated,
    flush_touched,
    folio_migrate,
    is_target,
    putback_or_free,
    skip_reasons,
    why_not_movable,
)
from kernelsim.mmzone import NR_PAGE_ORDERS, Blocks, Nodes, Zones
from kernelsim.page import Pages, PG_buddy, PG_held, PG_partially_mapped
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
        ("vacates", np.int32),  # 1 if the frames it leaves may take another fragment
        ("order", np.int32),
    ]
)

NR_SKIP_REASONS = len(skip_reasons)

Cursors = NDArray[np.int64]
"""int64[NR_PAGE_ORDERS, 2]: for each order the lowest frame where a place may still begin, and the first fragment that
does not lie wholly below it."""


def new_cursors(first: int) -> Cursors:
    cursors = np.zeros((NR_PAGE_ORDERS, 2), dtype=np.int64)
    cursors[:, 0] = first
    return cursors


@njit
def survey_region(pages: Pages, blocks: Blocks, start: int, end: int) -> tuple[int, int, int, int]:
    """(first target, end of the last movable folio above it, number of movable folios in between, of pages in them).

    Zeros if there is none. Both ends are exact unless a page is pinned or busy, so the counts are upper bounds; a folio
    that may be split counts as its pages.
    """
    first = -1
    last = start
    nr = 0
    nr_pages = 0
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
            size = 1 << pages[pfn].order
            splits = size > 1 and pages[pfn + 1].flags & PG_partially_mapped != 0
            if (first >= 0 or splits) and why_not_movable(pages, pfn) == MOVABLE and pfn + size <= end:
                if first < 0:  # what a split frees takes the rest of its pages
                    first = pfn
                nr += size if splits else 1
                nr_pages += size
                last = pfn + size
            pfn += size
    return first, last, nr, nr_pages


@njit
def dpu_compact_add_fragment(
    fragments: Fragments, nr: int, pfn: int, new_pfn: int, order: int, vma: int, ptep: int, is_mapped: int, vacates: int
) -> int:
    """Append one isolated folio; returns the new number of fragments."""
    fragments[nr].old_pfn = pfn
    fragments[nr].new_pfn = new_pfn
    fragments[nr].order = order
    fragments[nr].vma = vma
    fragments[nr].ptep = ptep
    fragments[nr].is_mapped = is_mapped
    fragments[nr].vacates = vacates
    return nr + 1


@njit
def next_place(
    pages: Pages, blocks: Blocks, fragments: Fragments, nr: int, passed: int, start: int, order: int, end: int
) -> tuple[int, int]:
    """The lowest run of 2^order targets from `start` on, aligned to its size, that ends by `end`.

    `passed` is the first of the `nr` fragments that does not lie wholly below `start`. Returns the run's first frame
    and its `passed`; if no run ends in time, a frame from which to search again once `end` has risen.
    """
    size = 1 << order
    start = (start + size - 1) & -size
    at = start
    here = passed
    while start + size <= end:
        while here < nr and fragments[here].old_pfn + (1 << fragments[here].order) <= at:
            here += 1
        if at == start:
            passed = here  # else every search would go over all fragments again
        left = here < nr and fragments[here].old_pfn <= at and fragments[here].vacates
        if not left and (pages[at].flags & PG_held == 0 or not is_target(pages, blocks, at)):
            start = (at + size) & -size
            at = start
            continue
        at += 1
        if at == start + size:
            break
    return start, passed


@njit
def place_of(
    pages: Pages, blocks: Blocks, fragments: Fragments, nr: int, cursors: Cursors, pfn: int, order: int
) -> int:
    """Where the folio at `pfn` is to go, or -1 if it cannot go down. `fragments`: those whose frames are being left."""
    start = cursors[order, 0]
    if nr > 0:  # nothing is placed below the fragment before
        start = max(start, fragments[nr - 1].new_pfn + (1 << fragments[nr - 1].order))
    cursors[order, 0], cursors[order, 1] = next_place(
        pages, blocks, fragments, nr, cursors[order, 1], start, order, pfn
    )
    start = cursors[order, 0]
    return int(start) if start + (1 << order) <= pfn else -1


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
    cursors: Cursors,
    skipped: NDArray[np.int64],
    pfn: int,
    pause: int,
    end: int,
    nr: int,
) -> tuple[int, int]:
    """Isolate and place what can move down from `pfn` on, with `nr` fragments so far.

    Stops at `pause`, to be called again; free blocks are held up to `end`, where the region's last fragment ends.
    Counts the pages that stay, by reason, in `skipped` (int64[NR_SKIP_REASONS]). Returns (pfn reached, nr).
    """
    head = find_buddy_head(pages, pfn)  # the first block may begin before pfn: outside the region, or freed since
    while pfn < pause and nr < len(fragments):
        if head < 0 and pages[pfn].flags & PG_buddy:
            head = pfn
        if head >= 0:
            stop = head + (1 << pages[head].order)
            if is_target(pages, blocks, pfn):
                hold_free_block(pages, zones, blocks, head, pfn, min(stop, end))
            pfn = stop
            head = -1
            continue
        order = pages[pfn].order
        size = 1 << order
        why = why_not_movable(pages, pfn) if pfn + size <= end else SKIP_COMPOUND
        new = place_of(pages, blocks, fragments, nr, cursors, pfn, order) if why == MOVABLE else -1
        if new >= 0:
            folio_isolate_lru(pages, zones, nodes, pfn)
            mapped, vma, ptep = try_to_migrate(pages, zones, nodes, vmas, avcs, pt, touched, pfn)
            vacates = 1 if is_target(pages, blocks, pfn) else 0
            nr = dpu_compact_add_fragment(fragments, nr, pfn, new, order, vma, ptep, mapped, vacates)
        elif why == MOVABLE and order > 0 and pages[pfn + 1].flags & PG_partially_mapped:
            if split_folio(pages, zones, blocks, nodes, vmas, avcs, pt, events, pfn) == 0:
                events[0].thp_migration_split += order == 9
                head = find_buddy_head(pages, pfn)
                continue
        elif why != MOVABLE and why != SKIP_FREE and place_of(pages, blocks, fragments, nr, cursors, pfn, 0) >= 0:
            skipped[why] += size
        pfn += size
    flush_touched(tlbs, events, touched)
    return pfn, nr


@njit
def list_skip_runs(fragments: Fragments, nr: int, start: int, skip_runs: NDArray[np.uint64]) -> int:
    """List what lies between the fragments' places, for the device; returns the number of skip runs.

    `skip_runs` uint64[n, 2] takes (first byte address, pages) of each run, from `start` to the last place. Frames that
    are passed over only because of the next fragment's alignment are in no run: the device skips them by its own rule.
    """
    nr_runs = 0
    cursor = start
    for i in range(nr):
        new = fragments[i].new_pfn
        size = 1 << fragments[i].order
        if new != (cursor + size - 1) & -size:
            skip_runs[nr_runs, 0] = np.uint64(cursor) << np.uint64(12)
            skip_runs[nr_runs, 1] = np.uint64(new - cursor)
            nr_runs += 1
        cursor = new + size
    return nr_runs


@njit
def count_pages(fragments: Fragments, first: int, last: int) -> tuple[int, int]:
    """(base pages, THPs) among fragments first .. last-1."""
    nr_pages = 0
    nr_thps = 0
    for i in range(first, last):
        nr_pages += 1 << fragments[i].order
        nr_thps += fragments[i].order == 9
    return nr_pages, nr_thps


@njit
def build_addr_list(fragments: Fragments, nr: int, addrs: NDArray[np.uint64]) -> None:
    """What the device gets: each fragment's byte address, and its order in the low 12 bits."""
    for i in range(nr):
        addrs[i] = (np.uint64(fragments[i].old_pfn) << np.uint64(12)) | np.uint64(fragments[i].order)


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
    """Point the PTEs of fragment i at `new`; returns how many. A small page's one PTE is where isolation found it."""
    old = fragments[i].old_pfn
    if fragments[i].is_mapped == 0:
        return 0
    if fragments[i].is_mapped == 1 and fragments[i].order == 0:
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
            count_migrated(pages, events, new, True)
            putback_or_free(pages, zones, blocks, nodes, new)
        else:
            dpu_compact_update_pte(pages, zones, nodes, vmas, avcs, pt, fragments, i, old)
            count_migrated(pages, events, old, False)
            putback_or_free(pages, zones, blocks, nodes, old)
    return nr_ptes
