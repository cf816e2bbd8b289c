# SPDX-License-Identifier: MIT
"""How good prefetching is, counted as it happens.

accuracy   of the pages that were brought in unasked, those that were used before they left again
coverage   of the pages that were used and were not there, those that had been brought in unasked:
           used / (used + missed)

A page that was brought in and not used yet counts as issued only. Its fate is known when it is used, or missing again.

A window has counts of its own, of the pages that were brought in since it was begun: an older page's use says nothing
about them.
"""

from collections.abc import Iterable


class PrefetchAccuracy:
    """Counters."""

    def __init__(self) -> None:
        self._waiting: dict[int, int] = {}  # key -> window
        self._window = 0
        self.nr_window_issued = 0
        self.nr_window_used = 0
        self.nr_issued = 0
        self.nr_used = 0
        self.nr_wasted = 0
        self.nr_missed = 0

    def begin_window(self) -> None:
        self._window += 1
        self.nr_window_issued = self.nr_window_used = 0

    def prefetched(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._waiting[key] = self._window
            self.nr_issued += 1
            self.nr_window_issued += 1

    def accessed(self, keys: Iterable[int]) -> None:
        if self._waiting:
            for key in self._waiting.keys() & set(keys):
                self.nr_window_used += self._waiting.pop(key) == self._window
                self.nr_used += 1

    def missed(self, keys: Iterable[int]) -> None:
        """Somebody waited for these."""
        for key in keys:
            self.nr_missed += 1
            if self._waiting.pop(key, None) is not None:
                self.nr_wasted += 1

    @property
    def accuracy(self) -> float:
        """0..1; 0 while nothing was issued."""
        return self.nr_used / self.nr_issued if self.nr_issued else 0.0

    @property
    def coverage(self) -> float:
        """0..1; 0 while nothing was missing."""
        total = self.nr_used + self.nr_missed
        return self.nr_used / total if total else 0.0
