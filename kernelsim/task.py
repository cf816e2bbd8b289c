# SPDX-License-Identifier: GPL-2.0-only
"""Who the machine is working for: `current`.

The emulated kernel has no threads of its own. A task here is a request (the process that reads or writes a file), a
round of a kernel thread, or, in library mode, the caller. `run_as` drives a long operation on behalf of a task: the
task is current whenever the operation runs, and not in between.

A task also has what ftrace keeps in task_struct: the stack of traced functions that it is in.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from kernelsim.operation import Operation

R = TypeVar("R")


@dataclass(eq=False)
class Call:
    """One traced function that a task is in (struct ftrace_ret_stack)."""

    function: str
    call_time_ns: int
    recorded: bool
    """Its entry went into the trace, so its return will."""
    graph_depth: int
    """How many recorded functions are around it, itself not counted."""
    in_graph: bool
    """It or one around it was asked for by name."""


@dataclass(eq=False, slots=True)
class Task:
    """Somebody the machine works for."""

    pid: int
    get_comm: Callable[[], str]
    """Its name; asked for once, and only if it is needed."""
    cpu: int = 0
    entry: str = "start_kernel"
    """The function of the real kernel in which its work begins; no function here stands for it."""
    stack: list[Call] = field(default_factory=list)
    _comm: str | None = None

    @property
    def comm(self) -> str:
        if self._comm is None:
            self._comm = self.get_comm()
        return self._comm


class Current:
    """The task at work, in `task`."""

    def __init__(self) -> None:
        self.task = self.init = Task(1, lambda: "kernelsim")
        self.on_switch: Callable[[], object] = lambda: None
        """Called before another task becomes current."""

    @contextmanager
    def as_task(self, task: Task) -> Iterator[None]:
        """Something short on behalf of `task`."""
        before, self.task = self.task, task
        try:
            yield
        finally:
            self.on_switch()
            self.task = before

    def run_as(self, task: Task, operation: Operation[R]) -> Operation[R]:
        """Drive `operation` on behalf of `task`."""
        try:
            while True:
                before, self.task = self.task, task  # as_task() by hand: every request passes here
                try:
                    waitable = next(operation)
                except StopIteration as stop:
                    result: R = stop.value
                    return result
                finally:
                    self.on_switch()
                    self.task = before
                yield waitable
        except GeneratorExit:
            with self.as_task(task):
                operation.close()
            raise
