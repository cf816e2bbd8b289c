# SPDX-License-Identifier: GPL-2.0-only
"""Books what each region took, for the statistics and for the adaptive choice."""

from __future__ import annotations

from kernelsim.dpu_compact_adaptive import Adaptive
from kernelsim.dpu_compact_cpu import COMPACT_CLUSTER_MAX, CpuWork
from kernelsim.dpu_compact_region import DpuCompactRegion
from kernelsim.dpu_compact_stats import BatchStats, Ramp, RegionRecord, unavailable_ns
from kernelsim.dpu_hw import BatchTimes, Engine, HostWork
from kernelsim.page import PAGE_SHIFT


class Accounts:
    """One machine's books. `nr_cpus` is how many CPUs a TLB flush reaches."""

    def __init__(self, nr_cpus: int) -> None:
        self.batches = BatchStats()
        self.adaptive = Adaptive()
        self.modelled_ns = 0
        """Of all regions, each by its engine's clock: the difference over a request is what it took by the models."""
        self._nr_cpus = nr_cpus

    def batch(self, region: DpuCompactRegion) -> None:
        """A batch that is over: its pages are mapped again, moved or not."""
        work, result, engine = region.work, region.result, region.engine
        assert result is not None
        times = engine.times(
            HostWork(
                nr_folios=region.nr_fragments,
                nr_scanned=region.region_size,
                nr_flushes=work.nr_flushes,
                nr_cpus=self._nr_cpus,
                nr_ptes=work.nr_ptes,
                prepare_wall_ns=work.prepare_ns,
                update_wall_ns=work.update_ns,
            ),
            result.device_ns,
        )
        wall_ns = work.prepare_ns + result.wall_ns + work.update_ns
        base = region.base_pfn << PAGE_SHIFT
        self.modelled_ns += times.total_ns
        self.batches.add(
            RegionRecord(base, region.nr_fragments, result.nr_retired, engine.name, times, wall_ns, result.error)
        )
        if work.nr_pages:
            unavailable = unavailable_ns(work.nr_pages, times, one_by_one=False)
            self.batches.add_pages(engine.name, unavailable, work.wall.unavailable_ns(work.nr_pages))
        self.adaptive.sample(work.number, engine.name, work.nr_pages, times.total_ns, wall_ns)

    def by_cpu(self, region: DpuCompactRegion, work: CpuWork, engine: Engine) -> None:
        """A region, or the rest of one, that the CPU path did."""
        nr = work.nr_pages
        times = engine.times(
            HostWork(
                nr_folios=nr,
                nr_scanned=region.region_size,
                nr_flushes=work.nr_flushes,
                nr_cpus=self._nr_cpus,
                nr_ptes=work.nr_ptes,
                update_wall_ns=0,
            ),
            engine.copy_ns(nr, work.wall_ns),
        )
        base = region.base_pfn << PAGE_SHIFT
        self.modelled_ns += times.total_ns
        self.batches.add(RegionRecord(base, nr, nr, engine.name, times, work.wall_ns, None))
        self._clusters(work, engine.name, times)
        self.adaptive.sample(region.work.number, engine.name, nr, times.total_ns, work.wall_ns)

    def _clusters(self, work: CpuWork, engine: str, times: BatchTimes) -> None:
        """Each cluster has its share of the region's times; by the wall clock, its pages are away all that time."""
        nr_clusters = work.nr_clusters + len(work.rests)
        sizes = [(COMPACT_CLUSTER_MAX, work.nr_clusters), *((rest, 1) for rest in work.rests)]
        for size, nr in sizes:
            share = size / work.nr_pages if work.nr_pages else 0.0
            cluster = BatchTimes(
                isolate_ns=0,
                unmap_ns=round(times.unmap_ns * share),
                flush_ns=round(times.flush_ns / nr_clusters) if nr_clusters else 0,
                device_ns=round(times.device_ns * share),
                remap_ns=round(times.remap_ns * share),
            )
            modelled = unavailable_ns(size, cluster, one_by_one=True)
            self.batches.add_pages(engine, modelled, Ramp(work.wall_ns * share, 0.0, size), nr)
