# SPDX-License-Identifier: GPL-2.0-only
"""The C names of fault recovery."""

import errno
import random
from collections.abc import Iterator

import pytest

from dpud.gpu import facade

MIB = 1 << 20


@pytest.fixture(autouse=True)
def program() -> Iterator[None]:
    yield
    facade.cleanup_fault_recovery()
    facade.cleanup_swap_system()


def test_before_anything_is_initialized(capsys: pytest.CaptureFixture[str]) -> None:
    assert facade.init_fault_recovery(facade.RECOVERY_MIGRATE) == -1
    assert facade.last_error() == errno.ENODEV
    assert facade.inject_memory_fault("bit") == -1
    assert facade.get_fault_recovery_stats() == {}
    facade.print_fault_recovery_stats()
    assert "not initialized" in capsys.readouterr().out


@pytest.mark.slow
def test_a_program_s_life(capsys: pytest.CaptureFixture[str]) -> None:
    assert facade.init_swap_system(4 * MIB, 4096, 0.8) == 0
    assert facade.init_fault_recovery(9) == -1
    assert facade.init_fault_recovery(facade.RECOVERY_MIGRATE) == 0
    assert facade.init_fault_recovery(facade.RECOVERY_MIGRATE) == -1
    assert facade.last_error() == errno.EBUSY
    ptr = facade.allocate_gpu_memory(MIB)
    assert ptr is not None
    data = random.Random(1).randbytes(MIB)
    assert facade.write_memory(ptr, data) == 0
    assert facade.restore_memory_checkpoint() == -1
    assert facade.last_error() == errno.ENOENT
    assert facade.create_memory_checkpoint() == 0
    assert facade.inject_memory_fault("bit bits=2 nr=5") == 0
    assert facade.inject_memory_fault("nonsense") == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.read_memory(ptr, MIB) == data
    stats = facade.get_fault_recovery_stats()
    assert (stats["policy"], stats["repaired_from_checkpoint"], stats["unacknowledged"]) == ("migrate", 5, 10)
    assert facade.acknowledge_fault_events() == 0
    assert facade.get_fault_recovery_stats()["unacknowledged"] == 0
    facade.print_fault_recovery_stats()
    assert "repaired_from_checkpoint              5" in capsys.readouterr().out
    assert facade.write_memory(ptr, bytes(5000)) == 0
    assert facade.restore_memory_checkpoint() == 0
    assert facade.read_memory(ptr, MIB) == data
    assert facade.set_recovery_policy(facade.RECOVERY_RETRY) == 0
    assert facade.scrub_memory() == 0
    banks: facade.Ref[list[int]] = facade.Ref()
    assert facade.predict_faults(banks) == 0
    assert banks.value == []
