# SPDX-License-Identifier: MIT
"""Time of the data path: read and slept on through a Clock that is passed in.

ManualClock  library mode: sleeping moves it, so a run takes no time and always the same
RealClock    sleeping sleeps
PacedClock   the daemon's: sleeping only notes how far ahead of real time the device is; whoever can wait without
             holding the machine waits later (`debt`). What comes next is queued behind it, as on a busy device.
"""

import time
from collections.abc import Callable
from typing import Protocol

_NS = 1_000_000_000


class Clock(Protocol):
    def now_ns(self) -> int:
        """Nanoseconds since some fixed moment; never goes back."""
        ...

    def sleep_until(self, ns: int, /) -> None:
        """Returns when `now_ns() >= ns`; at once if that is in the past."""
        ...


class ManualClock:
    """Time that moves when told to, or when somebody sleeps."""

    def __init__(self, ns: int = 0) -> None:
        self._ns = ns

    def now_ns(self) -> int:
        return self._ns

    def sleep_until(self, ns: int) -> None:
        self._ns = max(self._ns, ns)

    def advance(self, ns: int) -> None:
        self._ns += ns


class RealClock:
    """The host's monotonic clock."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep_until(self, ns: int) -> None:
        while (left := ns - time.monotonic_ns()) > 0:
            time.sleep(left / _NS)


class PacedClock:
    """Real time, as `real_ns` has it, or later where the device has more to do than real time had room for.

    `cpu_ns`: what of it the thread that asks was running.
    """

    def __init__(
        self, real_ns: Callable[[], int] = time.monotonic_ns, cpu_ns: Callable[[], int] = time.thread_time_ns
    ) -> None:
        self.real_ns, self.cpu_ns = real_ns, cpu_ns
        self._ahead_ns = 0

    def now_ns(self) -> int:
        return max(self.real_ns(), self._ahead_ns)

    def sleep_until(self, ns: int) -> None:
        self._ahead_ns = max(self._ahead_ns, ns)

    def debt(self) -> "Debt":
        """What is left to wait until real time has come to where the device is now."""
        return self.until(self._ahead_ns)

    def until(self, ns: int, *, is_idle: bool = False) -> "Debt":
        """What is left to wait until real time has come to `ns`. `is_idle`: see Debt."""
        return Debt(ns, self.real_ns, is_idle)


class Debt:
    """A kernelsim.operation.Waitable: over once real time has come to `deadline_ns`.

    `is_idle`: who waits has found nothing to do, in a round that comes to the same whatever the time.
    """

    def __init__(self, deadline_ns: int, real_ns: Callable[[], int] = time.monotonic_ns, is_idle: bool = False) -> None:
        self._deadline_ns = deadline_ns
        self.is_idle = is_idle
        self._real_ns = real_ns

    @property
    def is_over(self) -> bool:
        return self._real_ns() >= self._deadline_ns

    def wait(self, timeout_s: float, /) -> bool:
        left_s = (self._deadline_ns - self._real_ns()) / _NS
        if left_s > 0:
            time.sleep(min(left_s, timeout_s))
        return self.is_over
