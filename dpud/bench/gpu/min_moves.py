# SPDX-License-Identifier: GPL-2.0-only
"""The exact least bytes to move for a hole: Dijkstra over all layouts. Knows nothing of the planner.

Where blocks are too many for that, a bound from below: every block that does not end where it began was moved once at
least. The cheapest layout with the hole is an integer program, which says nothing of how to get there.
"""

import heapq
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import numpy as np

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


def can_bound() -> bool:
    """Whether there is a solver: scipy is for who develops."""
    return find_spec("scipy") is not None


def least_displaced(
    starts: Starts, sizes: Sequence[int], pinned: Sequence[bool], capacity: int, wanted: int
) -> int | None:
    """Units of blocks that are elsewhere in the cheapest layout with such a hole; None where there is none.

    A variable for each block and each place where it may begin, the hole being one more block: each is somewhere, no
    unit belongs to two. Solved exactly, by HiGHS.
    """
    from scipy.optimize import LinearConstraint, milp

    places = [
        (block, at)
        for block, size in enumerate((*sizes, wanted))
        for at in range(capacity - size + 1)
        if block == len(sizes) or not pinned[block] or at == starts[block]
    ]
    lengths = np.array([*sizes, wanted])
    owner, begin = np.array(places).T
    units = np.arange(capacity)[:, None]
    covers = (begin <= units) & (units < begin + lengths[owner])
    is_somewhere = owner == np.arange(len(lengths))[:, None]
    cost = np.where(owner < len(sizes), lengths[owner], 0) * (begin != np.array([*starts, 0])[owner])
    found = milp(
        cost,
        constraints=[LinearConstraint(covers, ub=1), LinearConstraint(is_somewhere, lb=1, ub=1)],
        integrality=np.ones(len(places)),
        bounds=(0, 1),
    )
    return round(found.fun) if found.success else None
