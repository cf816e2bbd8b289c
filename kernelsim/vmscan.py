# SPDX-License-Identifier: GPL-2.0-only
"""Page reclaim: the hot loops over the file LRU lists (mm/vmscan.c).

There is no swap, so anonymous pages are not reclaimable and their lists are not looked at (get_scan_count: SCAN_FILE).
A file page at the end of the inactive list is unmapped, taken out of the page cache and freed, unless it was used since
the last look: one use gives it another round, more make it active. The active list gives its end to the inactive
one while that is the shorter by inactive_is_low(). What was reclaimed is read in again on the next access: a file's
content is its `disk` (filemap.py), which is always up to date, so a dirty page needs no writing before it goes.

Who may have pinned a page keeps it: its refcount does not add up. So does a mapping that a page fault could not restore
(imported private file mappings, which have no file behind them).

Differences from Linux: no writeback, no shrinkers, no memory cgroups, no refault distance, no VM_EXEC protection; large
folios are passed over. A page leaves the LRU only to be freed at once, so none is ever isolated here.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit
from kernelsim.lruvec import lru_head, lruvec_add_folio, lruvec_del_folio
from kernelsim.mmzone import LRU_ACTIVE_FILE, LRU_INACTIVE_FILE, Blocks, Nodes, Zones
from kernelsim.page import (
    Pages,
    PG_active,
    PG_anon,
    PG_dirty,
    PG_lru,
    PG_private,
    PG_referenced,
    PG_swapbacked,
    PG_unevictable,
    PG_writeback,
)
from kernelsim.page_alloc import free_pages
from kernelsim.pgtable import _PAGE_ACCESSED, _PAGE_DIRTY, _PAGE_PRESENT, PageTables, pte_pfn, walk_pte
from kernelsim.rmap import VM_SHARED, Avcs, Mms, Vmas, remove_rmap, vma_address
from kernelsim.tlb import Tlbs, flush_tlb_mm
from kernelsim.vmstat import Events

SWAP_CLUSTER_MAX = 32
_ZERO = np.uint64(0)

FOLIOREF_KEEP, FOLIOREF_ACTIVATE, FOLIOREF_RECLAIM = range(3)


@njit
def _mapped_at(pages: Pages, vmas: Vmas, pt: PageTables, vma: int, pfn: int) -> int:
    """Address of the PTE by which a VMA maps a page, or -1."""
    vpn = vma_address(vmas, vma, pages[pfn].index)
    ptep = walk_pte(pt, vmas[vma].root, vpn) if vpn >= 0 else -1
    if ptep >= 0 and pt[ptep] & _PAGE_PRESENT and pte_pfn(pt[ptep]) == pfn:
        return ptep
    return -1


@njit
def folio_referenced(pages: Pages, vmas: Vmas, avcs: Avcs, pt: PageTables, pfn: int) -> int:
    """How many PTEs of a page were used since the last look; they start anew. As on x86 the TLBs are not flushed."""
    nr = 0
    avc = avcs[pages[pfn].mapping].next
    while avc != 0:
        ptep = _mapped_at(pages, vmas, pt, avcs[avc].vma, pfn)
        if ptep >= 0 and pt[ptep] & _PAGE_ACCESSED:
            pt[ptep] &= ~_PAGE_ACCESSED
            nr += 1
        avc = avcs[avc].next
    return nr


@njit
def folio_check_references(pages: Pages, vmas: Vmas, avcs: Avcs, pt: PageTables, pfn: int) -> int:
    """FOLIOREF_*: what becomes of a page at the end of the inactive list."""
    nr = folio_referenced(pages, vmas, avcs, pt, pfn)
    was_referenced = pages[pfn].flags & PG_referenced
    pages[pfn].flags &= ~PG_referenced
    if nr == 0:
        return FOLIOREF_RECLAIM
    pages[pfn].flags |= PG_referenced
    return FOLIOREF_ACTIVATE if was_referenced or nr > 1 else FOLIOREF_KEEP


@njit
def is_page_cache(pages: Pages, pfn: int) -> bool:
    """A single page of some file's cache that nobody holds beyond its mappings, the cache and its buffers."""
    page = pages[pfn]
    flags = page.flags
    if flags & (PG_anon | PG_swapbacked | PG_unevictable | PG_writeback) or page.mapping == 0 or page.order > 0:
        return False
    return bool(page.refcount == page.mapcount + 1 + (flags & PG_private != 0))


