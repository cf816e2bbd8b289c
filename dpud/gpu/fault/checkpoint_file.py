# SPDX-License-Identifier: MIT
"""A checkpoint's file: pages of one client as they were at one moment.

    head     8 bytes DPUDCKPT, length of the label (u32), the label (JSON), xxh3_64 of it
    records  region's index in the label (u32), page (u64), the blob's header (blob.py), its data
    end      0xffffffff, number of records (u64), xxh3_64 of all before

It is written under another name, made durable, and only then given its own, so that a file that has its name is whole;
the digest at its end finds what happened to it afterwards. Of a page that is in it twice, the later record counts.
A page that no record of a full checkpoint has reads as zeros.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import xxhash
from msgspec import Meta

from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.blob import HEADER_BYTES, Blob, pack_header, unpack_header
from dpud.gpu.errors import CorruptPage

MAGIC = b"DPUDCKPT"
_LENGTH, _DIGEST, _RECORD = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<IQ")
_NO_REGION = 0xFFFFFFFF
PAGE_SIZES = (2048, 4096, 65536, 2 << 20)
_TYPES = {kind.value for kind in RegionType}
Natural = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class RegionLabel:
    """What a region was like, for who has to make it again."""

    key: Natural
    """First key of its pages: in one chain, regions with the same key are the same."""
    nr_bytes: Annotated[int, Meta(ge=1, le=1 << 40)]
    page_bytes: int
    type: str
    device: Natural
    priority: Annotated[int, Meta(ge=0, le=100)]


@dataclass(frozen=True)
class Label:
    client: str
    sequence: int
    parent: int
    """Sequence number of the checkpoint that this one is an increment to; 0 for a full one."""
    parent_digest: int
    time_ns: int
    regions: tuple[RegionLabel, ...]

    @classmethod
    def decoded(cls, text: bytes) -> "Label":
        """Raises ValueError for what describes no checkpoint."""
        label = msgspec.json.decode(text, type=cls)
        if not 0 <= label.parent < label.sequence:
            raise ValueError(f"number {label.sequence} is an increment to {label.parent}")
        for each in label.regions:
            if each.type not in _TYPES or each.page_bytes not in PAGE_SIZES:
                raise ValueError(f"a region of type {each.type}, pages of {each.page_bytes} bytes")
        return label


class Writer:
    """Writes a file; `finish` or `abandon` it."""

    def __init__(self, path: Path, label: Label) -> None:
        self.path, self.label = path, label
        self._temporary = path.with_suffix(".tmp")
        self._file = self._temporary.open("wb")
        self._digest = xxhash.xxh3_64()
        self.nr_records = 0
        self.nr_bytes = 0
        text = json.dumps(asdict(label)).encode()
        self._write(MAGIC + _LENGTH.pack(len(text)) + text + _DIGEST.pack(xxhash.xxh3_64_intdigest(text)))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.nr_bytes += len(data)

    def add(self, region: int, page: int, blob: Blob) -> int:
        """A page -> where its blob begins in the file."""
        self._write(_RECORD.pack(region, page))
        at = self.nr_bytes
        self._write(pack_header(blob))
        self._write(blob.data)
        self.nr_records += 1
        return at

    def finish(self) -> int:
        """Make it durable -> its digest. Raises OSError."""
        self._write(_RECORD.pack(_NO_REGION, self.nr_records))
        digest = self._digest.intdigest()
        self._file.write(_DIGEST.pack(digest))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return digest

    def abandon(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def read_blob(path: Path, at: int) -> Blob:
    """What `Writer.add` put there. Raises OSError, CorruptPage where it is cut off."""
    with path.open("rb") as file:
        file.seek(at)
        nr_data, blob = unpack_header(file.read(HEADER_BYTES))
        left = os.fstat(file.fileno()).st_size - at - HEADER_BYTES
        data = file.read(min(nr_data, left))
    if len(data) != nr_data:
        raise CorruptPage(0, f"{path.name} is cut off")
    return Blob(data, blob.codec, blob.raw_bytes, blob.checksum, blob.dictionary)


@dataclass(frozen=True)
class Contents:
    label: Label
    digest: int
    places: dict[tuple[int, int], int]
    """(region's index, page) -> where its blob begins."""


def read(path: Path) -> Contents:
    """Check a whole file, and where its pages are. Raises OSError; CorruptPage where it was changed."""
    data = memoryview(path.read_bytes())
    try:
        return _parsed(path.name, data)
    except (struct.error, ValueError, RecursionError) as error:
        raise CorruptPage(0, f"{path.name} is no checkpoint: {error}") from error


def _parsed(name: str, data: memoryview) -> Contents:
    (digest,) = _DIGEST.unpack_from(data, len(data) - _DIGEST.size)
    if bytes(data[: len(MAGIC)]) != MAGIC or xxhash.xxh3_64_intdigest(data[: -_DIGEST.size]) != digest:
        raise CorruptPage(0, f"{name} is torn, or was changed")
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    start = len(MAGIC) + _LENGTH.size
    label = Label.decoded(bytes(data[start : start + length]))
    places = {(region, page): at for region, page, at in _records(data, start + length + _DIGEST.size)}
    if any(region >= len(label.regions) for region, _ in places):
        raise ValueError("a page of a region that its label does not have")
    return Contents(label, digest, places)


def _records(data: memoryview, at: int) -> Iterator[tuple[int, int, int]]:
    while True:
        region, page = _RECORD.unpack_from(data, at)
        if region == _NO_REGION:
            return
        at += _RECORD.size
        yield region, page, at
        nr_data, _ = unpack_header(data[at : at + HEADER_BYTES])
        at += HEADER_BYTES + nr_data
