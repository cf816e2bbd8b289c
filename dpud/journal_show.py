# SPDX-License-Identifier: GPL-2.0-only
"""`dpud journal show DIR` and `dpud journal verify DIR`: a state directory's journal for people."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dpud import checkpoint_file
from dpud.errors import UserError
from dpud.journal import End, Reader
from dpud.journal_turns import KINDS, STORES, Head, Row, Turn, decode_head, decode_turn
from dpud.state_segments import CHECKPOINT, JOURNAL, checkpoint_at, journal_at, numbers
from dpud.state_stores import FILE_NAME, Pending, read_pending
from fs import requests

_NR_FIRST = 2
"""Records that a journal is made with."""
_SHOWN_BYTES = 60
_HAVE_DATA = (requests.WRITE, requests.WRITE_STREAM)


def files_of(directory: Path) -> list[Path]:
    """The journals in a state directory, in order. Raises UserError where none is."""
    found = [journal_at(directory, number) for number in numbers(directory, JOURNAL)]
    if not found:
        raise UserError(f"{directory / JOURNAL}: {os.strerror(errno.ENOENT)}")
    return found


def reader_of(path: Path) -> Reader:
    """Of one of them. Raises UserError."""
    try:
        return Reader(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def lines(reader: Reader) -> Iterator[str]:
    """One a record: number, kind, operation, what it was, what it came to."""
    for number, (offset, payload) in enumerate(reader):
        try:
            record = decode_head(payload) if number == 0 else decode_turn(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            yield f"{number} at offset {offset}: no record of this dpud: {error}"
        else:
            yield f"{number} {_line(record)}"


def stored(directory: Path) -> Pending:
    """What a daemon that was killed had taken, and is in none of the journals. Raises UserError."""
    path, number = directory / FILE_NAME, 0
    for at, (_, payload) in enumerate(reader_of(files_of(directory)[-1])):  # its head says what is in those before
        number = _nr_stores(payload, is_head=at == 0, before=number)
    try:
        return read_pending(path, number) if path.exists() else Pending([])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def stored_lines(directory: Path) -> Iterator[str]:
    """The same for people."""
    found = stored(directory)
    for store in found.stores:
        yield f"in {FILE_NAME} only: {store.value} into the file with inode {store.nodeid}"


def _nr_stores(payload: bytes, is_head: bool, before: int) -> int:
    """How many there had been by the end of a record."""
    try:
        record = decode_head(payload) if is_head else decode_turn(payload)
    except (msgspec.DecodeError, RecursionError):
        return before
    if isinstance(record, Head):
        return record.nr_stores
    return record.number if record.kind == STORES else before


def _line(record: Head | Turn) -> str:
    if isinstance(record, Head):
        begin = f"checkpoint {record.segment}" if record.segment else "the boot"
        return f"format {record.format}, dpud {record.version}, {len(record.config)} keys, from {begin} on"
    words = [KINDS[record.kind], str(record.number)]
    if isinstance(record.what, dict):
        words.append(", ".join(f"{nr} of {number}" for number, nr in record.what.items()))
    elif isinstance(record.what, str):
        words.append(", ".join(f"{value} into {path}" for value, path in map(str.split, record.what.splitlines())))
    if isinstance(record.what, Row):
        words.append(_request(record.what))
    elif isinstance(record.what, int):
        words.append(f"at {record.what / 1e9:.6f}")
    words.append("..." if record.outcome is None else f"-> {record.outcome}")
    words.append(f"[{len(record.values)}]")
    return " ".join(words)


def _request(row: Row) -> str:
    """verb path, what belongs to it, and who asked."""
    words = [row.verb, os.fsdecode(row.path)]
    if row.verb in _HAVE_DATA:
        shown = repr(row.data[:_SHOWN_BYTES])[1:]
        words.append(shown if len(row.data) <= _SHOWN_BYTES else f"{shown}... {len(row.data)} bytes")
    numbers = {"pos": row.pos, "size": row.size, "flags": row.flags, "user": row.user, "pid": row.pid}
    words += [f"{name}={value}" for name, value in numbers.items() if value]
    return " ".join(words)


def verdict(path: Path, end: End, is_last: bool = True) -> tuple[str, bool]:
    """What there is to say of a journal that was read to its end, and whether it is whole."""
    whole = f"{path}: {end.number} records, {end.offset} bytes"
    if end.problem is None:
        return f"{whole}, whole", True
    bad = f"record {end.number}, at offset {end.offset}: {end.problem}"
    if end.number < _NR_FIRST:
        return f"{whole} are whole. {bad}: it has no beginning", False
    if end.next_whole is None and is_last:
        return f"{whole} are whole. {bad}; nothing is behind it: the next start cuts it off", False
    behind = "another journal goes on" if end.next_whole is None else f"whole records from offset {end.next_whole} on"
    return f"{whole} are whole. {bad}; {behind}: see --recover", False


def verdicts(directory: Path) -> Iterator[tuple[str, bool]]:
    """Of every journal and every checkpoint of a state directory."""
    for number in numbers(directory, CHECKPOINT):
        yield _verdict_of(checkpoint_at(directory, number))
    if problem := stored(directory).problem:
        yield f"{directory / FILE_NAME}: {problem}: see --recover", False
    journals = files_of(directory)
    for path in journals:
        reader = reader_of(path)
        for _ in reader:
            pass
        yield verdict(path, reader.end, path == journals[-1])


def _verdict_of(path: Path) -> tuple[str, bool]:
    try:
        head = checkpoint_file.check(path)
    except (checkpoint_file.Unusable, OSError) as error:
        return f"{path}: {error}: what was before it is used", False
    return f"{path}: {path.stat().st_size} bytes, {journal_at(path.parent, head.number).name} goes on, whole", True
