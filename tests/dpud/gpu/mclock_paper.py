# SPDX-License-Identifier: GPL-2.0-only
"""mClock as its paper has it (Gulati, Merchant, Varman: mClock, OSDI 2010, algorithm 1), written from the paper on
simpy: tags are given at arrival, times are seconds in floating point, a request is one unit, the server serves one at a
time. Nothing of dpud's is used.
"""

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

INFINITE = float("inf")


@dataclass
class Tags:
    r: float
    l: float  # noqa: E741
    p: float


@dataclass(eq=False)
class Vm:
    """Rates in requests/s; no limit is infinite. `arrivals`: (when, how many at once)."""

    reservation: float
    limit: float
    weight: float
    arrivals: list[tuple[float, int]]
    queue: deque[Tags] = field(default_factory=deque)
    shift_r: float = 0.0
    shift_p: float = 0.0
    """To be added to all tags given so far: the paper changes each of them."""
    newest: Tags = field(default_factory=lambda: Tags(-INFINITE, -INFINITE, -INFINITE))

    def _shifted(self, tags: Tags) -> Tags:
        return Tags(tags.r + self.shift_r, tags.l, tags.p + self.shift_p)

    def first(self) -> Tags:
        return self._shifted(self.queue[0])

    @property
    def last(self) -> Tags:
        return self._shifted(self.newest)

    def append(self, tags: Tags) -> None:
        self.newest = Tags(tags.r - self.shift_r, tags.l, tags.p - self.shift_p)
        self.queue.append(self.newest)


class Paper:
    """Serves until `end`; `served` has (when, which VM) of each request that was begun."""

    def __init__(self, capacity: float, vms: list[Vm]) -> None:
        self.env = simpy.Environment()
        self.capacity = capacity
        self.vms = vms
        self.served: list[tuple[float, int]] = []
        self.changed = self.env.event()

    def run(self, end: float) -> list[tuple[float, int]]:
        for vm in self.vms:
            self.env.process(self.arrive(vm))
        self.env.process(self.serve())
        self.env.run(until=end)
        return self.served

    def arrive(self, vm: Vm) -> Generator[Any, Any, None]:
        for when, nr in vm.arrivals:
            yield self.env.timeout(when - self.env.now)
            for _ in range(nr):
                self.request_arrival(vm, self.env.now)
            self.wake()

    def wake(self) -> None:
        self.changed.succeed()
        self.changed = self.env.event()

    def request_arrival(self, vm: Vm, t: float) -> None:
        active = [other for other in self.vms if other.queue]
        if not vm.queue and active:
            smallest = min(other.first().p for other in active)
            for other in active:
                other.shift_p -= smallest - t
        inverse_r = 1 / vm.reservation if vm.reservation else INFINITE
        vm.append(
            Tags(max(vm.last.r + inverse_r, t), max(vm.last.l + 1 / vm.limit, t), max(vm.last.p + 1 / vm.weight, t))
        )

    def choose(self, t: float) -> tuple[Vm, bool] | None:
        waiting = [vm for vm in self.vms if vm.queue]
        constrained = [vm for vm in waiting if vm.reservation and vm.first().r <= t]
        if constrained:
            return min(constrained, key=lambda vm: vm.first().r), True
        weighted = [vm for vm in waiting if vm.first().l <= t]
        return (min(weighted, key=lambda vm: vm.first().p), False) if weighted else None

    def soon(self) -> float:
        """When the next request can be served, if none can now."""
        waiting = [vm for vm in self.vms if vm.queue]
        return min(
            (min(vm.first().r if vm.reservation else INFINITE, vm.first().l) for vm in waiting), default=INFINITE
        )

    def serve(self) -> Generator[Any, Any, None]:
        while True:
            chosen = self.choose(self.env.now)
            if chosen is None:
                soon = self.soon()
                pause = [] if soon == INFINITE else [self.env.timeout(max(0.0, soon - self.env.now) + 1e-12)]
                yield self.env.any_of([self.changed, *pause])
                continue
            vm, by_constraint = chosen
            vm.queue.popleft()
            if not by_constraint and vm.reservation:
                vm.shift_r -= 1 / vm.reservation
            self.served.append((self.env.now, self.vms.index(vm)))
            yield self.env.timeout(1 / self.capacity)
