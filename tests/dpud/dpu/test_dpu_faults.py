# SPDX-License-Identifier: GPL-2.0-only
import errno

import pytest

from dpud.dpu.faults import FaultKind, FaultPlan


def test_a_fault_happens_so_many_times() -> None:
    plan = FaultPlan()
    plan.timeout.move, plan.timeout.times = 3, 2
    kinds = [fault and fault.kind for fault in (plan.take(10), plan.take(10), plan.take(10))]
    assert kinds == [FaultKind.TIMEOUT, FaultKind.TIMEOUT, None]


def test_minus_one_never_runs_out() -> None:
    plan = FaultPlan()
    plan.partial.times = -1
    assert all(plan.take(1) for _ in range(5))
    assert plan.partial.times == -1


def test_a_point_beyond_the_batch_stays_armed() -> None:
    plan = FaultPlan()
    plan.dpu_fault.move, plan.dpu_fault.times = 8, 1
    assert plan.take(8) is None
    assert plan.take(9) is not None


def test_the_earliest_fault_wins_and_the_other_stays() -> None:
    plan = FaultPlan()
    plan.dpu_fault.move, plan.dpu_fault.times = 5, 1
    plan.corrupt.move, plan.corrupt.times, plan.corrupt.bit = 2, 1, 77
    first, second = plan.take(9), plan.take(9)
    assert first is not None
    assert (first.kind, first.move, first.bit) == (FaultKind.CORRUPT, 2, 77)
    assert second is not None
    assert second.kind is FaultKind.DPU_FAULT


def test_clear_disarms() -> None:
    plan = FaultPlan()
    for point in plan.points.values():
        point.times = 1
    plan.clear()
    assert plan.take(1) is None


@pytest.mark.parametrize(("field", "value"), [("times", -2), ("move", -1), ("bit", -1)])
def test_a_bad_value_is_einval_and_changes_nothing(field: str, value: int) -> None:
    point = FaultPlan().corrupt
    with pytest.raises(OSError, match=field) as caught:
        setattr(point, field, value)
    assert caught.value.errno == errno.EINVAL
    assert getattr(point, field) == 0
