# SPDX-License-Identifier: GPL-2.0-only
"""Function tracing: the tracers `function` and `function_graph` (kernel/trace/ftrace.c).

A method that stands for a kernel function says so: `@traced` (trace_hook.py) gives it that name. `Ftrace.add` finds the
marked methods of the objects a machine is made of. Like ftrace, which patches a call into a function only while someone
traces, nothing stands between caller and method until a tracer is chosen: then each object gets, under the method's
name, a wrapper of its own, and loses it again with the tracer `nop`. So a machine that is not traced pays nothing.

A method that is a long operation (a generator) is entered when it first runs and returns when it ends; slices of other
tasks in between are part of its duration, as they are in Linux where a function sleeps.

What is recorded: a call if its name is in `set_ftrace_filter` (empty: all) and not in `set_ftrace_notrace`. The graph
can be narrowed further to what is called from functions in `set_graph_function`, and to `max_graph_depth` levels.

Differences from Linux. Only functions that exist here as methods can be traced, not those of compiled loops. And
`set_ftrace_filter` with the tracer function_graph, when `set_graph_function` is empty, shows the callees of the
functions named too: who names one function and asks for a graph wants its graph. The option `nofuncgraph-callees` gives
Linux's behaviour, a graph of just the functions named.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from types import MethodType
from typing import Any

from kernelsim import trace_events
from kernelsim.glob import Glob
from kernelsim.operation import Operation
from kernelsim.task import Call, Task
from kernelsim.trace_array import TraceArray
from kernelsim.trace_hook import FTRACE_NAME

TRACERS = ("function_graph", "function", "nop")
MODULES = {"dpu_compact": ("dpu_",)}
"""Kernel module names for `:mod:`, and how the names of their functions begin."""


MAX_WORD = 512
"""Letters of a name; the kernel's limit follows from how long a symbol may be (FTRACE_BUFF_MAX)."""


class FunctionSet:
    """The functions that one control file names; empty says nothing about any."""

    def __init__(self, known: dict[str, list[tuple[Any, str]]]) -> None:
        self.known = known
        self.names: set[str] = set()

    def change(self, words: Iterable[str]) -> None:
        """Take words as a write holds them: NAME, a glob, `:mod:MODULE`, each with `!` in front to take it back.

        OSError(EINVAL): one of them matches nothing. Those before it hold.
        """
        for word in words:
            matched = self._matching(word.removeprefix("!")) if len(word) <= MAX_WORD else None
            if not matched:
                raise OSError(errno.EINVAL, f"no function {word}")
            self.names = self.names - matched if word.startswith("!") else self.names | matched

    def _matching(self, pattern: str) -> set[str]:
        name, colon, rest = pattern.partition(":")
        glob = Glob(name or "*")
        names = {known for known in self.known if glob.matches(known)}
        if colon:
            kind, _, module = rest.partition(":")
            if kind != "mod":
                return set()
            prefixes = MODULES.get(module, ())
            names = {known for known in names if known.startswith(prefixes)} if prefixes else set()
        return names


