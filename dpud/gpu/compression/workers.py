# SPDX-License-Identifier: MIT
"""Threads that share out a list of tasks with the one that has it.

The caller works too and is woken once, when all is done: with the interpreter's lock, every wake-up of a thread that
only passes results on costs the others time. For the same reason a thread is told by a queue that is written in C, and
tells by a lock: an executor's futures take twice as long, and that is the time in which nobody works.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeAlias, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Calls: TypeAlias = "SimpleQueue[tuple[Callable[[], None], threading.Lock] | None]"
"""What to call and the lock to release then; None: end."""


class Workers:
    """`nr` threads, the caller's included. They are started when they are needed first, and end with this object."""

    def __init__(self, nr: int) -> None:
        self.nr = max(nr, 1)
        self._calls: Calls = SimpleQueue()
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end, self._calls, self._threads)

    def map(self, work: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
        """`[work(task) for task in tasks]`. Raises what the first task in order raised, once all have ended."""
        results: list[R | Exception] = [RuntimeError("not done")] * len(tasks)
        waiting = deque(range(len(tasks)))

        def drain() -> None:
            _drain(work, tasks, waiting, results)

        helpers = [self._call(drain) for _ in range(self.nr - 1)]
        drain()
        for helper in helpers:
            helper.acquire()
        return [_checked(result) for result in results]

    def _call(self, call: Callable[[], None]) -> threading.Lock:
        """On some thread -> a lock that is to be had afterwards."""
        while len(self._threads) < self.nr - 1:
            thread = threading.Thread(target=_serve, args=(self._calls,), name="compress", daemon=True)
            self._threads.append(thread)
            thread.start()
        ended = threading.Lock()
        ended.acquire()
        self._calls.put((call, ended))
        return ended

    def close(self) -> None:
        """End the threads; they come back when they are needed."""
        for thread in _end(self._calls, self._threads):
            thread.join()


def _serve(calls: Calls) -> None:
    while (told := calls.get()) is not None:
        call, ended = told
        try:
            call()
        finally:
            ended.release()
        del told, call  # or what the last call held is held until the next


def _end(calls: Calls, threads: list[threading.Thread]) -> list[threading.Thread]:
    """Tell them to end -> those that were told. `threads` is empty then."""
    told = threads[:]
    threads.clear()
    for _ in told:
        calls.put(None)
    return told


def _drain(work: Callable[[T], R], tasks: Sequence[T], waiting: "deque[int]", results: list[R | Exception]) -> None:
    """Take tasks until there are none. An exception is a result: the others go on."""
    while waiting:
        try:
            index = waiting.popleft()
        except IndexError:  # another thread was faster
            return
        try:
            results[index] = work(tasks[index])
        except Exception as error:
            results[index] = error


def _checked(result: R | Exception) -> R:
    if isinstance(result, Exception):
        raise result
    return result
