# SPDX-License-Identifier: GPL-2.0-only
"""What pickle does not know, or not well enough: how to make it again (object.__reduce__).

functions   made in another function: by the place of their code, and what they enclose
arrays      that show another's bytes: by whose, and how
mappings    private and anonymous: by the pages that are populated
errors      whose class is made with other arguments than it hands on: by what it handed on, and their attributes
the rest    bound methods, cells of closures, weak dictionaries, wait queues, pools of threads, locks: anew
"""

import importlib
import importlib.util
import mmap
import pickle
import threading
from collections.abc import Callable
from functools import cache
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dpud.checkpoint_born import PACKAGES, contents_of, owner_of
from dpud.checkpoint_memory import address_of, pieces
from dpud.gpu.compression.workers import Workers
from dpud.inject import BlockingWaitQueue
from dpud.physmem import MAP_NORESERVE

_LOCK = type(threading.Lock())


def resolve(module: str, qualname: str) -> Any:
    """What a module has of that name. Raises AttributeError, ImportError."""
    value: Any = importlib.import_module(module)
    for name in qualname.split("."):
        value = getattr(value, name)
    return value


def _reduce_function(function: FunctionType) -> Any:
    try:
        if resolve(function.__module__, function.__qualname__) is function:
            return NotImplemented
    except (AttributeError, ImportError):
        pass  # it was made in a function
    if not f"{function.__module__}.".startswith(PACKAGES):
        raise pickle.PicklingError(f"a function of {function.__module__}")
    code, module = function.__code__, function.__globals__["__name__"]
    alike = _codes(module).get(code.co_qualname, [])
    if code not in alike:
        raise pickle.PicklingError(f"{module}.{code.co_qualname} is not in the file that it was loaded from")
    where = module, code.co_qualname, alike.index(code)
    looks = (function.__name__, function.__qualname__, function.__module__)
    made = (where, looks, function.__closure__, function.__defaults__, function.__kwdefaults__)
    return make_function, made, function.__dict__ or None


def make_function(
    where: tuple[str, str, int],
    looks: tuple[str, str, str],
    closure: tuple[CellType, ...] | None,
    defaults: tuple[Any, ...] | None,
    kwdefaults: dict[str, Any] | None,
) -> FunctionType:
    """A function that was made in another, from the place of its code and what it encloses."""
    module = importlib.import_module(where[0])
    code = _codes(where[0])[where[1]][where[2]]
    function = FunctionType(code, vars(module), looks[0], defaults, closure)
    function.__qualname__, function.__module__ = looks[1], looks[2]
    function.__kwdefaults__ = kwdefaults
    return function


@cache
def _codes(module: str) -> dict[str, list[CodeType]]:
    """Every piece of code of a module, by name."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    pending: list[CodeType] = [cast(Any, spec.loader).get_code(module)]
    found: dict[str, list[CodeType]] = {}
    while pending:
        code = pending.pop()
        found.setdefault(code.co_qualname, []).append(code)
        pending += [const for const in code.co_consts if isinstance(const, CodeType)]
    return found


def set_cell(cell: CellType, inside: tuple[Any, ...]) -> None:
    """What a closure's cell holds, if anything."""
    if inside:
        cell.cell_contents = inside[0]
    elif contents_of(cell):
        del cell.cell_contents


def make_cell() -> CellType:
    return CellType()


def _reduce_array(array: NDArray[Any]) -> Any:
    owner = owner_of(array)
    if owner is array or array.dtype.hasobject or not array.size:
        return NotImplemented
    if not isinstance(owner, np.ndarray | mmap.mmap | bytearray):
        return NotImplemented
    offset = address_of(array) - address_of(owner)
    return make_view, (owner, array.dtype, array.shape, array.strides, offset, array.flags.writeable)


def make_view(
    owner: Any, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...], offset: int, writable: bool
) -> NDArray[Any]:
    """An array over another's bytes."""
    raw: NDArray[Any] = (
        owner.reshape(-1, order="A").view(np.uint8) if isinstance(owner, np.ndarray) else np.frombuffer(owner, np.uint8)
    )
    array: NDArray[Any] = np.ndarray(shape, dtype, raw, offset, strides)
    array.flags.writeable = writable
    return array


def make_memory(array: NDArray[Any]) -> memoryview:
    return memoryview(cast(Any, array))


def _reduce_mapping(mapping: mmap.mmap) -> Any:
    return make_mapping, (len(mapping), list(pieces(address_of(mapping), len(mapping))))


def make_mapping(size: int, filled: list[tuple[int, bytes]]) -> mmap.mmap:
    """A private anonymous mapping with these pieces in it."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    for offset, data in filled:
        mapping[offset : offset + len(data)] = data
    return mapping


def _reduce_weak_dict(found: "WeakKeyDictionary[Any, Any]") -> Any:
    return WeakKeyDictionary, (), None, None, iter(list(found.items()))


def reduce_error(error: Exception) -> Any:
    return make_error, (type(error), error.args), vars(error) or None


def make_error(kind: type[Exception], args: tuple[Any, ...]) -> Exception:
    """One with these `args`, without its class's own way of making it."""
    if not issubclass(kind, Exception):
        raise pickle.UnpicklingError(f"{kind.__qualname__} is no error")
    error = kind.__new__(kind, *args)
    (OSError if issubclass(kind, OSError) else Exception).__init__(error, *args)
    return error


def make_lock() -> Any:
    return threading.Lock()


def make_method(function: Any, instance: Any) -> MethodType:
    return MethodType(function, instance)


REDUCE: dict[type, Callable[[Any], Any]] = {
    FunctionType: _reduce_function,
    MethodType: lambda method: (make_method, (method.__func__, method.__self__)),
    CellType: lambda cell: (make_cell, (), contents_of(cell), None, None, set_cell),
    np.ndarray: _reduce_array,
    memoryview: lambda view: (make_memory, (np.asarray(view),)),
    mmap.mmap: _reduce_mapping,
    WeakKeyDictionary: _reduce_weak_dict,
    BlockingWaitQueue: lambda _queue: (BlockingWaitQueue, ()),
    Workers: lambda workers: (Workers, (workers.nr,)),
    _LOCK: lambda _lock: (make_lock, ()),
}
