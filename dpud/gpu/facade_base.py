# SPDX-License-Identifier: MIT
"""Conventions of the C names.

A C function that returns int returns 0, or -1 with the reason in `last_error()`. One that returns a pointer returns an
address, or None. Out-parameters are `Ref` boxes. One program, one memory: `the_memory` is what the init functions made.
"""

import errno
import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

from dpud.gpu.errors import GpuError
from dpud.gpu.memory import GpuMemory

P = ParamSpec("P")
T = TypeVar("T")

CLIENT = "facade"
"""The C program: there is one, and it has no name of its own."""


class Ref(Generic[T]):
    """`T *out`."""

    def __init__(self, value: T | None = None) -> None:
        self.value = value


class _Program:
    """What a C library keeps in static variables."""

    last_error = 0
    memory: GpuMemory | None = None


behind: dict[str, Any] = {}
"""Constructor arguments of GpuMemory (codec, pool, swap, new_policy, prefetcher, admission) that others have made."""


attachments: dict[str, Callable[[GpuMemory], None]] = {}
"""By module: who is to be told of a memory that is made after them."""


def last_error() -> int:
    """errno of the last call that failed."""
    return _Program.last_error


def the_memory() -> GpuMemory:
    """Raises GpuError(ENODEV) where no init function has been called."""
    if _Program.memory is None:
        raise GpuError(errno.ENODEV, "nothing is initialized")
    return _Program.memory


def has_memory() -> bool:
    return _Program.memory is not None


def use_memory(memory: GpuMemory | None) -> None:
    """What the next calls work on; None after cleanup."""
    _Program.memory = memory
    if memory is not None:
        for attach in attachments.values():
            attach(memory)


def c_int(function: Callable[P, object]) -> Callable[P, int]:
    """0, or -1 and an errno."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            function(*args, **kwargs)
        except OSError as error:
            _Program.last_error = error.errno or errno.EIO
            return -1
        return 0

    return called


def c_pointer(function: Callable[P, T]) -> Callable[P, T | None]:
    """What it returns, or None and an errno."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            _Program.last_error = error.errno or errno.EIO
            return None

    return called
