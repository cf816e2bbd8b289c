# SPDX-License-Identifier: GPL-2.0-only
"""A configuration as TOML: what `dpud config` prints, and what reads back to the same.

A key that has no value and no default either, such as the mount point that depends on the user, is a comment.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from dpud.config import Config, Size
from dpud.config_keys import Key, keys

_WIDTH = 100


def toml(config: Config, comments: bool = False) -> str:
    """All keys with their values; with `comments`, above each what it is for and may be."""
    return "\n".join(_table("", config, comments)).strip("\n") + "\n"


def _table(name: str, struct: msgspec.Struct, comments: bool) -> Iterator[str]:
    """Values first: TOML counts what follows a table's head as the table's."""
    below = []
    for key in keys(type(struct)):
        value = getattr(struct, key.name)
        if key.table or (key.values == "table" and not name):
            below.append((key, value))
        else:
            yield from _comment(key) if comments else ()
            yield f"# {key.name} =" if value is None else f"{key.name} = {_value(value)}"
    for key, value in below:
        yield from _part(key, f"{name}.{key.name}".lstrip("."), value, comments)


def _part(key: Key, name: str, value: Any, comments: bool) -> Iterator[str]:
    """A table, an array of them, or one with keys of the user's own."""
    heading = f"[[{name}]]" if key.repeated else f"[{name}]"
    for number, each in enumerate(value if key.repeated else (value,)):
        yield ""
        yield from _comment(key) if comments and not number else ()
        yield heading
        if isinstance(each, Mapping):
            yield from (f"{_name(below)} = {_value(inner)}" for below, inner in each.items())
        else:
            yield from _table(name, each, comments and not number)
    if key.repeated and not value and comments:
        yield ""
        yield from _comment(key)
        yield f"# {heading}"


def _comment(key: Key) -> Iterator[str]:
    facts = f" ({key.values})" if key.values not in ("", "table") else ""
    if key.about:
        yield from textwrap.wrap(key.about + facts, _WIDTH, initial_indent="# ", subsequent_indent="# ")


def _name(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Size):
        return f'"{value}"'
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{_name(key)} = {_value(each)}" for key, each in value.items()) + " }" if value else "{}"
        )
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, tuple) else _text(value)


def _text(value: str) -> str:
    """A basic string: what JSON escapes, TOML escapes alike, but for DEL and characters beyond 16 bits."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
