# SPDX-License-Identifier: MIT
"""The least bytes to move where blocks are few: uniform-cost search over layouts.

A layout is where each block begins. From each, a block may go to the left or to the right end of any gap that takes it,
its own place included in the gaps beside it. Searched up to a number of layouts, and only below a cost that is known.
"""

import heapq
from collections.abc import Iterator, Sequence

MAX_BLOCKS = 8
_MAX_LAYOUTS = 3000

Layout = tuple[int, ...]
Step = tuple[int, int]
"""(index of the block, where it goes)."""


def search(
    starts: Layout, sizes: Sequence[int], movable: Sequence[bool], nr_bytes: int, wanted: int, below: int
) -> list[Step] | None:
    """Moves in order that leave a hole of `wanted` and cost less than `below`; None if none are found."""
    queue: list[tuple[int, int, Layout]] = [(0, 0, starts)]
    came: dict[Layout, tuple[Layout, Step]] = {}
    costs = {starts: 0}
    for number in range(1, _MAX_LAYOUTS):
        if not queue:
            return None
        cost, _, layout = heapq.heappop(queue)
        if cost > costs[layout]:
            continue
        if any(end - start >= wanted for start, end in _gaps(layout, sizes, nr_bytes)):
            return _path(came, layout)
        for index, target in _steps(layout, sizes, movable, nr_bytes):
            after = (*layout[:index], target, *layout[index + 1 :])
            total = cost + sizes[index]
            if total < min(below, costs.get(after, below)):
                costs[after], came[after] = total, (layout, (index, target))
                heapq.heappush(queue, (total, number, after))
    return None


def _gaps(layout: Layout, sizes: Sequence[int], nr_bytes: int, without: int = -1) -> list[tuple[int, int]]:
    blocks = sorted((start, start + sizes[at]) for at, start in enumerate(layout) if at != without)
    starts, ends = [0, *(end for _, end in blocks)], [*(start for start, _ in blocks), nr_bytes]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if end > start]


def _steps(layout: Layout, sizes: Sequence[int], movable: Sequence[bool], nr_bytes: int) -> Iterator[Step]:
    for index, size in enumerate(sizes):
        if movable[index]:
            for start, end in _gaps(layout, sizes, nr_bytes, index):
                for target in {start, end - size} if end - start >= size else ():
                    if target != layout[index]:
                        yield index, target


def _path(came: dict[Layout, tuple[Layout, Step]], layout: Layout) -> list[Step]:
    steps = []
    while layout in came:
        layout, step = came[layout]
        steps.append(step)
    return steps[::-1]
