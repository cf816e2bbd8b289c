# SPDX-License-Identifier: GPL-2.0-only
"""What TOML allows and no configuration has: looked for before anything else is done with the tables."""

from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 16
_INT64 = range(-(1 << 63), 1 << 63)


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
