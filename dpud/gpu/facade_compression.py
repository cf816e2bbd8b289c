# SPDX-License-Identifier: MIT
"""The C names of memory compression.

    init_compression_system(COMPRESS_ADAPTIVE, QUALITY_BALANCED, True)
    output, output_size = Ref(), Ref()
    compress_memory(data, len(data), output, output_size, COMPRESS_ZSTD)
    decompress_memory(output.value, output_size.value, data_again, size_again, COMPRESS_ZSTD)
    cleanup_compression_system()

What compress_memory makes is the size and a row of blobs, each behind its header (blob.py), one for each CHUNK_BYTES of
input, so that threads can share the work. It holds checksums: decompress_memory gives back what was compressed, or -1
with EIO.

init_swap_system(), called later, puts this codec and a pool of its own behind the device's memory.
"""

import errno
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, TypeAlias

from dpud.gpu.blob import HEADER_BYTES, RAW, SAME_FILLED, Blob, pack_header, unpack_header
from dpud.gpu.compression.codec import name_of, names
from dpud.gpu.compression.pool import CompressedPool
from dpud.gpu.compression.system import CompressionSystem
from dpud.gpu.errors import CorruptPage, GpuError
from dpud.gpu.facade_base import Ref, behind, c_int
from dpud.gpu.performance import set_log_level

CHUNK_BYTES = 256 << 10
PARALLEL_WORKERS = 2
_CLIENT = "compress_memory"
_PREFIX = struct.Struct("<8sQ")  # magic, bytes before compression
_MAGIC = b"dpudcmp1"

Buffer: TypeAlias = bytes | bytearray | memoryview


class CompressionAlgorithm(IntEnum):
    COMPRESS_LZ4 = 0
    COMPRESS_ZSTD = 1
    COMPRESS_SNAPPY = 2
    COMPRESS_ADAPTIVE = 3


class CompressionQuality(IntEnum):
    QUALITY_FAST = 0
    QUALITY_BALANCED = 1
    QUALITY_BEST = 2


COMPRESS_LZ4, COMPRESS_ZSTD, COMPRESS_SNAPPY, COMPRESS_ADAPTIVE = CompressionAlgorithm
QUALITY_FAST, QUALITY_BALANCED, QUALITY_BEST = CompressionQuality


class _State:
    system: CompressionSystem | None = None


def the_system() -> CompressionSystem:
    """Raises GpuError(ENODEV) before init_compression_system()."""
    if _State.system is None:
        raise GpuError(errno.ENODEV, "the compression system is not initialized")
    return _State.system


@c_int
def init_compression_system(algorithm: int, quality: int, parallel_enabled: bool) -> None:
    """EBUSY if it is initialized already; EINVAL for an unknown algorithm or quality."""
    if _State.system is not None:
        raise GpuError(errno.EBUSY, "initialized already")
    if quality not in list(CompressionQuality):
        raise GpuError(errno.EINVAL, f"no quality {quality}")
    set_log_level()
    word = CompressionQuality(quality).name.removeprefix("QUALITY_").lower()
    workers = PARALLEL_WORKERS if parallel_enabled else 1
    system = _State.system = CompressionSystem(_name(algorithm), word, workers)
    behind.update(codec=system, pool=CompressedPool(0, system))


@c_int
def compress_memory(input: Buffer, input_size: int, output: Ref[bytes], output_size: Ref[int], algorithm: int) -> None:
    """The first `input_size` bytes of `input` -> `output`, `output_size`. EINVAL, ENODEV."""
    system, view = the_system(), _view(input, input_size)
    chunks = [view[begin : begin + CHUNK_BYTES] for begin in range(0, input_size, CHUNK_BYTES)]
    before, system.algorithm = system.algorithm, _name(algorithm)
    try:
        blobs = system.encode(chunks, _CLIENT)
    finally:
        system.algorithm = before
    parts = (pack_header(blob) + bytes(blob.data) for blob in blobs)
    output.value = _PREFIX.pack(_MAGIC, input_size) + b"".join(parts)
    output_size.value = len(output.value)


