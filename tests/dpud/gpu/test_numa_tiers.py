# SPDX-License-Identifier: GPL-2.0-only
"""Swap tiers hang at nodes: which one a page goes to, how long the way takes, and what is said about it.

Figures are those of two-socket.toml, by hand: 78 ns and 80 GB/s within a node, 142 ns and 30 GB/s between them.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numa_memory import MIB, PAGE, Nodes
from swapping import small_space

from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.numa.topology import Topology, load
from dpud.gpu.store import HostPool
from dpud.gpu.swap.space import SwapSpace
from dpud.gpu.system import GpuConfig, build

NR_PAGES = 16
SIZE = NR_PAGES * PAGE


class Tiers(Nodes):
    """Two nodes with these tiers, of 4 MiB each; pages are put on the node of who writes them."""

    def __init__(self, **nodes: int) -> None:
        clock = ManualClock()
        self.space = small_space(*((name, 1024) for name in nodes), clock=clock)
        topology = replace(load("two-socket"), tiers=nodes)
        super().__init__(topology, clock=clock, swap=self.space)
        self.numa.placement.set_policy("local")

    def swapped_from(self, node: int) -> tuple[int, list[str], int]:
        """Noise written on a node and evicted -> (address, the pages' tiers, ns that eviction took)."""
        va = self.allocate(SIZE)
        self.memory.write("c", va, np.random.default_rng(va).bytes(SIZE), self.at(node))
        begin_ns = self.clock.now_ns()
        self.memory.evict(SIZE, self.at(node))
        return va, self.tiers_of(va), self.clock.now_ns() - begin_ns

    def tiers_of(self, va: int) -> list[str]:
        region = self.memory.space.regions.find(va)
        assert region is not None
        tiers = [self.space.tier_of(region.first_key + page) for page in range(region.nr_pages)]
        return [tier.name if tier is not None else "" for tier in tiers]


def test_of_two_that_are_alike_the_near_one_is_taken() -> None:
    tiers = Tiers(nvme0=0, nvme1=1)
    assert tiers.swapped_from(0)[1] == ["nvme0"] * NR_PAGES
    assert tiers.swapped_from(1)[1] == ["nvme1"] * NR_PAGES
    stats = tiers.numa.stats()
    assert (stats["swap_local"], stats["swap_remote"], stats["swap_near_preferred"]) == (2 * NR_PAGES, 0, NR_PAGES)
    assert violations(tiers.memory) == []


def test_a_device_s_pages_go_to_the_tier_at_its_node() -> None:
    tiers = Tiers(nvme0=0, nvme1=1)
    for device in (0, 1):
        va = tiers.allocate(SIZE, RegionType.DEVICE, device)
        tiers.memory.write("c", va, np.random.default_rng(3).bytes(SIZE))
        tiers.memory.evict(SIZE, device)
        assert tiers.tiers_of(va) == [f"nvme{device}"] * NR_PAGES


def test_a_fast_one_far_away_is_better_than_a_slow_one_that_is_near() -> None:
    tiers = Tiers(memory=0, nvme=1)
    assert tiers.swapped_from(1)[1] == ["memory"] * NR_PAGES
    stats = tiers.numa.stats()
    assert (stats["swap_local"], stats["swap_remote"], stats["swap_near_preferred"]) == (0, NR_PAGES, 0)


def test_the_near_one_is_full_and_the_far_one_takes_it() -> None:
    tiers = Tiers(nvme0=0, nvme1=1)
    (near,) = (tier for tier in tiers.space.tiers if tier.name == "nvme1")
    near.fail("gone")
    assert tiers.swapped_from(1)[1] == ["nvme0"] * NR_PAGES
    assert tiers.numa.stats()["swap_remote"] == NR_PAGES


def test_the_way_takes_what_the_matrix_says() -> None:
    """The same pages, out and in again, from the tier's own node and from the other one."""
    near, far = Tiers(nvme=1), Tiers(nvme=1)
    (near_va, _, near_ns), (far_va, _, far_ns) = near.swapped_from(1), far.swapped_from(0)
    nr_bytes = far.numa.stats()["swap_remote_bytes"]
    assert SIZE < nr_bytes < 1.1 * SIZE
    way_ns = 142 - 78 + nr_bytes / 30 - nr_bytes / 80
    assert far_ns - near_ns == pytest.approx(way_ns, abs=2)
    assert far.numa.stats()["swap_remote_ns"] == far_ns - near_ns
    for tiers in (near, far):
        tiers.clock.advance(10**9)  # the tier has nothing left to write
    back_ns = far.read_ns(far_va, far.at(0), SIZE) - near.read_ns(near_va, near.at(1), SIZE)
    assert back_ns == pytest.approx(way_ns, abs=2)


def test_from_the_pool_it_is_the_way_from_the_node_that_the_page_left() -> None:
    near, far = Tiers(nvme=1), Tiers(nvme=1)
    took = []
    for tiers, node in ((near, 1), (far, 0)):
        tiers.memory.store.pool = HostPool(MIB)
        va, places, _ = tiers.swapped_from(node)
        assert places == [""] * NR_PAGES
        begin_ns = tiers.clock.now_ns()
        assert tiers.memory.store.demote(SIZE) == NR_PAGES
        assert tiers.tiers_of(va) == ["nvme"] * NR_PAGES
        took.append(tiers.clock.now_ns() - begin_ns)
    stats = far.numa.stats()
    assert (stats["swap_local"], stats["swap_remote"]) == (0, NR_PAGES)
    assert near.numa.stats()["swap_local"] == NR_PAGES
    way_ns = 142 - 78 + stats["swap_remote_bytes"] / 30 - stats["swap_remote_bytes"] / 80
    assert took[1] - took[0] == pytest.approx(way_ns, abs=2)


def test_what_is_said_about_it() -> None:
    tiers = Tiers(nvme0=0, nvme1=1)
    va, _, _ = tiers.swapped_from(1)
    tiers.memory.read("c", va, 4 * PAGE, tiers.at(1))
    ways = [(way.node, way.tier, way.rank, way.crossing_ns, way.nr_out, way.nr_in) for way in tiers.numa.ways()]
    between = 2 * (142 - 78 + 4096 // 30 - 4096 // 80)
    assert ways == [
        (0, "nvme0", 0, 0, 0, 0),
        (0, "nvme1", 1, between, 0, 0),
        (1, "nvme1", 0, 0, NR_PAGES, 4),
        (1, "nvme0", 1, between, 0, 0),
    ]


def test_a_hot_page_is_not_raised_to_a_tier_that_is_only_farther() -> None:
    tiers = Tiers(nvme0=0, nvme1=1)
    va, _, _ = tiers.swapped_from(1)
    region = tiers.memory.space.regions.find(va)
    assert region is not None
    for _ in range(4):
        tiers.space.read_many([region.first_key], tiers.at(1))
    tiers.memory.background(MIB)
    assert tiers.tiers_of(va)[0] == "nvme1"


def test_without_numa_tiers_are_as_they_were() -> None:
    tiers = Tiers(nvme0=0, nvme1=1)
    tiers.numa.detach()
    assert tiers.space.crossing is None
    tiers.memory.evict(4 * MIB, tiers.at(1))
    va = tiers.allocate(SIZE)
    tiers.memory.write("c", va, np.random.default_rng(3).bytes(SIZE))
    tiers.memory.evict(SIZE, tiers.at(0))
    assert tiers.tiers_of(va) == ["nvme0"] * NR_PAGES


def test_a_topology_may_have_a_tier_of_a_kind_at_several_nodes(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "dpud/gpu/numa/topologies/two-socket.toml").read_text()
    file = tmp_path / "twins.toml"
    file.write_text(text.replace("tiers = { nvme = 1 }", "tiers = { nvme = [0, 1], ssd = 1 }"))
    topology: Topology = load(file)
    assert dict(topology.tiers) == {"nvme0": 0, "nvme1": 1, "ssd": 1}
    config = GpuConfig(
        nr_devices=2, device_bytes=2 * MIB, host_bytes=8 * MIB, tiers={"nvme": 8 * MIB, "hdd": 4 * MIB}, numa=str(file)
    )
    swap = build(config).store.swap
    assert isinstance(swap, SwapSpace)
    assert [(tier.name, tier.kind, tier.size_bytes >> 20) for tier in swap.tiers] == [
        ("nvme0", "nvme", 3),
        ("nvme1", "nvme", 3),
        ("hdd", "hdd", 3),
    ]
