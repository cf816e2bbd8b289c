# SPDX-License-Identifier: MIT
"""Pages that come and go too fast.

The rule and its constants are those of NVIDIA's driver (uvm_perf_thrashing.c, open-gpu-kernel-modules 595.45): an event
that follows the last one of its page within a lapse of 500 us counts; after 3 in a row the page thrashes and its user
is throttled; after 10 throttles it is pinned. 2000 lapses after the first event the counts begin anew (an epoch), and a
page that was pinned and reset 4 times is left alone for good.

The driver's event is a page that moves between processors; here it is a page that is missing, having been in memory
before.
"""

from collections import OrderedDict

LAPSE_NS = 500_000
NR_EVENTS = 3
NR_THROTTLES = 10
EPOCH_NS = 2000 * LAPSE_NS
MAX_RESETS = 4
_MAX_PAGES = 1 << 16


class _Page:
    __slots__ = ("first_ns", "last_ns", "nr_events", "nr_resets", "nr_throttles")

    def __init__(self, now_ns: int) -> None:
        self.first_ns = self.last_ns = now_ns
        self.nr_events = 0
        self.nr_throttles = 0
        self.nr_resets = 0


class ThrashGuard:
    """Remembers the pages that were missing last, 65536 at most."""

    def __init__(self) -> None:
        self._pages: OrderedDict[int, _Page] = OrderedDict()
        self.enabled = True
        self.nr_throttles = 0
        self.nr_pins = 0

    def fault(self, key: int, now_ns: int) -> str:
        """A page was missing: "ok", "throttle" its user, or "pin" it."""
        if not self.enabled:
            return "ok"
        page = self._page(key, now_ns)
        if page.nr_resets > MAX_RESETS:
            return "ok"
        if now_ns - page.first_ns >= EPOCH_NS:
            self._begin_anew(page, now_ns)
        page.nr_events = page.nr_events + 1 if now_ns - page.last_ns <= LAPSE_NS else 1
        page.last_ns = now_ns
        if page.nr_events < NR_EVENTS:
            return "ok"
        return self._thrashes(page)

    def _page(self, key: int, now_ns: int) -> _Page:
        page = self._pages.pop(key, None) or _Page(now_ns)
        self._pages[key] = page
        if len(self._pages) > _MAX_PAGES:
            self._pages.popitem(last=False)
        return page

    def _thrashes(self, page: _Page) -> str:
        page.nr_throttles += 1
        if page.nr_throttles <= NR_THROTTLES:
            self.nr_throttles += 1
            return "throttle"
        page.nr_resets += 1
        page.nr_events = page.nr_throttles = 0
        self.nr_pins += 1
        return "pin"

    def _begin_anew(self, page: _Page, now_ns: int) -> None:
        page.first_ns = now_ns
        page.nr_events = page.nr_throttles = 0
