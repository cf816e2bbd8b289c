# SPDX-License-Identifier: MIT
"""QoS as one part of a GpuMemory: the Traffic that its data path asks, and lets wait.

    qos = QosModule(memory.clock)
    qos.attach(memory)
    qos.set_total(20_000_000_000)
    qos.set_client("train", limit=500_000_000)

Who waits
    Library mode: `charge` lets time pass until the bytes are granted. The daemon's clock must not, for its device is
    everybody's: a file's operation asks for `admission` first and waits there without holding the machine.

    What is done to somebody's pages (swap, demotion) waits for nobody: it makes room for another client, who must not
    have to wait for the owner's limit. So does what comes without admission in the daemon. It is owed: the owner's next
    request waits for it. (The kernel's blk-iocost calls that debt, and has it for the same reason.)

    A client that nothing limits, in a total that has no limit, is only counted.
"""

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from dpud.gpu.clock import Clock, ManualClock, PacedClock
from dpud.gpu.errors import GpuError
from dpud.gpu.qos.decisions import DecisionLog
from dpud.gpu.qos.flow import Request
from dpud.gpu.qos.policy import POLICIES
from dpud.gpu.qos.scheduler import Scheduler
from dpud.gpu.traffic import Cause, TrafficCounts
from kernelsim.operation import Operation, Waitable, complete

if TYPE_CHECKING:
    from dpud.gpu.memory import GpuMemory

_LOOK_AGAIN_NS = 50_000_000
"""How long a waiter sleeps at most: promises may change meanwhile."""

log = logging.getLogger("dpud.gpu.qos")


class _Sleep:
    """A Waitable of a clock that may be slept on."""

    def __init__(self, clock: Clock, until_ns: int) -> None:
        self._clock, self._until_ns = clock, until_ns

    def wait(self, _timeout_s: float, /) -> bool:
        self._clock.sleep_until(self._until_ns)
        return True


