# SPDX-License-Identifier: MIT
"""What it costs to get from any location to any memory, by the topology.

Between nodes it is the matrix. A device's link comes on top: its latency is added, and the narrower of both says how
fast it goes; to its own memory there is only the link, since bytes move between memory and the caller (memory.py).
Between two devices bytes go over both links and what is between their nodes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.hal.engine import NS_PER_S
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.location import Location, Path
from dpud.gpu.numa.placement import NodePlacement
from dpud.gpu.numa.topology import Topology

Costs = NDArray[np.float64]


class Paths:
    """[who accesses, whose memory], by location."""

    def __init__(self, topology: Topology, placement: NodePlacement, locations: Sequence[Location]) -> None:
        self._topology, self._placement = topology, placement
        self.paths = [[self._path(at, memory) for memory in locations] for at in locations]

    def _path(self, at: Location, memory: Location) -> Path:
        links = [_link(each) for each in ((at,) if at is memory else (at, memory)) if not each.is_host]
        if at is memory and links:
            return links[0]
        ends = self._placement.node_of(at.number), self._placement.node_of(memory.number)
        own = Path(int(self._topology.latency_ns[ends]), int(self._topology.bandwidth[ends]))
        return Path(
            own.latency_ns + sum(link.latency_ns for link in links),
            min(own.bytes_per_s, *(link.bytes_per_s for link in links), own.bytes_per_s),
        )

    def costs_ns(self, nr_bytes: int) -> Costs:
        """Of an access of so many bytes, [who accesses, whose memory]."""
        rows = [[path.latency_ns + nr_bytes * NS_PER_S / path.bytes_per_s for path in row] for row in self.paths]
        return np.array(rows, dtype=np.float64)

    def apply(self, locations: Sequence[Location]) -> None:
        """Have the locations' transfers take that long."""
        for memory in locations:
            memory.paths = [row[memory.number] for row in self.paths]


def _link(device: Location) -> Path:
    """What its profile says; without one, nothing on top."""
    hardware = device.hardware
    if not isinstance(hardware, SimulatedDevice):
        return Path(0, 1 << 62)
    return Path(hardware.profile.link_latency_ns, hardware.profile.link_bytes_per_s)
