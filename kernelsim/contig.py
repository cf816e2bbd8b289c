# SPDX-License-Identifier: GPL-2.0-only
"""Contiguous memory by emptying a range of it (mm/page_alloc.c alloc_contig_range, alloc_contig_pages).

1. The range's pageblocks are isolated: nothing new comes into them (page_isolation.py).
2. What is in the range moves out, to wherever the buddy allocator has room: nearest node first, never into the range.
   Unused hugetlb pages are dissolved once there is another in their place.
3. If the whole range is free then, it is taken off the free lists, one reference for each page; what of the free blocks
   lies outside goes back, and the pageblocks get their types again.

Movers: with at least dpu_compact_min_fragments movable pages in the range, dpu_compact_enabled and an engine that is a
device, one batch of listed sources and destinations goes to it; the CPU does all others. What a failing device retired
stays moved, and the CPU moves the rest. Nothing is lost in either case: see dpu_hw.py for what retired means.

A page that will not move (pinned, or busy with somebody else) is tried five times, others getting a turn in between, as
__alloc_contig_migrate_range() does; then the answer is EBUSY, the log has the range, `ContigStats.busy` the reasons.
Then all is as before except that moved pages stay where they went, as on Linux. ENOMEM: no room to move to.

Differences from Linux: no reclaim of clean page cache on the way; a range is emptied page by page in address order, not
in clusters of 32; one range at a time in the whole machine, and no compaction meanwhile.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kernelsim import contig_move as loops
from kernelsim.attr import Attr, Kobject, Text
from kernelsim.dpu_compact_sysctl import DpuCompactSysctl
from kernelsim.dpu_hw import U64, DpuCompletion, DpuHardware
from kernelsim.ftrace import traced
from kernelsim.migrate import MOVABLE, SKIP_FREE, SKIP_KERNEL, skip_reasons
from kernelsim.mm_types import LongOp, Vm
from kernelsim.operation import Operation, complete
from kernelsim.page import PG_huge, PG_nopage, PG_reserved
from kernelsim.page_alloc import (
    find_buddy_head,
    free_pages,
    hold_free_block,
)
from kernelsim.page_isolation import (
    RangeBusy,
    start_isolate_page_range,
    test_pages_isolated,
    undo_isolate_page_range,
)
from kernelsim.pcp import drain_all_pages
from kernelsim.printk import KERN_ERR, KERN_INFO, KERN_WARNING, Printk

NR_TRIES = 5
BATCH_PAGES = 1 << 16
ISOLATE_SLICE_PAGES = 1 << 14
COMMIT_SLICE_MOVES = 1 << 14
CPU_SLICE_PAGES = 1 << 11


@dataclass
class ContigStats:
    """Totals since boot, in the order debugfs shows them."""

    ranges: int = 0
    ranges_busy: int = 0
    ranges_nomem: int = 0
    dpu_batches: int = 0
    dpu_failures: int = 0
    dpu_pages_moved: int = 0
    cpu_pages_moved: int = 0
    ptes_updated: int = 0
    device_ns: int = 0
    wall_ns: int = 0
    hugepages_replaced: int = 0
    busy: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(skip_reasons), dtype=np.int64))
    """Pages that kept ranges from being emptied, by migrate.skip_reasons."""


class HugetlbReplacer(Protocol):
    """The hugetlb pool, as far as a range's emptying is concerned."""

    def isolate_or_dissolve_huge_page(self, pfn: int) -> Operation[int]:
        """Put another page of its node in the place of the unused huge page at `pfn` and free it.

        0; -EBUSY if it is in use; -ENOMEM if there is no other.
        """
        ...


@dataclass(eq=False)
class MoveBatch:
    """Moves that are under way; a Waitable, for Vm.in_flight. `moves` records of contig_move.move_dtype."""

    moves: loops.Moves
    nr: int = 0
    src: U64 = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    dst: U64 = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    completion: DpuCompletion | None = None
    all_retired: bool = False

    def wait(self, timeout_s: float) -> bool:
        return self.completion is not None and self.completion.wait(timeout_s)


