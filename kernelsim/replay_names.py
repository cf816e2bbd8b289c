# SPDX-License-Identifier: GPL-2.0-only
"""Names of real pages under replay (replay.py), and what entering and freeing one does to the emulated page behind it.

A page that moves is found by the page cache's slot, any other by `where`. What the trace says of a block need not fit
what is here: the real kernel may free in pieces what it allocated whole (it split it), or whole what is in pieces here.
Then the block is taken apart, and its pages are freed one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, fill_page
from kernelsim.huge_memory import split_folio
from kernelsim.jit import njit
from kernelsim.lruvec import lruvec_add_folio, lruvec_del_folio
from kernelsim.mmzone import MIGRATE_MOVABLE, Blocks, Nodes, Pagesets, Zones
from kernelsim.page import (
    Pages,
    PG_head,
    PG_huge,
    PG_mlocked,
    PG_private,
    PG_slab,
    PG_swapbacked,
    PG_table,
    PG_tail,
    PG_thp,
    PG_uptodate,
    PG_writeback,
    compound_head,
)
from kernelsim.page_alloc import clear_page, free_pages, prep_compound_page
from kernelsim.pcp import free_frozen_pages
from kernelsim.pgtable import PageTables
from kernelsim.rmap import Avcs, Vmas
from kernelsim.trace_scan import Events
from kernelsim.vmstat import Events as VmEvents

NOT_HERE, UNPLACED = -1, -2

counts_dtype = np.dtype(
    [
        (name, np.int64)
        for name in (
            "allocs",  # blocks placed
            "alloc_pages",
            "frees",  # free events, all or part of whose pages were here
            "free_pages",
            "failed",  # requests that the real kernel served and we could not
            "failed_pages",
            "real_failed",  # requests that the real kernel could not serve
            "free_unplaced",  # pages freed that we had found no room for
            "free_unknown",  # pages freed that are free here: neither captured nor allocated since
            "unseen_free",  # pages allocated again whose free is not in the trace
            "outside",  # events of pages that the captured machine does not have
            "real_fallbacks",
            "real_fragmenting",
            "real_migrated",  # pages that the real kernel's compaction moved
            "lost",  # events that the tracer lost
        )
    ]
)


class ReplayArrays(NamedTuple):
    """What the loops work on."""

    pages: Pages
    zones: Zones
    blocks: Blocks
    nodes: Nodes
    pagesets: Pagesets
    vmas: Vmas
    avcs: Avcs
    pt: PageTables
    events: VmEvents
    memory: Memory
    i_pages: NDArray[np.int64]
    disk: NDArray[np.uint64]
    """Of the file: the stamp of each real page."""
    where: NDArray[np.int64]
    zonelists: NDArray[np.int64]
    """int64[nid, highest zone type, zone], -1 behind the last"""
    alloc_factor: NDArray[np.int64]
    fallbacks: NDArray[np.int64]
    failed: NDArray[np.int64]
    """int64[order]: requests not served"""
    counts: Events
    mapping: int


# Entering.


@njit
def _own_folio(a: ReplayArrays, real: int, pfn: int, order: int) -> None:
    """Put a movable block into the file, at the place of its name."""
    pages = a.pages
    nr = 1 << order
    if order > 0:
        prep_compound_page(pages, pfn, order, PG_thp)
    page = pages[pfn]
    page.flags |= PG_uptodate | PG_swapbacked
    page.mapping = a.mapping
    page.index = real
    page.refcount = nr
    slot = a.avcs[a.mapping].i_base + real
    for i in range(nr):
        a.i_pages[slot + i] = pfn + i
        fill_page(a.memory, pfn + i, a.disk[real + i])
    a.nodes[a.zones[page.zone].node].nr_file_pages += nr
    lruvec_add_folio(pages, a.zones, a.nodes, pfn)


@njit
def place_block(a: ReplayArrays, event: Events, pfn: int) -> None:
    """Enter the block that was found for a request under its name; `pfn` < 0: none was."""
    real = int(event.pfn)
    nr = 1 << event.order
    if pfn < 0:
        a.failed[event.order] += 1
        a.counts[0].failed += 1
        a.counts[0].failed_pages += nr
        for i in range(nr):
            a.where[real + i] = UNPLACED
        return
    a.counts[0].allocs += 1
    a.counts[0].alloc_pages += nr
    if event.migratetype == MIGRATE_MOVABLE:
        _own_folio(a, real, pfn, int(event.order))
        return
    for i in range(nr):
        a.where[real + i] = pfn + i


# Freeing.


@njit
def _free_block(a: ReplayArrays, pfn: int, order: int, cpu: int) -> None:
    """Give a block of pages that belong to nobody back."""
    if order > 0 or a.pagesets.shape[1] == 0:
        free_pages(a.pages, a.zones, a.blocks, pfn, order)
        return
    cpu %= a.pagesets.shape[1]
    zone = a.pages[pfn].zone
    clear_page(a.pages, pfn)
    free_frozen_pages(a.pages, a.zones, a.blocks, a.nodes, a.pagesets, cpu, pfn, 0)
    a.alloc_factor[zone, cpu] >>= 1


@njit
def _free_folio(a: ReplayArrays, head: int, cpu: int) -> None:
    """Take a folio out of the file and free it."""
    page = a.pages[head]
    order = int(page.order)
    slot = a.avcs[a.mapping].i_base + page.index
    for i in range(1 << order):
        a.i_pages[slot + i] = -1
    a.nodes[a.zones[page.zone].node].nr_file_pages -= 1 << order
    lruvec_del_folio(a.pages, a.zones, a.nodes, head)
    if page.flags & PG_mlocked:
        a.zones[page.zone].nr_mlock -= 1 << order
    _free_block(a, head, order, cpu)


@njit
def _split(a: ReplayArrays, head: int) -> None:
    """Make single pages of a folio that the real kernel has split. Nobody can have held it, so nobody does here."""
    page = a.pages[head]
    page.refcount = 1 << page.order
    page.flags &= ~(PG_private | PG_writeback)
    split_folio(a.pages, a.zones, a.blocks, a.nodes, a.vmas, a.avcs, a.pt, a.events, head)


@njit
def _disown(a: ReplayArrays, pfn: int, nr: int) -> None:
    """Pages of the kernel are about to be freed: out of the node's counts; a compound page is one no longer."""
    pages = a.pages
    for page in range(pfn, pfn + nr):
        flags = pages[page].flags
        node = a.nodes[a.zones[pages[page].zone].node]
        node.nr_slab -= flags & PG_slab != 0
        node.nr_page_table_pages -= flags & PG_table != 0
        node.nr_hugetlb -= flags & PG_huge != 0
        if flags & (PG_head | PG_tail):
            head = compound_head(pages, page)
            order = pages[head].order
            for part in range(head, head + (1 << order)):
                a.nodes[a.zones[pages[part].zone].node].nr_hugetlb -= part != page and pages[part].flags & PG_huge != 0
                pages[part].flags &= ~(PG_head | PG_tail | PG_huge | PG_thp)
                pages[part].index = 0
                pages[part].order = 0


