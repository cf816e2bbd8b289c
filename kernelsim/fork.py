# SPDX-License-Identifier: GPL-2.0-only
"""fork: a child that shares everything until one of the two writes (dup_mmap, anon_vma_fork)."""

import errno

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, copy_page
from kernelsim.huge_memory import copy_huge_pmd
from kernelsim.jit import njit
from kernelsim.memory import do_anonymous_page
from kernelsim.mm_types import LongOp
from kernelsim.mmap import SLICE_PAGES, Mm, Vma, alloc_root
from kernelsim.mmzone import Blocks, Nodes, Zones
from kernelsim.operation import Operation, complete
from kernelsim.page import Pages, PG_dirty, compound_head, folio_maybe_dma_pinned
from kernelsim.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_PRESENT,
    _PAGE_PSE,
    _PAGE_RW,
    HPAGE_PMD_NR,
    PageTables,
    pte_alloc,
    pte_pfn,
    walk_leaf,
)
from kernelsim.rmap import VM_LOCKED, VM_SHARED, Mms, Vmas, add_rmap
from kernelsim.tlb import flush_tlb_mm
from kernelsim.vmstat import Events

EAGAIN = errno.EAGAIN
_ZERO = np.uint64(0)


@njit
def copy_page_range(
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
    parent: int,
    child: int,
    vpn: int,
    end: int,
) -> tuple[int, int]:
    """Give a child's VMA the parent's pages (fork): anonymous ones become read-only in both, shared until written.

    A page that may be pinned is copied at once, so that the parent keeps the pinned one (page_needs_cow_for_dma).
    The caller flushes the parent's TLB entries. Returns (virtual page reached, beyond `end` if a huge page lies across
    it, 0 or -ENOMEM).
    """
    anon = vmas[parent].flags & VM_SHARED == 0
    while vpn < end:
        from_ptep = walk_leaf(pt, vmas[parent].root, vpn)
        if from_ptep < 0 or pt[from_ptep] & _PAGE_PRESENT == _ZERO:
            vpn += 1
            continue
        if pt[from_ptep] & _PAGE_PSE:
            error = copy_huge_pmd(
                pages, zones, blocks, nodes, zonelist, vmas, mms, pt, events, parent, child, vpn, from_ptep
            )
            if error == 0:
                vpn += HPAGE_PMD_NR
            elif error != -EAGAIN:
                return vpn, error
            continue
        to_ptep = pte_alloc(pages, zones, blocks, nodes, zonelist, pt, vmas[child].root, vpn)
        if to_ptep < 0:
            return vpn, to_ptep
        pfn = pte_pfn(pt[from_ptep])
        head = compound_head(pages, pfn)
        if anon and folio_maybe_dma_pinned(pages, head):
            copy = do_anonymous_page(pages, zones, blocks, nodes, zonelist, vmas, mms, pt, events, child, vpn, to_ptep)
            if copy < 0:
                return vpn, copy
            copy_page(memory, copy, pfn)
        else:
            if anon:
                pt[from_ptep] &= ~_PAGE_RW
                pages[head].flags |= PG_dirty if pt[from_ptep] & _PAGE_DIRTY else 0
            pt[to_ptep] = pt[from_ptep] & ~(_PAGE_ACCESSED | _PAGE_DIRTY)
            add_rmap(pages, zones, nodes, head)
            if anon:
                mms[vmas[child].mm].rss_anon += 1
            else:
                mms[vmas[child].mm].rss_file += 1
        vpn += 1
    return vpn, 0


def dup_mm(parent: Mm, cpu: int) -> Operation[Mm]:
    """Fork: returns the child's mm. Out of memory, or an interruption, leaves no child behind.

    No batch is in flight meanwhile, so that the child can be taken down at any time without waiting.
    """
    vm = parent.vm
    yield from vm.wait_in_flight()
    vm.nr_forks += 1
    try:
        root = yield from alloc_root(vm, parent.node, parent.comm)
        child = Mm(vm, parent.node, cpu, root)
        try:
            for vma in list(parent.vma):
                yield from _dup_vma(vma, child)
        except BaseException:
            complete(child.exit())
            raise
    finally:
        vm.nr_forks -= 1
    child.next_vpn = parent.next_vpn
    return child


def _dup_vma(vma: Vma, child: Mm) -> LongOp:
    vm = vma.vm
    if vma.accounted:
        vm.overcommit.vm_enough_memory(vma.nr_pages, vma.mm.total_vm)
    copy = Vma(child, vma.start, vma.nr_pages, vma.file)
    copy.accounted = vma.accounted
    rows = vm.vmas
    rows["flags"][copy.id] = rows["flags"][vma.id] & ~VM_LOCKED
    rows["pgoff"][copy.id] = rows["pgoff"][vma.id]
    if vma.file is None:
        for mapping in vma.chains:
            copy.join(mapping)
        copy.own_mapping(vm.take_mapping(), int(rows["pgoff"][vma.id]))
    else:
        copy.own_mapping(vma.file.mapping, int(rows["pgoff"][vma.id]))
    child.vma.append(copy)
    yield from _copy_pages(vma, copy)


def _copy_pages(vma: Vma, copy: Vma) -> LongOp:
    vm, mem = vma.vm, vma.vm.mem
    vpn = vma.start
    while vpn < vma.end:
        first = vpn - vma.start
        vpn, error = copy_page_range(
            mem.pages, mem.zones, mem.blocks, mem.nodes, copy.mm.zonelist, vm.vmas, vm.mms, vm.pt, vm.events,
            vm.memory, vma.id, copy.id, vpn, min(vpn + 8 * SLICE_PAGES, vma.end),
        )  # fmt: skip
        flush_tlb_mm(vm.tlbs, vm.events, vma.mm.id)
        if vma.file is None:
            copy.wrote[first : vpn - vma.start] = vma.wrote[first : vpn - vma.start]
        if error and not (yield from vm.page_alloc.make_room(copy.mm.node, vma.mm.comm)):
            raise OSError(-error, "fork")
        yield None
