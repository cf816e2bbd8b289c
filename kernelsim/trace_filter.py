# SPDX-License-Identifier: GPL-2.0-only
"""Event filters: `order >= 4 && (nid == 1 || comm ~ "kcompact*")` (kernel/trace/trace_events_filter.c).

A term is FIELD OP VALUE. Numbers know == != < <= > >= &, strings == != and ~ (a glob). Fields are those of the event's
`format`, the common ones included, and `comm` (COMM) and `cpu` (CPU) of whoever hit the event. Terms are joined by
&& and || (&& binds closer), grouped by parentheses and negated by `!`, which may stand before a term or a group.

A filter that cannot be understood takes the one before it away all the same: the event then has none, and its `filter`
file shows the text with a mark and a reason until the next write (FilterError.text). Errors, their numbers and the
place of the mark are those that a 6.18 kernel gives. Unlike there, more than MAX_DEPTH parentheses inside each other
are E2BIG: each is a call here.

A compiled filter is a function of a record's values and the task.
"""

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from kernelsim.cpulist import parse_cpulist
from kernelsim.task import Task
from kernelsim.tracepoint import COMMON_FIELDS, Field, TraceEvent, Values

Predicate = Callable[[Values, Task], bool]

_SPACE = " \t\n\r\v\f"
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|[0-9]+)")
_NUMBER_OPS: dict[str, Callable[[int, int], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "&": lambda a, b: a & b != 0,
}
_OPS = ("==", "!=", "<=", ">=", "<", ">", "&", "~")
_MAX_OPERAND = 255
MAX_DEPTH = 64
"""Parentheses inside each other."""


class FilterError(OSError):
    """A filter that is none. `at` is where in the text, None for an error without a reason."""

    def __init__(self, code: int, reason: str | None, source: str, at: int = 0) -> None:
        super().__init__(code, reason or "meaningless filter")
        self.reason = reason
        self.source = source
        self.at = min(at, len(source))

    @property
    def text(self) -> str:
        """What the `filter` file shows."""
        if self.reason is None:
            return f"{self.source}\nError: (0)\n\n"
        # the mark's column counts from 1, but one at the very start stays there
        column = self.at + 1 if self.at else 0
        return f"{self.source}\n{'^':>{max(column, 1)}}\nparse_error: {self.reason}\n\n"


def compile_filter(event: TraceEvent, source: str, nr_cpus: int) -> Predicate:
    """The predicate that a filter's text spells for an event of a machine with so many CPUs. Raises FilterError."""
    return _Parser(event, source, nr_cpus).parse()


@dataclass(frozen=True)
class _Operand:
    """What a term looks at."""

    is_string: bool
    get: Callable[[Values, Task], Any]
    limits: tuple[int, int] = (0, 0)


class _Parser:
    """One reading of one text, by descent: or, and, not, term."""

    def __init__(self, event: TraceEvent, source: str, nr_cpus: int) -> None:
        self.event = event
        self.source = source
        self.nr_cpus = nr_cpus
        self.at = 0
        self.depth = 0

    def fail(self, reason: str | None, at: int, code: int = errno.EINVAL) -> FilterError:
        return FilterError(code, reason, self.source, at)

    def fail_in_term(self, reason: str, at: int | None = None) -> FilterError:
        """Within a term the kernel's mark stands one place to the right."""
        return self.fail(reason, (self.at if at is None else at) + 1)

    def parse(self) -> Predicate:
        self._check_brackets()
        predicate = self._either()
        if self.at < len(self.source):
            raise self._surplus()
        return predicate

    def _check_brackets(self) -> None:
        """calc_stack(): quotes and parentheses must close, whatever stands between them."""
        open_at: list[int] = []
        quote, quote_at = "", 0
        for at, letter in enumerate(self.source):
            if quote:
                quote = "" if letter == quote else quote
            elif letter in "\"'":
                quote, quote_at = letter, at
            elif letter == "(":
                open_at.append(at)
            elif letter == ")":
                if not open_at:
                    raise self.fail("Too few '('", at, errno.EPERM)
                open_at.pop()
        if quote:
            raise self.fail("Missing matching quote", quote_at, errno.ESRCH)
        if open_at:
            raise self.fail("Too many '('", open_at[-1], errno.ENOENT)

    def _skip_space(self) -> None:
        while self.at < len(self.source) and self.source[self.at] in _SPACE:
            self.at += 1

    def _take(self, token: str) -> bool:
        self._skip_space()
        if not self.source.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    # A join with nothing behind it is taken for its left side, as the kernel takes it.

    def _either(self) -> Predicate:
        terms = [self._both()]
        while self._take("||"):
            if self._more():
                terms.append(self._both())
        self._skip_space()
        return _any(terms)

    def _both(self) -> Predicate:
        terms = [self._negation()]
        while self._take("&&"):
            if self._more():
                terms.append(self._negation())
        return _all(terms)

    def _more(self) -> bool:
        self._skip_space()
        return self.at < len(self.source)

    def _negation(self) -> Predicate:
        negated = False
        while self._take("!"):
            negated = not negated
        predicate = self._group() if self._take("(") else self._term()
        return _not(predicate) if negated else predicate

    def _group(self) -> Predicate:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail("Too many '('", self.at - 1, errno.E2BIG)
        predicate = self._either()
        self.depth -= 1
        if not self._take(")"):
            raise self._surplus()
        return predicate

    def _surplus(self) -> FilterError:
        """Something between two terms that joins nothing."""
        self._skip_space()
        return self.fail("Too many terms in predicate expression", self.at, errno.EPERM)

    # One term.

    def _term(self) -> Predicate:
        self._skip_space()
        begin = self.at
        while self.at < len(self.source) and (self.source[self.at].isalnum() or self.source[self.at] == "_"):
            self.at += 1
        name = self.source[begin : self.at]
        if not name:
            raise self.fail(None, 0, errno.EPERM if self._joins_here() else errno.EINVAL)
        operand = self._operand(name)
        self._skip_space()
        op = next((op for op in _OPS if self.source.startswith(op, self.at)), None)
        if op is None:
            raise self.fail_in_term("Invalid operator")
        self.at += len(op)
        self._skip_space()
        if self._quoted():
            return self._string_term(operand, op)
        return (
            self._cpus_term(operand, op) if self.source.startswith("CPUS", self.at) else self._number_term(operand, op)
        )

    def _joins_here(self) -> bool:
        return self.source[self.at : self.at + 2] in ("&&", "||")

    def _quoted(self) -> bool:
        return self.source[self.at : self.at + 1] in ('"', "'")

    def _operand(self, name: str) -> _Operand:
        if name in ("comm", "COMM"):
            return _Operand(True, lambda _values, task: task.comm)
        if name in ("cpu", "CPU", "common_cpu"):
            return _Operand(False, lambda _values, task: task.cpu, (0, 2**32 - 1))
        for index, field in enumerate(self.event.fields):
            if field.name == name:
                return _Operand(field.is_string, _value_at(index), _limits(field))
        for field in COMMON_FIELDS:
            if field.name == name:
                return _Operand(False, self._common(name), _limits(field))
        raise self.fail_in_term("Field not found")

    def _common(self, name: str) -> Callable[[Values, Task], int]:
        if name == "common_pid":
            return lambda _values, task: task.pid
        number = self.event.id if name == "common_type" else 0
        return lambda _values, _task: number

    def _string_term(self, operand: _Operand, op: str) -> Predicate:
        begin = self.at
        quote = self.source[begin]
        end = self.source.index(quote, begin + 1)
        if not operand.is_string:
            raise self.fail_in_term("Illegal operation for field type" if op == "~" else "Expecting numeric field")
        if op not in ("==", "!=", "~"):
            raise self.fail_in_term("Illegal operation for field type")
        wanted = self.source[begin + 1 : end]
        if len(wanted) > _MAX_OPERAND:
            raise self.fail_in_term("Operand too long")
        self.at = end + 1
        get = operand.get
        if op == "~":
            matches = re.compile(translate(wanted), re.DOTALL).match
            return lambda values, task: matches(get(values, task)) is not None
        if op == "==":
            return lambda values, task: bool(get(values, task) == wanted)
        return lambda values, task: bool(get(values, task) != wanted)

    def _cpus_term(self, operand: _Operand, op: str) -> Predicate:
        """`CPUS{list}`; any number may be compared with it. One CPU is a number; `==` with several never holds."""
        if operand.is_string or op not in ("==", "!=", "&"):
            raise self.fail_in_term("Illegal operation for field type")
        self.at += len("CPUS")
        self._skip_space()
        if not self.source.startswith("{", self.at):
            raise self.fail_in_term("Missing '{'")
        end = self.source.find("}", self.at)
        if end < 0:
            raise self.fail_in_term("Missing '}'", len(self.source) - 1)
        try:
            cpus = parse_cpulist(self.source[self.at + 1 : end], self.nr_cpus)
        except ValueError:
            cpus = frozenset()
        if not cpus:
            raise self.fail_in_term("Invalid cpulist", end)
        self.at = end + 1
        get, nr_cpus = operand.get, self.nr_cpus
        if len(cpus) == 1:
            compare, (one,) = _NUMBER_OPS["==" if op == "&" else op], cpus
            return lambda values, task: compare(get(values, task), one)
        if op == "&":
            return lambda values, task: get(values, task) in cpus
        return lambda values, task: op == "!=" and 0 <= get(values, task) < nr_cpus

    def _number_term(self, operand: _Operand, op: str) -> Predicate:
        letter = self.source[self.at : self.at + 1]
        if not (letter.isdigit() or letter == "-"):
            raise self.fail_in_term("Invalid value (did you forget quotes)?")
        if operand.is_string:
            raise self.fail_in_term("Expecting string field")
        if op == "~":
            raise self.fail_in_term("Illegal operation for field type")
        begin = self.at
        self.at += 1
        while self.at < len(self.source) and self.source[self.at].isalnum():
            self.at += 1
        wanted = self._integer(self.source[begin : self.at], operand.limits, begin)
        get, compare = operand.get, _NUMBER_OPS[op]
        return lambda values, task: compare(get(values, task), wanted)

    def _integer(self, digits: str, limits: tuple[int, int], begin: int) -> int:
        """kstrto(u)ll with base 0: 64 bits, negative only for a signed field."""
        if not _INTEGER.fullmatch(digits):
            raise self.fail_in_term("Illegal integer value", begin)
        octal = digits.lstrip("-").startswith("0") and digits.lstrip("-0").isdigit()
        try:
            value = int(digits, 8 if octal else 0)
        except ValueError:
            raise self.fail_in_term("Illegal integer value", begin) from None
        low, high = (-(2**63), 2**63 - 1) if limits[0] < 0 else (0, 2**64 - 1)
        if not low <= value <= high:
            raise self.fail_in_term("Illegal integer value", begin)
        return value


def _value_at(index: int) -> Callable[[Values, Task], Any]:
    return lambda values, _task: values[index]


def _limits(field: Field) -> tuple[int, int]:
    bits = 8 * field.size
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if field.signed else (0, (1 << bits) - 1)


def _all(terms: list[Predicate]) -> Predicate:
    return terms[0] if len(terms) == 1 else lambda values, task: all(term(values, task) for term in terms)


def _any(terms: list[Predicate]) -> Predicate:
    return terms[0] if len(terms) == 1 else lambda values, task: any(term(values, task) for term in terms)


def _not(predicate: Predicate) -> Predicate:
    return lambda values, task: not predicate(values, task)
