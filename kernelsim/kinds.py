# SPDX-License-Identifier: GPL-2.0-only
"""Value kinds of pseudo-files: what a written text means and how a value is shown.

Theory of operation
    A kind is named for the kernel parser it stands for, so that a parser's quirk lives in one class.
    `parse` turns the bytes of one write(2) into a value and the number of bytes taken; `format` turns a
    value into the file's text. The same `Int` reads differently below /proc/sys and below /sys, as it does
    in Linux, so `parse` is told the `Flavour` of the file:

    sysctl      proc_dointvec_minmax (doulongvec where the range exceeds an int): space around the number,
                hex and octal by prefix, one minus sign; what follows the first number is left over, a short
                write
    all others  kstrto*: a C string holding just the number and at most one newline; base 10 in sysfs, else
                by prefix

    Every refusal is OSError(EINVAL), in both grammars and for every reason: the kernel's sysctl parsers fold
    -ERANGE into it. A kind also lists sample inputs, from which wiring tests are made: `legal` ones are taken
    in every flavour, `illegal` ones in none.
"""

import errno
import re
from abc import ABC, abstractmethod
from enum import Enum
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PAGE_SIZE = 4096
INT_MAX = 2**31 - 1
INT_MIN = -INT_MAX - 1
_SYSCTL_NUMBER_MAX_BYTES = 20  # proc_get_long() copies the number to a 22-byte buffer and refuses a full one


class Flavour(Enum):
    """Which kernel file system a pseudo-file stands in; follows from its path."""

    PROC = "procfs"
    SYSCTL = "sysctl"
    SYSFS = "sysfs"
    DEBUGFS = "debugfs"
    CONFIGFS = "configfs"
    DEV = "dev"

    @staticmethod
    def of(path: str) -> "Flavour":
        """The flavour of an absolute path below the mount point."""
        for prefix, flavour in _PREFIXES:
            if path == prefix or path.startswith(prefix + "/"):
                return flavour
        return Flavour.DEV


_PREFIXES = (
    ("/proc/sys", Flavour.SYSCTL),
    ("/proc", Flavour.PROC),
    ("/sys/kernel/debug", Flavour.DEBUGFS),
    ("/sys/kernel/tracing", Flavour.DEBUGFS),
    ("/sys/kernel/config", Flavour.CONFIGFS),
    ("/sys", Flavour.SYSFS),
)


def einval(why: str) -> OSError:
    """The error of every text or value that a file does not take."""
    return OSError(errno.EINVAL, why)


# What isspace() takes in the kernel's own ctype table: 9..13, space and the Latin-1 no-break space.
_SPACES = b"\t\n\v\f\r \xa0"
_SPACE = rb"[" + _SPACES + rb"]*"
_NUMBER = rb"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*"
_SYSCTL = re.compile(_SPACE + rb"(-?)(" + _NUMBER + rb")(?=[ \t\n]|\Z)" + _SPACE)
_KSTRTO = {0: re.compile(rb"([+-]?)(" + _NUMBER + rb")\n?"), 10: re.compile(rb"([+-]?)([0-9]+)\n?")}
_MEMPARSE = re.compile(rb"(" + _NUMBER + rb")([KMGTPE]?)\n?", re.IGNORECASE)
_KSTRTO_MAX_BYTES = 80  # more digits than this are out of every range; int() is quadratic in their number


def _magnitude(digits: bytes, base: int = 0) -> int:
    """Value of unsigned digits; base 0 goes by prefix as simple_strtoul() does (0x hexadecimal, 0 octal)."""
    if len(digits) > _KSTRTO_MAX_BYTES:
        raise einval("number too long")
    if base == 0:
        base = 16 if digits[:2].lower() == b"0x" else 8 if digits[:1] == b"0" else 10
    return int(digits, base)


def c_string(data: bytes) -> bytes:
    """What a store sees of the bytes written: the kernel ends them with NUL, so they end at the first one."""
    return data.partition(b"\0")[0]


def parse_sysctl(data: bytes, *, signed: bool) -> tuple[int, int]:
    """First number of a write to /proc/sys -> (value, bytes taken).

    Source: proc_get_long, __do_proc_dointvec.

    Only the first PAGE_SIZE - 1 bytes are looked at; what lies beyond them counts as taken.
    """
    window = data[: PAGE_SIZE - 1]
    match = _SYSCTL.match(window)
    if match is None:
        raise einval("not a number")
    sign, digits = match.groups()
    if len(sign) + len(digits) > _SYSCTL_NUMBER_MAX_BYTES:
        raise einval("number too long")
    if sign and not signed:
        raise einval("negative")
    value = _magnitude(digits)
    return -value if sign else value, len(data) - (len(window) - match.end())


def parse_kstrto(data: bytes, base: int, *, signed: bool) -> int:
    """The number that a whole write spells; `base` 10, or 0 for "by prefix". Source: kstrtoull, kstrtoll."""
    match = _KSTRTO[base].fullmatch(c_string(data))
    if match is None:
        raise einval("not a number")
    sign, digits = match.groups()
    if sign == b"-" and not signed:
        raise einval("negative")
    value = _magnitude(digits, base)
    return -value if sign == b"-" else value


