# SPDX-License-Identifier: GPL-2.0-only
"""What the daemon gives to the emulated kernel, which has none of its own: time and sleep."""

import threading
import time

from kernelsim.wait import WaitQueue


class LiveClock:
    """A kernelsim.timer.Clock: the host's. The machine counts as booted when the host was.

    So what programs put together fits: log stamps and `dmesg -T`, /proc/uptime, and the start times of processes.
    """

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.perf_counter_ns()


def boot_time_s() -> int:
    """When the clock read 0, in seconds since 1970."""
    return round(time.time() - time.monotonic())


class BlockingWaitQueue(WaitQueue):
    """Puts the calling thread to sleep until `wake_up`.

    A waiter looks for its event while it holds the machine, but sleeps without holding it, so the wake-up may
    come in between. Each thread therefore remembers the last wake-up it knew of *before* it looked: one that
    came later ends the wait at once. (A thread's first wait knows of none, and ends at once for nothing.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._woken = threading.Condition()
        self._nr_wakes = 0
        self._known = threading.local()

    def wait(self, timeout_s: float, /) -> bool:
        known: int | None = getattr(self._known, "nr_wakes", None)
        with self._woken:
            came = self._woken.wait_for(lambda: self._nr_wakes != known, timeout_s)
            self._known.nr_wakes = self._nr_wakes
        return came

    def wake_up(self) -> None:
        with self._woken:
            self._nr_wakes += 1
            self._woken.notify_all()
        super().wake_up()