@njit
def _free_one(a: ReplayArrays, real: int, cpu: int) -> int:
    """Free the page of one name; returns 1 if there was one."""
    pfn = a.i_pages[a.avcs[a.mapping].i_base + real]
    if pfn >= 0:
        head = compound_head(a.pages, pfn)
        if a.pages[head].order > 0:
            _split(a, head)
        _free_folio(a, pfn, cpu)
        return 1
    pfn = a.where[real]
    a.where[real] = NOT_HERE
    if pfn < 0:
        a.counts[0].free_unplaced += pfn == UNPLACED
        return 0
    _disown(a, pfn, 1)
    _free_block(a, pfn, 0, cpu)
    return 1


@njit
def _is_run(a: ReplayArrays, real: int, nr: int) -> bool:
    """The names' pages that do not move lie one behind the other, as one block that can be freed whole."""
    first = a.where[real]
    if first < 0 or first & (nr - 1):
        return False
    for i in range(1, nr):
        if a.where[real + i] != first + i:
            return False
    return bool(a.pages[first].zone == a.pages[first + nr - 1].zone)


@njit
def free_names(a: ReplayArrays, real: int, order: int, cpu: int) -> int:
    """Free the pages of 2^order names, as one block if they are one; returns how many there were."""
    nr = 1 << order
    pfn = a.i_pages[a.avcs[a.mapping].i_base + real]
    if pfn >= 0 and a.pages[pfn].order == order and a.pages[pfn].flags & PG_tail == 0 and a.pages[pfn].index == real:
        _free_folio(a, pfn, cpu)
        return nr
    if order > 0 and _is_run(a, real, nr):
        pfn = a.where[real]
        a.where[real : real + nr] = NOT_HERE
        _disown(a, pfn, nr)
        _free_block(a, pfn, order, cpu)
        return nr
    freed = 0
    for i in range(nr):
        freed += _free_one(a, real + i, cpu)
    return freed
