# SPDX-License-Identifier: GPL-2.0-only
"""Processes as memory management sees them: an mm with its VMAs, and the calls that shape it.

Calls that touch many pages are long operations (generators): they work in slices, so that a process of any size lets
others have their turns, and may be interleaved with anything that goes on in the machine, except other calls on the
same mm (mm_configfs.py queues those). Calls that take page tables down or copy them (munmap, exit, fork) first wait
until no batch is in flight, because a batch remembers where its PTEs are; on Linux the page-table and rmap locks see to
that.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kernelsim import memory as _memory
from kernelsim.filemap import File
from kernelsim.gup import migrate_longterm_unpinnable_folios, pin_pages, unpin_pages
from kernelsim.huge_memory import alloc_anon_thp, do_huge_pmd_anonymous_page, split_huge_pmd, thp_allowable
from kernelsim.mlock import mlock_pages
from kernelsim.mm_types import LongOp, Vm
from kernelsim.operation import Operation, complete
from kernelsim.page_alloc import free_pages
from kernelsim.pgtable import _PAGE_PSE, HPAGE_PMD_NR, HPAGE_PMD_ORDER, alloc_table, free_pgtables, walk_leaf
from kernelsim.rmap import VM_HUGEPAGE, VM_LOCKED, VM_MLOCKING, VM_SHARED, VM_WRITE
from kernelsim.same_pages import store_stamps
from kernelsim.tlb import flush_tlb_mm

if TYPE_CHECKING:
    from kernelsim.ksm_merge import RmapItems

MMAP_BASE_VPN = 0x7F00_0000_0000 >> 12
VPN_LIMIT = 1 << 35
SLICE_PAGES = 2048  # about two milliseconds of page faults with real bytes
MLOCK_SLICE_PAGES = 1 << 15
UNPIN_SLICE_PAGES = 1 << 16
FREE_TABLES_SLICE_PAGES = 1 << 12
_VPNS_AT_ONCE = 1 << 18  # a list of so many takes a millisecond to make


class Vma:
    """One mapping. `wrote` uint64[nr_pages] is what the process knows is stored there (memory.py)."""

    def __init__(self, mm: Mm, start: int, nr_pages: int, file: File | None) -> None:
        self.mm = mm
        self.vm = mm.vm
        self.file = file
        self.id = self.vm.take_vma()
        self.wrote: NDArray[np.uint64] = np.zeros(nr_pages, dtype=np.uint64) if file is None else file.disk
        self.chains: list[int] = []
        self.accounted = False
        self.rmap_items: RmapItems | None = None
        """What ksmd remembers of its pages, once it was here."""
        row = self.vm.vmas
        row["start"][self.id], row["end"][self.id] = start, start + nr_pages
        row["root"][self.id], row["mm"][self.id] = mm.root, mm.id
        row["flags"][self.id] = VM_WRITE | (VM_SHARED if file else 0)
        self.vm.vma_objects.append(self)

    @property
    def start(self) -> int:
        return int(self.vm.vmas["start"][self.id])

    @property
    def end(self) -> int:
        return int(self.vm.vmas["end"][self.id])

    @property
    def nr_pages(self) -> int:
        return self.end - self.start

    @property
    def locked(self) -> bool:
        return bool(self.vm.vmas["flags"][self.id] & VM_LOCKED)

    def madvise_hugepage(self) -> None:
        """MADV_HUGEPAGE: faults may be met with transparent huge pages."""
        self.vm.vmas["flags"][self.id] |= VM_HUGEPAGE

    def join(self, mapping: int) -> None:
        """Enter an rmap object's chain."""
        self.vm.link(mapping, self.id)
        self.chains.append(mapping)

    def own_mapping(self, mapping: int, pgoff: int = 0) -> None:
        """The rmap object that pages faulted in here will belong to."""
        self.vm.vmas["mapping"][self.id] = mapping
        self.vm.vmas["pgoff"][self.id] = pgoff
        self.join(mapping)

    def vpns(self) -> NDArray[np.int64]:
        return np.arange(self.start, self.end, dtype=np.int64)

    def vpns_by(self, nr: int) -> Iterator[NDArray[np.int64]]:
        """The same, `nr` at a time; a large `nr` is cut where 2 MiB pages end."""
        first = self.start
        while first < self.end:
            stop = first + nr if nr < HPAGE_PMD_NR else (first + nr) & ~(HPAGE_PMD_NR - 1)
            yield np.arange(first, min(stop, self.end), dtype=np.int64)
            first = stop

    def drop(self) -> None:
        """Leave all chains; an anon_vma whose chain is empty is gone."""
        if self.accounted:
            self.vm.overcommit.vm_unacct_memory(self.nr_pages)
        if self.vm.ksm is not None:
            self.vm.ksm.forget(self)
        for mapping in self.chains:
            if self.vm.unlink(mapping, self.id) and (self.file is None or mapping != self.file.mapping):
                self._put_anon_vma(mapping)
        self.vm.release_vma(self.id)
        self.vm.vma_objects.remove(self)

    def _put_anon_vma(self, mapping: int) -> None:
        """Its last VMA is gone; what a stable node still names leads nowhere now."""
        if self.vm.ksm is not None and self.vm.avcs["i_base"][mapping]:
            self.vm.ksm.prune()
        else:
            self.vm.put_anon_vma(mapping)


