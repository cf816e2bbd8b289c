# SPDX-License-Identifier: GPL-2.0-only
"""Long operations: generators that give the machine away at safe points.

Theory of operation
    The core has no threads. What takes long (a compaction, a reader waiting for the next record) is a
    generator: it yields wherever the machine is consistent, so that whoever drives it may let other
    requests in. None means "others may run now", a Waitable "nothing to do before this". The generator's
    return value is the result. Closing it (GeneratorExit at a yield) is how an interrupted request ends it.
"""

from collections.abc import Generator
from typing import Any, Protocol, TypeVar

from kernelsim.wait import WaitQueue

R = TypeVar("R")

_WAIT_SLICE_S = 0.05


class Waitable(Protocol):
    """Something a long operation waits for."""

    def wait(self, timeout_s: float, /) -> bool:
        """True once it has happened, False after `timeout_s` seconds."""
        ...


Operation = Generator[Waitable | None, None, R]


def complete(operation: Operation[R]) -> R:
    """Run an operation to its end on this thread, waiting where it waits."""
    while True:
        try:
            waitable = next(operation)
        except StopIteration as stop:
            result: R = stop.value
            return result
        while waitable is not None and not waitable.wait(_WAIT_SLICE_S):
            pass


def outcome(result: Any) -> Operation[Any]:
    """The value of a hook that may have been an operation or a plain function."""
    if isinstance(result, Generator):
        return (yield from result)
    return result


class Mutex:
    """What two long operations must not do at the same time. Who waits sleeps on `waiters` until it is released."""

    def __init__(self, waiters: WaitQueue | None = None) -> None:
        self.locked = False
        self.waiters = waiters or WaitQueue()
        self.nr_acquired = 0
        """Who has it is the so-manyth."""

    def acquire(self) -> Operation[None]:
        """Wait for it; release() it in a `finally`."""
        while self.locked:
            yield self.waiters
        self.locked = True
        self.nr_acquired += 1

    def release(self) -> None:
        assert self.locked
        self.locked = False
        self.waiters.wake_up()
