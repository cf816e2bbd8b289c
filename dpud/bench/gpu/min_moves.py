# SPDX-License-Identifier: GPL-2.0-only
"""The exact least bytes to move for a hole: Dijkstra over all layouts. Knows nothing of the planner."""

import heapq
from collections.abc import Iterator, Sequence

Starts = tuple[int, ...]


def largest_hole(starts: Starts, sizes: Sequence[int], capacity: int) -> int:
    edges = sorted((start, start + size) for start, size in zip(starts, sizes, strict=True))
    ends, begins = [0, *(end for _, end in edges)], [*(start for start, _ in edges), capacity]
    return max(begin - end for begin, end in zip(begins, ends, strict=True))


def least_moved(starts: Starts, sizes: Sequence[int], pinned: Sequence[bool], capacity: int, wanted: int) -> int | None:
    """Units of blocks moved, each move counted with its block's size; a block may slide over its own place."""
    queue, done = [(0, starts)], set()
    while queue:
        cost, at = heapq.heappop(queue)
        if at in done:
            continue
        done.add(at)
        if largest_hole(at, sizes, capacity) >= wanted:
            return cost
        for index, after in _moves(at, sizes, pinned, capacity):
            if after not in done:
                heapq.heappush(queue, (cost + sizes[index], after))
    return None


def _moves(starts: Starts, sizes: Sequence[int], pinned: Sequence[bool], capacity: int) -> Iterator[tuple[int, Starts]]:
    for index, size in enumerate(sizes):
        if pinned[index]:
            continue
        others = [(starts[i], starts[i] + sizes[i]) for i in range(len(sizes)) if i != index]
        for to in range(capacity - size + 1):
            if to != starts[index] and all(to + size <= low or high <= to for low, high in others):
                yield index, (*starts[:index], to, *starts[index + 1 :])
