# SPDX-License-Identifier: MIT
"""Prefetching only as long as it pays: what is brought in for nothing costs a read, a decompression, and the room of a
page that is used.

Who is on trial may bring in TRIAL pages, those next to the fault. If MIN_SHARE of them have been used by the next fault
after that, it is trusted: as much as it wants, judged again after each WINDOW pages. Else nothing is guessed for a
number of faults, which doubles each time in a row; then there is another trial. So the price of accesses that cannot
be guessed is TRIAL pages at first, and in the long run TRIAL for every LONGEST_PAUSE faults.

MIN_SHARE is where a prefetched page is as likely of use as not; the other numbers are ours, uncalibrated. NVIDIA's
driver has a coarser rule: none while a block thrashes.
"""

from collections.abc import Sequence

from dpud.gpu.swap.accuracy import PrefetchAccuracy
from dpud.gpu.swap.prefetch import Prefetcher, Resident

TRIAL = 16
WINDOW = 256
MIN_SHARE = 0.5
FIRST_PAUSE = 256
LONGEST_PAUSE = 4096


class Gate(Prefetcher):
    """Another prefetcher, when it is of use."""

    def __init__(self, inner: Prefetcher, accuracy: PrefetchAccuracy) -> None:
        self.inner = inner
        self.accuracy = accuracy
        self.nr_skipped = 0
        """Faults for which nothing was guessed."""
        self.is_trusted = False
        self._left = 0
        self._pause = FIRST_PAUSE
        accuracy.begin_window()

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        if self._left:
            self._left -= 1
            self.nr_skipped += 1
            return ()
        is_due = self.accuracy.nr_window_issued >= (WINDOW if self.is_trusted else TRIAL)
        if is_due and not self._passes():
            return ()
        wanted = self.inner.on_fault(first_key, nr_pages, page, resident)
        if self.is_trusted:
            return wanted
        nearest = sorted(wanted, key=lambda each: abs(each - page))
        return nearest[: max(0, TRIAL - self.accuracy.nr_window_issued)]

    def _passes(self) -> bool:
        """Judge the window, and begin another."""
        accuracy = self.accuracy
        self.is_trusted = accuracy.nr_window_used >= MIN_SHARE * accuracy.nr_window_issued
        if self.is_trusted:
            self._pause = FIRST_PAUSE
        else:
            self._left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        accuracy.begin_window()
        return self.is_trusted
