# SPDX-License-Identifier: GPL-2.0-only
"""Free page reporting: the host gets back what the emulated machine does not use (mm/page_reporting.c).

As on Linux only free blocks of a pageblock or more are reported, some time after they were freed: 2 seconds, so that
memory on its way from one use to the next is not given back in between. Reported memory reads as zeros. Linux remembers
for each block that it was reported; here all large free blocks are reported again once anything was allocated or
freed, which costs the host next to nothing for those that are already empty.
"""

from collections.abc import Callable

from kernelsim.jit import njit
from kernelsim.mmzone import Mem, pageblock_nr_pages, pageblock_order
from kernelsim.page import Pages, PG_buddy

PAGE_REPORTING_DELAY_NS = 2_000_000_000
_PAGES_A_STEP = 1 << 14  # 64 MiB at a time: a few milliseconds

Discard = Callable[[int, int], None]
"""(pfn, nr_pages): forget their contents."""


@njit
def next_free_run(pages: Pages, pfn: int, end: int, max_pages: int) -> tuple[int, int]:
    """The next run of large free blocks from the pageblock at `pfn` on, as (start, stop).

    It goes no further than `max_pages` past `pfn`, where a run is cut; start equals stop where there is none so far.
    """
    limit = min(end, pfn + max_pages)
    while pfn < limit and (pages[pfn].flags & PG_buddy == 0 or pages[pfn].order < pageblock_order):
        pfn += pageblock_nr_pages
    stop = pfn
    while stop < limit and pages[stop].flags & PG_buddy and pages[stop].order >= pageblock_order:
        stop += 1 << pages[stop].order
    return pfn, stop


class PageReporting:
    """Timer-driven; does nothing on a machine whose `discard` is None."""

    def __init__(self, mem: Mem, discard: Discard | None) -> None:
        self.mem = mem
        self.discard = discard
        self.reported_pages = 0
        self._seen = self._activity()
        self._due_ns: int | None = None
        self._at = 0
        """How far the sweep through memory that is under way has come; 0: none is."""

    def _activity(self) -> int:
        zones = self.mem.zones
        total: int = sum(zones["pgalloc"].tolist()) + sum(zones["pgfree"].tolist())  # asked after each request
        return total

    def arm(self, now_ns: int) -> None:
        """Look whether anything was freed since; called by the owner after it ran something."""
        if self.discard is not None and self._due_ns is None and self._activity() != self._seen:
            self._due_ns = now_ns + PAGE_REPORTING_DELAY_NS

    def peek(self) -> int | None:
        return self._due_ns

    def step(self, now_ns: int) -> bool:
        """Go on with the sweep, or begin one, if it is time to."""
        if self.discard is None or self._due_ns is None or now_ns < self._due_ns:
            return False
        if self._at == 0:
            self._seen = self._activity()
        start, stop = next_free_run(self.mem.pages, self._at, self.mem.nr_pages, _PAGES_A_STEP)
        if stop > start:
            self.discard(start, stop - start)
            self.reported_pages += stop - start
        self._at = stop if stop < self.mem.nr_pages else 0
        self._due_ns = now_ns + 1 if self._at else None
        return True
