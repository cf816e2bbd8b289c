# SPDX-License-Identifier: MIT
"""Which node a new page of host memory is put on: Linux's memory policies (Documentation/admin-guide/mm/
numa_memory_policy.rst), in the notation of tmpfs's mount option mpol.

    local                  the node of who touches it first
    prefer:1               that node
    bind:0-1               the nearest of these, and no other
    interleave:0-3         one after the other; all nodes where none are named
    weighted:0-3           as many on each as its weight says, in turn

Where a node is full, the next one of its fallback list is taken; `bind` has only its own nodes. PINNED memory is put
near its device whatever the policy: it can never move.
"""

import errno
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpud.gpu.address_space.regions import Region, RegionType
from dpud.gpu.errors import GpuError
from dpud.gpu.location import Location
from dpud.gpu.numa.topology import Topology, format_list, parse_list
from dpud.gpu.placement import Pages

MODES = ("local", "prefer", "bind", "interleave", "weighted")
MAX_WEIGHT = 255
STAT = ("numa_hit", "numa_miss", "numa_foreign", "interleave_hit", "local_node", "other_node")
"""Of each node, as in its numastat (Documentation/admin-guide/numastat.rst)."""


@dataclass
class Turns:
    """Where a round over the nodes stands."""

    at: int = 0
    """Position in the list of nodes."""
    nr: int = 0
    """Pages that this node has had of its turn."""


class NodePlacement:
    """A Placement. Nodes are positions in the topology; node n is location nr_devices + n."""

    def __init__(self, topology: Topology, locations: Sequence[Location], nr_devices: int) -> None:
        self.topology, self._nr_devices = topology, nr_devices
        self.hosts = locations[nr_devices:]
        self.mode, self.nodes = "local", list(range(len(topology.nodes)))
        self.auto = True
        self.weights = topology.auto_weights()
        self.stat = [Counter(dict.fromkeys(STAT, 0)) for _ in topology.nodes]
        self._turns = Turns()

    @property
    def first_host(self) -> int:
        """Location of the first node."""
        return self._nr_devices

    # What it is told.

    def set_policy(self, text: str) -> None:
        """Raises GpuError(EINVAL), and nothing has changed."""
        mode, _, listed = text.strip().partition(":")
        if mode not in MODES or (mode == "local" and listed) or (mode in ("prefer", "bind") and not listed):
            raise GpuError(errno.EINVAL, f"{text!r}: one of {', '.join(MODES)}, with nodes after a colon")
        try:
            nodes = [self.topology.position(nid) for nid in parse_list(listed)]
        except ValueError as error:
            raise GpuError(errno.EINVAL, f"{listed!r} is no list of nodes") from error
        if mode == "prefer" and len(nodes) != 1:
            raise GpuError(errno.EINVAL, "prefer takes one node")
        self.mode, self.nodes = mode, nodes or list(range(len(self.topology.nodes)))
        self._turns = Turns()

    @property
    def policy(self) -> str:
        """As `set_policy` takes it."""
        nids = format_list([self.topology.nodes[at].nid for at in self.nodes])
        return self.mode if self.mode == "local" else f"{self.mode}:{nids}"

    def set_weight(self, node: int, weight: int) -> None:
        """1 to 255, as weighted_interleave/nodeN; 0 takes what `auto` would. Weights are by hand from then on."""
        self.auto = False
        self.weights[node] = weight or self.topology.auto_weights()[node]
        self._turns = Turns()

    def set_auto(self, on: bool) -> None:
        """Whether weights follow bandwidth. Switched off, they stay as they are."""
        self.auto = on
        if on:
            self.weights = self.topology.auto_weights()
            self._turns = Turns()

    # What the path asks.

    def node_of(self, at: int) -> int:
        """Position of the node that a location is, or hangs at."""
        return self.topology.device_node(at) if at < self._nr_devices else at - self._nr_devices

    def nearest(self, at: int) -> int:
        return self._nr_devices + self.node_of(at)

    def place(self, region: Region, pages: Pages, at: int) -> Pages:
        near = self.node_of(at)
        is_pinned = region.type is RegionType.PINNED
        wishes = [near] * len(pages) if is_pinned else self._wishes(near, len(pages))
        room = [host.frames.nr_free_for(region.order) >> region.order for host in self.hosts]
        placed = [self._take(wish, room, is_pinned) for wish in wishes]
        for wish, node in zip(wishes, placed, strict=True):
            self._count(wish, node, near)
        return np.array(placed, dtype=np.int64) + self._nr_devices

    def _wishes(self, near: int, nr: int) -> list[int]:
        if self.mode in ("interleave", "weighted"):
            return [self._next() for _ in range(nr)]
        if self.mode == "local":
            return [near] * nr
        return [next(node for node in self.topology.fallback(near) if node in self.nodes)] * nr

    def _next(self) -> int:
        """Whose turn it is; each has as many in a row as it weighs."""
        turns = self._turns
        while turns.nr >= (self.weights[self.nodes[turns.at]] if self.mode == "weighted" else 1):
            turns.at, turns.nr = (turns.at + 1) % len(self.nodes), 0
        turns.nr += 1
        return self.nodes[turns.at]

    def _take(self, wish: int, room: list[int], is_pinned: bool) -> int:
        """The first of the fallback list that has room; where none has, pages leave the node that was wanted."""
        allowed = self.nodes if self.mode == "bind" and not is_pinned else range(len(room))
        for node in self.topology.fallback(wish):
            if node in allowed and room[node] > 0:
                room[node] -= 1
                return node
        return wish

    def _count(self, wish: int, node: int, near: int) -> None:
        stat = self.stat[node]
        if wish == node:
            stat["numa_hit"] += 1
            stat["interleave_hit"] += self.mode in ("interleave", "weighted")
        else:
            stat["numa_miss"] += 1
            self.stat[wish]["numa_foreign"] += 1
        stat["local_node" if node == near else "other_node"] += 1
