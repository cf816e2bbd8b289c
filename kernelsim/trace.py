# SPDX-License-Identifier: GPL-2.0-only
"""The trace of one machine: which tracepoints are on, and who is told of their hits (kernel/trace/trace.c).

Code that stands for a kernel function with a tracepoint calls `vm.trace(event, *values)`; while the event is off that
is a look into a set. Compiled loops leave rows (trace_key.py), which are taken over here before anything else is
recorded and before anybody reads, so that the order holds. Which task hit the event is `Current`'s to say.

A hit goes to the machine's own buffer and to those of its instances, each of which decides for itself whether to write
it down (trace_array.py). The tracers `function` and `function_graph` (ftrace.py) write into the machine's own.
"""

from __future__ import annotations

from typing import Any

from kernelsim import trace_key
from kernelsim.task import Current, Task
from kernelsim.timer import Clock
from kernelsim.trace_array import INSTANCE_OPTIONS, TraceArray
from kernelsim.trace_events import BY_KEY, EVENTS
from kernelsim.tracepoint import TraceEvent, Values
from kernelsim.wait import WaitQueue

MAX_CMDLINES = 128


class Trace(TraceArray):
    """One machine's trace."""

    def __init__(self, clock: Clock, nr_cpus: int, wait_queue: WaitQueue) -> None:
        super().__init__(self, clock, nr_cpus, wait_queue)
        self.current = Current()
        self.current.on_switch = self.drain
        self.arrays: list[TraceArray] = [self]
        """This one first, then the instances."""
        self.hot: frozenset[TraceEvent] = frozenset()
        """What is enabled in any of them."""
        self.cmdlines: dict[int, str] = {}
        self.max_cmdlines = MAX_CMDLINES

    def __call__(self, event: TraceEvent, *values: Any) -> None:
        """The tracepoint: record `event` wherever it is on."""
        if event in self.hot:
            self.drain()
            self._tell(event, values, self.current.task)

    def is_on(self, event: TraceEvent) -> bool:
        """Whether it is worth making up an event's values."""
        return event in self.hot

    def drain(self) -> None:
        if not trace_key.rows_waiting():
            return
        rows, lost = trace_key.take_rows()
        task = self.current.task
        if lost:
            self._count_lost(lost, task)
        for bit, *numbers in rows.tolist():
            event = BY_KEY[bit]
            if event in self.hot:  # else another machine of this process has switched it on
                self._tell(event, tuple(numbers[: len(event.fields)]), task)

    def _tell(self, event: TraceEvent, values: Values, task: Task) -> None:
        for array in self.arrays:
            if event in array.enabled:
                array.hit(event, values, task)

    def _count_lost(self, lost: int, task: Task) -> None:
        """Nobody knows of which event the rows were that found no room."""
        for array in self.arrays:
            if array is self or array.enabled:
                array.ring_buffer.rings[task.cpu].dropped += lost

    def save_cmdline(self, task: Task) -> None:
        """Remember the name of a task that is in a record (tracing_record_cmdline)."""
        if not task.pid or task.pid in self.cmdlines or not self.options["record-cmd"]:
            return
        while len(self.cmdlines) >= self.max_cmdlines:
            del self.cmdlines[next(iter(self.cmdlines))]
        self.cmdlines[task.pid] = task.comm

    def add_instance(self) -> TraceArray:
        """Another buffer that is told of every hit, with everything off."""
        array = TraceArray(self, self.clock, self.nr_cpus, self.readers, INSTANCE_OPTIONS)
        array.expand()
        self.arrays = [*self.arrays, array]
        return array

    def remove_instance(self, array: TraceArray) -> None:
        self.drain()
        self.arrays = [other for other in self.arrays if other is not array]
        self.look_at_switches()

    def look_at_switches(self) -> None:
        """After a change of what any array has enabled."""
        self.hot = frozenset().union(*(array.enabled for array in self.arrays))
        trace_key.set_key(sum(event.key for event in self.hot))


def find_events(pattern: str) -> list[TraceEvent]:
    """Events that one word of `set_event` names: `system:event`, or just one of the two; `*` or nothing stands for any.

    There are no other globs (__ftrace_set_clr_event_nolock).
    """
    system, colon, name = pattern.partition(":")
    if not colon:
        return [e for e in EVENTS if pattern in (e.name, e.system)]
    return [e for e in EVENTS if system in ("", "*", e.system) and name in ("", "*", e.name)]
