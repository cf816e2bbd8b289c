# SPDX-License-Identifier: MIT
"""Codecs for arrays of numbers: the n-th bytes of all elements together, each such plane coded by itself.

Theory of operation
    In floating-point weights the exponents take few values and the mantissas are noise. Byte by byte in one stream they
    spoil each other's statistics; apart, an entropy coder takes the exponent plane to about 3 bits a byte and gives the
    mantissa planes up at once. Integers have planes that are all zero. The idea is Blosc's shuffle filter and ZipNN's
    (arXiv 2411.05239); coding the planes apart is what lets the incompressible ones stay as they are.

    Where neighbours are close (a smooth field, time stamps), the second difference of the bits seen as integers has
    smaller high bytes than the values have. Positive floats order as their bits do, so this works for them too.

Format
    A length for each plane, least significant byte first, then the planes: 16 bits a length where they suffice, else
    32, little-endian. A plane as long as it must be decoded is raw; else it is a stream of the inner coder.
"""

import struct
from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

import lz4.block
import numpy as np
import zstandard
from numpy.typing import NDArray

from dpud.gpu.compression.codec import Codec, Dictionary, Quality, register
from dpud.gpu.compression.lz import CONTEXTS, Frame

_WORDS: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class Planes(Codec):
    """Byte planes of `element_bytes`-byte elements; a subclass says how a plane is coded."""

    @abstractmethod
    def encode_planes(self, planes: Sequence[memoryview], level: int) -> Sequence[Frame]: ...

    @abstractmethod
    def decode_plane(self, data: memoryview, nr_bytes: int) -> bytes: ...

    def before(self, words: NDArray[Any]) -> NDArray[Any]:
        """What is done to the elements of each row first."""
        return words

    def after(self, words: NDArray[Any]) -> NDArray[Any]:
        """The inverse."""
        return words

    def encode(self, page: memoryview, level: int, dictionary: Dictionary | None = None) -> bytes:
        return self.encode_many([page], level)[0]

    def encode_many(
        self, pages: Sequence[memoryview], level: int, dictionary: Dictionary | None = None
    ) -> Sequence[bytes]:
        lengths = _lengths(len(pages[0]), self.element_bytes)
        return [b"".join((lengths.pack(*map(len, parts)), *parts)) for parts in self._parts(pages, level)]

    def lengths(self, pages: Sequence[memoryview], level: int, dictionary: Dictionary | None = None) -> Sequence[int]:
        head = _lengths(len(pages[0]), self.element_bytes).size
        return [head + sum(map(len, parts)) for parts in self._parts(pages, level)]

    def _parts(self, pages: Sequence[memoryview], level: int) -> list[list[Frame]]:
        """Of each page its planes, coded where that is shorter."""
        planes = self._planes(pages)
        parts = [
            coded if len(coded) < len(plane) else plane
            for plane, coded in zip(planes, self.encode_planes(planes, level), strict=True)
        ]
        return [parts[at : at + self.element_bytes] for at in range(0, len(parts), self.element_bytes)]

    def _planes(self, pages: Sequence[memoryview]) -> list[memoryview]:
        """Of all pages, one behind the other."""
        words = np.frombuffer(b"".join(pages), _WORDS[self.element_bytes]).reshape(len(pages), -1)
        elements = self.before(words).view(np.uint8).reshape(len(pages), -1, self.element_bytes)
        flat = np.ascontiguousarray(elements.transpose(0, 2, 1)).reshape(-1).data
        size = len(pages[0]) // self.element_bytes
        return [flat[at : at + size] for at in range(0, len(flat), size)]

    def decode(self, data: bytes | memoryview, out: memoryview, dictionary: Dictionary | None = None) -> None:
        view, nr_bytes = memoryview(data), len(out) // self.element_bytes
        lengths = _lengths(len(out), self.element_bytes)
        if len(view) < lengths.size:
            raise ValueError("planes without their lengths")
        begin = lengths.size
        elements = np.empty((nr_bytes, self.element_bytes), np.uint8)
        for index, length in enumerate(lengths.unpack_from(view)):
            part = view[begin : begin + length]
            begin += length
            plane = part if length == nr_bytes else self.decode_plane(part, nr_bytes)
            elements[:, index] = np.frombuffer(plane, np.uint8)
        if begin != len(view):
            raise ValueError("planes of another size")
        words = self.after(elements.reshape(-1).view(_WORDS[self.element_bytes]))
        out[:] = words.view(np.uint8).data


@cache
def _lengths(raw_bytes: int, element_bytes: int) -> struct.Struct:
    return struct.Struct("<" + ("H" if raw_bytes // element_bytes < 1 << 16 else "I") * element_bytes)


class ZstdPlanes(Planes):
    levels = {Quality.BALANCED: 1, Quality.BEST: 1}  # higher levels look for matches, which exponents do not have
    candidate = frozenset({Quality.BALANCED, Quality.BEST})
    errors = (zstandard.ZstdError,)

    def encode_planes(self, planes: Sequence[memoryview], level: int) -> Sequence[Frame]:
        return CONTEXTS.encode_many(planes, level)

    def decode_plane(self, data: memoryview, nr_bytes: int) -> bytes:
        return CONTEXTS.decode(data, nr_bytes)


class Lz4Planes(Planes):
    levels = {Quality.FAST: 1}
    candidate = frozenset({Quality.FAST})
    errors = (lz4.block.LZ4BlockError,)

    def encode_planes(self, planes: Sequence[memoryview], level: int) -> Sequence[bytes]:
        return [lz4.block.compress(plane, store_size=False) for plane in planes]

    def decode_plane(self, data: memoryview, nr_bytes: int) -> bytes:
        return lz4.block.decompress(data, uncompressed_size=nr_bytes)  # type: ignore[no-any-return]


class DifferencePlanes(ZstdPlanes):
    """Of the second difference."""

    levels = {Quality.BALANCED: 1, Quality.BEST: 9}

    def before(self, words: NDArray[Any]) -> NDArray[Any]:
        return _difference(_difference(words))

    def after(self, words: NDArray[Any]) -> NDArray[Any]:
        once = np.add.accumulate(words, dtype=words.dtype)  # or numpy would widen them
        return np.add.accumulate(once, dtype=words.dtype)


def _difference(words: NDArray[Any]) -> NDArray[Any]:
    """Each word of a row less the one before it, modulo the size of a word; the first as it is."""
    result = words.copy()
    result[:, 1:] -= words[:, :-1]
    return result


@register
class Planes2Lz4(Lz4Planes):
    id, name, element_bytes = 5, "planes2-lz4", 2


@register
class Planes4Lz4(Lz4Planes):
    id, name, element_bytes = 6, "planes4-lz4", 4


@register
class Planes8Lz4(Lz4Planes):
    id, name, element_bytes = 7, "planes8-lz4", 8


@register
class Planes2Zstd(ZstdPlanes):
    id, name, element_bytes = 8, "planes2-zstd", 2


@register
class Planes4Zstd(ZstdPlanes):
    id, name, element_bytes = 9, "planes4-zstd", 4


@register
class Planes8Zstd(ZstdPlanes):
    id, name, element_bytes = 10, "planes8-zstd", 8


@register
class Difference4Zstd(DifferencePlanes):
    id, name, element_bytes, refines = 11, "diff4-zstd", 4, Planes4Zstd.id


@register
class Difference8Zstd(DifferencePlanes):
    id, name, element_bytes, refines = 12, "diff8-zstd", 8, Planes8Zstd.id
