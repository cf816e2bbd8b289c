# SPDX-License-Identifier: MIT
"""/sys/class/gpu_memvirt/gpu0/qos, qos/levels/N, and what configfs has of each client's promises.

Bandwidths are in bytes/s, never in percent: written with K, M or G, 100M is 104,857,600 bytes/s. 0 is no limit. Shares
are cgroup's io.weight: 1 to 10000, 100 at first. Counters only grow.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from dpud.gpu.attrs import number
from dpud.gpu.qos.flow import DEFAULT_LEVEL, DEFAULT_SHARE, MAX_SHARE, NR_LEVELS
from dpud.gpu.qos.levels import Level, LevelStat
from dpud.gpu.qos.module import QosModule
from dpud.gpu.qos.policy import POLICIES
from dpud.gpu.qos.replay import replay
from dpud.gpu.traffic import Cause
from kernelsim.attr import Attr, Bytes, Choice, Int, Kobject, Operation, Size, Text

MAX_BANDWIDTH = 1 << 50
MAX_TARGET_US = 60_000_000
_NS_PER_US = 1000
_CLIENTS = "{:<16} {:>5} {:>14} {:>14} {:>14} {:>6} {:>14} {:>6}\n"
_HEAD = ("client", "level", "reservation", "limit", "burst", "share", "granted", "queued")


def _bandwidth(doc: str, get: Callable[[Any], int], put: Callable[[Any, int], None]) -> Attr[int]:
    """A file of a number of bytes, or bytes/s."""
    return number(Size(0, MAX_BANDWIDTH), doc, get, put)


class QosFiles(Kobject):
    """What concerns all clients."""

    policy = Attr(Choice(*POLICIES), doc="How bandwidth that nobody has reserved is given away.")
    total_bandwidth = _bandwidth(
        "Of all clients together, bytes/s; 0: no limit. EBUSY for less than is reserved.",
        lambda files: files.qos.scheduler.total.rate,
        lambda files, rate: files.qos.set_total(rate=rate),
    )
    burst = _bandwidth(
        "Bytes of it that may go at once; 0: 20 ms of it, at least 1 MiB.",
        lambda files: files.qos.scheduler.total.burst_set,
        lambda files, burst: files.qos.set_total(burst=burst),
    )
    reserved = Attr(Text(), doc="All clients' reservations together, bytes/s.")
    stat = Attr(Text(), doc="Grants by constraint (reservations) and by weight, debts, cancellations: name and count.")
    clients = Attr(Text(), doc="A line for each client: promises, bytes granted, requests that wait.")
    traffic = Attr(Text(), doc="Every byte that moved: client, cause, bytes.")
    queue = Attr(Text(), doc="Who waits, in order of coming: client, level, cause, bytes, us waited.")
    decisions = Attr(Bytes(), doc="The decision log, which can be replayed; writing clears it.", mode=0o644)
    verify = Attr(Text(), doc="Checks every invariant, and replays the log: ok, or a line for each that is wrong.")

    def __init__(self, qos: QosModule, clients: Collection[str]) -> None:
        """`clients`: the names of those there are."""
        self.qos = qos
        self._clients_there = clients
        self._shown = b""  # the log as it was when a reader began: it is read in pieces, and grows

    @policy.show
    def _policy_show(self) -> str:
        return self.qos.scheduler.policy.name

    @policy.store
    def _policy_store(self, name: str) -> None:
        self.qos.set_policy(name)

    @reserved.show
    def _reserved(self) -> str:
        return str(self.qos.scheduler.reserved)

    @stat.show
    def _stat(self) -> str:
        counts = {**self.qos.scheduler.counts, "records": self.qos.decisions.nr_records}
        return "".join(f"{name} {nr}\n" for name, nr in counts.items())

    @clients.show
    def _clients(self) -> str:
        return "".join(self._client_lines())

    def _client_lines(self) -> Iterator[str]:
        scheduler = self.qos.scheduler
        yield _CLIENTS.format(*_HEAD)
        for name in sorted({*scheduler.flows, *self._clients_there}):
            flow = scheduler.look(name)
            bucket = flow.bucket
            promises = flow.level, flow.reservation, bucket.rate, bucket.burst if bucket.rate else 0, flow.share
            yield _CLIENTS.format(name, *promises, scheduler.granted_bytes[name], len(flow.queue))

    @traffic.show
    def _traffic(self) -> str:
        return "".join(f"{client} {cause} {nr}\n" for (client, cause), nr in sorted(self.qos.nr_bytes.items()))

    @queue.show
    def _queue(self) -> str:
        now_ns = self.qos.clock.now_ns()
        return "".join(
            f"{r.client} {r.level} {r.cause} {r.nr_bytes} {(now_ns - r.submit_ns) // _NS_PER_US}\n"
            for r in self.qos.scheduler.waiting()
        )

    @decisions.size
    def _decisions_size(self) -> int:
        self._shown = self.qos.decisions.text().encode()
        return len(self._shown)

    @decisions.read
    def _decisions(self, pos: int, size: int, _nonblock: bool) -> bytes:
        if pos == 0:
            self._shown = self.qos.decisions.text().encode()
        return self._shown[pos : pos + size]

    @decisions.write_at
    def _clear(self, _pos: int, data: bytes) -> int:
        self.qos.decisions.clear()
        return len(data)

    @verify.show
    def _verify(self) -> str:
        found = self.qos.violations()
        again = replay(self.qos.decisions.text())
        return "\n".join([*found, again.difference] if again.difference else found) or "ok"


class LevelFiles(Kobject):
    """One priority level; 0 is the most important."""

    bandwidth = _bandwidth(
        "Of all its clients together, bytes/s; 0: no limit. What is reserved passes.",
        lambda files: files.level.bucket.rate,
        lambda files, rate: files.qos.set_level(files.number, rate=rate),
    )
    burst = _bandwidth(
        "Bytes of it that may go at once; 0: 20 ms of it, at least 1 MiB.",
        lambda files: files.level.bucket.burst_set,
        lambda files, burst: files.qos.set_level(files.number, burst=burst),
    )
    latency_target_us = number(
        Int(0, MAX_TARGET_US),
        "Time that 99 percent of its requests may wait, as the policy adaptive pursues it; 0: none.",
        lambda files: files.level.target_ns // _NS_PER_US,
        lambda files, us: files.qos.set_level(files.number, target_ns=us * _NS_PER_US),
    )
    cap = Attr(Text(), doc="Bytes/s that all levels below may use, so that this one's target is met; 0: no cap.")
    latency = Attr(
        Text(), doc="Of its requests' waits: number, and ns of the median, of 99 percent, and of the longest."
    )
    stat = Attr(Text(), doc="Granted, missed targets, debts, cancelled, waiting: name and count.")

    def __init__(self, qos: QosModule, number: int) -> None:
        self.qos, self.number = qos, number

    @property
    def level(self) -> Level:
        return self.qos.scheduler.levels[self.number]

    @property
    def _seen(self) -> LevelStat:
        return self.qos.scheduler.stats[self.number]

    @cap.show
    def _cap(self) -> str:
        return str(self.level.guard.cap.rate)

    @latency.show
    def _latency(self) -> str:
        waits = self._seen.waits
        values = {"nr": waits.nr, "p50": waits.quantile(0.5), "p99": waits.quantile(0.99), "max": waits.max_ns}
        return "".join(f"{name} {value}\n" for name, value in values.items())

    @stat.show
    def _stat(self) -> str:
        counts = {**self._seen.counts, "queued_bytes": self.level.queued_bytes}
        return "".join(f"{name} {nr}\n" for name, nr in counts.items())


def _promise(kind: Int, key: str, doc: str, default: int) -> Attr[int]:
    """A client's; configfs shows what it has in the scheduler."""

    def get(files: Any) -> int:
        return int(files.qos.scheduler.promise(files.name)[key])

    def put(files: Any, value: int) -> None:
        files.qos.set_client(files.name, **{key: value})

    attr = number(kind, doc, get, put)
    attr.default = default
    return attr


