# SPDX-License-Identifier: GPL-2.0-only
"""Tracing and dynamic debug of one machine, put together: which objects are traced, and the whole tree of files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kernelsim.attr import Kobject
from kernelsim.dynamic_debug import DynamicDebug, DynamicDebugFiles
from kernelsim.ftrace import Ftrace
from kernelsim.kconfig import Kconfig
from kernelsim.mm_types import Vm
from kernelsim.printk import KERN_DEBUG, Printk
from kernelsim.timer import Clock
from kernelsim.trace import Trace
from kernelsim.trace_events import SYSTEMS
from kernelsim.trace_raw import Symbols
from kernelsim.tracefs import TRACEFS, ArrayControl, BufferSize, CpuDir, TraceControl, TraceFiles, TraceOptions
from kernelsim.tracefs_events import EventLists, EventsDir, EventSwitches
from kernelsim.tracefs_ftrace import FtraceFiles, FtraceSysctl
from kernelsim.tracefs_instance import Instances
from kernelsim.wait import WaitQueue

DYNAMIC_DEBUG = ("/sys/kernel/debug/dynamic_debug", "/proc/dynamic_debug")

ENTRIES = ("start_kernel", "kthread", "do_syscall_64", "tracing_mark_write")
"""Functions that records name and that cannot be traced."""

_NEEDS = {"compaction": "CONFIG_COMPACTION", "dpu": "CONFIG_DPU_COMPACTION", "migrate": "CONFIG_MIGRATION"}
"""Systems of events that are there only with an option."""


class Tracing:
    """Hangs a machine's trace and its pr_debug() into its `vm`."""

    def __init__(self, vm: Vm, clock: Clock, kconfig: Kconfig, printk: Printk, wait_queue: WaitQueue) -> None:
        self._kconfig = kconfig
        self.trace = Trace(clock, vm.nr_cpus, wait_queue)
        vm.trace = self.trace
        self.ftrace = Ftrace(self.trace)
        self.dynamic_debug = DynamicDebug(lambda text: printk(text, KERN_DEBUG), lambda: self.trace.current.task.pid)
        vm.pr_debug = self.dynamic_debug
        has_graph = kconfig.IS_ENABLED("CONFIG_FUNCTION_GRAPH_TRACER")
        has_function = kconfig.IS_ENABLED("CONFIG_FUNCTION_TRACER")
        self.ftrace.available = ("function_graph",) * has_graph + ("function",) * has_function + ("nop",)

    def add(self, objects: Iterable[Any]) -> None:
        """Make the functions of these objects traceable, and their pr_debug() sites known."""
        objects = [obj for obj in objects if obj is not None]
        self.ftrace.add(objects)
        if self._kconfig.IS_ENABLED("CONFIG_DYNAMIC_DEBUG"):
            self.dynamic_debug.add(objects)

    def looks_leave_records(self) -> bool:
        """Is anything traced just now? Then even who only reads a file may leave a record."""
        return self.ftrace.current_tracer != "nop" or bool(self.trace.hot)

    def files(self) -> Iterator[tuple[str, Kobject]]:
        """(directory, Kobject) of everything this kernel has of it."""
        if self._kconfig.IS_ENABLED("CONFIG_FTRACE"):
            yield from self._trace_files()
        if self._kconfig.IS_ENABLED("CONFIG_FUNCTION_TRACER"):
            yield TRACEFS, FtraceFiles(self.ftrace)
            yield "/proc/sys/kernel", FtraceSysctl(self.ftrace)
        if self._kconfig.IS_ENABLED("CONFIG_DYNAMIC_DEBUG"):
            for directory in DYNAMIC_DEBUG:
                yield directory, DynamicDebugFiles(self.dynamic_debug)

    def _trace_files(self) -> Iterator[tuple[str, Kobject]]:
        trace, ftrace = self.trace, self.ftrace
        symbols = Symbols((*ENTRIES, *ftrace.functions))
        yield "/proc", symbols
        yield TRACEFS, TraceFiles(trace, ftrace)
        yield TRACEFS, ArrayControl(trace, ftrace)
        yield TRACEFS, TraceControl(trace)
        yield TRACEFS, BufferSize(trace)
        yield TRACEFS, EventLists()
        yield TRACEFS, EventSwitches(trace)
        yield f"{TRACEFS}/options", TraceOptions(trace)
        for cpu in range(trace.nr_cpus):
            yield f"{TRACEFS}/per_cpu/cpu{cpu}", CpuDir(trace, ftrace, symbols, cpu)
        systems = [system for system in SYSTEMS if self._kconfig.IS_ENABLED(_NEEDS.get(system, "CONFIG_FTRACE"))]
        yield f"{TRACEFS}/events", EventsDir(trace, systems)
        yield f"{TRACEFS}/instances", Instances(trace, symbols, systems)
