# SPDX-License-Identifier: GPL-2.0-only
"""Which batches meet a fault: the knobs of Documentation/fault-injection, through their files."""

import pytest
from wiring import errno_of

from dpud.dpu.faults import FaultKind, FaultPlan
from kernelsim.attr import Registry
from kernelsim.fault_inject import BatchFaultAttr


def point(**knobs: int) -> BatchFaultAttr:
    made = BatchFaultAttr("fail_x")
    registry = Registry()
    registry.add("/sys/kernel/debug/fail_x", made)
    for name, value in knobs.items():
        registry.write(f"/sys/kernel/debug/fail_x/{name}", str(value))
    return made


def calls(made: BatchFaultAttr, nr: int, nr_moves: int = 10) -> str:
    """One letter a batch."""
    return "".join("x" if made.should_fail(nr_moves) else "." for _ in range(nr))


def test_it_is_off_by_default_and_times_alone_does_nothing() -> None:
    assert calls(point(), 5) == "....."
    assert calls(point(times=3), 5) == "....."


def test_probability_100_fails_as_often_as_times_says() -> None:
    assert calls(point(probability=100), 4) == "x..."
    assert calls(point(probability=100, times=2), 4) == "xx.."
    assert calls(point(probability=100, times=0), 4) == "...."
    forever = point(probability=100, times=-1)
    assert calls(forever, 4) == "xxxx"
    assert (forever.times, forever.nr_injected) == (-1, 4)


def test_interval_considers_every_nth() -> None:
    assert calls(point(probability=100, times=-1, interval=3), 7) == "..x..x."


def test_space_lets_sizes_pass_first() -> None:
    made = point(probability=100, times=-1, space=25)
    assert calls(made, 4) == "..xx"
    assert made.space == 5


def test_nth_is_one_shot_whatever_the_others_say() -> None:
    made = point(nth=3, times=0)
    assert calls(made, 6) == "..x..."
    assert made.nth == 0


def test_a_batch_that_is_too_short_is_no_call() -> None:
    made = point(nth=2, move=8)
    assert calls(made, 3, nr_moves=8) == "..."
    assert made.nth == 2
    assert calls(made, 3, nr_moves=9) == ".x."


def test_chance_is_a_third_and_follows_the_seed() -> None:
    first, same, other = (point(probability=33, times=-1, seed=seed) for seed in (7, 7, 8))
    text = calls(first, 300)
    assert 70 <= text.count("x") <= 130
    assert text == calls(same, 300)
    assert text != calls(other, 300)


def test_writing_the_seed_starts_anew() -> None:
    registry, made = Registry(), BatchFaultAttr("fail_x")
    registry.add("/sys/kernel/debug/fail_x", made)
    made.probability, made.times = 50, -1
    texts = []
    for _ in range(2):
        registry.write("/sys/kernel/debug/fail_x/seed", "5")
        texts.append(calls(made, 50))
    assert texts[0] == texts[1]


def test_it_is_logged_in_the_kernel_s_words_unless_verbose_is_0() -> None:
    lines: list[str] = []
    made = BatchFaultAttr("fail_timeout", lines.append)
    made.arm(times=2)
    assert made.should_fail(1)
    assert lines == [
        "FAULT_INJECTION: forcing a failure.",
        "name fail_timeout, interval 1, probability 100, space 0, times 2",
    ]
    made.verbose = 0
    assert made.should_fail(1)
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("probability", 101),
        ("probability", -1),
        ("times", -2),
        ("interval", -1),
        ("space", -1),
        ("nth", -1),
        ("move", -1),
    ],
)
def test_a_bad_value_is_einval_and_changes_nothing(name: str, value: int) -> None:
    registry, made = Registry(), BatchFaultAttr("fail_x")
    registry.add("/sys/kernel/debug/fail_x", made)
    before = registry.read(f"/sys/kernel/debug/fail_x/{name}")
    assert errno_of(registry.write, f"/sys/kernel/debug/fail_x/{name}", str(value)) == 22
    assert registry.read(f"/sys/kernel/debug/fail_x/{name}") == before


def test_the_earliest_fault_wins_and_the_other_stays() -> None:
    plan = FaultPlan()
    plan.arm(FaultKind.DPU_FAULT, 5)
    plan.arm(FaultKind.CORRUPT, 2, bit=77)
    first, second = plan.take(9), plan.take(9)
    assert first is not None
    assert (first.kind, first.move, first.bit) == (FaultKind.CORRUPT, 2, 77)
    assert second is not None
    assert second.kind is FaultKind.DPU_FAULT
    assert plan.take(9) is None


def test_clear_disarms() -> None:
    plan = FaultPlan()
    for kind in FaultKind:
        plan.arm(kind, times=-1)
    plan.points[FaultKind.TIMEOUT].nth = 1
    plan.clear()
    assert plan.take(1) is None
