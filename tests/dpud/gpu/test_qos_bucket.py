# SPDX-License-Identifier: GPL-2.0-only
"""The token bucket against what a token bucket is: a count of tokens that is filled as time passes."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpud.gpu.qos.bucket import NS_PER_S, Bucket

MIB = 1 << 20
SIZES = st.integers(1, 4 * MIB)
RATES = st.integers(1000, 10**11)
WAITS = st.lists(st.tuples(st.integers(0, NS_PER_S), SIZES), min_size=1, max_size=30)


def passed(bucket: Bucket, requests: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(when, bytes) of requests that come so many ns after the one before, and pass as early as they may."""
    now_ns, found = 0, []
    for pause_ns, nr_bytes in requests:
        now_ns = max(now_ns + pause_ns, bucket.ready_ns(nr_bytes))
        bucket.take(nr_bytes, now_ns)
        found.append((now_ns, nr_bytes))
    return found


@pytest.mark.slow
@given(RATES, st.integers(1, 8 * MIB), WAITS)
def test_in_no_window_more_than_rate_and_burst_pass(rate: int, burst: int, requests: list[tuple[int, int]]) -> None:
    found = passed(Bucket(rate, burst), requests)
    most = max(burst, *(nr_bytes for _, nr_bytes in found))
    for first in range(len(found)):
        nr_bytes = 0
        for now_ns, nr in found[first:]:
            nr_bytes += nr
            assert nr_bytes <= most + Fraction(rate * (now_ns - found[first][0]), NS_PER_S)


@pytest.mark.slow
@given(RATES, st.integers(1, 8 * MIB), WAITS)
def test_nobody_waits_while_there_are_tokens(rate: int, burst: int, requests: list[tuple[int, int]]) -> None:
    """Beside a count of tokens: what passes earlier than the bucket said would have been too early."""
    bucket = Bucket(rate, burst)
    found = passed(bucket, requests)
    tokens = Fraction(burst)
    slack = Fraction(rate * len(found) * 2, NS_PER_S)  # moments are whole ns, rounded up
    wanted_ns = 0
    for (before_ns, _), (now_ns, nr_bytes), (pause_ns, _) in zip([(0, 0), *found], found, requests, strict=False):
        wanted_ns = before_ns + pause_ns
        had = min(Fraction(burst), tokens + Fraction(rate * (max(wanted_ns, before_ns) - before_ns), NS_PER_S))
        if now_ns > wanted_ns:
            assert had < min(nr_bytes, burst) + slack
        tokens = min(Fraction(burst), tokens + Fraction(rate * (now_ns - before_ns), NS_PER_S)) - nr_bytes


def test_a_grant_that_comes_late_takes_nothing_from_the_next() -> None:
    """Absolute deadlines: 1000 requests, each noticed 1 ms late, in the time that the rate says."""
    bucket, now_ns = Bucket(100 * MIB, 2 * MIB), 0
    for _ in range(1000):
        now_ns = max(now_ns, bucket.ready_ns(MIB)) + 1_000_000
        bucket.take(MIB, now_ns)
    assert now_ns == pytest.approx(10 * NS_PER_S, rel=0.002)


def test_without_a_rate_everything_passes() -> None:
    bucket = Bucket()
    bucket.take(1 << 50, 0)
    assert bucket.ready_ns(1 << 50) == 0


def test_a_changed_rate_holds_at_once() -> None:
    bucket = Bucket(1000, 1000)
    bucket.take(2000, 0)  # a debt of 1000 bytes: a second until the next token
    bucket.set(MIB, 0, 0)
    assert bucket.ready_ns(1) <= 0
    bucket.set(0, 0, 0)
    assert bucket.ready_ns(1 << 40) == 0


def test_default_burst_is_longer_than_a_busy_host_oversleeps() -> None:
    assert Bucket(10**9).burst == 20_000_000
    assert Bucket(10**6).burst == MIB
    assert [a <= b for a, b in pairwise(Bucket(rate).burst for rate in (10**7, 10**8, 10**9))] == [True, True]
