# SPDX-License-Identifier: MIT
"""The dictionary coders: lz4 (block format), snappy (raw format), zstd (one frame a page, as the `zstd` tool reads it).

zstd's contexts crash when two threads share one, so each thread has its own, by level and dictionary.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import lz4.block
import snappy
import zstandard

from dpud.gpu.compression import lz_batch
from dpud.gpu.compression.codec import Codec, Dictionary, Quality, register

_HC = 3
"""lz4 levels from here on mean its high-compression mode; 1 is the fast mode and 0 that with less search."""


@register
class Lz4(Codec):
    id = 2
    name = "lz4"
    levels = {Quality.FAST: 1, Quality.BALANCED: 1, Quality.BEST: 9}
    candidate = frozenset({Quality.FAST})  # beyond that zstd always makes less of it
    selectable = True
    errors = (lz4.block.LZ4BlockError,)

    def encode(self, page: memoryview, level: int, dictionary: Dictionary | None = None) -> bytes:
        if level >= _HC:
            return lz4.block.compress(page, mode="high_compression", compression=level, store_size=False)  # type: ignore[no-any-return]
        return lz4.block.compress(page, store_size=False)  # type: ignore[no-any-return]

    def encode_summed(
        self, pages: Sequence[memoryview], level: int, dictionary: Dictionary | None = None
    ) -> Iterable[tuple[bytes | memoryview, int]]:
        is_batch = level < _HC and len(pages) > 1 and len(pages[0]) > 0
        known = lz_batch.library() if is_batch else None
        if known is None:
            return super().encode_summed(pages, level, dictionary)
        return lz_batch.compress_many(known, pages)

    def decode(self, data: bytes | memoryview, out: memoryview, dictionary: Dictionary | None = None) -> None:
        out[:] = lz4.block.decompress(data, uncompressed_size=len(out))


SHORT_BYTES = 16 << 10
"""Longer pages are worth a call each."""
_MAX_CONTEXTS = 64
Frame: TypeAlias = bytes | memoryview
"""Has a length, and can be joined with others, as zstandard's BufferSegment can; its stub does not say so."""


class ZstdContexts(threading.local):
    """This thread's compressors and decompressors.

    They are kept by dictionary, not by its number: every compression system counts its own from the same number on, and
    a thread may work for several.
    """

    def __init__(self) -> None:
        self._compressors: dict[tuple[int, Dictionary | None], zstandard.ZstdCompressor] = {}
        self._decompressors: dict[Dictionary | None, zstandard.ZstdDecompressor] = {}

    def compressor(self, level: int, dictionary: Dictionary | None) -> zstandard.ZstdCompressor:
        key = (level, dictionary)
        if key not in self._compressors:
            if len(self._compressors) >= _MAX_CONTEXTS:  # of systems that may be long gone
                self._compressors.clear()
            more: dict[str, Any] = {"dict_data": zstandard.ZstdCompressionDict(dictionary.data)} if dictionary else {}
            self._compressors[key] = zstandard.ZstdCompressor(level=level, write_content_size=True, **more)
        return self._compressors[key]

    def decompressor(self, dictionary: Dictionary | None) -> zstandard.ZstdDecompressor:
        if dictionary not in self._decompressors:
            if len(self._decompressors) >= _MAX_CONTEXTS:
                self._decompressors.clear()
            more: dict[str, Any] = {"dict_data": zstandard.ZstdCompressionDict(dictionary.data)} if dictionary else {}
            self._decompressors[dictionary] = zstandard.ZstdDecompressor(**more)
        return self._decompressors[dictionary]

    def encode_many(self, streams: Sequence[memoryview], level: int) -> "list[Frame]":
        """One frame each, the same ones as `compress` makes of them one by one."""
        if len(streams) < 2:
            return [self.compressor(level, None).compress(stream) for stream in streams]
        frames = self.compressor(level, None).multi_compress_to_buffer(list(streams))
        return cast("list[Frame]", [frames[at] for at in range(len(frames))])

    def decode(self, data: bytes | memoryview, nr_bytes: int, dictionary: Dictionary | None = None) -> bytes:
        """One frame. Raises ValueError or ZstdError."""
        if zstandard.frame_content_size(data) != nr_bytes:  # what the frame says is what would be allocated
            raise ValueError("zstd frame of another size")
        return self.decompressor(dictionary).decompress(data, allow_extra_data=False)


CONTEXTS = ZstdContexts()


@register
class Zstd(Codec):
    id = 3
    name = "zstd"
    levels = {Quality.BALANCED: 1, Quality.BEST: 9}
    candidate = frozenset({Quality.BALANCED, Quality.BEST})
    selectable = True
    takes_dictionary = True
    errors = (zstandard.ZstdError,)

    def encode(self, page: memoryview, level: int, dictionary: Dictionary | None = None) -> bytes:
        return CONTEXTS.compressor(level, dictionary).compress(page)

    def encode_many(
        self, pages: Sequence[memoryview], level: int, dictionary: Dictionary | None = None
    ) -> Iterable[bytes]:
        if dictionary is not None or len(pages[0]) > SHORT_BYTES:
            return super().encode_many(pages, level, dictionary)
        return [bytes(frame) for frame in CONTEXTS.encode_many(pages, level)]

    def lengths(self, pages: Sequence[memoryview], level: int, dictionary: Dictionary | None = None) -> Sequence[int]:
        if dictionary is not None:  # one go would begin with reading the dictionary again
            return super().lengths(pages, level, dictionary)
        return list(map(len, CONTEXTS.encode_many(pages, level)))

    def decode(self, data: bytes | memoryview, out: memoryview, dictionary: Dictionary | None = None) -> None:
        out[:] = CONTEXTS.decode(data, len(out), dictionary)


@register
class Snappy(Codec):
    id = 4
    name = "snappy"
    levels = {Quality.FAST: 0}
    candidate = frozenset({Quality.FAST})
    selectable = True
    errors = (snappy.UncompressError,)

    def encode(self, page: memoryview, level: int, dictionary: Dictionary | None = None) -> bytes:
        return snappy.compress(page)  # type: ignore[no-any-return]

    def decode(self, data: bytes | memoryview, out: memoryview, dictionary: Dictionary | None = None) -> None:
        if (nr_bytes := preamble(data)) != len(out):  # what the stream says is what would be allocated
            raise ValueError(f"snappy stream of {nr_bytes} bytes")
        out[:] = snappy.uncompress(bytes(data))


def preamble(data: bytes | memoryview) -> int:
    """Uncompressed bytes that a snappy stream declares: a little-endian varint. Source: snappy format_description."""
    value = 0
    for index, byte in enumerate(data[:5]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value
    raise ValueError("snappy stream without a length")
