# SPDX-License-Identifier: GPL-2.0-only
"""The benchmark of NUMA: its optimum is one, and the rule comes near it."""

import numpy as np
import pytest

from dpud.bench.gpu.numa import WINDOW, Phase, phases
from dpud.bench.gpu.numa_load import PAGE_BYTES, STRATEGIES, Run, best_ns, costs_ns, make, memory_of
from dpud.gpu.numa.topology import load

pytest.importorskip("scipy")


@pytest.mark.slow
def test_the_optimum_is_that_of_trying_everything() -> None:
    """Six pages in two nodes: with 32 frames each there is room everywhere, so each is in its own best place."""
    _, numa = memory_of(load("two-socket"))
    use = np.random.default_rng(2).random((6, 2))
    use /= use.sum()
    assert best_ns(use, numa) == pytest.approx((use @ costs_ns(numa)).min(axis=1).sum())


def test_the_optimum_keeps_to_what_there_is_room_for() -> None:
    """64 pages that all want node 0, in two nodes of 32: the more popular half gets it."""
    _, numa = memory_of(load("two-socket"))
    assert [host.frames.nr_bytes // PAGE_BYTES for host in numa.placement.hosts] == [32, 32]
    heat = np.random.default_rng(2).permutation(np.arange(1, 65))
    use = np.stack((heat, np.zeros(64)), axis=1) / heat.sum()
    near, far = costs_ns(numa)[0]
    hot = np.sort(heat)[32:].sum() / heat.sum()
    assert best_ns(use, numa) == pytest.approx(hot * near + (1 - hot) * far)
    assert all(best_ns(use[list(order)], numa) == pytest.approx(best_ns(use, numa)) for order in [range(63, -1, -1)])


@pytest.mark.parametrize("name", ["two-socket", "four-node-cxl", "eight-node"])
@pytest.mark.slow
def test_no_placement_is_better_than_the_optimum(name: str) -> None:
    made = make(name)
    for strategy in STRATEGIES.values():
        run = Run(made, strategy)
        assert run.expected_ns(0) >= best_ns(made.phases[0], run.numa) * (1 - 1e-9)


def test_convergence_is_when_it_stays_near() -> None:
    assert Phase((1.5, 1.05, 1.2, 1.05, 1.0), 5).converged_after == 4 * WINDOW
    assert Phase((1.5, 1.2), 5).converged_after is None
    assert Phase((1.0, 1.0), 4).moves_per_1000 == 2


@pytest.mark.slow
def test_the_rule_comes_within_a_tenth_of_the_optimum() -> None:
    found = phases(make("two-socket"), STRATEGIES["dpud (cost)"], nr_windows=14)
    assert [phase.settled <= 1.10 for phase in found] == [True, True]
