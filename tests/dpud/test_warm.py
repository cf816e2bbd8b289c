# SPDX-License-Identifier: GPL-2.0-only
"""`dpud warm` gets to its end; compiling is another matter."""

import pytest

from dpud.dpu.driver import DpuDriver
from dpud.warm import small_image
from kernelsim.machine import Machine
from kernelsim.warm import steps


def test_the_small_image_is_a_machine() -> None:
    assert Machine.from_image(small_image()).check() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_every_step_runs(number: int) -> None:
    all_steps = steps(DpuDriver, small_image)
    assert len(all_steps) == 4
    all_steps[number][1]()
