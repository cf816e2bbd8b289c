# SPDX-License-Identifier: GPL-2.0-only
"""What a DPU compaction tells the trace and the debug log about a whole run, and about the end of a batch."""

from kernelsim import trace_events
from kernelsim.compact_control import MIGRATE_SYNC
from kernelsim.dpu_compact_cpu import CpuWork
from kernelsim.dpu_compact_region import DpuCompactRegion, DpuCompactStats
from kernelsim.dpu_hw import DpuResult
from kernelsim.mm_types import Vm
from kernelsim.page import PAGE_SHIFT

_MR_COMPACTION = 0  # enum migrate_reason


class TracedRun:
    """One dpu_compact_memory() of one zone."""

    def __init__(self, vm: Vm, stats: DpuCompactStats, zone: int) -> None:
        self._vm = vm
        self._stats = stats
        self._zone = zone
        self._nr_before = self._nr_moved()

    def _nr_moved(self) -> int:
        return self._stats.pages_moved + self._stats.cpu_pages_moved

    def _where(self) -> tuple[int, int]:
        record = self._vm.mem.zones[self._zone]
        return int(record["node"]), int(record["type"])

    def begin(self, region_order: int, engine: str) -> None:
        self._vm.trace(trace_events.dpu_compact_begin, *self._where(), region_order, engine)

    def end(self, nr_gained: int) -> None:
        nr_moved = self._nr_moved() - self._nr_before
        self._vm.trace(trace_events.dpu_compact_end, *self._where(), nr_moved, nr_gained)


def trace_complete(vm: Vm, region: DpuCompactRegion, result: DpuResult) -> None:
    """A batch has ended, one way or the other."""
    base, reason = region.first << PAGE_SHIFT, result.reason or "none"
    nrs = result.nr_retired, region.nr_fragments
    vm.trace(trace_events.dpu_batch_complete, base, *nrs, result.device_ns, result.wall_ns, reason)


def trace_by_cpu(vm: Vm, work: CpuWork) -> None:
    """The CPU path is done with a region."""
    folios = work.nr_thps, 0, work.nr_split, work.nr_split
    vm.trace(trace_events.mm_migrate_pages, work.nr_pages, 0, *folios, MIGRATE_SYNC, _MR_COMPACTION)
