# SPDX-License-Identifier: GPL-2.0-only
"""On the path a policy decides what it decides alone: the same pages leave, on the same accesses."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from small import KIB

from dpud.bench.gpu.traces import TRACES
from dpud.gpu.memory import GpuMemory
from dpud.gpu.policy import ReplacementPolicy
from dpud.gpu.swap.module import SwapModule
from dpud.gpu.swap.policy import new_policy
from dpud.gpu.system import GpuConfig, build

PAGE = 4 * KIB
NR_FRAMES = 128
NR_PAGES = 400


def alone(policy: ReplacementPolicy, trace: Sequence[int], capacity: int, batch: int = 1) -> tuple[list[int], set[int]]:
    """(keys missed, in order; keys held at the end) of a policy that evicts `batch` pages when there is no room."""
    held: set[int] = set()
    missed = []
    for key in trace:
        if key in held:
            policy.access(key)
            continue
        missed.append(key)
        policy.miss(key)
        if len(held) == capacity:
            for _ in range(batch):
                victim = policy.victim()
                assert victim is not None
                held.discard(victim)
        policy.insert(key)
        held.add(key)
    return missed, held


class Live:
    """A device of 128 pages with a pool, as the daemon builds it, and one client."""

    def __init__(self, policy: str) -> None:
        self.memory: GpuMemory = build(GpuConfig(1, NR_FRAMES * PAGE, 8 << 20, 64 << 20, tiers={"nvme": 1 << 20}))
        self.swap = self.memory.watcher
        assert isinstance(self.swap, SwapModule)
        self.swap.set_policy(policy)
        self.swap.set_prefetch("none")
        self.swap.guard.enabled = False
        self.va = self.memory.allocate("ann", NR_PAGES * PAGE, page_size=PAGE)
        region = self.memory.space.regions.find(self.va)
        assert region is not None
        self.region = region
        self.missed: list[int] = []

    def run(self, trace: Sequence[int]) -> None:
        """Write each page of a trace in turn; half of the writes are of whole pages."""
        whole, rng = bytes(PAGE), random.Random(7)
        for page in trace:
            if self.region.state[page] != 1:
                self.missed.append(page)
            data = whole if rng.random() < 0.5 else b"x"
            self.memory.write("ann", self.va + page * PAGE, data)

    @property
    def held(self) -> set[int]:
        return set(np.flatnonzero(self.region.state == 1).tolist())


def trace_of(name: str) -> list[int]:
    return [page % NR_PAGES for page in TRACES[name](1200, NR_PAGES)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "s3-fifo"])
@pytest.mark.parametrize("name", ["zipf", "random"])
def test_one_by_one(policy: str, name: str) -> None:
    live = Live(policy)
    live.memory.residency.cluster_bytes = 0
    live.run(trace_of(name))
    missed, held = alone(new_policy(policy), trace_of(name), NR_FRAMES)
    assert len(missed) > NR_FRAMES  # it did evict
    assert live.missed == missed
    assert live.held == held


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "s3-fifo"])
def test_in_clusters(policy: str) -> None:
    """What leaves ahead of its turn is what the policy gives when it is asked for as many at once."""
    live = Live(policy)
    live.run(trace_of("random"))
    batch = 8  # a sixteenth of the device is less than CLUSTER_BYTES
    missed, held = alone(new_policy(policy), trace_of("random"), NR_FRAMES, batch)
    assert live.missed == missed
    assert live.held == held


def test_two_clients_have_policies_of_their_own() -> None:
    """Admission says from whom, the client's own policy which."""
    live = Live("lru")
    other = live.memory.allocate("bob", NR_PAGES * PAGE, page_size=PAGE)
    policies = live.memory.locations[0].policy
    live.run(range(80))
    live.memory.write("bob", other, bytes(20 * PAGE))
    assert (len(policies.of("ann")), len(policies.of("bob"))) == (80, 20)
    live.run(range(5))
    live.memory.residency.evict(live.memory.locations[0], 2 * 15, (), "ann")
    assert live.held == {*range(5), *range(20, 80)}
    assert len(policies.of("bob")) == 20
    live.memory.remove_client("bob")
    assert len(policies) == 65
