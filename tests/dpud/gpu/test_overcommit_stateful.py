# SPDX-License-Identifier: GPL-2.0-only
"""Anything that clients can ask of Admission, against a ledger kept beside it.

The ledger knows what was promised and who waits; it knows nothing of peaks. What is always true of any prediction:
nobody is promised more than can hold bytes, or what is reserved for others; nobody passes; everything adds up.
"""

import errno
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.overcommit import POLICIES, Admission, Grant
from dpud.gpu.overcommit.waiting import AGEING_NS, Ticket

NS = 1_000_000_000
CLIENTS = st.sampled_from(["ann", "bob", "cid", "dot"])
PRIORITIES = st.integers(0, 5)
PHYSICAL, STORES = 1000, 600


class Supply:
    """Memory and stores in which clients' bytes lie."""

    def __init__(self) -> None:
        self.used: dict[str, int] = {}
        self.store_limit = STORES

    def free_bytes(self, _location: int) -> int:
        return max(0, PHYSICAL - sum(self.used.values()))

    def swap_bytes(self) -> int:
        return 0

    def pool_bytes(self, _nr_new_bytes: int = 0) -> int:
        stored = max(0, sum(self.used.values()) - PHYSICAL)
        return max(0, self.store_limit - stored)

    def broken_bytes(self) -> int:
        return 0

    @property
    def can_hold(self) -> int:
        return self.free_bytes(0) + self.pool_bytes()


@dataclass(eq=False)
class Waiting:
    operation: Generator[Any, None, Grant]
    client: str
    nr: int
    priority: int
    at: int
    until: int
    number: int

    def rank(self, now: int) -> int:
        return self.priority + (now - self.at) // AGEING_NS


class Watched(Admission):
    """Shows each grant at the moment it is given."""

    def __init__(self, ledger: "Ledger") -> None:
        super().__init__(PHYSICAL, ledger.clock, ratio_percent=300)
        self._ledger = ledger

    def _give(self, ticket: Ticket) -> None:
        self._ledger.judge(ticket)
        super()._give(ticket)


