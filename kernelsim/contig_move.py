# SPDX-License-Identifier: GPL-2.0-only
"""The loops that empty a range: take the movable pages of it apart, copy them elsewhere, put them together again.

A move takes one folio (a page, or a large one whole) from the range to a frame of the same size that the buddy
allocator gave, anywhere outside. The frame is PG_held meanwhile, as a compaction's destinations are; after a move it is
the vacated one that is held until it is freed. Unlike a compaction's, the two may lie in different zones and nodes, so
what is counted there moves along.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, folio_copy
from kernelsim.huge_memory import split_folio
from kernelsim.jit import njit
from kernelsim.lruvec import folio_isolate_lru, mod_nr_isolated
from kernelsim.migrate import MOVABLE, count_migrated, flush_touched, folio_migrate, putback_or_free, why_not_movable
from kernelsim.mmzone import MIGRATE_MOVABLE, MIGRATE_UNMOVABLE, Blocks, Nodes, Zones, pageblock_order
from kernelsim.page import Pages, PG_anon, PG_held, PG_huge, PG_mlocked, PG_partially_mapped, compound_head
from kernelsim.page_alloc import find_buddy_head, get_page_from_freelist, release_held
from kernelsim.pgtable import PageTables
from kernelsim.rmap import Avcs, Vmas, remove_migration_ptes, restore_pte, try_to_migrate
from kernelsim.tlb import Tlbs
from kernelsim.vmstat import Events

ENOMEM = errno.ENOMEM

Moves = np.ndarray[tuple[int], np.dtype[np.void]]

move_dtype = np.dtype(
    [
        ("old_pfn", np.int64),
        ("new_pfn", np.int64),
        ("ptep", np.int64),  # of the one PTE, where is_mapped is 1
        ("is_mapped", np.int32),
        ("order", np.int32),
    ]
)


@njit
def first_folio(pages: Pages, pfn: int) -> int:
    """Where the folio or free block that holds pfn begins."""
    head = find_buddy_head(pages, pfn)
    return head if head >= 0 else compound_head(pages, pfn)


@njit
def survey_range(pages: Pages, start: int, end: int, reasons: NDArray[np.int64]) -> tuple[int, int]:
    """(movable pages, the first hugetlb page or -1) among the folios that overlap a range.

    `reasons` int64[len(skip_reasons)] takes how many pages are in each state.
    """
    reasons[:] = 0
    huge = -1
    pfn = first_folio(pages, start)
    while pfn < end:
        step = 1 << pages[pfn].order
        if pages[pfn].flags & PG_huge and huge < 0:
            huge = pfn
        reasons[why_not_movable(pages, pfn)] += step
        pfn += step
    return int(reasons[MOVABLE]), huge


@njit
def _take_target(
    pages: Pages, zones: Zones, blocks: Blocks, zonelist: NDArray[np.int32], order: int, migratetype: int
) -> int:
    """A held frame of 2^order pages from the nearest zone that has one, or -ENOMEM (alloc_migration_target)."""
    new = get_page_from_freelist(pages, zones, blocks, zonelist, order, migratetype)
    if new >= 0:
        for pfn in range(new, new + (1 << order)):
            pages[pfn].flags = PG_held
            pages[pfn].refcount = 0
        zones[pages[new].zone].held_pages += 1 << order
    return new


@njit
def _split_for_move(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    events: Events,
    head: int,
) -> bool:
    """Make single pages of a large folio that cannot or should not move whole; False if that cannot be done now."""
    order = pages[head].order
    if order == 0 or split_folio(pages, zones, blocks, nodes, vmas, avcs, pt, events, head):
        return False
    events[0].thp_migration_fail += order >= pageblock_order
    events[0].thp_migration_split += order >= pageblock_order
    return True


@njit
def _isolate_move(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    touched: NDArray[np.uint8],
    moves: Moves,
    nr: int,
    pfn: int,
    new: int,
) -> int:
    """Isolate and unmap one folio, to be moved to `new`; returns the new number of moves."""
    folio_isolate_lru(pages, zones, nodes, pfn)
    mapped, _, ptep = try_to_migrate(pages, zones, nodes, vmas, avcs, pt, touched, pfn)
    moves[nr].old_pfn = pfn
    moves[nr].new_pfn = new
    moves[nr].ptep = ptep
    moves[nr].is_mapped = mapped
    moves[nr].order = pages[pfn].order
    return nr + 1


@njit
def isolate_moves(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    touched: NDArray[np.uint8],
    moves: Moves,
    nr: int,
    pfn: int,
    end: int,
    budget: int,
) -> tuple[int, int, int]:
    """Isolate and unmap the movable folios from `pfn` (the start of one) on, each with a target; appends to `moves`.

    A large folio moves whole; where no target of its size is left, or where it is mapped in part only, it is split
    first, as migrate_pages() does.
    Goes on until `end`, until `budget` pages or until `moves` is full. Returns (pfn reached, number of moves, 0 or
    -ENOMEM where there was no target).
    """
    error = 0
    nr_pages = 0
    while pfn < end and nr_pages < budget and nr < len(moves):
        order = pages[pfn].order
        if why_not_movable(pages, pfn) == MOVABLE:
            due = order > 1 and pages[pfn + 1].flags & PG_partially_mapped != 0
            if due and _split_for_move(pages, zones, blocks, nodes, vmas, avcs, pt, events, pfn):
                continue  # with what is now a single page
            new = _take_target(pages, zones, blocks, zonelist, order, MIGRATE_MOVABLE)
            if new < 0 and _split_for_move(pages, zones, blocks, nodes, vmas, avcs, pt, events, pfn):
                continue
            if new < 0:
                error = new
                break
            nr = _isolate_move(pages, zones, nodes, vmas, avcs, pt, touched, moves, nr, pfn, new)
        nr_pages += 1 << order
        pfn += 1 << order
    flush_touched(tlbs, events, touched)
    return pfn, nr, error


@njit
def isolate_listed(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    touched: NDArray[np.uint8],
    heads: NDArray[np.int64],
    moves: Moves,
) -> tuple[int, int, int]:
    """Isolate and unmap the folios in `heads`, each with a target that is not for movable pages only (GFP_USER).

    A large folio for which there is none is split, and left for the next call. Returns (number of moves, pages that
    cannot move, 0 or -ENOMEM where there was no target).
    """
    nr = 0
    nr_failed = 0
    error = 0
    for head in heads:
        order = pages[head].order
        if why_not_movable(pages, head) != MOVABLE:
            nr_failed += 1 << order
            continue
        new = _take_target(pages, zones, blocks, zonelist, order, MIGRATE_UNMOVABLE)
        if new >= 0:
            nr = _isolate_move(pages, zones, nodes, vmas, avcs, pt, touched, moves, nr, head, new)
        elif not _split_for_move(pages, zones, blocks, nodes, vmas, avcs, pt, events, head):
            error = new
            break
    flush_touched(tlbs, events, touched)
    events[0].pgmigrate_fail += nr_failed
    return nr, nr_failed, error


@njit
def copy_moves(memory: Memory, moves: Moves, first: int, last: int) -> None:
    """The CPU's part: copy the folios first .. last-1."""
    for i in range(first, last):
        folio_copy(memory, moves[i].new_pfn, moves[i].old_pfn, 1 << moves[i].order)


