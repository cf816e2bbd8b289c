# SPDX-License-Identifier: GPL-2.0-only
"""What is in the objects of a machine, written down and put into another machine of the same making.

Theory of operation
    Everything that can be reached from the roots now is written: of an object that the boot made (checkpoint_born.py)
    its number, wherever it is met, and once what is in it; of one that came later all of it, as pickle does. Both kinds
    share one pickler, so what was one object is one again, in cycles too. What the boot made and nothing leads to any
    more is left out.

    Pickle is told what it does not know (checkpoint_reduce.py), and the names of what modules have
    (checkpoint_names.py). A program that reads it knows classes of ours and a short list of others, and no more.

    Bytes in bulk (memory, tables, files of swap tiers) are not in the graph: it says which object's they are
    (`Section`), and they follow apart.

    Who cannot be written makes `dump` fail with TypeError or pickle.PicklingError, and says what it was.
"""

import io
import mmap
import pickle
import sys
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CellType, GeneratorType, ModuleType, NoneType
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dpud.checkpoint_born import PACKAGES, Born, attributes, contents_of, fill, is_state, owner_of
from dpud.checkpoint_names import found_by, named_objects
from dpud.checkpoint_reduce import REDUCE, reduce_error, set_cell
from dpud.gpu.swap.blockfile import BlockFile

BULK_BYTES = 1 << 16
"""Arrays from this size on are sections."""
_FOREIGN: dict[str, frozenset[str]] = {
    "array": frozenset({"_array_reconstructor", "array"}),
    "builtins": frozenset(
        {
            "bool",
            "bytearray",
            "bytes",
            "complex",
            "dict",
            "float",
            "frozenset",
            "getattr",
            "int",
            "iter",
            "list",
            "object",
        }
        | {"OSError", "ValueError", "BlockingIOError", "ChildProcessError", "ConnectionError", "FileExistsError"}
        | {"FileNotFoundError", "InterruptedError", "IsADirectoryError", "NotADirectoryError", "PermissionError"}
        | {"ProcessLookupError", "TimeoutError", "BrokenPipeError", "ConnectionAbortedError", "ConnectionRefusedError"}
        | {"ConnectionResetError"}
        | {"list_iterator", "range", "range_iterator", "set", "slice", "str", "tuple", "tuple_iterator"}
    ),
    "collections": frozenset({"Counter", "OrderedDict", "defaultdict", "deque"}),
    "functools": frozenset({"partial"}),
    "itertools": frozenset({"count", "cycle"}),
    "pathlib": frozenset({"PosixPath"}),
    "random": frozenset({"Random"}),
    "time": frozenset({"monotonic_ns", "perf_counter_ns", "thread_time_ns"}),
    "weakref": frozenset({"WeakKeyDictionary"}),
}
"""What a checkpoint may name beside what is ours and numpy's."""
_MAX_DEPTH = 8000


class Sink(Protocol):
    def write(self, data: Any, /) -> object: ...


@dataclass
class Section:
    """Bytes that are kept apart: of an array, a mapping or the file of a swap tier."""

    target: Any

    @property
    def nr_bytes(self) -> int:
        target = self.target
        return target.nbytes if isinstance(target, np.ndarray) else len(target)


def dump(born: Born, roots: list[Any], sink: Sink) -> list[Section]:
    """Write what `roots` lead to -> the bytes that have to follow, in this order."""
    pickler = _Pickler(sink, born)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(_MAX_DEPTH)
    try:
        pickler.dump(roots)
        for number in pickler.reached:
            pickler.dump((number, *pickler.inside(born.objects[number])))
        pickler.dump(None)
    finally:
        sys.setrecursionlimit(limit)
    return pickler.sections


def load(born: Born, source: io.BytesIO, moved: Callable[[Path], Path]) -> tuple[list[Any], list[Section]]:
    """The inverse: put it into the objects of this machine -> the roots, whose bytes follow.

    `moved`: where a path leads now. Raises pickle.UnpicklingError, or whatever comes of a graph that is none.
    """
    unpickler = _Unpickler(source, born, moved)
    roots, filled = unpickler.load(), []
    while (entry := unpickler.load()) is not None:
        filled.append(entry)
    sections: dict[int, Section] = {}
    for number, tag, inside in filled:
        target = born.objects[number]
        if tag == "section":
            sections[inside] = Section(target)
        else:
            _PUT[tag](target, inside)
            if tag == "file":
                sections[inside[0]] = Section(target)
    return roots, [sections[number] for number in sorted(sections)]


