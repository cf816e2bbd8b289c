# SPDX-License-Identifier: GPL-2.0-only
"""The trace ring: room, order, counts; against a list that forgets from the front."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelsim.ring_buffer import Record, Ring, RingBuffer, seconds
from kernelsim.trace_events import dpu_compact_begin, mm_compaction_kcompactd_sleep, mm_page_free

BYTES = mm_page_free.nr_bytes((1, 0))


def record(number: int, cpu: int = 0, time_ns: int | None = None) -> Record:
    return Record(number if time_ns is None else time_ns, number, 7, cpu, mm_page_free, (number, 0))


def test_a_record_takes_what_the_kernels_binary_one_takes() -> None:
    """Header of 4 bytes, common fields of 8, then the fields, in units of 4; a string with its final NUL."""
    assert mm_page_free.nr_bytes((1, 0)) == 4 + 8 + 8 + 4
    assert mm_compaction_kcompactd_sleep.nr_bytes((0,)) == 4 + 8 + 4
    assert dpu_compact_begin.nr_bytes((0, 1, 9, "cpu")) == 4 + 8 + 4 * 4 + 4


def test_the_oldest_make_room() -> None:
    ring = Ring(3 * BYTES)
    for number in range(5):
        ring.write(record(number), overwrite=True)
    assert [entry.sequence for entry in ring.records] == [2, 3, 4]
    assert (ring.overrun, ring.dropped, ring.nr_written) == (2, 0, 5)


def test_without_overwrite_the_newest_is_dropped() -> None:
    ring = Ring(3 * BYTES)
    for number in range(5):
        ring.write(record(number), overwrite=False)
    assert [entry.sequence for entry in ring.records] == [0, 1, 2]
    assert (ring.overrun, ring.dropped, ring.nr_written) == (0, 2, 3)


@given(st.lists(st.integers(0, 2)), st.integers(1, 6))
@pytest.mark.slow
def test_what_is_read_is_what_was_written(actions: list[int], room: int) -> None:
    """0 and 1 write, 2 consumes."""
    ring, model, written = Ring(room * BYTES), [], 0
    for action in actions:
        if action < 2:
            ring.write(record(written), overwrite=True)
            model = [*model, written][-room:]
            written += 1
        elif model:
            assert ring.consume().sequence == model.pop(0)
    assert [entry.sequence for entry in ring.records] == model
    assert ring.nr_bytes == len(model) * BYTES
    assert ring.overrun + ring.nr_read + len(model) == written


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=30))
def test_cpus_are_merged_by_time(entries: list[tuple[int, int]]) -> None:
    """Each CPU's ring is in order; so is the whole, and those of one time in the order of writing."""
    buffer = RingBuffer(3, 1 << 20)
    now = 0
    for number, (cpu, step) in enumerate(entries):
        now += step
        buffer.rings[cpu].write(record(number, cpu, now), overwrite=True)
    assert [entry.sequence for entry in buffer.snapshot()] == list(range(len(entries)))
    popped = []
    while (entry := buffer.pop()) is not None:
        popped.append(entry.sequence)
    assert popped == list(range(len(entries)))


def test_times_are_written_as_the_kernel_does() -> None:
    assert seconds(818_774_190_999) == "  818.774190"
    assert seconds(123_456_000_001_000) == "123456.000001"


def test_stats_have_the_kernels_lines() -> None:
    ring = Ring(1 << 10)
    ring.write(record(1, time_ns=2_000_000), overwrite=True)
    assert ring.stats(3_000_000_000) == (
        "entries: 1\noverrun: 0\ncommit overrun: 0\n"
        f"bytes: {BYTES}\noldest event ts:     0.002000\nnow ts:     3.000000\ndropped events: 0\nread events: 0\n"
    )
