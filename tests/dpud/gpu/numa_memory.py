# SPDX-License-Identifier: GPL-2.0-only
"""A small memory whose host is divided into nodes."""

from typing import Any

from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.clock import ManualClock
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.numa.module import NumaModule, host_nodes
from dpud.gpu.numa.topology import Topology, load

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4 * KIB


class Nodes:
    """Two devices of 2 MiB; nodes of 2 MiB each."""

    def __init__(self, topology: str | Topology = "two-socket", nr_devices: int = 2, **collaborators: Any) -> None:
        self.clock: ManualClock = collaborators.pop("clock", None) or ManualClock()
        self.topology = topology if isinstance(topology, Topology) else load(topology)
        devices = [
            SimulatedDevice(DeviceProfile(memory_bytes=2 * MIB), self.clock, number) for number in range(nr_devices)
        ]
        hosts = host_nodes(self.topology, 1, self.clock, nr_devices)
        self.memory = GpuMemory(devices, host=hosts, clock=self.clock, **collaborators)
        self.numa = NumaModule(self.topology)
        self.numa.attach(self.memory)
        self.balancer, self.placement = self.numa.balancer, self.numa.placement

    def sample_every(self, ns: int) -> None:
        self.balancer.min_period_ns = self.balancer.max_period_ns = ns
        self.balancer.set_period(ns)
        self.balancer.horizon_ns = 32 * ns

    def at(self, node: int) -> int:
        """Location of a node."""
        return self.memory.nr_devices + node

    def allocate(self, nr_bytes: int, type: RegionType = RegionType.HOST, device: int | None = None) -> int:
        return self.memory.allocate("c", nr_bytes, type, page_size=PAGE, device=device)

    def on(self, va: int) -> list[int]:
        """Resident pages of a region by node."""
        region = self.memory.space.regions.find(va)
        assert region is not None
        return [region.nr_resident(self.at(node)) for node in range(len(self.topology.nodes))]

    def read_ns(self, va: int, at: int, nr_bytes: int = 64) -> int:
        begin_ns = self.clock.now_ns()
        self.memory.read("c", va, nr_bytes, at)
        return self.clock.now_ns() - begin_ns
