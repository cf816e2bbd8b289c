# SPDX-License-Identifier: GPL-2.0-only
"""Where DPU compaction meets the rest of the kernel: each node's trigger, and the figures in debugfs."""

from collections.abc import Iterator

from kernelsim.attr import Attr, Choice, Kobject, Text, Trigger
from kernelsim.compaction import Compaction
from kernelsim.dpu_compact import DpuCompact
from kernelsim.dpu_hw import ENGINES
from kernelsim.migrate import SKIP_KERNEL, skip_reasons
from kernelsim.mm_types import LongOp


class NodeCompactDpu(Kobject):
    """node*/compact_dpu. Without a DPU, Linux's own compaction does it, unless another engine was chosen."""

    compact_dpu = Attr(
        Trigger(), doc="Write anything: compact the node with the DPU; the write returns when that is done."
    )

    def __init__(self, dpu: DpuCompact, compaction: Compaction, nid: int) -> None:
        self.dpu = dpu
        self.compaction = compaction
        self.nid = nid

    @compact_dpu.store
    def _compact(self, _text: str) -> LongOp:
        by_regions = self.dpu.has_device or self.dpu.engine.copier != "cpu"
        yield from (self.dpu if by_regions else self.compaction).compact_node(self.nid)


class DpuCompactDebugfs(Kobject):
    """/sys/kernel/debug/dpu_compact."""

    engine = Attr(Choice(*ENGINES), doc="Who moves the pages of regions that begin from now on, and whose times count.")
    profile = Attr(Text(), doc="Model and constants of the engine: value, unit, and if published, fitted or estimated.")
    stats = Attr(Text(), doc="Totals of DPU compaction since boot, one `name value` a line.")
    latency = Attr(
        Text(), doc="Time of a region from isolation to remapping: by the engine's clock, in parts; and here."
    )
    unavailable = Attr(Text(), doc="How long pages could not be used: from being unmapped to being mapped again.")
    batch_size = Attr(Text(), doc="How many pages were unmapped together.")
    histograms = Attr(
        Text(), doc="Latency, unavailability and batch size, by engine: how many values in each power of two."
    )
    regions = Attr(Text(), doc="The last 64 regions, one a line.")

    def __init__(self, dpu: DpuCompact) -> None:
        self.dpu = dpu

    @engine.show
    def _engine_show(self) -> str:
        return self.dpu.engine.name

    @engine.store
    def _engine_store(self, name: str) -> None:
        self.dpu.select_engine(name)

    @profile.show
    def _profile(self) -> str:
        return self.dpu.engine.describe()

    @stats.show
    def _stats(self) -> str:
        return "".join(f"{name} {value}\n" for name, value in self._items())

    def _items(self) -> Iterator[tuple[str, int]]:
        stats, adaptive = self.dpu.stats, self.dpu.accounts.adaptive
        for name, value in vars(stats).items():
            if name != "skipped":
                yield name, int(value)
        yield "modelled_ns", self.dpu.accounts.modelled_ns
        nr_moved = stats.pages_moved + stats.cpu_pages_moved
        yield "pages_per_huge_page", nr_moved // stats.huge_pages_gained if stats.huge_pages_gained > 0 else 0
        yield "adaptive_dpu", adaptive.nr_engine
        yield "adaptive_cpu", adaptive.nr_cpu
        yield "breakeven_pages", adaptive.breakeven_pages
        yield from self.dpu.failures.counts()
        for reason in range(SKIP_KERNEL, len(skip_reasons)):
            yield f"skipped_{skip_reasons[reason]}", int(stats.skipped[reason])
        yield "regions_in_flight", len(self.dpu.vm.in_flight)

    @latency.show
    def _latency(self) -> str:
        return self.dpu.accounts.batches.table("latency", "ns")

    @unavailable.show
    def _unavailable(self) -> str:
        return self.dpu.accounts.batches.table("unavailable", "ns")

    @batch_size.show
    def _batch_size(self) -> str:
        return self.dpu.accounts.batches.table("batch_size", "pages")

    @histograms.show
    def _histograms(self) -> str:
        return self.dpu.accounts.batches.histograms()

    @regions.show
    def _regions(self) -> str:
        return self.dpu.accounts.batches.regions_table()
