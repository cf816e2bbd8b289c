# SPDX-License-Identifier: GPL-2.0-only
"""PSI arithmetic against examples worked by hand from the kernel's formulas, against real exponentials, and its format
against the running kernel's.

The formulas (kernel/sched/loadavg.c, psi.c): avg' = (avg * e + pct * 2048 * (2048 - e) + 2047 if rising) / 2048 with
e = 1677, 1981, 2034, once in 2.004 s; shown as avg / 2048 with two digits cut off.
"""

import math
import random
import re
from pathlib import Path

import pytest

from dpud.gpu.overcommit.pressure import DECAYS, PERIOD_NS, PressureStall, power

NS = 1_000_000_000
PERIOD_S = 2.004
LINE = re.compile(r"(some|full) avg10=(\d+\.\d\d) avg60=(\d+\.\d\d) avg300=(\d+\.\d\d) total=(\d+)")


def averages(stall: PressureStall, now_ns: int, which: str = "some") -> tuple[float, ...]:
    lines = {match[1]: match for match in LINE.finditer(stall.text(now_ns))}
    return tuple(float(lines[which][index]) for index in (2, 3, 4))


def total_us(stall: PressureStall, now_ns: int, which: str) -> int:
    return {match[1]: int(match[5]) for match in LINE.finditer(stall.text(now_ns))}[which]


def test_the_period_is_two_seconds_and_a_tick() -> None:
    assert PERIOD_NS == 2_004_000_000


def test_nothing_yet() -> None:
    zeros = "avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    assert PressureStall().text(0) == f"some {zeros}full {zeros}"


@pytest.mark.parametrize(
    ("waited", "periods", "expected"),
    [
        # (0 * 1677 + 204800 * 371 + 2047) / 2048 = 37100 = 18 + 236/2048; 204800 * 67 -> 6700; 204800 * 14 -> 1400
        (1.0, 1, "avg10=18.11 avg60=3.27 avg300=0.68"),
        # (37100 * 1677 + 204800 * 371 + 2047) / 2048 = 67480; (6700 * 1981 + 13723647) / 2048 = 13181; 1400 -> 2791
        (1.0, 2, "avg10=32.94 avg60=6.43 avg300=1.36"),
        # 50 %: (102400 * 371 + 2047) / 2048 = 18550; 3350; 700
        (0.5, 1, "avg10=9.05 avg60=1.63 avg300=0.34"),
    ],
)
def test_by_hand(waited: float, periods: int, expected: str) -> None:
    stall = PressureStall()
    for number in range(periods):
        stall.begin(number * PERIOD_NS)
        stall.end(number * PERIOD_NS + int(waited * PERIOD_NS))
    text = stall.text(periods * PERIOD_NS)
    assert text.splitlines()[0] == f"some {expected} total={int(waited * periods * 2_004_000)}"


def test_one_idle_period_after_a_full_one_by_hand() -> None:
    """37100 * 1677 / 2048 = 30379 = 14 + 1707/2048; it is not rising, so nothing is added."""
    stall = PressureStall()
    stall.begin(0)
    stall.end(PERIOD_NS)
    assert averages(stall, 2 * PERIOD_NS)[0] == 14.83


def test_missed_periods_by_hand() -> None:
    """1677^2 -> (1677 * 1677 + 1024) >> 11 = 1373; cubed: (1677 * 1373 + 1024) >> 11 = 1124."""
    assert [power(1677, nr) for nr in range(4)] == [2048, 1677, 1373, 1124]


def test_averages_follow_real_exponentials() -> None:
    """Random waits, the same averages in floating point; 11 bits leave an error of a few hundredths a step."""
    rng = random.Random(3)
    stall = PressureStall()
    expected = [0.0, 0.0, 0.0]
    for period in range(400):
        share = rng.choice([0.0, 0.0, rng.random(), 1.0])
        begin = period * PERIOD_NS
        stall.begin(begin)
        stall.end(begin + int(share * PERIOD_NS))
        for index, window_s in enumerate((10, 60, 300)):
            forget = math.exp(-2 / window_s)
            expected[index] = expected[index] * forget + 100 * share * (1 - forget)
        if period % 7 == 0:
            assert averages(stall, begin + PERIOD_NS) == pytest.approx(expected, abs=1.0)


def test_it_does_not_matter_how_often_somebody_looks() -> None:
    rng = random.Random(5)
    often, seldom = PressureStall(), PressureStall()
    now = 0
    for _ in range(200):
        for stall in (often, seldom):
            stall.begin(now)
        for _ in range(rng.randrange(5)):
            now += rng.randrange(PERIOD_NS)
            often.text(now)
        for stall in (often, seldom):
            stall.end(now)
        now += rng.randrange(PERIOD_NS // 2)
    assert often.text(now) == seldom.text(now)


def test_full_is_time_in_which_nobody_ran() -> None:
    stall = PressureStall()
    stall.run(0)
    stall.begin(0)
    stall.rest(NS)
    stall.run(3 * NS)
    stall.end(4 * NS)
    assert (total_us(stall, 4 * NS, "some"), total_us(stall, 4 * NS, "full")) == (4_000_000, 2_000_000)


def test_two_who_wait_at_once_count_once() -> None:
    stall = PressureStall()
    stall.begin(0)
    stall.begin(NS)
    stall.end(2 * NS)
    stall.end(3 * NS)
    assert total_us(stall, 9 * NS, "some") == 3_000_000


def test_pressure_is_forgotten() -> None:
    stall = PressureStall()
    stall.begin(0)
    stall.end(100 * NS)
    assert averages(stall, 100 * NS)[0] > 99
    assert averages(stall, 100_000 * NS) == (0, 0, 0)
    assert total_us(stall, 100_000 * NS, "some") == 100_000_000
    assert len(DECAYS) == 3


@pytest.mark.host
def test_the_running_kernel_writes_the_same_format() -> None:
    path = Path("/proc/pressure/memory")
    if not path.exists():
        pytest.skip("this kernel has no PSI")
    ours = re.sub(r"\d+\.\d\d|\d+$", "N", PressureStall().text(0), flags=re.MULTILINE)
    assert ours == re.sub(r"\d+\.\d\d|\d+$", "N", path.read_text(), flags=re.MULTILINE)
