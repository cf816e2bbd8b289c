# SPDX-License-Identifier: GPL-2.0-only
"""`dpud warm` gets to its end; compiling is another matter."""

import pytest

from dpud.dpu.driver import DpuDriver
from dpud.gpu.address_space import frames, pagetable, tlb
from dpud.gpu.compression import statistics
from dpud.warm import small_image, use_gpu_memory
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


@pytest.mark.slow
def test_gpu_memory_is_warmed_too() -> None:
    """Everything that the path compiles was compiled: using it again compiles nothing."""
    use_gpu_memory()
    kernels = [pagetable.translate_bulk, tlb.tlb_translate, tlb.tlb_invalidate, frames.alloc_frames, frames.free_frames]
    kernels += [frames.find_pages, frames.isolate_frames, frames.rejoin_frames, frames.count_free_within]
    kernels += [frames.least_used, statistics.count_neighbours, statistics.plane_bits]
    assert all(kernel.signatures for kernel in kernels)  # type: ignore[attr-defined]
