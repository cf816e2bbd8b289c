# SPDX-License-Identifier: GPL-2.0-only
"""The structures of DPU compaction: a region on its way through the stages, what was done for it, and the totals."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernelsim.dpu_compact_scan import NR_SKIP_REASONS, Cursors, new_cursors
from kernelsim.dpu_compact_stats import Wall
from kernelsim.dpu_hw import DpuCompletion, DpuResult, Engine


@dataclass
class BatchWork:
    """What the kernel did for one batch, as it goes along."""

    number: int = 0
    nr_pages: int = 0  # base pages isolated
    nr_flushes: int = 0
    nr_ptes: int = 0
    prepare_ns: int = 0
    update_ns: int = 0
    wall: Wall = field(default_factory=Wall)


class DpuCompactState(enum.Enum):
    IDLE = "idle"
    PREPARING = "preparing"
    EXECUTING = "executing"
    UPDATING = "updating"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(eq=False)
class DpuCompactRegion:
    """One batch (struct dpu_compact_region).

    `fragments` records of dpu_compact_scan.fragment_dtype, the first `nr_fragments` valid; `dpu_addr_list`
    uint64[nr_fragments], byte addresses with orders. `first`..`last` is the part of the region that is worked on,
    `max_pages` the base pages that its survey found movable, `cursors` how far places for fragments were given.
    """

    zone: int
    base_pfn: int
    region_size: int
    first: int
    last: int
    fragments: Any
    engine: Engine
    max_pages: int
    nr_fragments: int = 0
    cursors: Cursors = field(init=False)
    dpu_addr_list: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    state: DpuCompactState = DpuCompactState.IDLE
    completion: DpuCompletion | None = None
    result: DpuResult | None = None
    work: BatchWork = field(default_factory=BatchWork)

    def __post_init__(self) -> None:
        self.cursors = new_cursors(self.first)

    @property
    def span(self) -> tuple[int, int, int]:
        """First and last+1 pfn of the region, and how many of its pages were found movable."""
        return self.base_pfn, self.base_pfn + self.region_size, self.max_pages

    def wait(self, timeout_s: float, /) -> bool:
        """For those who meet one of its pages: wait for the device, if it is at work."""
        return self.completion is None or self.completion.wait(timeout_s)

    def over(self) -> bool:
        """The device is not, or no longer, at work on it."""
        return self.completion is None or self.completion.done()

    @property
    def copier(self) -> str:
        """Who copies its pages, for the log."""
        return "DPU" if self.engine.copier == "device" else "CPU"


@dataclass
class DpuCompactStats:
    """Totals since boot, in the order debugfs shows them."""

    regions: int = 0
    pages_moved: int = 0
    ptes_updated: int = 0
    device_ns: int = 0
    wall_ns: int = 0
    update_ns: int = 0
    fallbacks: int = 0
    failures: int = 0
    too_few_fragments: int = 0
    cpu_pages_moved: int = 0
    cpu_ptes_updated: int = 0
    layout_mismatches: int = 0
    thp_moved: int = 0
    thp_split: int = 0
    runs: int = 0
    huge_pages_gained: int = 0
    skipped: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NR_SKIP_REASONS, dtype=np.int64))