class Kind(ABC, Generic[T]):
    """One kind of value. Kinds hold no value themselves, so one may serve many files."""

    consumed = False
    """Reading the file changes the machine."""

    @abstractmethod
    def parse(self, data: bytes, flavour: Flavour) -> tuple[T, int]:
        """Value of one write and how many of its bytes were taken. Raises OSError(EINVAL)."""

    def format(self, value: T) -> str | bytes:
        """The file's text for a value."""
        return f"{value}\n"

    def check(self, value: T) -> None:
        """Raises OSError(EINVAL) for a value outside the range."""

    @abstractmethod
    def describe(self) -> str:
        """The range in a few words, for documentation."""

    def legal(self) -> tuple[str, ...]:
        """Texts that every flavour takes."""
        return ()

    def illegal(self) -> tuple[str, ...]:
        """Texts that no flavour takes."""
        return ()


class Int(Kind[int]):
    """A whole number in [lo, hi]; shown in decimal."""

    def __init__(self, lo: int = 0, hi: int = INT_MAX) -> None:
        if lo > hi:
            raise ValueError(f"empty range {lo}..{hi}")
        self.lo = lo
        self.hi = hi

    def parse(self, data: bytes, flavour: Flavour) -> tuple[int, int]:
        if flavour is Flavour.SYSCTL:
            # Up to INT_MAX the handler is proc_dointvec_minmax, which takes "-0" whatever the range.
            value, nr_taken = parse_sysctl(data, signed=self.lo < 0 or self.hi <= INT_MAX)
        else:
            base = 10 if flavour is Flavour.SYSFS else 0
            value, nr_taken = parse_kstrto(data, base, signed=self.lo < 0), len(data)
        self.check(value)
        return value, nr_taken

    def check(self, value: int) -> None:
        if not self.lo <= value <= self.hi:
            raise einval(f"{value} is not in {self.lo}..{self.hi}")

    def describe(self) -> str:
        return f"{self.lo}..{self.hi}"

    def legal(self) -> tuple[str, ...]:
        middle = (self.lo + self.hi) // 2
        return f"{self.lo}\n", f"{self.hi}\n", str(middle)

    def illegal(self) -> tuple[str, ...]:
        beyond = (f"{self.lo - 1}\n", f"{self.hi + 1}\n", str(2**64))
        return *beyond, "\n", "abc\n", "-\n", "1.5\n", "1,2", "0x", "--1"


class PartialWrite(OSError):
    """A vector whose first numbers were good: EINVAL, and those are stored all the same (__do_proc_dointvec)."""

    def __init__(self, value: tuple[int, ...]) -> None:
        super().__init__(errno.EINVAL, "not a number")
        self.value = value


class Bool(Int):
    """0 or 1."""

    def __init__(self) -> None:
        super().__init__(0, 1)


class Size(Int):
    """A number of bytes, with an optional suffix K, M, G, T, P or E (powers of 1024). Source: memparse()."""

    def __init__(self, lo: int = 0, hi: int = 2**63 - 1) -> None:
        super().__init__(lo, hi)

    def parse(self, data: bytes, flavour: Flavour) -> tuple[int, int]:
        match = _MEMPARSE.fullmatch(c_string(data))
        if match is None:
            raise einval("not a size")
        digits, suffix = match.groups()
        value = _magnitude(digits) << 10 * (b" KMGTPE".index(suffix.upper()) if suffix else 0)
        self.check(value)
        return value, len(data)

    def describe(self) -> str:
        return f"{self.lo}..{self.hi} bytes, suffix K, M, G, T, P or E"

    def illegal(self) -> tuple[str, ...]:
        return f"{self.hi + 1}\n", "K\n", "1 K\n", "1KB\n", "-1\n", "abc\n", "\n", "1.5G\n"


class Choice(Kind[str]):
    """One of several words; shown as `always [madvise] never`. Source: transparent_hugepage/enabled."""

    def __init__(self, *names: str) -> None:
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"bad choice of names {names}")
        self.names = names

    def parse(self, data: bytes, flavour: Flavour) -> tuple[str, int]:
        word = c_string(data).decode("latin-1").removesuffix("\n")  # sysfs_streq()
        self.check(word)
        return word, len(data)

    def format(self, value: str) -> str:
        return " ".join(f"[{name}]" if name == value else name for name in self.names) + "\n"

    def check(self, value: str) -> None:
        if value not in self.names:
            raise einval(f"{value!r} is none of {', '.join(self.names)}")

    def describe(self) -> str:
        return " | ".join(self.names)

    def legal(self) -> tuple[str, ...]:
        return *self.names, self.names[0] + "\n"

    def illegal(self) -> tuple[str, ...]:
        return "\n", self.names[0] + "x\n", f" {self.names[0]}", f"{self.names[0]}\n\n"


