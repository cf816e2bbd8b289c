# SPDX-License-Identifier: GPL-2.0-only
"""Trace events, each declared once: its fields with their C types, and how a record of it is printed.

From one declaration come the event's `format` file, the text of a record, its binary layout and what a filter may ask
for. An argument of the print format is the name of a field, or a `Symbolic`, `Flags` or `Expr`: something that has both
a C text, for the `format` file, and a value.

A record's values come as a tuple, in the order of the fields; a string field (`__data_loc char[]`) holds a str.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = tuple[Any, ...]
Arg = "str | Symbolic | Flags | Expr"

_TYPES: Mapping[str, tuple[int, bool]] = {
    "unsigned long": (8, False),
    "unsigned long long": (8, False),
    "long": (8, True),
    "u64": (8, False),
    "int": (4, True),
    "unsigned int": (4, False),
    "bool": (1, False),
    "unsigned short": (2, False),
    "unsigned char": (1, False),
    "enum zone_type": (4, False),
    "enum migrate_mode": (4, False),
    "__data_loc char[]": (4, False),
    "const char *": (8, False),
    # of the events of ftrace itself: an array that goes on to the end of the record
    "char[]": (0, False),
    "unsigned long[]": (0, False),
}
_CONVERSION = re.compile(r"%([-0]?)(\d*)(?:ll|l)?(ps|[dupxs])")
_PYTHON = {"d": "d", "u": "d", "x": "x", "s": "s", "ps": "s"}


@dataclass(frozen=True)
class Field:
    """One field of an event's record."""

    type: str
    name: str
    offset: int
    size: int
    signed: bool

    @property
    def is_string(self) -> bool:
        return self.type == "__data_loc char[]"

    def format(self) -> str:
        """Its line in the `format` file."""
        declaration = f"{self.type} {self.name}"
        if self.type in ("char[]", "unsigned long[]"):
            declaration = f"{self.type[:-2]} {self.name}[]"
        return f"\tfield:{declaration};\toffset:{self.offset};\tsize:{self.size};\tsigned:{int(self.signed)};\n"


def _layout(declarations: Iterable[str], offset: int) -> tuple[Field, ...]:
    """Fields one behind the other, each at a multiple of its size, as a C compiler lays out a struct."""
    fields = []
    for declaration in declarations:
        type_name, name = declaration.rsplit(" ", 1)
        size, signed = _TYPES[type_name]
        align = 8 if type_name == "unsigned long[]" else max(size, 1)
        offset = -(-offset // align) * align
        fields.append(Field(type_name, name, offset, size, signed))
        offset += size
    return tuple(fields)


COMMON_FIELDS = _layout(
    (
        "unsigned short common_type",
        "unsigned char common_flags",
        "unsigned char common_preempt_count",
        "int common_pid",
    ),
    0,
)
_COMMON_SIZE = 8


@dataclass(frozen=True)
class Symbolic:
    """A number shown by its name; as hexadecimal if it has none (__print_symbolic)."""

    field: str
    names: Sequence[tuple[int, str]]

    @property
    def c_text(self) -> str:
        pairs = ", ".join(f'{{{number}, "{name}"}}' for number, name in self.names)
        return f"__print_symbolic(REC->{self.field}, {pairs})"

    def value(self, values: Mapping[str, Any]) -> str:
        number = values[self.field]
        return next((name for known, name in self.names if known == number), f"{number:#x}")


@dataclass(frozen=True)
class Flags:
    """A mask shown as names joined by `|` (__print_flags), `none` for 0. `show` writes it as the kernel does."""

    field: str
    names: Mapping[str, int]
    show: Callable[[int], str]

    @property
    def c_text(self) -> str:
        pairs = ", ".join(f'{{{value:#x}UL, "{name}"}}' for name, value in self.names.items())
        return f'(REC->{self.field}) ? __print_flags(REC->{self.field}, "|", {pairs}) : "none"'

    def value(self, values: Mapping[str, Any]) -> str:
        return self.show(values[self.field])


@dataclass(frozen=True)
class Expr:
    """Anything else: its C text, and what it comes to."""

    c_text: str
    compute: Callable[..., Any]
    fields: tuple[str, ...]

    def value(self, values: Mapping[str, Any]) -> Any:
        return self.compute(*(values[name] for name in self.fields))


class TraceEvent:
    """One event of /sys/kernel/tracing/events.

    fields  C declarations, joined by `; `
    fmt     the printf format, and `args` what goes into it
    key     the bit of its static key if compiled loops record it (trace_key.py), else 0
    """

    def __init__(
        self, system: str, name: str, fields: str, fmt: str, *args: Any, key: int = 0, number: int = 0
    ) -> None:
        self.system = system
        self.name = name
        self.fmt = fmt
        self.args = args
        self.key = key
        self.id = number
        self.fields = _layout(fields.split("; "), _COMMON_SIZE)
        self.names = tuple(field.name for field in self.fields)
        self._texts = [at for at, field in enumerate(self.fields) if field.is_string or field.type == "char[]"]
        self._python_fmt = _CONVERSION.sub(_python_conversion, fmt)
        last = self.fields[-1]
        self.record_bytes = -(-(last.offset + last.size) // 4) * 4
        """Size of a record without the text of its strings."""

    def __repr__(self) -> str:
        return f"{self.system}:{self.name}"

    @property
    def path(self) -> str:
        return f"{self.system}/{self.name}"

    def nr_bytes(self, values: Values) -> int:
        """What a record takes in the ring buffer, the header of an event included (struct ring_buffer_event)."""
        if not self._texts:
            return 4 + self.record_bytes
        strings = sum(len(values[index]) + 1 for index in self._texts)
        return 4 + -(-(self.record_bytes + strings) // 4) * 4

    def text(self, values: Values) -> str:
        """The record as the trace shows it, without the event's name."""
        named = dict(zip(self.names, values, strict=True))
        return self._python_fmt % tuple(named[arg] if isinstance(arg, str) else arg.value(named) for arg in self.args)

    def print_fmt(self) -> str:
        """The last line of the `format` file."""
        return ", ".join([f'"{self.fmt}"', *(self._c_text(arg) for arg in self.args)])

    def _c_text(self, arg: Any) -> str:
        if not isinstance(arg, str):
            text: str = arg.c_text
            return text
        is_string = any(field.name == arg and field.is_string for field in self.fields)
        return f"__get_str({arg})" if is_string else f"REC->{arg}"

    def format(self) -> str:
        """The text of the `format` file."""
        common, own = ("".join(field.format() for field in fields) for fields in (COMMON_FIELDS, self.fields))
        return f"name: {self.name}\nID: {self.id}\nformat:\n{common}\n{own}\nprint fmt: {self.print_fmt()}\n"


def _python_conversion(match: re.Match[str]) -> str:
    """A conversion of printf as Python has it; %p is a whole address, as with the option nohash-ptr."""
    flag, width, letter = match.groups()
    return "%016x" if letter == "p" else f"%{flag}{width}{_PYTHON[letter]}"
