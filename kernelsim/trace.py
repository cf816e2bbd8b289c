# SPDX-License-Identifier: GPL-2.0-only
"""The trace of one machine: which events are on, where their records go, who reads them (kernel/trace/trace.c).

Code that stands for a kernel function with a tracepoint calls `vm.trace(event, *values)`; while the event is off that
is a look into a set. Compiled loops leave rows (trace_key.py), which are taken over here before anything else is
recorded and before anybody reads, so that the order holds. Which task hit the event is `Current`'s to say.

A record is written if tracing is on, the event is enabled, its filter passes and the task is among those wanted
(`set_event_pid`). The tracers `function` and `function_graph` (ftrace.py) write their records through `record`.

Time is the machine's clock, read once for each record; with the clock `counter` it is the number of the record.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

from kernelsim import trace_key
from kernelsim.glob import Glob
from kernelsim.operation import Operation
from kernelsim.ring_buffer import Record, RingBuffer
from kernelsim.task import Current, Task
from kernelsim.timer import Clock
from kernelsim.trace_events import BY_KEY, EVENTS, SYSTEMS, print_
from kernelsim.trace_filter import FilterError, Predicate, compile_filter
from kernelsim.tracepoint import TraceEvent, Values
from kernelsim.wait import WaitQueue

DEFAULT_SIZE_KB = 1408
"""Of each CPU's ring, once it is used (TRACE_BUF_SIZE_DEFAULT, in whole pages of records)."""
UNUSED_SIZE_KB = 7
MAX_SIZE_KB = 1 << 20
CLOCKS = ("local", "global", "counter", "mono", "boot")
"""All but `counter` read the machine's one clock, which starts at its boot and goes on by itself."""
MAX_CMDLINES = 128

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


class Trace:
    """One machine's trace."""

    def __init__(self, clock: Clock, nr_cpus: int, wait_queue: WaitQueue) -> None:
        self.clock = clock
        self.nr_cpus = nr_cpus
        self.readers = wait_queue
        self.current = Current()
        self.current.on_switch = self.drain
        self.ring_buffer = RingBuffer(nr_cpus, DEFAULT_SIZE_KB << 10)
        self.size_kb = [DEFAULT_SIZE_KB] * nr_cpus
        self.expanded = False
        """The rings have been used; before, a kernel gives them a page or two only."""
        self.tracing_on = True
        self.clock_name = CLOCKS[0]
        self.options = dict(OPTIONS)
        self.enabled: set[TraceEvent] = set()
        self.filters: dict[TraceEvent, tuple[str, Predicate]] = {}
        self.filter_errors: dict[TraceEvent, str] = {}
        self.error_log: list[tuple[int, str, FilterError]] = []
        self.event_pids: set[int] = set()
        self.cmdlines: dict[int, str] = {}
        self.max_cmdlines = MAX_CMDLINES
        self.cpumask = (1 << nr_cpus) - 1
        self.nr_waiting = 0
        self.readers_woken = False
        """Whoever waits has been woken up, and nobody has gone to sleep since."""
        self._sequence = 0

    # Recording.

    def __call__(self, event: TraceEvent, *values: Any) -> None:
        """The tracepoint: record `event` if it is on."""
        if event in self.enabled:
            self.drain()
            self._hit(event, values, self.current.task)

    def is_on(self, event: TraceEvent) -> bool:
        """Whether it is worth making up an event's values."""
        return event in self.enabled

    def drain(self) -> None:
        """Take over what compiled loops have left."""
        if not trace_key.rows_waiting():
            return
        rows, lost = trace_key.take_rows()
        task = self.current.task
        if lost:
            self.ring_buffer.rings[task.cpu].dropped += lost
        for bit, *numbers in rows.tolist():
            event = BY_KEY[bit]
            if event in self.enabled:  # else another machine of this process has switched it on
                self._hit(event, tuple(numbers[: len(event.fields)]), task)

    def _hit(self, event: TraceEvent, values: Values, task: Task) -> None:
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
        if self.options["record-cmd"] and task.pid not in self.cmdlines:
            self._save_cmdline(task)
        if self.nr_waiting and not self.readers_woken:
            self.readers_woken = True
            self.readers.wake_up()

    def now(self) -> int:
        """The time of a record."""
        return self._sequence * 1000 if self.clock_name == "counter" else self.clock.now_ns()

    def _save_cmdline(self, task: Task) -> None:
        if task.pid:
            while len(self.cmdlines) >= self.max_cmdlines:
                del self.cmdlines[next(iter(self.cmdlines))]
            self.cmdlines[task.pid] = task.comm

    def comm_of(self, pid: int) -> str:
        """The name of a task in a record (trace_find_cmdline)."""
        return "<idle>" if pid == 0 else self.cmdlines.get(pid, "<...>")

    def marker(self, text: str) -> None:
        """What somebody wrote to trace_marker. OSError(EBADF): tracing is off, EINVAL: markers are."""
        if not self.options["markers"]:
            raise OSError(errno.EINVAL, "markers are off")
        if not self.tracing_on:
            raise OSError(errno.EBADF, "tracing is off")
        self.expand()
        self.drain()
        self.record(print_, ("tracing_mark_write", text), self.current.task)

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
        self._set_key()

    def _set_key(self) -> None:
        trace_key.set_key(sum(event.key for event in self.enabled))

    def set_filter(self, event: TraceEvent, source: str) -> None:
        """Take a filter, "0" for none. FilterError: it cannot be understood, and the event now has none."""
        self.drain()
        self.filters.pop(event, None)
        self.filter_errors.pop(event, None)
        if source.strip() == "0":
            return
        try:
            self.filters[event] = source, compile_filter(event, source)
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
                self.filters[event] = source, compile_filter(event, source)
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


def find_events(pattern: str) -> list[TraceEvent]:
    """Events that one word of `set_event` names: `system:event`, `event`, either a glob, `system:` for all of one."""
    system, colon, name = pattern.partition(":")
    if not colon:
        either = Glob(pattern)
        return [e for e in EVENTS if either.matches(e.name) or either.matches(e.system)]
    of_system, of_name = Glob(system or "*"), Glob(name or "*")
    return [e for e in EVENTS if of_system.matches(e.system) and of_name.matches(e.name)]
