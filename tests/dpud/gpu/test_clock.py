# SPDX-License-Identifier: GPL-2.0-only
"""The clocks: none goes back, and sleeping brings time there."""

import time

from dpud.gpu.clock import ManualClock, PacedClock, RealClock


def test_manual_time_moves_by_sleeping() -> None:
    clock = ManualClock(5)
    clock.sleep_until(100)
    clock.sleep_until(50)
    assert clock.now_ns() == 100
    clock.advance(1)
    assert clock.now_ns() == 101


def test_real_time_is_the_host_s() -> None:
    clock = RealClock()
    target = time.monotonic_ns() + 2_000_000
    clock.sleep_until(target)
    assert clock.now_ns() >= target
    assert time.monotonic_ns() >= target


def test_paced_time_runs_ahead_and_leaves_a_debt() -> None:
    clock = PacedClock()
    target = time.monotonic_ns() + 3_000_000_000
    clock.sleep_until(target)
    assert time.monotonic_ns() < target <= clock.now_ns()
    assert not clock.debt().wait(0.0)
    clock = PacedClock()
    clock.sleep_until(time.monotonic_ns() + 2_000_000)
    debt = clock.debt()
    while not debt.wait(0.01):
        pass
    assert debt.is_over
