# SPDX-License-Identifier: MIT
"""Admission: who is promised memory, and how much more of it than there is.

Theory of operation
    What can be honoured is what can hold bytes now: free memory, and room in the stores behind it for bytes of which
    not one compresses (`Supply`): what a new grant will hold is nobody's history. From it goes what others are expected
    to take yet:

        room(priority) = supply - growth of clients of the same or a higher priority, as the policy predicts it
                                - what is left of the reservations of clients of a lower one

    What of that free memory and swap cannot take goes to the pool, and there takes as much less as pages have been
    measured to compress. What compression has already saved is room like any other.

    (Policy `static` makes no such differences: it expects all that was granted to be used, whoever has it, and nothing
    of it to compress.)

    A request is granted if it is not more than that, if all grants together stay below `ratio` percent of the devices'
    memory, and the client's below its `limit`. Else it waits its turn (waiting.py), or fails. Bytes that a client has
    written are in no one's room: a higher priority gets a lower one's memory, never its bytes, which go to the stores.

    A prediction can be wrong, and what was written can be overwritten with what compresses worse. Then there is less
    than was promised. `has_room` decides who notices: before a page gets bytes for the first time, it has to fit beside
    what is left of others' reservations and the growth of higher priorities. So the lowest priority is refused first,
    and only new pages are. The same happens where memory breaks: what is retired or lost is no supply any more, and
    `ratio` is of what is whole; what was promised on a lost device is promised on the one that took over.

Invariants
    - a grant, at the moment it is given, is at most the supply less all that is reserved for others;
    - an account's nr_granted is the sum of its grants; nr_granted here is the sum of all accounts';
    - no request is granted before one that waits for the same location with the same or a higher rank.

docs/exhaustion.md says all this from the clients' side.
"""

import errno
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from dpud.gpu.clock import Clock, ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.overcommit.account import Account, Grant
from dpud.gpu.overcommit.growth import Together
from dpud.gpu.overcommit.predictor import HISTORY, POLICIES, SAMPLE_NS, STATIC
from dpud.gpu.overcommit.pressure import PressureStall
from dpud.gpu.overcommit.reclaim import reclaim_order
from dpud.gpu.overcommit.waiting import ClockQueue, Line, Ticket, Turn
from dpud.gpu.performance import performance
from kernelsim.operation import Operation
from kernelsim.wait import WaitQueue

DEFAULT_RATIO_PERCENT = 1000
_RISE = 0.1
"""How much of a better compressibility is believed each sample period; a worse one is believed at once."""

EVENTS = ("granted", "released", "queued", "refused", "timed_out")

log = logging.getLogger("dpud.gpu.overcommit")


class Supply(Protocol):
    """What is left to hold bytes. A lower priority's page can be reclaimed only into the stores, so what is reclaimable
    is bounded by them and needs no count of its own."""

    def free_bytes(self, location: int, /) -> int:
        """Free memory of one location."""
        ...

    def swap_bytes(self) -> int:
        """Raw bytes that swap behind it can still take. Negative: nothing, and free memory is needed to bring back what
        is in the stores."""
        ...

    def pool_bytes(self, nr_new_bytes: int = 0, /) -> int:
        """Bytes that the pool can still take if they do not compress at all, once so many more are promised."""
        ...

    def broken_bytes(self) -> int:
        """Of the devices' memory, what is out of use: retired pages, devices that are lost."""
        ...


