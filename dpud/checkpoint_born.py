# SPDX-License-Identifier: GPL-2.0-only
"""The objects of a machine as it was built, by number: what a checkpoint's object graph is written against.

Theory of operation
    Two machines that are built by the same program from the same configuration, with the same answers from outside,
    consist of the same objects. So an object that was there at the end of the boot is known by its number in a walk
    through attributes, containers, closures and waiting generators. A checkpoint names it by that, and says what is in
    it now; the next start builds its machine and puts that in. Nobody ever has to write down a lock, a thread, a
    closure that the boot made or a descriptor: the new process has its own, at the same number.

    Three kinds of objects are numbered
        state     instances of our classes, containers, cells of closures, arrays and what their bytes are in:
                  a checkpoint has their contents
        fixtures  functions, generators, and what belongs to the process: locks, threads, clocks, the owner, wait
                  queues. Their identity counts, what is in them is the process's own
    and one is not
        values    numbers, texts, tuples, enums, random generators, counters: written down where they are met

    The order of the walk must not depend on the process: attributes go by name, dictionaries by the order of their
    making, and sets, which have none, are not entered. `fingerprint` is a hash of what was met where. Where it differs
    the numbers mean something else, and a checkpoint cannot be used.
"""

import itertools
import mmap
import random
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import xxhash

from dpud.dpu.worker import Worker
from dpud.gpu.compression.workers import Workers
from dpud.gpu.swap.blockfile import BlockFile
from dpud.inject import LiveClock, Outside
from dpud.owner import FairLock, Owner
from dpud.pacer import Pacer
from fs.configfs import Items
from kernelsim.attr import Attr
from kernelsim.printk import Printk
from kernelsim.wait import WaitQueue

PACKAGES = ("kernelsim.", "fs.", "dpud.")
_VALUES = (
    *(bool, int, float, complex, str, bytes, type(None), Enum, range, slice, PurePath, BaseException, type(Ellipsis)),
    *(np.generic, np.dtype, np.random.Generator, random.Random, itertools.count, itertools.cycle, msgspec.Struct),
    *(ModuleType, BuiltinFunctionType, type),
)
_CONTAINERS = (list, dict, set, deque, bytearray, array, WeakKeyDictionary, memoryview, np.ndarray, mmap.mmap, CellType)
_FIXTURES = (Attr, WaitQueue, Owner, FairLock, Pacer, Outside, LiveClock, Worker)
_OF_THE_PROCESS: dict[type, frozenset[str]] = {
    Printk: frozenset({"console"}),
    BlockFile: frozenset({"_fd", "_buffer", "path", "is_direct", "before_write"}),
    Workers: frozenset({"_calls", "_threads"}),
    Items: frozenset({"_emptied"}),
}
"""Attributes that stay as the process has them."""
_PROCESS_NAMES = frozenset({"helper", "keeper", "_temporary", "counter_text"})
"""The same, of whatever class: thread pools, who makes checkpoints, temporary folders, addresses of arrays."""


def is_ours(kind: type) -> bool:
    return kind.__module__.startswith(PACKAGES)


def is_state(obj: Any) -> bool:
    """Does a checkpoint have what is in it?"""
    if isinstance(obj, _CONTAINERS):
        return True
    return is_ours(type(obj)) and not isinstance(obj, (*_FIXTURES, *_VALUES, tuple, frozenset))


def attributes(obj: Any) -> dict[str, Any]:
    """What is in an instance, by name; not what is the process's own."""
    slots = [name for base in type(obj).__mro__ for name in _slots(base)]
    named = {name: getattr(obj, name) for name in slots if hasattr(obj, name)} | getattr(obj, "__dict__", {})
    left = _left_out(type(obj))
    return {name: value for name, value in named.items() if name not in left}


def _left_out(kind: type) -> frozenset[str]:
    return _PROCESS_NAMES.union(*(names for base, names in _OF_THE_PROCESS.items() if issubclass(kind, base)))


