# SPDX-License-Identifier: GPL-2.0-only
"""One buffer of a machine's trace and what goes into it (struct trace_array, kernel/trace/trace.h).

A machine has one of its own, trace.Trace; each directory of `instances` is another. All of them see the same hits
of tracepoints. What an array writes down is its own affair: a record is written if tracing is on, the event is enabled,
its filter passes and the task is among those wanted (`set_event_pid`).

Time is the machine's clock, read once for each record; with the clock `counter` it is the number of the record.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from kernelsim.operation import Operation
from kernelsim.ring_buffer import Record, RingBuffer
from kernelsim.task import Task
from kernelsim.timer import Clock
from kernelsim.trace_events import SYSTEMS, print_
from kernelsim.trace_filter import FilterError, Predicate, compile_filter
from kernelsim.tracepoint import TraceEvent, Values
from kernelsim.wait import WaitQueue

if TYPE_CHECKING:
    from kernelsim.trace import Trace

DEFAULT_SIZE_KB = 1408
"""Of each CPU's ring, once it is used (TRACE_BUF_SIZE_DEFAULT, in whole pages of records)."""
UNUSED_SIZE_KB = 7
MAX_SIZE_KB = 1 << 20
CLOCKS = ("local", "global", "counter", "mono", "boot")
"""All but `counter` read the machine's one clock, which starts at its boot and goes on by itself."""

OPTIONS = {
    "print-parent": True,
    "context-info": True,
    "irq-info": True,
    "overwrite": True,
    "markers": True,
    "record-cmd": True,
    "funcgraph-cpu": True,
    "funcgraph-overhead": True,
    "funcgraph-proc": False,
    "funcgraph-duration": True,
    "funcgraph-abstime": False,
    "funcgraph-tail": False,
    "funcgraph-callees": True,
}
"""What `trace_options` can switch, with defaults. All but the last are Linux's (see ftrace.py for that one)."""
INSTANCE_OPTIONS = {
    name: OPTIONS[name] for name in ("print-parent", "context-info", "irq-info", "overwrite", "markers")
}
"""Those that an instance has too: not `record-cmd`, as names of tasks are kept once, and none of function_graph."""


