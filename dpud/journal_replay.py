# SPDX-License-Identifier: GPL-2.0-only
"""Doing recorded turns again, on a machine that was built from the same configuration.

Nothing waits and nothing runs on its own: operations are parked between their turns (`Owner.parked`), and go on when
their next turn comes. What is read from outside is what was read then.
"""

from collections.abc import Callable, Iterable
from typing import Any

from dpud.inject import Diverged, Outside
from dpud.journal_turns import CLOSE, REQUEST, STEP, STORES, TICKS, Row, Turn, outcome_of
from dpud.owner import Owner, Slice
from fs.performer import Performer
from fs.requests import Cred

Step = Callable[[int], Any]


class Replay:
    """Of one machine: its owner, who performs requests on it, its step()."""

    def __init__(self, owner: Owner, performer: Performer, step: Step, outside: Outside) -> None:
        self._owner = owner
        self._performer = performer
        self._step = step
        self._outside = outside
        self.parked = owner.parked = owner.parked if owner.parked is not None else {}

    def run(self, turns: Iterable[Turn]) -> None:
        """All of them. Raises Diverged where one does not come to what it came to."""
        for turn in turns:
            self.run_one(turn)

    def run_one(self, turn: Turn) -> None:
        """The next turn. Raises Diverged."""
        if turn.kind == TICKS:
            self._run_ticks(turn)
            return
        if turn.kind == STORES:
            self._run_stores(turn)
            return
        self._outside.begin(turn.values)
        done: Slice | Exception
        try:
            done = self._slice(turn)
        except Diverged:
            raise
        except Exception as error:
            done = error
        self._outside.end()
        if (outcome := outcome_of(done)) != turn.outcome:
            raise Diverged(f"it came to {outcome} where it had come to {turn.outcome}")
        if not isinstance(done, Exception) and not done[0] and turn.kind in (REQUEST, STEP):
            self.parked[turn.number] = done[2], ""
            self._owner.flights.begin(turn.number, done[2])  # until it has been closed, no checkpoint is made

    def _run_ticks(self, turn: Turn) -> None:
        """Each round reads the clock, how often does not matter."""
        assert isinstance(turn.what, dict)
        for number, nr in turn.what.items():
            if number not in self.parked:
                raise Diverged(f"operation {number} is not under way")
            operation, _ = self.parked[number]
            for _ in range(nr):
                self._outside.begin(turn.values, repeats=True)
                over, waits_for, _ = self._owner.go_on(operation)
                self._outside.end()
                if over or not getattr(waits_for, "is_idle", False):
                    raise Diverged(f"operation {number} found something to do")
                self._owner.flights.went_on(number, waits_for)

    def _run_stores(self, turn: Turn) -> None:
        """What had been written into files without the machine is set."""
        assert isinstance(turn.what, str)
        self._outside.begin(turn.values)
        for value, path in map(str.split, turn.what.splitlines()):
            self._performer.settle(path, int(value))
        self._outside.end()
        self._owner.changes.go_on_from(turn.number)

    def _slice(self, turn: Turn) -> Slice:
        owner, what = self._owner, turn.what
        if isinstance(what, Row):
            owner.nr_operations = turn.number + 1
            # its name, where it is wanted, is among the values
            return owner.slice(self._performer.perform, (what.request, Cred(pid=what.pid)))
        if turn.kind == STEP:
            owner.nr_operations = turn.number + 1
            return owner.slice(self._step, (what,))
        if turn.number not in self.parked:
            raise Diverged(f"operation {turn.number} is not under way")
        operation, name = self.parked.pop(turn.number)
        if turn.kind == CLOSE:
            owner.flights.end(turn.number)
            return owner.close_operation(operation)
        try:
            done = owner.go_on(operation)
        except Exception:
            owner.flights.end(turn.number)
            raise
        if done[0]:
            owner.flights.end(turn.number)
        else:
            owner.flights.went_on(turn.number, done[1])
            self.parked[turn.number] = operation, name
        return done
