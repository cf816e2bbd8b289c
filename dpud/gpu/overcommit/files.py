# SPDX-License-Identifier: MIT
"""/sys/class/gpu_memvirt/gpu0/overcommit, and what configfs has of each client's promises.

`pressure` is in the format of /proc/pressure/memory, so tools that read a cgroup's memory.pressure read it.
"""

import errno
from collections.abc import Callable, Iterator

from dpud.gpu.overcommit.account import Account
from dpud.gpu.overcommit.admission import DEFAULT_RATIO_PERCENT, Admission
from dpud.gpu.overcommit.predictor import HISTORY, POLICIES
from kernelsim.attr import Attr, Choice, Int, Kobject, Size, Text
from kernelsim.kinds import INT_MAX, consumed

MAX_PRIORITY = 100
MAX_RATIO_PERCENT = 100_000
_NS_PER_MS = 1_000_000
_QUEUE = "{:<16} {:>12} {:>8} {:>6} {:>10} {:>10}\n"
_ACCOUNTS = "{:<16} {:>8} {:>14} {:>14} {:>14} {:>14} {:>14} {:>14}\n"


class OvercommitFiles(Kobject):
    """Admission, for all clients."""

    ratio = Attr(
        Int(1, MAX_RATIO_PERCENT),
        DEFAULT_RATIO_PERCENT,
        doc="All grants together are at most so many percent of the devices' memory.",
    )
    policy = Attr(Choice(*POLICIES), HISTORY, doc="How much of what clients were granted they are expected to use.")
    headroom = Attr(
        consumed(Text()), doc="Largest request that would be granted now, for a client of priority 0, in bytes."
    )
    supply = Attr(Text(), doc="What can hold bytes now: free memory and room in the stores, if they do not compress.")
    granted_bytes = Attr(Text(), doc="All grants together.")
    used_bytes = Attr(consumed(Text()), doc="Of them, what holds bytes, wherever it is.")
    expected_bytes = Attr(consumed(Text()), doc="Of them, what the policy expects to be used.")
    compressibility = Attr(
        consumed(Text()), doc="Raw bytes per byte of the pool, measured: counted on for what clients will write."
    )
    stat = Attr(Text(), doc="Requests granted, released, queued, refused, timed out, ever: name and count.")
    queue = Attr(Text(), doc="Who waits, in order: client, bytes, priority, rank, ms waited, ms left.")
    clients = Attr(
        consumed(Text()), doc="A line for each client: priority, granted, used, expected, resident, reserved, limit."
    )

    def __init__(self, admission: Admission, tell: Callable[[], None]) -> None:
        self.admission = admission
        self._tell = tell  # what clients use now

    @ratio.show
    def _ratio_show(self) -> int:
        return self.admission.ratio_percent

    @ratio.store
    def _ratio_store(self, percent: int) -> None:
        self.admission.ratio_percent = percent
        self.admission.pump()

    @policy.show
    def _policy_show(self) -> str:
        return self.admission.policy

    @policy.store
    def _policy_store(self, name: str) -> None:
        self.admission.policy = name
        self.admission.pump()

    @headroom.show
    def _headroom(self) -> str:
        self._tell()
        admission = self.admission
        return str(max(0, min(admission.room_bytes(0), admission.limit_bytes - admission.nr_granted)))

    @supply.show
    def _supply(self) -> str:
        return str(self.admission.supply_bytes())

    @granted_bytes.show
    def _granted(self) -> str:
        return str(self.admission.nr_granted)

    @used_bytes.show
    def _used(self) -> str:
        self._tell()
        return str(sum(account.nr_used for account in self.admission.accounts.values()))

    @expected_bytes.show
    def _expected(self) -> str:
        self._tell()
        accounts = list(self.admission.accounts.values())
        used = sum(account.nr_used for account in accounts)
        return str(used + self.admission.together.growth_bytes(accounts, self.admission.policy))

    @compressibility.show
    def _compressibility(self) -> str:
        self._tell()
        return f"{self.admission.measured_compressibility:.3f}"

    @stat.show
    def _stat(self) -> str:
        return "".join(f"{name} {nr}\n" for name, nr in self.admission.events.items())

    @queue.show
    def _queue(self) -> str:
        now_ns = self.admission.clock.now_ns()
        lines = [_QUEUE.format("client", "bytes", "priority", "rank", "waited_ms", "left_ms")]
        for ticket in self.admission.line.in_order(now_ns):
            waited, left = now_ns - ticket.since_ns, ticket.deadline_ns - now_ns
            times = waited // _NS_PER_MS, left // _NS_PER_MS
            lines.append(_QUEUE.format(ticket.client, ticket.nr_bytes, ticket.priority, ticket.rank(now_ns), *times))
        return "".join(lines)

    @clients.show
    def _clients(self) -> str:
        self._tell()
        return "".join(self._client_lines())

    def _client_lines(self) -> Iterator[str]:
        yield _ACCOUNTS.format("client", "priority", "granted", "used", "expected", "resident", "reservation", "limit")
        for name, account in sorted(self.admission.accounts.items()):
            expected = account.peak_bytes(self.admission.policy)
            promises = account.nr_granted, account.nr_used, expected, account.nr_resident
            yield _ACCOUNTS.format(name, account.priority, *promises, account.reservation_bytes, account.limit_bytes)


class ClientPromises(Kobject):
    """What one client may rely on, and how much it has to wait. `admission` and `name` are those of its directory."""

    admission: Admission
    name: str

    priority = Attr(Int(0, MAX_PRIORITY), 0, doc="Of the client; a buffer's own counts where it is higher.")
    reservation = Attr(Size(), 0, doc="Bytes kept for it, granted or not, and not reclaimed. ENOMEM: no room for them.")
    limit = Attr(Size(), 0, doc="Bytes it may be granted; 0 for no limit. EBUSY for less than it has.")
    queue_timeout_ms = Attr(Int(0, INT_MAX), 0, doc="How long its requests wait for memory before they fail; 0: not.")
    pressure = Attr(consumed(Text()), doc="Time it waited for memory, as /proc/pressure/memory has it.")

    @property
    def _account(self) -> Account:
        return self.admission.account(self.name)

    @priority.show
    def _priority_show(self) -> int:
        return self._account.own_priority

    @priority.store
    def _priority_store(self, priority: int) -> None:
        self._account.own_priority = priority
        self.admission.pump()

    @reservation.show
    def _reservation_show(self) -> int:
        return self._account.reservation_bytes

    @reservation.store
    def _reservation_store(self, nr_bytes: int) -> None:
        self.admission.reserve(self.name, nr_bytes)

    @limit.show
    def _limit_show(self) -> int:
        return self._account.limit_bytes

    @limit.store
    def _limit_store(self, nr_bytes: int) -> None:
        if 0 < nr_bytes < self._account.nr_granted:
            raise OSError(errno.EBUSY, f"it has {self._account.nr_granted} bytes")
        self._account.limit_bytes = nr_bytes
        self.admission.pump()

    @queue_timeout_ms.show
    def _timeout_show(self) -> int:
        return self._account.timeout_ns // _NS_PER_MS

    @queue_timeout_ms.store
    def _timeout_store(self, timeout_ms: int) -> None:
        self._account.timeout_ns = timeout_ms * _NS_PER_MS

    @pressure.show
    def _pressure(self) -> str:
        return self._account.pressure.text(self.admission.clock.now_ns())
