# SPDX-License-Identifier: GPL-2.0-only
"""Anything that clients can do, with host memory in nodes, pages sampled all the time, and whatever rule moves them."""

import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small import KIB, DictSwap
from test_data_path_stateful import FRACTIONS, Path

from dpud.gpu.address_space.permissions import Permission
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.clock import ManualClock
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.numa.module import NumaModule, host_nodes
from dpud.gpu.numa.rules import OFF, RULES
from dpud.gpu.numa.topology import load
from dpud.gpu.store import HostPool

NODES = st.sampled_from([2, 3])


class NumaPath(Path):
    """Each begins with a region of host memory, on node 0, that its owner may use."""

    def __init__(self) -> None:
        super().__init__()
        self.allocate("ann", 100 * KIB, 4096, RegionType.HOST, Permission.READ | Permission.WRITE, 0)
        self.write("ann", 0.0, 0.0, 0.999, 2, same=False)

    def new_memory(self) -> GpuMemory:
        clock, topology = ManualClock(), load("two-socket")
        sizes = 512 * KIB, 256 * KIB
        devices = [
            SimulatedDevice(DeviceProfile(memory_bytes=size), clock, number) for number, size in enumerate(sizes)
        ]
        hosts = host_nodes(topology, 512 * KIB, clock, 2, 64 * KIB)
        memory = GpuMemory(devices, host=hosts, clock=clock, pool=HostPool(192 * KIB), swap=DictSwap(512 * KIB))
        self.numa = NumaModule(topology)
        self.numa.attach(memory)
        self.numa.balancer.min_period_ns = 1
        self.numa.balancer.set_period(1000)
        self.numa.balancer.horizon_ns = 1_000_000_000
        return memory

    @rule(policy=st.sampled_from(["local", "prefer:1", "bind:0", "bind:0-1", "interleave", "weighted"]))
    def place(self, policy: str) -> None:
        self.numa.placement.set_policy(policy)

    @rule(name=st.sampled_from([OFF, *RULES]), limit=st.sampled_from([0, 65536]))
    def balance(self, name: str, limit: int) -> None:
        self.numa.balancer.rule, self.numa.balancer.limit_MBps = name, limit

    @precondition(lambda self: self.models)
    @rule(which=st.one_of(st.just(0.0), FRACTIONS), node=NODES, nr=st.integers(5, 80))
    def use(self, which: float, node: int, nr: int) -> None:
        """All over the region, from one node: so that pages come there."""
        owner = self.pick(which).owner
        for number in range(nr):
            self.read(owner, which, number / nr, 0.0, node)

    @rule(nr_bytes=st.integers(1, 600 * KIB), location=st.sampled_from([0, 1, 2, 3]))
    def evict(self, nr_bytes: int, location: int) -> None:
        free = self.memory.locations[location].frames.nr_free_bytes
        freed = self.memory.evict(nr_bytes, location)
        assert self.memory.locations[location].frames.nr_free_bytes - free == freed


TestNumaPath = NumaPath.TestCase
TestNumaPath.settings = settings(max_examples=examples(25), stateful_step_count=30, deadline=None)
TestNumaPath.pytestmark = [pytest.mark.slow]