def fill(obj: Any, named: dict[str, Any]) -> None:
    """Put attributes into an instance that has others: the inverse of `attributes`."""
    left = _left_out(type(obj))
    own = getattr(obj, "__dict__", {})
    for name in [name for name in own if name not in named and name not in left]:
        del own[name]
    slots = {name for base in type(obj).__mro__ for name in _slots(base)}
    for name in slots - named.keys() - left:
        if hasattr(obj, name):
            object.__delattr__(obj, name)
    for name, value in named.items():
        if name in slots:
            object.__setattr__(obj, name, value)
        else:
            own[name] = value


def _slots(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in slots if name not in ("__dict__", "__weakref__"))


def owner_of(array: Any) -> Any:
    """Whose the bytes of an array are: an array, a mapping, or whatever it was made over."""
    while True:
        if isinstance(array, np.ndarray) and array.base is not None:
            array = array.base
        elif isinstance(array, memoryview) and array.obj is not None:
            array = array.obj
        else:
            return array


class Born:
    """The numbered objects that are reachable from `roots` now."""

    def __init__(self, roots: Iterable[Any]) -> None:
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}
        """By id; the objects are held, so that no other comes to have the same."""
        self._hash = xxhash.xxh3_64()
        self._walk(roots)

    @property
    def fingerprint(self) -> str:
        return f"{len(self.objects)}-{self._hash.hexdigest()}"

    def number(self, obj: Any) -> int | None:
        """Of an object that was there then."""
        return self.numbers.get(id(obj))

    def mappings(self) -> list[mmap.mmap]:
        return [obj for obj in self.objects if isinstance(obj, mmap.mmap)]

    def _walk(self, roots: Iterable[Any]) -> None:
        pending: deque[tuple[str, Any]] = deque(("", root) for root in roots)
        transparent: dict[int, Any] = {}
        while pending:
            name, obj = pending.popleft()
            if isinstance(obj, _VALUES) or id(obj) in self.numbers or id(obj) in transparent:
                continue
            if isinstance(obj, tuple | frozenset | MethodType):
                transparent[id(obj)] = obj
            else:
                self._enter(name, obj)
            pending.extend(_parts(obj))

    def _enter(self, name: str, obj: Any) -> None:
        self.numbers[id(obj)] = len(self.objects)
        self.objects.append(obj)
        self._hash.update(f"{name} {type(obj).__module__}.{type(obj).__qualname__};".encode())


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """(where, what) of all that an object holds."""
    if isinstance(obj, Attr | frozenset | set):
        return
    if isinstance(obj, tuple | list | deque):
        yield from (("", part) for part in obj)
    elif isinstance(obj, dict | WeakKeyDictionary):
        yield from ((str(key) if isinstance(key, str | int) else "", key) for key in obj)
        yield from ((str(key) if isinstance(key, str | int) else "", value) for key, value in obj.items())
    elif isinstance(obj, np.ndarray | memoryview):
        yield "owner", owner_of(obj)
    elif isinstance(obj, MethodType):
        yield from (("self", obj.__self__), ("func", obj.__func__))
    elif isinstance(obj, partial):
        yield from (("func", obj.func), ("args", obj.args), ("keywords", obj.keywords))
    elif isinstance(obj, FunctionType):
        yield from (("cell", cell) for cell in obj.__closure__ or ())
        yield from (("default", value) for value in obj.__defaults__ or ())
    elif isinstance(obj, CellType):
        yield from (("", value) for value in contents_of(obj))
    elif isinstance(obj, GeneratorType):
        yield from sorted(obj.gi_frame.f_locals.items(), key=lambda entry: entry[0]) if obj.gi_frame else ()
    elif is_state(obj):
        yield from sorted(attributes(obj).items())


def contents_of(cell: CellType) -> tuple[Any, ...]:
    """What a closure's cell holds; nothing if it is empty."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()
