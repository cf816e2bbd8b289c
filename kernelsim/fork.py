# SPDX-License-Identifier: GPL-2.0-only
"""fork: a child that shares everything until one of the two writes (dup_mmap, anon_vma_fork)."""

from kernelsim.memory import copy_page_range
from kernelsim.mm_types import LongOp
from kernelsim.mmap import SLICE_PAGES, Mm, Vma, wait_in_flight
from kernelsim.operation import Operation, complete
from kernelsim.rmap import VM_LOCKED
from kernelsim.tlb import flush_tlb_mm


def dup_mm(parent: Mm, cpu: int) -> Operation[Mm]:
    """Fork: returns the child's mm. Out of memory, or an interruption, leaves no child behind.

    No batch is in flight meanwhile, so that the child can be taken down at any time without waiting.
    """
    vm = parent.vm
    yield from wait_in_flight(vm)
    vm.nr_forks += 1
    try:
        child = Mm(vm, parent.node, cpu)
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
    copy = Vma(child, vma.start, vma.nr_pages, vma.file)
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
        if error:
            raise OSError(-error, "fork")
        yield None
