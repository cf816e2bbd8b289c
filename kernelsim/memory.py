# SPDX-License-Identifier: GPL-2.0-only
"""Page faults, copy-on-write, and taking mappings down (mm/memory.c).

`access_pages` is what a CPU does: look into its TLB, else walk the page table, else fault. It stops, without side
effects for that page, where it cannot go on: -ENOMEM; -EAGAIN at a migration entry or a page-cache page on the move
(the move must end first; Linux puts the task to sleep there); -VM_FAULT_HUGE where a 2 MiB page is due, for the caller
to get one (huge_memory.py).

A page mapped as part of a large folio is addressed by its own pfn; counts and LRU are its head's.

A written page gets the stamp of the next write sequence number, and the writer notes it in `wrote`, which stands for
what the process knows it stored: uint64 per virtual page, 0 where nothing was written. Comparing memory with `wrote`
is an end-to-end check that does not trust any kernel structure.

Differences from Linux: reading an anonymous page that was never written maps nothing (no shared zero page); file
mappings are shared and never written back.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, copy_page, fill_page, page_holds, stamp_of
from kernelsim.huge_memory import (
    deferred_split_folio,
    do_huge_pmd_wp_page,
    split_huge_pmd,
    thp_suitable,
    zap_huge_pmd,
)
from kernelsim.jit import njit
from kernelsim.lruvec import folio_mark_accessed, lruvec_add_folio
from kernelsim.lruvec import put_page as put_page
from kernelsim.mlock import mlock_folio, munlock_folio
from kernelsim.mmzone import MIGRATE_MOVABLE, Blocks, Nodes, Zones
from kernelsim.page import (
    GUP_PIN_BIAS,
    Pages,
    PG_anon,
    PG_dirty,
    PG_isolated,
    PG_ksm,
    PG_swapbacked,
    PG_uptodate,
    compound_head,
)
from kernelsim.page_alloc import get_page_from_freelist
from kernelsim.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_MIGRATION,
    _PAGE_PRESENT,
    _PAGE_PSE,
    _PAGE_RW,
    _PAGE_USER,
    HPAGE_PMD_NR,
    PageTables,
    leaf_pfn,
    mk_pte,
    pte_alloc,
    pte_pfn,
    walk_leaf,
)
from kernelsim.rmap import VM_LOCKED, VM_SHARED, VM_WRITE, Avcs, Mms, Vmas, add_rmap, remove_rmap
from kernelsim.tlb import (
    Tlbs,
    flush_tlb_mm,
    flush_tlb_page,
    tlb_fill,
    tlb_lookup,
    tlb_single_page_flush_ceiling,
)
from kernelsim.vmstat import Events

ENOMEM = errno.ENOMEM
EAGAIN = errno.EAGAIN
VM_FAULT_HUGE = 1 << 16  # no errno: the fault wants a 2 MiB page
_ZERO = np.uint64(0)
_WRITTEN = _PAGE_RW | _PAGE_DIRTY


@njit
def _new_folio(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    flags: int,
    mapping: int,
    index: int,
) -> int:
    """A movable page set up and on the LRU, with one reference that is the caller's to keep; or -ENOMEM."""
    pfn = get_page_from_freelist(pages, zones, blocks, zonelist, 0, MIGRATE_MOVABLE)
    if pfn >= 0:
        pages[pfn].flags = flags | PG_uptodate
        pages[pfn].mapping = mapping
        pages[pfn].index = index
        lruvec_add_folio(pages, zones, nodes, pfn)
    return pfn


@njit
def _map_page(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    mms: Mms,
    pt: PageTables,
    events: Events,
    vma: int,
    ptep: int,
    pfn: int,
) -> None:
    """Install a PTE, writable where the VMA is."""
    bits = _PAGE_PRESENT | _PAGE_USER | _PAGE_ACCESSED
    if vmas[vma].flags & VM_WRITE:
        bits |= _PAGE_RW
    pt[ptep] = mk_pte(pfn, bits)
    add_rmap(pages, zones, nodes, pfn)
    if pages[pfn].flags & PG_anon:
        mms[vmas[vma].mm].rss_anon += 1
    else:
        mms[vmas[vma].mm].rss_file += 1
    if vmas[vma].flags & VM_LOCKED:
        mlock_folio(pages, zones, nodes, events, pfn)


