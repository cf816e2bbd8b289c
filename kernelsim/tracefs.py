# SPDX-License-Identifier: GPL-2.0-only
"""/sys/kernel/tracing: the files of one machine's trace, and what each buffer of it has (tracefs_instance.py).

Modes, grammars and error numbers are those of a 6.18 kernel (reference: the running kernel and kernel/trace/trace.c).
Numbers are decimal here, without a prefix, as kstrtoul(..., 10) takes them. `>` before a write is part of the meaning
of some files: it empties `trace`, `set_event` and the function lists, to which `>>` adds.

Files of events are in tracefs_events.py, those of function tracing in tracefs_ftrace.py.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from kernelsim import trace_output
from kernelsim.attr import Attr, Flavour, Int, Kobject, Stream, Text
from kernelsim.cpulist import parse_cpumask
from kernelsim.ftrace import TRACERS, Ftrace
from kernelsim.kinds import consumed, einval, parse_kstrto
from kernelsim.operation import Operation
from kernelsim.ring_buffer import Record, seconds
from kernelsim.trace import Trace
from kernelsim.trace_array import CLOCKS, INSTANCE_OPTIONS, OPTIONS, UNUSED_SIZE_KB, TraceArray
from kernelsim.trace_output import GraphWriter, is_leaf
from kernelsim.trace_raw import PAGE_BYTES, Symbols, take_page

TRACEFS = "/sys/kernel/tracing"
MARKER_MAX_BYTES = 4054
"""Of one write: what fits a page of the ring with all headers (seen on a 6.18 kernel); the rest is another write's."""
SLICE_LINES = 1000  # a few milliseconds of formatting
ULONG_MAX = 2**64 - 1
_READ_WRITE, _READ, _WRITE = 0o640, 0o440, 0o220


class Decimal(Int):
    """A number as kstrtoul(..., 10) takes it."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[int, int]:
        value = parse_kstrto(data, 10, signed=False)
        if value > ULONG_MAX:
            raise OSError(errno.ERANGE, "more than 64 bits")
        self.check(value)
        return value, len(data)

    def describe(self) -> str:
        return "0 or more" if self.hi == ULONG_MAX else super().describe()

    def illegal(self) -> tuple[str, ...]:
        illegal = (text for text in super().illegal() if text.strip() != str(ULONG_MAX + 1))  # ERANGE
        return *illegal, "0x1", " 1 ", "+-1"


class Switch(Decimal):
    """0 or 1."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def describe(self) -> str:
        return "0 or 1"


def anything_but_0() -> Decimal:
    """A number of which only matters whether it is 0."""
    return Decimal(0, ULONG_MAX)


class Pipe:
    """A consuming reader: records go out as lines, and are gone."""

    def __init__(self, trace: TraceArray, ftrace: Ftrace, cpu: int | None) -> None:
        self.trace = trace
        self.ftrace = ftrace
        self.cpu = cpu
        self._graph = GraphWriter(trace)
        self._rest = b""  # of a line that did not fit a reader's buffer

    def read(self, pos: int, size: int, nonblock: bool) -> Operation[bytes]:
        """Whole lines as far as `size` goes, waiting for the first; b"" once tracing is off, for who has read some."""
        while True:
            self.trace.drain()
            data = self._take(size)
            if data:
                return data
            if not self.trace.tracing_on and pos:
                return b""
            yield from self.trace.wait(nonblock)

    def _take(self, size: int) -> bytes:
        data = self._rest
        while len(data) < size:
            record = self.trace.ring_buffer.pop(self.cpu)
            if record is None:
                break
            text = self._draw(record).encode("utf-8", "surrogateescape")
            if data and len(data) + len(text) > size:
                self._rest = text
                return data
            data += text
        self._rest = data[size:]
        return data[:size]

    def _draw(self, record: Record) -> str:
        if self.ftrace.current_tracer != "function_graph":
            return trace_output.line(self.trace, record)
        ring = self.trace.ring_buffer.rings[record.cpu]
        after = ring.records[0] if ring.records else None
        if is_leaf(record, after):
            return self._graph.leaf(record, ring.consume())
        return self._graph.draw(record)


class TraceFiles(Kobject):
    """`trace` and `trace_pipe`, of all CPUs or of one."""

    trace = Attr(Text(), mode=_READ_WRITE, doc="The records, in order of time; reading leaves them. `>` empties it.")
    trace_pipe = Attr(consumed(Stream()), mode=_READ, doc="The same, consumed as they are read; waits for more.")

    def __init__(self, trace: TraceArray, ftrace: Ftrace, cpu: int | None = None) -> None:
        self._trace = trace
        self._ftrace = ftrace
        self._cpu = cpu
        self._pipe = Pipe(trace, ftrace, cpu)

    @trace.show
    def _trace_show(self) -> Operation[str]:
        trace, tracer = self._trace, self._ftrace.current_tracer
        trace.drain()
        records = list(trace.ring_buffer.snapshot(self._cpu))
        text = [trace_output.header(trace, tracer, self._cpu)]
        lines = GraphWriter(trace).lines(records) if tracer == "function_graph" else trace_output.lines(trace, records)
        for line in lines:
            text.append(line)
            if len(text) % SLICE_LINES == 0:
                yield None
        return "".join(text)

    @trace.store
    def _ignore(self, _text: str) -> None:
        """What is written does not matter; opening it with O_TRUNC did."""

    @trace.truncate
    def _clear(self) -> None:
        self._trace.reset(self._cpu)

    @trace_pipe.read
    def _read_pipe(self, pos: int, size: int, nonblock: bool) -> Operation[bytes]:
        return (yield from self._pipe.read(pos, size, nonblock))


