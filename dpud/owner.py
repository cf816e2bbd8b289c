# SPDX-License-Identifier: GPL-2.0-only
"""Who may touch the machine, and when.

The emulated kernel has no threads and no locks. A request (one read or write of a pseudo-file) comes in on
a FUSE thread and goes through `Owner.call`, which runs it while it holds the machine. The lock is first
come, first served, so a stream of short requests cannot starve a long one nor the other way round.

A long operation is a generator. It runs slice by slice: between two slices, at a point that the operation
itself chose by yielding, the machine is given up, and every request that queued meanwhile has its turn.
What it yields says what it waits for: None means "others may run now", a waitable is waited for without
holding the machine. The thread of the request is the one that waits, so a blocked reader blocks nobody
else.
"""

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import GeneratorType
from typing import Any

from kernelsim.attr import Changes, Operation, Waitable

_WAIT_SLICE_S = 0.05
"""How long a wait goes on before it asks again whether the request was interrupted."""

_LONE_SLICE_S = 1.0
"""The same where only `close` could interrupt it, as what runs in the background: an idle daemon should sleep."""

_log = logging.getLogger("dpud")


class FairLock:
    """A mutex that is handed over in the order of asking; not re-entrant."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._queue: deque[threading.Lock] = deque()

    def acquire(self) -> None:
        with self._guard:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._queue.append(turn)
        turn.acquire()  # released by whoever hands the lock over to us

    def release(self) -> None:
        with self._guard:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._held = False


def _never() -> bool:
    return False


class Owner:
    """Runs requests one at a time, and long ones in slices.

    The functions in `after_slice` are called at the end of every slice, while the machine is still held (the
    pacer looks there whether a timer was armed). `charge` is told who held the machine, by the name of the
    thread, and for how many nanoseconds.
    """

    def __init__(self) -> None:
        self.after_slice: list[Callable[[], None]] = []
        self.charge: Callable[[str, int], None] | None = None
        self.changes = Changes()
        """The machine's, to count its turns in."""
        self._lock = FairLock()
        self._holder: int | None = None
        self._begin_ns = 0
        self._closing = threading.Event()

    def call(self, fn: Callable[..., Any], *args: Any, interrupted: Callable[[], bool] = _never) -> Any:
        """Run `fn(*args)` as owner of the machine; drive the operation that it gives, if any, to its value.

        Raises whatever `fn` raises; OSError(EINTR) if `interrupted()` came true, or the owner was closed,
        at a point where a long operation yielded; RuntimeError if the calling thread already owns the
        machine.
        """
        self._take()
        return self._call(fn, args, interrupted)

    def look(self, fn: Callable[..., Any], *args: Any, interrupted: Callable[[], bool] = _never) -> Any:
        """The same for what only looks: such a turn is not counted as one that may have changed something."""
        self._take(changing=False)
        return self._call(fn, args, interrupted)

    def _call(self, fn: Callable[..., Any], args: tuple[Any, ...], interrupted: Callable[[], bool]) -> Any:
        over, value, operation = self._first_slice(fn, args)
        while not over:
            self._wait(operation, value, interrupted)
            with self._turn():
                over, value = _advance(operation)
        return value

    def background(self, operation: Operation[Any], name: str = "dpud-background") -> threading.Thread:
        """Drive `operation` on a thread of its own until it ends or the owner is closed; log a failure."""
        thread = threading.Thread(target=self._run_background, args=(operation,), name=name, daemon=True)
        thread.start()
        return thread

    @property
    def closed(self) -> bool:
        """Whether long operations are being interrupted."""
        return self._closing.is_set()

    def close(self) -> None:
        """Interrupt every long operation at its next yield; short requests are still served."""
        self._closing.set()

    def _run_background(self, operation: Operation[Any]) -> None:
        try:
            self.call(lambda: operation)
        except Exception as error:
            if not self.closed:
                _log.error("background operation failed", exc_info=error)

    def _first_slice(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any, Any]:
        """Call, and begin with the operation it gives -> (over, value or what it waits for, the operation).

        The machine was taken. Most requests end here, so this does the rest of what _turn() does by hand.
        """
        try:
            result = fn(*args)
            over, value = _advance(result) if isinstance(result, GeneratorType) else (True, result)
            for look in self.after_slice:
                look()
            return over, value, result
        finally:
            self._give()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._take()
        try:
            yield
            for look in self.after_slice:
                look()
        finally:
            self._give()

    def _take(self, changing: bool = True) -> None:
        me = threading.get_ident()
        if self._holder == me:
            raise RuntimeError("this thread already owns the machine: call the function directly")
        self._lock.acquire()
        self._holder = me
        if changing:
            self.changes.begin_turn()
        self._begin_ns = time.perf_counter_ns()

    def _give(self) -> None:
        if self.charge is not None:
            self.charge(threading.current_thread().name, time.perf_counter_ns() - self._begin_ns)
        self._holder = None
        self._lock.release()

    def _wait(self, operation: Operation[Any], waitable: Waitable | None, interrupted: Callable[[], bool]) -> None:
        slice_s = _LONE_SLICE_S if interrupted is _never else _WAIT_SLICE_S
        while not (self.closed or interrupted()):
            if waitable is None or waitable.wait(slice_s):
                return
        with self._turn():
            operation.close()  # its `finally` blocks put the machine right
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))


def _advance(operation: Operation[Any]) -> tuple[bool, Any]:
    """(False, what it yielded) or (True, what it returned)."""
    try:
        return False, next(operation)
    except StopIteration as stop:
        return True, stop.value
