# SPDX-License-Identifier: MIT
"""Threads that share out a list of tasks with the one that has it.

The caller works too and is woken once, when all is done: with the interpreter's lock, every wake-up of a thread that
only passes results on costs the others time.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """`nr` threads, the caller's included. They are started when they are needed first."""

    def __init__(self, nr: int) -> None:
        self.nr = max(nr, 1)
        self._executor: ThreadPoolExecutor | None = None

    def map(self, work: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
        """`[work(task) for task in tasks]`. Raises what the first task in order raised, once all have ended."""
        results: list[R | Exception] = [RuntimeError("not done")] * len(tasks)
        waiting = deque(range(len(tasks)))
        helpers = [self._threads().submit(_drain, work, tasks, waiting, results) for _ in range(self.nr - 1)]
        _drain(work, tasks, waiting, results)
        for helper in helpers:
            helper.result()
        return [_checked(result) for result in results]

    def _threads(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.nr - 1, thread_name_prefix="compress")
        return self._executor

    def close(self) -> None:
        """End the threads; they come back when they are needed."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None


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
