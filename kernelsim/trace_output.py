# SPDX-License-Identifier: GPL-2.0-only
"""How records become lines of text (kernel/trace/trace_output.c, trace_functions_graph.c).

Two styles. The plain one gives each record a line with task, CPU, flags and time. The one of the tracer
function_graph draws calls as C blocks, with the time that each took, and shows all other records as comments.

The latency flags are dots: nothing here runs with interrupts off or is preempted.
"""

from collections.abc import Iterable, Iterator

from kernelsim.ring_buffer import Record, seconds
from kernelsim.trace_array import TraceArray
from kernelsim.trace_events import funcgraph_entry, funcgraph_exit, function, print_

_FLAGS = "....."
_RULE = " ------------------------------------------\n"
_INDENT = 2
_PROC_WIDTH = 14
_MARKS = ((1_000_000_000, "$"), (100_000_000, "@"), (10_000_000, "*"), (1_000_000, "#"), (100_000, "!"), (10_000, "+"))

_HEADER_WITH_FLAGS = """\
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""
_HEADER_WITHOUT_FLAGS = """\
#           TASK-PID     CPU#     TIMESTAMP  FUNCTION
#              | |         |         |         |
"""


def header(trace: TraceArray, tracer: str, cpu: int | None = None) -> str:
    """What the `trace` file begins with."""
    if tracer == "function_graph":
        return f"# tracer: {tracer}\n#\n" + _graph_header(trace)
    ring_buffer = trace.ring_buffer
    entries = f"{ring_buffer.nr_entries(cpu)}/{ring_buffer.nr_written(cpu)}"
    text = f"# tracer: {tracer}\n#\n# entries-in-buffer/entries-written: {entries}   #P:{trace.nr_cpus}\n#\n"
    if not trace.options["context-info"]:
        return text
    return text + (_HEADER_WITH_FLAGS if trace.options["irq-info"] else _HEADER_WITHOUT_FLAGS)


def _graph_header(trace: TraceArray) -> str:
    names, bars = "#", "#"
    for option, name, bar in (
        ("funcgraph-abstime", "     TIME       ", "      |         "),
        ("funcgraph-cpu", " CPU", " |  "),
        ("funcgraph-proc", "  TASK/PID       ", "   |    |        "),
        ("funcgraph-duration", "  DURATION   ", "   |   |      "),
    ):
        if trace.options[option]:
            names, bars = names + name, bars + bar
    return f"{names}               FUNCTION CALLS\n{bars}               |   |   |   |\n"


def text_of(trace: TraceArray, record: Record) -> str:
    """A record without its context: `event: text`, without a newline."""
    event, values = record.event, record.values
    if event is function:
        return f"{values[0]} <-{values[1]}" if trace.options["print-parent"] else str(values[0])
    if event is print_:
        return f"{values[0]}: {values[1]}".removesuffix("\n")
    return f"{event.name}: {event.text(values)}"


def line(trace: TraceArray, record: Record) -> str:
    """One record in the plain style."""
    if not trace.options["context-info"]:
        return f"{text_of(trace, record)}\n"
    task = f"{trace.comm_of(record.pid):>16}-{record.pid:<7} [{record.cpu:03}]"
    flags = f" {_FLAGS}" if trace.options["irq-info"] else ""
    time = f"{record.time_ns // 1000:12}" if trace.clock_name == "counter" else f" {seconds(record.time_ns)}"
    return f"{task}{flags}{time}: {text_of(trace, record)}\n"


def lines(trace: TraceArray, records: Iterable[Record]) -> Iterator[str]:
    """Records in the plain style. Calls recorded by function_graph, if any are left, are shown as records."""
    return (line(trace, record) for record in records)


class GraphWriter:
    """Draws calls. Remembers, for each CPU, whose calls it was drawing and how deep it was."""

    def __init__(self, trace: TraceArray) -> None:
        self.trace = trace
        self._last_pid: dict[int, int] = {}
        self._depth: dict[int, int] = {}
        self._drawn: dict[tuple[int, int], str] = {}  # the function last entered at a depth on a CPU
        self._width = len(str(trace.nr_cpus - 1))

    def lines(self, records: Iterable[Record]) -> Iterator[str]:
        """A call whose return follows at once on the same CPU is one line."""
        listed = list(records)
        following: list[Record | None] = [None] * len(listed)
        newest: dict[int, Record] = {}
        for at in range(len(listed) - 1, -1, -1):
            following[at] = newest.get(listed[at].cpu)
            newest[listed[at].cpu] = listed[at]
        drawn: set[int] = set()
        for record, after in zip(listed, following, strict=True):
            if record.sequence in drawn:
                continue
            if is_leaf(record, after):
                assert after is not None
                drawn.add(after.sequence)
                yield self.leaf(record, after)
            else:
                yield self.draw(record)

    def draw(self, record: Record) -> str:
        """Any record that is not drawn together with another."""
        return self.entry(record) if record.event is funcgraph_entry else self.other(record)

    def leaf(self, entry: Record, back: Record) -> str:
        """`f();` and what it took."""
        name, depth = _call(entry)
        took_ns = back.values[4] - back.values[3]
        self._depth[entry.cpu] = depth - 1
        return self._prologue(entry) + self._duration(took_ns) + " " * (depth * _INDENT) + f"{name}();\n"

    def entry(self, record: Record) -> str:
        """`f() {`."""
        name, depth = _call(record)
        self._depth[record.cpu] = depth
        self._drawn[record.cpu, depth] = name
        return self._prologue(record) + self._blank() + " " * (depth * _INDENT) + f"{name}() {{\n"

    def other(self, record: Record) -> str:
        """A return that stands alone, or a comment."""
        if record.event is funcgraph_exit:
            return self._return(record)
        depth = self._depth.get(record.cpu, -1)
        indent = " " * ((depth + 1) * _INDENT) if depth > 0 else ""
        return self._prologue(record) + self._blank() + indent + f"/* {text_of(self.trace, record)} */\n"

    def _return(self, record: Record) -> str:
        (name, depth), (call_ns, return_ns) = _call(record), record.values[3:]
        self._depth[record.cpu] = depth - 1
        lost = self._drawn.pop((record.cpu, depth), None) != name  # its entry is no longer in the ring
        tail = f" /* {name} */" if lost or self.trace.options["funcgraph-tail"] else ""
        return (
            self._prologue(record) + self._duration(return_ns - call_ns) + " " * (depth * _INDENT) + "}" + tail + "\n"
        )

    # What stands before the code.

    def _prologue(self, record: Record) -> str:
        options, text = self.trace.options, self._switch(record)
        if options["funcgraph-abstime"]:
            text += f"{seconds(record.time_ns)} |  "
        if options["funcgraph-cpu"]:
            text += self._cpu(record.cpu)
        if options["funcgraph-proc"]:
            text += f"{self._proc(record.pid)} | "
        return text

    def _switch(self, record: Record) -> str:
        """A block that says that another task's calls begin."""
        cpu, pid = record.cpu, record.pid
        before, self._last_pid[cpu] = self._last_pid.get(cpu), pid
        if before is None or before == pid:
            return ""
        return f"{_RULE}{self._cpu(cpu)}{self._proc(before)} => {self._proc(pid)}\n{_RULE}\n"

    def _cpu(self, cpu: int) -> str:
        return f" {cpu:{self._width}}) "

    def _proc(self, pid: int) -> str:
        text = f"{self.trace.comm_of(pid)[:7]}-{pid}"
        spaces = max(_PROC_WIDTH - len(text), 0)
        return " " * (spaces // 2) + text + " " * (spaces - spaces // 2)

    def _blank(self) -> str:
        if not self.trace.options["funcgraph-duration"] or not self.trace.options["context-info"]:
            return ""
        return " " * 14 + "|  "

    def _duration(self, took_ns: int) -> str:
        options = self.trace.options
        if not options["funcgraph-duration"] or not options["context-info"]:
            return ""
        mark = next((mark for limit, mark in _MARKS if took_ns > limit), " ") if options["funcgraph-overhead"] else " "
        return f"{mark} {duration(took_ns)}|  "


def _call(record: Record) -> tuple[str, int]:
    """Function and depth of a funcgraph record."""
    name: str = record.values[0]
    depth: int = record.values[1]
    return name, depth


def is_leaf(record: Record, after: Record | None) -> bool:
    """A call, and its return is the next thing that happened on its CPU."""
    return (
        after is not None
        and record.event is funcgraph_entry
        and after.event is funcgraph_exit
        and after.pid == record.pid
        and after.values[:2] == record.values[:2]
    )


def duration(took_ns: int) -> str:
    """Microseconds in 8 columns, as many of the three decimals as there is room for (trace_print_graph_duration)."""
    whole, rest = divmod(took_ns, 1000)
    text = str(whole)
    if len(text) < 7:
        text += "." + f"{rest:03}"[: min(3, 7 - len(text))]
    return f"{text} us " + " " * max(8 - len(text), 0)
