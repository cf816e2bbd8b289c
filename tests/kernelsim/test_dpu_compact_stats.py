# SPDX-License-Identifier: GPL-2.0-only
"""Distributions against sorted lists; unavailable times against a walk through a batch."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import Lab

from kernelsim.dpu_compact_stats import NO_FOLIO, ClusterStep, Distribution, Ramp, Wall, unavailable_ns
from kernelsim.dpu_hw import BatchTimes


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 2**61), st.integers(1, 5)), min_size=1, max_size=50))
def test_quantiles_are_at_most_a_sixteenth_too_high(samples: list[tuple[int, int]]) -> None:
    distribution = Distribution()
    for value, times in samples:
        distribution.add(value, times)
    ordered = sorted(value for value, times in samples for _ in range(times))
    assert (distribution.nr, distribution.max) == (len(ordered), max(ordered))
    for percent in (1, 50, 95, 99, 100):
        exact = ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]
        assert exact <= distribution.quantile(percent) <= exact + exact / 16 + 1


@given(st.lists(st.integers(0, 2**61), max_size=50))
def test_octaves_hold_every_value_once(values: list[int]) -> None:
    distribution = Distribution()
    for value in values:
        distribution.add(value)
    octaves = list(distribution.octaves())
    assert [nr for _, _, nr in octaves] == [sum(low <= value <= high for value in values) for low, high, _ in octaves]
    assert sum(nr for _, _, nr in octaves) == len(values)
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(octaves))
    assert not octaves or (octaves[0][2] and octaves[-1][2])


def test_small_values_are_exact_and_none_is_zero() -> None:
    empty = Distribution()
    assert list(empty.cells()) == [0, 0, 0, 0, 0]
    small = Distribution()
    small.add_ramp(Ramp(0, 1, 32))
    assert [small.quantile(percent) for percent in (50, 100)] == [15, 31]


@pytest.mark.slow
@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 3000), st.integers(1, 3))
def test_a_ramp_is_the_sum_of_its_values(first: int, last: int, nr: int, times: int) -> None:
    ramp = Ramp(first, (last - first) / nr, nr)
    at_once, one_by_one = Distribution(), Distribution()
    at_once.add_ramp(ramp, times)
    for value in ramp.values().tolist():
        one_by_one.add(int(value + 0.5), times)
    assert at_once.nr == one_by_one.nr
    assert abs(at_once.max - one_by_one.max) <= 1
    for percent in (1, 50, 95, 99):
        assert at_once.quantile(percent) == pytest.approx(one_by_one.quantile(percent), abs=1)


@pytest.mark.parametrize("nr", [1, 2, 7])
def test_unavailable_is_the_time_between_unmap_and_remap(nr: int) -> None:
    times = BatchTimes(isolate_ns=99, unmap_ns=10 * nr, flush_ns=500, device_ns=30 * nr, remap_ns=20 * nr)
    now, unmapped, expected = 0, [], []
    for _ in range(nr):
        unmapped.append(now)
        now += 10
    now += 500 + 30 * nr
    for at in unmapped:
        now += 20
        expected.append(now - at)
    assert unavailable_ns(nr, times).values().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("orders", [(0,), (0,) * 32, (9,), (0, 0, 9), (4, 0, 5, 0)])
def test_unavailable_in_a_cluster_is_the_time_from_a_folios_unmapping_to_its_remapping(orders: tuple[int, ...]) -> None:
    """A walk through it: all are unmapped, one flush, then each is copied and remapped in turn."""
    now, unmapped, expected = 0, [], []
    for _ in orders:
        unmapped.append(now)
        now += 10
    now += 500
    for order, at in zip(orders, unmapped, strict=True):
        now += 3 * 2**order + 20
        expected += [now - at] * 2**order
    shape = np.array([*orders, *[NO_FOLIO] * (32 - len(orders))], dtype=np.uint8)
    counted, one_by_one = Distribution(), Distribution()
    counted.add_cluster(shape, ClusterStep(unmap_ns=10, flush_ns=500, copy_ns=3, remap_ns=20), times=2)
    for value in expected:
        one_by_one.add(value, 2)
    assert list(counted.cells()) == list(one_by_one.cells())


def test_wall_of_the_first_and_the_last_page() -> None:
    wall = Wall(unmap_begin=100, unmap_end=200, remap_begin=1000, remap_end=1400)
    first, *_, last = wall.unavailable_ns(100).values().tolist()
    assert first == pytest.approx(1004 - 100)
    assert last == pytest.approx(1400 - 199)


def test_the_histograms_file_has_what_the_tables_count() -> None:
    lab = Lab((32,))
    lab.spawn("worker", anon="16M", holes="50")
    lab.compact()
    debugfs = "/sys/kernel/debug/dpu_compact"
    counts: dict[tuple[str, ...], int] = {}
    for line in lab.read(f"{debugfs}/histograms").splitlines()[1:]:
        engine, of, what, _low, _high, nr, *_bar = line.split()
        counts[engine, of, what] = counts.get((engine, of, what), 0) + int(nr)
    tables = {
        (engine, of, what): int(nr)
        for of in ("latency", "unavailable", "batch_size")
        for engine, what, nr, *_ in map(str.split, lab.read(f"{debugfs}/{of}").splitlines()[1:])
    }
    assert counts == tables
    assert counts["upmem-v1a", "latency", "modelled"] > 0
    assert counts["upmem-v1a", "batch_size", "pages"] > 0
