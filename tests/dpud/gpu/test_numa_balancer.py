# SPDX-License-Identifier: GPL-2.0-only
"""Pages move to who uses them, if that pays, and not otherwise. Times are the two sockets' of the shipped topology."""

import numpy as np
import pytest
from numa_memory import MIB, PAGE, Nodes

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.check import violations
from dpud.gpu.numa.heat import Heat
from dpud.gpu.traffic import Cause, TrafficCounts

NR_PAGES = 64


def used(rule: str = "cost", topology: str = "two-socket") -> tuple[Nodes, int]:
    """A region on node 0."""
    nodes = Nodes(topology)
    nodes.balancer.rule = rule
    nodes.sample_every(20_000)
    va = nodes.allocate(NR_PAGES * PAGE)
    nodes.memory.write("c", va, np.random.default_rng(1).bytes(NR_PAGES * PAGE), nodes.at(0))
    return nodes, va


def use(nodes: Nodes, va: int, shares: dict[int, float], nr: int, seed: int = 0, nr_pages: int = NR_PAGES) -> None:
    """Random accesses, divided between nodes."""
    rng = np.random.default_rng(seed)
    who = rng.choice(list(shares), nr, p=list(shares.values()))
    for node, page in zip(who.tolist(), rng.integers(nr_pages, size=nr).tolist(), strict=True):
        nodes.memory.read("c", va + page * PAGE, 64, nodes.at(node))


@pytest.mark.parametrize("rule", ["cost", "two-fault"])
@pytest.mark.slow
def test_pages_come_to_who_uses_them(rule: str) -> None:
    nodes, va = used(rule)
    before = nodes.memory.read("c", va, NR_PAGES * PAGE, nodes.at(0))
    use(nodes, va, {1: 1.0}, 2500)
    assert nodes.on(va) == [0, NR_PAGES]
    assert nodes.memory.read("c", va, NR_PAGES * PAGE, nodes.at(0)) == before
    assert not violations(nodes.memory)


@pytest.mark.slow
def test_moves_are_charged_to_the_owner() -> None:
    nodes, va = used()
    use(nodes, va, {1: 1.0}, 2500)
    traffic = nodes.memory.residency.traffic
    assert isinstance(traffic, TrafficCounts)
    assert traffic.nr_bytes["c", Cause.MIGRATION] == nodes.balancer.stat["promoted"] * PAGE


@pytest.mark.slow
def test_pages_used_by_both_stay() -> None:
    nodes, va = used()
    use(nodes, va, {0: 0.9, 1: 0.1}, 4000)
    assert nodes.on(va)[0] >= NR_PAGES * 0.9
    assert nodes.balancer.stat["hint_faults"] > NR_PAGES


@pytest.mark.slow
def test_off_samples_nothing() -> None:
    nodes, va = used("off")
    use(nodes, va, {1: 1.0}, 2000)
    assert nodes.on(va) == [NR_PAGES, 0]
    assert not nodes.balancer.stat["scans"]


@pytest.mark.slow
def test_a_page_that_is_hardly_used_is_not_worth_the_move() -> None:
    nodes, va = used()
    for page in range(NR_PAGES):
        nodes.clock.advance(10_000_000)
        nodes.memory.read("c", va + page * PAGE, 64, nodes.at(1))
    assert nodes.on(va) == [NR_PAGES, 0]
    assert nodes.balancer.stat["hint_faults"] > NR_PAGES // 2


@pytest.mark.slow
def test_every_decision_is_explained() -> None:
    nodes, va = used()
    use(nodes, va, {1: 1.0}, 2500)
    moves = [each for each in nodes.balancer.decisions if each.verdict.startswith("promoted")]
    assert len(moves) == NR_PAGES
    assert all(each.benefit_ns > each.cost_ns > 0 for each in moves)
    copy_ns = 142 + PAGE / 30 + 78 + PAGE / 80
    assert all(each.cost_ns == pytest.approx(copy_ns, rel=0.01) for each in moves)
    assert {(each.source, each.target) for each in moves} == {("node0", "node1")}
    assert {each.va for each in moves} == {va + page * PAGE for page in range(NR_PAGES)}


@pytest.mark.slow
def test_the_rate_limit_holds() -> None:
    nodes, va = used()
    nodes.balancer.limit_MBps = 0
    use(nodes, va, {1: 1.0}, 1500)
    assert nodes.on(va) == [NR_PAGES, 0]
    assert nodes.balancer.stat["rate_limited"] > 0


@pytest.mark.slow
def test_pinned_memory_never_moves() -> None:
    nodes = Nodes()
    nodes.sample_every(20_000)
    va = nodes.allocate(NR_PAGES * PAGE, RegionType.PINNED, 0)
    use(nodes, va, {1: 1.0}, 1500)
    assert nodes.on(va) == [NR_PAGES, 0]
    assert not nodes.balancer.stat["pages_unmapped"]


@pytest.mark.slow
def test_managed_memory_moves_between_nodes_by_the_rule_and_to_devices_at_once() -> None:
    nodes = Nodes()
    nodes.sample_every(20_000)
    va = nodes.allocate(NR_PAGES * PAGE, RegionType.MANAGED)
    nodes.memory.write("c", va, bytes(NR_PAGES * PAGE), nodes.at(0))
    nodes.memory.read("c", va, PAGE, nodes.at(1))
    assert nodes.on(va) == [NR_PAGES, 0]
    use(nodes, va, {1: 1.0}, 2500)
    assert nodes.on(va) == [0, NR_PAGES]
    nodes.memory.read("c", va, NR_PAGES * PAGE, 0)
    assert nodes.on(va) == [0, 0]


