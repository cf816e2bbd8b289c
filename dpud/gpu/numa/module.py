# SPDX-License-Identifier: MIT
"""NUMA as one part of a GpuMemory.

    topology = load("two-socket")
    clock = ManualClock()
    memory = GpuMemory(host=host_nodes(topology, 64 << 20, clock), clock=clock)
    numa = NumaModule(topology)
    numa.attach(memory)
    numa.placement.set_policy("interleave:0-1")

A memory whose host is in one piece has one node, whatever the machine is like (`merged`).
"""

import errno
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from dpud.gpu.address_space.regions import PageState, RegionType
from dpud.gpu.clock import Clock
from dpud.gpu.errors import GpuError
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.numa.balancer import Balancer
from dpud.gpu.numa.paths import Paths
from dpud.gpu.numa.placement import NodePlacement
from dpud.gpu.numa.tiers import TierPaths, Way
from dpud.gpu.numa.topology import LOCAL_DISTANCE, Node, Topology
from dpud.gpu.placement import OneHost
from dpud.gpu.swap.space import SwapSpace

if TYPE_CHECKING:
    from dpud.gpu.memory import GpuMemory

_GRAIN = 2 << 20
"""What a node's memory is a multiple of: the largest page."""


def host_nodes(
    topology: Topology, nr_bytes: int, clock: Clock, first_id: int = 0, grain: int = _GRAIN
) -> list[SimulatedDevice]:
    """Host memory of a GpuMemory: `nr_bytes` in all, divided as the topology's nodes are, each a multiple of `grain`
    and at least that."""
    total = sum(node.memory_bytes for node in topology.nodes)
    made = []
    for at, node in enumerate(topology.nodes):
        size = max(grain, nr_bytes * node.memory_bytes // total // grain * grain)
        latency_ns, bandwidth = int(topology.latency_ns[at, at]), int(topology.bandwidth[at, at])
        profile = DeviceProfile(f"node{node.nid}", size, bandwidth, latency_ns, bandwidth, latency_ns)
        made.append(SimulatedDevice(profile, clock, first_id + at))
    return made


def merged(topology: Topology) -> Topology:
    """All nodes as one: its latency is their mean, which is what memory spread over all of them has."""
    cpus = sorted(cpu for node in topology.nodes for cpu in node.cpus)
    node = Node(topology.nodes[0].nid, tuple(cpus), sum(each.memory_bytes for each in topology.nodes))
    if len(topology.nodes) == 1:
        return topology
    latency_ns, bandwidth = (int(matrix.mean()) for matrix in (topology.latency_ns, topology.bandwidth))
    return _single(node, latency_ns, bandwidth, f"{topology.source}; its nodes taken as one")


def one_node(nr_bytes: int, bytes_per_s: int, latency_ns: int) -> Topology:
    """Where there is no topology."""
    node = Node(0, (0,), nr_bytes)
    return _single(node, latency_ns, bytes_per_s, "no topology was named: all host memory is one node")


def _single(node: Node, latency_ns: int, bytes_per_s: int, source: str) -> Topology:
    distance, latency, bandwidth = (
        np.full((1, 1), value, dtype=np.int64) for value in (LOCAL_DISTANCE, latency_ns, bytes_per_s)
    )
    return Topology((node,), distance, latency, bandwidth, source)


class NumaModule:
    """Placement and balancer of a GpuMemory."""

    def __init__(self, topology: Topology, is_modelled: bool = True) -> None:
        """`is_modelled`: whether transfers take as long as the topology says, or as the hardware's profile."""
        self.topology, self._is_modelled = topology, is_modelled
        self._memory: GpuMemory | None = None

    @property
    def memory(self) -> "GpuMemory":
        assert self._memory is not None, "not attached"
        return self._memory

    def detach(self) -> None:
        """Pages stay where they are, and are put on the first node from now on."""
        memory = self.memory
        memory.numa = memory.faults.balancer = None
        memory.faults.placement = OneHost(memory.nr_devices)
        memory.residency.demote = lambda _location, _nr_frames: 0
        for location in memory.locations:
            location.paths = ()
        if isinstance(memory.store.swap, SwapSpace):
            memory.store.swap.crossing = None

    def attach(self, memory: "GpuMemory") -> None:
        """Have a memory's pages put, and moved, by this module. Raises GpuError(EINVAL) where nodes do not fit."""
        nr_hosts = len(memory.locations) - memory.nr_devices
        if nr_hosts == 1:
            self.topology = merged(self.topology)
        if len(self.topology.nodes) != nr_hosts:
            raise GpuError(errno.EINVAL, f"{nr_hosts} host memories for {len(self.topology.nodes)} nodes")
        self._memory, memory.numa = memory, self
        self.placement = NodePlacement(self.topology, memory.locations, memory.nr_devices)
        self.paths = Paths(self.topology, self.placement, memory.locations)
        if self._is_modelled and nr_hosts > 1:
            self.paths.apply(memory.locations)
        self.balancer = Balancer(memory, self.placement, self.paths)
        memory.faults.placement = self.placement
        memory.faults.balancer = self.balancer if nr_hosts > 1 else None
        memory.residency.demote = self.balancer.demote
        swap = memory.store.swap
        if isinstance(swap, SwapSpace) and nr_hosts > 1:
            swap.crossing = TierPaths(self.topology, self.placement, self.paths, self._is_modelled)

    def stats(self) -> dict[str, int]:
        """Counters."""
        tiers = self.tiers.stat if self.tiers is not None else {}
        return {**self.balancer.stat, **tiers, **self._allocated()}

    @property
    def tiers(self) -> TierPaths | None:
        """Of swap, where there are some, and several nodes."""
        swap = self.memory.store.swap
        crossing = swap.crossing if isinstance(swap, SwapSpace) else None
        return crossing if isinstance(crossing, TierPaths) else None

    def ways(self) -> list[Way]:
        """From each node to each swap tier."""
        swap = self.memory.store.swap
        if self.tiers is None or not isinstance(swap, SwapSpace):
            return []
        return list(self.tiers.ways(swap.tiers, self.placement.hosts))

    def _allocated(self) -> Counter[str]:
        total: Counter[str] = Counter(dict.fromkeys(self.placement.stat[0], 0))
        for each in self.placement.stat:
            total.update(each)
        return total

    def violations(self) -> list[str]:
        """What cannot be, if all is right."""
        found = []
        memory = self.memory
        for key, heat in self.balancer.heats.items():
            if heat.waited_ns < 0 or (heat.counts < 0).any():
                found.append(f"page {key:#x} was missed a negative number of times")
        for region in memory.space.regions:
            resident = region.state == PageState.RESIDENT
            if (
                region.type in (RegionType.HOST, RegionType.PINNED)
                and (region.home[resident] < memory.nr_devices).any()
            ):
                found.append(f"host memory at {region.va:#x} is on a device")
        return found
