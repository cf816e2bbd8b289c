# SPDX-License-Identifier: GPL-2.0-only
"""Distributions against sorted lists; unavailable times against a walk through a batch."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelsim.dpu_compact_stats import Distribution, Wall, unavailable_ns
from kernelsim.dpu_hw import BatchTimes


@given(st.lists(st.tuples(st.integers(0, 2**61), st.integers(1, 5)), min_size=1, max_size=50))
def test_quantiles_are_at_most_a_sixteenth_too_high(samples: list[tuple[int, int]]) -> None:
    distribution = Distribution()
    for value, times in samples:
        distribution.add(value, times)
    ordered = sorted(value for value, times in samples for _ in range(times))
    assert (distribution.nr, distribution.max) == (len(ordered), max(ordered))
    for percent in (1, 50, 95, 99, 100):
        exact = ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]
        # sizes beyond 2^53 go through a float: one ulp more
        assert exact <= distribution.quantile(percent) <= exact + exact / 16 + 1


def test_small_values_are_exact_and_none_is_zero() -> None:
    empty = Distribution()
    assert list(empty.cells()) == [0, 0, 0, 0, 0]
    small = Distribution()
    small.add(np.arange(32, dtype=np.float64))
    assert [small.quantile(percent) for percent in (50, 100)] == [15, 31]


@pytest.mark.parametrize("nr", [1, 2, 7])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_unavailable_is_the_time_between_unmap_and_remap(nr: int, one_by_one: bool) -> None:
    times = BatchTimes(isolate_ns=99, unmap_ns=10 * nr, flush_ns=500, device_ns=30 * nr, remap_ns=20 * nr)
    now, unmapped, expected = 0, [], []
    for _ in range(nr):
        unmapped.append(now)
        now += 10
    now += 500 + (0 if one_by_one else 30 * nr)
    for at in unmapped:
        now += 20 + (30 if one_by_one else 0)
        expected.append(now - at)
    assert unavailable_ns(nr, times, one_by_one=one_by_one).tolist() == pytest.approx(expected)


def test_wall_of_the_first_and_the_last_page() -> None:
    wall = Wall(unmap_begin=100, unmap_end=200, remap_begin=1000, remap_end=1400)
    first, *_, last = wall.unavailable_ns(100).tolist()
    assert first == pytest.approx(1004 - 100)
    assert last == pytest.approx(1400 - 199)
