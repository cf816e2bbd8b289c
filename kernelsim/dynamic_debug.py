# SPDX-License-Identifier: GPL-2.0-only
"""pr_debug() sites, and dynamic_debug/control, which switches them (lib/dynamic_debug.c).

A site is a call `vm.pr_debug("format\\n", args)` in a method. Sites are found, as the kernel finds those that its
compiler put into a section, in what was compiled: `add` looks through the code of the methods of an object's class. A
site's function is the kernel function that the method stands for (ftrace.traced), its file the C file whose job the
module does, its line that of the call in this source. No two sites may have one format, because that is what a call is
known by. A site that is off costs a look into a dict.

Commands, apart by `;` or newline, are match words and one word of flags: `file dpu_compact.c line 300-400 +pf`. All
commands of a write are run; the last error is what the write returns.
"""

from __future__ import annotations

import dis
import errno
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import CodeType, FunctionType
from typing import Any

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.glob import Glob
from kernelsim.trace_hook import FTRACE_NAME

FLAGS = "pmfslt"
"""In the order in which they are shown: print, module, function, file, line, thread id."""
_MAX_WORDS = 9
_MAX_WRITE_BYTES = 4095
_CALL = "pr_debug"
_SPEC = ("func", "file", "module", "format", "line", "class")


@dataclass(eq=False)
class Site:
    """One pr_debug() (struct _ddebug)."""

    filename: str
    lineno: int
    modname: str
    function: str
    format: str
    flags: str = ""

    def line(self) -> str:
        """Its line in the control file."""
        text = self.format
        for raw, shown in (("\t", "\\t"), ("\r", "\\r"), ("\n", "\\n")):
            text = text.replace(raw, shown)
        return f'{self.filename}:{self.lineno} [{self.modname}]{self.function} ={self.flags or "_"} "{text}"\n'

    def prefix(self, pid: int) -> str:
        """What its messages begin with (__dynamic_emit_prefix)."""
        parts = (("m", self.modname), ("f", self.function), ("s", self.filename), ("l", str(self.lineno)))
        text = "".join(f"{value}:" for flag, value in parts if flag in self.flags)
        return (f"[{pid}] " if "t" in self.flags else "") + (f"{text} " if text else "")


@dataclass(frozen=True)
class Query:
    """The match words of one command; None matches everything."""

    func: str | None = None
    file: str | None = None
    module: str | None = None
    format: str | None = None
    lines: tuple[int, int] | None = None
    in_class: bool = False

    def matches(self, site: Site) -> bool:
        if self.in_class:
            return False  # no site here has a class
        module, file, func = self._globs
        return (
            module.matches(site.modname)
            and any(file.matches(name) for name in _names_of(site.filename))
            and func.matches(site.function)
            and self._format_matches(site.format)
            and (self.lines is None or self.lines[0] <= site.lineno <= self.lines[1])
        )

    @cached_property
    def _globs(self) -> tuple[Glob, Glob, Glob]:
        module, file, func = (Glob("*" if word is None else word) for word in (self.module, self.file, self.func))
        return module, file, func

    def _format_matches(self, text: str) -> bool:
        if self.format is None:
            return True
        return text.startswith(self.format[1:]) if self.format.startswith("^") else self.format in text


def _names_of(path: str) -> tuple[str, str]:
    """A file may be named whole or by its last part."""
    return path, path.rpartition("/")[2]


class DynamicDebug:
    """All sites of one machine; calling it is pr_debug()."""

    def __init__(
        self, emit: Callable[[str], object] = lambda text: None, get_pid: Callable[[], int] = lambda: 0
    ) -> None:
        self._emit = emit
        self._get_pid = get_pid
        self.sites: dict[str, Site] = {}

    def __call__(self, fmt: str, *args: Any) -> None:
        site = self.sites.get(fmt)
        if site is not None and "p" in site.flags:
            self._emit((site.prefix(self._get_pid()) + fmt % args).removesuffix("\n"))

    def add(self, objects: Iterable[Any]) -> None:
        """Find the sites in the classes of these objects."""
        for kind in dict.fromkeys(type(obj) for obj in objects):
            for site in _sites_in(kind):  # type: ignore[arg-type]  # mypy takes no class for hashable
                known = self.sites.setdefault(site.format, replace(site))
                same = (known.lineno, known.modname) == (site.lineno, site.modname)
                assert same, f"two sites have the format {site.format!r}"

    def command(self, text: str) -> None:
        """Run the commands of one write. OSError: what the last wrong one is refused with."""
        if len(text) > _MAX_WRITE_BYTES:
            raise OSError(errno.E2BIG, "too long")
        failure: OSError | None = None
        for command in re.split(r"[;\n]", text):
            stripped = command.strip()
            if stripped and not stripped.startswith("#"):
                try:
                    self._run(stripped)
                except OSError as error:
                    failure = error
        if failure is not None:
            raise failure

    def _run(self, command: str) -> None:
        words = list(_words(command))
        if not words or len(words) > _MAX_WORDS:
            raise _einval("too many words")
        change = parse_flags(words[-1])
        query = parse_query(words[:-1])
        for site in self.sites.values():
            if query.matches(site):
                site.flags = change(site.flags)


