# SPDX-License-Identifier: GPL-2.0-only
"""Owners for the pages of an imported machine.

Where the capture has pagemaps: processes with the same VMAs and the same virtual pages. Which file a mapping belongs to
is not in a pagemap; a file here is what the first process that maps it has mapped, and the same pages seen in another
process are the same file. Otherwise synthetic processes named import-N: an anonymous or file page that was mapped m
times is mapped, at one virtual address, by the first m of them, as if they had been forked from one another.

A real page table is not readable, so the emulated tables use the frames that held real ones (PG_table), then frames of
unowned kernel pages: nothing is allocated, the free lists stay as captured.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, fill_page, new_stamps
from kernelsim.filemap import File
from kernelsim.hostimage import HostImage, HostTask
from kernelsim.hostmem import (
    USE_ANON,
    USE_COMPOUND,
    USE_FILE,
    USE_KERNEL,
    USE_TABLE,
    USE_UNOWNED,
    KernelStamps,
    classify,
    import_lru,
)
from kernelsim.jit import njit
from kernelsim.mm_types import Vm
from kernelsim.mmap import MMAP_BASE_VPN, Mm, Vma
from kernelsim.mmzone import Nodes, Zones
from kernelsim.page import (
    GUP_PIN_BIAS,
    Pages,
    PG_anon,
    PG_private,
    PG_table,
)
from kernelsim.pgtable import _PAGE_PRESENT as PRESENT
from kernelsim.pgtable import _PAGE_TABLE as TABLE
from kernelsim.pgtable import PTRS_PER_PT, PageTables, mk_pte, pte_pfn
from kernelsim.rmap import Mms, Vmas, add_rmap

MAX_SYNTHETIC = 16  # processes that share imported pages; higher mapcounts are cut to this
_PTE_BITS = 0x25  # present, user, accessed; shared pages are read-only, so the first write after import faults


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


class HostImporter:
    """Gives the imported pages owners. Built once, by `import_processes`."""

    def __init__(self, vm: Vm, image: HostImage) -> None:
        self.vm = vm
        self.image = image
        nr = vm.mem.nr_pages
        self.flags = image.flags[:nr]
        self.mapcount = image.mapcount[:nr]
        self.kinds = np.empty(nr, dtype=np.uint8)
        classify(vm.mem.pages, self.flags, self.mapcount, self.kinds)
        tables = np.flatnonzero(self.kinds == USE_TABLE)
        unowned = np.setdiff1d(np.flatnonzero(self.kinds == USE_UNOWNED), image.pcp_pfn, assume_unique=True)
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
        import_lru(mem.pages, mem.zones, mem.nodes, self.flags, self.kinds)

    # Captured processes.

    def task(self, task: HostTask) -> Mm:
        """A process as captured. Each of its VMAs is private here: nobody runs in it."""
        mm = Mm(self.vm, root=self.root())
        order = np.argsort(task.vpn, kind="stable")
        vpns, pfns = task.vpn[order], task.pfn[order]
        for start, end, _flags in task.vmas:
            lo, hi = np.searchsorted(vpns, (start, end))
            single = (self.kinds[pfns[lo:hi]] == USE_ANON) | (self.kinds[pfns[lo:hi]] == USE_FILE)
            if single.any():
                self._task_vma(mm, start, end, vpns[lo:hi][single], pfns[lo:hi][single])
        return mm

    def _task_vma(self, mm: Mm, start: int, end: int, vpns: NDArray[np.int64], pfns: NDArray[np.int64]) -> None:
        vma = mm.mmap(end - start, start=start)
        pages = self.vm.mem.pages
        anon = self.kinds[pfns] == USE_ANON
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
        fresh = (mem.pages["mapcount"][pfns] == 0) & (self.kinds[pfns] == USE_ANON)
        _write_stamps(vm.memory, pfns[fresh], new_stamps(int(fresh.sum()), vm.sequence + 1))
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
        anon = np.flatnonzero(free_agent & (self.kinds == USE_ANON) & (self.mapcount > 0))
        cached = np.flatnonzero(free_agent & (self.kinds == USE_FILE))
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
        """Account for the tables taken, stamp what belongs to the kernel, take the references of who holds pages."""
        vm, mem = self.vm, self.vm.mem
        used = int(self.used[0])
        extra = self.frames[self.nr_tables : used]
        mem.nodes["nr_page_table_pages"] += np.bincount(
            mem.zones["node"][mem.pages["zone"][extra]], minlength=mem.nr_nodes
        )
        vm.foreign_tables = max(self.nr_tables - used, 0)
        kernel = np.isin(self.kinds, (USE_KERNEL, USE_COMPOUND, USE_TABLE, USE_UNOWNED))
        kernel[self.frames[:used]] = False
        kernel[self.image.pcp_pfn] = False
        vm.kernel_stamps = KernelStamps(vm, np.flatnonzero(kernel))
        mem.pages["refcount"][self.image.pinned_pfn] += GUP_PIN_BIAS


def import_processes(vm: Vm, image: HostImage) -> list[tuple[str, Mm]]:
    """Give every imported page an owner; returns the processes, captured ones first, as (name, mm)."""
    importer = HostImporter(vm, image)
    importer.lru()
    processes = [(f"{task.comm}-{task.pid}", importer.task(task)) for task in image.mappings]
    processes += importer.synthetic()
    importer.finish()
    return processes