@njit
def do_anonymous_page(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    mms: Mms,
    pt: PageTables,
    events: Events,
    vma: int,
    vpn: int,
    ptep: int,
) -> int:
    """First write to an anonymous page: map a new one. Returns its pfn or -ENOMEM."""
    index = vpn - vmas[vma].start + vmas[vma].pgoff
    flags = PG_anon | PG_swapbacked
    pfn = _new_folio(pages, zones, blocks, nodes, zonelist, flags, vmas[vma].mapping, index)
    if pfn >= 0:
        _map_page(pages, zones, nodes, vmas, mms, pt, events, vma, ptep, pfn)
        pages[pfn].refcount -= 1  # the allocation's reference; the mapping's stays
        events[0].pgfault += 1
    return pfn


@njit
def filemap_fault(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    memory: Memory,
    i_pages: NDArray[np.int64],
    disk: NDArray[np.uint64],
    events: Events,
    mapping: int,
    i_base: int,
    index: int,
) -> int:
    """The page-cache page at `index` of a file, read in from `disk` (stamps) if it is not there; pfn or -ENOMEM.

    -EAGAIN while a batch moves the page: nobody may have mapped it, and then no migration entry says so. Linux waits
    for the page's lock here.
    """
    pfn = i_pages[i_base + index]
    if pfn < 0:
        pfn = _new_folio(pages, zones, blocks, nodes, zonelist, 0, mapping, index)
        if pfn < 0:
            return pfn
        fill_page(memory, pfn, disk[index])
        i_pages[i_base + index] = pfn
        nodes[zones[pages[pfn].zone].node].nr_file_pages += 1
        events[0].pgmajfault += 1
    elif pages[compound_head(pages, pfn)].flags & PG_isolated:
        return -EAGAIN
    events[0].pgfault += 1
    return int(pfn)


@njit
def do_wp_page(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    avcs: Avcs,
    mms: Mms,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    memory: Memory,
    vma: int,
    vpn: int,
    ptep: int,
) -> int:
    """Write to a read-only PTE of a writable VMA: reuse the page if nobody else maps it, else copy. pfn or -ENOMEM.

    A page of a large folio counts as shared while its folio has other mappings, of whichever pages. One that KSM shares
    is never written again.
    """
    old = pte_pfn(pt[ptep])
    head = compound_head(pages, old)
    events[0].pgfault += 1
    # pins do not make a page shared: who pinned it had it made exclusive first (unshare_pages)
    ksm = pages[head].flags & PG_ksm != 0
    exclusive = not ksm and pages[head].mapcount == 1 and (pages[head].refcount - 1) % GUP_PIN_BIAS == 0
    if exclusive or vmas[vma].flags & VM_SHARED:
        pt[ptep] |= _PAGE_RW
        return old
    events[0].cow_ksm += ksm
    index = vpn - vmas[vma].start + vmas[vma].pgoff
    flags = PG_anon | PG_swapbacked
    pfn = _new_folio(pages, zones, blocks, nodes, zonelist, flags, vmas[vma].mapping, index)
    if pfn < 0:
        return pfn
    copy_page(memory, pfn, old)
    zap_pte(pages, zones, nodes, vmas, mms, pt, events, vma, ptep)
    put_page(pages, zones, blocks, nodes, head)
    flush_tlb_page(tlbs, events, vmas[vma].mm, vpn)
    _map_page(pages, zones, nodes, vmas, mms, pt, events, vma, ptep, pfn)
    pages[pfn].refcount -= 1
    if pages[head].order > 0:
        deferred_split_folio(pages, zones, blocks, nodes, vmas, avcs, pt, events, head)
    return pfn


