# SPDX-License-Identifier: GPL-2.0-only
"""Lines of a text trace that are mm_page_alloc or mm_page_free events, found and read at memory speed.

Three programs print the same events in three dresses (columns of comm, CPU and time; the event's own text is that of
its print format, include/trace/events/kmem.h):

    comm-pid     [cpu] flags secs.usecs: mm_page_free: page=.. pfn=0x.. order=0         ftrace: trace, trace_pipe
    comm-pid   [cpu]  secs.usecs: mm_page_free:   page=.. pfn=0x.. order=0              trace-cmd report
    comm   pid [cpu]  secs.usecs:    kmem:mm_page_free: page=.. pfn=0x.. order=0        perf script

A comm may hold anything, brackets and colons included, so a line is read from its event's name outwards. This scanner
takes only what it knows to the last character; any other line is marked UNREAD, for a slower and more tolerant reader
(dpud/trace_text.py), which must agree with it on the lines that both read.

Each line gives one row, so that a row's number is its line's. The texts of gfp_flags are few and are told apart by
their FNV-1a hashes: a row has the number of its text, in the order in which they were first seen.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit, u64
from kernelsim.mmzone import MAX_PAGE_ORDER

NOTHING, ALLOC, FREE, EXTFRAG, MIGRATED, LOST, UNREAD = range(7)
"""Kinds of rows. EXTFRAG: mm_page_alloc_extfrag; MIGRATED: `nr` pages, by the real kernel's compaction; LOST: `nr`
events, 1 where their number is not known; UNREAD: line at byte `pfn`, `nr` bytes long."""

Events: TypeAlias = Any
"""Record array of `event_dtype`, [event]."""

event_dtype = np.dtype(
    [
        ("time_ns", np.int64),
        ("pfn", np.int64),  # -1: the real allocation failed
        ("nr", np.int64),
        ("gfp", np.uint32),  # GFP mask; from the scanner, the number of its text
        ("cpu", np.uint16),
        ("kind", np.uint8),
        ("order", np.uint8),  # of an EXTFRAG event the fallback order
        ("migratetype", np.uint8),
    ]
)

MAX_PFN = 1 << 40
MAX_MIGRATETYPE = 7
NR_GFP_TEXTS = 256

Text: TypeAlias = NDArray[np.uint8]

_NAME = np.frombuffer(b"mm_page_", dtype=np.uint8)
_ALLOC = np.frombuffer(b"alloc:", dtype=np.uint8)
_FREE = np.frombuffer(b"free:", dtype=np.uint8)
_SYSTEM = np.frombuffer(b"kmem:", dtype=np.uint8)
_PAGE = np.frombuffer(b"page=", dtype=np.uint8)
_PFN = np.frombuffer(b" pfn=", dtype=np.uint8)
_ORDER = np.frombuffer(b" order=", dtype=np.uint8)
_MIGRATETYPE = np.frombuffer(b" migratetype=", dtype=np.uint8)
_GFP = np.frombuffer(b" gfp_flags=", dtype=np.uint8)
_SPACE, _NEWLINE, _COLON, _DOT, _OPEN, _CLOSE, _ZERO, _NINE, _A, _F, _X = (ord(char) for char in " \n:.[]09afx")


@njit
def _looking_at(text: Text, at: int, end: int, word: Text) -> bool:
    if at < 0 or at + len(word) > end:
        return False
    for i in range(len(word)):
        if text[at + i] != word[i]:
            return False
    return True


@njit
def _digits(text: Text, at: int, end: int, base: int) -> tuple[int, int]:
    """(value, end) of a number of at most 15 digits; (-1, at) if there is none."""
    value = 0
    start = at
    while at < end and at - start < 16:
        char = text[at]
        digit = -1
        if _ZERO <= char <= _NINE:
            digit = char - _ZERO
        elif base == 16 and _A <= char <= _F:
            digit = char - _A + 10
        if digit < 0:
            break
        value = value * base + digit
        at += 1
    return (value, at) if 0 < at - start < 16 else (-1, start)


@njit
def _number(text: Text, at: int, end: int) -> tuple[int, int]:
    """A decimal number, or a hexadecimal one with 0x."""
    if at + 1 < end and text[at] == _ZERO and text[at + 1] == _X:
        return _digits(text, at + 2, end, 16)
    return _digits(text, at, end, 10)


@njit
def _field(text: Text, at: int, end: int, name: Text) -> tuple[int, int]:
    """(value, end) of ` name=number`; (-1, at) if that is not what comes next."""
    return _number(text, at + len(name), end) if _looking_at(text, at, end, name) else (-1, at)


@njit
def _find_name(text: Text, at: int, end: int) -> int:
    """Where the first `mm_page_` of a line begins that follows a space or a colon; -1: none."""
    while at + len(_NAME) <= end:
        if text[at] == _NAME[0] and _looking_at(text, at, end, _NAME):
            return at if text[at - 1] in (_SPACE, _COLON) else -1
        at += 1
    return -1


@njit
def _gfp_number(text: Text, at: int, end: int, hashes: NDArray[np.uint64], places: NDArray[np.int64]) -> int:
    """The number of a gfp_flags text; -1 if it is new and there is no more room. `places`: where each begins."""
    code = np.uint64(0xCBF29CE484222325)
    for i in range(at, end):
        code = (code ^ u64(text[i])) * np.uint64(0x100000001B3)
    for number in range(len(hashes)):
        if places[number, 1] == 0:
            hashes[number] = code
            places[number, 0] = at
            places[number, 1] = end - at
            return number
        if hashes[number] == code and places[number, 1] == end - at:
            return number
    return -1


@njit
def _read_head(text: Text, start: int, at: int, row: Events) -> bool:
    """CPU and time of a line whose event's name begins at `at`, read backwards."""
    if _looking_at(text, at - len(_SYSTEM), at, _SYSTEM):
        at -= len(_SYSTEM)
    while at > start and text[at - 1] == _SPACE:
        at -= 1
    at -= 1
    if at <= start or text[at] != _COLON:
        return False
    dot = at - 1
    while dot > start and _ZERO <= text[dot] <= _NINE:
        dot -= 1
    nr_decimals = at - dot - 1
    if text[dot] != _DOT or nr_decimals not in (6, 9):
        return False
    first = dot
    while first > start and _ZERO <= text[first - 1] <= _NINE:
        first -= 1
    seconds, stop = _digits(text, first, dot, 10)
    fraction, _ = _digits(text, dot + 1, at, 10)
    if stop != dot or seconds < 0 or seconds > 1 << 33:
        return False
    row.time_ns = seconds * 1_000_000_000 + (fraction if nr_decimals == 9 else fraction * 1000)
    return _read_cpu(text, start, first, row)