class Word(Choice):
    """One of several words, shown as it is; taken with the newline that `echo` writes, and only so.

    Source: devkmsg_sysctl_set_loglvl(), which compares lengths with the newline in.
    """

    def parse(self, data: bytes, flavour: Flavour) -> tuple[str, int]:
        word, newline, rest = data.decode("latin-1").partition("\n")
        if not newline or rest:
            raise einval("not one line")
        self.check(word)
        return word, len(data)

    def format(self, value: str) -> str:
        return f"{value}\n"

    def legal(self) -> tuple[str, ...]:
        return tuple(f"{name}\n" for name in self.names)

    def illegal(self) -> tuple[str, ...]:
        return *super().illegal(), *self.names


class Text(Kind[str]):
    """Free text, or the table that a show hook makes. A write is handed on without its final newline."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[str, int]:
        return c_string(data).decode("utf-8", "surrogateescape").removesuffix("\n"), len(data)

    def format(self, value: str) -> str:
        return value if not value or value.endswith("\n") else value + "\n"

    def describe(self) -> str:
        return "text"

    def legal(self) -> tuple[str, ...]:
        return "word\n", "two words"


class Trigger(Text):
    """Any non-empty write, whatever its text, starts something. Source: compact_store(), mm/compaction.c."""

    def describe(self) -> str:
        return "any text"

    def legal(self) -> tuple[str, ...]:
        return "1\n", "0", "compact\n"


class IntVector(Kind[tuple[int, ...]]):
    """`nr` numbers of an int's range in one sysctl, with tabs between them. Source: __do_proc_dointvec().

    A write may give fewer; those it gives up to the first that is no number are taken. (Handlers that use this kind
    do not ask whether all of them were: lowmem_reserve_ratio_sysctl_handler.)
    """

    def __init__(self, nr: int) -> None:
        self.nr = nr

    def parse(self, data: bytes, flavour: Flavour) -> tuple[tuple[int, ...], int]:
        values: list[int] = []
        nr_taken = 0
        while len(values) < self.nr and nr_taken < len(data):
            try:
                value, nr_bytes = parse_sysctl(data[nr_taken:], signed=True)
            except OSError:
                return tuple(values), len(data) if not values else nr_taken
            if not -INT_MAX - 1 <= value <= INT_MAX:
                break
            values.append(value)
            nr_taken += nr_bytes
        return tuple(values), nr_taken

    def format(self, value: tuple[int, ...]) -> str:
        return "\t".join(map(str, value)) + "\n"

    def describe(self) -> str:
        return f"{self.nr} numbers"


class StrictVector(IntVector):
    """The same where the handler reports a bad number: EINVAL, after those before it were stored (PartialWrite)."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[tuple[int, ...], int]:
        window, at = data[: PAGE_SIZE - 1], 0
        values: list[int] = []
        while len(values) < self.nr and (values == [] or window[at:].strip(_SPACES)):
            try:
                value, nr_taken = parse_sysctl(window[at:], signed=True)
                if not INT_MIN <= value <= INT_MAX:
                    raise einval("not an int")
            except OSError as error:
                raise PartialWrite(tuple(values)) if values else error from None
            values.append(value)
            at += nr_taken
        return tuple(values), len(data) - (len(window) - at)

    def illegal(self) -> tuple[str, ...]:
        return "\n", "abc\n", "-\n", "1.5\n", "1,2", "0x", "--1", str(2**64)


class StreamOverrun(OSError):
    """A stream no longer has what was to be read; it goes on at `resume`. EPIPE, as /dev/kmsg says it.

    Whoever keeps the open file moves its view of the stream there: the reader's own offset does not change.
    """

    def __init__(self, resume: int) -> None:
        super().__init__(errno.EPIPE, "overwritten")
        self.resume = resume


class Stream(Kind[bytes]):
    """Records read one by one at the offsets where they begin (/dev/kmsg), or bytes consumed (trace_pipe)."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[bytes, int]:
        return data, len(data)

    def format(self, value: bytes) -> bytes:
        return value

    def describe(self) -> str:
        return "records"


class Entries(Stream):
    """Fixed-size binary records, one for each page, made for just the range that is read (/proc/kpageflags)."""

    def __init__(self, nr_bytes: int = 8) -> None:
        self.nr_bytes = nr_bytes

    def span(self, pos: int, size: int) -> tuple[int, int]:
        """(first record, how many) of a read(2). OSError(EINVAL) where it does not begin and end with a record."""
        if pos % self.nr_bytes or size % self.nr_bytes:
            raise einval("not a whole number of records")
        return pos // self.nr_bytes, size // self.nr_bytes

    def describe(self) -> str:
        return f"{8 * self.nr_bytes}-bit numbers"


class Bytes(Stream):
    """Bytes at offsets, up to a size: a block device, or a configfs binary attribute that is not buffered."""

    BLKSIZE = 128 << 10
    """st_blksize: what cp(1) and cmp(1) read and write at once. A request costs the same for a page as for 32."""

    def describe(self) -> str:
        return "bytes"


AnyKind = TypeVar("AnyKind", bound=Kind[Any])


def consumed(kind: AnyKind) -> AnyKind:
    """The kind of a file whose reading changes the machine: records go with it, pages come, averages are updated."""
    kind.consumed = True
    return kind
