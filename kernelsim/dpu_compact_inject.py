# SPDX-License-Identifier: GPL-2.0-only
"""Things that happen to a page at the worst moment of its batch, on purpose: /sys/kernel/debug/dpu_compact/fail_page_*.

    page_busy     somebody holds a short pin on the page while its region is isolated: it stays where it is, counted
                  under skipped_pinned
    page_pinned   a process pins the page in mid-batch: it waits for the move, pins the new frame and lets go of it
    page_dirtied  a process writes to the page in mid-batch: it waits, and writes to the new frame
    page_freed    a process gives the page back in mid-batch: the frame that it moves to is free at the end
    page_forked   a process forks in mid-batch: the fork waits, the child shares the new frames, and exits

Each has a directory of fault-injection knobs (fault_inject.py); `move` is the page's place among those of the batch.
Mid-batch is between the batch's submission and its commit, when the page is a migration entry.

What is injected are the ordinary calls of an emulated process, through its mmap_lock. A call that has to wait is tried
again with each later batch, and for good by `settle`, when no batch of the run is left and it holds no lock; an
interrupted compaction gives up the waiting calls instead. The process is any that maps the page and has its mmap_lock
free; where there is none, the next page of the batch is tried. A batch without such a page does not count as a call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from kernelsim.fault_inject import BatchFaultAttr
from kernelsim.fork import dup_mm
from kernelsim.gup import unpin_pages
from kernelsim.migrate import MOVABLE, why_not_movable
from kernelsim.mm_configfs import Process, exclusive
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmap import Vma
from kernelsim.operation import Operation, complete
from kernelsim.page import GUP_PIN_BIAS, PG_lru
from kernelsim.pgtable import _PAGE_MIGRATION, leaf_pfn, walk_leaf
from kernelsim.printk import Printk
from kernelsim.rmap import vma_address

if TYPE_CHECKING:
    from kernelsim.dpu_compact_region import DpuCompactRegion

_MAX_TRIED = 256
"""Pages of a batch that are tried in search of one whose process can act now."""


_Call: TypeAlias = tuple[BatchFaultAttr, int, Operation[str]]
"""Why, on which page (its pfn then), and the call itself."""


class _Act(Protocol):
    """What a process does to its page at `vpn` -> what came of it."""

    def __call__(self, process: Process, vma: Vma, vpn: int, /) -> Operation[str]: ...


def _pfn_at(process: Process, vpn: int) -> str:
    vm = process.mm.vm
    at = walk_leaf(vm.pt, process.mm.root, vpn)
    return f"{leaf_pfn(vm.pt[at], vpn):#x}" if at >= 0 and vm.pt[at] else "none"


@exclusive
def _pin(process: Process, vma: Vma, vpn: int) -> Operation[str]:
    mm, mem = process.mm, process.mm.vm.mem
    nr_before = len(mm.pinned)
    yield from mm.pin(vma, np.array([vpn], dtype=np.int64))
    mine, mm.pinned = mm.pinned[nr_before:], mm.pinned[:nr_before]
    unpin_pages(mem.pages, mem.zones, mem.blocks, mem.nodes, mine)
    return "pinned at " + ", ".join(f"{pfn:#x}" for pfn in mine.tolist())


@exclusive
def _dirty(process: Process, vma: Vma, vpn: int) -> Operation[str]:
    yield from process.mm.write(vma, np.array([vpn], dtype=np.int64))
    return f"written at {_pfn_at(process, vpn)}"


@exclusive
def _free(process: Process, vma: Vma, vpn: int) -> Operation[str]:
    yield from process.mm.madvise_dontneed(vma, np.array([vpn], dtype=np.int64))
    return "given back"


@exclusive
def _fork(process: Process, vma: Vma, vpn: int) -> Operation[str]:
    vm = process.mm.vm
    child = yield from dup_mm(process.mm, process.mm.cpu)
    vm.nr_forks += 1  # no batch begins until the child is gone, so an interruption can take it down at once
    ending = child.exit()
    try:
        for waitable in ending:  # noqa: UP028  (`yield from` would close it when this call is closed)
            yield waitable
    finally:
        complete(ending)
        vm.nr_forks -= 1
    return f"forked, still at {_pfn_at(process, vpn)}"


MID_BATCH: dict[str, _Act] = {
    "page_pinned": _pin,
    "page_dirtied": _dirty,
    "page_freed": _free,
    "page_forked": _fork,
}
KINDS = ("page_busy", *MID_BATCH)


class DpuCompactInject:
    """The fault points of a machine's DPU compaction, and the calls that wait for a batch."""

    def __init__(self, vm: Vm, printk: Printk) -> None:
        self._vm = vm
        self._printk = printk
        self.points = {kind: BatchFaultAttr(f"fail_{kind}", printk) for kind in KINDS}
        self.processes: Callable[[], Iterator[Process]] = lambda: iter(())
        self._waiting: list[_Call] = []

    @contextmanager
    def busy_page(self, region: "DpuCompactRegion") -> Iterator[None]:
        """While the region is isolated: a short pin on one of its pages, if page_busy strikes."""
        point, mem = self.points["page_busy"], self._vm.mem
        pfn = self._movable(region, point.move) if point.armed else -1
        if pfn < 0 or not point.should_fail(len(region.fragments)):
            yield
            return
        mem.pages["refcount"][pfn] += GUP_PIN_BIAS
        try:
            yield
        finally:
            unpin_pages(mem.pages, mem.zones, mem.blocks, mem.nodes, np.array([pfn], dtype=np.int64))
            self._say(point, pfn, "was busy, left where it is")

    def _movable(self, region: "DpuCompactRegion", nth: int) -> int:
        """The nth movable page of the region, from 0, or -1."""
        pages = self._vm.mem.pages
        lru = np.flatnonzero(pages["flags"][region.first : region.last] & np.uint32(PG_lru)) + region.first
        for pfn in lru.tolist():
            if why_not_movable(pages, pfn) == MOVABLE:
                if nth == 0:
                    return int(pfn)
                nth -= 1
        return -1

    def mid_batch(self, region: "DpuCompactRegion") -> None:
        """The region's batch has been submitted: let happen to it what is due."""
        for call in self.take_waiting():
            self._run(call)
        for kind, act in MID_BATCH.items():
            point = self.points[kind]
            found = self._owner(region, point.move) if point.armed else None
            if found and point.should_fail(region.nr_fragments):
                pfn, process, vma, vpn = found
                self._run((point, pfn, act(process, vma, vpn)))

    def _owner(self, region: "DpuCompactRegion", first: int) -> tuple[int, Process, Vma, int] | None:
        """The first page of the batch from place `first` on that a free process maps: (pfn, process, VMA, vpn)."""
        by_mm = {
            process.mm.id: process for process in self.processes() if not (process.exiting or process.mmap_lock.locked)
        }
        if by_mm:
            for i in range(first, min(region.nr_fragments, first + _MAX_TRIED)):
                pfn = int(region.fragments["old_pfn"][i])
                for process, vma, vpn in self._mappings(pfn, by_mm):
                    return pfn, process, vma, vpn
        return None

    def _mappings(self, pfn: int, by_mm: dict[int, Process]) -> Iterator[tuple[Process, Vma, int]]:
        """Who among these has a migration entry for the page."""
        vm, page = self._vm, self._vm.mem.pages[pfn]
        for number in vm.chain(int(page["mapping"])):
            process = by_mm.get(int(vm.vmas["mm"][number]))
            vpn = vma_address(vm.vmas, number, int(page["index"]))
            if process is None or vpn < 0:
                continue
            at = walk_leaf(vm.pt, process.mm.root, vpn)
            if at >= 0 and vm.pt[at] & _PAGE_MIGRATION and leaf_pfn(vm.pt[at], vpn) == pfn:
                yield process, next(vma for vma in process.mm.vma if vma.id == number), vpn

    def _run(self, call: _Call) -> None:
        """As far as it goes without waiting."""
        point, pfn, operation = call
        try:
            while next(operation) is None:
                pass
            self._waiting.append(call)
        except StopIteration as stop:
            self._say(point, pfn, stop.value)
        except OSError as error:
            self._say(point, pfn, f"failed: {error.strerror}")

    def take_waiting(self) -> list[_Call]:
        """The calls that wait, for `settle`."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def settle(self, waiting: list[_Call]) -> LongOp:
        """Bring calls to their ends, as they would have come to them by themselves."""
        try:
            while waiting:
                point, pfn, operation = waiting[0]
                try:
                    outcome = yield from operation
                except OSError as error:
                    outcome = f"failed: {error.strerror}"
                del waiting[0]
                self._say(point, pfn, outcome)
        finally:
            _close(waiting)

    def give_up(self) -> None:
        """End the calls that still wait: their compaction was interrupted."""
        _close(self._waiting)

    def _say(self, point: BatchFaultAttr, pfn: int, outcome: str) -> None:
        if point.verbose:
            self._printk(f"{point.name}: page at {pfn:#x} in a batch: {outcome}")


def _close(calls: list[_Call]) -> None:
    while calls:
        calls.pop()[2].close()
