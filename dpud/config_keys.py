# SPDX-License-Identifier: GPL-2.0-only
"""Every key of the configuration file: what it means, what it may be, and what it is if left out.

Read from the annotations of config.py; the manual page and `dpud config --comments` are made from it.
"""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from dpud import config


@dataclass(frozen=True)
class Key:
    """One key of a table."""

    name: str
    about: str
    values: str
    """Type and range, "number; 1..64"; "" for tables."""
    default: Any
    table: type[msgspec.Struct] | None = None
    """What it is a table of, if it is one."""
    repeated: bool = False
    """An array of such tables."""


def keys(struct: type[msgspec.Struct]) -> Iterator[Key]:
    """Those of one table, in the order of their declaration."""
    hints = get_type_hints(struct, include_extras=True)
    default = struct()
    for name in struct.__struct_fields__:
        about, values, table, repeated = _read_hint(hints[name])
        yield Key(name, about, values, getattr(default, name), table, repeated)


def _read_hint(hint: Any) -> tuple[str, str, type[msgspec.Struct] | None, bool]:
    """(what it means, its values, the table that it is, whether there are several of those)"""
    about, limits = "", []
    while get_origin(hint) is Annotated:
        hint, *metas = get_args(hint)
        about = next((meta.description for meta in metas if meta.description), about)
        limits += [f"{meta.ge}..{meta.le}" for meta in metas if meta.ge is not None]
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return about, "", hint, False
    inner = [arg for arg in get_args(hint) if isinstance(arg, type) and issubclass(arg, msgspec.Struct)]
    if inner:
        return about, "", inner[0], True
    return about, "; ".join([_type_name(hint), *limits]), None, False


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in get_args(hint) if arg is not types.NoneType)
    if get_origin(hint) is Literal:
        return " or ".join(f'"{arg}"' for arg in get_args(hint))
    if get_origin(hint) is tuple:
        return "list of numbers"
    names = {int: "number", str: "text", bool: "true or false", config.Size: "size"}
    return names.get(hint, "table")
