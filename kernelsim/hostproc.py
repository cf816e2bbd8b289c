# SPDX-License-Identifier: GPL-2.0-only
"""Owners for the pages of an imported machine.

Where the capture has pagemaps: processes with the same VMAs and the same virtual pages. Which file a mapping belongs to
is not in a pagemap; a file here is what the first process that maps it has mapped, and the same pages seen in another
process are the same file. Otherwise synthetic processes named import-N: an anonymous or file page that was mapped m
times is mapped, at one virtual address, by the first m of them, as if they had been forked from one another.

A large folio is mapped page by page as the capture tells, and by a PMD entry where it is 2 MiB and a process maps all
of it, aligned. Synthetic processes have the large ones first, so that each is aligned to its size.

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
    PG_head,
    PG_ksm,
    PG_lru,
    PG_partially_mapped,
    PG_private,
    PG_table,
    PG_tail,
    compound_head,
)
from kernelsim.pgtable import _PAGE_PRESENT as PRESENT
from kernelsim.pgtable import _PAGE_PSE as PSE
from kernelsim.pgtable import _PAGE_TABLE as TABLE
from kernelsim.pgtable import HPAGE_PMD_NR, PTRS_PER_PT, PageTables, mk_pte, pgtable_trans_huge_deposit, pte_pfn
from kernelsim.rmap import Mms, Vmas, add_rmap, add_rmap_pmd, is_partially_mapped
from kernelsim.stable_node import make_ksm

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
    """Map pages at ascending virtual pages of one VMA; returns how many before the frames for tables ran out."""
    i = 0
    while i < len(vpns):
        table = vmas[vma].root
        at = 0
        nr = 1
        head = compound_head(pages, pfns[i])
        for shift in (27, 18, 9):
            at = table * PTRS_PER_PT + ((vpns[i] >> shift) & 511)
            if shift == 9 and pt[at] == np.uint64(0) and _is_whole(pages, vpns, pfns, i):
                nr = HPAGE_PMD_NR
                break
            if pt[at] & PRESENT == np.uint64(0):
                below = _take_table(pages, pt, frames, used)
                if below < 0:
                    return i
                pt[at] = mk_pte(below, TABLE)
            table = pte_pfn(pt[at])
        if nr > 1:
            spare = _take_table(pages, pt, frames, used)
            if spare < 0:
                return i
            pgtable_trans_huge_deposit(pages, at, spare)
            pt[at] = mk_pte(head, np.uint64(_PTE_BITS) | PSE)
            add_rmap_pmd(pages, zones, nodes, head)
        else:
            pt[table * PTRS_PER_PT + (vpns[i] & 511)] = mk_pte(pfns[i], _PTE_BITS)
            add_rmap(pages, zones, nodes, head)
        if pages[head].flags & PG_anon:
            mms[vmas[vma].mm].rss_anon += nr
        else:
            mms[vmas[vma].mm].rss_file += nr
        i += nr
    return len(vpns)


@njit
def _is_whole(pages: Pages, vpns: NDArray[np.int64], pfns: NDArray[np.int64], i: int) -> bool:
    """Entry i and those behind it map all of a 2 MiB folio at an aligned address."""
    if vpns[i] % HPAGE_PMD_NR or i + HPAGE_PMD_NR > len(vpns) or 1 << pages[pfns[i]].order != HPAGE_PMD_NR:
        return False
    for k in range(HPAGE_PMD_NR):
        if vpns[i + k] != vpns[i] + k or pfns[i + k] != pfns[i] + k:
            return False
    return True


@njit
def _own_folios(pages: Pages, heads: NDArray[np.int64], mapping: int, indexes: NDArray[np.int64], cached: bool) -> None:
    """Make an rmap object the owner of imported folios; `cached`: a page cache holds a reference for each page."""
    for i in range(len(heads)):
        page = pages[heads[i]]
        page.mapping = mapping
        page.index = indexes[i]
        page.refcount = (1 << page.order if cached else 0) + (page.flags & PG_private != 0)


@njit
def _note_partially_mapped(pages: Pages, nr_pages: int) -> None:
    """Folios that are mapped in part only are due to be split: the host's would be on its deferred-split queue."""
    for pfn in range(nr_pages):
        if pages[pfn].flags & PG_head and pages[pfn].flags & PG_lru and is_partially_mapped(pages, pfn):
            pages[pfn + 1].flags |= PG_partially_mapped


