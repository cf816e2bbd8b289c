# SPDX-License-Identifier: MIT
"""What is left to hold bytes: free memory of a location, and what the stores behind it can still take.

The two together are what can be honoured: a page of a lower priority can be reclaimed only into the stores, so what is
reclaimable is bounded by them and is not counted twice.
"""

from typing import Protocol

from dpud.gpu.memory import GpuMemory

UNLIMITED = 1 << 62


class Supply(Protocol):
    def free_bytes(self, location: int, /) -> int:
        """Free memory of one location."""
        ...

    def store_bytes(self, compressibility: float, /) -> int:
        """Raw bytes that the stores can still take, if pages compress like that."""
        ...


class PathSupply:
    """Of a GpuMemory, as it is now."""

    def __init__(self, memory: GpuMemory) -> None:
        self._memory = memory

    def free_bytes(self, location: int) -> int:
        return self._memory.locations[location].frames.nr_free_bytes

    def store_bytes(self, compressibility: float) -> int:
        store = self._memory.store
        nr_bytes = 0 if store.swap is None else store.swap.nr_free_bytes
        if store.pool is not None:
            limit = store.pool.limit_bytes
            if not limit:
                return UNLIMITED
            nr_bytes += int(max(0, limit - store.pool.used_bytes) * compressibility)
        return nr_bytes
