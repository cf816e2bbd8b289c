# SPDX-License-Identifier: GPL-2.0-only
"""The C names: arguments, return values and errors as in the description the project began with."""

import errno
import logging
import random
from collections.abc import Iterator

import pytest

from dpud.gpu import facade, facade_base

MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    facade.cleanup_swap_system()
    facade.cleanup_unified_address_space()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(1 << 30, 4096, 0.9), (512 * MIB, 2048, 0.7), (512 * MIB, 4096, 0.8)])
def test_the_configurations_of_the_description(arguments: tuple[int, int, float]) -> None:
    assert facade.init_swap_system(*arguments) == 0
    pointer = facade.allocate_gpu_memory(1024 * 1024)
    assert pointer is not None
    assert facade.write_memory(pointer, b"weights") == 0
    assert facade.access_gpu_memory(pointer) == pointer
    assert facade.read_memory(pointer, 7) == b"weights"
    facade.free_gpu_memory(pointer)
    assert facade.access_gpu_memory(pointer) is None
    assert facade.last_error() == errno.EFAULT


@pytest.mark.slow
def test_more_than_the_device_holds() -> None:
    """Above the threshold pages leave in the background, and come back."""
    assert facade.init_swap_system(4 * MIB, 4096, 0.8) == 0
    pointers = [facade.allocate_gpu_memory(MIB) for _ in range(12)]
    for number, pointer in enumerate(pointers):
        assert pointer is not None
        assert facade.write_memory(pointer, bytes([number + 1]) * MIB) == 0
    assert facade.background_swap() > 0
    for number, pointer in enumerate(pointers):
        assert pointer is not None
        assert facade.read_memory(pointer, MIB) == bytes([number + 1]) * MIB


def test_unified_memory() -> None:
    assert facade.init_unified_address_space(1 << 30, 4096) == 0
    for kind in (
        facade.MEMORY_TYPE_HOST,
        facade.MEMORY_TYPE_DEVICE,
        facade.MEMORY_TYPE_MANAGED,
        facade.MEMORY_TYPE_PINNED,
    ):
        pointer = facade.allocate_unified_memory(MIB, kind, facade.ACCESS_READ_WRITE)
        assert pointer is not None
        assert facade.write_memory(pointer + 10, b"bytes") == 0
        assert facade.access_unified_memory(pointer + 10, facade.ACCESS_READ) == pointer + 10
        assert facade.access_unified_memory(pointer, facade.ACCESS_EXECUTE) is None
        assert facade.last_error() == errno.EACCES
        assert facade.free_unified_memory(pointer) == 0
        assert facade.free_unified_memory(pointer) == -1
        assert facade.last_error() == errno.EFAULT


def test_an_address_space_has_the_bytes_that_were_asked_for() -> None:
    assert facade.init_unified_address_space(MIB, 4096) == 0
    pointers = [facade.allocate_unified_memory(4095, facade.MEMORY_TYPE_HOST, 6) for _ in range(256)]
    assert None not in pointers
    assert facade.allocate_unified_memory(1, facade.MEMORY_TYPE_HOST, 6) is None
    assert facade.last_error() == errno.ENOMEM
    assert facade.free_unified_memory(pointers[7] or 0) == 0
    assert facade.allocate_unified_memory(4096, facade.MEMORY_TYPE_HOST, 6) is not None


def test_flags_of_a_c_program_are_numbers_and_what_is_none_is_refused() -> None:
    assert facade.init_unified_address_space(MIB, 4096) == 0
    for kind, permissions in ((2, 6), (facade.MEMORY_TYPE_HOST, 8), (facade.MEMORY_TYPE_HOST, -1)):
        assert facade.allocate_unified_memory(4096, kind, permissions) is None  # type: ignore[arg-type]
        assert facade.last_error() == errno.EINVAL
    pointer = facade.allocate_unified_memory(4096, facade.MEMORY_TYPE_HOST, 4)
    assert pointer is not None
    assert facade.access_unified_memory(pointer, 4) == pointer
    assert facade.access_unified_memory(pointer, 2) is None
    assert facade.last_error() == errno.EACCES
    assert facade.access_unified_memory(pointer, 8) is None
    assert facade.last_error() == errno.EINVAL


@pytest.mark.slow
def test_whichever_init_comes_first_the_log_has_its_performance_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("dpud.gpu")
    monkeypatch.setenv("MEMORY_VIRT_LOG_LEVEL", "INFO")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    inits = (
        (facade.init_compression_system, (facade.COMPRESS_LZ4, facade.QUALITY_BALANCED, True)),
        (facade.init_swap_system, (MIB, 4096, 0.8)),
        (facade.init_unified_address_space, (MIB, 4096)),
        (facade.init_memory_overcommit, (MIB, 1.5)),
        (facade.init_memory_qos, (100, facade.BANDWIDTH_POLICY_FAIR)),
    )
    for init, arguments in inits:
        logger.setLevel(logging.NOTSET)
        assert init(*arguments) == 0
        assert logger.level == logging.INFO, init.__name__
        facade.cleanup_memory_qos()
        facade.cleanup_swap_system()
        facade.cleanup_unified_address_space()
        facade.cleanup_memory_overcommit()
        facade.cleanup_compression_system()
    logger.setLevel(logging.NOTSET)


