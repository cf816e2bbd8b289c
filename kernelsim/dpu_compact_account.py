# SPDX-License-Identifier: GPL-2.0-only
"""Books what each region took, for the statistics and for the adaptive choice."""

from __future__ import annotations

import numpy as np

from kernelsim.dpu_compact_adaptive import Adaptive
from kernelsim.dpu_compact_cpu import CpuWork, pages_in_cluster
from kernelsim.dpu_compact_region import DpuCompactRegion
from kernelsim.dpu_compact_stats import BatchStats, ClusterStep, Ramp, RegionRecord, unavailable_ns
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
            unavailable = unavailable_ns(work.nr_pages, times)
            self.batches.add_pages(engine.name, unavailable, work.wall.unavailable_ns(work.nr_pages))
        self.adaptive.sample(work.number, engine.name, work.nr_pages, times.total_ns, wall_ns)

    def by_cpu(self, region: DpuCompactRegion, work: CpuWork, engine: Engine) -> None:
        """A region, or the rest of one, that the CPU path did."""
        nr = work.nr_pages
        times = engine.times(
            HostWork(
                nr_folios=work.nr_folios,
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
        self.batches.add(RegionRecord(base, work.nr_folios, work.nr_folios, engine.name, times, work.wall_ns, None))
        self._clusters(work, engine.name, times)
        self.adaptive.sample(region.work.number, engine.name, nr, times.total_ns, work.wall_ns)

    def _clusters(self, work: CpuWork, engine: str, times: BatchTimes) -> None:
        """Each cluster has its share of the region's times; by the wall clock, its pages are away all that time."""
        if not work.nr_pages:
            return
        step = ClusterStep(
            unmap_ns=times.unmap_ns / work.nr_folios,
            flush_ns=times.flush_ns / work.clusters.total(),
            copy_ns=times.device_ns / work.nr_pages,
            remap_ns=times.remap_ns / work.nr_folios,
        )
        for shape, nr in work.clusters.items():
            orders = np.frombuffer(shape, dtype=np.uint8)
            nr_pages = pages_in_cluster(orders)
            wall = Ramp(work.wall_ns * nr_pages / work.nr_pages, 0.0, nr_pages)
            self.batches.add_clusters(engine, orders, step, wall, nr)
