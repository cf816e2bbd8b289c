# SPDX-License-Identifier: GPL-2.0-only
"""Memory that costs what is touched, and goes back when it is free."""

import resource

import numpy as np
import pytest

from dpud.physmem import PhysMem


def test_sparse_memory_costs_only_what_is_touched() -> None:
    """A TiB, far more than the host has; one page of it in use."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = PhysMem().alloc(1 << 28, 512)
    assert (memory.shape, memory.dtype, memory.flags.writeable) == ((1 << 28, 512), np.uint64, True)
    memory[1 << 27] = 7
    assert memory[1 << 27].sum() == 7 * 512
    assert not memory[12345].any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 << 10


@pytest.mark.parametrize("words", [1, 512])
def test_discarded_blocks_are_zero_and_the_others_stay(words: int) -> None:
    sparse = PhysMem()
    memory, beside = sparse.alloc(2048, words), sparse.alloc(2048, 512)
    memory[:], beside[:] = 7, 8
    sparse.discard(512, 1024)
    assert not memory[512:1536].any()
    assert not beside[512:1536].any()
    for start in (0, 1536):
        assert (memory[start : start + 512] == 7).all()
        assert (beside[start : start + 512] == 8).all()
