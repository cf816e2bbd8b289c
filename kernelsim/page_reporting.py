# SPDX-License-Identifier: GPL-2.0-only
"""Free page reporting: the host gets back what the emulated machine does not use (mm/page_reporting.c).

As on Linux only free blocks of a pageblock or more are reported, some time after they were freed: 2 seconds, so that
memory on its way from one use to the next is not given back in between. Reported memory reads as zeros. Linux remembers
for each block that it was reported; here all large free blocks are reported again once anything was allocated or
freed, which costs the host next to nothing for those that are already empty.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kernelsim.mmzone import Mem, pageblock_nr_pages, pageblock_order
from kernelsim.page import PG_buddy

PAGE_REPORTING_DELAY_NS = 2_000_000_000
_PAGES_A_STEP = 1 << 14  # 64 MiB at a time: a few milliseconds

Discard = Callable[[int, int], None]
"""(pfn, nr_pages): forget their contents."""


class PageReporting:
    """Timer-driven; does nothing on a machine whose `discard` is None."""

    def __init__(self, mem: Mem, discard: Discard | None) -> None:
        self.mem = mem
        self.discard = discard
        self.reported_pages = 0
        self._seen = self._activity()
        self._due_ns: int | None = None
        self._work: deque[int] = deque()

    def _activity(self) -> int:
        zones = self.mem.zones
        return int(zones["pgalloc"].sum() + zones["pgfree"].sum())

    def arm(self, now_ns: int) -> None:
        """Look whether anything was freed since; called by the owner after it ran something."""
        if self.discard is not None and self._due_ns is None and self._activity() != self._seen:
            self._due_ns = now_ns + PAGE_REPORTING_DELAY_NS

    def peek(self) -> int | None:
        return self._due_ns

    def step(self, now_ns: int) -> None:
        if self.discard is None or self._due_ns is None or now_ns < self._due_ns:
            return
        if not self._work:
            self._seen = self._activity()
            self._work.extend(int(pfn) for pfn in self._free_heads())
        self._report_some()
        self._due_ns = now_ns + 1 if self._work else None

    def _free_heads(self) -> NDArray[np.int64]:
        starts = np.arange(0, self.mem.nr_pages, pageblock_nr_pages)
        return starts[self._is_large_free(starts)]

    def _is_large_free(self, pfns: NDArray[np.int64]) -> NDArray[np.bool_]:
        pages = self.mem.pages
        large = pages["order"][pfns] >= pageblock_order
        found: NDArray[np.bool_] = (pages["flags"][pfns] & np.uint32(PG_buddy) != 0) & large
        return found

    def _report_some(self) -> None:
        """Report blocks found free before, if they still are; runs of them in one go."""
        assert self.discard is not None
        budget = _PAGES_A_STEP
        while self._work and budget > 0:
            start = end = self._work[0]
            while self._work and self._work[0] == end and end - start < budget:
                pfn = self._work.popleft()
                if not self._is_large_free(np.array([pfn]))[0]:
                    break
                end = pfn + (1 << int(self.mem.pages["order"][pfn]))
            if end > start:
                self.discard(start, end - start)
                self.reported_pages += end - start
            budget -= max(end - start, pageblock_nr_pages)