class Contig(Kobject):
    """The allocator of one machine, and its figures."""

    contig_stats = Attr(Text(), doc="Totals of emptying ranges (CMA, 1 GiB pages) since boot, `name value` a line.")

    def __init__(self, vm: Vm, hw: DpuHardware | None, sysctl: DpuCompactSysctl, printk: Printk) -> None:
        self.vm = vm
        self.hw = hw
        self.sysctl = sysctl
        self.printk = printk
        self.stats = ContigStats()
        self.hugetlb: HugetlbReplacer | None = None

    @contig_stats.show
    def _stats(self) -> str:
        items = [(name, value) for name, value in vars(self.stats).items() if name != "busy"]
        items += [(f"busy_{skip_reasons[why]}", self.stats.busy[why]) for why in range(SKIP_KERNEL, len(skip_reasons))]
        return "".join(f"{name} {int(value)}\n" for name, value in items)

    # The three calls of the kernel.

    @traced("alloc_contig_range")
    def alloc_contig_range(self, start: int, end: int, *, cma: bool = False) -> LongOp:
        """Allocate exactly the pages start .. end-1, all of one zone. `cma`: for the CMA area they belong to.

        RangeBusy: something in the range cannot move, or not now. OSError(ENOMEM).
        """
        yield from self.vm.compaction_mutex.acquire()
        self.vm.pr_debug("contiguous range 0x%lx-0x%lx wanted\n", start, end)
        self.stats.ranges += 1
        try:
            yield from self._alloc_range(start, end, cma)
        except OSError as error:
            self.vm.pr_debug("contiguous range 0x%lx-0x%lx: %s\n", start, end, error.strerror)
            self.stats.ranges_busy += error.errno == errno.EBUSY
            self.stats.ranges_nomem += error.errno == errno.ENOMEM
            raise
        finally:
            self.vm.compaction_mutex.release()

    @traced("free_contig_range")
    def free_contig_range(self, start: int, nr_pages: int) -> None:
        """Free pages that alloc_contig_range() gave."""
        mem = self.vm.mem
        assert (mem.pages["refcount"][start : start + nr_pages] == 1).all()
        for pfn in range(start, start + nr_pages):
            free_pages(mem.pages, mem.zones, mem.blocks, pfn, 0)

    @traced("alloc_contig_pages")
    def alloc_contig_pages(self, nr_pages: int, nid: int, *, this_node: bool = False) -> Operation[int]:
        """Allocate `nr_pages` (a power of 2) aligned pages wherever a range can be emptied -> the first pfn.

        Zones are tried as an allocation on node `nid` would. OSError(ENOMEM) if there is no such range.
        """
        mem = self.vm.mem
        for zone in mem.zonelist[nid].tolist():
            if this_node and mem.zones["node"][zone] != nid:
                continue
            first, end = (int(mem.zones[edge][zone]) for edge in ("start_pfn", "end_pfn"))
            for start in range(-(-first // nr_pages) * nr_pages, end - nr_pages + 1, nr_pages):
                if not self._pfn_range_valid_contig(start, start + nr_pages):
                    continue
                try:
                    yield from self.alloc_contig_range(start, start + nr_pages)
                except OSError:
                    continue
                return start
        raise OSError(errno.ENOMEM, "no range can be emptied")

    def _pfn_range_valid_contig(self, start: int, end: int) -> bool:
        """Nothing in the range is reserved, a hole, or a huge page (mm/page_alloc.c, of the same name)."""
        flags = self.vm.mem.pages["flags"][start:end]
        return not (flags & np.uint32(PG_reserved | PG_nopage | PG_huge)).any()

    # The way there.

    def _alloc_range(self, start: int, end: int, cma: bool) -> LongOp:
        mem = self.vm.mem
        isolated = start_isolate_page_range(mem, start, end, cma=cma)
        try:
            drain_all_pages(mem)
            yield from self._alloc_contig_migrate_range(start, end)
            self._take(start, end)
        finally:
            undo_isolate_page_range(mem, isolated)

    @traced("__alloc_contig_migrate_range")
    def _alloc_contig_migrate_range(self, start: int, end: int) -> LongOp:
        """Move out what can be moved; returns with the range empty or after the fifth try."""
        reasons = np.zeros(len(skip_reasons), dtype=np.int64)
        by_dpu = self._has_copier and bool(self.sysctl.dpu_compact_enabled)
        for attempt in range(NR_TRIES):
            if attempt:
                yield None
            while self.vm.in_flight or self.vm.nr_forks:
                yield self.vm.in_flight[0] if self.vm.in_flight else None
            nr_movable, huge = loops.survey_range(self.vm.mem.pages, start, end, reasons)
            if huge >= 0:
                yield from self._replace_hugetlb(start, end)
                nr_movable, huge = loops.survey_range(self.vm.mem.pages, start, end, reasons)
            if int(reasons.sum()) == reasons[SKIP_FREE]:
                return
            if by_dpu and nr_movable >= self.sysctl.dpu_compact_min_fragments:
                by_dpu = yield from self._move_by_dpu(start, end)
            yield from self._move_by_cpu(start, end)
        loops.survey_range(self.vm.mem.pages, start, end, reasons)
        reasons[[MOVABLE, SKIP_FREE]] = 0
        self.stats.busy += reasons

    def _replace_hugetlb(self, start: int, end: int) -> LongOp:
        reasons = np.zeros(len(skip_reasons), dtype=np.int64)
        _, huge = loops.survey_range(self.vm.mem.pages, start, end, reasons)
        while huge >= 0 and self.hugetlb is not None:
            error = yield from self.hugetlb.isolate_or_dissolve_huge_page(huge)
            if error == -errno.ENOMEM:
                raise OSError(errno.ENOMEM, "no huge page to put in the place of another")
            if error:
                return
            self.stats.hugepages_replaced += 1
            self.vm.pr_debug("huge page at 0x%lx replaced\n", huge)
            _, huge = loops.survey_range(self.vm.mem.pages, start, end, reasons)

    def _take(self, start: int, end: int) -> None:
        """Take the range off the free lists. OSError(EBUSY) if not all of it is free."""
        mem = self.vm.mem
        busy = test_pages_isolated(mem.pages, mem.blocks, start, end)
        if busy < end:
            self.printk(f"alloc_contig_range: [{start:x}, {end:x}) PFNs busy")
            raise RangeBusy(busy, "a page in the range stays where it is")
        pfn = start
        while pfn < end:
            head = find_buddy_head(mem.pages, pfn)
            pfn += hold_free_block(mem.pages, mem.zones, mem.blocks, head, pfn, end)
        loops.take_free_range(mem.pages, mem.zones, mem.blocks, start, end)

    def _isolate(self, batch: MoveBatch, pfn: int, end: int, budget: int) -> tuple[int, int]:
        """Isolate up to `budget` pages of the range; returns (pfn reached, 0 or -ENOMEM)."""
        vm, mem = self.vm, self.vm.mem
        zonelist = mem.zonelist[int(mem.zones["node"][mem.pages["zone"][pfn]])]
        pfn, batch.nr, error = loops.isolate_moves(
            mem.pages, mem.zones, mem.blocks, mem.nodes, zonelist, vm.vmas, vm.avcs, vm.pt, vm.tlbs, vm.events,
            vm.touched(), batch.moves, batch.nr, pfn, end, budget,
        )  # fmt: skip
        return pfn, error

    def _commit(self, batch: MoveBatch, first: int, last: int, nr_retired: int) -> int:
        """Finish moves first .. last-1; returns how many pages moved."""
        vm, mem = self.vm, self.vm.mem
        nr_pages, nr_ptes = loops.commit_moves(
            mem.pages, mem.zones, mem.blocks, mem.nodes, vm.vmas, vm.avcs, vm.pt, vm.events, vm.i_pages,
            batch.moves, first, last, nr_retired,
        )  # fmt: skip
        self.stats.ptes_updated += nr_ptes
        return nr_pages

    # The CPU.

    @traced("dpu_contig_move_by_cpu")
    def _move_by_cpu(self, start: int, end: int) -> LongOp:
        """Move what can be moved, a slice at a time: between two slices nothing is under way.

        OSError(ENOMEM) where there is no room, and nobody holds any that he may give back.
        """
        pfn = loops.first_folio(self.vm.mem.pages, start)
        while pfn < end:
            batch = MoveBatch(np.empty(CPU_SLICE_PAGES, dtype=loops.move_dtype))
            pfn, error = self._isolate(batch, pfn, end, CPU_SLICE_PAGES)
            loops.copy_moves(self.vm.memory, batch.moves, 0, batch.nr)
            self.stats.cpu_pages_moved += self._commit(batch, 0, batch.nr, batch.nr)
            if error and not self.vm.in_flight:
                self.vm.pr_debug("range at 0x%lx: no room to move to\n", pfn)
                raise OSError(errno.ENOMEM, "no room to move to")
            yield self.vm.in_flight[0] if error else None

    # The DPU.

    @property
    def _has_copier(self) -> bool:
        """There is a device, and the engine that was chosen lets it copy."""
        return self.hw is not None and self.hw.engine.copier == "device"

    @traced("dpu_contig_move")
    def _move_by_dpu(self, start: int, end: int) -> Operation[bool]:
        """Move what can be moved in batches; False if the device failed and the CPU must go on."""
        while self.vm.nr_forks:
            yield None
        pfn = loops.first_folio(self.vm.mem.pages, start)
        while pfn < end:
            batch = MoveBatch(np.empty(min(BATCH_PAGES, end - pfn), dtype=loops.move_dtype))
            pfn, error = yield from self._move_batch(batch, pfn, end)
            if not batch.all_retired:
                self.vm.pr_debug("range at 0x%lx: the device failed, the CPU goes on\n", pfn)
                return False
            if error:
                break  # no room: the CPU path finds out whether there will be some
        return True

    def _move_batch(self, batch: MoveBatch, pfn: int, end: int) -> Operation[tuple[int, int]]:
        """Fill one batch from `pfn` on, have it moved, commit it; returns (pfn reached, 0 or -ENOMEM)."""
        error = 0
        finish = self._finish(batch)
        self.vm.in_flight.append(batch)
        try:
            while pfn < end and batch.nr < len(batch.moves) and not error:
                pfn, error = self._isolate(batch, pfn, end, ISOLATE_SLICE_PAGES)
                yield None
            self._execute(batch)
            for waitable in finish:  # noqa: UP028  (`yield from` would close it when this operation is closed)
                yield waitable
        finally:
            # interrupted or not: what is in flight is brought to its end, and what is not is put back
            complete(finish)
            self.vm.in_flight.remove(batch)
        return pfn, error

    def _execute(self, batch: MoveBatch) -> None:
        """Hand a batch to the device; without one its moves will be put back."""
        if self.hw is None or not batch.nr:
            return
        batch.src, batch.dst = (np.empty(batch.nr, dtype=np.uint64) for _ in range(2))
        loops.build_move_lists(batch.moves, batch.nr, batch.src, batch.dst)
        self.printk(f"DPU: Moving {batch.nr} fragments from {int(batch.src[:1].sum()) & -4096:#x}")
        try:
            batch.completion = self.hw.submit_move(batch.src, batch.dst, batch.nr)
        except OSError as error:
            self._no_device(error)

    def _no_device(self, error: OSError) -> None:
        self.printk.ratelimited(f"DPU: {error.strerror}, using the CPU", KERN_WARNING)

    def _finish(self, batch: MoveBatch) -> LongOp:
        """Wait for a batch; commit what retired, put the rest back."""
        while batch.completion is not None and not batch.completion.done():
            yield batch.completion
        nr_retired = self._reap(batch)
        batch.all_retired = nr_retired == batch.nr
        for first in range(0, batch.nr, COMMIT_SLICE_MOVES):
            last = min(first + COMMIT_SLICE_MOVES, batch.nr)
            self.stats.dpu_pages_moved += self._commit(batch, first, last, nr_retired)
            if last < batch.nr:
                yield None

    def _reap(self, batch: MoveBatch) -> int:
        """How many moves of an ended batch retired; accounts and logs it."""
        if batch.completion is None:
            return 0
        try:
            result = batch.completion.result()
        except OSError as error:
            self._no_device(error)
            return 0
        nr_known = min(result.nr_retired, len(result.new_addrs))
        if not np.array_equal(result.new_addrs[:nr_known], batch.dst[:nr_known]):
            raise AssertionError("the DPU put pages where they do not belong")
        self.stats.dpu_batches += 1
        self.stats.device_ns += result.device_ns
        self.stats.wall_ns += result.wall_ns
        if result.error is None:
            self.printk(f"DPU move completed: {result.nr_retired} fragments moved in {result.device_ns} ns", KERN_INFO)
        else:
            self.stats.dpu_failures += 1
            self.printk.ratelimited(
                f"DPU move failed: {result.error}, {result.nr_retired} of {batch.nr} fragments moved", KERN_ERR
            )
        return result.nr_retired
