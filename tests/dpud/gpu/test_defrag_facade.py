# SPDX-License-Identifier: GPL-2.0-only
"""The C names of defragmentation: arguments, return values, errors, and the seed's program."""

import errno
from collections.abc import Iterator

import numpy as np
import pytest

from dpud.gpu import facade
from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.defrag import module

MIB, KIB = 1 << 20, 1 << 10


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    facade.cleanup_defragmentation_manager()
    facade.cleanup_swap_system()
    facade.cleanup_compression_system()


def scatter() -> dict[int, bytes]:
    """Half of 8 MiB, every other 64 KiB of it."""
    pointers = [facade.allocate_gpu_memory(64 * KIB) for _ in range(128)]
    data = {}
    for number, pointer in enumerate(pointers):
        assert pointer is not None
        data[pointer] = np.random.default_rng(number).bytes(64 * KIB)
        facade.write_memory(pointer, data[pointer])
    for pointer in pointers[::2]:
        assert pointer is not None
        facade.free_gpu_memory(pointer)
        del data[pointer]
    return data


def test_the_seed_s_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert facade.init_compression_system(facade.COMPRESS_LZ4, facade.QUALITY_BALANCED, True) == 0
    assert facade.init_swap_system(512 * 1024 * 1024, 4096, 0.8) == 0
    assert facade.init_defragmentation_manager(0.3, 60) == 0
    pointer = facade.allocate_gpu_memory(1024 * 1024)
    assert pointer is not None
    facade.write_memory(pointer, bytes(1024 * 1024))
    facade.print_defragmentation_stats()
    facade.free_gpu_memory(pointer)
    facade.cleanup_defragmentation_manager()
    facade.cleanup_swap_system()
    facade.cleanup_compression_system()
    printed = capsys.readouterr().out
    assert printed.startswith("Defragmentation:\n  threshold          0.300\n  interval_s         60\n")
    assert "device0" in printed


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_the_interval_is_looked_at_by_itself(first: bool) -> None:
    if first:
        assert facade.init_defragmentation_manager(0.3, 60) == 0
    assert facade.init_swap_system(8 * MIB, 4096, 0.99) == 0
    if not first:
        assert facade.init_defragmentation_manager(0.3, 60) == 0
    data = scatter()
    device = facade.get_defragmentation_stats()["locations"]["device0"]
    assert (device["unusable_index"], device["extfrag_index"] > 900) == (1000, True)
    clock = facade.the_memory().clock
    assert isinstance(clock, ManualClock)
    clock.advance(61_000_000_000)
    pointer = facade.allocate_gpu_memory(4096)
    assert pointer is not None
    stats = facade.get_defragmentation_stats()
    assert stats["locations"]["device0"]["unusable_index"] <= 300
    assert (stats["passes"], stats["blocks_made"]) == (1, 2)
    assert stats["bytes_moved"] == 2 * MIB == stats["cost"] * stats["gained_bytes"]
    for each, kept in data.items():
        assert facade.read_memory(each, len(kept)) == kept
    assert violations(facade.the_memory()) == []


@pytest.mark.slow
def test_a_request_waits_for_a_part_of_a_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as real time passes, that is; here a slice takes all that a request may wait."""
    monkeypatch.setattr(module, "TICK_NS", -1)
    assert facade.init_swap_system(8 * MIB, 4096, 0.99) == 0
    assert facade.init_defragmentation_manager(0.3, 60) == 0
    data = scatter()
    clock = facade.the_memory().clock
    assert isinstance(clock, ManualClock)
    clock.advance(61_000_000_000)
    moved = [0]
    while (stats := facade.get_defragmentation_stats())["locations"]["device0"]["unusable_index"] > 300:
        pointer = facade.allocate_gpu_memory(4096)
        assert pointer is not None
        facade.free_gpu_memory(pointer)
        moved.append(facade.get_defragmentation_stats()["bytes_moved"])
    assert stats["passes"] == 1
    assert len(moved) > 3
    assert max(np.diff(moved)) < moved[-1]
    for each, kept in data.items():
        assert facade.read_memory(each, len(kept)) == kept
    assert violations(facade.the_memory()) == []


@pytest.mark.slow
def test_pins_and_errors() -> None:
    assert facade.get_defragmentation_stats() == {}
    assert facade.run_defragmentation() == -1
    assert facade.last_error() == errno.ENODEV
    for threshold, interval in ((1.5, 60), (-0.1, 60), (0.3, -1)):
        assert facade.init_defragmentation_manager(threshold, interval) == -1
        assert facade.last_error() == errno.EINVAL
    assert facade.init_defragmentation_manager(0.3, 60) == 0
    assert facade.init_defragmentation_manager(0.3, 60) == -1
    assert facade.last_error() == errno.EBUSY
    assert facade.init_swap_system(8 * MIB, 4096, 0.99) == 0
    data = scatter()
    for pointer in data:
        assert facade.pin_gpu_memory(pointer, 1, "nic", "RDMA") == 0
    assert facade.run_defragmentation() == 0
    assert facade.get_defragmentation_stats()["pages_moved"] == 0
    assert facade.unpin_gpu_memory("nic") == 0
    assert facade.unpin_gpu_memory("nic") == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.run_defragmentation() == 0
    assert facade.get_defragmentation_stats()["blocks_made"] == 2
    assert facade.pin_gpu_memory(4096, 1, "nic") == -1
    assert facade.last_error() == errno.EFAULT
