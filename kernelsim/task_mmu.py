# SPDX-License-Identifier: GPL-2.0-only
"""Walks over the page tables of a process for its /proc files (fs/proc/task_mmu.c, 6.18).

`smap_gather` adds up what smaps shows of one mapping, `numa_gather` what numa_maps shows, `pagemap_read` makes the
64-bit entries of a range of virtual pages, `clear_refs` forgets who was accessed. Each is one compiled pass that
goes past missing tables 2 MiB at a time.

A large folio's mappings are counted for the folio (CONFIG_NO_PAGE_MAPCOUNT): its pages are proportionally shared by
the average. Linux then guesses by its MM ids whether only one mm maps a folio; here this mm's entries are counted and
compared, which is exact.

A migration entry counts as resident and shared, as on Linux, and shows in pagemap as a swap entry of type 24 (read) or
26 (write) with the pfn as its offset.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import i64, njit, u64
from kernelsim.kpage import folio_average_page_mapcount
from kernelsim.mmzone import Zones
from kernelsim.page import (
    PAGE_SIZE,
    Pages,
    PG_active,
    PG_anon,
    PG_dirty,
    PG_ksm,
    PG_referenced,
    PG_swapbacked,
    PG_unevictable,
    compound_head,
)
from kernelsim.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_MIGRATION,
    _PAGE_PRESENT,
    _PAGE_PSE,
    _PAGE_RW,
    HPAGE_PMD_NR,
    PTRS_PER_PT,
    PageTables,
    leaf_pfn,
    next_leaf,
    pte_pfn,
    walk_leaf,
)
from kernelsim.rmap import VM_LOCKED, Vmas

PSS_SHIFT = 12
TASK_SIZE_VPN = (1 << 35) - 1

(
    RESIDENT, SHARED_CLEAN, SHARED_DIRTY, PRIVATE_CLEAN, PRIVATE_DIRTY, REFERENCED, ANONYMOUS, KSM, LAZYFREE,
    ANON_THP, FILE_THP, PSS, PSS_ANON, PSS_FILE, PSS_SHMEM, PSS_DIRTY, PSS_LOCKED, NR_MEM_SIZE_STATS,
) = range(18)  # fmt: skip
"""struct mem_size_stats: bytes; those from PSS on in 2^-12 bytes."""

PAGES, ANON, DIRTY, ACTIVE, MAPCOUNT_MAX, NR_NUMA_STATS = range(6)
"""struct numa_maps: pages; behind them come the pages on each node."""

PM_MMAP_EXCLUSIVE = np.uint64(1 << 56)
PM_FILE = np.uint64(1 << 61)
PM_SWAP = np.uint64(1 << 62)
PM_PRESENT = np.uint64(1 << 63)
_MAX_SWAPFILES_SHIFT = 5
_SWP_MIGRATION_READ, _SWP_MIGRATION_WRITE = 24, 26
_ZERO = np.uint64(0)
_MAPS = _PAGE_PRESENT | _PAGE_MIGRATION


@njit
def folio_mapped_exclusively(pages: Pages, pt: PageTables, root: int, vpn: int, pfn: int) -> bool:
    """Only the mm with this top-level table maps the folio that page `pfn`, mapped at `vpn`, belongs to."""
    head = compound_head(pages, pfn)
    left = int(pages[head].mapcount)
    if left <= 1 or pages[head].order == 0:
        return left == 1
    base = vpn - (pfn - head)
    vpn = base
    while vpn < base + (1 << pages[head].order):
        at = walk_leaf(pt, root, vpn)
        entry = pt[at] if at >= 0 else _ZERO
        if entry & _PAGE_PRESENT and leaf_pfn(entry, vpn) == head + vpn - base:
            left -= 1
        vpn = next_leaf(entry, vpn)
    return left == 0


@njit
def _smaps_account(
    pages: Pages, head: int, entry: int, nr_pages: int, private: bool, locked: bool, mss: NDArray[np.int64]
) -> None:
    """Count one leaf entry that maps `nr_pages` of a folio (smaps_account)."""
    flags = pages[head].flags
    present = entry & _PAGE_PRESENT != _ZERO
    size = nr_pages * PAGE_SIZE
    dirty = entry & _PAGE_DIRTY != _ZERO or flags & PG_dirty != 0
    mss[RESIDENT] += size
    if flags & PG_anon:
        mss[ANONYMOUS] += size
        if flags & PG_swapbacked == 0 and not dirty:
            mss[LAZYFREE] += size
    if flags & PG_ksm:
        mss[KSM] += size
    if entry & _PAGE_ACCESSED or flags & PG_referenced:
        mss[REFERENCED] += size
    if entry & _PAGE_PSE:
        mss[ANON_THP if flags & PG_anon else FILE_THP] += size
    pss = size << PSS_SHIFT
    if present and pages[head].refcount != 1:
        mapcount = folio_average_page_mapcount(pages, head)
        if mapcount >= 2:
            pss = nr_pages * ((PAGE_SIZE << PSS_SHIFT) // mapcount)
    elif not present:
        private = False
    mss[PSS] += pss
    mss[PSS_ANON if flags & PG_anon else PSS_SHMEM if flags & PG_swapbacked else PSS_FILE] += pss
    if locked:
        mss[PSS_LOCKED] += pss
    if dirty:
        mss[PSS_DIRTY] += pss
        mss[PRIVATE_DIRTY if private else SHARED_DIRTY] += size
    else:
        mss[PRIVATE_CLEAN if private else SHARED_CLEAN] += size


@njit
def smap_gather(pages: Pages, vmas: Vmas, pt: PageTables, vma: int, vpn: int, end: int, mss: NDArray[np.int64]) -> None:
    """Add what is mapped at virtual pages `vpn` to `end` of a VMA to `mss`, int64[NR_MEM_SIZE_STATS]."""
    root = vmas[vma].root
    locked = vmas[vma].flags & VM_LOCKED != 0
    known = -1
    private = False
    while vpn < end:
        at = walk_leaf(pt, root, vpn)
        if at < 0:
            vpn = (vpn | (HPAGE_PMD_NR - 1)) + 1
            continue
        entry = pt[at]
        after = next_leaf(entry, vpn)
        if entry & _MAPS:
            pfn = leaf_pfn(entry, vpn)
            head = compound_head(pages, pfn)
            if head != known:
                known = head
                private = folio_mapped_exclusively(pages, pt, root, vpn, pfn)
            _smaps_account(pages, head, entry, min(after, end) - vpn, private, locked, mss)
        vpn = after


@njit
def numa_gather(
    pages: Pages, zones: Zones, vmas: Vmas, pt: PageTables, vma: int, vpn: int, end: int, md: NDArray[np.int64]
) -> None:
    """Add the pages present at virtual pages `vpn` to `end` to `md`, int64[NR_NUMA_STATS + nr_nodes]."""
    root = vmas[vma].root
    while vpn < end:
        at = walk_leaf(pt, root, vpn)
        if at < 0:
            vpn = (vpn | (HPAGE_PMD_NR - 1)) + 1
            continue
        entry = pt[at]
        after = next_leaf(entry, vpn)
        if entry & _PAGE_PRESENT:
            head = compound_head(pages, leaf_pfn(entry, vpn))
            flags = pages[head].flags
            nr = min(after, end) - vpn
            md[PAGES] += nr
            md[ANON] += nr if flags & PG_anon else 0
            md[DIRTY] += nr if entry & _PAGE_DIRTY or flags & PG_dirty else 0
            md[ACTIVE] += nr if flags & (PG_active | PG_unevictable) else 0
            md[MAPCOUNT_MAX] = max(md[MAPCOUNT_MAX], folio_average_page_mapcount(pages, head))
            md[NR_NUMA_STATS + zones[pages[head].zone].node] += nr
        vpn = after


@njit
def _pagemap_entry(pages: Pages, pt: PageTables, root: int, vpn: int, entry: int) -> int:
    """pte_to_pagemap_entry() of a leaf that maps something."""
    pfn = leaf_pfn(entry, vpn)
    head = compound_head(pages, pfn)
    out = _ZERO if pages[head].flags & PG_anon else PM_FILE
    if entry & _PAGE_PRESENT:
        out |= PM_PRESENT | u64(pfn)
        if folio_mapped_exclusively(pages, pt, root, vpn, pfn):
            out |= PM_MMAP_EXCLUSIVE
    else:
        kind = _SWP_MIGRATION_WRITE if entry & _PAGE_RW else _SWP_MIGRATION_READ
        out |= PM_SWAP | u64((pfn << _MAX_SWAPFILES_SHIFT) | kind)
    return out  # type: ignore[no-any-return]


@njit
def pagemap_read(pages: Pages, pt: PageTables, root: int, first: int, out: NDArray[np.uint64]) -> None:
    """Entries of the virtual pages from `first` on."""
    i = 0
    while i < len(out):
        vpn = first + i
        at = walk_leaf(pt, root, vpn)
        if at < 0:
            end = min((vpn | (HPAGE_PMD_NR - 1)) + 1 - first, len(out))
            while i < end:
                out[i] = _ZERO
                i += 1
            continue
        entry = pt[at]
        out[i] = _pagemap_entry(pages, pt, root, vpn, entry) if entry & _MAPS else _ZERO
        i += 1


@njit
def clear_refs(pages: Pages, vmas: Vmas, pt: PageTables, vma: int, vpn: int, end: int) -> None:
    """Forget that the pages at `vpn` to `end` were accessed. The caller flushes the TLBs."""
    root = vmas[vma].root
    while vpn < end:
        at = walk_leaf(pt, root, vpn)
        if at < 0:
            vpn = (vpn | (HPAGE_PMD_NR - 1)) + 1
            continue
        entry = pt[at]
        if entry & _PAGE_PRESENT:
            pt[at] = entry & ~_PAGE_ACCESSED
            pages[compound_head(pages, leaf_pfn(entry, vpn))].flags &= ~PG_referenced
        vpn = next_leaf(entry, vpn)


@njit
def nr_page_tables(pt: PageTables, root: int) -> int:
    """Table frames of an mm below its top level, spare ones of huge mappings included (mm_pgtables_bytes)."""
    nr = 0
    for i in range(root * PTRS_PER_PT, (root + 1) * PTRS_PER_PT):
        if pt[i] & _PAGE_PRESENT == _ZERO:
            continue
        nr += 1
        pud = pte_pfn(pt[i])
        for j in range(pud * PTRS_PER_PT, (pud + 1) * PTRS_PER_PT):
            if pt[j] & _PAGE_PRESENT == _ZERO:
                continue
            nr += 1
            pmd = pte_pfn(pt[j])
            for k in range(pmd * PTRS_PER_PT, (pmd + 1) * PTRS_PER_PT):
                nr += i64(pt[k] & (_PAGE_PRESENT | _PAGE_PSE) != _ZERO)
    return nr