class QosModule(TrafficCounts):
    """A scheduler, and those who wait for it."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self.clock = clock or ManualClock()
        self.decisions = DecisionLog()
        self.scheduler = Scheduler(self.decisions)
        self._admitted: Counter[str] = Counter()
        self._acting: str | None = None
        self._work: dict[int, tuple[str, Callable[[], None]]] = {}
        self._granted: deque[Request] = deque()

    def attach(self, memory: "GpuMemory") -> None:
        """Have a GpuMemory ask this module. What it was told before stays."""
        if memory.clock is not self.clock:
            self.clock = memory.clock
            self.scheduler.begin_again()
            self.decisions.clear()
        memory.residency.traffic = self

    # What the path tells.

    def charge(self, client: str, cause: Cause, nr_bytes: int, location: int) -> None:
        if cause is Cause.ACCESS and self._acting is not None:
            client = self._acting
        super().charge(client, cause, nr_bytes, location)
        left = nr_bytes - self._take_admitted(client, nr_bytes)
        if not left or not self.scheduler.paces(client):
            return
        if cause in (Cause.SWAP, Cause.DEMOTION) or isinstance(self.clock, PacedClock):
            self.scheduler.owe(client, cause, left, self.clock.now_ns())
        else:
            complete(self.admission(client, left, cause))
            self._take_admitted(client, left)

    def admission(self, client: str, nr_bytes: int, /, cause: Cause = Cause.ACCESS) -> Operation[None]:
        """Wait until so many bytes may move, less what was admitted before and did not."""
        lacking = nr_bytes - self._admitted[client]
        if lacking <= 0 or not self.scheduler.paces(client):
            return
        request = self.scheduler.submit(client, cause, lacking, self.clock.now_ns())
        try:
            while not request.is_over:
                self._grant_all()
                if not request.is_over:
                    yield self._until_next()
        finally:
            if request.granted_ns is not None:
                self._admitted[client] += lacking
            elif not request.dropped:
                self.scheduler.cancel(request, self.clock.now_ns())

    def forget(self, client: str) -> None:
        self._admitted.pop(client, None)
        self._work = {number: work for number, work in self._work.items() if work[0] != client}
        self._granted = deque(request for request in self._granted if request.client != client)
        self.scheduler.forget(client, self.clock.now_ns())

    def _take_admitted(self, client: str, nr_bytes: int) -> int:
        """Use up what was admitted -> how much of it there was."""
        taken = min(nr_bytes, self._admitted[client]) if client in self._admitted else 0
        if taken:
            self._admitted[client] -= taken
        return taken

    def _grant_all(self) -> None:
        now_ns = self.clock.now_ns()
        while (request := self.scheduler.grant(now_ns)) is not None:
            if request.number in self._work:
                self._granted.append(request)

    def _until_next(self) -> Waitable:
        now_ns = self.clock.now_ns()
        at_ns = self.scheduler.next_ns(now_ns)
        assert at_ns is not None, "somebody waits"
        at_ns = min(at_ns, now_ns + _LOOK_AGAIN_NS)
        return self.clock.until(at_ns) if isinstance(self.clock, PacedClock) else _Sleep(self.clock, at_ns)

    # Requests that are queued, and done when their turn comes.

    def submit(self, client: str, level: int, nr_bytes: int, work: Callable[[], None]) -> Request:
        """Queue `work`, whose accesses move so many bytes, for a client that need not own the memory.

        Raises GpuError(EINVAL) for a level that is none.
        """
        if not 0 <= level < len(self.scheduler.levels):
            raise GpuError(errno.EINVAL, f"no priority level {level}")
        request = self.scheduler.submit(client, Cause.ACCESS, nr_bytes, self.clock.now_ns(), level)
        self._work[request.number] = client, work
        return request

    def run(self, until_ns: int | None = None) -> int:
        """Do what is queued, in the scheduler's order and at its times, until `until_ns` or to the end -> how many."""
        nr = 0
        while True:
            self._grant_all()
            if self._granted:
                self._do(self._granted.popleft())
                nr += 1
                continue
            at_ns = self.scheduler.next_ns(self.clock.now_ns())
            if at_ns is None or (until_ns is not None and at_ns > until_ns):
                return nr
            self.clock.sleep_until(at_ns)

    def _do(self, request: Request) -> None:
        self._admitted[request.client] += request.nr_bytes
        self._acting = request.client
        try:
            self._work.pop(request.number)[1]()
        except GpuError as error:
            log.warning("request %d of %s failed: %s", request.number, request.client, error)
        finally:
            self._acting = None

    # What it is told.

    def set_policy(self, name: str) -> None:
        """Raises GpuError(EINVAL) for a name that is none."""
        if name not in POLICIES:
            raise GpuError(errno.EINVAL, f"{name!r} is none of {', '.join(POLICIES)}")
        self.scheduler.set_policy(name, self.clock.now_ns())

    def set_total(self, rate: int | None = None, burst: int | None = None) -> None:
        """Of all clients together; bytes/s and bytes. Raises GpuError(EBUSY) for less than is reserved."""
        total = self.scheduler.total
        rate = total.rate if rate is None else rate
        if 0 < rate < self.scheduler.reserved:
            raise GpuError(errno.EBUSY, f"{self.scheduler.reserved} bytes/s are reserved")
        self.scheduler.set_total(rate, total.burst_set if burst is None else burst, self.clock.now_ns())

    def set_level(
        self, number: int, rate: int | None = None, burst: int | None = None, target_ns: int | None = None
    ) -> None:
        """Of one priority level."""
        level = self.scheduler.levels[number]
        rate = level.bucket.rate if rate is None else rate
        burst = level.bucket.burst_set if burst is None else burst
        target_ns = level.target_ns if target_ns is None else target_ns
        self.scheduler.set_level(number, rate, burst, target_ns, self.clock.now_ns())

    def set_client(self, name: str, **changes: int) -> None:
        """reservation, limit (bytes/s), burst (bytes), share (1 to 10000), level (0 to 4).

        Raises GpuError: EBUSY where not all that is reserved could be had at once (as SCHED_DEADLINE's admission does),
        EINVAL for a reservation above the limit.
        """
        promised = self.scheduler.promise(name) | changes
        others = self.scheduler.reserved - self.scheduler.promise(name)["reservation"]
        total = self.scheduler.total.rate
        if total and others + promised["reservation"] > total:
            raise GpuError(errno.EBUSY, f"{total - others} of {total} bytes/s are left to be reserved")
        if 0 < promised["limit"] < promised["reservation"]:
            raise GpuError(errno.EINVAL, f"{promised['reservation']} bytes/s cannot be had below {promised['limit']}")
        self.scheduler.set_client(name, self.clock.now_ns(), **changes)

    def violations(self) -> list[str]:
        """What cannot be, if all is right."""
        found = self.scheduler.violations()
        found += [f"{name} was admitted {nr} bytes" for name, nr in self._admitted.items() if nr < 0]
        return found