class RawPipe(Kobject):
    """`per_cpu/cpuN/trace_pipe_raw`."""

    trace_pipe_raw = Attr(
        consumed(Stream()), mode=_READ, doc="Records as binary pages, consumed; a page a read, waits for one."
    )

    def __init__(self, trace: TraceArray, symbols: Symbols, cpu: int) -> None:
        self._trace = trace
        self._symbols = symbols
        self._ring = trace.ring_buffer.rings[cpu]

    @trace_pipe_raw.read
    def _read_page(self, _pos: int, size: int, nonblock: bool) -> Operation[bytes]:
        if size < PAGE_BYTES:
            raise einval("less than a page")
        while True:
            self._trace.drain()
            page = take_page(self._ring, self._symbols)
            if page:
                return page
            yield from self._trace.wait(nonblock)


class BufferSize(Kobject):
    """`buffer_size_kb`, of each CPU or of one."""

    buffer_size_kb = Attr(Decimal(1, ULONG_MAX), mode=_READ_WRITE, doc="Room for records on each CPU, in KiB.")

    def __init__(self, trace: TraceArray, cpu: int | None = None) -> None:
        self._trace = trace
        self._cpu = cpu

    @buffer_size_kb.show
    def _size_show(self) -> str:
        trace = self._trace
        sizes = set(trace.size_kb if self._cpu is None else [trace.size_kb[self._cpu]])
        if len(sizes) > 1:
            return "X"
        return str(*sizes) if trace.expanded else f"{UNUSED_SIZE_KB} (expanded: {sizes.pop()})"

    @buffer_size_kb.store
    def _size_store(self, size_kb: int) -> None:
        self._trace.resize(size_kb, self._cpu)


class CpuStats(Kobject):
    """`per_cpu/cpuN/stats`."""

    stats = Attr(Text(), mode=_READ, doc="What is in this CPU's ring, what went through it, what was lost.")

    def __init__(self, trace: TraceArray, cpu: int) -> None:
        self._trace = trace
        self._ring = trace.ring_buffer.rings[cpu]

    @stats.show
    def _stats(self) -> str:
        self._trace.drain()
        return self._ring.stats(self._trace.clock.now_ns())


class CpuDir(RawPipe, CpuStats, BufferSize, TraceFiles):
    """`per_cpu/cpuN`."""

    def __init__(self, trace: TraceArray, ftrace: Ftrace, symbols: Symbols, cpu: int) -> None:
        TraceFiles.__init__(self, trace, ftrace, cpu)
        BufferSize.__init__(self, trace, cpu)
        CpuStats.__init__(self, trace, cpu)
        RawPipe.__init__(self, trace, symbols, cpu)


class OptionsDir(Kobject):
    """`options/`, with a file for each; see `_options_dir`."""

    def __init__(self, trace: TraceArray) -> None:
        self._trace = trace


def _option(name: str) -> Attr[int]:
    attr = Attr(Switch(), mode=_READ_WRITE, name=name, doc=f"The option `{name}` of trace_options.")

    def show(options: OptionsDir) -> str:
        return str(int(options._trace.options[name]))

    def put(options: OptionsDir, value: int) -> None:
        options._trace.set_option(name, bool(value))

    attr.show(show)
    attr.store(put)
    return attr


def _options_dir(kind: str, names: Iterable[str]) -> type[OptionsDir]:
    """A class of that name with an attribute for each option."""
    attrs = {name.replace("-", "_"): _option(name) for name in names}
    return type(kind, (OptionsDir,), {"__module__": __name__, **attrs})


TraceOptions = _options_dir("TraceOptions", OPTIONS)
InstanceOptions = _options_dir("InstanceOptions", INSTANCE_OPTIONS)


