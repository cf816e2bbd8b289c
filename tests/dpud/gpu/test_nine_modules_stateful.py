# SPDX-License-Identifier: GPL-2.0-only
"""All nine modules at once, as a daemon has them: compression, swap on real tiers, one address space, QoS, overcommit,
defragmentation, NUMA, migration, fault recovery. Whatever clients and operators do, no byte is another than it was.
"""

import errno
from dataclasses import replace

import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small import KIB, MIB, attempt
from test_data_path_stateful import CLIENTS, FRACTIONS
from test_restoring_stateful import RestoringPath

from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.compression import CompressionSystem
from dpud.gpu.compression.pool import CompressedPool
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.numa.module import NumaModule, host_nodes
from dpud.gpu.numa.rules import OFF, RULES
from dpud.gpu.numa.topology import load
from dpud.gpu.overcommit import Admission
from dpud.gpu.overcommit.predictor import POLICIES
from dpud.gpu.swap.module import SwapModule
from dpud.gpu.swap.policy import names
from dpud.gpu.swap.space import SwapSpace
from dpud.gpu.swap.tier import new_tier

NODES = st.sampled_from([2, 3])


class NinePath(RestoringPath):
    """Two devices, two nodes, three tiers."""

    may_fail = (*RestoringPath.may_fail, errno.ENOMEM)

    def new_memory(self) -> GpuMemory:
        topology = replace(load("two-socket"), tiers={"memory0": 0, "memory1": 1, "nvme": 1})
        self.admission = Admission(768 * KIB)
        clock = self.admission.clock
        sizes = 512 * KIB, 256 * KIB
        devices = [SimulatedDevice(DeviceProfile(memory_bytes=size), clock, nr) for nr, size in enumerate(sizes)]
        tiers = [new_tier(name, 256 * KIB, clock) for name in topology.tiers]
        system = CompressionSystem()
        self.swap = SwapModule(SwapSpace(tiers, clock))
        memory = GpuMemory(
            devices,
            host=host_nodes(topology, 512 * KIB, clock, 2, 64 * KIB),
            clock=clock,
            codec=system,
            pool=CompressedPool(MIB, system),
            swap=self.swap.space,
            admission=self.admission,
            pressure=self.admission.pressure,
        )
        self.swap.attach(memory)
        self.numa = NumaModule(topology)
        self.numa.attach(memory)
        self.numa.balancer.min_period_ns = 1
        self.numa.balancer.set_period(1000)
        return memory

    @rule(policy=st.sampled_from(list(POLICIES)), client=st.sampled_from(CLIENTS), priority=st.integers(0, 3))
    def promise_memory(self, policy: str, client: str, priority: int) -> None:
        self.admission.policy = policy
        self.admission.account(client).own_priority = priority

    @rule(name=st.sampled_from(list(names())), prefetch=st.sampled_from(["none", "density", "stride"]))
    def swap_by(self, name: str, prefetch: str) -> None:
        self.swap.set_policy(name)
        self.swap.set_prefetch(prefetch)

    @rule(name=st.sampled_from([OFF, *RULES]), policy=st.sampled_from(["local", "bind:0", "interleave", "weighted"]))
    def place(self, name: str, policy: str) -> None:
        self.numa.balancer.rule = name
        self.numa.placement.set_policy(policy)

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS, node=NODES, nr=st.integers(5, 40))
    def use(self, which: float, node: int, nr: int) -> None:
        """All over a region, from one node: so that pages come there."""
        owner = self.pick(which).owner
        for number in range(nr):
            self.read(owner, which, number / nr, 0.0, node)

    @rule(nr_bytes=st.integers(1, 600 * KIB), location=st.sampled_from([0, 1, 2, 3]))
    def evict(self, nr_bytes: int, location: int) -> None:
        free = self.memory.locations[location].frames.nr_free_bytes
        freed = self.memory.evict(nr_bytes, location)
        assert self.memory.locations[location].frames.nr_free_bytes - free == freed

    @rule(tier=st.sampled_from(["memory0", "memory1", "nvme"]), nr_bytes=st.integers(1, 128 * KIB))
    def sink(self, tier: str, nr_bytes: int) -> None:
        self.swap.space.demote(tier, nr_bytes)
        assert self.swap.space.violations() == []

    @rule(ns=st.integers(1, 10**9))
    def time_passes(self, ns: int) -> None:
        self.admission.clock.sleep_until(self.admission.clock.now_ns() + ns)
        self.memory.sample()

    @rule(size=st.integers(1, 200 * KIB), client=st.sampled_from(CLIENTS))
    def ask_and_return(self, size: int, client: str) -> None:
        """Promises are kept, or not made."""
        before = self.admission.nr_granted
        number = attempt(lambda: self.memory.free(self.memory.allocate(client, size, RegionType.MANAGED)))
        assert number in (0, *self.may_fail)
        assert self.admission.nr_granted == before

    def teardown(self) -> None:
        super().teardown()
        self.swap.space.close()


TestNinePath = NinePath.TestCase
TestNinePath.settings = settings(max_examples=examples(20), stateful_step_count=40, deadline=None)
TestNinePath.pytestmark = [pytest.mark.slow]
