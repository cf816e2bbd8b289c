# SPDX-License-Identifier: GPL-2.0-only
"""Peak prediction: policies on windows whose answers can be written down, histories, the margin, and the traces."""

import numpy as np
import pytest
from small import KIB, MIB, small_memory

from dpud.bench.gpu import overcommit, usage
from dpud.gpu.clock import ManualClock, RealClock
from dpud.gpu.errors import GpuError
from dpud.gpu.overcommit import POLICIES, Admission
from dpud.gpu.overcommit.predictor import (
    HORIZON_SAMPLES,
    TARGET_MISSES,
    WARM_UP_SAMPLES,
    WINDOW_SAMPLES,
    History,
    Margin,
)
from dpud.gpu.store import HostPool
from kernelsim.operation import complete

NS = 1_000_000_000
HUNDRED = np.arange(1.0, 101.0)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("static", 1000),
        ("borg", 900),
        ("n-sigma", 50.5 + 3 * 28.8660700477),  # the mean and deviation of 1..100
        ("percentile", 99.01),
        ("max-of", 137.0982101431),
        ("history", 130),  # 100 now, and it has risen by 30 within 30 samples
    ],
)
def test_policies_by_hand(policy: str, expected: float) -> None:
    assert float(POLICIES[policy](HUNDRED, 1000.0)) == pytest.approx(expected)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_policy_expects_more_than_was_granted(policy: str) -> None:
    assert float(POLICIES[policy](HUNDRED, 40.0)) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("length", [1, 5, 400])
def test_many_windows_at_once(policy: str, length: int) -> None:
    windows = np.random.default_rng(4).random((7, length)) * 100
    each = [float(POLICIES[policy](window, 500.0)) for window in windows]
    assert POLICIES[policy](windows, np.full(7, 500.0)).tolist() == pytest.approx(each)


def test_history_is_the_highest_use_of_each_second() -> None:
    history = History()
    for at_ms, nr_bytes in ((0, 5), (400, 9), (900, 2), (1100, 3), (3500, 7), (4000, 1)):
        history.tell(nr_bytes, at_ms * 1_000_000)
    assert history.window().tolist() == [9, 3, 3, 7]
    assert history.ends(6).tolist() == [0, 0, 2, 3, 3, 7]


def test_history_forgets_what_is_older_than_its_window() -> None:
    history = History(0, 10)
    for second in range(25):
        history.tell(second, second * NS)
    assert history.window().tolist() == list(range(14, 24))
    history.tell(99, 1000 * NS)
    assert history.window().tolist() == [24] * 10


@pytest.mark.slow
def test_the_margin_grows_at_misses_and_aims_at_their_share() -> None:
    """Use is noise whose upper percent no one can foresee; the margin finds how much more has to be expected."""
    rng, margin = np.random.default_rng(9), Margin()
    missed = []
    for _ in range(60_000):
        margin.learn(float(rng.normal(100, 10)), 100 * (1 + margin.share))
        missed.append(margin._made[0][0] < max(margin._used))
    assert 0.3 < margin.share < 1
    assert np.mean(missed[20_000:]) < 4 * TARGET_MISSES
    before = margin.share
    for _ in range(200):
        margin.learn(0.0, 100 * (1 + margin.share))
    assert margin.share < before


def test_what_a_client_never_used_is_given_to_others_after_the_warm_up() -> None:
    clock = ManualClock()
    admission = Admission(1000, clock)
    complete(admission.request("ann", 900))
    for second in range(2 * WARM_UP_SAMPLES):
        expected = 900 if second < WARM_UP_SAMPLES else 200  # 100, and it has risen by 100 once
        assert admission.account("ann").peak_bytes("history") == expected
        clock.advance(NS)
        admission.usage("ann", 100, 1, clock.now_ns())
        admission.pump()
    assert admission.room_bytes(0) == 800