class TraceArray:
    """One buffer, its switches and its readers."""

    def __init__(
        self, top: Trace, clock: Clock, nr_cpus: int, wait_queue: WaitQueue, options: Mapping[str, bool] = OPTIONS
    ) -> None:
        self.top = top
        """The machine's own array, which is told of every hit."""
        self.clock = clock
        self.nr_cpus = nr_cpus
        self.readers = wait_queue
        self.ring_buffer = RingBuffer(nr_cpus, DEFAULT_SIZE_KB << 10)
        self.size_kb = [DEFAULT_SIZE_KB] * nr_cpus
        self.expanded = False
        """The rings have been used; before, a kernel gives them a page or two only."""
        self.tracing_on = True
        self.clock_name = CLOCKS[0]
        self.options = dict(options)
        self.enabled: set[TraceEvent] = set()
        self.filters: dict[TraceEvent, tuple[str, Predicate]] = {}
        self.filter_errors: dict[TraceEvent, str] = {}
        self.error_log: list[tuple[int, str, FilterError]] = []
        self.event_pids: set[int] = set()
        self.cpumask = (1 << nr_cpus) - 1
        self.nr_waiting = 0
        self.readers_woken = False
        """Whoever waits has been woken up, and nobody has gone to sleep since."""
        self._sequence = 0

    # Recording.

    def drain(self) -> None:
        """Take over what compiled loops have left."""
        self.top.drain()

    def hit(self, event: TraceEvent, values: Values, task: Task) -> None:
        """Somebody came by the tracepoint of an event that is enabled here."""
        if self.event_pids and task.pid not in self.event_pids:
            return
        wanted = self.filters.get(event)
        if wanted is None or wanted[1](values, task):
            self.record(event, values, task)

    def record(self, event: TraceEvent, values: Values, task: Task) -> None:
        """Write a record now, whatever filters say."""
        if not self.tracing_on or not self.cpumask >> task.cpu & 1:
            return
        self._sequence += 1
        entry = Record(self.now(), self._sequence, task.pid, task.cpu, event, values)
        self.ring_buffer.rings[task.cpu].write(entry, self.options["overwrite"])
        self.top.save_cmdline(task)
        if self.nr_waiting and not self.readers_woken:
            self.readers_woken = True
            self.readers.wake_up()

    def now(self) -> int:
        """The time of a record."""
        return self._sequence * 1000 if self.clock_name == "counter" else self.clock.now_ns()

    def comm_of(self, pid: int) -> str:
        """The name of a task in a record (trace_find_cmdline)."""
        return "<idle>" if pid == 0 else self.top.cmdlines.get(pid, "<...>")

    def marker(self, text: str) -> None:
        """What somebody wrote to trace_marker. OSError(EBADF): tracing is off, EINVAL: markers are."""
        if not self.options["markers"]:
            raise OSError(errno.EINVAL, "markers are off")
        if not self.tracing_on:
            raise OSError(errno.EBADF, "tracing is off")
        self.expand()
        self.drain()
        self.record(print_, ("tracing_mark_write", text), self.top.current.task)

    def wait(self, nonblock: bool) -> Operation[None]:
        """What a reader does who finds nothing. OSError(EAGAIN) for one who will not wait."""
        if nonblock:
            raise OSError(errno.EAGAIN, "nothing to read")
        self.readers_woken = False
        self.nr_waiting += 1
        try:
            yield self.readers
        finally:
            self.nr_waiting -= 1

    # Switching.

    def expand(self) -> None:
        """The rings get their size once there is something to trace."""
        self.expanded = True

    def set_enabled(self, events: Iterable[TraceEvent], on: bool) -> None:
        """Switch events."""
        self.drain()
        events = set(events)
        self.enabled = self.enabled | events if on else self.enabled - events
        if on and events:
            self.expand()
        self.top.look_at_switches()

    def set_filter(self, event: TraceEvent, source: str) -> None:
        """Take a filter, "0" for none. FilterError: it cannot be understood, and the event now has none."""
        self.drain()
        self.filters.pop(event, None)
        self.filter_errors.pop(event, None)
        if source.strip() == "0":
            return
        try:
            self.filters[event] = source, compile_filter(event, source, self.nr_cpus)
        except FilterError as error:
            self.filter_errors[event] = error.text
            self.log_error("event filter parse error", error)
            raise

    def set_system_filter(self, system: str, source: str) -> None:
        """One filter for all events of a system; those that lack a field of it say so, and have none."""
        self.drain()
        for event in SYSTEMS[system]:
            self.filters.pop(event, None)
            self.filter_errors.pop(event, None)
            if source.strip() == "0":
                continue
            try:
                self.filters[event] = source, compile_filter(event, source, self.nr_cpus)
            except FilterError as error:
                reason = "Couldn't find or set field in one of a subsystem's events"
                self.filter_errors[event] = FilterError(error.errno or errno.EINVAL, reason, source).text

    def log_error(self, what: str, error: FilterError) -> None:
        """Remember it for error_log, which has room for eight."""
        self.error_log = [*self.error_log[-7:], (self.clock.now_ns(), what, error)]

    def resize(self, size_kb: int, cpu: int | None = None) -> None:
        """Give one CPU's ring, or each, so many KiB. OSError(EINVAL) for none, ENOMEM for more than there could be."""
        if size_kb == 0:
            raise OSError(errno.EINVAL, "a ring needs room")
        if size_kb > MAX_SIZE_KB:
            raise OSError(errno.ENOMEM, "too large")
        self.expand()
        for number in range(self.nr_cpus) if cpu is None else (cpu,):
            self.size_kb[number] = size_kb
            self.ring_buffer.rings[number].resize(size_kb << 10)

    def reset(self, cpu: int | None = None) -> None:
        """Empty one ring, or all."""
        self.drain()
        self.ring_buffer.reset(cpu)

    def set_clock(self, name: str) -> None:
        """Another clock; what was recorded by the one before cannot be compared with it, and goes."""
        if name != self.clock_name:
            self.clock_name = name
            self.reset()

    def set_option(self, name: str, on: bool) -> None:
        self.drain()
        self.options[name] = on
