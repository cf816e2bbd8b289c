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
from kernelsim.jit import njit, njit_alloc
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
        pages[pfn].refcount = 0 if state & PG_tail else 1 + (state & PG_private != 0)
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
def _classify(pages: Pages, flags: NDArray[np.uint32], mapcount: NDArray[np.int32], kinds: NDArray[np.uint8]) -> None:
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
        self.nr_unmapped = 0  # captured mappings that fit no file layout
        self._files: dict[int, File] = {}

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

    # Captured processes.

    def task(self, task: HostTask) -> Mm:
        """A process as captured. Each of its VMAs is private here: nobody runs in it."""
        mm = Mm(self.vm, root=self.root())
        order = np.argsort(task.vpn, kind="stable")
        vpns, pfns = task.vpn[order], task.pfn[order]
        for start, end, _flags in task.vmas:
            lo, hi = np.searchsorted(vpns, (start, end))
            single = (self.kinds[pfns[lo:hi]] == 2) | (self.kinds[pfns[lo:hi]] == 3)
            if single.any():
                self._task_vma(mm, start, end, vpns[lo:hi][single], pfns[lo:hi][single])
        return mm

    def _task_vma(self, mm: Mm, start: int, end: int, vpns: NDArray[np.int64], pfns: NDArray[np.int64]) -> None:
        vma = mm.mmap(end - start, start=start)
        pages = self.vm.mem.pages
        anon = self.kinds[pfns] == 2
        file = self._file_of(start, vpns, pfns, ~anon) if not anon.all() else None
        pgoff = file[1] if file else start & 0xFFFFFFFF
        self.vm.vmas["pgoff"][vma.id] = pgoff
        indexes = vpns - start + pgoff
        new = anon & (pages["mapping"][pfns] == 0) & (indexes >= 0)
        _own_pages(pages, pfns[new], vma.chains[0], indexes[new], 0)
        if file:
            self._adopt(file[0], pfns, indexes, ~anon & (pages["mapping"][pfns] == 0))
        fits = (pages["index"][pfns] == indexes) & (pages["mapping"][pfns] != 0)
        for mapping in np.unique(pages["mapping"][pfns[fits]]):
            if mapping not in vma.chains:
                vma.join(int(mapping))
        self._map(vma, vpns[fits], pfns[fits])
        self.nr_unmapped += int(np.count_nonzero(~fits))

    def _file_of(
        self, start: int, vpns: NDArray[np.int64], pfns: NDArray[np.int64], backed: NDArray[np.bool_]
    ) -> tuple[File, int]:
        """The file behind a VMA and its pgoff there: that of a page seen before in another process, or a new one."""
        pages = self.vm.mem.pages
        known = np.flatnonzero(backed & (pages["mapping"][pfns] != 0))
        if len(known):
            first = known[0]
            file = self._files[int(pages["mapping"][pfns[first]])]
            return file, start + int(pages["index"][pfns[first]]) - int(vpns[first])
        file = File(self.vm, int(vpns[-1] - vpns[0]) + 1)
        self._files[file.mapping] = file
        return file, start - int(vpns[0])

    def _adopt(self, file: File, pfns: NDArray[np.int64], indexes: NDArray[np.int64], new: NDArray[np.bool_]) -> None:
        """Enter pages nobody owns yet into a file's page cache, where there is room at their index."""
        new = new & (indexes >= 0) & (indexes < file.nr_pages)
        new[new] = self.vm.i_pages[file.i_base + indexes[new]] < 0
        self._cache(file, pfns[new], indexes[new])

    def _cache(self, file: File, pfns: NDArray[np.int64], indexes: NDArray[np.int64]) -> None:
        mem = self.vm.mem
        self.vm.i_pages[file.i_base + indexes] = pfns
        _own_pages(mem.pages, pfns, file.mapping, indexes, 1)
        _write_stamps(self.vm.memory, pfns, file.disk[indexes])
        nodes = mem.zones["node"][mem.pages["zone"][pfns]]
        mem.nodes["nr_file_pages"] += np.bincount(nodes, minlength=mem.nr_nodes)

    def _map(self, vma: Vma, vpns: NDArray[np.int64], pfns: NDArray[np.int64]) -> None:
        """Map pages, and let the process know what is in them: a page nobody mapped before gets its stamp now."""
        vm, mem = self.vm, self.vm.mem
        fresh = (mem.pages["mapcount"][pfns] == 0) & (self.kinds[pfns] == 2)
        _write_stamps(vm.memory, pfns[fresh], _new_stamps(int(fresh.sum()), vm.sequence + 1))
        vm.sequence += int(fresh.sum())
        nr = _import_ptes(
            mem.pages, mem.zones, mem.nodes, vm.vmas, vm.mms, vm.pt, self.frames, self.used, vma.id, vpns, pfns
        )
        if nr < len(vpns):
            raise ValueError("the capture has too few kernel pages to hold the page tables of its processes")
        vma.wrote[vpns - vma.start] = vm.memory[pfns, 0]

    # Pages whose processes were not captured.

    def synthetic(self) -> list[tuple[str, Mm]]:
        """Processes import-0, import-1, ... that map every other anonymous page and mapped file page."""
        pages = self.vm.mem.pages
        free_agent = pages["mapping"][: self.vm.mem.nr_pages] == 0
        anon = np.flatnonzero(free_agent & (self.kinds == 2) & (self.mapcount > 0))
        cached = np.flatnonzero(free_agent & (self.kinds == 3))
        file = self._synthetic_file(cached)
        mapped = cached[self.mapcount[cached] > 0]
        most = max(self.mapcount[anon].max(initial=0), self.mapcount[mapped].max(initial=0))
        mms = [Mm(self.vm, root=self.root()) for _ in range(min(int(most), MAX_SYNTHETIC))]
        self._share_out(mms, anon, None)
        if file is not None:
            self._share_out(mms, mapped, file)
        return [(f"import-{number}", mm) for number, mm in enumerate(mms)]

    def _synthetic_file(self, pfns: NDArray[np.int64]) -> File | None:
        """One file for all page-cache pages without one, mapped pages first."""
        if not len(pfns):
            return None
        file = File(self.vm, len(pfns))
        order = np.argsort(self.mapcount[pfns] == 0, kind="stable")
        self._cache(file, pfns[order], np.arange(len(pfns)))
        return file

    def _share_out(self, mms: list[Mm], pfns: NDArray[np.int64], file: File | None) -> None:
        """Map the pages at consecutive addresses: a page with mapcount m in the first m processes."""
        if not len(pfns):
            return
        owner = 0
        for number, mm in enumerate(mms):
            mine = self.mapcount[pfns] > number
            vma = mm.mmap(len(pfns), start=MMAP_BASE_VPN - (1 << 30 if file else 0))
            if file is not None:
                vma.join(file.mapping)
            elif number == 0:
                owner = vma.chains[0]
                _own_pages(self.vm.mem.pages, pfns, owner, np.arange(len(pfns)), 0)
            else:
                vma.join(owner)
            self._map(vma, vma.vpns()[mine], pfns[mine])

    def finish(self) -> None:
        """Account for the tables taken, stamp what belongs to the kernel."""
        vm, mem = self.vm, self.vm.mem
        used = int(self.used[0])
        extra = self.frames[self.nr_tables : used]
        mem.nodes["nr_page_table_pages"] += np.bincount(
            mem.zones["node"][mem.pages["zone"][extra]], minlength=mem.nr_nodes
        )
        vm.foreign_tables = max(self.nr_tables - used, 0)
        kernel = np.isin(self.kinds, (1, 4, 5, 6))
        kernel[self.frames[:used]] = False
        kernel[self.image.pcp_pfn] = False
        vm.kernel_stamps = KernelStamps(vm, np.flatnonzero(kernel))
        mem.pcp_pfns = self.image.pcp_pfn


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
def _import_lru(pages: Pages, zones: Zones, nodes: Nodes, flags: NDArray[np.uint32], kinds: NDArray[np.uint8]) -> None:
    for pfn in range(len(flags)):
        kind = kinds[pfn]
        if kind == 2:
            pages[pfn].flags |= PG_swapbacked
        if kind == 2 or kind == 3 or (kind == 4 and flags[pfn] & PG_lru and flags[pfn] & PG_head):
            pages[pfn].flags |= flags[pfn] & (PG_unevictable | PG_mlocked)
            pages[pfn].flags &= ~PG_writeback
            if flags[pfn] & PG_mlocked:
                pages[pfn].mlock_count = 1
                zones[pages[pfn].zone].nr_mlock += 1
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


@njit_alloc
def _new_stamps(nr: int, sequence: int) -> NDArray[np.uint64]:
    stamps = np.empty(nr, dtype=np.uint64)
    for i in range(nr):
        stamps[i] = stamp_of(sequence + i)
    return stamps


def import_processes(vm: Vm, image: HostImage) -> list[tuple[str, Mm]]:
    """Give every imported page an owner; returns the processes, captured ones first, as (name, mm)."""
    importer = HostImporter(vm, image)
    importer.lru()
    processes = [(f"{task.comm}-{task.pid}", importer.task(task)) for task in image.mappings]
    processes += importer.synthetic()
    importer.finish()
    return processes
