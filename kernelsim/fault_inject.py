# SPDX-License-Identifier: GPL-2.0-only
"""Failing on purpose, in the manner of lib/fault-inject.c: a directory of knobs that decides which calls fail.

    probability  percent of the calls that fail; 0, the default, is off
    interval     only every Nth call is considered
    times        at most so many failures, counted down; -1: no limit
    space        calls of that size altogether pass first, counted down
    verbose      0: do not log the failures
    verbose_ratelimit_interval_ms, verbose_ratelimit_burst
                 of those logged, at most so many in that time; 0, the default: all
    nth          N > 0: the Nth call from now on fails, whatever the others say; counted down to 0

As in Linux probability, interval, times and space must all agree, and are looked at in the kernel's order. `nth` is
/proc/self/fail-nth, here for each fault point.

Differences from Linux: chance comes from `seed`, so that the same writes give the same failures; `injected` counts
them. There is no task-filter, because there is no make-it-fail in /proc/PID to go with it, and no stacktrace-depth.
The fault points of batches also have `move`: where in a batch the fault strikes; a batch that is not that long is no
call at all.
"""

from collections.abc import Callable

import numpy as np

from kernelsim.attr import Attr, Int, Kobject
from kernelsim.ratelimit import DEFAULT_RATELIMIT_BURST, Ratelimit

_INT_MAX = 2**31 - 1
_UINT_MAX = 2**32 - 1


class FaultAttr(Kobject):
    """One fault point (struct fault_attr), and its directory `name`."""

    probability = Attr(Int(0, 100), 0, doc="Percent of the calls that fail; 0 is off.", mode=0o600)
    interval = Attr(Int(0, _INT_MAX), 1, doc="Only every Nth call is considered.", mode=0o600)
    times = Attr(Int(-1, _INT_MAX), 1, doc="At most so many more failures; -1: no limit.", mode=0o600)
    space = Attr(
        Int(0, _INT_MAX),
        0,
        doc="Calls of that size altogether (pages, moves) pass before any is considered; counted down.",
        mode=0o600,
    )
    verbose = Attr(Int(0, 2), 1, doc="0: failures are not logged when they are injected.", mode=0o600)
    verbose_ratelimit_interval_ms = Attr(
        Int(0, _UINT_MAX), 0, doc="Milliseconds in which a burst of failures is logged; 0: all are.", mode=0o600
    )
    verbose_ratelimit_burst = Attr(
        Int(0, _INT_MAX), DEFAULT_RATELIMIT_BURST, doc="How many failures are a burst.", mode=0o600
    )
    nth = Attr(Int(0, _INT_MAX), 0, doc="The Nth call from now on fails, whatever the other files say.", mode=0o600)
    seed = Attr(
        Int(0, _INT_MAX), 0, doc="Where `probability` draws from; writing it starts the sequence anew.", mode=0o600
    )
    injected = Attr(Int(0, _INT_MAX), doc="Failures injected so far.")

    def __init__(
        self, name: str, report: Callable[[str], object] | None = None, now_ns: Callable[[], int] = lambda: 0
    ) -> None:
        """`report` takes the lines for the kernel log."""
        self.name = name
        self.report = report
        self.nr_injected = 0
        self._nr_calls = 0
        self._rng = np.random.default_rng(0)
        self.ratelimit = Ratelimit(now_ns, 0)

    @seed.stored
    def _reseed(self, _old: int, new: int) -> None:
        self._rng = np.random.default_rng(new)

    @verbose_ratelimit_interval_ms.stored
    def _set_ratelimit_interval(self, _old: int, new: int) -> None:
        self.ratelimit.interval_ns = new * 1_000_000

    @verbose_ratelimit_burst.stored
    def _set_ratelimit_burst(self, _old: int, new: int) -> None:
        self.ratelimit.burst = new

    @injected.show
    def _injected(self) -> int:
        return self.nr_injected

    @property
    def armed(self) -> bool:
        """Has anything been asked of it? Every call asks, so it must be quick: no descriptors."""
        values = self.__dict__
        return bool(values.get("probability") or values.get("nth"))

    def should_fail(self, size: int, nowarn: bool = False) -> bool:
        """Does a call of `size` fail? Counts it, and logs it unless told not to (FAULT_NOWARN)."""
        by_number = self._counted_down()
        if not by_number and not self._by_chance(size):
            return False
        if not nowarn:
            self._fail_dump()
        if self.times > 0 and not by_number:
            self.times -= 1
        self.nr_injected += 1
        return True

    def _fail_dump(self) -> None:
        if self.verbose and self.report and self.ratelimit():
            self.report("FAULT_INJECTION: forcing a failure.")
            self.report(
                f"name {self.name}, interval {self.interval}, probability {self.probability}, "
                f"space {self.space}, times {self.times}"
            )

    def _counted_down(self) -> bool:
        if self.nth == 0:
            return False
        self.nth -= 1
        return self.nth == 0

    def _by_chance(self, size: int) -> bool:
        """should_fail_ex()."""
        if self.probability == 0 or self.times == 0:
            return False
        if self.space > size:
            self.space -= size
            return False
        if self.interval > 1:
            self._nr_calls += 1
            if self._nr_calls % self.interval:
                return False
        return self.probability > int(self._rng.integers(100))


class BatchFaultAttr(FaultAttr):
    """A fault point of batches of moves; `space` counts moves."""

    move = Attr(Int(0, _INT_MAX), 0, doc="Index of the move that the fault strikes at, from 0.", mode=0o600)

    def arm(self, move: int = 0, times: int = 1) -> None:
        """Let the next `times` batches that come as far as `move` meet the fault; -1: all of them, 0: none."""
        self.probability, self.times, self.move = 100, times, move

    def should_fail(self, size: int, nowarn: bool = False) -> bool:
        """Does a batch of `size` moves meet the fault?"""
        return self.move < size and super().should_fail(size, nowarn)
