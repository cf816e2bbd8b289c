# SPDX-License-Identifier: GPL-2.0-only
"""The trace ring buffer: one ring of records for each CPU (kernel/trace/ring_buffer.c).

A ring holds
as many bytes of records as it was given, counted as the kernel's binary records would count (tracepoint.nr_bytes).
When it is full, the oldest records make room (`overrun`), or, in the mode without `overwrite`, the new one is dropped.

Readers either look (`snapshot`) or consume (`pop`), the oldest record of all CPUs first.

Differences from Linux: the oldest record goes, not the oldest page of records; there is no page reader, so a consumed
record is gone at once.
"""

from collections import deque
from collections.abc import Iterable
from heapq import merge
from typing import NamedTuple

from kernelsim.tracepoint import TraceEvent, Values


class Record(NamedTuple):
    """One entry. `sequence` orders entries of one time."""

    time_ns: int
    sequence: int
    pid: int
    cpu: int
    event: TraceEvent
    values: Values


class Ring:
    """The records of one CPU."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.records: deque[Record] = deque()
        self.nr_bytes = 0
        self.overrun = 0
        self.dropped = 0
        self.nr_read = 0

    def write(self, record: Record, overwrite: bool) -> None:
        """Append a record; make room, or count it as dropped."""
        nr_bytes = record.event.nr_bytes(record.values)
        if not overwrite and self.nr_bytes + nr_bytes > self.size_bytes:
            self.dropped += 1
            return
        self.records.append(record)
        self.nr_bytes += nr_bytes
        self._make_room()

    def _make_room(self) -> None:
        while self.nr_bytes > self.size_bytes and len(self.records) > 1:
            self._take()
            self.overrun += 1

    def _take(self) -> Record:
        record = self.records.popleft()
        self.nr_bytes -= record.event.nr_bytes(record.values)
        return record

    def consume(self) -> Record:
        """Take the oldest record out."""
        self.nr_read += 1
        return self._take()

    def resize(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._make_room()

    def reset(self) -> None:
        """Empty it, counters included."""
        self.records.clear()
        self.nr_bytes = self.overrun = self.dropped = self.nr_read = 0

    @property
    def nr_written(self) -> int:
        """Records that are, or once were, in it and not yet read."""
        return len(self.records) + self.overrun

    def stats(self, now_ns: int) -> str:
        """The text of per_cpu/cpuN/stats."""
        oldest_ns = self.records[0].time_ns if self.records else 0
        return (
            f"entries: {len(self.records)}\n"
            f"overrun: {self.overrun}\n"
            "commit overrun: 0\n"
            f"bytes: {self.nr_bytes}\n"
            f"oldest event ts: {seconds(oldest_ns)}\n"
            f"now ts: {seconds(now_ns)}\n"
            f"dropped events: {self.dropped}\n"
            f"read events: {self.nr_read}\n"
        )


class RingBuffer:
    """All rings of one trace."""

    def __init__(self, nr_cpus: int, size_bytes: int) -> None:
        self.rings = [Ring(size_bytes) for _ in range(nr_cpus)]

    def select(self, cpu: int | None) -> list[Ring]:
        """One CPU's ring, or all."""
        return self.rings if cpu is None else [self.rings[cpu]]

    def snapshot(self, cpu: int | None = None) -> Iterable[Record]:
        """Records in order of time, without taking them out; not to be used after the next write."""
        rings = self.select(cpu)
        return rings[0].records if len(rings) == 1 else merge(*(ring.records for ring in rings), key=_order)

    def peek(self, cpu: int | None = None) -> Record | None:
        """The oldest record."""
        heads = [ring.records[0] for ring in self.select(cpu) if ring.records]
        return min(heads, key=_order, default=None)

    def pop(self, cpu: int | None = None) -> Record | None:
        """Take the oldest record out."""
        record = self.peek(cpu)
        return None if record is None else self.rings[record.cpu].consume()

    def nr_entries(self, cpu: int | None = None) -> int:
        return sum(len(ring.records) for ring in self.select(cpu))

    def nr_written(self, cpu: int | None = None) -> int:
        return sum(ring.nr_written for ring in self.select(cpu))

    def reset(self, cpu: int | None = None) -> None:
        for ring in self.select(cpu):
            ring.reset()


def _order(record: Record) -> tuple[int, int]:
    return record[:2]


def seconds(time_ns: int) -> str:
    """`%5llu.%06lu`: seconds with microseconds, as every timestamp of a trace is written."""
    microseconds = time_ns // 1000
    return f"{microseconds // 1000000:5}.{microseconds % 1000000:06}"
