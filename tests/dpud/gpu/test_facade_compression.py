# SPDX-License-Identifier: GPL-2.0-only
"""The C names of compression: arguments, return values and errors as in the description the project began with."""

import errno
import logging
from collections.abc import Iterator

import compressible
import pytest

from dpud.gpu import facade
from dpud.gpu.facade import COMPRESS_ADAPTIVE, COMPRESS_LZ4, COMPRESS_SNAPPY, COMPRESS_ZSTD, QUALITY_BALANCED, Ref

MIB = 1 << 20
ALGORITHMS = [COMPRESS_LZ4, COMPRESS_ZSTD, COMPRESS_SNAPPY, COMPRESS_ADAPTIVE]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    facade.cleanup_swap_system()
    facade.cleanup_compression_system()


@pytest.fixture
def ready() -> None:
    assert facade.init_compression_system(COMPRESS_LZ4, QUALITY_BALANCED, True) == 0


def compressed(data: bytes, algorithm: int) -> bytes:
    output, size = Ref[bytes](), Ref[int]()
    assert facade.compress_memory(data, len(data), output, size, algorithm) == 0
    assert output.value is not None
    assert size.value == len(output.value)
    return output.value


def decompress(data: bytes, algorithm: int) -> tuple[int, bytes | None]:
    """(return value, output)."""
    output, size = Ref[bytes](), Ref[int]()
    result = facade.decompress_memory(data, len(data), output, size, algorithm)
    assert output.value is None or size.value == len(output.value)
    return result, output.value


@pytest.mark.slow
@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_was_compressed_comes_back(algorithm: int) -> None:
    for data in (b"", b"x", compressible.text(MIB + 123), bytes(300_000), compressible.noise(5000)):
        packed = compressed(data, algorithm)
        assert decompress(packed, algorithm) == (0, data)
        assert decompress(packed, COMPRESS_ADAPTIVE) == (0, data)
        assert len(packed) <= len(data) + 200
    assert len(compressed(compressible.text(MIB), algorithm)) < MIB * 0.7


@pytest.mark.usefixtures("ready")
def test_only_the_first_bytes_are_taken_as_in_c() -> None:
    output, size = Ref[bytes](), Ref[int]()
    assert facade.compress_memory(b"pages, and more", 5, output, size, COMPRESS_ZSTD) == 0
    assert output.value is not None
    assert decompress(output.value, COMPRESS_ZSTD) == (0, b"pages")
    assert facade.compress_memory(b"short", 6, output, size, COMPRESS_ZSTD) == -1
    assert facade.last_error() == errno.EINVAL


@pytest.mark.usefixtures("ready")
def test_another_algorithm_is_refused() -> None:
    packed = compressed(compressible.text(10_000), COMPRESS_LZ4)
    assert decompress(packed, COMPRESS_SNAPPY) == (-1, None)
    assert facade.last_error() == errno.EINVAL
    assert decompress(packed, 17) == (-1, None)
    assert facade.last_error() == errno.EINVAL


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.slow
def test_damage_is_an_error(algorithm: int) -> None:
    data = compressible.text(600)
    packed = compressed(data, algorithm)
    for bit in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        result, output = decompress(bytes(damaged), COMPRESS_ADAPTIVE)
        assert (result, output) == (-1, None) or output == data
        assert result == 0 or facade.last_error() == errno.EIO
    for length in range(len(packed)):
        assert decompress(packed[:length], COMPRESS_ADAPTIVE) == (-1, None)
        assert facade.last_error() == errno.EIO


@pytest.mark.usefixtures("ready")
def test_a_lost_end_is_noticed_though_each_part_is_whole() -> None:
    data = compressible.text(600_000)
    packed = compressed(data, COMPRESS_ZSTD)
    alone = compressed(data[: 256 << 10], COMPRESS_ZSTD)
    assert packed[16 : len(alone)] == alone[16:]  # behind the magic number and the size
    assert decompress(packed[: len(alone)], COMPRESS_ZSTD) == (-1, None)
    assert facade.last_error() == errno.EIO


def test_order_of_calls() -> None:
    output, size = Ref[bytes](), Ref[int]()
    assert facade.compress_memory(b"early", 5, output, size, COMPRESS_LZ4) == -1
    assert facade.last_error() == errno.ENODEV
    assert facade.init_compression_system(9, QUALITY_BALANCED, False) == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.init_compression_system(COMPRESS_LZ4, 9, False) == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.init_compression_system(COMPRESS_ADAPTIVE, QUALITY_BALANCED, False) == 0
    assert facade.init_compression_system(COMPRESS_ADAPTIVE, QUALITY_BALANCED, False) == -1
    assert facade.last_error() == errno.EBUSY
    facade.cleanup_compression_system()
    facade.cleanup_compression_system()
    assert facade.init_compression_system(COMPRESS_ADAPTIVE, QUALITY_BALANCED, False) == 0


@pytest.mark.slow
def test_the_program_of_the_description(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Compression first, then swap: pages that leave the device are compressed."""
    caplog.set_level(logging.INFO, "dpud.gpu")
    assert facade.init_compression_system(COMPRESS_LZ4, QUALITY_BALANCED, True) == 0
    assert facade.init_swap_system(4 * MIB, 4096, 0.8) == 0
    pointers = [facade.allocate_gpu_memory(MIB) for _ in range(8)]
    contents = [compressible.text(MIB, seed) for seed in range(8)]
    for pointer, content in zip(pointers, contents, strict=True):
        assert pointer is not None
        assert facade.write_memory(pointer, content) == 0
    for pointer, content in zip(pointers, contents, strict=True):
        assert pointer is not None
        assert facade.read_memory(pointer, MIB) == content
    stats = facade.get_compression_stats()["lz4"]
    assert stats["pages"] >= 1024
    assert stats["ratio"] > 1.3
    facade.print_compression_stats()
    assert f"{stats['pages']} " in capsys.readouterr().out
    assert any(message.startswith("Performance compress: ") for message in caplog.messages)