@njit
def _read_cpu(text: Text, start: int, at: int, row: Events) -> bool:
    """`[cpu]` before the time, with or without a word of flags between the two."""
    gap = at
    while at > start and text[at - 1] == _SPACE:
        at -= 1
    if at in (gap, start):
        return False
    if text[at - 1] != _CLOSE:
        while at > start and text[at - 1] not in (_SPACE, _OPEN, _CLOSE):
            at -= 1
        while at > start and text[at - 1] == _SPACE:
            at -= 1
    if at == start or text[at - 1] != _CLOSE:
        return False
    close = at - 1
    at = close
    while at > start and _ZERO <= text[at - 1] <= _NINE:
        at -= 1
    cpu, stop = _digits(text, at, close, 10)
    if stop != close or at == start or text[at - 1] != _OPEN or not 0 <= cpu < 1 << 16:
        return False
    row.cpu = cpu
    return True


@njit
def _read_block(text: Text, at: int, end: int, row: Events) -> int:
    """`page=... pfn=... order=...`, what both events begin with; returns where it ends, or -1."""
    while at < end and text[at] == _SPACE:
        at += 1
    if not _looking_at(text, at, end, _PAGE):
        return -1
    while at < end and text[at] != _SPACE:
        at += 1
    pfn, at = _field(text, at, end, _PFN)
    if not 0 < pfn < MAX_PFN:  # 0: no page was to be had, which the other reader looks into
        return -1
    order, at = _field(text, at, end, _ORDER)
    if not 0 <= order <= MAX_PAGE_ORDER:
        return -1
    row.pfn = pfn
    row.order = order
    return at


@njit
def _read_line(
    text: Text, start: int, end: int, row: Events, hashes: NDArray[np.uint64], places: NDArray[np.int64]
) -> int:
    """The kind of event of a line that was read into `row`, or UNREAD."""
    name = _find_name(text, start + 1, end)
    if name < 0 or not _read_head(text, start, name, row):
        return UNREAD
    at = name + len(_NAME)
    while end > at and text[end - 1] == _SPACE:
        end -= 1
    if _looking_at(text, at, end, _FREE):
        return FREE if _read_block(text, at + len(_FREE), end, row) == end else UNREAD
    if not _looking_at(text, at, end, _ALLOC):
        return UNREAD
    at = _read_block(text, at + len(_ALLOC), end, row)
    migratetype, at = _field(text, at, end, _MIGRATETYPE)
    if not 0 <= migratetype <= MAX_MIGRATETYPE or not _looking_at(text, at, end, _GFP):
        return UNREAD
    at += len(_GFP)
    for i in range(at, end):
        if text[i] <= _SPACE:
            return UNREAD
    gfp = _gfp_number(text, at, end, hashes, places) if end > at else -1
    if gfp < 0:
        return UNREAD
    row.migratetype = migratetype
    row.gfp = gfp
    return ALLOC


@njit
def scan_lines(text: Text, events: Events, hashes: NDArray[np.uint64], places: NDArray[np.int64]) -> tuple[int, int]:
    """Read the whole lines of `text` into cleared rows, one each -> (rows, bytes).

    `hashes` uint64[NR_GFP_TEXTS] is kept from call to call. `places` int64[NR_GFP_TEXTS, 2]: offset and length of each
    text where it was first seen, length 0 where there is none yet.
    """
    nr = 0
    start = 0
    while nr < len(events):
        end = start
        while end < len(text) and text[end] != _NEWLINE:
            end += 1
        if end == len(text):
            break
        kind = _read_line(text, start, end, events[nr], hashes, places)
        events[nr].kind = kind
        if kind == UNREAD:
            events[nr].pfn = start
            events[nr].nr = end - start
        nr += 1
        start = end + 1
    return nr, start
