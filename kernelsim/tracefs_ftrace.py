# SPDX-License-Identifier: GPL-2.0-only
"""The files of function tracing: which functions there are, and which are traced (ftrace.py)."""

from __future__ import annotations

from kernelsim.attr import Attr, Bool, Kobject, Text
from kernelsim.ftrace import Ftrace, FunctionSet
from kernelsim.tracefs import ULONG_MAX, Decimal
from kernelsim.tracefs_events import parse_pids

_READ_WRITE, _READ = 0o640, 0o440
_ALL = "#### all functions enabled ####\n"


def _shown(functions: FunctionSet, otherwise: str) -> str:
    names = functions.names
    return "".join(f"{name}\n" for name in functions.known if name in names) if names else otherwise


class FtraceFiles(Kobject):
    """For the tracers `function` and `function_graph`."""

    available_filter_functions = Attr(Text(), mode=_READ, doc="The functions that can be traced.")
    set_ftrace_filter = Attr(
        Text(), mode=_READ_WRITE, doc="Trace only these: names, globs, `!NAME` takes one out; `>` anew, `>>` adds."
    )
    set_ftrace_notrace = Attr(Text(), mode=_READ_WRITE, doc="Do not trace these.")
    set_graph_function = Attr(Text(), mode=_READ_WRITE, doc="Draw only what these call, themselves included.")
    set_graph_notrace = Attr(Text(), mode=_READ_WRITE, doc="Do not draw what these call, themselves included.")
    max_graph_depth = Attr(Decimal(0, ULONG_MAX), mode=_READ_WRITE, doc="Draw so many levels; 0: all.")
    set_ftrace_pid = Attr(Text(), mode=_READ_WRITE, doc="Trace functions of these tasks only; empty: of all.")

    def __init__(self, ftrace: Ftrace) -> None:
        self._ftrace = ftrace

    @available_filter_functions.show
    def _available(self) -> str:
        return "".join(f"{name}\n" for name in self._ftrace.functions)

    @set_ftrace_filter.show
    def _filter_show(self) -> str:
        return _shown(self._ftrace.filter, _ALL)

    @set_ftrace_filter.store
    def _filter_store(self, text: str) -> None:
        self._ftrace.filter.change(text.split())

    @set_ftrace_filter.truncate
    def _filter_clear(self) -> None:
        self._ftrace.filter.names = set()

    @set_ftrace_notrace.show
    def _notrace_show(self) -> str:
        return _shown(self._ftrace.notrace, "#### no functions disabled ####\n")

    @set_ftrace_notrace.store
    def _notrace_store(self, text: str) -> None:
        self._ftrace.notrace.change(text.split())

    @set_ftrace_notrace.truncate
    def _notrace_clear(self) -> None:
        self._ftrace.notrace.names = set()

    @set_graph_function.show
    def _graph_show(self) -> str:
        return _shown(self._ftrace.graph, _ALL)

    @set_graph_function.store
    def _graph_store(self, text: str) -> None:
        self._ftrace.graph.change(text.split())

    @set_graph_function.truncate
    def _graph_clear(self) -> None:
        self._ftrace.graph.names = set()

    @set_graph_notrace.show
    def _graph_notrace_show(self) -> str:
        return _shown(self._ftrace.graph_notrace, "#### no functions disabled ####\n")

    @set_graph_notrace.store
    def _graph_notrace_store(self, text: str) -> None:
        self._ftrace.graph_notrace.change(text.split())

    @set_graph_notrace.truncate
    def _graph_notrace_clear(self) -> None:
        self._ftrace.graph_notrace.names = set()

    @max_graph_depth.show
    def _depth_show(self) -> str:
        return str(self._ftrace.max_graph_depth)

    @max_graph_depth.store
    def _depth_store(self, depth: int) -> None:
        self._ftrace.max_graph_depth = depth

    @set_ftrace_pid.show
    def _pids_show(self) -> str:
        pids = self._ftrace.pids
        return "".join(f"{pid}\n" for pid in sorted(pids)) if pids else "no pid\n"

    @set_ftrace_pid.store
    def _pids_store(self, text: str) -> None:
        self._ftrace.pids |= parse_pids(text)

    @set_ftrace_pid.truncate
    def _pids_clear(self) -> None:
        self._ftrace.pids = set()


class FtraceSysctl(Kobject):
    """/proc/sys/kernel."""

    ftrace_enabled = Attr(Bool(), 1, doc="0: no function is traced, whatever the tracer.", late=True)

    def __init__(self, ftrace: Ftrace) -> None:
        self._ftrace = ftrace

    @ftrace_enabled.stored
    def _changed(self, _old: int, new: int) -> None:
        self._ftrace.enabled = bool(new)
