# SPDX-License-Identifier: MIT
"""Prefetching only as long as it pays: what is brought in for nothing costs a read, a decompression, and the room of a
page that is used.

Of every WINDOW pages brought in, MIN_SHARE have to have been used by the next fault after that; else nothing is guessed
for a number of faults, which doubles each time in a row. MIN_SHARE is where a prefetched page is as likely of use as
not; the other numbers are ours, uncalibrated. NVIDIA's driver has a coarser rule: none while a block thrashes.
"""

from collections.abc import Sequence

from dpud.gpu.swap.accuracy import PrefetchAccuracy
from dpud.gpu.swap.prefetch import Prefetcher, Resident

WINDOW = 256
MIN_SHARE = 0.5
FIRST_PAUSE = 64
LONGEST_PAUSE = 4096


class Gate(Prefetcher):
    """Another prefetcher, when it is of use."""

    def __init__(self, inner: Prefetcher, accuracy: PrefetchAccuracy) -> None:
        self.inner = inner
        self.accuracy = accuracy
        self.nr_skipped = 0
        """Faults for which nothing was guessed."""
        self._left = 0
        self._pause = FIRST_PAUSE
        self._mark()

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        if self._left:
            self._left -= 1
            self.nr_skipped += 1
            return ()
        if self.accuracy.nr_issued - self._issued >= WINDOW:
            self._judge()
        return self.inner.on_fault(first_key, nr_pages, page, resident)

    def _judge(self) -> None:
        accuracy = self.accuracy
        share = (accuracy.nr_used - self._used) / (accuracy.nr_issued - self._issued)
        if share < MIN_SHARE:
            self._left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        else:
            self._pause = FIRST_PAUSE
        self._mark()

    def _mark(self) -> None:
        self._issued, self._used = self.accuracy.nr_issued, self.accuracy.nr_used