@cache
def _sites_in(kind: type) -> tuple[Site, ...]:
    """Those in the methods of a class, which are the same for every machine: to be copied."""
    return tuple(site for function in vars(kind).values() for site in _sites_of(function))


def _sites_of(function: object) -> Iterator[Site]:
    if not isinstance(function, FunctionType):
        return
    module = function.__module__.rpartition(".")[2]
    name = getattr(function, FTRACE_NAME, function.__name__.lstrip("_"))
    for fmt, lineno in _calls_in(function.__code__):
        yield Site(f"mm/{module}.c", lineno, module, name, fmt)


def _calls_in(code: CodeType) -> Iterator[tuple[str, int]]:
    """(format, line) of each pr_debug() call in a function and the functions inside it."""
    pending, lineno = False, code.co_firstlineno
    names = {*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars}
    for instruction in dis.get_instructions(code) if _CALL in names else ():  # most functions do not call it
        if instruction.starts_line is not None:
            lineno = instruction.starts_line
        if instruction.argval == _CALL and instruction.opname.startswith("LOAD"):
            pending = True
        elif pending and instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str):
            yield instruction.argval, lineno
            pending = False
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _calls_in(constant)


# The grammar.


def _einval(why: str) -> OSError:
    return OSError(errno.EINVAL, why)


def _words(command: str) -> Iterator[str]:
    """ddebug_tokenize(): words apart by space, or quoted; a comment ends the line."""
    at = 0
    while True:
        while at < len(command) and command[at].isspace():
            at += 1
        if at >= len(command) or command[at] == "#":
            return
        quote = command[at] if command[at] in "\"'" else ""
        begin = at + len(quote)
        at = begin
        while at < len(command) and not (command[at] == quote if quote else command[at].isspace()):
            at += 1
        if quote and at >= len(command):
            raise _einval("unclosed quote")
        yield command[begin:at]
        at += len(quote)


def parse_flags(word: str) -> Callable[[str], str]:
    """`+pf`, `-l`, `=_`: a function from flags to flags. OSError(EINVAL)."""
    op, letters = word[:1], word[1:]
    if op not in ("+", "-", "=") or any(letter not in f"{FLAGS}_" for letter in letters):
        raise _einval("bad flags")
    named = {letter for letter in letters if letter != "_"}

    def change(flags: str) -> str:
        have = set(flags)
        now = have | named if op == "+" else have - named if op == "-" else named
        return "".join(flag for flag in FLAGS if flag in now)

    return change


def parse_query(words: list[str]) -> Query:
    """The match words of a command, in pairs. OSError(EINVAL)."""
    if len(words) % 2:
        raise _einval("a match word without a value")
    found: dict[str, Any] = {}

    def put(keyword: str, value: Any) -> None:
        if keyword in found:
            raise _einval(f"{keyword} twice")
        found[keyword] = value

    for keyword, value in zip(words[::2], words[1::2], strict=True):
        if keyword not in _SPEC:
            raise _einval(f"unknown word {keyword}")
        if keyword == "file":
            _put_file(value, put)
        elif keyword == "line":
            put("lines", _parse_lines(value))
        elif keyword == "class":
            put("in_class", True)
        else:
            put(keyword, _unescaped(value) if keyword == "format" else value)
    return Query(**found)


def _put_file(value: str, put: Callable[[str, Any], None]) -> None:
    """`FILE`, `FILE:LINES` or `FILE:FUNCTION`."""
    name, colon, rest = value.partition(":")
    put("file", name)
    if (colon and rest[:1].isalpha()) or rest[:1] in ("_", "*", "?"):
        put("func", rest)
    elif colon:
        put("lines", _parse_lines(rest))


def _parse_lines(text: str) -> tuple[int, int]:
    """`N`, `N-M`, `-M`, `N-`."""
    first, dash, last = text.partition("-")
    numbers = [word for word in (first, last) if word]
    if not all(word.isascii() and word.isdecimal() for word in numbers) or (not dash and not first):
        raise _einval("not a line number")
    low = int(first or 0)
    high = (int(last) if last else 1 << 31) if dash else low
    if high < low:
        raise _einval("the last line is before the first")
    return low, high


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"'}


def _unescaped(text: str) -> str:
    """A format as the control file shows it -> as it is (string_unescape)."""
    return re.sub(r"\\([0-7]{1,3}|.)", lambda m: _ESCAPES.get(m[1], _octal(m[1]) or m[0]), text)


def _octal(digits: str) -> str:
    return chr(int(digits, 8) & 0xFF) if digits.isdecimal() and set(digits) <= set("01234567") else ""


class DynamicDebugFiles(Kobject):
    """dynamic_debug/control."""

    control = Attr(Text(), mode=0o644, doc="pr_debug() sites, one a line; `file dpu_compact.c +p` switches some on.")

    def __init__(self, dynamic_debug: DynamicDebug) -> None:
        self._dynamic_debug = dynamic_debug

    @control.show
    def _show(self) -> str:
        sites = self._dynamic_debug.sites.values()
        return "# filename:lineno [module]function flags format\n" + "".join(site.line() for site in sites)

    @control.store
    def _store(self, text: str) -> None:
        self._dynamic_debug.command(text)