@njit
def zap_pte(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    mms: Mms,
    pt: PageTables,
    events: Events,
    vma: int,
    ptep: int,
) -> int:
    """Take one PTE down; returns the head of what lost a mapping, or -1. The caller flushes and puts the page.

    A migration entry has given up its mapping already: the page being moved is freed when the move ends.
    """
    pte = pt[ptep]
    if pte == _ZERO:
        return -1
    pt[ptep] = 0
    pfn = compound_head(pages, pte_pfn(pte))
    if pages[pfn].flags & PG_anon:
        mms[vmas[vma].mm].rss_anon -= 1
    else:
        mms[vmas[vma].mm].rss_file -= 1
    if vmas[vma].flags & VM_LOCKED:
        munlock_folio(pages, zones, nodes, events, pfn)
    if pte & _PAGE_MIGRATION:
        return -1
    if pte & _PAGE_DIRTY:
        pages[pfn].flags |= PG_dirty
    remove_rmap(pages, zones, nodes, pfn)
    return pfn


@njit
def zap_pages(
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
    vma: int,
    vpns: NDArray[np.int64],
) -> int:
    """Unmap virtual pages, ascending, of one VMA (MADV_DONTNEED); returns how many PTEs and PMDs were taken down."""
    nr = 0
    mm = vmas[vma].mm
    root = vmas[vma].root
    for i in range(len(vpns)):
        vpn = vpns[i]
        ptep = walk_leaf(pt, root, vpn)
        if ptep < 0 or pt[ptep] == _ZERO:
            continue
        nr += 1
        if pt[ptep] & _PAGE_PSE:
            last = i + HPAGE_PMD_NR - 1
            if vpn % HPAGE_PMD_NR == 0 and last < len(vpns) and vpns[last] == vpn + HPAGE_PMD_NR - 1:
                zap_huge_pmd(pages, zones, blocks, nodes, vmas, mms, pt, events, vma, ptep)
                continue
            split_huge_pmd(pages, zones, nodes, vmas, pt, events, vma, ptep)
            ptep = walk_leaf(pt, root, vpn)
        pfn = zap_pte(pages, zones, nodes, vmas, mms, pt, events, vma, ptep)
        if len(vpns) <= tlb_single_page_flush_ceiling:
            flush_tlb_page(tlbs, events, mm, vpn)
        if pfn >= 0:
            put_page(pages, zones, blocks, nodes, pfn)
            if pages[pfn].order > 0:
                deferred_split_folio(pages, zones, blocks, nodes, vmas, avcs, pt, events, pfn)
    if len(vpns) > tlb_single_page_flush_ceiling:
        flush_tlb_mm(tlbs, events, mm)
    return nr


@njit
def _fault(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    avcs: Avcs,
    mms: Mms,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    memory: Memory,
    i_pages: NDArray[np.int64],
    disk: NDArray[np.uint64],
    vma: int,
    vpn: int,
    write: bool,
    huge: bool,
) -> int:
    """Make a virtual page accessible and return its pfn; -ENOMEM, -EAGAIN, -VM_FAULT_HUGE, or -1: nothing to read."""
    root = vmas[vma].root
    file = vmas[vma].flags & VM_SHARED != 0
    if huge and write and not file and thp_suitable(vmas, pt, vma, vpn):
        return -VM_FAULT_HUGE
    if file or write:
        ptep = pte_alloc(pages, zones, blocks, nodes, zonelist, pt, root, vpn)
    else:
        ptep = walk_leaf(pt, root, vpn)
    if ptep < 0:
        return ptep
    pte = pt[ptep]
    if pte & _PAGE_MIGRATION:
        return -EAGAIN
    if pte == _ZERO and file:
        mapping = vmas[vma].mapping
        index = vpn - vmas[vma].start + vmas[vma].pgoff
        base = avcs[mapping].i_base
        pfn = filemap_fault(pages, zones, blocks, nodes, zonelist, memory, i_pages, disk, events, mapping, base, index)
        if pfn < 0:
            return pfn
        _map_page(pages, zones, nodes, vmas, mms, pt, events, vma, ptep, pfn)
    elif pte == _ZERO:
        if not write:
            return -1
        pfn = do_anonymous_page(pages, zones, blocks, nodes, zonelist, vmas, mms, pt, events, vma, vpn, ptep)
    elif write and pte & _PAGE_RW == _ZERO:
        pfn = _wp_fault(
            pages, zones, blocks, nodes, zonelist, vmas, avcs, mms, pt, tlbs, events, memory, vma, vpn, ptep
        )
        ptep = walk_leaf(pt, root, vpn)
    else:
        pfn = leaf_pfn(pte, vpn)
    if pfn >= 0:
        pt[ptep] |= (_PAGE_ACCESSED | _PAGE_DIRTY) if write else _PAGE_ACCESSED
        folio_mark_accessed(pages, zones, nodes, events, compound_head(pages, pfn))
    return pfn


