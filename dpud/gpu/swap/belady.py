# SPDX-License-Identifier: MIT
"""The best that can be done: evict what is used furthest in the future (Belady, IBM Systems Journal 5(2), 1966).

It needs the future, so it works on a trace. A heap with stale entries: O(n log n).
"""

import heapq
from collections.abc import Sequence

_NEVER = 1 << 62


def optimal_misses(trace: Sequence[int], capacity: int) -> int:
    """The fewest misses with which a memory of `capacity` pages can serve a trace of keys."""
    upcoming = _next_uses(trace)
    next_use: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    nr = 0
    for key, then in zip(trace, upcoming, strict=True):
        if key not in next_use:
            nr += 1
            if len(next_use) >= capacity:
                _evict(next_use, furthest)
        next_use[key] = then
        heapq.heappush(furthest, (-then, key))
    return nr


def _next_uses(trace: Sequence[int]) -> list[int]:
    upcoming, seen = [_NEVER] * len(trace), dict[int, int]()
    for at in range(len(trace) - 1, -1, -1):
        upcoming[at] = seen.get(trace[at], _NEVER)
        seen[trace[at]] = at
    return upcoming


def _evict(next_use: dict[int, int], furthest: list[tuple[int, int]]) -> None:
    while True:
        then, key = heapq.heappop(furthest)
        if next_use.get(key) == -then:
            del next_use[key]
            return