def test_a_request_that_may_not_wait_is_granted_though_time_passes_while_it_is_asked() -> None:
    admission = Admission(1000, RealClock())
    for _ in range(50):
        assert complete(admission.request("ann", 20)).nr_bytes == 20
    with pytest.raises(GpuError):
        complete(admission.request("ann", 20))


@pytest.mark.slow
def test_peaks_that_do_not_come_together_are_not_added_up() -> None:
    """Ann uses 400 in even seconds, bob in odd ones."""
    clock = ManualClock()
    admission = Admission(1000, clock)
    for client in ("ann", "bob"):
        complete(admission.request(client, 400))
    for second in range(WINDOW_SAMPLES + 2):
        clock.advance(NS)
        for client, turn in (("ann", 0), ("bob", 1)):
            admission.usage(client, 400 if second % 2 == turn else 0, 1, clock.now_ns())
        admission.pump()
    apart = sum(account.peak_bytes("history") for account in admission.accounts.values())
    assert apart == 800
    assert admission.room_bytes(0) == 600


def test_what_is_expected_on_one_device_is_not_taken_from_another() -> None:
    """Two devices of 1 MiB. Ann's half of the first is hers; what of it does not fit there needs the stores."""
    for pool, on_first, on_second in ((0, 512, 1024), (4, 4352, 4864)):
        admission = Admission(2 * MIB, ManualClock())
        memory = small_memory(MIB, MIB, admission=admission, pool=HostPool(pool * MIB) if pool else None)
        memory.allocate("ann", 512 * KIB)
        assert [admission.room_bytes(0, location) // KIB for location in (0, 1)] == [on_first, on_second]
    memory.allocate("ann", 2 * MIB)  # 1.5 MiB of its 2.5 have to go into the stores
    assert admission.room_bytes(0, 1) // KIB == 4864 - 1536


def test_rmm_logs_are_read() -> None:
    log = (
        "Thread,Time,Action,Pointer,Size,Stream\n"
        "1,10:00:00:000000,allocate,0xa,100,0\n"
        "1,10:00:01.500000,allocate,0xb,50,0\n"  # newer versions write a dot
        "1,10:00:01:600000,free,0xa,100,0\n"
        "1,10:00:03:999999,free,0xb,50,0\n"
    )
    assert usage.use_of_rmm_log(log, 4).tolist() == [100, 150, 50, 50]


@pytest.mark.slow
def test_traces_are_the_same_each_time_and_within_what_was_granted() -> None:
    for family in ("diurnal", "bursty", "sawtooth"):
        one, other = usage.trace(family, 3), usage.trace(family, 3)
        assert np.array_equal(one.use, other.use)
        assert (one.use >= 0).all()
        assert (one.use.max(axis=1) < one.granted).all()


def test_the_judge() -> None:
    """Two clients of 100 each; together they use 50, and once 120."""
    use = np.full((2, usage.NR_SAMPLES), 25.0)
    use[:, 2000] = 60.0
    each = usage.Trace(use, np.array([100.0, 100.0]))
    truth = overcommit.oracle(each)
    assert (len(truth), int((truth == 120).sum())) == (overcommit.NR_MOMENTS, HORIZON_SAMPLES + 1)
    assert overcommit.judge(each, truth) == (pytest.approx(100), 0)
    saved, missed = overcommit.judge(each, np.full(overcommit.NR_MOMENTS, 50.0))
    assert saved > 100
    assert missed == pytest.approx(100 * (HORIZON_SAMPLES + 1) / overcommit.NR_MOMENTS)


@pytest.mark.parametrize("family", ["bursty", "sawtooth", "diurnal", "mixed"])
@pytest.mark.slow
def test_the_figures_are_met(family: str) -> None:
    each = usage.trace(family, overcommit.SEED)
    saved, missed = overcommit.judge(each, overcommit.history(each))
    assert saved >= overcommit.SAVINGS_TARGET
    assert missed <= overcommit.VIOLATIONS_TARGET
    assert overcommit.beyond(each) == 0