@njit
def build_move_lists(moves: Moves, nr: int, src: NDArray[np.uint64], dst: NDArray[np.uint64]) -> None:
    """What the device gets: sources `pfn << 12 | order` and destinations, byte addresses."""
    for i in range(nr):
        src[i] = np.uint64(moves[i].old_pfn) << np.uint64(12) | np.uint64(moves[i].order)
        dst[i] = np.uint64(moves[i].new_pfn) << np.uint64(12)


@njit
def _carry_counters(pages: Pages, zones: Zones, nodes: Nodes, old: int, new: int, order: int) -> None:
    """What is counted by zone and node follows an isolated, unmapped folio from its frame to another one.

    folio_migrate() and the functions after it take both frames to be of one zone.
    """
    here = pages[old].zone
    there = pages[new].zone
    if here == there:
        return
    nr = 1 << order
    zones[here].held_pages += nr
    zones[there].held_pages -= nr
    if pages[old].flags & PG_mlocked:
        zones[here].nr_mlock -= nr
        zones[there].nr_mlock += nr
    if zones[here].node != zones[there].node and pages[old].flags & PG_anon == 0 and pages[old].mapping != 0:
        nodes[zones[here].node].nr_file_pages -= nr
        nodes[zones[there].node].nr_file_pages += nr


@njit
def _free_frame(pages: Pages, zones: Zones, blocks: Blocks, pfn: int, order: int) -> None:
    """Give a held frame that is not needed any more back to the buddy lists."""
    zones[pages[pfn].zone].pgfree += 1 << order
    release_held(pages, zones, blocks, pfn, pfn + (1 << order))


@njit
def _update_ptes(
    pages: Pages, zones: Zones, nodes: Nodes, vmas: Vmas, avcs: Avcs, pt: PageTables, moves: Moves, i: int, new: int
) -> int:
    """Point the migration entries of move i at `new`; returns how many."""
    old = moves[i].old_pfn
    if moves[i].is_mapped == 0:
        return 0
    if moves[i].is_mapped == 1 and moves[i].order == 0:  # a huge page has counts besides
        return 1 if restore_pte(pages, zones, nodes, pt, moves[i].ptep, old, new) else 0
    return remove_migration_ptes(pages, zones, nodes, vmas, avcs, pt, old, new)


@njit
def commit_moves(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    events: Events,
    i_pages: NDArray[np.int64],
    moves: Moves,
    first: int,
    last: int,
    nr_retired: int,
) -> tuple[int, int]:
    """Finish moves first .. last-1: those below `nr_retired` at their new place, the others at their old one.

    Frees the vacated frames and the targets that were not used. Returns (pages moved, PTEs that changed).
    """
    nr_pages = 0
    nr_ptes = 0
    for i in range(first, last):
        old = moves[i].old_pfn
        new = moves[i].new_pfn
        order = moves[i].order
        if i < nr_retired:
            mod_nr_isolated(pages, zones, nodes, old, -1)
            _carry_counters(pages, zones, nodes, old, new, order)
            folio_migrate(pages, zones, nodes, avcs, i_pages, old, new)
            mod_nr_isolated(pages, zones, nodes, new, 1)
            nr_ptes += _update_ptes(pages, zones, nodes, vmas, avcs, pt, moves, i, new)
            count_migrated(pages, events, new, True)
            putback_or_free(pages, zones, blocks, nodes, new)
            _free_frame(pages, zones, blocks, old, order)
            nr_pages += 1 << order
        else:
            _update_ptes(pages, zones, nodes, vmas, avcs, pt, moves, i, old)
            count_migrated(pages, events, old, False)
            putback_or_free(pages, zones, blocks, nodes, old)
            _free_frame(pages, zones, blocks, new, order)
    return nr_pages, nr_ptes


@njit
def take_free_range(pages: Pages, zones: Zones, blocks: Blocks, start: int, end: int) -> None:
    """Turn held pages into allocated ones, each with one reference of its own (split_free_pages)."""
    zones[pages[start].zone].held_pages -= end - start
    for pfn in range(start, end):
        pages[pfn].flags = 0
        pages[pfn].refcount = 1
