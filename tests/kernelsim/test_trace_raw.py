# SPDX-License-Identifier: GPL-2.0-only
"""Binary pages, read by the layout that `events/header_page`, `header_event` and each `format` file tell."""

import re
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelsim.ring_buffer import Record, Ring
from kernelsim.trace_events import (
    dpu_batch_complete,
    function,
    mm_compaction_end,
    mm_compaction_finished,
    mm_migrate_pages,
    print_,
)
from kernelsim.trace_raw import Symbols, take_page
from kernelsim.tracepoint import TraceEvent

SYMBOLS = Symbols(["outer", "inner"])


def entries(page: bytes) -> Iterator[tuple[int, bytes]]:
    """(time, data) of each record of a page, as kbuffer-parse.c of libtraceevent reads it."""
    time_ns, commit = struct.unpack_from("<QQ", page)
    at, end = 16, 16 + commit
    while at < end:
        (header,) = struct.unpack_from("<I", page, at)
        type_len, delta = header & 31, header >> 5
        at += 4
        if type_len == 30:
            (high,) = struct.unpack_from("<I", page, at)
            time_ns += high << 27 | delta
            at += 4
            continue
        length = 4 * type_len
        if type_len == 0:
            length = struct.unpack_from("<I", page, at)[0] - 4
            at += 4
        time_ns += delta
        yield time_ns, page[at : at + length]
        at += length


def decode(event: TraceEvent, data: bytes) -> dict[str, Any]:
    """A record by the event's `format` text alone."""
    values: dict[str, Any] = {}
    pattern = r"field:(.*?) (\w+)(\[\])?;\toffset:(\d+);\tsize:(\d+);\tsigned:(\d);"
    for type_name, name, _array, offset, size, signed in re.findall(pattern, event.format()):
        raw = data[int(offset) : int(offset) + int(size)]
        value: Any = int.from_bytes(raw, "little", signed=signed == "1")
        if type_name.startswith("__data_loc"):
            value = data[value & 0xFFFF :][: value >> 16].rstrip(b"\0").decode()
        elif type_name == "char":
            value = data[int(offset) :].partition(b"\0")[0].decode()
        values[name] = value
    return values


def page_of(*records: Record) -> bytes:
    ring = Ring(1 << 20)
    for record in records:
        ring.write(record, overwrite=True)
    return take_page(ring, SYMBOLS)


SAMPLES = [
    (mm_compaction_finished, (1, 2, -1, 4)),
    (mm_compaction_end, (1, 2, 3, 4, True, 5)),
    (mm_migrate_pages, (100, 4, 0, 0, 0, 0, 1, 0)),
    (dpu_batch_complete, (0x200000, 3, 4, 10**9, 10**10, "dpu_fault")),
    (print_, ("outer", "hello\n")),
    (print_, ("outer", "long " * 100)),
    (function, ("inner", "outer", 0)),
]


def test_every_kind_of_field_is_found_where_format_says() -> None:
    records = [Record(1000 + number, number, 42, 0, *sample) for number, sample in enumerate(SAMPLES)]
    found = list(entries(page_of(*records)))
    assert [time_ns for time_ns, _ in found] == [record.time_ns for record in records]
    for (event, values), (_, data) in zip(SAMPLES, found, strict=True):
        decoded = decode(event, data)
        assert (decoded["common_type"], decoded["common_pid"]) == (event.id, 42)
        for field, value in zip(event.fields, values, strict=True):
            if field.name != "args":
                known = SYMBOLS.address(value) if field.name in ("ip", "parent_ip") else value
                assert decoded[field.name] == known, field.name


def test_the_page_is_one_and_says_how_much_of_it_counts() -> None:
    page = page_of(Record(7, 1, 42, 0, *SAMPLES[0]))
    assert len(page) == 4096
    assert struct.unpack_from("<QQ", page) == (7, 4 + 8 + 16)
    assert page_of() == b""


@pytest.mark.slow
@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=40))
def test_times_of_any_distance(steps: list[int]) -> None:
    records, now = [], 0
    for number, step in enumerate(steps):
        now += step
        records.append(Record(now, number, 1, 0, *SAMPLES[number % 4]))
    assert [time_ns for time_ns, _ in entries(page_of(*records))] == [record.time_ns for record in records]


def test_what_does_not_fit_stays_for_the_next_page() -> None:
    ring = Ring(1 << 20)
    for number in range(500):
        ring.write(Record(number, number, 1, 0, *SAMPLES[0]), overwrite=True)
    times: list[int] = []
    while page := take_page(ring, SYMBOLS):
        times += [time_ns for time_ns, _ in entries(page)]
    assert times == list(range(500))
    assert ring.nr_read == 500
