# SPDX-License-Identifier: GPL-2.0-only
"""A checkpoint as a file: records like a journal's (journal.py), so what is torn or flipped is known as such.

    head     for which machine it is, and the numbers that are in no object
    graph    what is in its objects (checkpoint_graph.py), in pieces
    bulk     bytes of a section at an offset; a later piece counts. What is in none reads as zeros
    file     a piece of a file that is kept beside: a client's checkpoint of the GPU side
    end      the number of records before it: without this one the file is not whole

Pieces are compressed where that makes them shorter.
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zstandard

from dpud.journal import HEADER_BYTES, Reader, frame

FORMAT = 1
HEAD, GRAPH, BULK, FILE, END = b"HGBFE"
_LEVEL = 1
_RAW, _ZSTD = 0, 1
_PLACE = struct.Struct("<IQB")  # section or length of a name, offset, how it is compressed
_GRAPH_BYTES = 1 << 20
MAX_PIECE_BYTES = 1 << 24
_encode = msgspec.msgpack.Encoder().encode


class Head(NamedTuple):
    """For which machine it is. `number`: of the journal that goes on from here."""

    format: int
    number: int
    version: str
    config: dict[str, Any]
    fingerprint: str
    """Of the objects that the boot makes (checkpoint_born.Born)."""
    nr_operations: int
    now_ns: int
    wall_ns: int
    trace_key: int
    folder: str = ""
    """Where the files beside are."""
    lasting: list[tuple[int, list[list[Any]]]] = []
    """Where each operation of the background stands (flights.Position)."""


_decode_head = msgspec.msgpack.Decoder(Head).decode


class Writer:
    """Appends records to a descriptor. Raises OSError."""

    def __init__(self, fd: int, nr_records: int = 0) -> None:
        self._fd = fd
        self.nr_records = nr_records
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._graph = bytearray()

    def head(self, head: Head) -> None:
        self._record(HEAD, _encode(head))

    def write(self, data: Any) -> int:
        """More of the graph; large arrays come as they lie in memory."""
        data = memoryview(data).tobytes("A")
        self._graph += data
        if len(self._graph) >= _GRAPH_BYTES:
            self.end_graph()
        return len(data)

    def end_graph(self) -> None:
        for begin in range(0, len(self._graph), MAX_PIECE_BYTES):
            self._piece(GRAPH, 0, begin, bytes(self._graph[begin : begin + MAX_PIECE_BYTES]))
        self._graph.clear()

    def bulk(self, section: int, offset: int, data: bytes) -> None:
        self._piece(BULK, section, offset, data)

    def file(self, name: str, offset: int, data: bytes) -> None:
        """A piece of a file beside; an empty one has one piece of nothing."""
        encoded = os.fsencode(name)
        self._piece(FILE, len(encoded), offset, data, encoded)

    def end(self) -> None:
        self._record(END, struct.pack("<Q", self.nr_records))

    def _piece(self, tag: int, section: int, offset: int, data: bytes, name: bytes = b"") -> None:
        packed = self._compressor.compress(data)
        how, body = (_ZSTD, packed) if len(packed) < len(data) else (_RAW, data)
        self._record(tag, _PLACE.pack(section, offset, how) + name + body)

    def _record(self, tag: int, body: bytes) -> None:
        left = memoryview(frame(self.nr_records, bytes((tag,)) + body))
        while left:
            left = left[os.write(self._fd, left) :]
        self.nr_records += 1


class Piece(NamedTuple):
    """A record of a file that was found whole."""

    tag: int
    section: int
    offset: int
    name: str
    data: bytes


class Unusable(Exception):
    """A file that is no whole checkpoint; its text says why."""


def check(path: Path) -> Head:
    """Look at all of a file. Raises Unusable, OSError."""
    reader, head, last, nr = Reader(path), None, b"", 0
    for _, payload in reader:
        if nr == 0:
            head = _head_of(payload)
        last, nr = payload[:HEADER_BYTES], nr + 1
    if reader.end.problem:
        raise Unusable(f"record {nr}, at offset {reader.end.offset}: {reader.end.problem}")
    if head is None or last[:1] != bytes((END,)) or last[1:] != struct.pack("<Q", nr - 1):
        raise Unusable(f"it was not written to its end: {nr} records are there")
    return head


def _head_of(payload: bytes) -> Head:
    if payload[:1] != bytes((HEAD,)):
        raise Unusable("it has no head")
    try:
        head = _decode_head(payload[1:])
    except (msgspec.DecodeError, RecursionError) as error:
        raise Unusable(f"its head: {error}") from None
    if head.format != FORMAT:
        raise Unusable(f"a checkpoint of format {head.format}, this dpud writes {FORMAT}")
    return head


def pieces_of(path: Path) -> Iterator[Piece]:
    """What is between head and end. Raises Unusable for records that no Writer makes, OSError."""
    decompress = zstandard.ZstdDecompressor().decompress
    for at, payload in Reader(path):
        if payload[:1] not in (bytes((HEAD,)), bytes((END,))):
            try:
                yield _piece_of(payload, decompress)
            except (struct.error, zstandard.ZstdError, ValueError) as error:
                raise Unusable(f"record at offset {at}: {error}") from None


def _piece_of(payload: bytes, decompress: Callable[..., bytes]) -> Piece:
    """Raises struct.error, ZstdError, ValueError. Never makes more than MAX_PIECE_BYTES."""
    if payload[:1] not in (bytes((tag,)) for tag in (GRAPH, BULK, FILE)):
        raise ValueError(f"there are no records of kind {payload[:1]!r}")
    tag = payload[0]
    section, offset, how = _PLACE.unpack_from(payload, 1)
    begin = 1 + _PLACE.size
    name = payload[begin : begin + section] if tag == FILE else b""
    if tag == FILE and (name in (b"", b".", b"..") or len(name) != section or b"/" in name or b"\0" in name):
        raise ValueError(f"{name!r} is no name of a file")
    data = payload[begin + len(name) :]
    if how == _ZSTD:
        if zstandard.frame_content_size(data) > MAX_PIECE_BYTES:
            raise ValueError("a piece is too large")
        data = decompress(data, max_output_size=MAX_PIECE_BYTES)
    return Piece(tag, section, offset, os.fsdecode(name), data)
