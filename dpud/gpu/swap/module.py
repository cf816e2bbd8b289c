# SPDX-License-Identifier: MIT
"""Swap as one part of a GpuMemory: tiers behind it, which policy, prefetcher and guard the path asks, and what is
learnt from what the path tells (it is the path's Watcher): how well prefetching works, how far the policy is from the
best.

    swap = SwapModule.with_tiers({"nvme": 1 << 30, "hdd": 4 << 30}, clock)
    memory = GpuMemory(devices, clock=clock, swap=swap.space)
    swap.attach(memory)
    swap.set_policy("s3-fifo")
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from dpud.gpu.clock import Clock
from dpud.gpu.memory import GpuMemory
from dpud.gpu.swap.accuracy import PrefetchAccuracy
from dpud.gpu.swap.gate import Gate
from dpud.gpu.swap.policy import kind_of
from dpud.gpu.swap.prefetch import new_prefetcher
from dpud.gpu.swap.shadow import ShadowTrace, Verdict
from dpud.gpu.swap.space import SwapSpace
from dpud.gpu.swap.thrash import ThrashGuard
from dpud.gpu.swap.tier import new_tier

DEFAULT_POLICY = "lru"
DEFAULT_PREFETCH = "density"
_MAX_PERCENT = 100


class SwapModule:
    """The space, and what the path was told to use."""

    def __init__(self, space: SwapSpace) -> None:
        self.space = space
        self.accuracy = PrefetchAccuracy()
        self.shadows: dict[int, ShadowTrace] = {}
        self.guard = ThrashGuard()
        self.policy = DEFAULT_POLICY
        self.prefetch = DEFAULT_PREFETCH
        self._memory: GpuMemory | None = None

    @classmethod
    def with_tiers(cls, sizes: Mapping[str, int], clock: Clock, folder: Path | None = None) -> "SwapModule":
        """Tiers of these sizes in bytes, fastest first, in temporary files of a folder. Raises GpuError, OSError."""
        tiers = [new_tier(name, size, clock, folder=folder) for name, size in sizes.items() if size]
        return cls(SwapSpace(tiers, clock))

    @property
    def memory(self) -> GpuMemory:
        assert self._memory is not None, "not attached"
        return self._memory

    def attach(self, memory: GpuMemory) -> None:
        """Have a GpuMemory, whose pages go to this space, ask this module."""
        self._memory = memory
        memory.watcher = memory.faults.watcher = self
        memory.faults.thrash_guard = self.guard
        self.space.mover = memory.store.mover
        self.set_policy(self.policy)
        self.set_prefetch(self.prefetch)

    # What the path tells.

    def accessed(self, at: int, keys: Collection[int]) -> None:
        self.accuracy.accessed(keys)
        self.shadows.setdefault(at, ShadowTrace()).accessed(keys)

    def missed(self, keys: Collection[int]) -> None:
        self.accuracy.missed(keys)

    def prefetched(self, keys: Collection[int]) -> None:
        self.accuracy.prefetched(keys)

    # What it is told.

    def set_policy(self, name: str) -> None:
        """For every location; pages keep their order. Raises KeyError for a name that is none."""
        for location in self.memory.locations:
            location.policy.convert(kind_of(name))
        self.policy = name

    def set_prefetch(self, name: str) -> None:
        """Raises KeyError for a name that is none."""
        gate = Gate(new_prefetcher(name), self.accuracy)
        self.memory.faults.prefetcher = None if name == "none" else gate
        self.prefetch = name

    @property
    def swap_threshold(self) -> int:
        """Percent of a location's memory in use from which on its pages are evicted in the background."""
        return _MAX_PERCENT - self.memory.residency.watermarks.low

    def set_swap_threshold(self, percent: int) -> None:
        """What is free in between stays as it is."""
        marks = self.memory.residency.watermarks
        gap = marks.high - marks.low
        marks.low = _MAX_PERCENT - percent
        marks.high = min(_MAX_PERCENT, marks.low + gap)

    def judge(self) -> dict[str, Verdict]:
        """By location: the policy on what was accessed from there, in as many pages as are there now."""
        return {
            location.name: self.shadows[location.number].judge(self.policy, len(location.policy))
            for location in self.memory.locations
            if location.number in self.shadows
        }

    def stats(self) -> dict[str, int]:
        """Counters."""
        accuracy = self.accuracy
        prefetched = {"issued": accuracy.nr_issued, "used": accuracy.nr_used, "wasted": accuracy.nr_wasted}
        return {
            **self.space.events,
            **{f"prefetch_{name}": nr for name, nr in prefetched.items()},
            "missed": accuracy.nr_missed,
            "throttled": self.guard.nr_throttles,
            "pinned": self.guard.nr_pins,
        }
