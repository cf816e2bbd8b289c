# SPDX-License-Identifier: GPL-2.0-only
"""/sys/kernel/tracing/instances: `mkdir NAME` makes another buffer with switches of its own, `rmdir` ends it.

Its files are those of the machine's own trace, less what is there once for all (lists of events and functions, names of
tasks). Events can go to several buffers at a time, each with its filter.

Differences from Linux: an instance has no tracer but `nop`, function tracing is the machine's own. And rmdir(2) says
EBUSY only while somebody reads one of its files or waits at it, as a reader of trace_pipe does; who merely holds one
open finds it gone.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

from kernelsim.attr import ConfigGroup, Kobject
from kernelsim.ftrace import Ftrace
from kernelsim.trace import Trace
from kernelsim.trace_raw import Symbols
from kernelsim.tracefs import ArrayControl, BufferSize, CpuDir, InstanceOptions, TraceFiles
from kernelsim.tracefs_events import EventsDir, EventSwitches


class CpuDirs(Kobject):
    """`per_cpu`."""

    def __init__(self, dirs: Iterable[CpuDir]) -> None:
        self._dirs = {f"cpu{cpu}": one for cpu, one in enumerate(dirs)}

    def children(self) -> Mapping[str, Kobject]:
        return self._dirs


class Instance(EventSwitches, BufferSize, ArrayControl, TraceFiles):
    """One directory below `instances`."""

    def __init__(self, trace: Trace, symbols: Symbols, systems: Iterable[str]) -> None:
        self.array = array = trace.add_instance()
        ftrace = Ftrace(array)
        ftrace.available = ("nop",)
        TraceFiles.__init__(self, array, ftrace)
        ArrayControl.__init__(self, array, ftrace)
        BufferSize.__init__(self, array)
        EventSwitches.__init__(self, array)
        self._dirs: dict[str, Kobject] = {
            "options": InstanceOptions(array),
            "per_cpu": CpuDirs(CpuDir(array, ftrace, symbols, cpu) for cpu in range(array.nr_cpus)),
            "events": EventsDir(array, systems),
        }

    def children(self) -> Mapping[str, Kobject]:
        return self._dirs


class Instances(ConfigGroup):
    """The directory of all of them."""

    def __init__(self, trace: Trace, symbols: Symbols, systems: Iterable[str]) -> None:
        self._trace = trace
        self._symbols = symbols
        self._systems = tuple(systems)

    def make_item(self, name: str) -> Kobject:
        if not name:
            raise OSError(errno.ENOENT, "a directory has a name")
        return Instance(self._trace, self._symbols, self._systems)

    def drop_item(self, name: str, kobj: Kobject) -> None:
        assert isinstance(kobj, Instance)
        self._trace.remove_instance(kobj.array)