def test_sync_needs_something_behind_the_device() -> None:
    assert facade.init_swap_system(8 * MIB, 4096, 0.9) == 0
    assert facade.init_unified_address_space(1 << 30, 65536) == 0
    pointer = facade.allocate_unified_memory(MIB, facade.MEMORY_TYPE_MANAGED, facade.ACCESS_READ_WRITE)
    assert pointer is not None
    assert facade.write_memory(pointer, b"x" * MIB) == 0
    assert facade.sync_memory_region(pointer, MIB) == 0
    assert facade.get_address_space_stats()["stored"] == 16


def test_nothing_works_before_init_and_init_works_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert facade.allocate_gpu_memory(1) is None
    assert facade.last_error() == errno.ENODEV
    assert facade.init_unified_address_space(1 << 30, 1000) == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.get_address_space_stats() == {}
    assert facade.init_unified_address_space(1 << 30, 4096) == 0
    assert facade.init_unified_address_space(1 << 30, 4096) == -1
    assert facade.last_error() == errno.EBUSY
    assert facade.allocate_unified_memory(2 << 30, facade.MEMORY_TYPE_DEVICE, facade.ACCESS_READ) is None
    assert facade.last_error() == errno.ENOMEM
    facade.print_address_space_stats()
    assert "tlb_hits" in capsys.readouterr().out


@pytest.mark.slow
def test_swap_stats_say_where_pages_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert facade.get_swap_stats() == {}
    assert facade.init_swap_system(4 * MIB, 2048, 0.7) == 0
    ptr = facade.allocate_gpu_memory(16 * MIB)
    assert ptr is not None
    data = bytes(range(251)) * (16 * MIB // 251)
    assert facade.write_memory(ptr, data) == 0
    stats = facade.get_swap_stats()
    assert stats["device_bytes"] == 4 * MIB
    assert sum(row["pages"] for row in stats["tiers"].values()) * 2048 >= 11 * MIB
    assert list(stats["tiers"]) == ["memory", "nvme", "ssd", "hdd"]
    facade.print_swap_stats()
    shown = capsys.readouterr().out
    assert f"written {stats['written']}" in [" ".join(line.split()) for line in shown.splitlines()]
    assert all(name in shown for name in stats["tiers"])
    assert facade.access_gpu_memory(ptr) == ptr
    facade.free_gpu_memory(ptr)
    assert sum(row["pages"] for row in facade.get_swap_stats()["tiers"].values()) == 0


@pytest.mark.slow
def test_compression_comes_before_swap() -> None:
    """As in the description's example. The pool is bounded then, and what it has no room for goes on to tiers."""
    assert facade.init_compression_system(facade.COMPRESS_LZ4, facade.QUALITY_BALANCED, False) == 0
    try:
        assert facade.init_swap_system(4 * MIB, 4096, 0.8) == 0
        ptr = facade.allocate_gpu_memory(16 * MIB)
        assert ptr is not None
        data = random.Random(1).randbytes(16 * MIB)
        assert facade.write_memory(ptr, data) == 0
        assert sum(row["pages"] for row in facade.get_swap_stats()["tiers"].values()) > 1000
        assert facade.read_memory(ptr, 16 * MIB) == data
    finally:
        facade.cleanup_compression_system()


@pytest.mark.slow
def test_one_memory_after_another_on_one_pool() -> None:
    """The first one's pages are gone from the pool, and so is its limit."""
    assert facade.init_compression_system(facade.COMPRESS_ZSTD, facade.QUALITY_FAST, False) == 0
    try:
        for size in (4 * MIB, 8 * MIB):
            assert facade.init_swap_system(size, 4096, 0.8) == 0
            pool = facade_base.the_memory().store.pool
            assert pool is not None
            assert (pool.limit_bytes, pool.stored_bytes) == (size, 0)
            ptr = facade.allocate_gpu_memory(2 * size)
            assert ptr is not None
            data = random.Random(size).randbytes(2 * size)
            assert facade.write_memory(ptr, data) == 0
            assert facade.read_memory(ptr, 2 * size) == data
            facade.cleanup_swap_system()
            assert (pool.limit_bytes, pool.stored_bytes) == (0, 0)
    finally:
        facade.cleanup_compression_system()
