# SPDX-License-Identifier: GPL-2.0-only
"""Replacement policies against libCacheSim's, Belady's optimum against every choice there is, and the shadow trace."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud.bench.gpu.traces import TRACES
from dpud.gpu.policy import ClientPolicies, Lru
from dpud.gpu.swap.belady import optimal_misses
from dpud.gpu.swap.policy import S3Fifo, kind_of, misses, names, new_policy
from dpud.gpu.swap.shadow import MAX_ACCESSES, MAX_PAGES, ShadowTrace


def libcachesim_misses(name: str, trace: Sequence[int], capacity: int) -> int:
    libcachesim: Any = pytest.importorskip("libcachesim")
    cache, request, nr = getattr(libcachesim, name)(capacity, hashpower=14), libcachesim.Request(), 0
    request.obj_size = 1
    for key in trace:
        request.obj_id = key + 1
        nr += not cache.get(request)
    return nr


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("capacity", [20, 64, 333])
def test_misses_are_libcachesims(name: str, capacity: int) -> None:
    trace = TRACES[name](6000, 1000)
    assert misses(Lru(), trace, capacity) == libcachesim_misses("LRU", trace, capacity)
    assert misses(S3Fifo(capacity), trace, capacity) == libcachesim_misses("S3FIFO", trace, capacity)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=400), st.integers(20, 40))
@settings(max_examples=examples(40), deadline=None)
def test_misses_are_libcachesims_on_any_trace(trace: list[int], capacity: int) -> None:
    assert misses(S3Fifo(capacity), trace, capacity) == libcachesim_misses("S3FIFO", trace, capacity)
    assert misses(Lru(), trace, capacity) == libcachesim_misses("LRU", trace, capacity)


def fewest_misses(trace: Sequence[int], capacity: int) -> int:
    """Every choice of victims, step by step."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for key in trace:
        following: dict[frozenset[int], int] = {}
        for held, nr in states.items():
            if key in held:
                choices = [(held, nr)]
            elif len(held) < capacity:
                choices = [(held | {key}, nr + 1)]
            else:
                choices = [(held - {out} | {key}, nr + 1) for out in held]
            for state, cost in choices:
                following[state] = min(cost, following.get(state, cost))
        states = following
    return min(states.values())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 4))
@settings(max_examples=examples(60), deadline=None)
def test_no_choice_of_victims_beats_the_optimum(trace: list[int], capacity: int) -> None:
    assert optimal_misses(trace, capacity) == fewest_misses(trace, capacity)


@pytest.mark.parametrize("name", names())
def test_a_policy_gives_each_page_out_once(name: str) -> None:
    policy = new_policy(name)
    for key in range(100):
        policy.insert(key)
    for key in itertools.chain(range(0, 100, 3), range(0, 100, 3), [1000]):
        policy.access(key)
    policy.remove(50)
    policy.remove(2000)
    assert len(policy) == 99
    found = policy.victims(1000)
    assert sorted(found) == [key for key in range(100) if key != 50]
    assert policy.victim() is None


def test_what_is_used_stays_longer_than_a_scan() -> None:
    """What S3-FIFO is for."""
    trace, fresh = [], itertools.count(1000)
    for _ in range(40):
        trace += [*range(30), *range(30)]
        trace += [next(fresh) for _ in range(120)]
    assert misses(S3Fifo(100), trace, 100) < misses(Lru(), trace, 100)


def test_a_policy_can_be_changed_and_keeps_the_pages() -> None:
    policies = ClientPolicies(Lru, lambda key: "odd" if key % 2 else "even")
    for key in range(10):
        policies.insert(key)
    policies.of("even").access(0)
    policies.convert(kind_of("s3-fifo"))
    assert policies.of("even").victims(10) == [2, 4, 6, 8, 0]
    assert policies.of("odd").victims(10) == [1, 3, 5, 7, 9]


def test_each_client_has_its_own_list() -> None:
    policies = ClientPolicies(Lru, lambda key: "odd" if key % 2 else "even")
    for key in (1, 2, 3, 4, 5):
        policies.insert(key)
    assert policies.victim("even") == 2
    assert policies.victim() == 1  # of those who have most
    policies.remove(3)
    assert len(policies) == 2
    assert policies.victim("even") == 4
    policies.forget("even")
    assert (policies.victim("even"), policies.victim("odd"), policies.victim()) == (None, 5, None)


@pytest.mark.slow
def test_s3_fifo_learns_its_capacity_at_the_first_eviction() -> None:
    """As if it had been known from the beginning: the misses are the same ones."""
    trace = TRACES["zipf"](6000, 1000)
    for capacity in (20, 64, 333):
        assert misses(S3Fifo(), trace, capacity) == misses(S3Fifo(capacity), trace, capacity)


@pytest.mark.slow
def test_the_shadow_trace_says_how_far_from_the_optimum() -> None:
    shadow, trace = ShadowTrace(), TRACES["zipf"](8000, 500)
    shadow.accessed(trace)
    verdict = shadow.judge("s3-fifo", 100)
    assert (verdict.accesses, verdict.pages, verdict.rate) == (8000, len(set(trace)), 1)
    assert verdict.lru == misses(Lru(), trace, 100)
    assert verdict.optimal == optimal_misses(trace, 100)
    assert verdict.gap_closed_percent is not None
    assert 0 < verdict.gap_closed_percent < 100
    assert shadow.judge("lru", 100).gap_closed_percent == 0
    assert shadow.judge("lru", 1000).gap_closed_percent is None


@pytest.mark.slow
def test_the_shadow_trace_is_bounded_and_still_right() -> None:
    shadow, trace = ShadowTrace(), TRACES["zipf"](60000, 20000)
    shadow.accessed(trace)
    verdict = shadow.judge("lru", 4000)
    assert verdict.rate < 1
    assert verdict.pages <= MAX_PAGES
    assert verdict.accesses <= MAX_ACCESSES
    whole = optimal_misses(trace, 4000) / len(trace)
    assert verdict.optimal / verdict.accesses == pytest.approx(whole, abs=0.05)


def test_traces_are_what_they_are_called() -> None:
    assert TRACES["sequential"](5, 3) == [0, 1, 2, 0, 1]
    assert TRACES["strided"](4, 20) == [0, 7, 14, 1]
    assert TRACES["2-D columns"](5, 64) == [0, 16, 32, 48, 0]
    counts = np.bincount(TRACES["zipf"](50000, 100))
    top = np.sort(counts)[::-1]
    assert top[0] / top[9] == pytest.approx(10, rel=0.25)
    for make in TRACES.values():
        trace = make(1000, 160)
        assert len(trace) == 1000
        assert 0 <= min(trace) <= max(trace) < 160
        assert make(1000, 160) == trace
