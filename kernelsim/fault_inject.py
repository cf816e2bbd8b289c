# SPDX-License-Identifier: GPL-2.0-only
"""Failing on purpose, in the manner of lib/fault-inject.c: a directory of knobs that decides which calls fail.

    probability  percent of the calls that fail; 0, the default, is off
    interval     only every Nth call is considered
    times        at most so many failures, counted down; -1: no limit
    space        the sizes of that many pages' worth of calls pass first, counted down
    verbose      0: do not log the failures
    nth          N > 0: the Nth call from now on fails, whatever the others say; counted down to 0

As in Linux probability, interval, times and space must all agree, and are looked at in the kernel's order. `nth` is
/proc/self/fail-nth, here for each fault point; there is no task-filter, because no task is behind a batch.

Differences from Linux: chance comes from `seed`, so that the same writes give the same failures; `injected` counts
them; `move` says where in a batch the fault strikes, and a batch that is not that long is no call at all.
"""

from collections.abc import Callable

import numpy as np

from kernelsim.attr import Attr, Int, Kobject

_INT_MAX = 2**31 - 1


class FaultAttr(Kobject):
    """One fault point of batches (struct fault_attr), and its directory `name`."""

    probability = Attr(Int(0, 100), 0, doc="Percent of the batches that meet the fault; 0 is off.")
    interval = Attr(Int(0, _INT_MAX), 1, doc="Only every Nth batch is considered.")
    times = Attr(Int(-1, _INT_MAX), 1, doc="At most so many more faults; -1: no limit.")
    space = Attr(Int(0, _INT_MAX), 0, doc="So many moves pass before any batch is considered; counted down.")
    verbose = Attr(Int(0, 2), 1, doc="0: faults are not logged when they are injected.")
    nth = Attr(Int(0, _INT_MAX), 0, doc="The Nth batch from now on meets the fault, whatever the other files say.")
    seed = Attr(Int(0, _INT_MAX), 0, doc="Where `probability` draws from; writing it starts the sequence anew.")
    move = Attr(Int(0, _INT_MAX), 0, doc="Index of the move that the fault strikes at, from 0.")
    injected = Attr(Int(0, _INT_MAX), doc="Faults injected so far.")

    def __init__(self, name: str, report: Callable[[str], object] | None = None) -> None:
        """`report` takes the lines for the kernel log."""
        self.name = name
        self.report = report
        self.nr_injected = 0
        self._nr_calls = 0
        self._rng = np.random.default_rng(0)

    @seed.stored
    def _reseed(self, _old: int, new: int) -> None:
        self._rng = np.random.default_rng(new)

    @injected.show
    def _injected(self) -> int:
        return self.nr_injected

    def arm(self, move: int = 0, times: int = 1) -> None:
        """Let the next `times` batches that come as far as `move` meet the fault; -1: all of them, 0: none."""
        self.probability, self.times, self.move = 100, times, move

    @property
    def armed(self) -> bool:
        """Has anything been asked of it? Every batch asks every point, so it must be quick: no descriptors."""
        values = self.__dict__
        return bool(values.get("probability") or values.get("nth"))

    def should_fail(self, nr_moves: int) -> bool:
        """Does a batch of `nr_moves` meet the fault? Counts it, and logs it if so."""
        if self.move >= nr_moves:
            return False
        by_number = self._counted_down()
        if not by_number and not self._by_chance(nr_moves):
            return False
        if self.verbose and self.report:
            self.report("FAULT_INJECTION: forcing a failure.")
            self.report(
                f"name {self.name}, interval {self.interval}, probability {self.probability}, "
                f"space {self.space}, times {self.times}"
            )
        if self.times > 0 and not by_number:
            self.times -= 1
        self.nr_injected += 1
        return True

    def _counted_down(self) -> bool:
        if self.nth == 0:
            return False
        self.nth -= 1
        return self.nth == 0

    def _by_chance(self, nr_moves: int) -> bool:
        """should_fail_ex()."""
        if self.probability == 0 or self.times == 0:
            return False
        if self.space > nr_moves:
            self.space -= nr_moves
            return False
        if self.interval > 1:
            self._nr_calls += 1
            if self._nr_calls % self.interval:
                return False
        return self.probability > int(self._rng.integers(100))
