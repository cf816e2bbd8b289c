# SPDX-License-Identifier: GPL-2.0-only
"""`dpud journal show DIR` and `dpud journal verify DIR`: a state directory's journal for people."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dpud.errors import UserError
from dpud.journal import End, Reader
from dpud.journal_turns import KINDS, STEP, Head, Row, Turn, decode_head, decode_turn
from dpud.state import JOURNAL
from fs import requests

_NR_FIRST = 2
"""Records that a journal is made with."""
_SHOWN_BYTES = 60
_HAVE_DATA = (requests.WRITE, requests.WRITE_STREAM)


def reader_of(directory: Path) -> Reader:
    """Of the journal in a state directory. Raises UserError."""
    try:
        return Reader(directory / JOURNAL)
    except OSError as error:
        raise UserError(f"{directory / JOURNAL}: {error.strerror}") from error


def lines(reader: Reader) -> Iterator[str]:
    """One a record: number, kind, operation, what it was, what it came to."""
    for number, (offset, payload) in enumerate(reader):
        try:
            record = decode_head(payload) if number == 0 else decode_turn(payload)
        except msgspec.DecodeError as error:
            yield f"{number} at offset {offset}: no record of this dpud: {error}"
        else:
            yield f"{number} {_line(record)}"


def _line(record: Head | Turn) -> str:
    if isinstance(record, Head):
        return f"format {record.format}, dpud {record.version}, {len(record.config)} keys"
    words = [KINDS[record.kind], str(record.number)]
    if isinstance(record.what, Row):
        words.append(_request(record.what))
    elif record.kind == STEP and record.what is not None:
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


def verdict(directory: Path, end: End) -> tuple[str, bool]:
    """What there is to say of a journal that was read to its end, and whether it is whole."""
    whole = f"{directory / JOURNAL}: {end.number} records, {end.offset} bytes"
    if end.problem is None:
        return f"{whole}, whole", True
    bad = f"record {end.number}, at offset {end.offset}: {end.problem}"
    if end.number < _NR_FIRST:
        return f"{whole} are whole. {bad}: it has no beginning", False
    if end.next_whole is None:
        return f"{whole} are whole. {bad}; nothing is behind it: the next start cuts it off", False
    return f"{whole} are whole. {bad}; whole records from offset {end.next_whole} on: see --recover", False
