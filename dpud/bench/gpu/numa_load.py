# SPDX-License-Identifier: GPL-2.0-only
"""Who uses which page, and the best that could be done about it: for the benchmark of NUMA.

Each page belongs to a node with CPUs, which makes most of its accesses; the others share the rest. Pages differ in how
often they are used, by Zipf's law. In the second phase pages belong to the next node, and other pages are popular.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.regions import Region, RegionType
from dpud.gpu.clock import ManualClock
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.numa.module import NumaModule, host_nodes
from dpud.gpu.numa.topology import Topology, load

Floats = NDArray[np.float64]

PAGE_BYTES = 4 << 10
ACCESS_BYTES = 64
FULL = 0.75
"""Of all memory that pages take."""
OWN = 0.8
"""Of a page's accesses that its own node makes."""
ZIPF = 0.8
NODE_BYTES = 32 * PAGE_BYTES
"""Of the smallest node."""
HORIZON_NS = 3_000_000
"""About as long as a phase takes."""
PERIOD_NS = 100_000
"""Of a scan, at most: about 700 accesses. It may adapt to a quarter of that."""


@dataclass(frozen=True)
class Load:
    """`use[page, node]`: probability that the next access is this one; one matrix a phase."""

    topology: Topology
    phases: tuple[Floats, ...]

    @property
    def nr_pages(self) -> int:
        return len(self.phases[0])

    def accesses(self, phase: int, nr: int, seed: int) -> NDArray[np.int64]:
        """[access, (page, node)]"""
        use = self.phases[phase]
        drawn = np.random.default_rng([seed, phase]).choice(use.size, nr, p=use.ravel())
        return np.stack(np.unravel_index(drawn, use.shape), axis=1)


def make(name: str, seed: int = 3) -> Load:
    topology = load(name)
    smallest = min(node.memory_bytes for node in topology.nodes)
    sizes = [NODE_BYTES * node.memory_bytes // smallest for node in topology.nodes]
    nr_pages = int(FULL * sum(sizes) / PAGE_BYTES)
    users = [at for at, node in enumerate(topology.nodes) if node.cpus]
    rng = np.random.default_rng(seed)
    owner = rng.integers(len(users), size=nr_pages)
    return Load(topology, tuple(_use(topology, users, owner + phase, rng) for phase in range(2)))


def _use(topology: Topology, users: list[int], owner: NDArray[np.int64], rng: np.random.Generator) -> Floats:
    heat = 1 / np.arange(1, len(owner) + 1) ** ZIPF
    use = np.zeros((len(owner), len(topology.nodes)))
    use[:, users] = (1 - OWN) / len(users)
    use[np.arange(len(owner)), np.array(users)[owner % len(users)]] += OWN
    use *= rng.permutation(heat)[:, None]
    shares: Floats = use / use.sum()
    return shares


def memory_of(topology: Topology) -> tuple[GpuMemory, NumaModule]:
    """With nodes of NODE_BYTES and multiples of it."""
    clock = ManualClock()
    total = NODE_BYTES * sum(node.memory_bytes for node in topology.nodes)
    nr_bytes = total // min(node.memory_bytes for node in topology.nodes)
    device = SimulatedDevice(DeviceProfile(memory_bytes=NODE_BYTES), clock)
    memory = GpuMemory([device], host=host_nodes(topology, nr_bytes, clock, 1, NODE_BYTES), clock=clock)
    numa = NumaModule(topology)
    numa.attach(memory)
    return memory, numa


def costs_ns(numa: NumaModule) -> Floats:
    """Of an access, [node that accesses, node whose memory]."""
    first = numa.memory.nr_devices
    return numa.paths.costs_ns(ACCESS_BYTES)[first:, first:]


def best_ns(use: Floats, numa: NumaModule) -> float:
    """Mean cost of an access where each page is in the best place that there is room for: an assignment of pages to
    frames, solved exactly (Jonker-Volgenant)."""
    from scipy.optimize import linear_sum_assignment

    by_node = use @ costs_ns(numa)
    frames = [host.frames.nr_bytes // PAGE_BYTES for host in numa.placement.hosts]
    pages, slots = linear_sum_assignment(np.repeat(by_node, frames, axis=1))
    return float(by_node[pages, np.repeat(np.arange(len(frames)), frames)[slots]].sum())


@dataclass(frozen=True)
class Strategy:
    """How pages are put, and by which rule they move."""

    policy: str
    rule: str


STRATEGIES = {
    "dpud (cost)": Strategy("local", "cost"),
    "first touch": Strategy("local", "off"),
    "interleave": Strategy("interleave", "off"),
    "weighted interleave": Strategy("weighted", "off"),
    "two hint faults (AutoNUMA)": Strategy("local", "two-fault"),
    "TPP": Strategy("local", "tpp"),
}


class Run:
    """One strategy on a load. The first node writes all pages: what a single-threaded loader does."""

    def __init__(self, load: Load, strategy: Strategy) -> None:
        self.load = load
        self.memory, self.numa = memory_of(load.topology)
        self.numa.placement.set_policy(strategy.policy)
        balancer = self.numa.balancer
        balancer.rule, balancer.min_period_ns, balancer.max_period_ns = strategy.rule, PERIOD_NS // 4, PERIOD_NS
        balancer.horizon_ns = HORIZON_NS
        balancer.set_period(PERIOD_NS)
        va = self.memory.allocate("load", load.nr_pages * PAGE_BYTES, RegionType.HOST, page_size=PAGE_BYTES)
        region = self.memory.space.regions.find(va)
        assert region is not None
        self.region: Region = region
        for page in range(load.nr_pages):
            self.memory.write("load", va + page * PAGE_BYTES, b"x", self.memory.nr_devices)

    def play(self, phase: int, nr: int, seed: int) -> int:
        """Make accesses -> pages that moved meanwhile."""
        stat, first = self.numa.balancer.stat, self.memory.nr_devices
        before = stat["promoted"] + stat["demoted"]
        for page, node in self.load.accesses(phase, nr, seed).tolist():
            self.memory.read("load", self.region.va + page * PAGE_BYTES, ACCESS_BYTES, first + node)
        return stat["promoted"] + stat["demoted"] - before

    def expected_ns(self, phase: int) -> float:
        """Mean cost of an access with pages where they are now: without the noise of a sample."""
        homes = self.region.home.astype(np.int64) - self.memory.nr_devices
        by_node = self.load.phases[phase] @ costs_ns(self.numa)
        return float(by_node[np.arange(len(homes)), homes].sum())
