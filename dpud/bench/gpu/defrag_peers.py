# SPDX-License-Identifier: GPL-2.0-only
"""Allocators that do not move anything, and ours without bytes, on the same events."""

from collections.abc import Iterable
from dataclasses import dataclass
from time import process_time_ns
from typing import Protocol

from dpud.bench.gpu.defrag_load import Event
from dpud.gpu.defrag.heap import ALIGNMENT, Block, Heap, rounded
from dpud.gpu.defrag.metrics import scattered
from dpud.gpu.defrag.plan import plan
from dpud.gpu.hal.extents import Extents

PAGE_BYTES = 4096


class Allocator(Protocol):
    """Of bytes."""

    def take(self, nr_bytes: int) -> Block | int | None: ...
    def give(self, what: Block | int) -> None: ...
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def holes(self) -> list[int]: ...


class BestFit:
    """RMM's coalescing best fit, in our heap, which is the same."""

    def __init__(self, nr_bytes: int) -> None:
        self.heap = Heap(nr_bytes)
        self.moved_bytes = self.nr_plans = self.plan_ns = 0

    def take(self, nr_bytes: int) -> Block | int | None:
        return self.heap.alloc(nr_bytes)

    def give(self, what: Block | int) -> None:
        assert isinstance(what, Block)
        self.heap.free(what)

    @property
    def reserved_bytes(self) -> int:
        return self.heap.reserved_bytes

    @property
    def holes(self) -> list[int]:
        return self.heap.holes


class Moving(BestFit):
    """The same, and holes are made where there are none."""

    def take(self, nr_bytes: int) -> Block | int | None:
        block = self.heap.alloc(nr_bytes)
        if block is not None or self.heap.free_bytes < rounded(nr_bytes):
            return block
        begin_ns = process_time_ns()
        found = plan(self.heap, rounded(nr_bytes))
        self.plan_ns += process_time_ns() - begin_ns
        for move in found.moves if found else ():
            assert self.heap.begin_move(move.block, move.target), "a plan that cannot be carried out"
            self.heap.end_move(move.block)
            self.moved_bytes += move.block.size
        self.nr_plans += 1
        return self.heap.alloc(nr_bytes)


class FirstFit:
    """The lowest hole that is large enough."""

    def __init__(self, nr_bytes: int) -> None:
        self._extents = Extents(nr_bytes // ALIGNMENT * ALIGNMENT, ALIGNMENT)
        self._ends: dict[int, int] = {}

    def take(self, nr_bytes: int) -> Block | int | None:
        start = self._extents.take(nr_bytes)
        if start is not None:
            self._ends[start] = start + rounded(nr_bytes)
        return start

    def give(self, what: Block | int) -> None:
        assert isinstance(what, int)
        del self._ends[what]
        self._extents.give(what)

    @property
    def reserved_bytes(self) -> int:
        return max(self._ends.values(), default=0)

    @property
    def holes(self) -> list[int]:
        return [end - start for start, end in self._extents._free]


class Buddy:
    """Powers of two of 4 KiB, as far as the memory goes."""

    def __init__(self, nr_bytes: int) -> None:
        self._free: dict[int, set[int]] = {}
        self._orders: dict[int, int] = {}
        at, left = 0, nr_bytes // PAGE_BYTES
        while left:
            order = left.bit_length() - 1
            self._free.setdefault(order, set()).add(at)
            at, left = at + (1 << order), left - (1 << order)

    def take(self, nr_bytes: int) -> Block | int | None:
        order = (-(-nr_bytes // PAGE_BYTES) - 1).bit_length()
        at = min((each for each, blocks in self._free.items() if each >= order and blocks), default=None)
        if at is None:
            return None
        page = min(self._free[at])
        self._free[at].remove(page)
        while at > order:
            at -= 1
            self._free.setdefault(at, set()).add(page + (1 << at))
        self._orders[page] = order
        return page

    def give(self, what: Block | int) -> None:
        assert isinstance(what, int)
        page, order = what, self._orders.pop(what)
        while page ^ (1 << order) in self._free.get(order, ()):
            self._free[order].remove(page ^ (1 << order))
            page &= ~(1 << order)
            order += 1
        self._free.setdefault(order, set()).add(page)

    @property
    def reserved_bytes(self) -> int:
        return max((page + (1 << order) for page, order in self._orders.items()), default=0) * PAGE_BYTES

    @property
    def holes(self) -> list[int]:
        return [PAGE_BYTES << order for order, blocks in self._free.items() for _ in blocks]


@dataclass
class Outcome:
    """Of one allocator on one list of events. `owed`: failures although live + request <= capacity."""

    nr_requests: int = 0
    failures: int = 0
    owed: int = 0
    peak_reserved: int = 0
    scattered: float = 0.0
    """On average, looked at after each request."""
    asked_bytes: int = 0


def replay(events: Iterable[Event], allocator: Allocator, capacity: int) -> Outcome:
    """What fails is not there later: neither freed nor counted."""
    found, held, live = Outcome(), dict[int, Block | int](), 0
    for event in events:
        size = rounded(event.nr_bytes)
        if not event.is_alloc:
            if event.name in held:
                allocator.give(held.pop(event.name))
                live -= size
            continue
        what = allocator.take(event.nr_bytes)
        found.nr_requests += 1
        found.asked_bytes += size
        if what is None:
            found.failures += 1
            found.owed += live + size <= capacity
        else:
            held[event.name] = what
            live += size
        found.peak_reserved = max(found.peak_reserved, allocator.reserved_bytes)
        found.scattered += scattered(allocator.holes)
    found.scattered /= max(1, found.nr_requests)
    return found