class _Pickler(pickle.Pickler):
    def __init__(self, sink: Sink, born: Born) -> None:
        super().__init__(cast(Any, sink), protocol=5)
        self.reached: list[int] = []
        self.sections: list[Section] = []
        self._born = born
        self._known: set[int] = set()
        self._by_name = named_objects()

    def persistent_id(self, obj: Any) -> Any:
        key = id(obj)
        number = self._born.numbers.get(key)
        if number is None:
            return self._by_name.get(key)
        if number not in self._known:
            self._known.add(number)
            if is_state(obj):
                self.reached.append(number)
        return number

    def inside(self, obj: Any) -> tuple[str, Any]:
        """(how it is put back, what is in an object of the boot's)."""
        if isinstance(obj, np.ndarray | mmap.mmap | memoryview):
            return self._bytes(obj)
        if isinstance(obj, BlockFile):
            return "file", (self._section(obj), attributes(obj))
        if isinstance(obj, list | set | deque):
            return "elements", list(obj)
        if isinstance(obj, dict | WeakKeyDictionary):
            return "entries", list(obj.items())
        if isinstance(obj, bytearray | array):
            return "raw", bytes(obj)
        if isinstance(obj, CellType):
            return "cell", contents_of(obj)
        return "named", attributes(obj)

    def _section(self, obj: Any) -> int:
        self.sections.append(Section(obj))
        return len(self.sections) - 1

    def _bytes(self, obj: Any) -> tuple[str, Any]:
        owner = owner_of(obj)
        if owner is not obj:
            self.persistent_id(owner)  # the bytes are there
            return "nothing", None
        if isinstance(obj, np.ndarray):
            if not obj.flags.writeable:
                return "nothing", None
            if obj.dtype.hasobject:
                return "objects", obj.tolist()
            if obj.nbytes < BULK_BYTES:
                return "array", obj.tobytes("A")
        return "section", self._section(obj)

    def reducer_override(self, obj: Any) -> Any:
        """How to make again what pickle does not know, or not well enough."""
        make = REDUCE.get(type(obj))
        if make is not None:
            return make(obj)
        if isinstance(obj, Exception):
            return reduce_error(obj)
        if isinstance(obj, GeneratorType):
            raise pickle.PicklingError(f"an operation is under way in {obj.gi_code.co_qualname}")
        named = obj if callable(obj) and hasattr(obj, "__qualname__") else type(obj)
        if not isinstance(getattr(obj, "__self__", None), ModuleType | NoneType):
            named = getattr  # of a bound method
        if named.__module__ and not _may_name(named.__module__, named.__qualname__):
            raise pickle.PicklingError(f"{named.__module__}.{named.__qualname__} cannot be written down")
        return NotImplemented


def _may_name(module: str, name: str) -> bool:
    return f"{module}.".startswith((*PACKAGES, "numpy.")) or name in _FOREIGN.get(module, ())


class _Unpickler(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, born: Born, moved: Callable[[Path], Path]) -> None:
        super().__init__(source)
        self._born, self._moved = born, moved

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, int):
            return self._born.objects[pid]
        return found_by(pid)

    def find_class(self, module: str, name: str) -> Any:
        if not _may_name(module, name):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")
        if (module, name) == ("pathlib", "PosixPath"):
            return lambda *parts: self._moved(Path(*parts))
        return super().find_class(module, name)


# Putting back.


def _put_elements(target: Any, elements: list[Any]) -> None:
    target.clear()
    if isinstance(target, set):
        target.update(elements)
    else:
        target.extend(elements)


def _put_entries(target: Any, entries: list[tuple[Any, Any]]) -> None:
    target.clear()
    for key, value in entries:
        target[key] = value


def _put_array(target: NDArray[Any], data: bytes) -> None:
    target.reshape(-1, order="A")[:] = np.frombuffer(data, target.dtype)


def _put_objects(target: NDArray[Any], elements: list[Any]) -> None:
    target[...] = np.array(elements, dtype=object).reshape(target.shape)


def _put_raw(target: Any, data: bytes) -> None:
    if isinstance(target, bytearray):
        target[:] = data
    else:
        del target[:]
        target.frombytes(data)


_PUT: dict[str, Callable[[Any, Any], None]] = {
    "nothing": lambda _target, _inside: None,
    "elements": _put_elements,
    "entries": _put_entries,
    "raw": _put_raw,
    "cell": set_cell,
    "array": _put_array,
    "objects": _put_objects,
    "named": fill,
    "file": lambda target, inside: fill(target, inside[1]),
}