class Mm:
    """One process's address space, on a home node and a CPU."""

    def __init__(self, vm: Vm, node: int = 0, cpu: int = 0, root: int | None = None) -> None:
        """An empty mm. `root` is a zeroed frame for its top-level table, one is allocated if None."""
        self.vm = vm
        self.node = node
        self.cpu = cpu
        self.vma: list[Vma] = []
        self.comm = "init"
        self.pinned: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        mem = vm.mem
        if root is None:
            root = alloc_table(mem.pages, mem.zones, mem.blocks, mem.nodes, self.zonelist, vm.pt)
        self.root = root
        if self.root < 0:
            raise OSError(errno.ENOMEM, "no page for the top-level page table")
        self.id = vm.take_mm()
        row = vm.mms
        row["root"][self.id], row["node"][self.id], row["cpu"][self.id] = self.root, node, cpu
        self.next_vpn = MMAP_BASE_VPN
        self._hiwater_rss = self._hiwater_vm = 0
        self.min_flt = self.maj_flt = 0
        """Page faults of its own accesses without and with reading from a file."""

    @property
    def zonelist(self) -> NDArray[np.int32]:
        zonelist: NDArray[np.int32] = self.vm.mem.zonelist[self.node]
        return zonelist

    @property
    def rss_pages(self) -> int:
        return int(self.vm.mms["rss_anon"][self.id] + self.vm.mms["rss_file"][self.id])

    @property
    def total_vm(self) -> int:
        """Pages of address space in use."""
        return sum(vma.nr_pages for vma in self.vma)

    @property
    def hiwater_rss(self) -> int:
        """The most resident pages it ever had, as far as anybody looked: before unmapping, and now."""
        return max(self._hiwater_rss, self.rss_pages)

    @property
    def hiwater_vm(self) -> int:
        return max(self._hiwater_vm, self.total_vm)

    def reset_hiwater_rss(self) -> None:
        """Forget how large it once was (clear_refs 5)."""
        self._hiwater_rss = 0

    def mmap(
        self, nr_pages: int, file: File | None = None, start: int | None = None, *, noreserve: bool = False
    ) -> Vma:
        """Map memory, at an address of the kernel's choice (2 MiB aligned) or at a virtual page that is free.

        Private memory counts against the commit limit, unless `noreserve`. OSError(ENOMEM) beyond a limit.
        """
        if nr_pages <= 0:
            raise OSError(errno.EINVAL, "mapping of no pages")
        at = self.next_vpn if start is None else start
        if at + nr_pages > VPN_LIMIT:
            raise OSError(errno.ENOMEM, "address space exhausted")
        if any(vma.start < at + nr_pages and at < vma.end for vma in self.vma):
            raise OSError(errno.EEXIST, "address range in use")
        account = file is None and not noreserve
        self.vm.overcommit.check_map_count(len(self.vma) - 1)
        if account:
            self.vm.overcommit.vm_enough_memory(nr_pages, self.total_vm)
        vma = Vma(self, at, nr_pages, file)
        vma.accounted = account
        vma.own_mapping(file.mapping if file else self.vm.take_mapping())
        self.vma.append(vma)
        self.next_vpn = max(self.next_vpn, (at + nr_pages + 511) & ~511)
        return vma

    def write(self, vma: Vma, vpns: NDArray[np.int64] | None = None) -> LongOp:
        """Store new content in every page of `vpns` (all of the VMA's if None), faulting them in."""
        for part in vma.vpns_by(_VPNS_AT_ONCE) if vpns is None else (vpns,):
            yield from self._access(vma, part)

    def write_same(self, vma: Vma, vpns: NDArray[np.int64], stamps: NDArray[np.uint64]) -> LongOp:
        """Store the contents with these stamps."""
        yield from self._access(vma, vpns, stamps)

    def count_wrong(self, vma: Vma) -> Operation[int]:
        """Read everything back; returns how many pages differed from what was stored."""
        nr_wrong = 0
        for part in vma.vpns_by(SLICE_PAGES):
            done = 0
            while done < len(part):
                nr, bad, error = self._access_slice(vma, part[done:], False)
                done += nr
                nr_wrong += bad
                if error:
                    yield from self._wait_or_make_room(error, "read")
                else:
                    yield None
        return nr_wrong

    def _access(self, vma: Vma, vpns: NDArray[np.int64], stamps: NDArray[np.uint64] | None = None) -> LongOp:
        done = 0
        while done < len(vpns):
            nr, error = self._store(vma, vpns, stamps, done, SLICE_PAGES, thp_allowable(self.vm, vma.id))
            done += nr
            if error == -_memory.VM_FAULT_HUGE:
                error = 0
                if not (yield from self._huge_fault(vma, int(vpns[done]))):
                    nr, error = self._store(vma, vpns, stamps, done, 1, False)
                    done += nr
            self.vm.page_alloc.wake_if_low(self.node)
            if error:
                yield from self._wait_or_make_room(error, "page fault")
            else:
                yield None

    def _store(
        self,
        vma: Vma,
        vpns: NDArray[np.int64],
        stamps: NDArray[np.uint64] | None,
        first: int,
        most: int,
        huge: bool,
    ) -> tuple[int, int]:
        """Write up to `most` of the pages from vpns[first] on -> (how many were, 0 or what stopped it)."""
        nr, _, error = self._access_slice(vma, vpns[first : first + most], True, huge)
        if stamps is not None:
            part = slice(first, first + nr)
            store_stamps(self.vm.memory, self.vm.vmas, self.vm.pt, vma.wrote, vma.id, vpns[part], stamps[part])
        return nr, error

    def _wait_or_make_room(self, error: int, what: str) -> LongOp:
        """An access could not go on: wait for what is in flight, or have memory freed. OSError if neither helps."""
        if self.vm.in_flight:
            yield self.vm.in_flight[0]
        elif error != -errno.ENOMEM or not (yield from self.vm.page_alloc.make_room(self.node, self.comm)):
            raise OSError(-error, what)

    def _huge_fault(self, vma: Vma, vpn: int) -> Operation[bool]:
        """Map a 2 MiB page around a virtual page; False if there is none to be had: a small one must do."""
        vm, mem = self.vm, self.vm.mem
        head = yield from alloc_anon_thp(vm, vma.id, self.node, self.comm)
        error = head
        if head >= 0:
            error = do_huge_pmd_anonymous_page(
                mem.pages, mem.zones, mem.blocks, mem.nodes, self.zonelist, vm.vmas, vm.mms, vm.pt, vm.events,
                vm.memory, vma.id, vpn, head,
            )  # fmt: skip
            if error:
                free_pages(mem.pages, mem.zones, mem.blocks, head, HPAGE_PMD_ORDER)
            self.min_flt += not error
        if error < 0 and error != -errno.EEXIST:
            vm.events["thp_fault_fallback"] += 1
        return error >= 0

    def _access_slice(self, vma: Vma, vpns: NDArray[np.int64], write: bool, huge: bool = False) -> tuple[int, int, int]:
        vm, mem = self.vm, self.vm.mem
        disk = vma.file.disk if vma.file else _NO_DISK
        faults, major = int(vm.events["pgfault"][0]), int(vm.events["pgmajfault"][0])
        result = _memory.access_pages(
            mem.pages, mem.zones, mem.blocks, mem.nodes, self.zonelist, vm.vmas, vm.avcs, vm.mms, vm.pt, vm.tlbs,
            vm.events, vm.memory, vm.i_pages, vma.wrote, disk, self.cpu, vma.id, vpns, write, huge,
            vm.sequence + 1,
        )  # fmt: skip
        self._count_faults(faults, major)
        if write:
            vm.sequence += int(result[0])
        return int(result[0]), int(result[1]), int(result[2])

    def _count_faults(self, faults: int, major: int) -> None:
        """Those since the machine had had so many; nobody else has faults during an access."""
        major = int(self.vm.events["pgmajfault"][0]) - major
        self.maj_flt += major
        self.min_flt += int(self.vm.events["pgfault"][0]) - faults - major

    def madvise_dontneed(self, vma: Vma, vpns: NDArray[np.int64]) -> LongOp:
        """Give pages (ascending) back: their content is forgotten, the range stays mapped."""
        vm, mem = self.vm, self.vm.mem
        self._hiwater_rss = self.hiwater_rss
        first = 0
        while first < len(vpns):
            last = min(first + 4 * SLICE_PAGES, len(vpns))
            # whatever is to go of one 2 MiB page goes at once: taken whole, it need not be split
            last = int(np.searchsorted(vpns, (vpns[last - 1] | (HPAGE_PMD_NR - 1)) + 1))
            part = vpns[first:last]
            first = last
            _memory.zap_pages(
                mem.pages,
                mem.zones,
                mem.blocks,
                mem.nodes,
                vm.vmas,
                vm.avcs,
                vm.mms,
                vm.pt,
                vm.tlbs,
                vm.events,
                vma.id,
                part,
            )
            if vma.file is None:
                vma.wrote[part - vma.start] = 0
            yield None

    def munmap(self, vma: Vma) -> LongOp:
        """Take a mapping down; its page tables stay until exit."""
        for part in vma.vpns_by(_VPNS_AT_ONCE):
            yield from self.madvise_dontneed(vma, part)
        yield from self.vm.wait_in_flight()
        self._hiwater_vm = self.hiwater_vm
        self.vma.remove(vma)
        vma.drop()

    def munmap_now(self, vma: Vma) -> None:
        """The same at once, for a request that was interrupted and so cannot wait.

        Pages of it that are in flight lose their migration entries, which are what the batch's end looks for, and are
        freed then.
        """
        for part in vma.vpns_by(_VPNS_AT_ONCE):
            complete(self.madvise_dontneed(vma, part))
        self._hiwater_vm = self.hiwater_vm
        self.vma.remove(vma)
        vma.drop()

    def split(self, vma: Vma, at: int) -> Vma:
        """Cut a VMA in two at a virtual page; returns the upper part. A huge mapping across it is taken apart."""
        vm, mem = self.vm, self.vm.mem
        vm.overcommit.check_map_count(len(self.vma))
        leaf = int(walk_leaf(vm.pt, self.root, at))
        if at % HPAGE_PMD_NR and leaf >= 0 and vm.pt[leaf] & _PAGE_PSE:
            split_huge_pmd(mem.pages, mem.zones, mem.nodes, vm.vmas, vm.pt, vm.events, vma.id, leaf)
        upper = Vma(self, at, vma.end - at, vma.file)
        upper.accounted = vma.accounted
        rows = self.vm.vmas
        offset = at - vma.start
        rows["flags"][upper.id] = rows["flags"][vma.id]
        rows["mapping"][upper.id] = rows["mapping"][vma.id]
        rows["pgoff"][upper.id] = rows["pgoff"][vma.id] + offset
        rows["end"][vma.id] = at
        for mapping in vma.chains:
            upper.join(mapping)
        if vma.file is None:
            upper.wrote, vma.wrote = vma.wrote[offset:], vma.wrote[:offset]
            if vma.rmap_items is not None:
                upper.rmap_items, vma.rmap_items = vma.rmap_items[offset:], vma.rmap_items[:offset]
        self.vma.append(upper)
        return upper

    def mlock(self, vma: Vma, lock: bool = True) -> LongOp:
        """Lock (or unlock) a mapping: its pages, present and future, are unevictable.

        An interrupted call has done so to the lower part, which is a mapping of its own from then on.
        """
        vm, mem = self.vm, self.vm.mem
        if vma.locked == lock:
            return
        vm.vmas["flags"][vma.id] ^= VM_LOCKED | VM_MLOCKING
        first = vma.start
        try:
            while first < vma.end:
                stop = min((first + MLOCK_SLICE_PAGES) | (HPAGE_PMD_NR - 1), vma.end - 1) + 1
                mlock_pages(mem.pages, mem.zones, mem.nodes, vm.vmas, vm.pt, vm.events, vma.id, first, stop, lock)
                first = stop
                if first < vma.end:
                    yield None
        finally:
            vm.vmas["flags"][vma.id] &= ~VM_MLOCKING
            if first < vma.end:
                vm.vmas["flags"][self.split(vma, first).id] ^= VM_LOCKED

    def pin(self, vma: Vma, vpns: NDArray[np.int64]) -> LongOp:
        """Pin present pages for long-term DMA, on top of those pinned before.

        Shared ones are copied first, and what must stay movable (CMA areas) they leave. OSError(ENOMEM): one cannot.
        """
        pinned = np.empty(len(vpns), dtype=np.int64)
        while True:
            yield from self.unshare(vma, vpns)
            if (yield from migrate_longterm_unpinnable_folios(self.vm, vma.id, vpns, self.comm)):
                continue
            nr = pin_pages(self.vm.vmas, self.vm.pt, self.vm.mem.pages, vma.id, vpns, pinned)
            if nr >= 0:
                self.pinned = np.concatenate([self.pinned, pinned[:nr]])
                return
            yield self.vm.in_flight[0]

    def unshare(self, vma: Vma, vpns: NDArray[np.int64]) -> LongOp:
        """Give it pages of its own where it shares anonymous ones. OSError(ENOMEM): there is no room."""
        vm, mem = self.vm, self.vm.mem
        while error := _memory.unshare_pages(
            mem.pages, mem.zones, mem.blocks, mem.nodes, self.zonelist, vm.vmas, vm.avcs, vm.mms, vm.pt, vm.tlbs,
            vm.events, vm.memory, vma.id, vpns,
        ):  # fmt: skip
            yield from self._wait_or_make_room(error, "pin")

    def unpin(self) -> LongOp:
        """Drop all pins of this process."""
        mem = self.vm.mem
        while len(self.pinned):
            self.pinned, last = self.pinned[:-UNPIN_SLICE_PAGES], self.pinned[-UNPIN_SLICE_PAGES:]
            unpin_pages(mem.pages, mem.zones, mem.blocks, mem.nodes, last)
            yield None

    def exit(self) -> LongOp:
        """End the process: pins, mappings, page tables and the mm itself go. To be called again if interrupted."""
        if self.root < 0:
            return
        yield from self.unpin()
        while self.vma:
            yield from self.munmap(self.vma[-1])
        yield from self.vm.wait_in_flight()
        vm, mem = self.vm, self.vm.mem
        flush_tlb_mm(vm.tlbs, vm.events, self.id)
        budget = FREE_TABLES_SLICE_PAGES + 1
        while not free_pgtables(mem.pages, mem.zones, mem.blocks, mem.nodes, vm.pt, self.root, 3, budget):
            yield None
        vm.release_mm(self.id)
        self.root = -1


def alloc_root(vm: Vm, node: int, comm: str) -> Operation[int]:
    """A frame for an mm's top-level page table (pgd_alloc), waiting or reclaiming for it. OSError(ENOMEM)."""
    mem = vm.mem
    while True:
        root = int(alloc_table(mem.pages, mem.zones, mem.blocks, mem.nodes, mem.zonelist[node], vm.pt))
        if root >= 0:
            return root
        if vm.in_flight:
            yield vm.in_flight[0]
        elif not (yield from vm.page_alloc.make_room(node, comm)):
            raise OSError(errno.ENOMEM, "no page for the top-level page table")


_NO_DISK: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
