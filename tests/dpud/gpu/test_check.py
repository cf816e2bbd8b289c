# SPDX-License-Identifier: GPL-2.0-only
"""The checks find what they are for: each invariant, broken on purpose."""

from collections.abc import Callable

import numpy as np
import pytest
from small import KIB, MIB, small_memory

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.pagetable import PTE_WRITE
from dpud.gpu.address_space.regions import Region, RegionType
from dpud.gpu.check import violations
from dpud.gpu.memory import GpuMemory
from dpud.gpu.store import HostPool


def broken() -> tuple[GpuMemory, Region]:
    """Still whole: a region with pages in memory, copied, and in the pool."""
    memory = small_memory(MIB, MIB, pool=HostPool(MIB))
    va = memory.allocate("a", 64 * KIB, RegionType.MANAGED)
    memory.write("a", va, bytes(range(256)) * 256)
    memory.advise("a", va, 16 * KIB, Advice.SET_READ_MOSTLY)
    memory.read("a", va, 16 * KIB, 1)
    memory.residency.evict(memory.locations[0], 4)
    memory.translate(va + 40 * KIB)
    region = memory.space.regions.find(va)
    assert region is not None
    assert violations(memory) == []
    return memory, region


def stale_tlb(memory: GpuMemory, region: Region) -> None:
    memory.space.tlbs[0].entries += np.uint64(1 << 16)


def stale_cache(memory: GpuMemory, region: Region) -> None:
    cache = memory.space.translations[0].deltas
    at, delta = next((at, delta) for at, delta in enumerate(cache) if delta is not None)
    cache[at] = delta + 4096


def shared_frame(memory: GpuMemory, region: Region) -> None:
    region.frame[10] = region.frame[11]


def lost_frame(memory: GpuMemory, region: Region) -> None:
    memory.locations[0].frames.owner[-1] = 12345


def wrong_entry(memory: GpuMemory, region: Region) -> None:
    memory.space.table.ptes[0, region.leaf + 10] += np.uint64(1 << 17)
    memory.space.tlbs[0].flush()


def writable_copy(memory: GpuMemory, region: Region) -> None:
    memory.space.table.ptes[1, region.leaf + 3] |= PTE_WRITE
    memory.space.tlbs[1].flush()


def forgotten_by_policy(memory: GpuMemory, region: Region) -> None:
    memory.locations[0].policy.remove(region.first_key + 12)


def nowhere(memory: GpuMemory, region: Region) -> None:
    memory.store.drop(region.first_key + int(np.flatnonzero(region.backed)[0]))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (stale_tlb, "the TLB of device0 believes"),
        (stale_cache, "software's translations of device0 are stale"),
        (shared_frame, "two pages own one frame"),
        (lost_frame, "owned by nobody who lives"),
        (wrong_entry, "in the wrong frames"),
        (writable_copy, "that others have copies of"),
        (forgotten_by_policy, "the policy knows"),
        (nowhere, "disagree about who is kept"),
    ],
)
def test_damage_is_found(damage: Callable[[GpuMemory, Region], None], found: str) -> None:
    memory, region = broken()
    damage(memory, region)
    assert any(found in line for line in violations(memory))
