# SPDX-License-Identifier: GPL-2.0-only
"""Every byte is charged to somebody, and dirty logs know what was written to."""

from collections import Counter

import numpy as np
from small import KIB, MIB, DictSwap, small_memory
from swapping import small_space

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.permissions import READ
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.dirty import DirtyLog
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.store import HostPool
from dpud.gpu.swap.module import SwapModule
from dpud.gpu.traffic import Cause, TrafficCounts


def charged(memory: GpuMemory) -> Counter[tuple[str, Cause]]:
    traffic = memory.residency.traffic
    assert isinstance(traffic, TrafficCounts)
    return traffic.nr_bytes


def test_accesses_are_charged_to_who_makes_them() -> None:
    memory = small_memory(MIB)
    va = memory.allocate("owner", 64 * KIB)
    memory.write("owner", va, bytes(10_000))
    memory.protect("owner", va, 64 * KIB, READ, of="guest")
    memory.read("guest", va + 100, 5_000)
    memory.read("owner", va + 32 * KIB, 4 * KIB)  # never written: there are no bytes to move
    assert charged(memory) == {("owner", Cause.ACCESS): 10_000, ("guest", Cause.ACCESS): 5_000}


def test_what_the_engines_moved_is_what_was_charged() -> None:
    """Over pressure, migration and read-mostly copies: the sum over causes is the copy engines' own count."""
    memory = small_memory(MIB, 2 * MIB, swap=DictSwap(8 * MIB))
    va = memory.allocate("a", 2 * MIB)
    memory.write("a", va, np.random.default_rng(1).bytes(2 * MIB))
    assert len(memory.read("a", va, 2 * MIB)) == 2 * MIB
    shared = memory.allocate("b", 64 * KIB, RegionType.MANAGED)
    memory.write("b", shared, bytes(64 * KIB), at=0)
    memory.read("b", shared, 64 * KIB, at=1)
    memory.advise("b", shared, 64 * KIB, Advice.SET_READ_MOSTLY)
    memory.read("b", shared, 64 * KIB, at=0)
    moved = 0
    for location in memory.locations:
        device = location.hardware
        assert isinstance(device, SimulatedDevice)
        moved += device.upload.nr_bytes + device.download.nr_bytes
    causes: Counter[Cause] = Counter()
    for (_, cause), nr_bytes in charged(memory).items():
        causes[cause] += nr_bytes
    assert causes[Cause.MIGRATION] == 2 * 64 * KIB
    assert causes[Cause.ACCESS] == 4 * MIB + 3 * 64 * KIB
    assert moved == causes[Cause.ACCESS] + causes[Cause.SWAP] + 2 * causes[Cause.MIGRATION]


def test_what_moves_from_the_pool_to_swap_is_its_owner_s() -> None:
    """Of two clients each has its own pages; bytes are counted as the pool has them."""
    swap = DictSwap(8 * MIB)
    memory = small_memory(2 * MIB, pool=HostPool(4 * MIB), swap=swap)
    for client, nr_bytes in (("a", 768 * KIB), ("b", 256 * KIB)):
        half = np.random.default_rng(1).bytes(nr_bytes // 2)
        memory.write(client, memory.allocate(client, nr_bytes), half + bytes(nr_bytes // 2))
    memory.evict(2 * MIB)
    assert not swap.blobs
    assert memory.store.demote(600 * KIB) == len(swap.blobs)
    moved: Counter[tuple[str, Cause]] = Counter()
    for key, blob in swap.blobs.items():
        moved[memory.space.regions.page_of(key)[0].client, Cause.DEMOTION] += len(blob.data)
    assert set(moved) == {("a", Cause.DEMOTION), ("b", Cause.DEMOTION)}
    assert {who: nr for who, nr in charged(memory).items() if who[1] is Cause.DEMOTION} == moved


def test_what_moves_from_tier_to_tier_is_its_owner_s() -> None:
    space = small_space(("nvme", 256), ("hdd", 1024))
    swap = SwapModule(space)
    memory = small_memory(MIB, clock=space.clock, swap=space)
    swap.attach(memory)
    memory.write("a", memory.allocate("a", 512 * KIB), np.random.default_rng(1).bytes(512 * KIB))
    memory.evict(MIB)
    assert charged(memory)["a", Cause.DEMOTION] == 0
    moved = space.demote("nvme", 256 * KIB)
    assert charged(memory)["a", Cause.DEMOTION] == moved >= 256 * KIB


def test_a_dirty_log_starts_full_and_then_has_what_is_written() -> None:
    memory = small_memory(MIB)
    va = memory.allocate("a", 64 * KIB)
    region = memory.space.regions.find(va)
    assert region is not None
    first, second = DirtyLog(region.nr_pages), DirtyLog(region.nr_pages)
    region.dirty_logs += [first, second]
    assert first.take().tolist() == list(range(16))
    assert second.take(limit=10).tolist() == list(range(10))
    memory.write("a", va + 4 * KIB - 1, b"xy")
    memory.write("a", va + 4 * KIB - 1, b"xy")
    memory.read("a", va + 5 * 4 * KIB, 1)
    assert first.take().tolist() == [0, 1]
    assert len(first) == 0
    assert second.take().tolist() == [0, 1, *range(10, 16)]