class ArrayControl(Kobject):
    """The files that each buffer has once."""

    tracing_on = Attr(anything_but_0(), mode=0o640, doc="0: nothing is recorded; what was stays.")
    current_tracer = Attr(Text(), mode=_READ_WRITE, doc=f"What is traced besides events: {', '.join(TRACERS)}.")
    available_tracers = Attr(Text(), mode=_READ, doc="The tracers that can be chosen.")
    buffer_total_size_kb = Attr(Text(), mode=_READ, doc="Room for records on all CPUs, in KiB.")
    trace_clock = Attr(Text(), mode=_READ_WRITE, doc="What records are stamped with; another clock empties the trace.")
    timestamp_mode = Attr(Text(), mode=_READ, doc="How stamps are kept: each whole.")
    trace_options = Attr(Text(), mode=_READ_WRITE, doc="Options, one a line; `noNAME` switches one off.")
    trace_marker = Attr(Stream(), mode=_WRITE, doc="What is written becomes a record.")
    tracing_cpumask = Attr(Text(), mode=_READ_WRITE, doc="The CPUs that are traced, as a hexadecimal mask.")
    error_log = Attr(Text(), mode=_READ_WRITE, doc="What was wrong with the last commands; `>` empties it.")

    def __init__(self, trace: TraceArray, ftrace: Ftrace) -> None:
        self._trace = trace
        self._ftrace = ftrace

    @tracing_on.show
    def _tracing_on_show(self) -> str:
        return str(int(self._trace.tracing_on))

    @tracing_on.store
    def _tracing_on_store(self, value: int) -> None:
        self._trace.drain()
        self._trace.tracing_on = bool(value)
        self._trace.readers.wake_up()

    @current_tracer.show
    def _current_tracer_show(self) -> str:
        return self._ftrace.current_tracer

    @current_tracer.store
    def _current_tracer_store(self, text: str) -> None:
        self._ftrace.select(text.strip())

    @available_tracers.show
    def _available_tracers(self) -> str:
        return " ".join(self._ftrace.available)

    @buffer_total_size_kb.show
    def _buffer_total_size_kb(self) -> str:
        trace = self._trace
        total = sum(trace.size_kb)
        return str(total) if trace.expanded else f"{UNUSED_SIZE_KB * trace.nr_cpus} (expanded: {total})"

    @trace_clock.show
    def _trace_clock_show(self) -> str:
        return " ".join(f"[{name}]" if name == self._trace.clock_name else name for name in CLOCKS)

    @trace_clock.store
    def _trace_clock_store(self, text: str) -> None:
        if text.strip() not in CLOCKS:
            raise einval("no such clock")
        self._trace.set_clock(text.strip())

    @timestamp_mode.show
    def _timestamp_mode(self) -> str:
        return "delta [absolute]"

    @trace_options.show
    def _trace_options_show(self) -> str:
        return "".join(f"{'' if on else 'no'}{name}\n" for name, on in self._trace.options.items())

    @trace_options.store
    def _trace_options_store(self, text: str) -> None:
        word = text.strip()
        name = word if word in self._trace.options else word.removeprefix("no")
        if name not in self._trace.options:
            raise einval("no such option")
        self._trace.set_option(name, name == word)

    @trace_marker.write
    def _trace_marker(self, data: bytes) -> int:
        taken = data[:MARKER_MAX_BYTES]
        text = taken.partition(b"\0")[0].decode("utf-8", "surrogateescape")  # it is printed as a string of C
        self._trace.marker(text if text.endswith("\n") else text + "\n")
        return len(taken)

    @tracing_cpumask.show
    def _cpumask_show(self) -> str:
        width = -(-self._trace.nr_cpus // 4)
        return f"{self._trace.cpumask:0{width}x}"

    @tracing_cpumask.store
    def _cpumask_store(self, text: str) -> None:
        mask = parse_cpumask(text, self._trace.nr_cpus)
        self._trace.drain()
        self._trace.cpumask = mask

    @error_log.show
    def _error_log(self) -> str:
        return "".join(
            f"[{seconds(time_ns)}] {what}: error: {error.reason or 'Error'}\n"
            f"  Command: {error.source}\n{'':11}{'':{error.at}}^\n"
            for time_ns, what, error in self._trace.error_log
        )

    @error_log.store
    def _error_log_store(self, _text: str) -> None:
        self._trace.error_log = []

    @error_log.truncate
    def _error_log_clear(self) -> None:
        self._trace.error_log = []


class TraceControl(Kobject):
    """The files that are there once."""

    saved_cmdlines = Attr(Text(), mode=_READ, doc="Names of the tasks in the trace, by pid.")
    saved_cmdlines_size = Attr(Decimal(1, 32768), mode=_READ_WRITE, doc="How many of them are kept.")
    README = Attr(Text(), mode=_READ, doc="What the files are for.")

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    @saved_cmdlines.show
    def _saved_cmdlines(self) -> str:
        return "".join(f"{pid} {comm}\n" for pid, comm in self._trace.cmdlines.items())

    @saved_cmdlines_size.show
    def _saved_cmdlines_size_show(self) -> str:
        return str(self._trace.max_cmdlines)

    @saved_cmdlines_size.store
    def _saved_cmdlines_size_store(self, size: int) -> None:
        trace = self._trace
        trace.max_cmdlines = size
        trace.cmdlines = dict(list(trace.cmdlines.items())[-size:])

    @README.show
    def _readme(self) -> str:
        return "tracing mini-HOWTO:\n\n" + "".join(
            f"  {attr.name}\n\t{attr.doc}\n" for attr in (*ArrayControl.attrs, *self.attrs)
        )