@njit
def _wp_fault(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    avcs: Avcs,
    mms: Mms,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    memory: Memory,
    vma: int,
    vpn: int,
    at: int,
) -> int:
    """Make a read-only leaf writable: a PMD where its folio is this VMA's alone, else the PTE. pfn or -ENOMEM."""
    if pt[at] & _PAGE_PSE:
        if do_huge_pmd_wp_page(pages, zones, nodes, vmas, pt, events, vma, at):
            return leaf_pfn(pt[at], vpn)
        at = walk_leaf(pt, vmas[vma].root, vpn)
    return do_wp_page(pages, zones, blocks, nodes, zonelist, vmas, avcs, mms, pt, tlbs, events, memory, vma, vpn, at)


@njit
def access_pages(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    avcs: Avcs,
    mms: Mms,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    memory: Memory,
    i_pages: NDArray[np.int64],
    wrote: NDArray[np.uint64],
    disk: NDArray[np.uint64],
    cpu: int,
    vma: int,
    vpns: NDArray[np.int64],
    write: bool,
    huge: bool,
    sequence: int,
) -> tuple[int, int, int]:
    """Read or write virtual pages of one VMA on a CPU; a read compares what is there with `wrote`.

    `wrote` and `disk` are indexed by the page's place in the VMA and in the file. Page i of a write gets the stamp of
    sequence + i; `huge`: it may be met with 2 MiB pages. Returns (pages done, reads that differed, 0 or the error that
    stopped it).
    """
    mm = vmas[vma].mm
    start = vmas[vma].start
    bad = 0
    for i in range(len(vpns)):
        vpn = vpns[i]
        pfn = tlb_lookup(tlbs, cpu, mm, vpn, write)
        if pfn < 0:
            pfn = _fault(
                pages, zones, blocks, nodes, zonelist, vmas, avcs, mms, pt, tlbs, events, memory, i_pages, disk,
                vma, vpn, write, huge,
            )  # fmt: skip
            if pfn == -1:
                bad += wrote[vpn - start] != 0
                continue
            if pfn < 0:
                return i, bad, pfn
            pte = pt[walk_leaf(pt, vmas[vma].root, vpn)]
            # a clean or read-only translation must not serve a later write: that one has to walk again
            tlb_fill(tlbs, cpu, mm, vpn, pfn, pte & _WRITTEN == _WRITTEN)
        if write:
            wrote[vpn - start] = stamp_of(sequence + i)
            fill_page(memory, pfn, wrote[vpn - start])
        elif not page_holds(memory, pfn, wrote[vpn - start]):
            bad += 1
    return len(vpns), bad, 0


@njit
def unshare_pages(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    avcs: Avcs,
    mms: Mms,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    memory: Memory,
    vma: int,
    vpns: NDArray[np.int64],
) -> int:
    """Give a VMA pages of its own where it shares anonymous ones, before they are pinned (FAULT_FLAG_UNSHARE).

    Returns 0, or -ENOMEM with some of them done.
    """
    for vpn in vpns:
        at = walk_leaf(pt, vmas[vma].root, vpn)
        if at < 0 or pt[at] & (_PAGE_PRESENT | _PAGE_RW) != _PAGE_PRESENT:
            continue  # an anonymous page mapped writable is nobody else's
        if pages[compound_head(pages, pte_pfn(pt[at]))].flags & PG_anon:
            own = _wp_fault(
                pages, zones, blocks, nodes, zonelist, vmas, avcs, mms, pt, tlbs, events, memory, vma, vpn, at
            )
            if own < 0:
                return own
    return 0
