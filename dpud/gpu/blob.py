# SPDX-License-Identifier: MIT
"""A page that is not on a device: its bytes, encoded, as they lie in the compressed pool and in swap tiers.

The checksum is over the *raw* bytes, made when the page leaves the device and checked when it comes back, so that it
covers everything in between: codec, pool, disk. Whoever decodes a blob checks it.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import xxhash

from dpud.gpu.errors import CorruptPage

RAW = 0
SAME_FILLED = 1
"""Codec ids that everybody knows; others belong to compression/."""

_WORD_BYTES = 8


class Blob(NamedTuple):
    """One encoded page. A tuple, since pages are many: a frozen dataclass takes four times as long to make."""

    data: bytes | memoryview
    """RAW: the page; SAME_FILLED: the 8-byte word that fills it; else what the codec made of it."""
    codec: int
    raw_bytes: int
    checksum: int
    """`checksum` of the raw bytes."""
    dictionary: int = 0
    """Number of the dictionary it was encoded with; 0 for none."""


def checksum(data: bytes | bytearray | memoryview) -> int:
    """xxh3_64 of a page's raw bytes."""
    return xxhash.xxh3_64_intdigest(data)


def same_filled_word(page: bytes | memoryview) -> bytes | None:
    """The 8-byte word that fills the whole page, or None. Source of the idea: page_same_filled(), zram_drv.c."""
    word = bytes(page[:_WORD_BYTES])
    nr_words, rest = divmod(len(page), _WORD_BYTES)
    if rest or page[-_WORD_BYTES:] != word or bytes(page) != word * nr_words:
        return None
    return word


class PageCodec(Protocol):
    """Who turns pages into blobs and back; compression/ has a better one than PlainCodec."""

    def encode(self, pages: Sequence[memoryview], client: str = "", /) -> list[Blob]:
        """`client`: whose pages they are; one client's are often alike."""
        ...

    def decode(self, blobs: Sequence[Blob], outs: Sequence[memoryview], /) -> None:
        """Raises CorruptPage, its key the index in `blobs`, where a checksum or a stream is wrong."""
        ...


class PlainCodec:
    """No compression: pages are kept as they are, but for those that one word fills."""

    def encode(self, pages: Sequence[memoryview], client: str = "") -> list[Blob]:
        return [_plain(page) for page in pages]

    def decode(self, blobs: Sequence[Blob], outs: Sequence[memoryview]) -> None:
        """Raises CorruptPage, its key the index in `blobs`."""
        for index, (blob, out) in enumerate(zip(blobs, outs, strict=True)):
            _unplain(index, blob, out)
            verify(index, blob, out)


def verify(key: int, blob: Blob, raw: memoryview) -> None:
    """Raises CorruptPage(key) where the decoded bytes are not the ones that were encoded."""
    if checksum(raw) != blob.checksum:
        raise CorruptPage(key, f"checksum {checksum(raw):016x}, expected {blob.checksum:016x}")


def _plain(page: memoryview) -> Blob:
    word = same_filled_word(page)
    data, codec = (bytes(page), RAW) if word is None else (word, SAME_FILLED)
    return Blob(data, codec, len(page), checksum(page))


def _unplain(key: int, blob: Blob, out: memoryview) -> None:
    if blob.codec == SAME_FILLED and len(blob.data) == _WORD_BYTES:
        out[:] = bytes(blob.data) * (len(out) // _WORD_BYTES)
    elif blob.codec == RAW and len(blob.data) == len(out):
        out[:] = blob.data
    else:
        raise CorruptPage(key, f"codec {blob.codec} with {len(blob.data)} bytes for a page of {len(out)}")


_HEADER = struct.Struct("<IIIQI")  # data bytes, codec, raw bytes, checksum, dictionary
HEADER_BYTES = _HEADER.size


def pack_header(blob: Blob) -> bytes:
    """All of a blob but its data, as HEADER_BYTES bytes."""
    return _HEADER.pack(len(blob.data), blob.codec, blob.raw_bytes, blob.checksum, blob.dictionary)


def unpack_header(header: bytes | memoryview) -> tuple[int, Blob]:
    """(data bytes, the blob without its data). Raises CorruptPage(0) for a header that is cut off."""
    if len(header) < HEADER_BYTES:
        raise CorruptPage(0, "header cut off")
    nr_data, codec, raw_bytes, check, dictionary = _HEADER.unpack_from(header)
    return nr_data, Blob(b"", codec, raw_bytes, check, dictionary)