@pytest.mark.slow
def test_a_preferred_location_is_kept() -> None:
    nodes = Nodes()
    nodes.sample_every(20_000)
    va = nodes.allocate(NR_PAGES * PAGE, RegionType.MANAGED)
    nodes.memory.advise("c", va, NR_PAGES * PAGE, Advice.SET_PREFERRED_LOCATION, nodes.at(0))
    nodes.memory.write("c", va, bytes(NR_PAGES * PAGE), nodes.at(0))
    use(nodes, va, {1: 1.0}, 1500)
    assert nodes.on(va) == [NR_PAGES, 0]


@pytest.mark.slow
def test_ping_pong_is_seen_and_backed_off_from() -> None:
    """Two users in turn, each long enough to fetch the page, far shorter than the horizon."""
    nodes, va = used("two-fault")
    for turn in range(12):
        use(nodes, va, {turn % 2: 1.0}, 1500, seed=turn, nr_pages=8)
    stat = nodes.balancer.stat
    assert stat["pingpongs"] > 0
    assert stat["backoff"] > 0
    assert stat["promoted"] < 12 * 8
    assert len(list(nodes.balancer.playing())) > 0


@pytest.mark.slow
def test_a_full_node_exchanges_what_is_worth_least() -> None:
    """Node 1 is full of pages that nobody uses; node 0's are used from there."""
    nodes = Nodes()
    cold = nodes.allocate(2 * MIB)
    nodes.memory.write("c", cold, bytes(2 * MIB), nodes.at(1))
    hot = nodes.allocate(NR_PAGES * PAGE)
    nodes.memory.write("c", hot, bytes(NR_PAGES * PAGE), nodes.at(0))
    assert nodes.on(cold) == [0, 512]
    nodes.sample_every(20_000)
    use(nodes, hot, {1: 1.0}, 4000)
    assert nodes.on(hot) == [0, NR_PAGES]
    assert nodes.on(cold) == [NR_PAGES, 512 - NR_PAGES]
    assert nodes.balancer.stat["exchanged"] == NR_PAGES
    assert not violations(nodes.memory)


@pytest.mark.slow
def test_tpp_promotes_from_nodes_without_cpus_only() -> None:
    nodes = Nodes("four-node-cxl")
    nodes.balancer.rule = "tpp"
    nodes.sample_every(20_000)
    nodes.placement.set_policy("interleave:0,2")
    va = nodes.allocate(NR_PAGES * PAGE)
    nodes.memory.write("c", va, bytes(NR_PAGES * PAGE), nodes.at(1))
    use(nodes, va, {1: 1.0}, 2500)
    assert nodes.on(va) == [NR_PAGES // 2, NR_PAGES // 2, 0, 0]


@pytest.mark.slow
def test_background_reclaim_demotes_before_it_evicts() -> None:
    nodes = Nodes("four-node-cxl")
    va = nodes.allocate(2 * MIB)
    nodes.memory.write("c", va, bytes(2 * MIB), nodes.at(0))
    while nodes.memory.background(MIB):
        pass
    nr_free = 512 - nodes.on(va)[0]
    assert nr_free >= 512 * 15 // 100
    assert sum(nodes.on(va)) == 512
    assert nodes.balancer.stat["demoted"] == nr_free
    assert not violations(nodes.memory)


@pytest.mark.slow
def test_the_scan_period_grows_while_nothing_moves_and_shrinks_while_much_does() -> None:
    nodes, va = used()
    nodes.balancer.min_period_ns, nodes.balancer.max_period_ns = 5_000, 1_000_000
    use(nodes, va, {0: 1.0}, 3000)
    calm_ns = nodes.balancer.period_ns
    assert calm_ns > 20_000
    use(nodes, va, {1: 1.0}, 6000)
    assert nodes.on(va)[1] > NR_PAGES // 2


@pytest.mark.slow
def test_what_was_freed_is_forgotten() -> None:
    nodes, va = used()
    use(nodes, va, {1: 1.0}, 500)
    assert nodes.balancer.heats
    nodes.memory.free(va)
    other = nodes.allocate(PAGE)
    nodes.memory.write("c", other, b"x", nodes.at(0))
    for _ in range(4):
        nodes.clock.advance(50_000)
        nodes.memory.read("c", other, 1, nodes.at(0))
    assert len(nodes.balancer.heats) == 1


def test_the_rate_of_a_page_is_that_of_its_accesses() -> None:
    """Exponential times between accesses, three of four from one place: rate and shares are found."""
    rng, heat, now_ns = np.random.default_rng(4), Heat(2), 0
    rates, shares = [], []
    for _ in range(400):
        heat.sampled_ns = now_ns
        now_ns += int(rng.exponential(1000))
        heat.fault(int(rng.random() < 0.75), now_ns)
        rates.append(heat.rate(now_ns))
        shares.append(heat.shares(np.array([0, 1]))[1])
    assert np.median(rates[20:]) == pytest.approx(1 / 1000, rel=0.15)
    assert np.mean(shares[20:]) == pytest.approx(0.75, abs=0.05)


def test_a_page_that_is_not_missed_cools() -> None:
    heat = Heat(1)
    heat.sampled_ns = 0
    heat.fault(0, 100)
    heat.sampled_ns = 100
    assert heat.rate(100) > heat.rate(10_000) > heat.rate(1_000_000) > 0
