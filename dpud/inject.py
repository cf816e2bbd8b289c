# SPDX-License-Identifier: GPL-2.0-only
"""What the daemon gives to the emulated kernel, which has none of its own: time and sleep; and a note of what it gave.

The machine is a function of its configuration, of the turns that it was given and their order, and of what it read from
outside in them: clocks, how long something took, names of callers, when a device was done. All of that goes through
`Outside`, which notes it turn by turn for the journal (journal.py), and gives the same again when turns are replayed.
What is read by a thread that has no turn is no input: whoever waits without holding the machine looks at the clock too.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import TypeVar

from kernelsim.wait import WaitQueue

V = TypeVar("V", int, str)
Value = int | str
get_ident = threading.get_ident


class Diverged(Exception):
    """A replayed turn went another way than it did when it was recorded."""


class Outside:
    """Values from outside in the turn that is under way, in the order in which they were read."""

    def __init__(self) -> None:
        self._thread: int | None = None
        self._values: list[Value] = []
        self._replayed: Iterator[Value] | None = None
        self._repeats = False

    @property
    def replaying(self) -> bool:
        """Is the turn under way being done again?"""
        return self._replayed is not None

    def begin(self, replayed: Sequence[Value] | None = None, *, repeats: bool = False) -> None:
        """A turn of the calling thread begins; with `replayed`, one whose values are known.

        `repeats`: the one value is given as often as it is asked for.
        """
        self._values = []
        self._repeats = repeats
        self._replayed = None if replayed is None else repeat(replayed[0]) if repeats else iter(replayed)
        self._thread = get_ident()

    def end(self) -> list[Value]:
        """The turn is over -> what was read in it. Raises Diverged if a replayed one has read less than it did."""
        self._thread = None
        replayed, self._replayed = self._replayed, None
        if replayed is not None and not self._repeats and next(replayed, None) is not None:
            raise Diverged("it read less from outside")
        return self._values

    def take(self, read: Callable[[], V]) -> V:
        """What `read` gives now, or gave then."""
        if get_ident() != self._thread:
            return read()
        if self._replayed is None:
            value = read()
            self._values.append(value)
            return value
        return self._next()  # type: ignore[return-value]

    def _next(self) -> Value:
        assert self._replayed is not None
        value = next(self._replayed, None)
        if value is None:
            raise Diverged("it read more from outside")
        return value


class LiveClock:
    """A kernelsim.timer.Clock: the host's. The machine counts as booted when the host was.

    So what programs put together fits: log stamps and `dmesg -T`, /proc/uptime, and the start times of processes.
    """

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.perf_counter_ns()

    def cpu_ns(self) -> int:
        """What the calling thread has had of CPUs."""
        return time.thread_time_ns()


class NotedClock(LiveClock):
    """The same for a machine whose turns are noted. Once turns were replayed, it goes on from their end."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._ahead_ns = 0
        self._wall_ahead_ns = 0
        self._last_ns = 0
        self._last_wall_ns = 0

    def now_ns(self) -> int:
        self._last_ns = now_ns = self._outside.take(self._now_ns)
        return now_ns

    def wall_ns(self) -> int:
        self._last_wall_ns = wall_ns = self._outside.take(self._wall_ns)
        return wall_ns

    def cpu_ns(self) -> int:
        return self._outside.take(time.thread_time_ns)

    def _now_ns(self) -> int:
        return time.monotonic_ns() + self._ahead_ns

    def _wall_ns(self) -> int:
        return time.perf_counter_ns() + self._wall_ahead_ns

    def readings(self) -> tuple[int, int]:
        """The last ones: the machine's time, and that for measuring."""
        return self._last_ns, self._last_wall_ns

    def put(self, readings: tuple[int, int]) -> None:
        """As if those had been the last ones."""
        self._last_ns, self._last_wall_ns = readings

    def go_on(self) -> None:
        """From the last reading on: as after a suspend, the time in between did not pass."""
        self._ahead_ns = self._last_ns - time.monotonic_ns()
        self._wall_ahead_ns = self._last_wall_ns - time.perf_counter_ns()


def boot_time_s(clock: Callable[[], int] = time.monotonic_ns) -> int:
    """When the clock read 0, in seconds since 1970."""
    return round(time.time() - clock() / 1e9)


class Sleeper:
    """A thread as one that sleeps until it is roused. If that comes while it is awake, its next sleep ends at once."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = threading.Lock()
        self._held.acquire()

    def sleep(self, timeout_s: float) -> None:
        self._held.acquire(timeout=timeout_s)

    def rouse(self) -> None:
        try:
            self._held.release()
        except RuntimeError:
            return  # it was roused and has not slept since


_here = threading.local()


def sleeper() -> Sleeper:
    """The calling thread's."""
    found: Sleeper | None = getattr(_here, "sleeper", None)
    if found is None:
        found = _here.sleeper = Sleeper()
    return found


class BlockingWaitQueue(WaitQueue):
    """Puts the calling thread to sleep until `wake_up`, or until somebody rouses that thread.

    A waiter looks for its event while it holds the machine, but sleeps without holding it, so the wake-up may
    come in between. Each thread therefore remembers the last wake-up it knew of *before* it looked: one that
    came later ends the wait at once. (A thread's first wait knows of none, and ends at once for nothing.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.Lock()
        self._asleep: set[Sleeper] = set()
        self._nr_wakes = 0
        self._known = threading.local()

    def wait(self, timeout_s: float, /) -> bool:
        """True once woken up; False after `timeout_s`, or sooner if the thread was roused."""
        me = sleeper()
        known: int | None = getattr(self._known, "nr_wakes", None)
        with self._guard:
            if self._nr_wakes == known:
                self._asleep.add(me)
        if me in self._asleep:
            me.sleep(timeout_s)
        with self._guard:
            self._asleep.discard(me)
            self._known.nr_wakes = nr_wakes = self._nr_wakes
        return nr_wakes != known

    def wake_up(self) -> None:
        with self._guard:
            self._nr_wakes += 1
            asleep, self._asleep = self._asleep, set()
        for thread in asleep:
            thread.rouse()
        super().wake_up()
