# SPDX-License-Identifier: GPL-2.0-only
"""An emulated machine's memory made from a real one's (hostimage.py).

Every frame keeps its place: free blocks are linked exactly as they were cut from kpageflags (none merges, so
/proc/buddyinfo comes out equal), kernel pages (slab, page tables, reserved, unowned) stay where they are and never
move, anonymous and file pages go onto the LRU list their flags name.

Who maps them: where the capture has pagemaps, processes with the same VMAs and the same virtual pages. Otherwise
synthetic processes named import-N: an anonymous or file page that was mapped m times is mapped, at one virtual
address, by the first m of them, as if they had been forked from one another.

A real page table is not readable, so the emulated tables use the frames that held real ones (PG_table), then frames of
unowned kernel pages: nothing is allocated, the free lists stay as captured. Compound pages (THP) keep their place, are
mapped by nobody and stay where they are. Contents are stamps; kernel pages get one too, which debug_vm uses to find a
device that overwrites what it must not touch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, fill_page, page_holds, stamp_of
from kernelsim.filemap import File
from kernelsim.hostimage import HostImage, HostTask
from kernelsim.jit import njit
from kernelsim.lruvec import lruvec_add_folio
from kernelsim.mm_types import Vm
from kernelsim.mmap import MMAP_BASE_VPN, Mm, Vma
from kernelsim.mmzone import Mem, Nodes, Zones, zone_names
from kernelsim.page import (
    PG_anon,
    PG_buddy,
    PG_head,
    PG_huge,
    PG_lru,
    PG_mlocked,
    PG_nopage,
    PG_private,
    PG_reserved,
    PG_slab,
    PG_swapbacked,
    PG_table,
    PG_tail,
    PG_unevictable,
    PG_writeback,
    Pages,
)
from kernelsim.page_alloc import add_to_free_list
from kernelsim.pgtable import PTRS_PER_PT, PageTables
from kernelsim.pgtable import _PAGE_PRESENT as PRESENT
from kernelsim.pgtable import _PAGE_TABLE as TABLE
from kernelsim.pgtable import mk_pte, pte_pfn
from kernelsim.rmap import Mms, Vmas, add_rmap

MAX_SYNTHETIC = 16  # processes that share imported pages; higher mapcounts are cut to this
_PTE_BITS = 0x25  # present, user, accessed; shared pages are read-only, so the first write after import faults
_PTE_WRITABLE = 0x67


def import_mem(image: HostImage, distance: NDArray[np.int64]) -> Mem:
    """Zones, pageblocks, free lists and page states as captured; nothing is mapped or on an LRU list yet."""
    spans = [(zone.node, zone_names.index(zone.name), zone.start_pfn, zone.end_pfn) for zone in image.zones]
    mem = Mem(spans, distance)
    nr = mem.nr_pages
    mem.blocks[: len(image.block_migratetype)] = image.block_migratetype[: len(mem.blocks)]
    _import_states(mem.pages, image.flags[:nr], image.compound_order[:nr])
    _link_free_blocks(mem, image)
    mem.zones["present"] = [zone.present for zone in image.zones]
    mem.zones["managed"] = [zone.managed for zone in image.zones]
    mem.setup_watermarks()
    for record, zone in zip(mem.zones, image.zones, strict=True):
        record["watermark"] = [zone.min, zone.low, zone.high, zone.promo]
    mem.nodes["nr_page_table_pages"] = _count_by_node(mem, PG_table)
    mem.nodes["nr_hugetlb"] = _count_by_node(mem, PG_huge)
    return mem


def _count_by_node(mem: Mem, flag: int) -> NDArray[np.int64]:
    pages = mem.pages[: mem.nr_pages]
    found = pages["zone"][pages["flags"] & np.uint32(flag) != 0]
    return np.bincount(mem.zones["node"][found], minlength=mem.nr_nodes)


@njit
def _import_states(pages: Pages, flags: NDArray[np.uint32], compound_order: NDArray[np.uint8]) -> None:
    """Flags and references of every frame that is in use; free ones are left cleared, holes as they are."""
    for pfn in range(len(flags)):
        state = flags[pfn]
        if state & PG_nopage:
            continue
        if state & PG_buddy:
            pages[pfn].flags = 0
            continue
        if state & PG_tail:
            state &= ~PG_lru  # a tail is on no list of its own
        pages[pfn].flags = state & ~(PG_lru | PG_mlocked | PG_unevictable)
        pages[pfn].refcount = 0 if state & PG_tail else 1
        if state & PG_head:
            pages[pfn].order = compound_order[pfn]


@njit
def _add_blocks(
    pages: Pages, zones: Zones, blocks: NDArray[np.uint8], pfns: NDArray[np.int64], orders: NDArray[np.uint8]
) -> None:
    for i in range(len(pfns) - 1, -1, -1):  # each goes to the front: the lowest address ends up first
        add_to_free_list(pages, zones, blocks, pfns[i], orders[i])


def _link_free_blocks(mem: Mem, image: HostImage) -> None:
    _add_blocks(mem.pages, mem.zones, mem.blocks, image.free_pfn, image.free_order)


class KernelStamps:
    """Frames that belong to the kernel, and what they held at import."""

    def __init__(self, vm: Vm, pfns: NDArray[np.int64]) -> None:
        self._pfns = pfns
        _stamp_pages(vm.memory, pfns, 1 << 48)

    def first_bad(self, memory: Memory) -> int:
        """The first of them that was overwritten, or -1."""
        return _first_overwritten(memory, self._pfns, 1 << 48)


@njit
def _stamp_pages(memory: Memory, pfns: NDArray[np.int64], sequence: int) -> None:
    for pfn in pfns:
        fill_page(memory, pfn, stamp_of(sequence + pfn))


@njit
def _first_overwritten(memory: Memory, pfns: NDArray[np.int64], sequence: int) -> int:
    for pfn in pfns:
        if not page_holds(memory, pfn, stamp_of(sequence + pfn)):
            return int(pfn)
    return -1


@njit
def _classify(
    pages: Pages, flags: NDArray[np.uint32], mapcount: NDArray[np.int32], kinds: NDArray[np.uint8]
) -> None:
    """0 not in use, 1 kernel, 2 anonymous, 3 file, 4 compound, 5 page table, 6 unowned kernel page."""
    for pfn in range(len(flags)):
        state = flags[pfn]
        if state & (PG_nopage | PG_buddy):
            kinds[pfn] = 0
        elif state & (PG_head | PG_tail | PG_huge):
            kinds[pfn] = 4
        elif state & PG_table:
            kinds[pfn] = 5
        elif state & (PG_slab | PG_reserved):
            kinds[pfn] = 1
        elif state & PG_lru or mapcount[pfn] > 0:
            kinds[pfn] = 2 if state & PG_anon else 3
        else:
            kinds[pfn] = 6 if state == 0 else 1


class HostImporter:
    """Gives the imported pages owners. Built once, by `import_processes`."""

    def __init__(self, vm: Vm, image: HostImage) -> None:
        self.vm = vm
        self.image = image
        nr = vm.mem.nr_pages
        self.flags = image.flags[:nr]
        self.mapcount = image.mapcount[:nr]
        self.kinds = np.empty(nr, dtype=np.uint8)
        _classify(vm.mem.pages, self.flags, self.mapcount, self.kinds)
        tables = np.flatnonzero(self.kinds == 5)
        unowned = np.setdiff1d(np.flatnonzero(self.kinds == 6), image.pcp_pfn, assume_unique=True)
        self.frames = np.concatenate([tables, unowned])
        self.nr_tables = len(tables)
        self.used = np.zeros(1, dtype=np.int64)

    def root(self) -> int:
        """A frame for a top-level table."""
        pfn = int(_take_table(self.vm.mem.pages, self.vm.pt, self.frames, self.used))
        if pfn < 0:
            raise ValueError("the capture has too few kernel pages to hold the page tables of its processes")
        return pfn

    def lru(self) -> None:
        """Put every LRU page, compound heads included, on its list."""
        mem = self.vm.mem
        _import_lru(mem.pages, mem.zones, mem.nodes, self.flags, self.kinds)

    def finish(self) -> None:
        """Account for the tables taken, stamp what belongs to the kernel."""
        vm, mem = self.vm, self.vm.mem
        used = int(self.used[0])
        extra = self.frames[self.nr_tables : used]
        mem.nodes["nr_page_table_pages"] += np.bincount(
            mem.zones["node"][mem.pages["zone"][extra]], minlength=mem.nr_nodes
        )
        vm.foreign_tables = max(self.nr_tables - used, 0)
        kernel = np.flatnonzero((self.kinds == 1) | (self.kinds == 4) | (self.kinds == 5) | (self.kinds == 6))
        vm.kernel_stamps = KernelStamps(vm, np.setdiff1d(kernel, self.frames[:used], assume_unique=True))


@njit
def _take_table(pages: Pages, pt: PageTables, frames: NDArray[np.int64], used: NDArray[np.int64]) -> int:
    if used[0] >= len(frames):
        return -1
    pfn = frames[used[0]]
    used[0] += 1
    pages[pfn].flags = PG_table
    for i in range(pfn * PTRS_PER_PT, (pfn + 1) * PTRS_PER_PT):
        pt[i] = 0
    return int(pfn)


@njit
def _import_lru(
    pages: Pages, zones: Zones, nodes: Nodes, flags: NDArray[np.uint32], kinds: NDArray[np.uint8]
) -> None:
    for pfn in range(len(flags)):
        kind = kinds[pfn]
        if kind == 2:
            pages[pfn].flags |= PG_swapbacked
        if kind == 2 or kind == 3 or (kind == 4 and flags[pfn] & PG_lru and flags[pfn] & PG_head):
            # where mlocked is not known by a VMA, unevictable is kept without it
            pages[pfn].flags |= flags[pfn] & PG_unevictable
            pages[pfn].flags &= ~PG_writeback
            lruvec_add_folio(pages, zones, nodes, pfn)


@njit
def _import_ptes(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    mms: Mms,
    pt: PageTables,
    frames: NDArray[np.int64],
    used: NDArray[np.int64],
    vma: int,
    vpns: NDArray[np.int64],
    pfns: NDArray[np.int64],
) -> int:
    """Map pages at virtual pages of one VMA; returns how many before the frames for tables ran out."""
    for i in range(len(vpns)):
        table = vmas[vma].root
        for shift in (27, 18, 9):
            at = table * PTRS_PER_PT + ((vpns[i] >> shift) & 511)
            if pt[at] & PRESENT == np.uint64(0):
                below = _take_table(pages, pt, frames, used)
                if below < 0:
                    return i
                pt[at] = mk_pte(below, TABLE)
            table = pte_pfn(pt[at])
        pfn = pfns[i]
        pt[table * PTRS_PER_PT + (vpns[i] & 511)] = mk_pte(pfn, _PTE_BITS)
        add_rmap(pages, zones, nodes, pfn)
        if pages[pfn].flags & PG_anon:
            mms[vmas[vma].mm].rss_anon += 1
        else:
            mms[vmas[vma].mm].rss_file += 1
    return len(vpns)


@njit
def _own_pages(
    pages: Pages, pfns: NDArray[np.int64], mapping: int, indexes: NDArray[np.int64], references: int
) -> None:
    """Make an rmap object the owner of imported pages, each with so many references beside its mappings'."""
    for i in range(len(pfns)):
        pages[pfns[i]].mapping = mapping
        pages[pfns[i]].index = indexes[i]
        pages[pfns[i]].refcount = references + (pages[pfns[i]].flags & PG_private != 0)


@njit
def _write_stamps(memory: Memory, pfns: NDArray[np.int64], stamps: NDArray[np.uint64]) -> None:
    for i in range(len(pfns)):
        fill_page(memory, pfns[i], stamps[i])


@njit
def _new_stamps(nr: int, sequence: int) -> NDArray[np.uint64]:
    stamps = np.empty(nr, dtype=np.uint64)
    for i in range(nr):
        stamps[i] = stamp_of(sequence + i)
    return stamps