class Ledger(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.admission = Watched(self)
        self.supply = Supply()
        self.admission.connect(self.supply)
        self.grants: list[Grant] = []
        self.waiting: list[Waiting] = []
        self.promised_for: dict[int, int] = {}
        self.nr_failed = 0

    def kept_for_others(self, client: str) -> int:
        accounts = self.admission.accounts.values()
        return sum(max(0, a.reservation_bytes - a.nr_used) for a in accounts if a.client != client)

    def judge(self, ticket: Ticket) -> None:
        """A grant is about to be given."""
        can_hold = self.supply.can_hold
        assert ticket.nr_bytes <= can_hold - self.kept_for_others(ticket.client)
        now = self.clock.now_ns()
        outranked = [w for w in self.waiting if now < w.until and w.rank(now) > ticket.rank(now)]
        assert not [w for w in outranked if self.is_waiting(w)]

    def is_waiting(self, waiting: Waiting) -> bool:
        return any(ticket.number == waiting.number for ticket in self.admission.line.in_order(self.clock.now_ns()))

    @rule(client=CLIENTS, nr=st.integers(1, 900), priority=PRIORITIES, timeout_s=st.sampled_from([0, 0, 1, 5, 60]))
    def request(self, client: str, nr: int, priority: int, timeout_s: int) -> None:
        now = self.clock.now_ns()
        operation = self.admission.request(client, nr, priority, timeout_s * NS)

        def own() -> int:
            return max(priority, self.admission.account(client).own_priority)

        try:
            next(operation)
        except StopIteration as stop:
            assert not [w for w in self.waiting if now < w.until and w.rank(now) >= own()]
            self.grants.append(stop.value)
        except GpuError as error:
            self.expect(error, errno.ENOMEM)
            self.nr_failed += 1
        else:
            assert timeout_s
            number = max(ticket.number for ticket in self.admission.line.in_order(now))
            self.waiting.append(Waiting(operation, client, nr, own(), now, now + timeout_s * NS, number))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A client is interrupted while it waits."""
        self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1))).operation.close()
        self.look()

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        grant = self.grants.pop(data.draw(st.integers(0, len(self.grants) - 1)))
        rest = sum(g.nr_bytes for g in self.grants if g.client == grant.client)
        self.use(grant.client, min(self.supply.used.get(grant.client, 0), rest))
        self.admission.release(grant)
        self.look()

    @precondition(lambda self: self.grants)
    @rule(client=CLIENTS, share=st.floats(0, 1))
    def write(self, client: str, share: float) -> None:
        """First writes, as far as `charge` lets them."""
        granted = sum(g.nr_bytes for g in self.grants if g.client == client)
        more = int(share * (granted - self.supply.used.get(client, 0)))
        can_hold = self.supply.can_hold
        if more <= 0 or more > can_hold:
            return
        kept = self.kept_for_others(client)
        if self.admission.has_room(client, more):
            account = self.admission.account(client)
            assert more <= max(can_hold - kept, account.reservation_bytes - account.nr_used)
            self.use(client, self.supply.used.get(client, 0) + more)
        self.look()

    def use(self, client: str, nr: int) -> None:
        self.supply.used[client] = nr
        in_memory = min(nr, PHYSICAL)
        self.admission.usage(client, in_memory, min(nr, 10), self.clock.now_ns(), nr - in_memory)
        self.admission.pump()

    @rule(seconds=st.integers(1, 40))
    def pass_time(self, seconds: int) -> None:
        self.clock.advance(seconds * NS)
        for client in self.admission.accounts:
            self.use(client, self.supply.used.get(client, 0))
        self.look()

    @rule(client=CLIENTS, priority=PRIORITIES)
    def own_priority(self, client: str, priority: int) -> None:
        self.admission.account(client).own_priority = priority
        self.admission.pump()  # as the file does: a lower priority may make room for who waits
        self.look()

    @rule(policy=st.sampled_from(sorted(POLICIES)))
    def change_policy(self, policy: str) -> None:
        self.admission.policy = policy
        self.admission.pump()
        self.look()

    @rule(ratio=st.floats(0.5, 4))
    def compress(self, ratio: float) -> None:
        self.admission.compressibility(ratio)
        self.admission.pump()
        assert 1 <= self.admission.measured_compressibility <= max(4, ratio)
        self.look()

    @rule(client=CLIENTS, nr=st.integers(0, 400))
    def reserve(self, client: str, nr: int) -> None:
        try:
            self.admission.reserve(client, nr)
        except GpuError as error:
            self.expect(error, errno.ENOMEM)
        self.look()

    @staticmethod
    def expect(error: GpuError, number: int) -> None:
        assert error.errno == number

    def look(self) -> None:
        """What became of those who wait."""
        still = []
        for waiting in self.waiting:
            try:
                next(waiting.operation)
            except StopIteration as stop:
                self.grants.append(stop.value)
            except GpuError as error:
                self.expect(error, errno.ETIMEDOUT)
                assert self.clock.now_ns() >= waiting.until
                self.nr_failed += 1
            else:
                assert self.clock.now_ns() < waiting.until
                still.append(waiting)
        self.waiting = still

    @invariant()
    def it_adds_up(self) -> None:
        assert self.admission.nr_granted == sum(grant.nr_bytes for grant in self.grants)
        assert self.admission.nr_granted <= self.admission.limit_bytes
        for account in self.admission.accounts.values():
            assert sorted(map(id, account.grants)) == sorted(id(g) for g in self.grants if g.client == account.client)
            assert account.nr_used <= account.peak_bytes(self.admission.policy)
            assert account.peak_bytes(self.admission.policy) <= max(account.nr_granted, account.nr_used)
        assert len(self.admission.line) == len(self.waiting)
        events = self.admission.events
        assert events["granted"] - events["released"] == len(self.grants)
        assert events["refused"] + events["timed_out"] == self.nr_failed

    @invariant()
    def who_is_first_would_not_fit(self) -> None:
        """Nobody waits without a reason."""
        now = self.clock.now_ns()
        alive = [w for w in self.waiting if now < w.until]
        if alive:
            first = max(alive, key=lambda w: (w.rank(now), -w.at, -self.waiting.index(w)))
            self.admission.pump()
            account = self.admission.account(first.client)
            room = self.admission.room_bytes(first.priority, 0, account)
            full = self.admission.nr_granted + first.nr > self.admission.limit_bytes
            assert first.nr > room or full

    @invariant()
    def reclaim_order_is_by_priority(self) -> None:
        accounts = self.admission.accounts
        resident = {client: account.nr_resident for client, account in accounts.items()}
        for need, priority in ((1, 0), (500, 3), (10_000, 5)):
            order = self.admission.reclaim_order(need, priority, resident)
            ranks = [accounts[client].priority for client, _ in order]
            assert ranks == sorted(ranks)
            assert all(rank <= priority for rank in ranks)
            may_go = {c: max(0, a.nr_resident - a.reservation_bytes) for c, a in accounts.items()}
            available = sum(nr for c, nr in may_go.items() if accounts[c].priority <= priority)
            assert sum(nr for _, nr in order) == min(need, available)
            assert all(0 < nr <= may_go[client] for client, nr in order)
            assert len({client for client, _ in order}) == len(order)


Ledger.TestCase.settings = settings(max_examples=examples(25), stateful_step_count=30, deadline=None)
test_admission_is_a_ledger = Ledger.TestCase
