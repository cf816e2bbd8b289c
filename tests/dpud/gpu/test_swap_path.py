# SPDX-License-Identifier: GPL-2.0-only
"""Swap behind the data path: bytes come back from tiers, loss is said, and the path asks what it was told to ask."""

import errno
from pathlib import Path

import numpy as np
import pytest
from small import KIB, MIB, errno_of, small_memory

from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.memory import GpuMemory
from dpud.gpu.store import HostPool
from dpud.gpu.swap.module import SwapModule
from dpud.gpu.swap.policy import S3Fifo
from dpud.gpu.swap.space import SwapSpace
from dpud.gpu.swap.tier import new_tier

RNG = np.random.default_rng(3)


class Swapping:
    """A device of 1 MiB, tiers of 512 KiB, 2 MiB and 8 MiB behind it, and a client with 4 MiB of noise."""

    def __init__(self, pool: HostPool | None = None, folder: Path | None = None, nr_bytes: int = 4 * MIB) -> None:
        self.clock = ManualClock()
        sizes = {"memory": 512 * KIB, "nvme": 2 * MIB, "hdd": 8 * MIB}
        tiers = [
            new_tier(name, size, self.clock, path=folder / name if folder else None) for name, size in sizes.items()
        ]
        self.swap = SwapModule(SwapSpace(tiers, self.clock))
        self.memory: GpuMemory = small_memory(MIB, clock=self.clock, pool=pool, swap=self.swap.space)
        self.swap.attach(self.memory)
        self.data = RNG.bytes(nr_bytes)
        self.va = self.memory.allocate("a", nr_bytes)
        self.memory.write("a", self.va, self.data)

    def check(self) -> None:
        assert violations(self.memory) == []
        assert self.swap.space.violations() == []


@pytest.mark.parametrize("policy", ["lru", "s3-fifo"])
@pytest.mark.parametrize("prefetch", ["none", "density", "stride", "majority"])
@pytest.mark.slow
def test_every_byte_comes_back(policy: str, prefetch: str) -> None:
    one = Swapping()
    one.swap.set_policy(policy)
    one.swap.set_prefetch(prefetch)
    assert one.memory.read("a", one.va, 4 * MIB) == one.data
    for at in range(0, 4 * MIB, 300 * KIB):
        assert one.memory.read("a", one.va + at, 9000) == one.data[at : at + 9000]
        one.memory.background(MIB)
    one.check()
    assert all(tier.nr_pages for tier in one.swap.space.tiers)


@pytest.mark.slow
def test_a_pool_in_between_is_drained_in_the_background() -> None:
    one = Swapping(HostPool(MIB))
    pool = one.memory.store.pool
    assert pool is not None
    assert pool.used_bytes > MIB * 95 // 100
    while one.memory.background(MIB):
        pass
    assert pool.used_bytes <= MIB * 95 // 100
    assert one.memory.read("a", one.va, 4 * MIB) == one.data
    one.check()


@pytest.mark.slow
def test_freed_memory_leaves_the_tiers() -> None:
    one = Swapping()
    one.memory.free(one.va)
    assert one.swap.space.used_bytes == 0
    one.check()


@pytest.mark.slow
def test_a_page_that_is_lost_on_disk_is_an_error_for_who_reads_it_only(tmp_path: Path) -> None:
    one = Swapping(folder=tmp_path)
    key, slot = next((key, slot) for key, slot in one.swap.space.slots() if slot.tier.name == "hdd")
    with (tmp_path / "hdd").open("r+b") as file:
        file.seek(slot.at + 1000)
        file.write(b"\0\1\2\3")
    region, page = one.memory.space.regions.page_of(key)
    va = region.va + page * 4096
    assert errno_of(one.memory.read, "a", va, 10) == errno.EIO
    assert errno_of(one.memory.read, "a", va, 10) == errno.EIO
    at = va - one.va
    assert one.memory.read("a", va + 4096, 4096) == one.data[at + 4096 : at + 8192]
    one.memory.write("a", va, b"n" * 4096)
    assert one.memory.read("a", va, 4096) == b"n" * 4096
    assert one.swap.space.events["corrupt"] == 1
    one.check()


@pytest.mark.slow
def test_when_all_is_full_who_asks_for_more_is_told() -> None:
    one = Swapping(nr_bytes=8 * MIB)
    more = one.memory.allocate("b", 8 * MIB)
    assert errno_of(one.memory.write, "b", more, RNG.bytes(8 * MIB)) == errno.ENOMEM
    one.memory.free(more)
    assert one.memory.read("a", one.va, 8 * MIB) == one.data
    one.check()


@pytest.mark.slow
def test_the_policy_that_was_chosen_is_asked() -> None:
    """Pages used twice stay through a scan with S3-FIFO, not with LRU."""
    kept = {}
    for policy in ("lru", "s3-fifo"):
        one = Swapping(nr_bytes=3 * MIB)
        one.swap.set_policy(policy)
        one.swap.set_prefetch("none")
        for _ in range(4):
            one.memory.read("a", one.va, 256 * KIB)
        one.memory.read("a", one.va + MIB, 2 * MIB)
        region = one.memory.space.regions.find(one.va)
        assert region is not None
        kept[policy] = int(np.count_nonzero(region.state[:64] == 1))
        one.check()
    assert kept["lru"] == 0
    assert kept["s3-fifo"] > 32
    assert all(isinstance(policy, S3Fifo) for policy in one.memory.locations[0].policy)


def test_prefetching_is_counted_as_it_happens() -> None:
    """Half of a block of 2 MiB on the device is evicted, and comes back in a few faults."""
    one = Swapping(nr_bytes=512 * KIB)
    one.memory.evict(512 * KIB)
    for at in range(0, 512 * KIB, 4 * KIB):
        assert one.memory.read("a", one.va + at, 4 * KIB) == one.data[at : at + 4 * KIB]
    accuracy = one.swap.accuracy
    assert accuracy.nr_missed < 16
    assert accuracy.nr_missed + accuracy.nr_used == 128
    assert accuracy.accuracy == 1
    one.check()


@pytest.mark.slow
def test_the_shadow_trace_judges_what_was_accessed() -> None:
    one = Swapping()
    for _ in range(3):
        one.memory.read("a", one.va, 2 * MIB)
    verdict = one.swap.judge()["device0"]
    assert verdict.pages == 1024
    assert verdict.accesses == 1024 + 3 * 512
    assert verdict.optimal < verdict.lru
    assert verdict.policy == verdict.lru
    one.swap.set_policy("s3-fifo")
    assert one.swap.judge()["device0"].policy < verdict.lru


@pytest.mark.slow
def test_who_thrashes_is_held_up_and_then_the_page_is_held() -> None:
    one = Swapping()
    one.swap.set_prefetch("none")
    for tier in one.swap.space.tiers:
        tier.timing.reads.latency_ns = tier.timing.writes.latency_ns = tier.timing.seek_ns = 0
    for _ in range(40):
        one.memory.read("a", one.va, 1)
        region = one.memory.space.regions.find(one.va)
        assert region is not None
        one.memory.residency.evict_pages(region, np.array([0]))
    assert one.swap.guard.nr_throttles == 10
    assert one.swap.guard.nr_pins == 1
    one.swap.guard.enabled = False
    one.check()