class Ftrace:
    """Function tracing of one machine."""

    def __init__(self, trace: TraceArray) -> None:
        self.trace = trace
        self.current_tracer = "nop"
        self.functions: dict[str, list[tuple[Any, str]]] = {}
        """Of each kernel function the objects that have it, and as which method."""
        self.filter = FunctionSet(self.functions)
        self.notrace = FunctionSet(self.functions)
        self.graph = FunctionSet(self.functions)
        self.graph_notrace = FunctionSet(self.functions)
        self.pids: set[int] = set()
        self.max_graph_depth = 0
        self.available: tuple[str, ...] = TRACERS
        """The tracers that this kernel has."""
        self.enabled = True
        """/proc/sys/kernel/ftrace_enabled"""

    def add(self, objects: Iterable[Any]) -> None:
        """Make the marked methods of these objects traceable."""
        for obj in objects:
            for attribute in dir(type(obj)):
                name = getattr(getattr(type(obj), attribute, None), FTRACE_NAME, None)
                if name is not None:
                    self.functions.setdefault(name, []).append((obj, attribute))

    # Switching.

    def select(self, tracer: str) -> None:
        """Choose another tracer; what was recorded goes. OSError(EINVAL): there is none of that name."""
        if tracer not in self.available:
            raise OSError(errno.EINVAL, "no such tracer")
        if tracer == self.current_tracer:
            return
        self.trace.expand()
        self._unpatch()
        self.current_tracer = tracer
        self.trace.reset()
        if tracer != "nop":
            self._patch()

    def _patch(self) -> None:
        for name, places in self.functions.items():
            for obj, attribute in places:
                vars(obj)[attribute] = self._wrapper(name, getattr(type(obj), attribute), obj)

    def _unpatch(self) -> None:
        for places in self.functions.values():
            for obj, attribute in places:
                vars(obj).pop(attribute, None)

    def _wrapper(self, name: str, method: Any, obj: Any) -> Any:
        bound = MethodType(method, obj)

        def call(*args: Any, **kwargs: Any) -> Any:
            entered = self.enter(name)
            try:
                result = bound(*args, **kwargs)
            finally:
                self.leave(entered)
            return result

        def operate(*args: Any, **kwargs: Any) -> Operation[Any]:
            entered = self.enter(name)
            try:
                return (yield from bound(*args, **kwargs))
            finally:
                self.leave(entered)

        return operate if _is_generator_function(method) else call

    # Calls.

    def enter(self, name: str) -> tuple[Task, Call]:
        """A traced function begins."""
        trace, task = self.trace, self.trace.top.current.task
        trace.drain()
        parent = task.stack[-1] if task.stack else None
        call = self._call(name, parent, task)
        if call.recorded and self.current_tracer == "function":
            trace.record(trace_events.function, (name, parent.function if parent else task.entry, 0), task)
        elif call.recorded:
            trace.record(trace_events.funcgraph_entry, (name, call.graph_depth, 0), task)
        task.stack.append(call)
        return task, call

    def leave(self, entered: tuple[Task, Call]) -> None:
        """It returns, or ends otherwise."""
        task, call = entered
        self.trace.drain()
        del task.stack[task.stack.index(call) :]
        if call.recorded and self.current_tracer == "function_graph":
            values = (call.function, call.graph_depth, 0, call.call_time_ns, self.trace.clock.now_ns())
            self.trace.record(trace_events.funcgraph_exit, values, task)

    def _call(self, name: str, parent: Call | None, task: Task) -> Call:
        depth = 0 if parent is None else parent.graph_depth + parent.recorded
        in_graph = parent is not None and parent.in_graph
        if not self.enabled or (self.pids and task.pid not in self.pids):
            recorded = False
        elif self.current_tracer == "function":
            recorded = self._wanted(name)
        else:
            in_graph, recorded = self._graphed(name, parent, depth)
        return Call(name, self.trace.clock.now_ns(), recorded, depth, in_graph)

    def _wanted(self, name: str) -> bool:
        wanted = self.filter.names
        return (not wanted or name in wanted) and name not in self.notrace.names

    def _graphed(self, name: str, parent: Call | None, depth: int) -> tuple[bool, bool]:
        """(whether its callees belong to a graph that was asked for, whether it is drawn itself)."""
        roots = self.graph.names
        follow = not roots and self.trace.options["funcgraph-callees"]
        if follow:
            roots = self.filter.names
        in_graph = not roots or name in roots or (parent is not None and parent.in_graph)
        if name in self.graph_notrace.names:
            in_graph = False
        too_deep = self.max_graph_depth and depth >= self.max_graph_depth
        chosen = name not in self.notrace.names if follow else self._wanted(name)
        return in_graph, bool(in_graph and not too_deep and chosen)


def _is_generator_function(method: Any) -> bool:
    return bool(getattr(method, "__code__", None) and method.__code__.co_flags & 0x20)
