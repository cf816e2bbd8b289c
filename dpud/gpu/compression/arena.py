# SPDX-License-Identifier: MIT
"""Memory for encoded pages: logs of bytes in spans.

Theory of operation
    zsmalloc sorts objects into size classes, each with pages of its own; on the corpora of the benchmark that loses 3
    to 19 % to rounding and to pages that are partly filled. Here an object goes behind the last one, at any byte, so
    there is nothing to round. What objects leave behind when they are freed is dead until its span is cleaned: the
    objects that still live there are appended to the log again, and the span goes back to the host (Rumble et al.,
    "Log-structured memory for DRAM-based storage", FAST '14). The more of a span is dead, the less is copied for a
    byte, so the emptiest spans are cleaned first.

    A span is an anonymous mapping. Host pages it never touched are no memory, so the end of a span costs nothing before
    it is used. An object longer than a span gets a mapping of its own. One span that became empty is kept for the next
    need: in a full pool, where spans come and go, the host's page faults would cost as much as the coding.

Invariants
    - `nr_bytes` is the memory that the spans really hold: host pages touched, and the objects that describe them.
    - `live_bytes` are the objects' bytes; each span's `live` is its share. A span without any is given back at once,
      but for the open one and one spare.
"""

import mmap
import sys
from collections.abc import Iterator
from contextlib import suppress

SPAN_BYTES = 1 << 20
OFFSET_BITS = 32
_OFFSET_MASK = (1 << OFFSET_BITS) - 1


def _host_pages(nr_bytes: int) -> int:
    return -(-nr_bytes // mmap.PAGESIZE)


class Span:
    """One mapping: a log that is filled from its beginning."""

    __slots__ = ("end", "live", "memory", "size", "top")

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages needs no telling
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.size = size
        self.end = 0
        self.top = 0
        """Where `end` ever was."""
        self.live = 0

    @property
    def touched(self) -> int:
        return _host_pages(self.top) * mmap.PAGESIZE

    def append(self, data: bytes | memoryview) -> int:
        """-> host pages touched for it. Precondition: it fits."""
        begin, self.end = self.end, self.end + len(data)
        self.memory[begin : self.end] = data
        self.live += len(data)
        if self.end <= self.top:
            return 0
        before, self.top = _host_pages(self.top), self.end
        return _host_pages(self.end) - before

    def trim(self) -> int:
        """Give the host what lies behind the last object -> host pages."""
        before, kept = _host_pages(self.top), _host_pages(self.end)
        if before > kept:
            self.memory.madvise(mmap.MADV_DONTNEED, kept * mmap.PAGESIZE, (before - kept) * mmap.PAGESIZE)
            self.top = self.end
        return before - kept

    @property
    def dead(self) -> int:
        return self.end - self.live


_SPAN_OVERHEAD = sys.getsizeof(Span(mmap.PAGESIZE)) + sys.getsizeof(Span(mmap.PAGESIZE).memory) + 3 * 32


class Arena:
    """Objects by place: number of the span << OFFSET_BITS | offset."""

    def __init__(self, span_bytes: int = SPAN_BYTES) -> None:
        self._span_bytes = span_bytes
        self._spans: dict[int, Span] = {}
        self._open = -1
        self._spare: Span | None = None
        self._next = 0
        self._touched = 0
        self.live_bytes = 0
        self.dead_bytes = 0
        self.nr_returned = 0
        """Host pages given back by cleaning, ever."""

    @property
    def nr_bytes(self) -> int:
        nr_spans = len(self._spans) + (self._spare is not None)
        return self._touched + nr_spans * _SPAN_OVERHEAD + sys.getsizeof(self._spans)

    def bound(self, nr_bytes: int) -> int:
        """No more memory than this do objects of `nr_bytes` together need, were they put now."""
        nr_spans = nr_bytes // self._span_bytes + 2
        return nr_bytes + nr_spans * (mmap.PAGESIZE + _SPAN_OVERHEAD)

    def put(self, data: bytes | memoryview) -> int:
        """Append -> place."""
        nr_bytes = len(data)
        number = self._open
        if nr_bytes > self._span_bytes:
            number = self._add(Span(_host_pages(nr_bytes) * mmap.PAGESIZE))
        elif number < 0 or self._spans[number].end + nr_bytes > self._span_bytes:
            number = self._open_next()
        span = self._spans[number]
        offset = span.end
        self._touched += span.append(data) * mmap.PAGESIZE
        self.live_bytes += nr_bytes
        return number << OFFSET_BITS | offset

    def get(self, place: int, nr_bytes: int) -> bytes:
        offset = place & _OFFSET_MASK
        return self._spans[place >> OFFSET_BITS].memory[offset : offset + nr_bytes]

    def free(self, place: int, nr_bytes: int) -> None:
        number = place >> OFFSET_BITS
        span = self._spans[number]
        span.live -= nr_bytes
        self.live_bytes -= nr_bytes
        self.dead_bytes += nr_bytes
        if not span.live and number != self._open:
            self._give_back(number)

    def sparse(self, min_dead: float) -> Iterator[int]:
        """Numbers of the spans of which more than that share is dead, the emptiest first."""
        found = [
            (span.live / span.end, number) for number, span in self._spans.items() if span.dead > min_dead * span.end
        ]
        yield from (number for _, number in sorted(found))

    def close_open(self, number: int) -> bool:
        """Append nothing more to a span -> whether it still holds anything."""
        if number == self._open:
            self._open = -1
            if not self._spans[number].live:
                self._give_back(number)
        return number in self._spans

    def count_returned(self, before: int) -> None:
        """Cleaning began with `nr_bytes` at `before`."""
        self.nr_returned += max(before - self.nr_bytes, 0) // mmap.PAGESIZE

    def flip(self, place: int, bit: int) -> None:
        """Change one bit of an object, as a memory error would."""
        memory, at = self._spans[place >> OFFSET_BITS].memory, (place & _OFFSET_MASK) + bit // 8
        memory[at] ^= 1 << bit % 8

    def mappings(self) -> list[tuple[mmap.mmap, int]]:
        """Every span's mapping, and how much of it counts as memory."""
        spans = [*self._spans.values(), *([self._spare] if self._spare else [])]
        return [(span.memory, span.touched) for span in spans]

    @property
    def unused_bytes(self) -> int:
        """Host pages of the spare and behind the last object of the open span: most of what `give_back_spare` gives."""
        spare = self._spare.touched if self._spare is not None else 0
        last = self._spans.get(self._open)
        return spare + (last.touched - _host_pages(last.end) * mmap.PAGESIZE if last is not None else 0)

    def give_back_spare(self) -> None:
        """Keep nothing in reserve: no span, and no host page behind the last object of one."""
        for span in self._spans.values():
            self._touched -= span.trim() * mmap.PAGESIZE
        if self._spare is not None:
            self._unmap(self._spare)
            self._spare = None

    def _open_next(self) -> int:
        old, span = self._open, self._spare or Span(self._span_bytes)
        self._spare = None
        self._open = self._add(span)
        if old >= 0 and not self._spans[old].live:
            self._give_back(old)
        return self._open

    def _add(self, span: Span) -> int:
        number = self._next
        self._next += 1
        self._spans[number] = span
        return number

    def _give_back(self, number: int) -> None:
        span = self._spans.pop(number)
        self.dead_bytes -= span.dead
        if self._spare is None and span.size == self._span_bytes:
            span.end = 0
            self._spare = span
        else:
            self._unmap(span)

    def _unmap(self, span: Span) -> None:
        self._touched -= span.touched
        span.memory.close()
