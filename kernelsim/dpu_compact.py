# SPDX-License-Identifier: GPL-2.0-only
"""Compaction in batches by the DPU.

A zone is cut into aligned regions of 2^dpu_compact_region_order pages. In each, the movable folios (fragments: single
pages, and large folios, which move whole) are packed towards low addresses, keeping their order, around what cannot
move. Three stages:

1. prepare: dpu_compact_region_create, dpu_compact_isolate_pages. Free pages of the region are held, fragments leave the
   LRU, every PTE of theirs becomes a migration entry and is flushed from the TLBs.
2. execute: dpu_compact_execute lays the region out and hands address list and obstacles to the device, which works the
   layout out on its own (both must agree) and moves the pages. Several regions are in flight at once: while a rank
   copies, the kernel prepares the next region and finishes the one before.
3. update: dpu_compact_update_mappings gives flags, owner, page-cache slot, LRU place and PTEs to the new frames, and
   the vacated ones back to the buddy lists.

Nothing is lost. The device retires moves in order and reports how many; a move is retired once the written bytes were
read back. Whatever goes wrong, the first nr_retired fragments are finished in their new frames, the others are put back
where they were, the failure is logged, and the CPU path (migrate.py) does the region over.

Who copies is the engine (dpu_hw.py), chosen by a file: with `cpu-batched` the kernel itself copies what a device
would, with `cpu` the CPU path (dpu_compact_cpu.py) does the whole region. A region keeps the engine that it began with.

A region with fewer movable pages than dpu_compact_min_fragments is not worth a batch and goes to the CPU path, and so
does everything while dpu_compact_enabled is 0 or no device is there. With dpu_compact_adaptive, the other regions go to
the engine or the CPU path, whichever was found to be faster (dpu_compact_adaptive.py). That is off by default: by the
default engine's model the CPU is faster in regions of the default size, and whoever starts a DPU compaction wants to
see one.

`nr_fragments` and `nr_retired` count fragments; pages_moved, dpu_compact_min_fragments and "pages" in the log count
base pages.

Packing inside 2 MiB regions can fill no hole from another pageblock: it makes free blocks of up to 1 MiB, and a free
2 MiB block only where nothing was left in the region. Orders above 9 free whole pageblocks.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from kernelsim import dpu_compact_scan as scan
from kernelsim import trace_events
from kernelsim.dpu_compact_account import Accounts
from kernelsim.dpu_compact_cpu import CpuPath, CpuWork, copy_fragments
from kernelsim.dpu_compact_failures import DpuFailures
from kernelsim.dpu_compact_inject import DpuCompactInject
from kernelsim.dpu_compact_region import DpuCompactRegion, DpuCompactState, DpuCompactStats
from kernelsim.dpu_compact_sysctl import DpuCompactSysctl
from kernelsim.dpu_compact_trace import TracedRun, trace_by_cpu, trace_complete
from kernelsim.dpu_hw import NO_DEVICE, DpuHardware, DpuResult, Engine
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import pageblock_order
from kernelsim.operation import complete
from kernelsim.page import PAGE_SHIFT
from kernelsim.page_alloc import release_held
from kernelsim.pcp import drain_all_pages
from kernelsim.printk import KERN_ERR, KERN_INFO, KERN_WARNING, Printk
from kernelsim.timer import Clock
from kernelsim.trace_hook import traced
from kernelsim.vmstat import nr_free_pages_blocks

SURVEY_SLICE_PAGES = 1 << 15  # 64 regions of 2 MiB: some milliseconds, most of them for what each costs
SCAN_SLICE_PAGES = 1 << 15
COMMIT_SLICE_PAGES = 1 << 14
SYNCHRONOUS_FRAGMENTS = 1 << 10  # about 0.4 ms of copying; waking a rank's thread and its waiter takes as long


def _never() -> bool:
    return False


class DpuCompact:
    """The DPU compactor of one machine."""

    def __init__(self, vm: Vm, hw: DpuHardware | None, sysctl: DpuCompactSysctl, printk: Printk, clock: Clock) -> None:
        self.vm = vm
        self.hw = hw
        self.sysctl = sysctl
        self.printk = printk
        self.clock = clock
        self.stats = DpuCompactStats()
        self.accounts = Accounts(vm.nr_cpus)
        self._cpu = CpuPath(vm, clock)
        self._cpu_only = NO_DEVICE["cpu"]
        self.failures = DpuFailures(clock)
        self.inject = DpuCompactInject(vm, printk)
        self.has_device = False
        """A device was found at boot; it may have been lost since."""

    def dpu_compact_init(self) -> None:
        """Look for devices, once, at boot."""
        if self.hw is not None:
            self.hw.attach(self.vm.memory)
        self.has_device = self.hw is not None and self.hw.nr_present > 0
        if self.has_device:
            self.printk("DPU Memory Compaction initialized")
        else:
            self.printk("DPU Memory Compaction: no DPU found, compact_dpu does as compact", KERN_WARNING)

    # Engines.

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Those that can be chosen."""
        return NO_DEVICE if self.hw is None else self.hw.engines

    @property
    def engine(self) -> Engine:
        """What the regions that begin from now on are compacted by."""
        return self._cpu_only if self.hw is None else self.hw.engine

    def select_engine(self, name: str) -> None:
        """Choose another; regions under way end as they began. OSError(ENODEV): it needs a device."""
        if name not in self.engines:
            raise OSError(errno.ENODEV, "no DPU rank is built in")
        if self.hw is None:
            self._cpu_only = self.engines[name]
        else:
            self.hw.select_engine(name)

    # Whole nodes and zones.

    @traced("dpu_compact_node")
    def compact_node(self, nid: int) -> LongOp:
        """Compact every populated zone of a node."""
        drain_all_pages(self.vm.mem)
        for zone in self.vm.mem.zones_of(nid):
            if self.vm.mem.zones["managed"][zone]:
                yield from self.dpu_compact_memory(zone)

    @traced("dpu_compact_memory")
    def dpu_compact_memory(
        self, zone: int, region_order: int | None = None, until: Callable[[], bool] = _never
    ) -> LongOp:
        """Compact one zone, region by region, as many in flight as the device can use; one run at a time.

        In regions of dpu_compact_region_order if None is given. No region is begun once `until()` is true.
        """
        yield from self.vm.compaction_mutex.acquire()
        nr_huge, region_order = self._nr_free_huge(zone), region_order or self.sysctl.dpu_compact_region_order
        run = TracedRun(self.vm, self.stats, zone)
        run.begin(region_order, self.engine.name)
        self.vm.pr_debug("zone %d: regions of order %d, engine %s\n", zone, region_order, self.engine.name)
        try:
            yield from self._compact_zone(zone, region_order, until)
            waiting = self.inject.take_waiting()
        finally:
            self.inject.give_up()
            self.vm.compaction_mutex.release()
            self.stats.runs += 1
            nr_gained = self._nr_free_huge(zone) - nr_huge
            self.stats.huge_pages_gained += nr_gained
            run.end(nr_gained)
        yield from self.inject.settle(waiting)

    def _nr_free_huge(self, zone: int) -> int:
        """Huge pages that could be had of a zone as it is."""
        return nr_free_pages_blocks(self.vm.mem.zones[zone]) >> pageblock_order

    @traced("dpu_compact_zone")
    def _compact_zone(self, zone: int, region_order: int, until: Callable[[], bool]) -> LongOp:
        pending: deque[DpuCompactRegion] = deque()
        start, end = (int(self.vm.mem.zones[edge][zone]) for edge in ("start_pfn", "end_pfn"))
        size = 1 << region_order
        nr_surveyed = 0
        try:
            for base in range(start & ~(size - 1), end, size):
                if until():
                    break
                nr_surveyed += size
                if nr_surveyed >= SURVEY_SLICE_PAGES:
                    nr_surveyed = 0
                    yield None
                while self.vm.nr_forks:
                    yield None
                region = self.dpu_compact_region_create(zone, max(base, start), min(base + size, end))
                if region is None:
                    continue
                worth_a_batch = self._worth_a_batch(region)
                self.vm.trace(trace_events.dpu_compact_region, *region.span, worth_a_batch, region.engine.name)
                if not worth_a_batch:
                    while pending and self.sysctl.dpu_compact_adaptive:  # see dpu_compact_adaptive.py on lag
                        yield from self._finish(pending.popleft())
                    yield from self._compact_by_cpu(region)
                    continue
                pending.append(region)
                yield from self._start(region)
                while pending and (len(pending) >= self._max_in_flight or pending[0].over()):
                    yield from self._finish(pending.popleft())
            while pending:
                yield from self._finish(pending.popleft())
        finally:
            # the request was interrupted: what is in flight is brought to its end all the same
            while pending:
                complete(self._finish(pending.popleft()))

    @property
    def _max_in_flight(self) -> int:
        return self.hw.max_in_flight if self.hw else 1

    def _worth_a_batch(self, region: DpuCompactRegion) -> bool:
        if region.engine.copier == "cpu":
            return False
        if self.sysctl.dpu_compact_enabled and region.max_pages >= self.sysctl.dpu_compact_min_fragments:
            if not self.sysctl.dpu_compact_adaptive or self._engine_is_faster(region):
                return True
        elif self.sysctl.dpu_compact_enabled:
            self.stats.too_few_fragments += 1
            self.vm.pr_debug("region 0x%lx: %d movable pages are too few\n", region.base_pfn, region.max_pages)
        return False

    def _engine_is_faster(self, region: DpuCompactRegion) -> bool:
        adaptive, engine = self.accounts.adaptive, region.engine
        chosen = adaptive.use_engine(engine.name, "wall" if engine.measured else "modelled", region.max_pages)
        if adaptive.news:
            self.printk(f"DPU: {adaptive.news}")
        return chosen

    # Stage 1.

    @traced("dpu_compact_region_create")
    def dpu_compact_region_create(self, zone: int, start: int, end: int) -> DpuCompactRegion | None:
        """Survey start .. end-1 and set up a region, or None where no page could move down."""
        mem = self.vm.mem
        begin_ns = self.clock.wall_ns()
        first, last, nr, nr_pages = scan.survey_region(mem.pages, mem.blocks, start, end)
        if nr == 0:
            self.vm.pr_debug("region 0x%lx-0x%lx: nothing can move down\n", start, end)
            return None
        fragments = np.empty(nr, dtype=scan.fragment_dtype)
        region = DpuCompactRegion(zone, start, end - start, first, last, fragments, self.engine, nr_pages)
        region.work.number = self.accounts.adaptive.begin(self._max_in_flight)
        region.work.prepare_ns = self.clock.wall_ns() - begin_ns
        return region

    @traced("dpu_compact_isolate_pages")
    def dpu_compact_isolate_pages(self, region: DpuCompactRegion) -> LongOp:
        """Hold the region's free pages and isolate its fragments, slice by slice."""
        region.state = DpuCompactState.PREPARING
        self.vm.in_flight.append(region)
        pfn = region.first
        while pfn < region.last:
            pfn = self._isolate_slice(region, pfn)
            if pfn < region.last:
                yield None
        work = region.work
        values = region.first, region.nr_fragments, work.nr_pages, work.nr_flushes
        self.vm.trace(trace_events.dpu_compact_isolated, *values)
        self.vm.pr_debug("region 0x%lx: %d fragments, %d pages, %d flushes\n", *values)

    @traced("dpu_compact_isolate_range")
    def _isolate_slice(self, region: DpuCompactRegion, pfn: int) -> int:
        vm, mem, work = self.vm, self.vm.mem, region.work
        nr_before, nr_flushes = region.nr_fragments, int(vm.events["nr_tlb_local_flush_all"][0])
        nr_split = int(vm.events["thp_migration_split"][0])
        begin_ns = self.clock.wall_ns()
        pfn, region.nr_fragments = scan.isolate_range(
            mem.pages, mem.zones, mem.blocks, mem.nodes, vm.vmas, vm.avcs, vm.pt, vm.tlbs, vm.events, vm.touched(),
            region.fragments, region.cursors, self.stats.skipped, pfn, min(pfn + SCAN_SLICE_PAGES, region.last),
            region.last, region.nr_fragments,
        )  # fmt: skip
        end_ns = self.clock.wall_ns()
        nr_isolated, _ = scan.count_pages(region.fragments, nr_before, region.nr_fragments)
        self.stats.thp_split += int(vm.events["thp_migration_split"][0]) - nr_split
        vm.events["compact_isolated"] += nr_isolated
        if not work.nr_pages:
            work.wall.unmap_begin = begin_ns
        work.wall.unmap_end = end_ns
        work.nr_pages += nr_isolated
        work.nr_flushes += int(vm.events["nr_tlb_local_flush_all"][0]) - nr_flushes
        work.prepare_ns += end_ns - begin_ns
        return region.last if region.nr_fragments == len(region.fragments) else pfn

    # Stage 2.

    @traced("dpu_compact_execute")
    def dpu_compact_execute(self, region: DpuCompactRegion) -> None:
        """Lay the region out and have the device move it; `region.completion` tells when, if that goes on.

        A batch that takes no longer than handing it to a rank's thread and back is moved at once, if no other is under
        way; `region.result` is then set on return. OSError(ENODEV): there is no device.
        """
        assert self.hw is not None
        skip_runs = self._prepare_execute(region)
        batch = (region.first << PAGE_SHIFT, region.dpu_addr_list, region.nr_fragments, skip_runs)
        nr_in_flight = len(self.vm.in_flight)
        self.vm.trace(trace_events.dpu_batch_submit, batch[0], batch[2], len(skip_runs), nr_in_flight)
        if region.work.nr_pages <= SYNCHRONOUS_FRAGMENTS and len(self.vm.in_flight) == 1:
            region.result = self.hw.dpu_hw_compact_execute(*batch)
        else:
            region.completion = self.hw.submit(*batch)

    @traced("dpu_compact_layout")
    def _prepare_execute(self, region: DpuCompactRegion) -> NDArray[np.uint64]:
        region.state = DpuCompactState.EXECUTING
        nr = region.nr_fragments
        skip_runs = np.empty((nr + 1, 2), dtype=np.uint64)
        nr_runs = scan.list_skip_runs(region.fragments, nr, region.first, skip_runs)
        self._build_addr_list(region)
        self.vm.pr_debug("region 0x%lx: %d skip runs among %d fragments\n", region.base_pfn, nr_runs, nr)
        self.printk(f"{region.copier}: Compacting {nr} fragments at base {region.first << PAGE_SHIFT:#x}")
        return skip_runs[:nr_runs]

    @traced("dpu_compact_build_addr_list")
    def _build_addr_list(self, region: DpuCompactRegion) -> None:
        region.dpu_addr_list = np.empty(region.nr_fragments, dtype=np.uint64)
        scan.build_addr_list(region.fragments, region.nr_fragments, region.dpu_addr_list)

    @traced("dpu_compact_copy_by_cpu")
    def _copy_by_cpu(self, region: DpuCompactRegion) -> LongOp:
        """The same as dpu_compact_execute, slice by slice. What was copied when it is closed counts as retired."""
        self._prepare_execute(region)
        nr_copied = spent_ns = 0
        try:
            while nr_copied < region.nr_fragments:
                begin_ns = self.clock.wall_ns()
                last = min(nr_copied + COMMIT_SLICE_PAGES, region.nr_fragments)
                copy_fragments(self.vm.memory, region.fragments, nr_copied, last)
                nr_copied = last
                spent_ns += self.clock.wall_ns() - begin_ns
                if nr_copied < region.nr_fragments:
                    yield None
        finally:
            copy_ns = region.engine.copy_ns(nr_copied, spent_ns)
            region.result = DpuResult(nr_copied, np.zeros(0, dtype=np.uint64), copy_ns, spent_ns)

    def _executed(self, region: DpuCompactRegion, result: DpuResult) -> None:
        """Account a finished batch, and log it."""
        region.result = result
        trace_complete(self.vm, region, result)
        nrs = result.nr_retired, region.nr_fragments
        self.vm.pr_debug("region 0x%lx: %d of %d fragments retired, error %s\n", region.base_pfn, *nrs, result.reason)
        if region.engine.copier == "device":
            self._count_device(result)
        nr_pages, _ = scan.count_pages(region.fragments, 0, result.nr_retired)
        if result.error is None:
            self.printk(
                f"{region.copier} compaction completed: {nr_pages} pages moved in {result.device_ns} ns",
                KERN_INFO,
            )
            return
        self.failures.note(result, region.first << PAGE_SHIFT, region.nr_fragments)
        self.printk.ratelimited(
            f"DPU compaction failed: {result.error}, {nr_pages} of {region.work.nr_pages} pages moved",
            KERN_ERR,
        )

    def _count_device(self, result: DpuResult) -> None:
        stats = self.stats
        stats.regions += 1
        stats.device_ns += result.device_ns
        stats.wall_ns += result.wall_ns
        self.vm.events["dpu_compact_regions"] += 1
        if result.error is not None:
            stats.failures += 1
            self.vm.events["dpu_compact_fail"] += 1

    # Stage 3.

    @traced("dpu_compact_update_mappings")
    def dpu_compact_update_mappings(self, region: DpuCompactRegion) -> LongOp:
        """Commit what retired, put the rest back, give the free frames to the buddy lists."""
        assert region.result is not None
        region.state = DpuCompactState.UPDATING
        nr_retired = region.result.nr_retired
        work = region.work
        work.wall.remap_begin = self.clock.wall_ns()
        for first in range(0, region.nr_fragments, COMMIT_SLICE_PAGES):
            begin_ns = self.clock.wall_ns()
            work.nr_ptes += self._commit_slice(region, first, nr_retired)
            work.wall.remap_end = self.clock.wall_ns()
            work.update_ns += work.wall.remap_end - begin_ns
            if first + COMMIT_SLICE_PAGES < region.nr_fragments:
                yield None
        self._updated(region, nr_retired)

    @traced("dpu_compact_commit")
    def _commit_slice(self, region: DpuCompactRegion, first: int, nr_retired: int) -> int:
        vm, mem = self.vm, self.vm.mem
        last = min(first + COMMIT_SLICE_PAGES, region.nr_fragments)
        return scan.commit_range(
            mem.pages, mem.zones, mem.blocks, mem.nodes, vm.vmas, vm.avcs, vm.pt, vm.events, vm.i_pages,
            region.fragments, first, last, nr_retired,
        )  # fmt: skip

    def _updated(self, region: DpuCompactRegion, nr_retired: int) -> None:
        nr_ptes, stats = region.work.nr_ptes, self.stats
        nr_moved, nr_thps = scan.count_pages(region.fragments, 0, nr_retired)
        stats.thp_moved += nr_thps
        update_ns = region.engine.mapping_update_ns(nr_ptes, region.work.update_ns)
        if region.engine.copier == "device":
            stats.pages_moved += nr_moved
            stats.ptes_updated += nr_ptes
            stats.update_ns += update_ns
            stats.wall_ns += region.work.update_ns
            self.vm.events["dpu_compact_pages_moved"] += nr_moved
            self.vm.events["dpu_compact_ptes_updated"] += nr_ptes
        else:
            stats.cpu_pages_moved += nr_moved
            stats.cpu_ptes_updated += nr_ptes
        self.vm.trace(trace_events.dpu_compact_updated, region.base_pfn, nr_moved, nr_ptes, update_ns)
        self.printk(f"{region.copier} mapping update completed: {nr_ptes} PTEs updated in {update_ns} ns")

    # A region's way through the stages.

    @traced("dpu_compact_start_region")
    def _start(self, region: DpuCompactRegion) -> LongOp:
        """Stages 1 and, without waiting for it, 2."""
        with self.inject.busy_page(region):
            yield from self.dpu_compact_isolate_pages(region)
        if region.work.nr_pages < self.sysctl.dpu_compact_min_fragments:
            self.stats.too_few_fragments += 1
            return
        if region.engine.copier == "cpu-batched":
            yield from self._copy_by_cpu(region)
            self.inject.mid_batch(region)
            return
        try:
            self.dpu_compact_execute(region)
            self.inject.mid_batch(region)
        except OSError as error:
            self._no_device(error)

    def _no_device(self, error: OSError) -> None:
        self.printk.ratelimited(f"DPU: {error.strerror}, using the CPU", KERN_WARNING)

    @traced("dpu_compact_finish_region")
    def _finish(self, region: DpuCompactRegion) -> LongOp:
        """Wait for a region's batch, stage 3, and the CPU path where the batch did not do it all."""
        reap = self._reap(region)
        try:
            for waitable in reap:  # noqa: UP028  (`yield from` would close it when this operation is closed)
                yield waitable
        finally:
            complete(reap)
            mem = self.vm.mem
            release_held(mem.pages, mem.zones, mem.blocks, region.first, region.last)
            self.vm.in_flight.remove(region)
        if region.state is DpuCompactState.FAILED:
            yield from self._compact_by_cpu(region)

    def _reap(self, region: DpuCompactRegion) -> LongOp:
        while region.completion is not None and not region.completion.done():
            yield region.completion
        try:
            result = region.completion.result() if region.completion is not None else region.result
        except OSError as error:
            self._no_device(error)
            result = None
        if result is None:
            self._put_back(region)
            region.state = DpuCompactState.FAILED
            return
        self._executed(region, self._checked(region, result))
        yield from self.dpu_compact_update_mappings(region)
        self.accounts.batch(region)
        whole = result.nr_retired == region.nr_fragments
        region.state = DpuCompactState.COMPLETED if whole else DpuCompactState.FAILED

    def _checked(self, region: DpuCompactRegion, result: DpuResult) -> DpuResult:
        """A device whose layout differs from ours put pages where they do not belong: an emulator bug, said loudly."""
        nr_known = min(result.nr_retired, len(result.new_addrs))  # a silent device cannot be asked for it
        if not scan.layout_agrees(region.fragments, nr_known, result.new_addrs):
            self.stats.layout_mismatches += 1
            raise AssertionError(f"DPU layout differs from the kernel's at base {region.first << PAGE_SHIFT:#x}")
        return result

    @traced("dpu_compact_put_back")
    def _put_back(self, region: DpuCompactRegion) -> None:
        """Undo stage 1."""
        self.vm.pr_debug("region 0x%lx: %d fragments put back\n", region.base_pfn, region.nr_fragments)
        for first in range(0, region.nr_fragments, COMMIT_SLICE_PAGES):
            self._commit_slice(region, first, 0)

    @traced("dpu_compact_fallback")
    def _compact_by_cpu(self, region: DpuCompactRegion) -> LongOp:
        """The CPU path over the same pages: in clusters, in the same order, to the same places."""
        if region.engine.copier != "cpu":
            self.stats.fallbacks += 1
            self.vm.events["dpu_compact_fallback"] += 1
        mem = self.vm.mem
        work = CpuWork()
        self.vm.trace(trace_events.dpu_compact_fallback, *region.span)
        self.vm.pr_debug("region 0x%lx: the CPU compacts %d pages\n", region.base_pfn, region.max_pages)
        self.vm.in_flight.append(region)  # who finds no memory meanwhile waits for the frames that are held
        try:
            yield from self._cpu.compact(region.first, region.last, work)
        finally:
            release_held(mem.pages, mem.zones, mem.blocks, region.first, region.last)
            self.vm.in_flight.remove(region)
            self.stats.cpu_pages_moved += work.nr_pages
            self.stats.thp_moved += work.nr_thps
            self.stats.thp_split += work.nr_split
            self.stats.cpu_ptes_updated += work.nr_ptes
            self.accounts.by_cpu(region, work, self.engines["cpu"])
            trace_by_cpu(self.vm, work)