@c_int
def decompress_memory(
    input: Buffer, input_size: int, output: Ref[bytes], output_size: Ref[int], algorithm: int
) -> None:
    """The inverse, with the same `algorithm` or COMPRESS_ADAPTIVE. EINVAL for another one; EIO for damaged input."""
    system, wanted = the_system(), _name(algorithm)
    size, blobs = _parse(_view(input, input_size))
    _check_algorithm(blobs, wanted)
    result = memoryview(bytearray(size))
    outs, begin = [], 0
    for blob in blobs:
        outs.append(result[begin : begin + blob.raw_bytes])
        begin += blob.raw_bytes
    system.decode(blobs, outs)
    output.value, output_size.value = bytes(result), len(result)


def get_compression_stats() -> dict[str, dict[str, Any]]:
    """By codec: pages, raw_bytes, stored_bytes, ratio, compress_mbps, decompress_mbps. Empty if not initialized."""
    if _State.system is None:
        return {}
    return {
        name_of(codec): {
            "pages": stats.pages,
            "raw_bytes": stats.raw_bytes,
            "stored_bytes": stats.stored_bytes,
            "ratio": stats.ratio,
            "compress_mbps": stats.encode_mbps,
            "decompress_mbps": stats.decode_mbps,
        }
        for codec, stats in sorted(_State.system.stats.items())
    }


def print_compression_stats() -> None:
    """One line a codec, to stdout."""
    print("Compression: codec, pages, bytes before and after, ratio, MB/s in and out")
    for name, row in get_compression_stats().items():
        sizes = f"{row['pages']:8} {row['raw_bytes']:12} {row['stored_bytes']:12} {row['ratio']:6.2f}"
        print(f"  {name:<13} {sizes} {row['compress_mbps']:8.0f} {row['decompress_mbps']:8.0f}")


def cleanup_compression_system() -> None:
    """Ends the worker threads. Memory that already sits on the pool keeps it."""
    if _State.system is not None:
        _State.system.close()
        _State.system = None
        behind.pop("codec", None)
        behind.pop("pool", None)


def _name(algorithm: int) -> str:
    if algorithm not in list(CompressionAlgorithm):
        raise GpuError(errno.EINVAL, f"no algorithm {algorithm}")
    return CompressionAlgorithm(algorithm).name.removeprefix("COMPRESS_").lower()


def _view(data: Buffer, size: int) -> memoryview:
    view = memoryview(data).cast("B")
    if not 0 <= size <= len(view):
        raise GpuError(errno.EINVAL, f"{size} of {len(view)} bytes")
    return view[:size]


def _parse(view: memoryview) -> tuple[int, list[Blob]]:
    """(bytes before compression, blobs). Raises CorruptPage."""
    if len(view) < _PREFIX.size:
        raise CorruptPage(0, "its beginning is missing")
    magic, size = _PREFIX.unpack_from(view)
    blobs = list(_blobs(view[_PREFIX.size :]))
    if magic != _MAGIC or size != sum(blob.raw_bytes for blob in blobs):
        raise CorruptPage(len(blobs), "its beginning is damaged, or its end is missing")
    return size, blobs


def _blobs(view: memoryview) -> Iterator[Blob]:
    """Raises CorruptPage where a header cannot be right."""
    begin, index = 0, 0
    while begin < len(view):
        nr_bytes, blob = unpack_header(view[begin : begin + HEADER_BYTES])
        begin += HEADER_BYTES
        if blob.raw_bytes > CHUNK_BYTES or begin + nr_bytes > len(view):
            raise CorruptPage(index, "its header is damaged")
        yield Blob(view[begin : begin + nr_bytes], blob.codec, blob.raw_bytes, blob.checksum, blob.dictionary)
        begin += nr_bytes
        index += 1


def _check_algorithm(blobs: Sequence[Blob], name: str) -> None:
    if name != "adaptive" and {blob.codec for blob in blobs} - {RAW, SAME_FILLED, names()[name]}:
        raise GpuError(errno.EINVAL, f"that was not compressed with {name}")
