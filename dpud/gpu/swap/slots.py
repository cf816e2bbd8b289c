# SPDX-License-Identifier: MIT
"""The format of a tier's file: how a page lies in it, so that a torn, flipped or stale one is known as such.

Theory of operation
    Block 0 is the label: magic, version, the number of blocks, and a salt, made anew for each new file. The rest are
    slots. A slot is a run of blocks that is written in one piece; it holds the records of the pages that were written
    together, one behind the other. A record is 64 bytes of header, then the page's encoded bytes, then nothing up to a
    multiple of 64.

    The header has the page's key, a generation that grows with every write to any tier, all of the blob but its data,
    a checksum of the data, and one of the header itself with the salt in it. So for each record it can be told, from
    the file alone, whether it is whole:

        the header does not fit its checksum   torn or flipped in the header; or not a header at all
        the data do not fit theirs             torn or flipped in the data
        another key or generation than known   the write never got there: what lies there is what was there before

    A block is never written while a live record has a byte in it, so no write can tear an older page.

Records can be found without an index (`scan`): headers begin at multiples of 64 bytes. Of several records of a key the
highest generation counts. Which of them were dropped since is not in the file: that is for whoever keeps an index.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from dpud.gpu.blob import Blob
from dpud.gpu.errors import CorruptPage
from dpud.gpu.swap.blockfile import BLOCK_BYTES, BlockFile

HEADER_BYTES = 64
_HEADER = struct.Struct("<8sQQIIIIQQ")  # magic, key, generation, data bytes, codec, raw bytes, dictionary, checksums
_HEADER_CHECK = struct.Struct("<Q")
_RECORD_MAGIC = b"dpudSLOT"
_LABEL = struct.Struct("<8sIQQ")  # magic, version, blocks, salt
_LABEL_MAGIC = b"dpudSWAP"
VERSION = 1
_SCAN_BLOCKS = 1024


@dataclass(frozen=True, slots=True)
class Found:
    """A record met by `scan`; without a blob where its data are not whole."""

    at: int
    key: int
    generation: int
    blob: Blob | None


def record_bytes(nr_data: int) -> int:
    """Bytes of a file that a record takes."""
    return -(-(HEADER_BYTES + nr_data) // HEADER_BYTES) * HEADER_BYTES


def nr_blocks_of(nr_bytes: int) -> int:
    return -(-nr_bytes // BLOCK_BYTES)


def put_record(out: memoryview, at: int, key: int, generation: int, blob: Blob, salt: int) -> int:
    """Write a record into a buffer -> where it ends."""
    nr_data = len(blob.data)
    fields = (key, generation, nr_data, blob.codec, blob.raw_bytes, blob.dictionary, blob.checksum)
    header = _HEADER.pack(_RECORD_MAGIC, *fields, xxhash.xxh3_64_intdigest(blob.data))
    end = at + record_bytes(nr_data)
    out[at : at + HEADER_BYTES] = header + _HEADER_CHECK.pack(xxhash.xxh3_64_intdigest(header, salt))
    out[at + HEADER_BYTES : at + HEADER_BYTES + nr_data] = blob.data
    out[at + HEADER_BYTES + nr_data : end] = bytes(end - at - HEADER_BYTES - nr_data)
    return end


def get_record(view: memoryview, key: int, generation: int, salt: int) -> Blob:
    """The page that a record holds; its data are a copy. Raises CorruptPage where it is not that page, whole."""
    header = view[: _HEADER.size]
    if _HEADER_CHECK.unpack_from(view, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(header, salt):
        raise CorruptPage(key, "its slot has no header: torn or damaged")
    _, found_key, found, nr_data, codec, raw_bytes, dictionary, checksum, check = _HEADER.unpack(header)
    if (found_key, found) != (key, generation):
        raise CorruptPage(key, f"its slot holds generation {found} of page {found_key:#x}: the write never got there")
    data = bytes(view[HEADER_BYTES : HEADER_BYTES + nr_data])
    if len(data) != nr_data or xxhash.xxh3_64_intdigest(data) != check:
        raise CorruptPage(key, "its slot's data do not fit their checksum: torn or damaged")
    return Blob(data, codec, raw_bytes, checksum, dictionary)


def open_label(file: BlockFile) -> int:
    """The salt of a file; a file without a label gets one. Raises GpuError; CorruptPage(0) for another one's label."""
    label = bytes(file.read(0, _LABEL.size + _HEADER_CHECK.size))
    if not any(label):
        salt = int.from_bytes(os.urandom(8), "little")
        _write_label(file, salt)
        return salt
    magic, version, nr_blocks, salt = _LABEL.unpack_from(label)
    check = _HEADER_CHECK.unpack_from(label, _LABEL.size)[0]
    if magic != _LABEL_MAGIC or check != xxhash.xxh3_64_intdigest(label[: _LABEL.size]):
        raise CorruptPage(0, f"{file.name}: not a swap file, or its label is damaged")
    if version != VERSION or nr_blocks > file.nr_blocks:
        raise CorruptPage(0, f"{file.name}: version {version} with {nr_blocks} blocks")
    return int(salt)


def _write_label(file: BlockFile, salt: int) -> None:
    view = file.buffer(BLOCK_BYTES)
    label = _LABEL.pack(_LABEL_MAGIC, VERSION, file.nr_blocks, salt)
    whole = label + _HEADER_CHECK.pack(xxhash.xxh3_64_intdigest(label))
    view[:] = whole + bytes(BLOCK_BYTES - len(whole))
    file.write(0, view)


def scan(file: BlockFile, salt: int) -> Iterator[Found]:
    """Every record whose header is whole, in the order of the file. Raises GpuError."""
    for first in range(1, file.nr_blocks, _SCAN_BLOCKS):
        nr_bytes = min(_SCAN_BLOCKS, file.nr_blocks - first) * BLOCK_BYTES
        piece = bytes(file.read(first, nr_bytes))
        for at in _headers(piece):
            header = piece[at : at + HEADER_BYTES]
            if _HEADER_CHECK.unpack_from(header, _HEADER.size)[0] == xxhash.xxh3_64_intdigest(
                header[: _HEADER.size], salt
            ):
                yield _found(file, first * BLOCK_BYTES + at, header, salt)


def _headers(piece: bytes) -> Sequence[int]:
    words = np.frombuffer(piece, dtype="<u8")[:: HEADER_BYTES // 8]
    places: list[int] = (np.flatnonzero(words == int.from_bytes(_RECORD_MAGIC, "little")) * HEADER_BYTES).tolist()
    return places


def _found(file: BlockFile, at: int, header: bytes, salt: int) -> Found:
    _, key, generation, nr_data, *_ = _HEADER.unpack_from(header)
    first, skip = divmod(at, BLOCK_BYTES)
    end = min(skip + HEADER_BYTES + nr_data, (file.nr_blocks - first) * BLOCK_BYTES)
    try:
        blob = get_record(file.read(first, end)[skip:], key, generation, salt)
    except CorruptPage:
        return Found(at, key, generation, None)
    return Found(at, key, generation, blob)
