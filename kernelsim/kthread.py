# SPDX-License-Identifier: GPL-2.0-only
"""Kernel threads: what the machine does on its own (kswapd, kcompactd), and who runs it.

A thread here is a timer and, when that is due, one round of work. A round is a long operation like a request's, so it
gives the machine away at its yields and never keeps a file from being read. The machine starts the rounds that are due
in step() and hands them to `spawn`: a daemon drives each on a thread of its own through the owner; library code, which
has no threads, runs it to its end at once, so that the same inputs give the same state.

A thread has one round at a time. A wake-up during a round is not lost: the next one begins when this one is over.
"""

from collections.abc import Callable, Sequence

from kernelsim.mm_types import LongOp
from kernelsim.operation import complete
from kernelsim.task import Current, Task

Spawn = Callable[[LongOp, str], object]
"""(round, thread name): see that the operation gets run."""


def run_at_once(operation: LongOp, _name: str) -> None:
    """Spawn for those without threads."""
    complete(operation)


class Kthread:
    """One thread. Subclasses say when they want to run (`due_ns`) and what they do then (`work`)."""

    def __init__(self, name: str, nid: int) -> None:
        self.name = name
        self.nid = nid
        self.task = Task(0, lambda: name, entry="kthread")
        self.running = False
        self.nr_rounds = 0

    def due_ns(self, now_ns: int) -> int | None:
        """When the next round is due; None: not before somebody wakes the thread. Must be cheap."""
        raise NotImplementedError

    def work(self, now_ns: int) -> LongOp | None:
        """What to do now that it is due; None: nothing that takes time. Sets the next due time."""
        raise NotImplementedError


class Kthreads:
    """All threads of one machine."""

    def __init__(self, threads: Sequence[Kthread], spawn: Spawn = run_at_once, current: Current | None = None) -> None:
        self.threads = list(threads)
        self.spawn = spawn
        self._current = current or Current()

    def peek(self, now_ns: int) -> int | None:
        """When the next thread wants to run."""
        due = [thread.due_ns(now_ns) for thread in self.threads if not thread.running]
        return min((ns for ns in due if ns is not None), default=None)

    def step(self, now_ns: int) -> frozenset[str] | None:
        """Start a round of every thread that is due -> those that found nothing to do, None if one did."""
        idle, nr_started = set(), 0
        for thread in self.threads:
            due_ns = None if thread.running else thread.due_ns(now_ns)
            if due_ns is not None and due_ns <= now_ns:
                with self._current.as_task(thread.task):
                    work = thread.work(now_ns)
                idle.add(thread.name)
                if work is not None:
                    nr_started += 1
                    thread.running = True
                    self.spawn(self._current.run_as(thread.task, _round(thread, work)), thread.name)
        return None if nr_started else frozenset(idle)


def _round(thread: Kthread, work: LongOp) -> LongOp:
    try:
        thread.nr_rounds += 1
        yield from work
    finally:
        thread.running = False
