# SPDX-License-Identifier: GPL-2.0-only
"""One batch as in the seed's sample log: a 2 MiB region, 128 fragments, 64 of them mapped.

The stages are called as library code, on real bytes. The other 64 fragments are page-cache pages that nobody maps. Each
region is compacted once, so none of its bytes are in a CPU cache, as they would not be in real use.
"""

from statistics import median
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from dpud.bench.node import copy_ns_per_page
from dpud.bench.report import Figure, Report, percentile
from dpud.dpu.driver import DpuDriver
from dpud.inject import LiveClock
from dpud.physmem import PhysMem
from kernelsim.dpu_compact import DpuCompact
from kernelsim.filemap import File
from kernelsim.machine import Machine, MachineConfig, NodeConfig
from kernelsim.mmap import Mm, Vma
from kernelsim.operation import complete
from kernelsim.page_alloc import release_held
from kernelsim.pgtable import pte_pfn, walk_pte

REGION_PAGES = 512
NR_MAPPED, NR_UNMAPPED = 64, 64
EXECUTE_TARGET_NS, UPDATE_TARGET_NS = 117_000, 61_000  # half of what the seed's sample log shows

NR_WARM_UP = 20
NR_REGIONS = 220
_NODE_BYTES = 1 << 30
_FREED, _MAPPED, _UNMAPPED = range(3)


class Layout:
    """A process's pages laid out so that consecutive 2 MiB regions each hold the wanted mix."""

    def __init__(self, machine: Machine, nr_regions: int) -> None:
        self._vm = machine.vm
        self._mm = Mm(machine.vm)
        self._rng = np.random.default_rng(7)
        nr_freed = REGION_PAGES - NR_MAPPED - NR_UNMAPPED
        file = File(machine.vm, nr_regions * NR_UNMAPPED)
        self._vmas = [
            self._mm.mmap(nr_regions * nr_freed),
            self._mm.mmap(nr_regions * NR_MAPPED),
            self._mm.mmap(nr_regions * NR_UNMAPPED, file),
        ]
        self._nr_written = [0, 0, 0]
        self._align()
        self.bases = [self._fill_region() for _ in range(nr_regions)]
        complete(self._mm.munmap(self._vmas[_UNMAPPED]))  # the page cache keeps them
        complete(self._mm.munmap(self._vmas[_FREED]))

    def _align(self) -> None:
        """Fault in filler pages until the next one is the first of a region."""
        filler = self._mm.mmap(4 * REGION_PAGES)
        for index in range(filler.nr_pages):
            self._write(filler, index, 1)
            if self._pfn(filler, index) % REGION_PAGES == REGION_PAGES - 1:
                return
        raise AssertionError("page faults do not go upwards through free memory")

    def _fill_region(self) -> int:
        """Fault in 512 pages of the three kinds, in mixed order; the first will be freed. Returns the region's pfn."""
        kinds = self._mix()
        first_pfn = -1
        for run in np.split(kinds, np.flatnonzero(np.diff(kinds)) + 1):
            kind = int(run[0])
            vma, index = self._vmas[kind], self._nr_written[kind]
            self._write(vma, index, len(run))
            self._nr_written[kind] += len(run)
            if first_pfn < 0:
                first_pfn = self._pfn(vma, index)
        return first_pfn

    def _mix(self) -> NDArray[np.int64]:
        kinds = np.full(REGION_PAGES, _FREED)
        kinds[1 : 1 + NR_MAPPED] = _MAPPED
        kinds[1 + NR_MAPPED : 1 + NR_MAPPED + NR_UNMAPPED] = _UNMAPPED
        self._rng.shuffle(kinds[1:])
        return kinds

    def _write(self, vma: Vma, index: int, nr_pages: int) -> None:
        complete(self._mm.write(vma, vma.vpns()[index : index + nr_pages]))

    def _pfn(self, vma: Vma, index: int) -> int:
        return pte_pfn(self._vm.pt[walk_pte(self._vm.pt, self._mm.root, vma.start + index)])


def compact_region(dpu: DpuCompact, zone: int, base_pfn: int) -> tuple[int, int, int]:
    """The three stages on one region -> their wall times in ns: prepare, execute, update."""
    marks = [perf_counter_ns()]
    region = dpu.dpu_compact_region_create(zone, base_pfn, base_pfn + REGION_PAGES)
    assert region is not None
    complete(dpu.dpu_compact_isolate_pages(region))
    assert region.nr_fragments == NR_MAPPED + NR_UNMAPPED, region.nr_fragments
    marks.append(perf_counter_ns())
    dpu.dpu_compact_execute(region)
    marks.append(perf_counter_ns())
    assert region.result is not None, "a single small batch is moved at once"
    assert region.result.nr_retired == region.nr_fragments, region.result.error
    nr_ptes = dpu.stats.ptes_updated
    complete(dpu.dpu_compact_update_mappings(region))
    marks.append(perf_counter_ns())
    assert dpu.stats.ptes_updated - nr_ptes == NR_MAPPED
    mem = dpu.vm.mem
    release_held(mem.pages, mem.zones, mem.blocks, region.first, region.last)
    dpu.vm.in_flight.remove(region)
    prepare, execute, update = np.diff(marks).tolist()
    return prepare, execute, update


def measure(nr_regions: int) -> list[tuple[int, int, int]]:
    """Compact so many regions; stage times in ns of each but the first NR_WARM_UP."""
    driver = DpuDriver()
    try:
        memory = PhysMem()
        config = MachineConfig(nodes=(NodeConfig(_NODE_BYTES),))
        machine = Machine(config, driver, LiveClock(), alloc_words=memory.alloc)
        bases = Layout(machine, nr_regions + NR_WARM_UP).bases
        times = [compact_region(machine.dpu, int(machine.mem.pages["zone"][base]), base) for base in bases]
        violations = machine.check()
        assert not violations, violations
        return times[NR_WARM_UP:]
    finally:
        driver.close()


def run() -> Report:
    report = Report(
        "region",
        "one 2 MiB region, 128 fragments, 64 of them mapped, real bytes",
        f"Wall time of each stage, called as library code on the calling thread; medians of {NR_REGIONS} regions, "
        "each compacted once and cold. The targets are half of what the seed's sample log shows for a machine that it "
        "does not name; the plain copies tell how fast this one is.",
    )
    prepare, execute, update = zip(*measure(NR_REGIONS), strict=True)
    report.figures = [
        Figure("dpu_compact_execute", median(execute), "ns", EXECUTE_TARGET_NS),
        Figure("dpu_compact_update_mappings", median(update), "ns", UPDATE_TARGET_NS),
        Figure("region_create + isolate_pages", median(prepare), "ns"),
        Figure("plain copies of as many cold pages, one thread", copy_ns_per_page() * (NR_MAPPED + NR_UNMAPPED), "ns"),
        Figure("execute, 99th percentile", percentile(execute, 99), "ns"),
        Figure("update, 99th percentile", percentile(update, 99), "ns"),
    ]
    return report
