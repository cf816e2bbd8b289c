# SPDX-License-Identifier: MIT
"""How far the replacement policy is from the best there could be, judged on what really was accessed.

Theory of operation
    Accesses are recorded, but only those to a sample of the pages: the ones whose hashed key falls below a threshold
    (SHARDS, Waldspurger et al., FAST'15). A cache of a given share of the sampled pages behaves as one of the same
    share of all pages does. When the sample grows beyond MAX_PAGES the threshold is halved and what no longer belongs
    is dropped; the trace keeps the last MAX_ACCESSES. So memory is bounded whatever runs.

    `judge` replays the trace, with the sampled share of the real capacity: the policy, plain LRU, and Belady's optimum.
        gap closed = (LRU misses - policy's misses) / (LRU misses - fewest misses)
    in percent: 0 is as good as LRU, 100 cannot be better, and below 0 is worse than LRU.

Differs from the real thing: pages count the same whatever their size, and what the data path does beyond the policy
(prefetch, pinning, background eviction) is not replayed.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from dpud.gpu.policy import Lru, ReplacementPolicy
from dpud.gpu.swap.belady import optimal_misses
from dpud.gpu.swap.policy import S3Fifo, misses, new_policy

MAX_ACCESSES = 1 << 15
MAX_PAGES = 1 << 12
_HASH_BITS = 32
_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / the golden ratio: Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4)."""


@dataclass(frozen=True)
class Verdict:
    """Misses on the sampled trace."""

    accesses: int
    pages: int
    rate: float
    capacity: int
    lru: int
    policy: int
    optimal: int

    @property
    def gap_closed_percent(self) -> float | None:
        """None where LRU cannot be beaten."""
        gap = self.lru - self.optimal
        return 100 * (self.lru - self.policy) / gap if gap else None


class ShadowTrace:
    """Of one location."""

    def __init__(self) -> None:
        self._threshold = 1 << _HASH_BITS
        self._pages: set[int] = set()
        self._trace: deque[int] = deque(maxlen=MAX_ACCESSES)

    @property
    def rate(self) -> float:
        """The share of pages that is sampled."""
        return self._threshold / (1 << _HASH_BITS)

    def accessed(self, keys: Iterable[int]) -> None:
        for key in keys:
            if _hash(key) < self._threshold:
                self._trace.append(key)
                self._pages.add(key)
        while len(self._pages) > MAX_PAGES:
            self._halve()

    def _halve(self) -> None:
        self._threshold //= 2
        self._pages = {key for key in self._pages if _hash(key) < self._threshold}
        self._trace = deque((key for key in self._trace if key in self._pages), maxlen=MAX_ACCESSES)

    def judge(self, name: str, nr_pages: int) -> Verdict:
        """A policy in a memory of `nr_pages` pages."""
        trace = list(self._trace)
        capacity = max(1, round(nr_pages * self.rate))
        lru, policy = (misses(each, trace, capacity) for each in (Lru(), _sized(name, capacity)))
        return Verdict(len(trace), len(set(trace)), self.rate, capacity, lru, policy, optimal_misses(trace, capacity))


def _sized(name: str, capacity: int) -> ReplacementPolicy:
    return S3Fifo(capacity) if name == "s3-fifo" else new_policy(name)


def _hash(key: int) -> int:
    return (key * _GOLDEN & (1 << 64) - 1) >> (64 - _HASH_BITS)
