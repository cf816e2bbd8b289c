# SPDX-License-Identifier: GPL-2.0-only
"""The C names of overcommitted memory: arguments, return values and errors."""

import errno
from collections.abc import Iterator

import compressible
import pytest

from dpud.gpu import facade

MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    facade.cleanup_memory_overcommit()
    facade.cleanup_compression_system()
    facade.cleanup_swap_system()


def test_as_much_as_the_ratio_says_and_no_more() -> None:
    assert facade.init_memory_overcommit(4 * MIB, 1.5) == 0
    pointers = [facade.allocate_overcommit_memory(MIB, 0) for _ in range(7)]
    assert [pointer is not None for pointer in pointers] == [True] * 6 + [False]
    assert facade.last_error() == errno.ENOMEM
    stats = facade.get_overcommit_stats()
    assert (stats["granted_bytes"], stats["granted"], stats["refused"]) == (6 * MIB, 6, 1)
    facade.free_overcommit_memory(pointers[0])
    assert facade.allocate_overcommit_memory(MIB, 0) is not None


@pytest.mark.slow
def test_all_that_was_promised_can_be_used() -> None:
    assert facade.init_memory_overcommit(2 * MIB, 3.0) == 0
    pointers = [facade.allocate_overcommit_memory(MIB, priority) for priority in (0, 0, 0, 3, 3, 100)]
    written = {}
    for number, pointer in enumerate(pointers):
        assert pointer is not None
        written[pointer] = bytes([number + 1]) * MIB
    for pointer, data in written.items():
        client = facade.the_memory().space.regions.find(pointer)
        assert client is not None
        facade.the_memory().write(client.client, pointer, data)
    for pointer, data in written.items():
        client = facade.the_memory().space.regions.find(pointer)
        assert client is not None
        assert facade.the_memory().read(client.client, pointer, MIB) == data


@pytest.mark.slow
def test_what_compresses_is_counted_on_only_when_it_was_seen_to() -> None:
    facade.init_compression_system(facade.COMPRESS_LZ4, facade.QUALITY_FAST, False)
    assert facade.init_memory_overcommit(2 * MIB, 8.0) == 0
    pointer = facade.allocate_overcommit_memory(4 * MIB, 0)
    assert pointer is not None
    assert facade.get_overcommit_stats()["compressibility"] == 1.0
    facade.write_memory(pointer, compressible.text(4 * MIB))
    assert facade.get_overcommit_stats()["compressibility"] == 1.0
    believed = []
    for _ in range(50):
        facade.the_memory().clock.sleep_until(facade.the_memory().clock.now_ns() + 1_000_000_000)
        believed.append(facade.get_overcommit_stats()["compressibility"])
    assert believed == sorted(believed)
    assert 1 < believed[0] < 1.2 < believed[-1]
    facade.free_overcommit_memory(pointer)
    assert facade.get_overcommit_stats()["compressibility"] == believed[-1]  # an empty pool says nothing


def test_errors() -> None:
    assert facade.allocate_overcommit_memory(MIB, 0) is None
    assert facade.last_error() == errno.ENODEV
    assert facade.init_memory_overcommit(MIB, 0.5) == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.init_memory_overcommit(MIB, 2.0) == 0
    assert facade.init_memory_overcommit(MIB, 2.0) == -1
    assert facade.last_error() == errno.EBUSY
    assert facade.allocate_overcommit_memory(MIB, 101) is None
    assert facade.last_error() == errno.EINVAL
    facade.free_overcommit_memory(None)
    facade.free_overcommit_memory(12345)
    assert facade.last_error() == errno.EFAULT


def test_statistics_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    facade.print_overcommit_stats()
    facade.init_memory_overcommit(MIB, 2.0)
    facade.allocate_overcommit_memory(64 << 10, 1)
    facade.print_overcommit_stats()
    assert "  granted_bytes    65536\n" in capsys.readouterr().out