class ClientBandwidth(Kobject):
    """One client's. `qos` and `name` are those of its directory."""

    qos: QosModule
    name: str

    _size = Size(0, MAX_BANDWIDTH)
    qos_reservation = _promise(
        _size, "reservation", "Bytes/s it gets whatever others do. EBUSY: so many are not left.", 0
    )
    qos_limit = _promise(_size, "limit", "Bytes/s it never exceeds, but for qos_burst; 0: no limit.", 0)
    qos_burst = _promise(_size, "burst", "Bytes that may go at once; 0: 20 ms of the limit, at least 1 MiB.", 0)
    qos_share = _promise(Int(1, MAX_SHARE), "share", "Of what nobody has reserved, in proportion.", DEFAULT_SHARE)
    qos_priority = _promise(
        Int(0, NR_LEVELS - 1), "level", "Its priority level; 0 is the most important.", DEFAULT_LEVEL
    )
    qos_charge = Attr(Size(1), doc="Returns when so many bytes may be moved: for programs that move them themselves.")

    @qos_charge.store
    def _charge(self, nr_bytes: int) -> Operation[None]:
        yield from self.qos.admission(self.name, nr_bytes, Cause.EXTERNAL)
        self.qos.charge(self.name, Cause.EXTERNAL, nr_bytes, 0)
