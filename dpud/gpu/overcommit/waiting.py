# SPDX-License-Identifier: MIT
"""Requests that wait for memory: who is next, and how they wait.

Order: the higher rank first, within one rank who came first. A request's rank is its priority plus one for each
AGEING_NS that it has waited, so nobody waits behind newcomers for ever: after at most 101 steps it outranks them all.
Nobody passes the first one, however small: else a large request would starve.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dpud.gpu.clock import Clock
from dpud.gpu.overcommit.account import Grant
from kernelsim.wait import WaitQueue

AGEING_NS = 1_000_000_000
_NS_PER_S = 1_000_000_000


@dataclass(eq=False)
class Ticket:
    """One request."""

    client: str
    nr_bytes: int
    priority: int
    location: int
    since_ns: int
    deadline_ns: int
    number: int
    """Requests are numbered as they come."""
    may_wait: bool
    """Else it is here only while it is asked."""
    grant: Grant | None = None

    def rank(self, now_ns: int) -> int:
        return self.priority + (now_ns - self.since_ns) // AGEING_NS


class Line:
    """All who wait, for all locations."""

    def __init__(self) -> None:
        self._tickets: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._tickets)

    def join(self, ticket: Ticket) -> None:
        self._tickets.append(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Does nothing for one who left already."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def of(self, client: str) -> list[Ticket]:
        """One client's."""
        return [ticket for ticket in self._tickets if ticket.client == client]

    def in_order(self, now_ns: int) -> Iterator[Ticket]:
        """Those whose time is not over."""
        alive = [ticket for ticket in self._tickets if not ticket.may_wait or now_ns < ticket.deadline_ns]
        yield from sorted(alive, key=lambda ticket: (-ticket.rank(now_ns), ticket.number))


class ClockQueue(WaitQueue):
    """Library mode: nobody else can wake us, so waiting is letting time pass."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout_s: float, /) -> bool:
        self._clock.sleep_until(self._clock.now_ns() + round(timeout_s * _NS_PER_S))
        return True


class Turn:
    """A kernelsim.operation.Waitable: something changed, or the deadline is here."""

    def __init__(self, queue: WaitQueue, clock: Clock, deadline_ns: int) -> None:
        self._queue, self._clock, self._deadline_ns = queue, clock, deadline_ns

    def wait(self, timeout_s: float, /) -> bool:
        left_s = (self._deadline_ns - self._clock.now_ns()) / _NS_PER_S
        if left_s <= 0:
            return True
        return self._queue.wait(min(timeout_s, left_s)) or self._clock.now_ns() >= self._deadline_ns
