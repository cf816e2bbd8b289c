# SPDX-License-Identifier: GPL-2.0-only
"""Page tables: four levels of 512 entries, held in page frames of the emulated machine.

`pt` is a flat uint64 array over all of physical memory: entry i of the table in frame `pfn` is pt[pfn * 512 + i]. With
real bytes it *is* physical memory, so page tables occupy the bytes they would; with content stamps it is an array of
its own of the same shape, of which only page-table frames are ever touched. A PTE's address (`ptep`) is its index in
`pt`.

An entry is laid out as on x86-64: present, writable, user, accessed, dirty in their places, the pfn from bit 12. While
a page is being moved its PTEs are migration entries: not present, _PAGE_MIGRATION set, pfn and the other bits kept
(Linux encodes them as swap entries). An access that meets one waits until the move is over.

An entry of the last level but one (a PMD) with _PAGE_PSE is a leaf: it maps an aligned 2 MiB folio whole, or is its
migration entry. For each such entry the PMD table keeps a spare table (the deposit), so that taking the mapping apart
into PTEs never needs memory (pgtable_trans_huge_deposit). The spares of a PMD table hang on its `index`, linked by
theirs.

Table frames are unmovable pages with PG_table. They are freed with the mm.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import i64, njit, u64
from kernelsim.mmzone import MIGRATE_UNMOVABLE, Blocks, Nodes, Zones
from kernelsim.page import Pages, PG_table
from kernelsim.page_alloc import free_pages, get_page_from_freelist

PTRS_PER_PT = 512
HPAGE_PMD_ORDER = 9
HPAGE_PMD_NR = 1 << HPAGE_PMD_ORDER

_PAGE_PRESENT = np.uint64(1 << 0)
_PAGE_RW = np.uint64(1 << 1)
_PAGE_USER = np.uint64(1 << 2)
_PAGE_ACCESSED = np.uint64(1 << 5)
_PAGE_DIRTY = np.uint64(1 << 6)
_PAGE_PSE = np.uint64(1 << 7)
_PAGE_MIGRATION = np.uint64(1 << 10)
_PAGE_TABLE = np.uint64(0x67)  # present, writable, user, accessed, dirty: what Linux puts in upper levels
_PFN_SHIFT = np.uint64(12)
_PAGE_FLAGS = np.uint64(0xFFF)
_NONE = np.uint64(0)

PageTables: TypeAlias = NDArray[np.uint64]
"""uint64[nr_pages * 512]"""


@njit
def pte_pfn(pte: Any) -> int:
    return i64(u64(pte) >> _PFN_SHIFT)


@njit
def mk_pte(pfn: int, bits: Any) -> Any:
    return (u64(pfn) << _PFN_SHIFT) | u64(bits)


@njit
def leaf_pfn(entry: Any, vpn: int) -> int:
    """The page that a leaf entry, PTE or PMD, has for a virtual page."""
    pfn = pte_pfn(entry)
    return pfn + (vpn & (HPAGE_PMD_NR - 1)) if u64(entry) & _PAGE_PSE else pfn


@njit
def walk_pte(pt: PageTables, root: int, vpn: int) -> int:
    """Address of the PTE for a virtual page, or -1 if a table is missing on the way (also where a PMD maps it)."""
    table = root
    for shift in (27, 18, 9):
        entry = pt[table * PTRS_PER_PT + ((vpn >> shift) & 511)]
        if entry & (_PAGE_PRESENT | _PAGE_PSE) != _PAGE_PRESENT:
            return -1
        table = pte_pfn(entry)
    return table * PTRS_PER_PT + (vpn & 511)


@njit
def walk_pmd(pt: PageTables, root: int, vpn: int) -> int:
    """Address of the PMD entry for a virtual page, or -1 if a table is missing on the way."""
    table = root
    for shift in (27, 18):
        entry = pt[table * PTRS_PER_PT + ((vpn >> shift) & 511)]
        if entry & _PAGE_PRESENT == _NONE:
            return -1
        table = pte_pfn(entry)
    return table * PTRS_PER_PT + ((vpn >> 9) & 511)


@njit
def walk_leaf(pt: PageTables, root: int, vpn: int) -> int:
    """Address of the entry that maps a virtual page, or would: a PMD with _PAGE_PSE, else the PTE; -1 without table."""
    pmd = walk_pmd(pt, root, vpn)
    if pmd < 0 or pt[pmd] & _PAGE_PSE:
        return pmd
    if pt[pmd] & _PAGE_PRESENT == _NONE:
        return -1
    return pte_pfn(pt[pmd]) * PTRS_PER_PT + (vpn & 511)


@njit
def next_leaf(entry: Any, vpn: int) -> int:
    """The first virtual page behind what a leaf entry maps."""
    return (vpn | (HPAGE_PMD_NR - 1)) + 1 if u64(entry) & _PAGE_PSE else vpn + 1


@njit
def alloc_table(
    pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, zonelist: NDArray[np.int32], pt: PageTables
) -> int:
    """A zeroed table frame, or -ENOMEM."""
    pfn = get_page_from_freelist(pages, zones, blocks, zonelist, 0, MIGRATE_UNMOVABLE)
    if pfn < 0:
        return pfn
    pages[pfn].flags = PG_table
    for i in range(pfn * PTRS_PER_PT, (pfn + 1) * PTRS_PER_PT):
        pt[i] = 0
    nodes[zones[pages[pfn].zone].node].nr_page_table_pages += 1
    return pfn


@njit
def pmd_alloc(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    pt: PageTables,
    root: int,
    vpn: int,
) -> int:
    """Address of the PMD entry for a virtual page, with missing tables made on the way; -ENOMEM if that fails."""
    table = root
    for shift in (27, 18):
        at = table * PTRS_PER_PT + ((vpn >> shift) & 511)
        if pt[at] & _PAGE_PRESENT == _NONE:
            below = alloc_table(pages, zones, blocks, nodes, zonelist, pt)
            if below < 0:
                return below
            pt[at] = mk_pte(below, _PAGE_TABLE)
        table = pte_pfn(pt[at])
    return table * PTRS_PER_PT + ((vpn >> 9) & 511)


@njit
def pte_alloc(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    pt: PageTables,
    root: int,
    vpn: int,
) -> int:
    """walk_leaf() with missing tables made on the way; -ENOMEM if that fails."""
    pmd = pmd_alloc(pages, zones, blocks, nodes, zonelist, pt, root, vpn)
    if pmd < 0 or pt[pmd] & _PAGE_PSE:
        return pmd
    if pt[pmd] & _PAGE_PRESENT == _NONE:
        below = alloc_table(pages, zones, blocks, nodes, zonelist, pt)
        if below < 0:
            return below
        pt[pmd] = mk_pte(below, _PAGE_TABLE)
    return pte_pfn(pt[pmd]) * PTRS_PER_PT + (vpn & 511)


@njit
def pgtable_trans_huge_deposit(pages: Pages, pmd: int, table: int) -> None:
    """Keep a spare table for the huge mapping at PMD address `pmd`."""
    pmd_table = pmd // PTRS_PER_PT
    pages[table].index = pages[pmd_table].index
    pages[pmd_table].index = table


@njit
def pgtable_trans_huge_withdraw(pages: Pages, pmd: int) -> int:
    """Take a spare table back."""
    pmd_table = pmd // PTRS_PER_PT
    table = int(pages[pmd_table].index)
    pages[pmd_table].index = pages[table].index
    pages[table].index = 0
    return table


@njit
def free_table(pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pfn: int) -> None:
    nodes[zones[pages[pfn].zone].node].nr_page_table_pages -= 1
    free_pages(pages, zones, blocks, pfn, 0)


@njit
def free_pgtables(
    pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pt: PageTables, table: int, level: int, budget: int
) -> int:
    """Free the tables below one of the given level (3 is the root), and then that, but at most `budget` of them.

    Returns what is left of the budget: 0 if not all are gone, to be called again. The caller has unmapped every page.
    """
    if level > 0:
        for i in range(table * PTRS_PER_PT, (table + 1) * PTRS_PER_PT):
            if pt[i] & _PAGE_PRESENT:
                below = pte_pfn(pt[i])  # no PMD maps a page any more, so this is a table
                budget = free_pgtables(pages, zones, blocks, nodes, pt, below, level - 1, budget)
                if budget == 0:
                    return 0
                pt[i] = _NONE
    if budget > 1:  # what is left says whether all are gone
        free_table(pages, zones, blocks, nodes, table)
    return budget - 1
