# SPDX-License-Identifier: GPL-2.0-only
"""Records as the kernel's binary pages: what per_cpu/cpuN/trace_pipe_raw gives (kernel/trace/ring_buffer.c).

A page is 4096 bytes: the time of its first record (u64), how many bytes of records follow (u64), and the records. A
record has a header of 4 bytes, its length in words in the low 5 bits (0: in a word of its own) and above them the time
since the one before; then the common fields, its own, and the text of its strings. A longer time than 27 bits can hold
stands before it in an entry of its own. `events/header_page`, `events/header_event` and each event's `format` say the
same; trace-cmd reads it by them.

Functions are numbers here, as in a kernel: addresses in the order of kallsyms (Symbols).
"""

import struct
from collections.abc import Iterable

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.ring_buffer import Record, Ring
from kernelsim.tracepoint import COMMON_FIELDS, Field

PAGE_BYTES = 4096
_HEADER_BYTES = 16
_DELTA_BITS = 27
_MAX_SMALL_BYTES = 28 * 4
_TIME_EXTEND = 30
_FIRST_ADDRESS = 0xFFFFFFFFC0000000
_FUNCTION_BYTES = 0x40
_FIELDS = {(1, False): "B", (2, False): "H", (4, False): "I", (4, True): "i", (8, False): "Q", (8, True): "q"}


class Symbols(Kobject):
    """Addresses for the functions there are, given in turn; nothing is at them."""

    kallsyms = Attr(
        Text(), mode=0o444, doc="Functions that a trace may name, and the numbers that stand for them in it."
    )

    def __init__(self, names: Iterable[str]) -> None:
        self._addresses = {name: _FIRST_ADDRESS + number * _FUNCTION_BYTES for number, name in enumerate(names)}

    def address(self, name: str) -> int:
        """0 for a function that is not known."""
        return self._addresses.get(name, 0)

    @kallsyms.show
    def _show(self) -> str:
        return "".join(f"{address:016x} t {name}\n" for name, address in self._addresses.items())


def _field(field: Field, value: object, symbols: Symbols, strings_at: int) -> tuple[bytes, bytes]:
    """(a field's bytes, the text that it points to)."""
    if field.type == "char[]":
        return str(value).encode("utf-8", "surrogateescape") + b"\0", b""
    if field.size == 0:
        return b"", b""
    if field.is_string:
        text = str(value).encode("utf-8", "surrogateescape") + b"\0"
        return struct.pack("<I", len(text) << 16 | strings_at), text
    number = symbols.address(value) if isinstance(value, str) else int(value)  # type: ignore[call-overload]
    code = _FIELDS[field.size, field.signed]
    return struct.pack(f"<{code}", number if field.signed else number & ((1 << 8 * field.size) - 1)), b""


def record_data(record: Record, symbols: Symbols) -> bytes:
    """A record's fields, padded to whole words."""
    event = record.event
    data = bytearray(struct.pack("<HBBi", event.id, 0, 0, record.pid))
    assert len(data) == COMMON_FIELDS[-1].offset + COMMON_FIELDS[-1].size
    texts = b""
    for field, value in zip(event.fields, record.values, strict=True):
        data += bytes(field.offset - len(data))
        own, text = _field(field, value, symbols, event.record_bytes + len(texts))
        data += own
        texts += text
    if texts:
        data += bytes(event.record_bytes - len(data)) + texts
    return bytes(data) + bytes(-len(data) % 4)


def _entry(data: bytes, delta_ns: int) -> bytes:
    """A record with its header, and before it a time entry if it needs one."""
    extend = b""
    if delta_ns >> _DELTA_BITS:
        low = delta_ns & ((1 << _DELTA_BITS) - 1)
        extend = struct.pack("<II", _TIME_EXTEND | low << 5, delta_ns >> _DELTA_BITS)
        delta_ns = 0
    if len(data) > _MAX_SMALL_BYTES:
        return extend + struct.pack("<II", delta_ns << 5, len(data) + 4) + data
    return extend + struct.pack("<I", len(data) // 4 | delta_ns << 5) + data


def take_page(ring: Ring, symbols: Symbols) -> bytes:
    """Consume as many records as fit a page; b"" if there is none."""
    if not ring.records:
        return b""
    first_ns = last_ns = ring.records[0].time_ns
    body = b""
    while ring.records:
        record = ring.records[0]
        entry = _entry(record_data(record, symbols), record.time_ns - last_ns)
        if len(body) + len(entry) > PAGE_BYTES - _HEADER_BYTES:
            break
        last_ns = record.time_ns
        body += entry
        ring.consume()
    page = struct.pack("<QQ", first_ns, len(body)) + body
    return page + bytes(PAGE_BYTES - len(page))