def _own_ksm_pages(vm: Vm) -> None:
    """Pages that the host's KSM had merged are at one place each here: others that mapped them were not found."""
    pages = vm.mem.pages
    ksm = PG_anon | PG_ksm
    for pfn in np.flatnonzero((pages["flags"] & np.uint32(ksm | PG_tail) == ksm) & (pages["mapping"] != 0)).tolist():
        node = vm.take_mapping()
        mapping, index = make_ksm(pages, vm.avcs, pfn, node)
        vm.link(node, mapping, index)
        vm.avcs["i_base"][mapping] += 1


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
        tails = vm.mem.pages["flags"][:nr] & np.uint32(PG_tail) != 0
        self.heads = np.where(tails, vm.mem.pages["index"][:nr].astype(np.int64), np.arange(nr))
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
            movable = np.isin(self.kinds[self.heads[pfns[lo:hi]]], (USE_ANON, USE_FILE))
            if movable.any():
                self._task_vma(mm, start, end, vpns[lo:hi][movable], pfns[lo:hi][movable])
        return mm

    def _task_vma(self, mm: Mm, start: int, end: int, vpns: NDArray[np.int64], pfns: NDArray[np.int64]) -> None:
        vma = mm.mmap(end - start, start=start, noreserve=True)
        pages = self.vm.mem.pages
        heads = self.heads[pfns]
        begins = vpns - (pfns - heads)  # where the folio begins, or would, outside the VMA perhaps
        anon = self.kinds[heads] == USE_ANON
        file = self._file_of(begins, heads, ~anon) if not anon.all() else None
        pgoff = start - file[1] if file else start & 0xFFFFFFFF
        self.vm.vmas["pgoff"][vma.id] = pgoff
        indexes = begins - start + pgoff
        first = np.unique(heads, return_index=True)[1]  # one page speaks for a folio
        first = first[(pages["mapping"][heads[first]] == 0) & (indexes[first] >= 0)]
        new, new_file = first[anon[first]], first[~anon[first]]
        _own_folios(pages, heads[new], vma.chains[0], indexes[new], False)
        if file:
            self._adopt(file[0], heads[new_file], indexes[new_file])
        fits = (pages["index"][heads] == indexes) & (pages["mapping"][heads] != 0)
        for mapping in np.unique(pages["mapping"][heads[fits]]):
            if mapping not in vma.chains:
                vma.join(int(mapping))
        self._map(vma, vpns[fits], pfns[fits])
        self.nr_unmapped += int(np.count_nonzero(~fits))

    def _file_of(
        self, begins: NDArray[np.int64], heads: NDArray[np.int64], backed: NDArray[np.bool_]
    ) -> tuple[File, int]:
        """The file behind a VMA and the virtual page of its index 0: that of a folio seen before in another process, or
        a new one."""
        pages = self.vm.mem.pages
        known = np.flatnonzero(backed & (pages["mapping"][heads] != 0))
        if len(known):
            first = known[0]
            file = self._files[int(pages["mapping"][heads[first]])]
            return file, int(begins[first]) - int(pages["index"][heads[first]])
        lowest = int(begins.min())
        file = File(self.vm, int((begins + self._sizes(heads)).max()) - lowest)
        self._files[file.mapping] = file
        return file, lowest

    def _sizes(self, heads: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pages of folios."""
        orders: NDArray[np.int64] = self.vm.mem.pages["order"][heads].astype(np.int64)
        return 1 << orders

    def _adopt(self, file: File, heads: NDArray[np.int64], indexes: NDArray[np.int64]) -> None:
        """Enter folios nobody owns yet into a file's page cache, where there is room at their place."""
        large = self._sizes(heads) > 1
        for chosen in (np.flatnonzero(large), np.flatnonzero(~large)):
            pfns, places = self._spread(heads[chosen], indexes[chosen])
            inside = places < file.nr_pages
            taken = np.ones(len(places), dtype=bool)
            taken[inside] = self.vm.i_pages[file.i_base + places[inside]] >= 0
            blocked = np.unique(self.heads[pfns[taken]])
            free = chosen[~np.isin(heads[chosen], blocked)]
            self._cache(file, heads[free], indexes[free])

    def _spread(self, heads: NDArray[np.int64], at: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Every page of the folios, and its place where folio i begins at at[i]."""
        sizes = self._sizes(heads)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(heads, sizes) + within, np.repeat(at, sizes) + within

    def _cache(self, file: File, heads: NDArray[np.int64], indexes: NDArray[np.int64]) -> None:
        mem = self.vm.mem
        pfns, places = self._spread(heads, indexes)
        self.vm.i_pages[file.i_base + places] = pfns
        _own_folios(mem.pages, heads, file.mapping, indexes, True)
        _write_stamps(self.vm.memory, pfns, file.disk[places])
        nodes = mem.zones["node"][mem.pages["zone"][pfns]]
        mem.nodes["nr_file_pages"] += np.bincount(nodes, minlength=mem.nr_nodes)

    def _map(self, vma: Vma, vpns: NDArray[np.int64], pfns: NDArray[np.int64]) -> None:
        """Map pages, and let the process know what is in them: a page nobody mapped before gets its stamp now."""
        vm, mem = self.vm, self.vm.mem
        heads = self.heads[pfns]
        fresh = (mem.pages["mapcount"][heads] == 0) & (self.kinds[heads] == USE_ANON)
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
        mapped = self.mapcount.copy()  # of a folio: as often as any of its pages
        np.maximum.at(mapped, self.heads, self.mapcount)
        anon = self._largest_first(np.flatnonzero(free_agent & (self.kinds == USE_ANON) & (mapped > 0)))
        cached = self._largest_first(np.flatnonzero(free_agent & (self.kinds == USE_FILE)))
        cached = np.concatenate([cached[mapped[cached] > 0], cached[mapped[cached] == 0]])
        file, places = self._synthetic_file(cached)
        most = max(mapped[anon].max(initial=0), mapped[cached].max(initial=0))
        mms = [Mm(self.vm, root=self.root()) for _ in range(min(int(most), MAX_SYNTHETIC))]
        sizes = self._sizes(anon)
        self._share_out(mms, anon, np.cumsum(sizes) - sizes, None)
        if file is not None:
            in_use = mapped[cached] > 0
            self._share_out(mms, cached[in_use], places[in_use], file)
        return [(f"import-{number}", mm) for number, mm in enumerate(mms)]

    def _largest_first(self, heads: NDArray[np.int64]) -> NDArray[np.int64]:
        return heads[np.argsort(-self._sizes(heads), kind="stable")]

    def _synthetic_file(self, heads: NDArray[np.int64]) -> tuple[File | None, NDArray[np.int64]]:
        """One file for all page-cache folios without one, in that order, and where in it each begins: at a multiple of
        its size."""
        places = np.zeros(len(heads), dtype=np.int64)
        end = 0
        sizes = self._sizes(heads)
        for rising in np.split(np.arange(len(heads)), np.flatnonzero(np.diff(sizes) > 0) + 1):
            if len(rising):
                end = -(-end // int(sizes[rising[0]])) * int(sizes[rising[0]])
                places[rising] = end + np.cumsum(sizes[rising]) - sizes[rising]
                end += int(sizes[rising].sum())
        if not len(heads):
            return None, places
        file = File(self.vm, end)
        self._cache(file, heads, places)
        return file, places

    def _share_out(self, mms: list[Mm], heads: NDArray[np.int64], at: NDArray[np.int64], file: File | None) -> None:
        """Map folios, the first at[i] pages into a mapping: a page with mapcount m in the first m processes."""
        if not len(heads):
            return
        pfns, places = self._spread(heads, at)
        owner = 0
        for number, mm in enumerate(mms):
            mine = self.mapcount[pfns] > number
            vma = mm.mmap(int(places.max()) + 1, start=MMAP_BASE_VPN - (1 << 30 if file else 0), noreserve=True)
            if file is not None:
                vma.join(file.mapping)
            elif number == 0:
                owner = vma.chains[0]
                _own_folios(self.vm.mem.pages, heads, owner, at, False)
            else:
                vma.join(owner)
            self._map(vma, vma.start + places[mine], pfns[mine])

    def finish(self) -> None:
        """Account for the tables taken, stamp what belongs to the kernel, take the references of who holds pages."""
        vm, mem = self.vm, self.vm.mem
        used = int(self.used[0])
        extra = self.frames[self.nr_tables : used]
        mem.nodes["nr_page_table_pages"] += np.bincount(
            mem.zones["node"][mem.pages["zone"][extra]], minlength=mem.nr_nodes
        )
        _note_partially_mapped(mem.pages, mem.nr_pages)
        _own_ksm_pages(vm)
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
