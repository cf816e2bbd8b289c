# SPDX-License-Identifier: GPL-2.0-only
"""Moving a page's identity from one frame to another.

A move has the three steps of mm/migrate.c: the page is isolated from its LRU list and every PTE becomes a migration
entry (unmap); the bytes are copied (by the CPU in dpu_compact_cpu.py, by a device in dpu_compact.py); then flags,
owner, page-cache slot and PTEs pass to the new frame (remap). A move that does not happen is undone by remapping the
page to itself.

A large folio moves whole: it is named by its head, and its target is an aligned run of as many held frames. Counters
of pages count its pages.

Only pages that nobody holds beyond their mappings and the page cache may move. In the emulator nothing runs between
that test and the unmapping, so the refcount need not be tested again later, as Linux must (expected_page_refs).
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit
from kernelsim.lruvec import folio_putback_lru, put_page
from kernelsim.mmzone import MIGRATE_CMA, MIGRATE_MOVABLE, Blocks, Nodes, Zones, pageblock_order
from kernelsim.page import (
    Pages,
    PG_active,
    PG_anon,
    PG_buddy,
    PG_dirty,
    PG_head,
    PG_held,
    PG_huge,
    PG_hwpoison,
    PG_idle,
    PG_isolated,
    PG_ksm,
    PG_lru,
    PG_mlocked,
    PG_private,
    PG_referenced,
    PG_reserved,
    PG_swapbacked,
    PG_swapcache,
    PG_tail,
    PG_thp,
    PG_unevictable,
    PG_uptodate,
    PG_writeback,
)
from kernelsim.page_alloc import clear_page
from kernelsim.pgtable import HPAGE_PMD_ORDER
from kernelsim.rmap import Avcs
from kernelsim.tlb import Tlbs, flush_tlb_mm
from kernelsim.vmstat import Events

# What passes on to the new frame (folio_migrate_flags); LRU membership is given anew.
_MIGRATE_FLAGS = (
    PG_referenced
    | PG_uptodate
    | PG_dirty
    | PG_active
    | PG_anon
    | PG_swapbacked
    | PG_swapcache
    | PG_unevictable
    | PG_mlocked
    | PG_private
    | PG_idle
    | PG_ksm
    | PG_head
    | PG_thp
)

_NEVER = PG_tail | PG_huge | PG_reserved | PG_hwpoison

# Why a page was left where it is.
MOVABLE, SKIP_FREE, SKIP_KERNEL, SKIP_COMPOUND, SKIP_WRITEBACK, SKIP_PINNED, SKIP_BUSY = range(7)
skip_reasons = ("movable", "free", "kernel", "compound", "writeback", "pinned", "busy")


@njit
def why_not_movable(pages: Pages, pfn: int) -> int:
    """MOVABLE, or the reason why a page, or the folio that it is the head of, cannot be moved now."""
    page = pages[pfn]
    flags = page.flags
    if flags & (PG_buddy | PG_held):
        return SKIP_FREE
    if flags & PG_isolated:
        return SKIP_BUSY
    if flags & _NEVER or flags & PG_lru == 0:
        return SKIP_COMPOUND if flags & (PG_head | PG_tail) else SKIP_KERNEL
    if flags & PG_writeback:
        return SKIP_WRITEBACK
    of_cache = 1 << page.order if flags & PG_anon == 0 and page.mapping != 0 else 0
    of_private = 1 if flags & PG_private else 0
    if page.refcount != page.mapcount + of_cache + of_private + (page.mapping == 0):
        return SKIP_PINNED
    return MOVABLE


@njit
def is_target(pages: Pages, blocks: Blocks, pfn: int) -> bool:
    """A movable page may be put here, if the frame is free: never pollute blocks of another type."""
    migratetype = blocks[pfn >> pageblock_order]
    return bool(migratetype in (MIGRATE_MOVABLE, MIGRATE_CMA))


@njit
def folio_migrate(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    avcs: Avcs,
    i_pages: NDArray[np.int64],
    old: int,
    new: int,
) -> None:
    """Pass owner, state and page-cache slots of an isolated, unmapped folio to held frames (all of one zone).

    The new folio takes over all references, the isolation's included; the old frames are left held, for release_held().
    The frames of the two do not overlap.
    """
    src = pages[old]
    dst = pages[new]
    nr_pages = 1 << src.order
    dst.flags = (src.flags & _MIGRATE_FLAGS) | PG_isolated
    dst.refcount = src.refcount
    dst.mapcount = src.mapcount
    dst.mapping = src.mapping
    dst.index = src.index
    dst.mlock_count = src.mlock_count
    dst.order = src.order
    if src.flags & PG_anon == 0 and src.mapping != 0:
        slot = avcs[src.mapping].i_base + src.index
        for i in range(nr_pages):
            i_pages[slot + i] = new + i
    elif src.flags & PG_ksm and src.mapping != 0:
        avcs[src.mapping].i_base = new
    clear_page(pages, old)
    src.flags = PG_held
    for i in range(1, nr_pages):
        pages[new + i].flags = pages[old + i].flags
        pages[new + i].index = new
        clear_page(pages, old + i)
        pages[old + i].flags = PG_held


@njit
def count_migrated(pages: Pages, events: Events, head: int, moved: bool) -> None:
    """Account a folio, at the place where it is now, that moved or could not be moved."""
    order = pages[head].order
    if moved:
        events[0].pgmigrate_success += 1 << order
        events[0].thp_migration_success += order >= HPAGE_PMD_ORDER
    else:
        events[0].pgmigrate_fail += 1 << order
        events[0].thp_migration_fail += order >= HPAGE_PMD_ORDER


@njit
def putback_or_free(pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pfn: int) -> None:
    """Drop the isolation: back to the LRU, or free if its owner went away in the meantime."""
    folio_putback_lru(pages, zones, nodes, pfn)
    put_page(pages, zones, blocks, nodes, pfn)


@njit
def flush_touched(tlbs: Tlbs, events: Events, touched: NDArray[np.uint8]) -> None:
    """One flush for each mm that lost PTEs to migration entries (try_to_unmap_flush)."""
    for mm in range(len(touched)):
        if touched[mm]:
            flush_tlb_mm(tlbs, events, mm)
            touched[mm] = 0
