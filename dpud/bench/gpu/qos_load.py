# SPDX-License-Identifier: GPL-2.0-only
"""Clients that drive a scheduler in simulated time: what they ask for, and what they were granted when."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dpud.gpu.qos.flow import Request
from dpud.gpu.qos.scheduler import Scheduler
from dpud.gpu.traffic import Cause

NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Grant:
    """Of one request; times in ns."""

    client: str
    nr_bytes: int
    submit_ns: int
    granted_ns: int


@dataclass
class Load:
    """One client. Closed: always so many requests outstanding; open: Poisson arrivals at so many bytes/s."""

    client: str
    request_bytes: int
    outstanding: int = 0
    rate: float = 0.0
    begin_ns: int = 0
    end_ns: int = 1 << 62
    level: int | None = None

    def arrivals(self, rng: np.random.Generator) -> Iterator[int]:
        """Of an open client, in ns."""
        at = float(self.begin_ns)
        while at < self.end_ns and self.rate:
            at += rng.exponential(self.request_bytes / self.rate) * NS_PER_S
            yield int(at)


@dataclass
class Simulation:
    """Runs loads on a scheduler. `on_grant` is called after each grant."""

    scheduler: "Scheduler | Fifo"
    loads: list[Load]
    seed: int = 1
    grants: list[Grant] = field(default_factory=list)
    on_time: Callable[[int], None] = lambda _now_ns: None

    def run(self, until_ns: int, now_ns: int = 0) -> list[Grant]:
        """All grants until then, in order. `now_ns`: go on from there, with the requests that wait."""
        coming = self._arrivals(until_ns) if now_ns == 0 else deque()
        closed = {load.client: load for load in self.loads if load.outstanding}
        while now_ns < until_ns:
            while coming and coming[0][0] <= now_ns:
                self._submit(coming.popleft()[2], now_ns)
            request = self.scheduler.grant(now_ns)
            if request is not None:
                self.grants.append(Grant(request.client, request.nr_bytes, request.submit_ns, now_ns))
                again = closed.get(request.client)
                if again is not None and now_ns < again.end_ns:
                    self._submit(again, now_ns)
                continue
            now_ns = self._next_ns(now_ns, coming, until_ns)
            self.on_time(now_ns)
        return self.grants

    def _arrivals(self, until_ns: int) -> deque[tuple[int, int, Load]]:
        found: list[tuple[int, int, Load]] = []
        for number, load in enumerate(self.loads):
            rng = np.random.default_rng([self.seed, number])
            if load.outstanding:
                found += [(load.begin_ns, number, load)] * load.outstanding
            for at_ns in load.arrivals(rng):
                if at_ns >= min(until_ns, load.end_ns):
                    break
                found.append((at_ns, number, load))
        return deque(sorted(found, key=lambda each: each[:2]))

    def _submit(self, load: Load, now_ns: int) -> Request:
        return self.scheduler.submit(load.client, Cause.ACCESS, load.request_bytes, now_ns, load.level)

    def _next_ns(self, now_ns: int, coming: deque[tuple[int, int, Load]], until_ns: int) -> int:
        next_ns = self.scheduler.next_ns(now_ns)
        times = [until_ns, *([coming[0][0]] if coming else []), *([] if next_ns is None else [next_ns])]
        assert min(times) > now_ns, "time stands still"
        return min(times)


def rate_of(grants: list[Grant], client: str, begin_ns: int, end_ns: int) -> float:
    """Bytes/s that a client was granted within a span."""
    nr = sum(each.nr_bytes for each in grants if each.client == client and begin_ns <= each.granted_ns < end_ns)
    return nr * NS_PER_S / (end_ns - begin_ns)


def jain(values: list[float]) -> float:
    """Jain's fairness index: 1 where all are equal, 1/n where one has all (Jain, Chiu, Hawe, DEC TR-301, 1984)."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def excess(grants: list[Grant], rate: int) -> float:
    """The most bytes beyond `rate` in any window: the deepest fall of a bucket that is filled at that rate."""
    worst = level = 0.0
    for before, each in pairwise([*grants[:1], *grants]):
        level = max(0.0, level - rate * (each.granted_ns - before.granted_ns) / NS_PER_S) + each.nr_bytes
        worst = max(worst, level)
    return worst


def shortfall(grants: list[Grant], rate: int, end_ns: int) -> float:
    """The most bytes by which a client that always wants more was short of `rate`, in any window from 0 to `end_ns`."""
    worst = short = 0.0
    before_ns = 0
    for now_ns, nr_bytes in [*((each.granted_ns, each.nr_bytes) for each in grants), (end_ns, 0)]:
        short += rate * (now_ns - before_ns) / NS_PER_S
        worst = max(worst, short)
        short = max(0.0, short - nr_bytes)
        before_ns = now_ns
    return worst


class Fifo:
    """Who comes first is served first: one server of `rate` bytes/s, as a device without QoS is."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._queue: deque[Request] = deque()
        self._free_ns = 0

    def submit(self, client: str, cause: Cause, nr_bytes: int, now_ns: int, level: int | None = None) -> Request:
        request = Request(0, client, cause, nr_bytes, level or 0, now_ns)
        self._queue.append(request)
        return request

    def grant(self, now_ns: int) -> Request | None:
        if not self._queue or self._free_ns > now_ns:
            return None
        request = self._queue.popleft()
        self._free_ns = now_ns + request.nr_bytes * NS_PER_S // self._rate
        return request

    def next_ns(self, now_ns: int) -> int | None:
        return max(now_ns, self._free_ns) if self._queue else None
