# SPDX-License-Identifier: GPL-2.0-only
"""The C names of NUMA: the seed's sample, errors, and a topology of several nodes."""

import errno
from collections.abc import Iterator

import pytest

from dpud.gpu import facade

MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    facade.cleanup_numa_memory_manager()
    facade.cleanup_swap_system()
    facade.cleanup_unified_address_space()
    facade.cleanup_compression_system()


@pytest.mark.parametrize("numa_first", [True, False])
def test_the_seed_s_sample(numa_first: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert facade.init_compression_system(facade.COMPRESS_ADAPTIVE, facade.QUALITY_BALANCED, True) == 0
    if numa_first:
        assert facade.init_numa_memory_manager() == 0
    assert facade.init_swap_system(16 * MIB, 4096, 0.8) == 0
    if not numa_first:
        assert facade.init_numa_memory_manager() == 0
    pointer = facade.allocate_gpu_memory(MIB)
    assert pointer is not None
    assert facade.write_memory(pointer, b"weights") == 0
    assert facade.read_memory(pointer, 7) == b"weights"
    facade.print_numa_stats()
    assert "nodes" in capsys.readouterr().out
    facade.free_gpu_memory(pointer)
    facade.cleanup_numa_memory_manager()
    assert facade.get_numa_stats() == {}


def test_nodes_of_a_topology() -> None:
    assert facade.init_numa_memory_manager("four-node-cxl") == 0
    assert facade.init_unified_address_space(1 << 30, 4096) == 0
    assert facade.set_numa_policy("interleave:0-3") == 0
    pointer = facade.allocate_unified_memory(MIB, facade.MEMORY_TYPE_HOST, facade.ACCESS_READ_WRITE)
    assert pointer is not None
    assert facade.write_memory(pointer, bytes(MIB)) == 0
    stats = facade.get_numa_stats()
    assert (stats["nodes"], stats["policy"], stats["interleave_hit"]) == (4, "interleave:0-3", 256)
    memory = facade.the_memory()
    region = memory.space.regions.find(pointer)
    assert region is not None
    assert [region.nr_resident(memory.nr_devices + node) for node in range(4)] == [64] * 4


def test_errors() -> None:
    assert facade.set_numa_policy("local") == -1
    assert facade.last_error() == errno.ENODEV
    assert facade.init_numa_memory_manager("/nonexistent.toml") == -1
    assert facade.last_error() == errno.ENOENT
    assert facade.init_numa_memory_manager("two-socket") == 0
    assert facade.init_numa_memory_manager("two-socket") == -1
    assert facade.last_error() == errno.EBUSY
    assert facade.set_numa_policy("bind:9") == -1
    assert facade.last_error() == errno.EINVAL


def test_cleanup_twice_and_print_before_init(capsys: pytest.CaptureFixture[str]) -> None:
    facade.cleanup_numa_memory_manager()
    facade.cleanup_numa_memory_manager()
    facade.print_numa_stats()
    assert capsys.readouterr().out == "NUMA: not initialized\n"
