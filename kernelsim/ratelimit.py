# SPDX-License-Identifier: GPL-2.0-only
"""So many messages in so much time (lib/ratelimit.c).

A burst is let through at once; what comes after it in the same interval is counted and dropped. The next interval
begins with the first message after the old one, and says first how many were missed.
"""

from collections.abc import Callable

DEFAULT_RATELIMIT_INTERVAL_NS = 5_000_000_000
DEFAULT_RATELIMIT_BURST = 10


class Ratelimit:
    """struct ratelimit_state. An interval of 0 or less limits nothing; a burst of 0 or less lets nothing through."""

    def __init__(
        self,
        now_ns: Callable[[], int],
        interval_ns: int = DEFAULT_RATELIMIT_INTERVAL_NS,
        burst: int = DEFAULT_RATELIMIT_BURST,
        missed: Callable[[int], object] | None = None,
    ) -> None:
        """`missed(nr)` is told at the start of an interval how many the last one dropped (RATELIMIT_MSG_ON_RELEASE:
        leave it out, and ask `take_missed` in the end)."""
        self.interval_ns = interval_ns
        self.burst = burst
        self._now_ns = now_ns
        self._missed = missed
        self._begin_ns: int | None = None
        self._nr_printed = 0
        self._nr_missed = 0

    def __call__(self) -> bool:
        """___ratelimit(): may this message go out?"""
        if self.interval_ns <= 0:
            return True
        now_ns = self._now_ns()
        if self._begin_ns is None or now_ns >= self._begin_ns + self.interval_ns:
            if self._missed is not None and (nr_missed := self.take_missed()):
                self._missed(nr_missed)
            self._begin_ns, self._nr_printed = now_ns, 0
        if self._nr_printed < self.burst:
            self._nr_printed += 1
            return True
        self._nr_missed += 1
        return False

    def take_missed(self) -> int:
        """How many were dropped since this was last asked."""
        nr_missed, self._nr_missed = self._nr_missed, 0
        return nr_missed
