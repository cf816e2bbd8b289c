# SPDX-License-Identifier: GPL-2.0-only
"""Reverse mapping: from a page to every PTE that maps it.

A page's `mapping` names an rmap object: the anon_vma of the process that faulted it in, or the address_space of its
file. An rmap object is a chain of avcs, each naming a VMA that may map pages of it; the VMA's address range and pgoff
give the one virtual page where this page can be, and the page table there says whether it is (after COW in a child it
is not). On fork the child's VMA joins every chain of the parent's and gets an anon_vma of its own for the pages it will
fault in (mm/rmap.c anon_vma_fork). The chain replaces Linux's interval tree: a walk looks at each VMA once.

`avcs[mapping]` is a chain's head; for a file it also holds where its page cache begins in `i_pages`.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit
from kernelsim.mmzone import Nodes, Zones
from kernelsim.page import Pages, PG_anon, PG_dirty
from kernelsim.pgtable import (
    _PAGE_DIRTY,
    _PAGE_FLAGS,
    _PAGE_MIGRATION,
    _PAGE_PRESENT,
    PageTables,
    mk_pte,
    pte_pfn,
    walk_pte,
)

Vmas: TypeAlias = Any
"""Record array of `vma_dtype`; VMA 0 is none."""
Avcs: TypeAlias = Any
"""Record array of `avc_dtype`; 0 ends a chain."""
Mms: TypeAlias = Any
"""Record array of `mm_dtype`; mm 0 is none."""

VM_WRITE = 1 << 1
VM_SHARED = 1 << 3
VM_LOCKED = 1 << 13

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
avc_dtype = np.dtype([("vma", np.int32), ("next", np.int32), ("i_base", np.int64)])
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
def add_rmap(pages: Pages, zones: Zones, nodes: Nodes, pfn: int) -> None:
    """Count one more PTE, and the reference that goes with it."""
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
def mod_mapped(pages: Pages, zones: Zones, nodes: Nodes, pfn: int, change: int) -> None:
    nid = zones[pages[pfn].zone].node
    if pages[pfn].flags & PG_anon:
        nodes[nid].nr_anon_pages += change
    else:
        nodes[nid].nr_mapped += change


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
    """Replace every PTE of a page by a migration entry; marks the mms whose TLB entries are now stale in `touched`.

    Returns the number of PTEs, and of the first found its VMA and its address (0 and -1 if there was none).
    """
    nr = 0
    first_vma = 0
    first_ptep = -1
    index = pages[pfn].index
    avc = avcs[pages[pfn].mapping].next
    while avc != 0 and pages[pfn].mapcount > 0:
        vma = avcs[avc].vma
        vpn = vma_address(vmas, vma, index)
        ptep = walk_pte(pt, vmas[vma].root, vpn) if vpn >= 0 else -1
        if ptep >= 0 and pt[ptep] & _PAGE_PRESENT and pte_pfn(pt[ptep]) == pfn:
            if pt[ptep] & _PAGE_DIRTY:
                pages[pfn].flags |= PG_dirty
            pt[ptep] = (pt[ptep] & ~_PAGE_PRESENT) | _PAGE_MIGRATION
            remove_rmap(pages, zones, nodes, pfn)
            touched[vmas[vma].mm] = 1
            if nr == 0:
                first_vma = vma
                first_ptep = ptep
            nr += 1
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
    """Point every migration entry for `old` at `new`, whose mapping and index are set; returns how many."""
    nr = 0
    index = pages[new].index
    avc = avcs[pages[new].mapping].next
    while avc != 0:
        vma = avcs[avc].vma
        vpn = vma_address(vmas, vma, index)
        ptep = walk_pte(pt, vmas[vma].root, vpn) if vpn >= 0 else -1
        if ptep >= 0 and restore_pte(pages, zones, nodes, pt, ptep, old, new):
            nr += 1
        avc = avcs[avc].next
    return nr
