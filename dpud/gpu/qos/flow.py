# SPDX-License-Identifier: MIT
"""One client as the scheduler sees it: what it was promised, its tags, and its requests that wait."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from dpud.gpu.qos.bucket import NS_PER_S, Bucket
from dpud.gpu.traffic import Cause

NR_LEVELS = 5
"""Priority levels; 0 is the most important."""
DEFAULT_LEVEL = 2
MAX_SHARE = 10_000
DEFAULT_SHARE = 100
"""Range and default of cgroup's io.weight."""


@dataclass(eq=False)
class Request:
    """Bytes that a client wants to move. Requests are numbered as they come."""

    number: int
    client: str
    cause: Cause
    nr_bytes: int
    level: int
    submit_ns: int
    granted_ns: int | None = None
    dropped: bool = False
    """Its client is gone."""

    @property
    def is_over(self) -> bool:
        return self.dropped or self.granted_ns is not None

    def __lt__(self, other: "Request") -> bool:
        return (self.level, self.number) < (other.level, other.number)


@dataclass
class Flow:
    """`reservation` in bytes/s, 0 for none; the limit is `bucket`'s rate."""

    name: str
    reservation: int = 0
    share: int = DEFAULT_SHARE
    level: int = DEFAULT_LEVEL
    """Of its requests that name none."""
    bucket: Bucket = field(default_factory=Bucket)
    since_ns: int = 0
    """From when on it has always had requests that wait."""
    reserved_ns: int = 0
    """mClock's R tag: when the reservation entitles it to the next request."""
    served: list[int] = field(default_factory=lambda: [0] * NR_LEVELS)
    """mClock's P tag, in each lane: bytes served, weighted by share."""
    queue: list[Request] = field(default_factory=list)
    nr_waiting: list[int] = field(default_factory=lambda: [0] * NR_LEVELS)
    """Requests in the queue, by level."""

    @property
    def head(self) -> Request:
        """Its next request: the most important, then the first."""
        return self.queue[0]

    def push(self, request: Request) -> None:
        heapq.heappush(self.queue, request)
        self.nr_waiting[request.level] += 1

    def pop(self) -> Request:
        request = heapq.heappop(self.queue)
        self.nr_waiting[request.level] -= 1
        return request

    def remove(self, request: Request) -> None:
        self.queue.remove(request)
        heapq.heapify(self.queue)
        self.nr_waiting[request.level] -= 1

    def of_level(self, level: int) -> Iterator[Request]:
        return (request for request in self.queue if request.level == level)

    def reservation_ns(self) -> int | None:
        """From when on its reservation entitles it to its next request."""
        return max(self.reserved_ns, self.since_ns) if self.reservation else None

    def use_reservation(self, nr_bytes: int, since_ns: int) -> None:
        """Bytes are served by entitlement. Rounded down, so that what was promised is kept."""
        if self.reservation:
            self.reserved_ns = max(self.reserved_ns, since_ns) + nr_bytes * NS_PER_S // self.reservation

    def weighted(self, nr_bytes: int) -> int:
        """Bytes as its share weighs them."""
        return nr_bytes * MAX_SHARE // self.share

    def catch_up(self, lane: int, virtual: int) -> None:
        """Nothing holds it back any more: what it was not served is not made up for."""
        self.served[lane] = max(self.served[lane], virtual)
