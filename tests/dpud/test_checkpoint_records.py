# SPDX-License-Identifier: GPL-2.0-only
"""Records with good checksums that no dpud wrote: known before anything of them is put anywhere."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from dpud.checkpoint_file import BULK, FILE, FORMAT, MAX_PIECE_BYTES, Head, Unusable, Writer, check, pieces_of
from dpud.journal import frame

HEAD = Head(FORMAT, 1, "build", {}, "f" * 32, 5, 1, 2, 0)


def made(path: Path, write: Callable[[Writer], object]) -> Path:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    writer = Writer(fd)
    writer.head(HEAD)
    write(writer)
    writer.end()
    os.close(fd)
    return path


def with_record(path: Path, body: bytes) -> Path:
    """A whole checkpoint with this between its head and its end."""

    def write(writer: Writer) -> None:
        os.write(writer._fd, frame(writer.nr_records, body))
        writer.nr_records += 1

    return made(path, write)


def test_pieces_come_back_as_they_were_written(tmp_path: Path) -> None:
    def write(writer: Writer) -> None:
        writer.write(b"graph")
        writer.end_graph()
        writer.bulk(3, 8192, bytes(5000))
        writer.file("ann.ckpt", 0, b"")

    path = made(tmp_path / "c", write)
    assert check(path) == HEAD
    found = [(chr(piece.tag), piece.section, piece.offset, piece.name, piece.data) for piece in pieces_of(path)]
    assert [(piece[0], piece[4]) for piece in found] == [("G", b"graph"), ("B", bytes(5000)), ("F", b"")]
    assert found[1][1:3] == (3, 8192)
    assert found[2][3] == "ann.ckpt"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "."])
def test_no_file_is_put_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    path = made(tmp_path / "c", lambda writer: writer.file(name, 0, b"of somebody else"))
    check(path)
    with pytest.raises(Unusable, match="is no name of a file"):
        list(pieces_of(path))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "no records of kind"),
        (b"X" + bytes(20), "no records of kind"),
        (b"B", "requires a buffer"),
        (bytes((BULK,)) + struct.pack("<IQB", 0, 0, 1) + b"no zstd", "ontent size|frame"),
        (bytes((FILE,)) + struct.pack("<IQB", 1 << 31, 0, 0) + b"short", "is no name of a file"),
    ],
)
def test_records_that_make_no_sense_are_named(tmp_path: Path, body: bytes, why: str) -> None:
    path = with_record(tmp_path / "c", body)
    check(path)
    with pytest.raises(Unusable, match=why):
        list(pieces_of(path))


def test_a_piece_that_grows_without_end_is_not_unpacked(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(MAX_PIECE_BYTES + 1))
    path = with_record(tmp_path / "c", bytes((BULK,)) + struct.pack("<IQB", 0, 0, 1) + bomb)
    with pytest.raises(Unusable, match="too large"):
        list(pieces_of(path))