@njit
def _try_to_unmap(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    mms: Mms,
    pt: PageTables,
    touched: NDArray[np.uint8],
    pfn: int,
) -> bool:
    """Take down every PTE of a file page; False, and some may be left, where one must stay."""
    avc = avcs[pages[pfn].mapping].next
    while avc != 0 and pages[pfn].mapcount > 0:
        vma = avcs[avc].vma
        ptep = _mapped_at(pages, vmas, pt, vma, pfn)
        if ptep >= 0:
            if vmas[vma].flags & VM_SHARED == 0:
                return False
            if pt[ptep] & _PAGE_DIRTY:
                pages[pfn].flags |= PG_dirty
            pt[ptep] = _ZERO
            remove_rmap(pages, zones, nodes, pfn)
            mms[vmas[vma].mm].rss_file -= 1
            touched[vmas[vma].mm] = 1
        avc = avcs[avc].next
    return bool(pages[pfn].mapcount == 0)


@njit
def remove_mapping(pages: Pages, zones: Zones, nodes: Nodes, avcs: Avcs, i_pages: NDArray[np.int64], pfn: int) -> None:
    """Take an unmapped page out of the page cache and off the LRU; the caller frees it."""
    lruvec_del_folio(pages, zones, nodes, pfn)
    i_pages[avcs[pages[pfn].mapping].i_base + pages[pfn].index] = -1
    nodes[zones[pages[pfn].zone].node].nr_file_pages -= 1


@njit
def _rotate(pages: Pages, zones: Zones, nodes: Nodes, pfn: int, active: int) -> None:
    """Put a page at the front of the active (PG_active) or the inactive list (0)."""
    lruvec_del_folio(pages, zones, nodes, pfn)
    pages[pfn].flags = (pages[pfn].flags & ~PG_active) | active
    lruvec_add_folio(pages, zones, nodes, pfn)


@njit
def _flush_and_free(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    tlbs: Tlbs,
    events: Events,
    touched: NDArray[np.uint8],
    batch: NDArray[np.int64],
    nr: int,
) -> None:
    """No CPU may reach a page any more when it is freed (try_to_unmap_flush)."""
    for mm in range(len(touched)):
        if touched[mm]:
            flush_tlb_mm(tlbs, events, mm)
            touched[mm] = 0
    for i in range(nr):
        free_pages(pages, zones, blocks, batch[i], 0)


@njit
def shrink_inactive_list(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    mms: Mms,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    i_pages: NDArray[np.int64],
    touched: NDArray[np.uint8],
    batch: NDArray[np.int64],
    nid: int,
    highest_type: int,
) -> tuple[int, int]:
    """Look at SWAP_CLUSTER_MAX pages from the end of the inactive file list -> (pages looked at, pages freed).

    `batch` int64[SWAP_CLUSTER_MAX] is scratch. Pages in zones above `highest_type` are of no use to the caller.
    """
    head = lru_head(pages, zones, nid, LRU_INACTIVE_FILE)
    nr_scanned = 0
    nr = 0
    while nr_scanned < SWAP_CLUSTER_MAX and pages[head].prev != head:
        pfn = int(pages[head].prev)
        nr_scanned += 1
        if zones[pages[pfn].zone].type > highest_type or not is_page_cache(pages, pfn):
            _rotate(pages, zones, nodes, pfn, 0)
            continue
        verdict = folio_check_references(pages, vmas, avcs, pt, pfn)
        if verdict == FOLIOREF_ACTIVATE:
            _rotate(pages, zones, nodes, pfn, PG_active)
            events[0].pgactivate += 1
        elif verdict == FOLIOREF_KEEP or not _try_to_unmap(pages, zones, nodes, vmas, avcs, mms, pt, touched, pfn):
            _rotate(pages, zones, nodes, pfn, 0)
        else:
            remove_mapping(pages, zones, nodes, avcs, i_pages, pfn)
            batch[nr] = pfn
            nr += 1
    _flush_and_free(pages, zones, blocks, tlbs, events, touched, batch, nr)
    return nr_scanned, nr


