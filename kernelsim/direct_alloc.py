# SPDX-License-Identifier: GPL-2.0-only
"""Blocks that a person holds (alloc_configfs.py): what is in them, so that losing or overwriting one shows.

Each block is an unmovable kernel allocation with one reference on its first page, or a compound page (__GFP_COMP). Its
holder writes stamps to its first and its last page, or clears it with __GFP_ZERO, and debug_vm reads that back. Only
the first MAX_WRITTEN blocks that are held at a time are written: who drains a zone to see what happens holds thousands,
and the host would have to find memory for each.
"""

from collections.abc import Iterator

import numpy as np

from kernelsim.content import Memory, fill_page, page_holds, stamp_of
from kernelsim.gfp import _GFP_COMP, _GFP_ZERO
from kernelsim.jit import njit
from kernelsim.mm_types import Vm
from kernelsim.page import PG_buddy, PG_head, PG_held, PG_lru
from kernelsim.page_alloc import free_pages, prep_compound_page


@njit
def _write_block(memory: Memory, pfn: int, nr: int, sequence: int) -> None:
    """The first page gets the stamp of `sequence`, the last that of the next number; sequence 0: all zeros."""
    if sequence:
        fill_page(memory, pfn + nr - 1, stamp_of(sequence + 1))
        fill_page(memory, pfn, stamp_of(sequence))
    else:
        for i in range(nr):
            for word in range(memory.shape[1]):
                memory[pfn + i, word] = np.uint64(0)


@njit
def _first_bad(memory: Memory, pfn: int, nr: int, sequence: int) -> int:
    """The first page of a block that does not hold what its holder wrote, or -1."""
    if sequence:
        if not page_holds(memory, pfn, stamp_of(sequence)):
            return pfn
        if nr > 1 and not page_holds(memory, pfn + nr - 1, stamp_of(sequence + 1)):
            return pfn + nr - 1
    else:
        for i in range(nr):
            for word in range(memory.shape[1]):
                if memory[pfn + i, word] != np.uint64(0):
                    return pfn + i
    return -1


MAX_WRITTEN = 256
_UNWRITTEN = -1


class DirectBlocks:
    """All blocks held in one machine, by first pfn: (order, sequence number of the first stamp)."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._blocks: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first pfn, order) of each, oldest first."""
        return ((pfn, order) for pfn, (order, _) in self._blocks.items())

    def adopt(self, pfn: int, order: int, gfp: int) -> None:
        """A block was allocated: write it."""
        vm = self.vm
        if gfp & _GFP_COMP and order > 0:
            prep_compound_page(vm.mem.pages, pfn, order, 0)
        sequence = 0
        if gfp & _GFP_ZERO == 0:
            sequence = vm.sequence + 1 if len(self._blocks) < MAX_WRITTEN else _UNWRITTEN
            vm.sequence += 2
        if sequence != _UNWRITTEN:
            _write_block(vm.memory, pfn, 1 << order, sequence)
        self._blocks[pfn] = order, sequence

    def free(self, pfn: int) -> None:
        """Give a block back."""
        mem = self.vm.mem
        order, _ = self._blocks.pop(pfn)
        free_pages(mem.pages, mem.zones, mem.blocks, pfn, order)

    def violations(self) -> Iterator[str]:
        """What is wrong with any of them, for debug_vm."""
        pages = self.vm.mem.pages
        for pfn, (order, sequence) in self._blocks.items():
            flags = int(pages["flags"][pfn])
            if flags & ~PG_head or pages["refcount"][pfn] != 1:
                yield f"held block {pfn:#x}: flags {flags:#x}, refcount {pages['refcount'][pfn]}"
            others = pages["flags"][pfn : pfn + (1 << order)]
            if np.any(others & np.uint32(PG_buddy | PG_held | PG_lru)):
                yield f"held block {pfn:#x}: a page of it is free or on the LRU"
            bad = _first_bad(self.vm.memory, pfn, 1 << order, sequence) if sequence != _UNWRITTEN else -1
            if bad >= 0:
                yield f"held block {pfn:#x}: page {bad:#x} was overwritten"
