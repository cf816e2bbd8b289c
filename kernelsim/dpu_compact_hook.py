# SPDX-License-Identifier: GPL-2.0-only
"""Where DPU compaction meets the rest of the kernel: each node's trigger, and the figures in debugfs."""

from collections.abc import Iterator

from kernelsim.attr import Attr, Kobject, Text, Trigger
from kernelsim.dpu_compact import DpuCompact
from kernelsim.migrate import SKIP_KERNEL, skip_reasons
from kernelsim.mm_types import LongOp


class NodeCompactDpu(Kobject):
    """node*/compact_dpu."""

    compact_dpu = Attr(
        Trigger(), doc="Write anything: compact the node with the DPU; the write returns when that is done."
    )

    def __init__(self, dpu: DpuCompact, nid: int) -> None:
        self.dpu = dpu
        self.nid = nid

    @compact_dpu.store
    def _compact(self, _text: str) -> LongOp:
        yield from self.dpu.compact_node(self.nid)


class DpuCompactDebugfs(Kobject):
    """/sys/kernel/debug/dpu_compact."""

    stats = Attr(Text(), doc="Totals of DPU compaction since boot, one `name value` a line.")

    def __init__(self, dpu: DpuCompact) -> None:
        self.dpu = dpu

    @stats.show
    def _stats(self) -> str:
        return "".join(f"{name} {value}\n" for name, value in self._items())

    def _items(self) -> Iterator[tuple[str, int]]:
        stats = self.dpu.stats
        for name, value in vars(stats).items():
            if name != "skipped":
                yield name, int(value)
        for reason in range(SKIP_KERNEL, len(skip_reasons)):
            yield f"skipped_{skip_reasons[reason]}", int(stats.skipped[reason])
        yield "regions_in_flight", len(self.dpu.vm.in_flight)
