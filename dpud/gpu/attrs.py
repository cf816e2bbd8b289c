# SPDX-License-Identifier: MIT
"""Attributes that come in dozens: one value that is shown, one number that is shown and set."""

from collections.abc import Callable
from typing import Any

from kernelsim.attr import Attr, Int, Kobject, Text


def value(doc: str, read: Callable[[Any], Any]) -> Attr[str]:
    """A file that shows what `read` gives for its Kobject."""
    attr: Attr[str] = Attr(Text(), doc=doc)

    def show(files: Kobject) -> str:
        return f"{read(files)}\n"

    attr.show(show)
    return attr


def number(kind: Int, doc: str, get: Callable[[Any], int], put: Callable[[Any, int], None]) -> Attr[int]:
    """A file of a number that `get` and `put` find and keep for its Kobject."""
    attr: Attr[int] = Attr(kind, doc=doc)

    def show(files: Kobject) -> int:
        return get(files)

    def store(files: Kobject, value: int) -> None:
        put(files, value)

    attr.show(show)
    attr.store(store)
    return attr
