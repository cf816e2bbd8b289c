# SPDX-License-Identifier: GPL-2.0-only
"""What TOML allows and no configuration has: looked for before anything else is done with the tables."""

import re
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 16
MAX_DOTS = 64
_INT64 = range(-(1 << 63), 1 << 63)

_ENDS = frozenset("=,[]{}\n")
_TOKEN = re.compile(r"""\"(?:[^"\\\n]|\\.)*+\"?|'[^'\n]*+'?|\#[^\n]*|[=,\[\]{}\n.]|[^=,\[\]{}\n."'\#]+""")
"""A string, closed or not, a comment, a mark, or what is between marks. Nothing is looked at twice."""


def endless_key(text: str) -> int | None:
    """The line of a key of more than MAX_DOTS dots; None if there is none. tomllib would take time for its square."""
    nr_dots, line = 0, 1
    for token in _TOKEN.findall(text):
        if token == ".":
            nr_dots += 1
            if nr_dots > MAX_DOTS:
                return line
        elif token in _ENDS:
            nr_dots = 0
            line += token == "\n"
    return None


def problem_of(tables: Mapping[str, Any]) -> str | None:
    """`KEY: what is wrong`; None if nothing is."""
    pending: list[tuple[str, Any, int]] = [("", tables, 0)]
    while pending:
        key, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            return f"{key}: more than {MAX_DEPTH} tables or arrays inside each other"
        if isinstance(value, Mapping):
            if nul := next((name for name in value if "\0" in name), None):
                return f"{key}: {nul!r}: a name with a NUL in it"
            pending += [(f"{key}.{name}".lstrip("."), each, depth + 1) for name, each in value.items()]
        elif isinstance(value, list):
            pending += [(f"{key}[{number}]", each, depth + 1) for number, each in enumerate(value)]
        elif isinstance(value, int) and value not in _INT64:
            return f"{key}: a number of more than 64 bits"
        elif isinstance(value, str) and "\0" in value:
            return f"{key}: a text with a NUL in it"
    return None
