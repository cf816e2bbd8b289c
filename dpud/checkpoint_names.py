# SPDX-License-Identifier: GPL-2.0-only
"""Objects that modules have by name: trace events, tables of them, declarations of files. Their identity counts, and
each process has its own, so they are written down by that name.
"""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from dpud.checkpoint_born import PACKAGES, is_ours, is_state
from dpud.checkpoint_reduce import resolve
from kernelsim.attr import Attr, Kobject

_MAX_MEMBERS = 4096

Name = tuple[Any, ...]
"""Module, name, and keys on the way; "", module, class and name for the declaration of a file."""


def named_objects() -> dict[int, Name]:
    """By id, those that are loaded."""
    found: dict[int, Name] = {}
    for module_name, module in sorted(sys.modules.items()):
        if f"{module_name}.".startswith(PACKAGES) and module is not None:
            for name, value in list(vars(module).items()):
                for keys, part in _members(value):
                    found.setdefault(id(part), (module_name, name, *keys))
    for kind in _kobject_classes(Kobject):
        for attr in kind.attrs:
            found.setdefault(id(attr), ("", kind.__module__, kind.__qualname__, attr._key))
    return found


def _members(value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(keys, part) of what a name of a module stands for: an instance, or a container of some."""
    if isinstance(value, tuple | list) and len(value) < _MAX_MEMBERS:
        yield from (((at,), part) for at, part in enumerate(value) if _counts(part))
    elif isinstance(value, dict):
        yield from (((key,), part) for key, part in value.items() if isinstance(key, str | int) and _counts(part))
    elif _counts(value):
        yield (), value


def _counts(value: Any) -> bool:
    return isinstance(value, Attr) or (is_ours(type(value)) and is_state(value))


def _kobject_classes(base: type[Kobject]) -> Iterator[type[Kobject]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kobject_classes(kind)


def found_by(name: Name) -> Any:
    """The inverse. Raises AttributeError, ImportError, LookupError."""
    module, first, *keys = name
    if module:
        value = getattr(importlib.import_module(module), first)
        for key in keys:
            value = value[key]
        return value
    kind = resolve(first, keys[0])
    return next(attr for attr in kind.attrs if attr._key == keys[1])
