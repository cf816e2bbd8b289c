# SPDX-License-Identifier: GPL-2.0-only
"""The C names of migration: arguments, return values and errors."""

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpud.gpu import facade

MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    facade.cleanup_migration_manager()
    facade.cleanup_swap_system()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", list(facade.MigrationStrategy))
def test_a_program_s_memory_moves_to_another_device(strategy: int) -> None:
    assert facade.init_migration_manager(2, 4 * MIB) == 0
    pointer = facade.allocate_gpu_memory(MIB)
    assert pointer is not None
    facade.write_memory(pointer, b"abc" * 1000)
    assert facade.start_memory_migration("device1", strategy) == 0
    assert facade.read_memory(pointer, 3000) == b"abc" * 1000
    assert facade.the_memory().clients["facade"].device == 1
    stats = facade.get_migration_stats()
    assert (stats["completed"], stats["state"]) == (1, "completed")
    assert stats["moved_pages"] >= 1


def test_errors() -> None:
    assert facade.start_memory_migration("device1") == -1
    assert facade.last_error() == errno.ENODEV
    assert facade.init_migration_manager(0, MIB) == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.init_migration_manager(2, MIB) == 0
    assert facade.init_migration_manager(2, MIB) == -1
    assert facade.last_error() == errno.EBUSY
    assert facade.start_memory_migration("device1") == -1
    assert facade.last_error() == errno.ENOENT
    facade.allocate_gpu_memory(MIB // 2)
    assert facade.start_memory_migration("device0") == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.start_memory_migration("device1", 9) == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.start_memory_migration("unix:/nobody/here") == -1
    assert facade.last_error() == errno.EIO


def test_it_serves_the_memory_that_there_is() -> None:
    assert facade.init_swap_system(4 * MIB, 4096, 0.8) == 0
    assert facade.init_migration_manager() == 0
    facade.allocate_gpu_memory(MIB)
    assert facade.start_memory_migration("device1") == -1, "there is one device"
    assert facade.last_error() == errno.EINVAL


@pytest.mark.slow
def test_from_one_program_to_another(tmp_path: Path) -> None:
    address, said = f"unix:{tmp_path}/socket", tmp_path / "said"
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(60)
            facade.init_migration_manager(1, 4 * MIB)
            code = facade.receive_memory_migration(address)
            region = facade.the_memory().clients["facade"].regions[0]
            said.write_bytes(b"%d " % code + (facade.read_memory(region.va, 3000) or b""))
        finally:
            os._exit(0)
    facade.init_migration_manager(1, 4 * MIB)
    pointer = facade.allocate_gpu_memory(MIB)
    facade.write_memory(pointer, b"abc" * 1000)
    deadline = time.monotonic() + 20
    while not (tmp_path / "socket").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert facade.start_memory_migration(address) == 0
    os.waitpid(pid, 0)
    assert said.read_bytes() == b"0 " + b"abc" * 1000
    assert facade.access_gpu_memory(pointer) is None
    assert facade.last_error() == errno.EFAULT


def test_statistics_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    facade.print_migration_stats()
    assert capsys.readouterr().out == "Migration: not initialized\n"
    facade.init_migration_manager(2, MIB)
    facade.allocate_gpu_memory(MIB // 4)
    facade.start_memory_migration("device1")
    facade.print_migration_stats()
    out = capsys.readouterr().out
    assert "  state                   completed\n" in out
    assert "  completed                       1\n" in out
