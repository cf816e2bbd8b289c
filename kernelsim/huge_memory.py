# SPDX-License-Identifier: GPL-2.0-only
"""Transparent huge pages: anonymous folios of 2 MiB, mapped by a PMD, and splitting (mm/huge_memory.c).

A first write maps a whole 2 MiB page where the process asked for it (VM_HUGEPAGE and `enabled`), the aligned range lies
in one VMA, and nothing is mapped in it yet. From then on the folio lives as one: one mapping, one LRU entry, one move.

Two things are taken apart, and they are not the same. Splitting a *PMD* replaces one process's huge mapping by 512 PTEs
of the same folio (a part is unmapped, copied on write, or ends at a VMA's border); it needs no memory, thanks to the
deposited table, and cannot fail. Splitting a *folio* makes single pages of it; it fails, -EAGAIN, while anybody holds
it beyond its mappings and the page cache (a pin, an isolation).

A folio of which a part is mapped by nobody any more is split at once, so that the part is free memory again. Linux
queues it and splits it when memory gets short. Where that fails here the folio keeps PG_partially_mapped, and whoever
compacts memory tries again.

Differences from Linux: splitting needs no migration entries (nothing runs in between) and no TLB flush (the modelled
TLBs hold 4 KiB translations, which stay true). Nothing collapses small pages into huge ones (no khugepaged), and there
is no huge zero page: reading what was never written maps nothing.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from kernelsim.attr import Attr, Choice, Kobject, Text
from kernelsim.content import Memory, clear_huge_page
from kernelsim.gfp import (
    _GFP_DIRECT_RECLAIM,
    _GFP_KSWAPD_RECLAIM,
    _GFP_NORETRY,
    _GFP_THISNODE,
    GFP_TRANSHUGE,
    GFP_TRANSHUGE_LIGHT,
)
from kernelsim.jit import njit
from kernelsim.lruvec import lruvec_add_folio, lruvec_del_folio, put_page
from kernelsim.mlock import mlock_folio, munlock_folio
from kernelsim.mm_types import Vm
from kernelsim.mmzone import Blocks, Nodes, Zones
from kernelsim.operation import Operation
from kernelsim.page import (
    GUP_PIN_BIAS,
    PAGE_SIZE,
    Pages,
    PG_anon,
    PG_dirty,
    PG_head,
    PG_lru,
    PG_mlocked,
    PG_partially_mapped,
    PG_private,
    PG_swapbacked,
    PG_thp,
    PG_unevictable,
    PG_uptodate,
    PG_writeback,
    folio_maybe_dma_pinned,
)
from kernelsim.page_alloc import prep_compound_page
from kernelsim.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_FLAGS,
    _PAGE_MIGRATION,
    _PAGE_PRESENT,
    _PAGE_PSE,
    _PAGE_RW,
    _PAGE_TABLE,
    _PAGE_USER,
    HPAGE_PMD_NR,
    HPAGE_PMD_ORDER,
    PTRS_PER_PT,
    PageTables,
    alloc_table,
    free_table,
    leaf_pfn,
    mk_pte,
    next_leaf,
    pgtable_trans_huge_deposit,
    pgtable_trans_huge_withdraw,
    pmd_alloc,
    pte_pfn,
    walk_leaf,
    walk_pmd,
)
from kernelsim.rmap import (
    VM_HUGEPAGE,
    VM_LOCKED,
    VM_WRITE,
    Avcs,
    Mms,
    Vmas,
    add_rmap_pmd,
    folio_span,
    is_mlock_under_way,
    is_partially_mapped,
    mod_entire,
    mod_mapped,
    remove_rmap_pmd,
)
from kernelsim.vmstat import Events

EAGAIN = errno.EAGAIN
EBUSY = errno.EBUSY
EEXIST = errno.EEXIST
_NONE = np.uint64(0)


# Whether, and where the page comes from.


class TransparentHugepage(Kobject):
    """/sys/kernel/mm/transparent_hugepage, as far as it is honoured."""

    enabled = Attr(Choice("always", "madvise", "never"), "madvise", doc="Who gets transparent huge pages.")
    defrag = Attr(
        Choice("always", "defer", "defer+madvise", "madvise", "never"),
        "madvise",
        doc="Whose huge faults reclaim and compact at once (always, madvise), or leave it to kswapd (defer).",
    )
    hpage_pmd_size = Attr(Text(), doc="Bytes of a huge page.")

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        vm.thp_enabled = self.enabled
        vm.thp_defrag = self.defrag

    @enabled.stored
    def _enable(self, _old: str, new: str) -> None:
        self.vm.thp_enabled = new

    @defrag.stored
    def _defrag(self, _old: str, new: str) -> None:
        self.vm.thp_defrag = new

    @hpage_pmd_size.show
    def _size(self) -> str:
        return str(HPAGE_PMD_NR * PAGE_SIZE)


def thp_allowable(vm: Vm, vma: int) -> bool:
    """Faults of this VMA may be met with huge pages (thp_vma_allowable_order)."""
    advised = bool(vm.vmas["flags"][vma] & VM_HUGEPAGE)
    return vm.thp_enabled == "always" or (vm.thp_enabled == "madvise" and advised)


def thp_gfp_mask(defrag: str, advised: bool) -> int:
    """How hard a huge fault tries (vma_thp_gfp_mask): `defrag`, and whether the VMA asked for huge pages."""
    if defrag == "always":
        return GFP_TRANSHUGE | (0 if advised else _GFP_NORETRY)
    if defrag == "defer":
        return GFP_TRANSHUGE_LIGHT | _GFP_KSWAPD_RECLAIM
    if defrag == "defer+madvise":
        return GFP_TRANSHUGE_LIGHT | (_GFP_DIRECT_RECLAIM if advised else _GFP_KSWAPD_RECLAIM)
    if defrag == "madvise":
        return GFP_TRANSHUGE_LIGHT | (_GFP_DIRECT_RECLAIM if advised else 0)
    return GFP_TRANSHUGE_LIGHT


def alloc_anon_thp(vm: Vm, vma: int, nid: int, comm: str) -> Operation[int]:
    """A 2 MiB page for a huge fault, or -ENOMEM (vma_alloc_anon_folio_pmd).

    The home node is only compacted for it (NORETRY); who may reclaim then tries every node for real, others do without
    (alloc_pages_mpol).
    """
    gfp = thp_gfp_mask(vm.thp_defrag, bool(vm.vmas["flags"][vma] & VM_HUGEPAGE))
    pfn = yield from vm.page_alloc.alloc_pages(gfp | _GFP_THISNODE | _GFP_NORETRY, HPAGE_PMD_ORDER, nid, comm)
    if pfn < 0 and gfp & _GFP_DIRECT_RECLAIM:
        pfn = yield from vm.page_alloc.alloc_pages(gfp, HPAGE_PMD_ORDER, nid, comm)
    return pfn


@njit
def thp_suitable(vmas: Vmas, pt: PageTables, vma: int, vpn: int) -> bool:
    """The 2 MiB around a virtual page lie in the VMA, and nothing is mapped there yet (thp_vma_suitable_order)."""
    start = vpn & ~(HPAGE_PMD_NR - 1)
    if start < vmas[vma].start or start + HPAGE_PMD_NR > vmas[vma].end:
        return False
    pmd = walk_pmd(pt, vmas[vma].root, vpn)
    return bool(pmd < 0 or pt[pmd] == _NONE)


# Mapping, copying, unmapping.


@njit
def _map_pmd(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    mms: Mms,
    pt: PageTables,
    events: Events,
    vma: int,
    pmd: int,
    head: int,
) -> None:
    """Install a PMD leaf, writable where the VMA is. A table has been deposited."""
    bits = _PAGE_PRESENT | _PAGE_USER | _PAGE_ACCESSED | _PAGE_PSE
    if vmas[vma].flags & VM_WRITE:
        bits |= _PAGE_RW
    pt[pmd] = mk_pte(head, bits)
    add_rmap_pmd(pages, zones, nodes, head)
    mms[vmas[vma].mm].rss_anon += HPAGE_PMD_NR
    if vmas[vma].flags & VM_LOCKED:
        mlock_folio(pages, zones, nodes, events, head)


@njit
def do_huge_pmd_anonymous_page(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    mms: Mms,
    pt: PageTables,
    events: Events,
    memory: Memory,
    vma: int,
    vpn: int,
    head: int,
) -> int:
    """Map the allocated 2 MiB block at `head`, zeroed, around a virtual page that has nothing yet.

    Returns 0, or without a change -ENOMEM (no page table) or -EEXIST (something is mapped there by now).
    """
    start = vpn & ~(HPAGE_PMD_NR - 1)
    pmd = pmd_alloc(pages, zones, blocks, nodes, zonelist, pt, vmas[vma].root, vpn)
    if pmd < 0:
        return pmd
    if pt[pmd] != _NONE:
        return -EEXIST
    table = alloc_table(pages, zones, blocks, nodes, zonelist, pt)
    if table < 0:
        return table
    pgtable_trans_huge_deposit(pages, pmd, table)
    prep_compound_page(pages, head, HPAGE_PMD_ORDER, PG_thp)
    pages[head].flags |= PG_anon | PG_swapbacked | PG_uptodate
    pages[head].mapping = vmas[vma].mapping
    pages[head].index = start - vmas[vma].start + vmas[vma].pgoff
    clear_huge_page(memory, head, HPAGE_PMD_NR)
    lruvec_add_folio(pages, zones, nodes, head)
    _map_pmd(pages, zones, nodes, vmas, mms, pt, events, vma, pmd, head)
    pages[head].refcount -= 1  # the allocation's reference; the mapping's stays
    events[0].pgfault += 1
    events[0].thp_fault_alloc += 1
    return 0


@njit
def do_huge_pmd_wp_page(
    pages: Pages, zones: Zones, nodes: Nodes, vmas: Vmas, pt: PageTables, events: Events, vma: int, pmd: int
) -> bool:
    """Write to a read-only PMD: True if nobody else maps the folio, which is writable now; else PTEs map it now."""
    page = pages[pte_pfn(pt[pmd])]
    if page.mapcount == 1 and (page.refcount - 1) % GUP_PIN_BIAS == 0:
        pt[pmd] |= _PAGE_RW
        events[0].pgfault += 1
        return True
    split_huge_pmd(pages, zones, nodes, vmas, pt, events, vma, pmd)
    return False


@njit
def copy_huge_pmd(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    zonelist: NDArray[np.int32],
    vmas: Vmas,
    mms: Mms,
    pt: PageTables,
    events: Events,
    parent: int,
    child: int,
    vpn: int,
    from_pmd: int,
) -> int:
    """Share a huge mapping with a child, read-only in both. 0; -ENOMEM; -EAGAIN: it is pinned, and PTEs map it now."""
    head = pte_pfn(pt[from_pmd])
    if folio_maybe_dma_pinned(pages, head):
        split_huge_pmd(pages, zones, nodes, vmas, pt, events, parent, from_pmd)
        return -EAGAIN
    to_pmd = pmd_alloc(pages, zones, blocks, nodes, zonelist, pt, vmas[child].root, vpn)
    if to_pmd < 0:
        return to_pmd
    table = alloc_table(pages, zones, blocks, nodes, zonelist, pt)
    if table < 0:
        return table
    pgtable_trans_huge_deposit(pages, to_pmd, table)
    pt[from_pmd] &= ~_PAGE_RW
    pages[head].flags |= PG_dirty if pt[from_pmd] & _PAGE_DIRTY else 0
    pt[to_pmd] = pt[from_pmd] & ~(_PAGE_ACCESSED | _PAGE_DIRTY)
    add_rmap_pmd(pages, zones, nodes, head)
    mms[vmas[child].mm].rss_anon += HPAGE_PMD_NR
    return 0


@njit
def zap_huge_pmd(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    mms: Mms,
    pt: PageTables,
    events: Events,
    vma: int,
    pmd: int,
) -> None:
    """Take a huge mapping, or its migration entry, down whole. The caller flushes."""
    entry = pt[pmd]
    head = pte_pfn(entry)
    pt[pmd] = 0
    free_table(pages, zones, blocks, nodes, pgtable_trans_huge_withdraw(pages, pmd))
    if pages[head].flags & PG_anon:
        mms[vmas[vma].mm].rss_anon -= HPAGE_PMD_NR
    else:
        mms[vmas[vma].mm].rss_file -= HPAGE_PMD_NR
    if vmas[vma].flags & VM_LOCKED:
        munlock_folio(pages, zones, nodes, events, head)
    if entry & _PAGE_MIGRATION:
        return
    if entry & _PAGE_DIRTY:
        pages[head].flags |= PG_dirty
    remove_rmap_pmd(pages, zones, nodes, head)
    put_page(pages, zones, blocks, nodes, head)


# Splitting.


@njit
def split_huge_pmd(
    pages: Pages, zones: Zones, nodes: Nodes, vmas: Vmas, pt: PageTables, events: Events, vma: int, pmd: int
) -> None:
    """Replace a huge mapping (or its migration entry) by 512 entries of the deposited table."""
    entry = pt[pmd]
    head = pte_pfn(entry)
    table = pgtable_trans_huge_withdraw(pages, pmd)
    bits = entry & _PAGE_FLAGS & ~_PAGE_PSE
    for i in range(HPAGE_PMD_NR):
        pt[table * PTRS_PER_PT + i] = mk_pte(head + i, bits)
    pt[pmd] = mk_pte(table, _PAGE_TABLE)
    if vmas[vma].flags & VM_LOCKED:
        pages[head].mlock_count += HPAGE_PMD_NR - 1
    if entry & _PAGE_PRESENT:
        pages[head].mapcount += HPAGE_PMD_NR - 1
        pages[head].refcount += HPAGE_PMD_NR - 1
        mod_entire(pages, zones, nodes, head, -1)
    events[0].thp_split_pmd += 1


@njit
def why_not_split(pages: Pages, head: int) -> int:
    """0, or the error with which a folio cannot be split now (can_split_folio)."""
    page = pages[head]
    if page.flags & PG_lru == 0:
        return -EAGAIN  # isolated: being moved
    if page.flags & PG_writeback or page.flags & (PG_private | PG_dirty) == PG_private | PG_dirty:
        return -EBUSY  # its buffers cannot be released (filemap_release_folio)
    of_cache = 1 << page.order if page.flags & PG_anon == 0 and page.mapping != 0 else 0
    of_private = 1 if page.flags & PG_private else 0
    return 0 if page.refcount == page.mapcount + of_cache + of_private else -EAGAIN


@njit
def split_folio(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    events: Events,
    head: int,
) -> int:
    """Make single pages of a large folio; those that nobody maps or caches are freed. 0, -EAGAIN or -EBUSY."""
    order = pages[head].order
    error = why_not_split(pages, head)
    if error == 0 and is_mlock_under_way(vmas, avcs, pages[head].mapping):
        error = -EAGAIN  # its pages' lock counts could not be told apart
    if order >= HPAGE_PMD_ORDER:
        events[0].thp_split_page += error == 0
        events[0].thp_split_page_failed += error != 0
    if error:
        return error
    _split_pmds(pages, zones, nodes, vmas, avcs, pt, events, head)
    foreign_mlocks = pages[head].mlock_count  # of an imported folio whose VM_LOCKED mapping was not captured
    lruvec_del_folio(pages, zones, nodes, head)
    if pages[head].mapcount > 0:
        mod_mapped(pages, zones, nodes, head, -1)
    if pages[head].flags & PG_mlocked:
        zones[pages[head].zone].nr_mlock -= 1 << order
    mapping = pages[head].mapping
    index = pages[head].index
    _prep_split_pages(pages, head, order)
    foreign_mlocks -= _count_ptes(pages, vmas, avcs, pt, mapping, index, head, order)
    for pfn in range(head + (1 << order) - 1, head - 1, -1):
        if pages[pfn].mapcount > 0:
            mod_mapped(pages, zones, nodes, pfn, 1)
        pages[pfn].mlock_count += foreign_mlocks
        if pages[pfn].mlock_count > 0:
            zones[pages[pfn].zone].nr_mlock += 1
        elif pages[pfn].flags & PG_mlocked:
            pages[pfn].flags &= ~(PG_mlocked | PG_unevictable)
        lruvec_add_folio(pages, zones, nodes, pfn)
        put_page(pages, zones, blocks, nodes, pfn)
    return 0


@njit
def _split_pmds(
    pages: Pages, zones: Zones, nodes: Nodes, vmas: Vmas, avcs: Avcs, pt: PageTables, events: Events, head: int
) -> None:
    """Have a folio mapped by PTEs everywhere."""
    avc = avcs[pages[head].mapping].next
    while avc != 0 and pages[head].order == HPAGE_PMD_ORDER and pages[head + 1].mapping > 0:
        vma = avcs[avc].vma
        vpn, end, base = folio_span(vmas, vma, pages[head].index, HPAGE_PMD_NR)
        at = walk_leaf(pt, vmas[vma].root, vpn) if vpn == base and end == base + HPAGE_PMD_NR else -1
        if at >= 0 and pt[at] & _PAGE_PSE and pt[at] & _PAGE_PRESENT and pte_pfn(pt[at]) == head:
            split_huge_pmd(pages, zones, nodes, vmas, pt, events, vma, at)
        avc = avcs[avc].next


@njit
def _prep_split_pages(pages: Pages, head: int, order: int) -> None:
    """Give each page of a folio what it had as a part of it, but for its mappings and locks. Buffers are released."""
    flags = pages[head].flags & ~(PG_head | PG_thp | PG_lru | PG_private)
    mapping = pages[head].mapping
    index = pages[head].index
    for i in range(1 << order):
        page = pages[head + i]
        page.flags = flags
        page.mapping = mapping
        page.index = index + i
        page.refcount = 1 if flags & PG_anon == 0 and mapping != 0 else 0
        page.mapcount = 0
        page.mlock_count = 0
        page.order = 0


@njit
def _count_ptes(
    pages: Pages, vmas: Vmas, avcs: Avcs, pt: PageTables, mapping: int, index: int, head: int, order: int
) -> int:
    """Count each page's mappings, locks and references anew from the page tables; returns how many are locked."""
    nr_locked = 0
    avc = avcs[mapping].next
    while avc != 0:
        vma = avcs[avc].vma
        locked = 1 if vmas[vma].flags & VM_LOCKED else 0
        vpn, end, base = folio_span(vmas, vma, index, 1 << order)
        while vpn < end:
            at = walk_leaf(pt, vmas[vma].root, vpn)
            entry = pt[at] if at >= 0 else _NONE
            pfn = head + vpn - base
            if entry & _PAGE_PRESENT and leaf_pfn(entry, vpn) == pfn:
                pages[pfn].mapcount += 1
                pages[pfn].refcount += 1
                pages[pfn].mlock_count += locked
                nr_locked += locked
            vpn = next_leaf(entry, vpn)
        avc = avcs[avc].next
    return nr_locked


@njit
def deferred_split_folio(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    events: Events,
    head: int,
) -> None:
    """After a mapping of one of its pages went: split a folio that is no longer mapped whole, if it can be.

    The first attempt counts, whether it fails or not; later ones are made only once nothing stands in the way.
    """
    if not is_partially_mapped(pages, head):
        return
    if pages[head + 1].flags & PG_partially_mapped == 0:
        pages[head + 1].flags |= PG_partially_mapped
        events[0].thp_deferred_split_page += pages[head].order >= HPAGE_PMD_ORDER
    elif why_not_split(pages, head):
        return
    split_folio(pages, zones, blocks, nodes, vmas, avcs, pt, events, head)