class _Alone:
    """The supply of an admission without a data path: memory less what clients said they use."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission

    def free_bytes(self, _location: int) -> int:
        used = sum(account.nr_used for account in self._admission.accounts.values())
        return max(0, self._admission.physical_bytes - used)

    def swap_bytes(self) -> int:
        return 0

    def pool_bytes(self, _nr_new_bytes: int = 0) -> int:
        return 0

    def broken_bytes(self) -> int:
        return 0


class Admission:
    """Promises of `physical_bytes` of device memory and what is behind it. Sizes in bytes, times in ns of `clock`."""

    def __init__(
        self,
        physical_bytes: int,
        clock: Clock | None = None,
        *,
        ratio_percent: int = DEFAULT_RATIO_PERCENT,
        policy: str = HISTORY,
        waiters: WaitQueue | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise GpuError(errno.EINVAL, f"no policy {policy!r}: there are {', '.join(POLICIES)}")
        self._physical_bytes = physical_bytes
        self.clock = clock or ManualClock()
        self.ratio_percent = ratio_percent
        self.policy = policy
        self.waiters = waiters or ClockQueue(self.clock)
        self.accounts: dict[str, Account] = {}
        self.together = Together(self.clock.now_ns())
        self.line = Line()
        self.measured_compressibility = 1.0
        self.on_client: Callable[[], None] = lambda: None
        """Called when there is a new client."""
        self._rose_ns = self.clock.now_ns()
        self.events: Counter[str] = Counter(dict.fromkeys(EVENTS, 0))
        self.supply: Supply = _Alone(self)
        self._nr_requests = 0

    def connect(self, supply: Supply) -> None:
        """There is a data path."""
        self.supply = supply

    # Clients.

    def account(self, client: str) -> Account:
        """Made where there is none."""
        if client not in self.accounts:
            self.accounts[client] = Account(client, self.clock.now_ns())
            self.on_client()
        return self.accounts[client]

    def forget(self, client: str) -> None:
        """The client is gone, and all its grants were released. Those of its requests that wait are over."""
        for ticket in self.line.of(client):
            ticket.deadline_ns = self.clock.now_ns()
            self.line.leave(ticket)
        account = self.accounts.pop(client, None)
        assert account is None or not account.grants, "a client that left its grants behind"
        self.pump()

    def pressure(self, client: str) -> PressureStall:
        return self.account(client).pressure

    def reserve(self, client: str, nr_bytes: int) -> None:
        """Keep so much for a client, granted or not. Raises GpuError(ENOMEM) where there is no room for more."""
        account = self.account(client)
        before = account.reservation_bytes
        room = self.room_bytes(account.priority, account.location, account)
        account.reservation_bytes = nr_bytes
        more = account.growth_bytes(self.policy) - (account.peak_bytes(self.policy) - account.nr_used)
        fits = nr_bytes <= before or more <= room
        account.reservation_bytes = nr_bytes if fits else before
        if not fits:
            raise GpuError(errno.ENOMEM, f"{more} bytes cannot be kept for {client}, there is room for {room}")
        self.pump()

    # Room.

    @property
    def nr_granted(self) -> int:
        return sum(account.nr_granted for account in self.accounts.values())

    @property
    def physical_bytes(self) -> int:
        """Of device memory, what is whole."""
        return max(0, self._physical_bytes - self.supply.broken_bytes())

    @property
    def limit_bytes(self) -> int:
        """Of all grants together. It shrinks with what breaks; grants that there are stay."""
        return self.physical_bytes * self.ratio_percent // 100

    def supply_bytes(self, location: int = 0) -> int:
        """What can hold bytes now, if they do not compress."""
        return max(0, self.supply.free_bytes(location) + self.supply.swap_bytes() + self.supply.pool_bytes())

    def _left_bytes(self, location: int, growth: int, *, new: bool) -> int:
        """What of the supply is left, for a `new` grant or within one, once others have grown. Negative: overdrawn."""
        flat, pool = self.supply.free_bytes(location) + self.supply.swap_bytes(), self.supply.pool_bytes()
        if new:
            pool = self.supply.pool_bytes(max(0, flat) + pool)
        in_pool: float = max(0, growth - max(0, flat))
        if self.policy != STATIC:
            in_pool /= self.measured_compressibility
        return int(max(0, flat + pool) - min(growth, max(0, flat)) - in_pool)

    def room_bytes(self, priority: int, location: int = 0, asker: Account | None = None) -> int:
        """The largest request of that priority that would be granted, but for who waits. Negative: overdrawn.

        `asker` may use what it has reserved for itself and was not granted yet.
        """
        places: dict[int, list[Account]] = {location: []}
        for account in self.accounts.values():
            places.setdefault(account.location, []).append(account)
        expected = {place: self._expected(group, priority, asker) for place, group in places.items()}
        elsewhere = sum(
            max(0, growth - self.supply.free_bytes(place)) for place, growth in expected.items() if place != location
        )
        return self._left_bytes(location, expected[location] + elsewhere, new=True)

    def _expected(self, accounts: list[Account], priority: int, asker: Account | None) -> int:
        """What is not there for a request of that priority: growth, or at least what is reserved."""
        lower = [each for each in accounts if each.priority < priority and self.policy != STATIC and each is not asker]
        others = [each for each in accounts if each not in lower]
        growth = self.together.growth_bytes(others, self.policy)
        if asker in accounts:
            growth -= max(0, asker.reservation_bytes - max(asker.peak_bytes(self.policy), asker.nr_used))
        return max(0, growth) + sum(account.reserved_growth_bytes for account in lower)

    # Requests.

    def request(
        self, client: str, nr_bytes: int, priority: int = 0, timeout_ns: int = 0, location: int = 0
    ) -> Operation[Grant]:
        """A promise of memory; yields while it waits, at most `timeout_ns`.

        Raises GpuError: EINVAL; ENOMEM, at once where it could never be granted, or where it may not wait; ETIMEDOUT.
        """
        account = self.account(client)
        account.location = location
        now_ns = self.clock.now_ns()
        self._check(account, nr_bytes)
        self._nr_requests += 1
        rank = max(priority, account.own_priority)
        deadline_ns = now_ns + timeout_ns
        ticket = Ticket(client, nr_bytes, rank, location, now_ns, deadline_ns, self._nr_requests, timeout_ns > 0)
        self.line.join(ticket)
        self.pump()
        if ticket.grant is None and ticket.may_wait:
            yield from self._wait(ticket, account)
        if ticket.grant is None:
            self.line.leave(ticket)
            raise self._refused(ticket)
        return ticket.grant

    def _check(self, account: Account, nr_bytes: int) -> None:
        """What waiting would not help against."""
        if nr_bytes <= 0:
            raise GpuError(errno.EINVAL, f"a request for {nr_bytes} bytes")
        if account.limit_bytes and account.nr_granted + nr_bytes > account.limit_bytes:
            self.events["refused"] += 1
            raise GpuError(errno.ENOMEM, f"{account.client} has {account.nr_granted} of {account.limit_bytes} bytes")
        if nr_bytes > self.limit_bytes:
            self.events["refused"] += 1
            raise GpuError(errno.ENOMEM, f"{nr_bytes} bytes are more than {self.ratio_percent} % of the memory")

    def _refused(self, ticket: Ticket) -> GpuError:
        self.events["timed_out" if ticket.may_wait else "refused"] += 1
        room = max(0, self.room_bytes(ticket.priority, ticket.location))
        why = f"{ticket.nr_bytes} bytes for {ticket.client}, priority {ticket.priority}: room for {room}"
        log.info("refused: %s", why)
        return GpuError(errno.ETIMEDOUT if ticket.may_wait else errno.ENOMEM, why)

    def _wait(self, ticket: Ticket, account: Account) -> Operation[None]:
        """Until it is granted or its time is over. Who is interrupted takes nothing along."""
        self.events["queued"] += 1
        account.pressure.begin(self.clock.now_ns())
        over = False
        try:
            while ticket.grant is None and self.clock.now_ns() < ticket.deadline_ns:
                yield Turn(self.waiters, self.clock, ticket.deadline_ns)
                self.pump()
            over = True
            if ticket.grant is not None:
                performance(log, "wait for memory", ticket.nr_bytes, ticket.since_ns, self.clock.now_ns())
        finally:
            account.pressure.end(self.clock.now_ns())
            self.line.leave(ticket)
            if not over and ticket.grant is not None:
                self.release(ticket.grant)
            self.pump()

    def pump(self) -> None:
        """Grant to those whose turn it is. For whoever changed something that they may have waited for."""
        now_ns = self.clock.now_ns()
        self.together.sample(list(self.accounts.values()), now_ns)
        blocked: set[int] = set()
        nr = 0
        for ticket in list(self.line.in_order(now_ns)):
            if ticket.location in blocked:
                continue
            if not self._fits(ticket):
                blocked.add(ticket.location)
                continue
            self._give(ticket)
            nr += 1
        if nr:
            self.waiters.wake_up()

    def _fits(self, ticket: Ticket) -> bool:
        if self.nr_granted + ticket.nr_bytes > self.limit_bytes:
            return False
        account = self.account(ticket.client)
        if account.limit_bytes and account.nr_granted + ticket.nr_bytes > account.limit_bytes:
            return False
        return ticket.nr_bytes <= self.room_bytes(ticket.priority, ticket.location, account)

    def _give(self, ticket: Ticket) -> None:
        account = self.account(ticket.client)
        born = account.history.nr_samples
        ticket.grant = Grant(ticket.client, ticket.nr_bytes, ticket.priority, ticket.location, born)
        account.add(ticket.grant)
        self.line.leave(ticket)
        self.events["granted"] += 1

    def moved(self, client: str, source: int, target: int) -> None:
        """What a client was promised on one location, or waits for there, is to be on another from now on."""
        account = self.accounts.get(client)
        places: list[Account | Grant | Ticket] = [*self.line.of(client)]
        places += [] if account is None else [account, *account.grants]
        for each in places:
            if each.location == source:
                each.location = target

    def release(self, grant: Grant) -> None:
        """The memory is given back. Raises GpuError(EINVAL) for a grant that is none any more."""
        account = self.accounts.get(grant.client)
        if account is None or grant not in account.grants:
            raise GpuError(errno.EINVAL, f"{grant.client} has no such grant")
        account.remove(grant)
        self.events["released"] += 1
        self.pump()

    # What the data path tells and asks.

    def usage(
        self, client: str, nr_resident: int, nr_touched: int, now_ns: int, nr_stored: int = 0, active_ns: int = 0
    ) -> None:
        """Bytes of a client in memory, of them accessed since the last time (-1: not known), and in the stores.

        `active_ns`: when it accessed anything last.

        Call `pump` when all clients' are told.
        """
        account = self.account(client)
        account.sample(nr_resident + nr_stored, now_ns)
        account.nr_resident = nr_resident
        if nr_touched >= 0:
            account.nr_touched = nr_touched
        account.active_ns = max(account.active_ns, active_ns, now_ns if nr_touched > 0 else 0)

    def compressibility(self, ratio: float) -> None:
        """Raw bytes per byte that the pool takes for them, all overhead included; below 1 counts as 1."""
        ratio = max(1.0, ratio)
        better = ratio - self.measured_compressibility
        now_ns = self.clock.now_ns()
        if better < 0:
            self.measured_compressibility = ratio
        elif now_ns - self._rose_ns >= SAMPLE_NS:
            self.measured_compressibility += better * _RISE
            self._rose_ns = now_ns

    def has_room(self, client: str, nr_bytes: int, location: int = 0) -> bool:
        """Whether a client may write so much for the first time, beside what is kept for others."""
        asker = self.account(client)
        others = [account for account in self.accounts.values() if account is not asker]
        higher = [account for account in others if account.priority > asker.priority]
        kept = self.together.growth_bytes(higher, self.policy)
        kept += sum(account.reserved_growth_bytes for account in others if account not in higher)
        return nr_bytes <= self._left_bytes(location, kept, new=False) or nr_bytes <= asker.reserved_growth_bytes

    def reclaim_order(self, need_bytes: int, for_priority: int, resident: Mapping[str, int]) -> list[tuple[str, int]]:
        """Whose pages are to leave a memory where clients have `resident` bytes, in order: (client, bytes). Together at
        most `need_bytes`."""
        return reclaim_order(self.accounts.values(), need_bytes, for_priority, self.clock.now_ns(), resident)
