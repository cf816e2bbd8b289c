# SPDX-License-Identifier: MIT
"""Which blocks of a heap to move, and where to, so that a hole of some size is there: as few bytes as we find.

Theory of operation
    Blocks and the gaps between them are taken as a row. A *window* is some gaps in a row with the blocks between them.
    Its blocks are cleared out: some go to holes outside of it (best fit, large ones first), the others slide together
    to its left end. What the window gains is its gaps and what went outside; its cost is all of its blocks. Windows are
    looked at from the cheapest on, so the first that can be done is the cheapest of its kind. Where no gap outside
    takes a block, room is made there in the same manner, once more and no deeper.

    A window that gains enough by its gaps alone needs nothing outside. Without pins the whole heap is one, so a plan
    exists whenever the free bytes are enough. After _MAX_WINDOWS in vain, the cheapest of these is it.

Where blocks are few, all layouts are searched instead (search.py). Differs from the optimum where they are many: chains
of more than two evacuations are not found. The tests hold it against an exact search that knows nothing of this one.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dpud.gpu.defrag.heap import Block, Heap
from dpud.gpu.defrag.search import MAX_BLOCKS, search

_MAX_WINDOWS = 500
_MAX_ROOMS = 16
"""Windows of one block for which room outside is sought."""


@dataclass(frozen=True)
class Move:
    """A block to another start."""

    block: Block
    target: int


@dataclass(frozen=True)
class Plan:
    """In order; each target is free once the moves before it are done."""

    moves: tuple[Move, ...]

    @property
    def nr_bytes(self) -> int:
        return sum(move.block.size for move in self.moves)


@dataclass(frozen=True)
class Item:
    """A block as planned so far."""

    start: int
    end: int
    block: Block
    fixed: bool

    @property
    def size(self) -> int:
        return self.end - self.start


def plan(heap: Heap, size: int, *, windows_only: bool = False) -> Plan | None:
    """For a hole of `size` bytes; None where pins are in the way, or too little is free.

    windows_only    also where blocks are few: for who wants to know how good windows are
    """
    items = [Item(start, end, block, not block.is_movable) for start, end, block in heap.extents()]
    found = _search(items, heap, size, depth=1)
    are_few = len(items) <= 2 * MAX_BLOCKS and sum(not item.fixed for item in items) <= MAX_BLOCKS
    if are_few and not windows_only:
        found = _search_all(items, heap.nr_bytes, size, found)
    return None if found is None else Plan(tuple(found[1]))


Found = tuple[int, list[Move], int]
"""(bytes, moves, where the hole begins)."""


def _search_all(items: Sequence[Item], nr_bytes: int, size: int, known: Found | None) -> Found | None:
    """Something cheaper than what is known, where blocks are so few that all layouts can be tried."""
    sizes, movable = [item.size for item in items], [not item.fixed for item in items]
    below = known[0] if known else 1 << 62
    steps = search(tuple(item.start for item in items), sizes, movable, nr_bytes, size, below)
    if steps is None:
        return known
    moves = [Move(items[index].block, target) for index, target in steps]
    return sum(move.block.size for move in moves), moves, 0


def _search(items: Sequence[Item], heap: Heap, size: int, depth: int, closed: tuple[int, int] = (0, 0)) -> Found | None:
    """The cheapest window that can be cleared. `closed`: a range that has to stay as it is."""
    gaps = _gaps(items, heap.nr_bytes, closed)
    best: Found | None = None
    nr_rooms = 0
    for cost, first, last in islice(_windows(items, gaps, size), _MAX_WINDOWS):
        if best is not None and cost >= best[0]:
            return best
        found = _clear(items, gaps, heap, size, (first, last))
        if found is None and depth and last - first == 1 and nr_rooms < _MAX_ROOMS:
            nr_rooms += 1
            found = _make_room_outside(items, heap, items[first], (gaps[first][0], gaps[last][1]))
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return best or _slide(items, gaps, heap, size)


def _slide(items: Sequence[Item], gaps: Sequence[tuple[int, int]], heap: Heap, size: int) -> Found | None:
    """The cheapest window whose gaps are enough by themselves."""
    best: tuple[int, int, int] | None = None
    first = gain = cost = 0
    for last in range(len(gaps)):
        gain += gaps[last][1] - gaps[last][0]
        while first < last and gain - (gaps[first][1] - gaps[first][0]) >= size:
            gain -= gaps[first][1] - gaps[first][0]
            cost -= items[first].size
            first += 1
        if gain >= size and (best is None or cost < best[0]):
            best = cost, first, last
        if last < len(items):
            cost += items[last].size
            if items[last].fixed:
                first, gain, cost = last + 1, 0, 0
    return None if best is None else _clear(items, gaps, heap, size, best[1:])


def _gaps(items: Sequence[Item], nr_bytes: int, closed: tuple[int, int]) -> list[tuple[int, int]]:
    """(start, end) before each item and behind the last; empty within `closed`."""
    starts, ends = [0, *(item.end for item in items)], [*(item.start for item in items), nr_bytes]
    low, high = closed
    return [
        (start, start) if low <= start and end <= high else (start, end)
        for start, end in zip(starts, ends, strict=True)
    ]


def _windows(items: Sequence[Item], gaps: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int, int]]:
    """(bytes of its blocks, first gap, last gap), cheapest first: for each first gap, from the shortest that may do."""
    queue: list[tuple[int, int, int]] = []
    for first in range(len(gaps)):
        if (window := _shortest(items, gaps, size, first)) is not None:
            queue.append(window)
    heapq.heapify(queue)
    while queue:
        cost, first, last = heapq.heappop(queue)
        yield cost, first, last
        slides = sum(end - start for start, end in gaps[first : last + 1]) >= size
        if not slides and last < len(items) and not items[last].fixed:
            heapq.heappush(queue, (cost + items[last].size, first, last + 1))


def _shortest(
    items: Sequence[Item], gaps: Sequence[tuple[int, int]], size: int, first: int
) -> tuple[int, int, int] | None:
    cost, gain = 0, gaps[first][1] - gaps[first][0]
    for last in range(first, len(gaps)):
        if gain >= size:
            return cost, first, last
        if last == len(items) or items[last].fixed:
            return None
        cost += items[last].size
        gain += items[last].size + gaps[last + 1][1] - gaps[last + 1][0]
    return None


def _clear(
    items: Sequence[Item], gaps: Sequence[tuple[int, int]], heap: Heap, size: int, window: tuple[int, int]
) -> Found | None:
    """Everything out of a window of gaps (first, last), or to its left end."""
    first, last = window
    need = size - sum(high - low for low, high in gaps[first : last + 1])
    outside = sorted((high - low, low) for low, high in [*gaps[:first], *gaps[last + 1 :]] if high > low)
    leaving: dict[Block, int] = {}
    for item in sorted(items[first:last], key=lambda each: (-each.size, each.start)):
        if need > 0 and (target := _best_fit(outside, item, heap)) is not None:
            leaving[item.block] = target
            need -= item.size
    if need > 0:
        return None
    moves, at = [Move(block, target) for block, target in leaving.items()], gaps[first][0]
    for item in items[first:last]:
        if item.block not in leaving:
            moves += [Move(item.block, at)] if item.start != at else []
            at += item.size
    return sum(move.block.size for move in moves), moves, at


def _best_fit(holes: list[tuple[int, int]], item: Item, heap: Heap) -> int | None:
    """Where a block goes; taken out of the smallest hole that is large enough, its pages in step if that can be."""
    at = bisect_left(holes, (item.size, 0))
    if at == len(holes):
        return None
    size, start = holes.pop(at)
    target = heap.placed(size, start, item.size, item.start % heap.page_bytes)
    for low, high in ((start, target), (target + item.size, start + size)):
        if high > low:
            insort(holes, (high - low, low))
    return target


def _make_room_outside(items: Sequence[Item], heap: Heap, item: Item, window: tuple[int, int]) -> Found | None:
    """The only block of a window finds no hole: make one elsewhere first."""
    fenced = [
        Item(each.start, each.end, each.block, each.fixed or window[0] <= each.start < window[1]) for each in items
    ]
    found = _search(fenced, heap, item.size, 0, window)
    if found is None:
        return None
    cost, moves, hole = found
    return cost + item.size, [*moves, Move(item.block, hole)], window[0]
