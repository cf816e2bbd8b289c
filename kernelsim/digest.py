# SPDX-License-Identifier: GPL-2.0-only
"""One hash over all that can be reached from an object: knobs, tables, counters, queues, whatever comes to be added.

Theory of operation
    The walk goes through attributes, containers and arrays, each object once; a second way to it is "the one met as
    number N", so that sharing counts and cycles end. Values count by type and content, sets without their order, and of
    what cannot change nobody can tell whether it is one or two. No address, and no hash of a string, is in it: another
    process comes to the same.

    It goes into objects of the given packages only. Of others (threads, locks, clocks, devices, files of the host) and
    of functions just the type or the name counts. `skip` names attributes that are left out: big arrays that are
    hashed otherwise, and what was measured here without the machine's knowing.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np

_PLAIN = (bool, int, float, str, bytes, bytearray, complex)
_FOR_EVER = (tuple, frozenset)


class Digest:
    """Of a walk under way."""

    def __init__(self, packages: Iterable[str], skip: Iterable[str] = ()) -> None:
        self._prefixes = tuple(f"{name}." for name in packages)
        self._skip = frozenset(skip)
        self._hash = hashlib.sha256()
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []  # or another object could come to have the same id

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, root: Any) -> None:
        """Walk from here. The stack holds what is still to be looked at: object graphs are deeper than Python's."""
        pending: deque[Any] = deque([iter((root,))])
        while pending:
            for obj in pending[-1]:
                parts = self._look(obj)
                if parts is not None:
                    pending.append(parts)
                    break
            else:
                pending.pop()
                self._put("end")

    def _put(self, tag: str, data: bytes = b"") -> None:
        self._hash.update(f"{tag}:{len(data)};".encode())
        self._hash.update(data)

    def _look(self, obj: Any) -> Iterator[Any] | None:
        """Take in what an object is -> what it holds, None if that is nothing more."""
        if obj is None or isinstance(obj, _PLAIN):
            self._put(type(obj).__name__, repr(obj).encode("utf-8", "surrogateescape"))
            return None
        if isinstance(obj, _FOR_EVER):
            return self._open(obj)
        if (number := self._met.get(id(obj))) is not None:
            self._put("met", str(number).encode())
            return None
        self._met[id(obj)] = len(self._met)
        self._kept.append(obj)
        return self._open(obj)

    def _open(self, obj: Any) -> Iterator[Any] | None:
        if isinstance(obj, np.ndarray | np.generic):
            array = np.ascontiguousarray(obj)
            self._put(f"array {array.dtype} {array.shape}", array.tobytes())
            return None
        if isinstance(obj, Enum):
            self._put("enum", f"{type(obj).__qualname__}.{obj.name}".encode())
            return None
        if isinstance(obj, np.random.Generator):
            return iter((obj.bit_generator.state,))
        if isinstance(obj, FunctionType | BuiltinFunctionType | MethodType | type):
            self._put("name", obj.__qualname__.encode())
            return None
        self._put(type(obj).__qualname__)
        return self._parts(obj)

    def _parts(self, obj: Any) -> Iterator[Any] | None:
        if isinstance(obj, dict):
            return iter([part for entry in obj.items() for part in entry])
        if isinstance(obj, set | frozenset):
            return iter(sorted(self._apart(element) for element in obj))
        if isinstance(obj, list | tuple | deque):
            return iter(obj)
        if not type(obj).__module__.startswith(self._prefixes):
            return None
        return iter([part for name, value in self._attributes(obj) for part in (name, value)])

    def _apart(self, element: Any) -> str:
        """An element of a set, by itself."""
        digest = Digest((), ())
        digest._prefixes, digest._skip = self._prefixes, self._skip
        digest.add(element)
        return digest.hexdigest()

    def _attributes(self, obj: Any) -> Iterator[tuple[str, Any]]:
        slots = [name for base in type(obj).__mro__ for name in _slots(base)]
        named = {name: getattr(obj, name) for name in slots if hasattr(obj, name)} | vars_of(obj)
        return ((name, named[name]) for name in sorted(named) if name not in self._skip)


def _slots(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def vars_of(obj: Any) -> dict[str, Any]:
    """Its own attributes; none where it has no dictionary."""
    return dict(getattr(obj, "__dict__", {}))
