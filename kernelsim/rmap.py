# SPDX-License-Identifier: GPL-2.0-only
"""Reverse mapping: from a page to every PTE that maps it.

A page's `mapping` names an rmap object: the anon_vma of the process that faulted it in, or the address_space of its
file. An rmap object is a chain of avcs, each naming a VMA that may map pages of it; the VMA's address range and pgoff
give the one virtual page where this page can be, and the page table there says whether it is (after COW in a child it
is not). On fork the child's VMA joins every chain of the parent's and gets an anon_vma of its own for the pages it will
fault in (mm/rmap.c anon_vma_fork). The chain replaces Linux's interval tree: a walk looks at each VMA once.

A large folio's pages have consecutive indexes from its head's on. A VMA maps some or all of them, by PTEs or, where the
folio is 2 MiB and aligned, by one PMD entry; each entry is one mapping of the folio, counted on its head. For the
node's counters a folio is mapped, whole, as long as any part of it is (as in a kernel with CONFIG_NO_PAGE_MAPCOUNT).

A page that KSM shares (PG_ksm) is at another index in each VMA, of other anon_vmas. Its rmap object, the stable node
(stable_node.py), is a chain of places instead of VMAs: each names an anon_vma and the index there, and a walk goes
through the chain of each (rmap_walk_ksm).

`avcs[mapping]` is a chain's head. For a file it also holds, in `i_base`, where its page cache begins in `i_pages`; for
a stable node the pfn of its page; for an anon_vma how many places name it.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import i64, njit
from kernelsim.mmzone import Nodes, Zones
from kernelsim.page import PAGE_SHIFT, Pages, PG_anon, PG_dirty, PG_ksm, PG_partially_mapped
from kernelsim.pgtable import (
    _PAGE_DIRTY,
    _PAGE_FLAGS,
    _PAGE_MIGRATION,
    _PAGE_PRESENT,
    _PAGE_PSE,
    HPAGE_PMD_NR,
    HPAGE_PMD_ORDER,
    PageTables,
    leaf_pfn,
    mk_pte,
    next_leaf,
    pte_pfn,
    walk_leaf,
    walk_pte,
)
from kernelsim.trace_key import REMOVE_MIGRATION_PTE, SET_MIGRATION_PTE, trace_key, trace_row

Vmas: TypeAlias = Any
"""Record array of `vma_dtype`; VMA 0 is none."""
Avcs: TypeAlias = Any
"""Record array of `avc_dtype`; 0 ends a chain."""
Mms: TypeAlias = Any
"""Record array of `mm_dtype`; mm 0 is none."""

VM_WRITE = 1 << 1
VM_SHARED = 1 << 3
VM_LOCKED = 1 << 13
VM_MLOCKING = 1 << 14  # as Linux's VM_IO during an mlock(2): its pages are being counted to, or from, VM_LOCKED
VM_HUGEPAGE = 1 << 29  # MADV_HUGEPAGE
VM_MERGEABLE = 1 << 30  # MADV_MERGEABLE; Linux's is bit 31, which is the sign here

vma_dtype = np.dtype(
    [
        ("start", np.int64),  # first and last+1 virtual page
        ("end", np.int64),
        ("pgoff", np.int64),
        ("root", np.int64),  # top-level page table of the mm
        ("mm", np.int32),
        ("mapping", np.int32),  # anon_vma for new anonymous pages, or the file
        ("flags", np.int32),
    ]
)
avc_dtype = np.dtype(
    [
        ("vma", np.int32),  # of a place: its anon_vma
        ("next", np.int32),
        ("i_base", np.int64),  # of a place: the index there; of a chain's head: see above
    ]
)
mm_dtype = np.dtype(
    [
        ("root", np.int64),
        ("rss_anon", np.int64),
        ("rss_file", np.int64),
        ("node", np.int32),
        ("cpu", np.int32),
    ]
)


@njit
def vma_address(vmas: Vmas, vma: int, index: int) -> int:
    """Virtual page at which a VMA would map page `index` of its rmap object, or -1."""
    vpn = vmas[vma].start + index - vmas[vma].pgoff
    if vpn < vmas[vma].start or vpn >= vmas[vma].end:
        return -1
    return int(vpn)


@njit
def first_chain(pages: Pages, avcs: Avcs, pfn: int) -> tuple[int, int, int]:
    """(rmap object whose VMAs may map a single page, its index there, the place that says so): where a walk begins.

    The object is 0 if nobody owns the page, the place 0 but for a KSM page.
    """
    if pages[pfn].flags & PG_ksm:
        return next_chain(avcs, pages[pfn].mapping)
    return i64(pages[pfn].mapping), i64(pages[pfn].index), 0


@njit
def next_chain(avcs: Avcs, place: int) -> tuple[int, int, int]:
    """The same for the place behind this one; zeros if there is none (row 0 is that)."""
    after = avcs[place].next
    return i64(avcs[after].vma), i64(avcs[after].i_base), i64(after)


@njit
def folio_span(vmas: Vmas, vma: int, index: int, nr_pages: int) -> tuple[int, int, int]:
    """(first, end, base): the virtual pages at which a VMA would map pages of a folio; page i of it is at base + i."""
    base = int(vmas[vma].start) + index - int(vmas[vma].pgoff)
    return max(base, int(vmas[vma].start)), min(base + nr_pages, int(vmas[vma].end)), base


@njit
def is_mlock_under_way(vmas: Vmas, avcs: Avcs, mapping: int) -> bool:
    """Whether mlock counts of pages of this rmap object are only partly brought up to date."""
    avc = avcs[mapping].next
    while avc != 0:
        if vmas[avcs[avc].vma].flags & VM_MLOCKING:
            return True
        avc = avcs[avc].next
    return False


@njit
def add_rmap(pages: Pages, zones: Zones, nodes: Nodes, pfn: int) -> None:
    """Count one more PTE that maps (a page of) the folio with this head, and the reference that goes with it."""
    pages[pfn].refcount += 1
    pages[pfn].mapcount += 1
    if pages[pfn].mapcount == 1:
        mod_mapped(pages, zones, nodes, pfn, 1)


@njit
def remove_rmap(pages: Pages, zones: Zones, nodes: Nodes, pfn: int) -> None:
    """Count one PTE less; the caller deals with a refcount that drops to 0."""
    pages[pfn].refcount -= 1
    pages[pfn].mapcount -= 1
    if pages[pfn].mapcount == 0:
        mod_mapped(pages, zones, nodes, pfn, -1)


@njit
def add_rmap_pmd(pages: Pages, zones: Zones, nodes: Nodes, head: int) -> None:
    """Count one more PMD entry, and its reference."""
    add_rmap(pages, zones, nodes, head)
    mod_entire(pages, zones, nodes, head, 1)


@njit
def remove_rmap_pmd(pages: Pages, zones: Zones, nodes: Nodes, head: int) -> None:
    remove_rmap(pages, zones, nodes, head)
    mod_entire(pages, zones, nodes, head, -1)


@njit
def mod_entire(pages: Pages, zones: Zones, nodes: Nodes, head: int, change: int) -> None:
    """Count PMD entries of a folio alone."""
    before = pages[head + 1].mapping
    pages[head + 1].mapping = before + change
    if pages[head].flags & PG_anon and (before == 0 or before + change == 0):
        nodes[zones[pages[head].zone].node].nr_anon_thps += change * HPAGE_PMD_NR


@njit
def mod_mapped(pages: Pages, zones: Zones, nodes: Nodes, pfn: int, change: int) -> None:
    """Count a folio that has become mapped (1) or unmapped (-1)."""
    nid = zones[pages[pfn].zone].node
    change <<= pages[pfn].order
    if pages[pfn].flags & PG_anon:
        nodes[nid].nr_anon_pages += change
    else:
        nodes[nid].nr_mapped += change


@njit
def is_partially_mapped(pages: Pages, head: int) -> bool:
    """An anonymous large folio some of whose pages nobody maps, as far as the counts tell (__folio_remove_rmap)."""
    page = pages[head]
    if page.order == 0 or page.flags & PG_anon == 0:
        return False
    return bool(0 < page.mapcount < 1 << page.order and pages[head + 1].mapping == 0)


@njit
def try_to_migrate(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    touched: NDArray[np.uint8],
    pfn: int,
) -> tuple[int, int, int]:
    """Replace every entry that maps a folio by a migration entry; marks the mms with stale TLB entries in `touched`.

    Returns the number of entries, and of the first found its VMA and its address (0 and -1 if there was none).
    """
    if pages[pfn].order > 0:
        return _try_to_migrate_large(pages, zones, nodes, vmas, avcs, pt, touched, pfn)
    nr = 0
    first_vma = 0
    first_ptep = -1
    mapping, index, place = first_chain(pages, avcs, pfn)
    while mapping != 0:
        avc = avcs[mapping].next
        while avc != 0 and pages[pfn].mapcount > 0:
            vma = avcs[avc].vma
            vpn = vma_address(vmas, vma, index)
            ptep = walk_pte(pt, vmas[vma].root, vpn) if vpn >= 0 else -1
            if ptep >= 0 and pt[ptep] & _PAGE_PRESENT and pte_pfn(pt[ptep]) == pfn:
                if pt[ptep] & _PAGE_DIRTY:
                    pages[pfn].flags |= PG_dirty
                pt[ptep] = (pt[ptep] & ~_PAGE_PRESENT) | _PAGE_MIGRATION
                if trace_key() & SET_MIGRATION_PTE:
                    trace_row(SET_MIGRATION_PTE, vpn << PAGE_SHIFT, i64(pt[ptep]), 0)
                remove_rmap(pages, zones, nodes, pfn)
                touched[vmas[vma].mm] = 1
                if nr == 0:
                    first_vma = vma
                    first_ptep = ptep
                nr += 1
            avc = avcs[avc].next
        mapping, index, place = next_chain(avcs, place)
    return nr, first_vma, first_ptep


@njit
def _try_to_migrate_large(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    touched: NDArray[np.uint8],
    head: int,
) -> tuple[int, int, int]:
    nr = 0
    first_vma = 0
    first_ptep = -1
    avc = avcs[pages[head].mapping].next
    while avc != 0 and pages[head].mapcount > 0:
        vma = avcs[avc].vma
        vpn, end, base = folio_span(vmas, vma, pages[head].index, 1 << pages[head].order)
        while vpn < end:
            at = walk_leaf(pt, vmas[vma].root, vpn)
            entry = pt[at] if at >= 0 else np.uint64(0)
            if entry & _PAGE_PRESENT and leaf_pfn(entry, vpn) == head + vpn - base:
                if entry & _PAGE_DIRTY:
                    pages[head].flags |= PG_dirty
                pt[at] = (entry & ~_PAGE_PRESENT) | _PAGE_MIGRATION
                if trace_key() & SET_MIGRATION_PTE:
                    order = HPAGE_PMD_ORDER if entry & _PAGE_PSE else 0
                    trace_row(SET_MIGRATION_PTE, vpn << PAGE_SHIFT, i64(pt[at]), order)
                if entry & _PAGE_PSE:
                    remove_rmap_pmd(pages, zones, nodes, head)
                else:
                    remove_rmap(pages, zones, nodes, head)
                touched[vmas[vma].mm] = 1
                if nr == 0:
                    first_vma = vma
                    first_ptep = at
                nr += 1
            vpn = next_leaf(entry, vpn)
        avc = avcs[avc].next
    return nr, first_vma, first_ptep


@njit
def restore_pte(pages: Pages, zones: Zones, nodes: Nodes, pt: PageTables, ptep: int, old: int, new: int) -> bool:
    """Turn one migration entry for `old` into a PTE for `new`; False if it is not (any more) such an entry."""
    pte = pt[ptep]
    if pte & _PAGE_MIGRATION == np.uint64(0) or pte & _PAGE_PRESENT or pte_pfn(pte) != old:
        return False
    pt[ptep] = mk_pte(new, (pte & _PAGE_FLAGS & ~_PAGE_MIGRATION) | _PAGE_PRESENT)
    add_rmap(pages, zones, nodes, new)
    return True


@njit
def remove_migration_ptes(
    pages: Pages, zones: Zones, nodes: Nodes, vmas: Vmas, avcs: Avcs, pt: PageTables, old: int, new: int
) -> int:
    """Point each migration entry for folio `old` at `new`, whose order, mapping and index are set; returns how many."""
    if pages[new].order > 0:
        return _remove_migration_ptes_large(pages, zones, nodes, vmas, avcs, pt, old, new)
    nr = 0
    mapping, index, place = first_chain(pages, avcs, new)
    while mapping != 0:
        avc = avcs[mapping].next
        while avc != 0:
            vma = avcs[avc].vma
            vpn = vma_address(vmas, vma, index)
            ptep = walk_pte(pt, vmas[vma].root, vpn) if vpn >= 0 else -1
            if ptep >= 0 and restore_pte(pages, zones, nodes, pt, ptep, old, new):
                if trace_key() & REMOVE_MIGRATION_PTE:
                    trace_row(REMOVE_MIGRATION_PTE, vpn << PAGE_SHIFT, i64(pt[ptep]), 0)
                nr += 1
            avc = avcs[avc].next
        mapping, index, place = next_chain(avcs, place)
    return nr


@njit
def _remove_migration_ptes_large(
    pages: Pages, zones: Zones, nodes: Nodes, vmas: Vmas, avcs: Avcs, pt: PageTables, old: int, new: int
) -> int:
    """The same for a large folio. One of whose pages some were unmapped meanwhile is due to be split."""
    nr = 0
    avc = avcs[pages[new].mapping].next
    while avc != 0:
        vma = avcs[avc].vma
        vpn, end, base = folio_span(vmas, vma, pages[new].index, 1 << pages[new].order)
        while vpn < end:
            at = walk_leaf(pt, vmas[vma].root, vpn)
            entry = pt[at] if at >= 0 else np.uint64(0)
            i = vpn - base
            if entry & _PAGE_MIGRATION and leaf_pfn(entry, vpn) == old + i:
                bits = (entry & _PAGE_FLAGS & ~_PAGE_MIGRATION) | _PAGE_PRESENT
                if entry & _PAGE_PSE:
                    pt[at] = mk_pte(new, bits)
                    add_rmap_pmd(pages, zones, nodes, new)
                else:
                    pt[at] = mk_pte(new + i, bits)
                    add_rmap(pages, zones, nodes, new)
                if trace_key() & REMOVE_MIGRATION_PTE:
                    order = HPAGE_PMD_ORDER if entry & _PAGE_PSE else 0
                    trace_row(REMOVE_MIGRATION_PTE, vpn << PAGE_SHIFT, i64(pt[at]), order)
                nr += 1
            vpn = next_leaf(entry, vpn)
        avc = avcs[avc].next
    if is_partially_mapped(pages, new):
        pages[new + 1].flags |= PG_partially_mapped
    return nr
