# SPDX-License-Identifier: MIT
"""Swap tiers in the topology: what lies between a tier and the memory that a page leaves, or comes to.

Theory of operation
    A tier hangs at a node. Its own time (swap/profile.py) is that of a page of this node. A page of another node, or of
    a device that hangs at another, goes over what is between the nodes too: the later and the more slowly, by as much
    as the topology says that this costs more than from next to it. Whoever waits for the tier waits for that as well.

    A page goes to the tier from which it is there and back soonest, tier and way taken together. So of two tiers that
    are alike the near one is preferred; a fast one that is far away may still be better than a slow one that is near.
    Tiers that are full, or broken, are passed over as ever, and what sinks from tier to tier goes by their own order.

A page in the pool lies at the node nearest to the location that it left (moves.py), and goes on from there.

Differs from hardware: ways between nodes are not shared with other traffic. What sinks from one tier to another
takes no way.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpud.gpu.hal.engine import NS_PER_S
from dpud.gpu.location import Location
from dpud.gpu.numa.paths import Paths
from dpud.gpu.numa.placement import NodePlacement
from dpud.gpu.numa.topology import Topology
from dpud.gpu.swap.tier import Tier

PAGE_BYTES = 4096
"""For which the table of costs is reckoned."""
STAT = ("swap_local", "swap_remote", "swap_remote_bytes", "swap_remote_ns", "swap_near_preferred")


@dataclass(frozen=True)
class Way:
    """From a node to a tier, for a page there and back."""

    node: int
    tier: str
    rank: int
    """0: preferred."""
    tier_ns: int
    crossing_ns: int
    nr_out: int
    nr_in: int


class TierPaths:
    """A space.Crossing."""

    def __init__(self, topology: Topology, placement: NodePlacement, paths: Paths, is_modelled: bool) -> None:
        """`is_modelled`: whether the way takes time, or is only preferred and counted."""
        self._topology, self._placement, self._paths, self._is_modelled = topology, placement, paths, is_modelled
        self.stat: Counter[str] = Counter(dict.fromkeys(STAT, 0))
        self._pages: Counter[tuple[int, str, bool]] = Counter()  # (node, tier, whether they went out)
        self._first = placement.first_host

    def _ns(self, tier: str, location: int, nr_bytes: int) -> int:
        """What the way costs beyond that from next to the tier."""
        paths = self._paths.paths
        far = paths[self._first + self._topology.tier_node(tier)][location]
        near = paths[self._placement.nearest(location)][location]
        slower = NS_PER_S * nr_bytes // far.bytes_per_s - NS_PER_S * nr_bytes // near.bytes_per_s
        return max(0, far.latency_ns - near.latency_ns) + max(0, slower)

    def order(self, tiers: Sequence[Tier], location: int, nr_bytes: int) -> list[int]:
        """Numbers of tiers, from the one from which so much is there and back soonest."""
        costs = [_tier_ns(tier, nr_bytes) + 2 * self._ns(tier.name, location, nr_bytes) for tier in tiers]
        return sorted(range(len(tiers)), key=lambda number: (costs[number], number))

    def crossed(self, tier: Tier, location: int, nr_pages: int, nr_bytes: int, *, out: bool) -> int:
        """Pages go between a location's memory and a tier -> ns that the way takes."""
        ns = self._ns(tier.name, location, nr_bytes) if self._is_modelled else 0
        node = self._placement.node_of(location)
        self._pages[node, tier.name, out] += nr_pages
        if node == self._topology.tier_node(tier.name):
            self.stat["swap_local"] += nr_pages
        else:
            self.stat["swap_remote"] += nr_pages
            self.stat["swap_remote_bytes"] += nr_bytes
            self.stat["swap_remote_ns"] += ns
        return ns

    def preferred(self, nr_pages: int) -> None:
        """Pages went to another tier than the fastest because it is nearer."""
        self.stat["swap_near_preferred"] += nr_pages

    def ways(self, tiers: Sequence[Tier], hosts: Sequence[Location]) -> Iterator[Way]:
        """Why pages of which node go where."""
        for node, host in enumerate(hosts):
            for rank, number in enumerate(self.order(tiers, host.number, PAGE_BYTES)):
                tier = tiers[number]
                crossing_ns = 2 * self._ns(tier.name, host.number, PAGE_BYTES)
                counts = self._pages[node, tier.name, True], self._pages[node, tier.name, False]
                yield Way(node, tier.name, rank, _tier_ns(tier, PAGE_BYTES), crossing_ns, *counts)


def _tier_ns(tier: Tier, nr_bytes: int) -> int:
    """There and back, with nobody else there."""
    timing = tier.timing
    engines = timing.writes, timing.reads
    ns = sum(engine.latency_ns + NS_PER_S * nr_bytes // engine.bandwidth_bytes_per_s for engine in engines)
    return ns + 2 * timing.seek_ns
