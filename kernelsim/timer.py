# SPDX-License-Identifier: GPL-2.0-only
"""Time, as the core sees it: two readings that are injected.

`now_ns` is the machine's time since boot: what log lines and timers go by. `wall_ns` measures how long something took
here; it only ever reaches statistics and, with the `host` profile, log lines. In library mode both stand still unless
the caller moves them, so that the same inputs give the same state.
"""

from typing import Protocol


class Clock(Protocol):
    def now_ns(self) -> int:
        """Nanoseconds since the machine was booted."""
        ...

    def wall_ns(self) -> int:
        """A monotonic reading for measuring."""
        ...


class ManualClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns

    def wall_ns(self) -> int:
        return self.ns

    def advance(self, ns: int) -> None:
        self.ns += ns