@njit
def shrink_active_list(
    pages: Pages, zones: Zones, nodes: Nodes, vmas: Vmas, avcs: Avcs, pt: PageTables, events: Events, nid: int
) -> int:
    """Move SWAP_CLUSTER_MAX pages from the end of the active file list to the inactive one; returns how many."""
    head = lru_head(pages, zones, nid, LRU_ACTIVE_FILE)
    nr = 0
    while nr < SWAP_CLUSTER_MAX and pages[head].prev != head:
        pfn = int(pages[head].prev)
        if pages[pfn].mapping != 0:
            folio_referenced(pages, vmas, avcs, pt, pfn)
        _rotate(pages, zones, nodes, pfn, 0)
        nr += 1
    events[0].pgrefill += nr
    events[0].pgdeactivate += nr
    return nr


@njit
def inactive_is_low(nodes: Nodes, nid: int) -> bool:
    """The inactive file list is short next to the active one: 1:1 below 1 GiB, 1:sqrt(10 * GiB) above."""
    inactive = nodes[nid].nr_lru[LRU_INACTIVE_FILE]
    active = nodes[nid].nr_lru[LRU_ACTIVE_FILE]
    gib = (inactive + active) >> 18
    ratio = int(np.sqrt(10 * gib)) if gib else 1
    return bool(inactive * ratio < active)


@njit
def shrink_lruvec(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    mms: Mms,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    i_pages: NDArray[np.int64],
    touched: NDArray[np.uint8],
    batch: NDArray[np.int64],
    left: NDArray[np.int64],
    nid: int,
    highest_type: int,
    nr_wanted: int,
    budget: int,
) -> tuple[int, int]:
    """Scan a node's file lists in turns until `left` (int64[2]: inactive, active pages still to look at, in and out) is
    used up, `nr_wanted` pages were freed or about `budget` were looked at -> (inactive pages looked at, pages freed).
    """
    nr_scanned = 0
    nr_reclaimed = 0
    spent = 0
    while (left[0] > 0 or left[1] > 0) and nr_reclaimed < nr_wanted and spent < budget:
        spent += SWAP_CLUSTER_MAX
        if left[1] > 0:
            left[1] -= SWAP_CLUSTER_MAX
            if inactive_is_low(nodes, nid):
                shrink_active_list(pages, zones, nodes, vmas, avcs, pt, events, nid)
        if left[0] > 0:
            left[0] -= SWAP_CLUSTER_MAX
            scanned, freed = shrink_inactive_list(
                pages, zones, blocks, nodes, vmas, avcs, mms, pt, tlbs, events, i_pages, touched, batch, nid,
                highest_type,
            )  # fmt: skip
            nr_scanned += scanned
            nr_reclaimed += freed
    return nr_scanned, nr_reclaimed


@njit
def invalidate_mapping_pages(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    avcs: Avcs,
    i_pages: NDArray[np.int64],
    start: int,
    end: int,
) -> int:
    """Drop what of a file's cache (slots start .. end-1) nobody maps or holds; returns how many pages."""
    nr = 0
    for slot in range(start, end):
        pfn = i_pages[slot]
        if pfn < 0 or pages[pfn].mapcount > 0 or pages[pfn].flags & PG_lru == 0:
            continue
        if is_page_cache(pages, pfn):
            remove_mapping(pages, zones, nodes, avcs, i_pages, pfn)
            free_pages(pages, zones, blocks, pfn, 0)
            nr += 1
    return nr
