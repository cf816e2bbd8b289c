# SPDX-License-Identifier: GPL-2.0-only
"""Text traces of a real machine's page allocator: ftrace (`trace`, `trace_pipe`), `trace-cmd report`, `perf script`.

The events read are kmem:mm_page_alloc, mm_page_free and mm_page_alloc_extfrag, compaction:mm_compaction_migratepages,
and what the three programs say about events that they lost. All other lines are passed over: other events, headers,
call chains. A line that begins as one of these events and does not go on as one is an error that names file and line;
only the last line of a file may be cut off, as a recording that was killed leaves it.

Most lines are read by kernelsim/trace_scan.py; the reader here takes what that leaves: other orders of fields, decimal
page numbers (kernels before 5.14), allocations that failed, names that no kernel of today has. A file may be compressed
with zstd.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from dpud.errors import UserError
from kernelsim.gfp import gfp_names
from kernelsim.mmzone import MAX_PAGE_ORDER
from kernelsim.trace_scan import (
    ALLOC,
    EXTFRAG,
    FREE,
    LOST,
    MAX_MIGRATETYPE,
    MAX_PFN,
    MIGRATED,
    NOTHING,
    NR_GFP_TEXTS,
    UNREAD,
    Events,
    event_dtype,
    scan_lines,
)

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 10
MAX_WINDOW_BYTES = 128 << 20  # of a zstd frame
MAX_SECONDS = 1 << 33
BINARY = {
    b"PERFILE2": "a perf.data file: give the output of `perf script`",
    b"\x17\x08Dtracing": "a trace.dat file: give the output of `trace-cmd report`",
    b"\x1f\x8b": "a gzip file: give its content, as text or compressed with zstd",
    b"\xfd7zXZ": "an xz file: give its content, as text or compressed with zstd",
}
"""How files begin that people will try, and what to do with them."""

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BEFORE_NAME = r":\s+(?:\(\+\d+\)\s+)?(?:\d+\s+)?"
"""The end of the time; `trace-cmd report --ts-diff` has a difference after it, `perf script -F +period` a period."""
_EVENT = re.compile(
    r"(?:\[(\d{1,5})\](?:\s+[^\s\[\]]+)?|\b(\d{1,5})[.dDXb][^\s\[\]]{3,6})"  # the second with latency-format
    r"\s+(?:(\d{1,11})\.(\d{6}|\d{9})|(\d{1,15})us[ +!#*@$]?)"
    rf"{_BEFORE_NAME}(?:\w+:)?(mm_\w+)(?::[a-zA-Z]+)?:(?:\s+(.*))?",  # perf's modifiers may follow the name
    re.ASCII,
)
_STARTED = re.compile(_BEFORE_NAME + r"(?:kmem:)?mm_page_(?:alloc|free|alloc_extfrag)\b", re.ASCII)
_FIELD = re.compile(r"\b(\w+)=(\S*)", re.ASCII)  # \b: a word without `=` is not tried again from each of its letters
_LOST = re.compile(r"^CPU:? ?\d+:? \[?(?:LOST (\d{1,18}) EVENTS|(\d{1,18}) EVENTS DROPPED|EVENTS DROPPED)", re.ASCII)
_PERF_RECORD_LOST = "PERF_RECORD_LOST"
_PERF_LOST = re.compile(_PERF_RECORD_LOST + r"\w*\b.*?lost (\d{1,18})", re.ASCII)


class TraceError(UserError):
    """A trace that cannot be read; the text is one line that names the file, and the line where it can."""


class _BadLine(Exception):
    """What is wrong with one."""


@dataclass
class TraceNotes:
    """What else there is to say about a trace that was read."""

    nr_lines: int = 0
    nr_events: int = 0
    is_cut: bool = False
    """Its last line ended in the middle of an event."""
    nr_late: int = 0
    """Events that stand behind later ones."""
    unknown_gfp: set[str] = field(default_factory=set)
    """Names in gfp_flags that are not known here; they were passed over."""


class TraceReader:
    """Reads one file from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes = TraceNotes()
        self.nr_bytes = 0
        """Size of the file."""
        self.nr_bytes_read = 0
        self._hashes = np.zeros(NR_GFP_TEXTS, dtype=np.uint64)
        self._places = np.zeros((NR_GFP_TEXTS, 2), dtype=np.int64)
        self._masks = np.zeros(NR_GFP_TEXTS, dtype=np.uint32)
        self._nr_masks = 0
        self._latest_ns = 0

    def batches(self) -> Iterator[Events]:
        """The events in the order of the file, in arrays of some thousands. Raises TraceError."""
        try:
            with self.path.open("rb", buffering=0) as file:
                self.nr_bytes = self.path.stat().st_size
                for text in self._chunks(file):
                    events = self._read(text)
                    self.notes.nr_events += len(events)
                    self._count_late(events["time_ns"][events["kind"] != LOST])
                    if len(events):
                        yield events
        except zstandard.ZstdError as error:
            raise TraceError(f"{self.path}: broken zstd data ({error})") from None
        except OSError as error:
            raise TraceError(f"{self.path}: {error.strerror}") from None
        if not self.notes.nr_events:
            raise TraceError(
                f"{self.path}: no mm_page_alloc or mm_page_free event in {self.notes.nr_lines} lines: is it the text "
                "of ftrace, of `trace-cmd report` or of `perf script`?"
            )

    def _count_late(self, times_ns: NDArray[np.int64]) -> None:
        latest_ns = np.maximum.accumulate(np.append(self._latest_ns, times_ns))
        self.notes.nr_late += int(np.count_nonzero(times_ns < latest_ns[:-1]))
        self._latest_ns = int(latest_ns[-1])

    # Bytes.

    def _chunks(self, file: IO[bytes]) -> Iterator[bytes]:
        """The text in pieces of whole lines; the last may lack its newline."""
        rest = b""
        for chunk in self._content(file):
            end = chunk.rfind(b"\n") + 1
            if end:
                yield rest + chunk[:end]
                rest = b""
            rest += chunk[end:]
            if len(rest) > MAX_LINE_BYTES:
                raise TraceError(f"{self.path}:{self.notes.nr_lines + 1}: a line of more than {MAX_LINE_BYTES} bytes")
        if rest:
            yield rest

    def _content(self, file: IO[bytes]) -> Iterator[bytes]:
        magic = file.read(12)
        file.seek(0)
        for start, advice in BINARY.items():
            if magic.startswith(start):
                raise TraceError(f"{self.path}: {advice}")
        source: Any = file
        if magic.startswith(_ZSTD_MAGIC):
            unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
            source = unpacker.stream_reader(file, read_across_frames=True, closefd=False)
        while chunk := source.read(CHUNK_BYTES):
            if b"\0" in chunk:
                raise TraceError(f"{self.path}: not text")
            self.nr_bytes_read = file.tell()
            yield chunk

    # Lines.

    def _read(self, text: bytes) -> Events:
        """The events of some lines."""
        whole = text if text.endswith(b"\n") else text + b"\n"
        rows = np.zeros(whole.count(b"\n"), dtype=event_dtype).view(np.recarray)
        self._places[:, 0] = 0
        nr, _ = scan_lines(np.frombuffer(whole, dtype=np.uint8), rows, self._hashes, self._places)
        assert nr == len(rows)
        self._learn_masks(whole)
        read = rows["kind"] == ALLOC
        rows["gfp"][read] = self._masks[rows["gfp"][read]]
        for number in np.flatnonzero(rows["kind"] == UNREAD):
            self._read_row(whole, rows, int(number), is_last=len(whole) > len(text) and number == nr - 1)
        self.notes.nr_lines += nr
        return rows[rows["kind"] != NOTHING]

    def _learn_masks(self, text: bytes) -> None:
        """The masks behind gfp_flags texts that are new."""
        while self._nr_masks < NR_GFP_TEXTS and self._places[self._nr_masks, 1]:
            start, length = self._places[self._nr_masks].tolist()
            self._masks[self._nr_masks] = self._mask(text[start : start + length].decode("ascii", "replace"))
            self._nr_masks += 1

    def _read_row(self, text: bytes, rows: Events, number: int, is_last: bool) -> None:
        start, nr_bytes = int(rows["pfn"][number]), int(rows["nr"][number])
        line = text[start : start + nr_bytes].decode("utf-8", "replace")
        rows[number] = np.zeros((), dtype=event_dtype)
        try:
            event = self.read_line(line)
        except _BadLine as problem:
            if not is_last:
                raise TraceError(f"{self.path}:{self.notes.nr_lines + number + 1}: {problem}") from None
            self.notes.is_cut = True
            return
        if event is not None:
            rows[number] = event

    def read_line(self, line: str) -> tuple[int, ...] | None:
        """One line's event, as the fields of event_dtype; None if it is none. Raises _BadLine."""
        found = _EVENT.search(line)
        if found is None:
            if _STARTED.search(line):
                raise _BadLine("an event without a CPU in brackets or without a time in seconds")
            return self._lost(line)
        bracketed_cpu, bare_cpu, seconds, fraction, microseconds, name, text = found.groups()
        cpu = int(bracketed_cpu or bare_cpu)
        if microseconds:
            time_ns = int(microseconds) * 1000
        else:
            time_ns = int(seconds) * 1_000_000_000 + int(fraction) * 1000 ** (len(fraction) == 6)
        if time_ns >= (MAX_SECONDS + 1) * 1_000_000_000 or cpu >= 1 << 16:
            raise _BadLine(f"no such time or CPU: {time_ns // 1_000_000_000} s, [{cpu}]")
        head = time_ns, cpu
        reader = _READERS.get(name)
        return None if reader is None else reader(self, head, dict(_FIELD.findall(text or "")))

    def _lost(self, line: str) -> tuple[int, ...] | None:
        found = _LOST.search(line) or _PERF_LOST.match(line, max(line.find(_PERF_RECORD_LOST), 0))
        if found is None:
            return None
        nr = next((int(text) for text in found.groups() if text), 1)
        return 0, 0, nr, 0, 0, LOST, 0, 0

    def _alloc(self, head: tuple[int, int], fields: dict[str, str]) -> tuple[int, ...]:
        time_ns, cpu = head
        what = "mm_page_alloc"
        gfp = fields.get("gfp_flags")
        if not gfp:
            raise _BadLine(f"{what} without gfp_flags")
        migratetype = _number(fields, what, "migratetype", MAX_MIGRATETYPE)
        return time_ns, _pfn(fields, what), 0, self._mask(gfp), cpu, ALLOC, _order(fields, what), migratetype

    def _free(self, head: tuple[int, int], fields: dict[str, str]) -> tuple[int, ...]:
        time_ns, cpu = head
        pfn = _pfn(fields, "mm_page_free")
        if pfn < 0:
            raise _BadLine("mm_page_free of no page")
        return time_ns, pfn, 0, 0, cpu, FREE, _order(fields, "mm_page_free"), 0

    def _extfrag(self, head: tuple[int, int], fields: dict[str, str]) -> tuple[int, ...]:
        time_ns, cpu = head
        what = "mm_page_alloc_extfrag"
        order = _order(fields, what, "fallback_order")
        return time_ns, _pfn(fields, what), 0, 0, cpu, EXTFRAG, order, _number(fields, what, "alloc_migratetype", 99)

    def _migrated(self, head: tuple[int, int], fields: dict[str, str]) -> tuple[int, ...]:
        time_ns, cpu = head
        nr = _number(fields, "mm_compaction_migratepages", "nr_migrated", 1 << 40)
        return time_ns, 0, nr, 0, cpu, MIGRATED, 0, 0

    def _mask(self, text: str) -> int:
        """The known bits of a gfp_flags text."""
        mask = 0
        for word in text.split("|"):
            if word in gfp_names:
                mask |= gfp_names[word]
            elif re.fullmatch(r"0x[0-9a-f]{1,8}|[1-9][0-9]{0,8}", word):
                mask |= int(word, 0)
            elif word not in ("none", "0"):
                self.notes.unknown_gfp.add(word[:40])
        return mask


_READERS = {
    "mm_page_alloc": TraceReader._alloc,
    "mm_page_free": TraceReader._free,
    "mm_page_alloc_extfrag": TraceReader._extfrag,
    "mm_compaction_migratepages": TraceReader._migrated,
}


def _number(fields: dict[str, str], event: str, name: str, maximum: int) -> int:
    text = fields.get(name)
    if text is None:
        raise _BadLine(f"{event} without {name}")
    if not re.fullmatch(r"[0-9]{1,15}|0x[0-9a-f]{1,15}", text):
        raise _BadLine(f"{event}: {name} is not a number: {text[:40]!r}")
    value = int(text, 16 if text.startswith("0x") else 10)
    if value > maximum:
        raise _BadLine(f"{event}: {name}={text} is more than {maximum}")
    return value


def _order(fields: dict[str, str], event: str, name: str = "order") -> int:
    return _number(fields, event, name, MAX_PAGE_ORDER)


def _pfn(fields: dict[str, str], event: str) -> int:
    """-1 for no page: the kernel prints pfn 0 then, and a page that is null."""
    pfn = _number(fields, event, "pfn", MAX_PFN - 1)
    return -1 if pfn == 0 and fields.get("page", "").strip("0x()") in ("", "null", "nil") else pfn
