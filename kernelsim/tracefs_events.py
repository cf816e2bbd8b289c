# SPDX-License-Identifier: GPL-2.0-only
"""/sys/kernel/tracing/events: a directory for each system and, below it, for each event; and the lists of events."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

from kernelsim.attr import PAGE_SIZE, Attr, Kobject, Text
from kernelsim.kinds import einval, parse_kstrto
from kernelsim.trace import find_events
from kernelsim.trace_array import TraceArray
from kernelsim.trace_events import EVENTS, FTRACE_EVENTS, SYSTEMS
from kernelsim.tracefs import Switch
from kernelsim.tracepoint import TraceEvent

_READ_WRITE, _READ = 0o640, 0o440
_SYSTEM_FILTER = """\
### global filter ###
# Use this to set filters for multiple events.
# Only events with the given fields will be affected.
# If no events are modified, an error message will be displayed here
"""
_PAGE_DATA_BYTES = 4080
MAX_PIDS = 1 << 30
MAX_WORD = 127
"""Bytes of a word in set_event (EVENT_BUF_SIZE) and of a pid (PID_BUF_SIZE); a longer one is EINVAL."""


class Enable(Kobject):
    """`enable`, of one event or of several."""

    enable = Attr(Switch(), mode=_READ_WRITE, doc="1: record it. Of several events: X where some are on, some off.")

    def __init__(self, trace: TraceArray, events: Iterable[TraceEvent]) -> None:
        self._trace = trace
        self._events = frozenset(events)

    @enable.show
    def _show(self) -> str:
        states = {event in self._trace.enabled for event in self._events}
        return "X" if len(states) > 1 else str(int(states.pop()))

    @enable.store
    def _store(self, value: int) -> None:
        self._trace.set_enabled(self._events, bool(value))


def check_size(filter: str) -> None:
    """OSError(EINVAL) for a page or more (event_filter_write)."""
    if len(filter.encode("utf-8", "surrogateescape")) >= PAGE_SIZE:
        raise einval("too long")


class EventDir(Enable):
    """One event."""

    filter = Attr(Text(), mode=_READ_WRITE, doc="Record only hits for which this holds; 0: all.")
    format = Attr(Text(), mode=_READ, doc="Its fields, and how a record is printed.")
    id = Attr(Text(), mode=_READ, doc="Its number.")

    def __init__(self, trace: TraceArray, event: TraceEvent) -> None:
        super().__init__(trace, (event,))
        self._event = event

    @filter.show
    def _filter_show(self) -> str:
        trace, event = self._trace, self._event
        if event in trace.filter_errors:
            return trace.filter_errors[event]
        return trace.filters[event][0] if event in trace.filters else "none"

    @filter.store
    def _filter_store(self, text: str) -> None:
        check_size(text)
        self._trace.set_filter(self._event, text.strip())

    @format.show
    def _format(self) -> str:
        return self._event.format()

    @id.show
    def _id(self) -> str:
        return str(self._event.id)


class FtraceEventDir(Kobject):
    """One of ftrace's own record types, which cannot be switched."""

    format = Attr(Text(), mode=_READ, doc="Its fields, and how a record is printed.")
    id = Attr(Text(), mode=_READ, doc="Its number.")

    def __init__(self, event: TraceEvent) -> None:
        self._event = event

    @format.show
    def _format(self) -> str:
        return self._event.format()

    @id.show
    def _id(self) -> str:
        return str(self._event.id)


class FtraceSystemDir(Kobject):
    """All of them."""

    def __init__(self) -> None:
        self._events = {event.name: FtraceEventDir(event) for event in FTRACE_EVENTS}

    def children(self) -> Mapping[str, Kobject]:
        return self._events


class SystemDir(Enable):
    """All events of one system."""

    filter = Attr(Text(), mode=_READ_WRITE, doc="A filter for each event of this system that has its fields; 0: none.")

    def __init__(self, trace: TraceArray, system: str) -> None:
        super().__init__(trace, SYSTEMS[system])
        self._system = system
        self._dirs = {event.name: EventDir(trace, event) for event in SYSTEMS[system]}

    def children(self) -> Mapping[str, Kobject]:
        return self._dirs

    @filter.show
    def _filter_show(self) -> str:
        return _SYSTEM_FILTER

    @filter.store
    def _filter_store(self, text: str) -> None:
        check_size(text)
        self._trace.set_system_filter(self._system, text.strip())


class EventsDir(Enable):
    """`events` itself."""

    header_page = Attr(Text(), mode=_READ, doc="Layout of a page of binary records.")
    header_event = Attr(Text(), mode=_READ, doc="Layout of the header of a binary record.")

    def __init__(self, trace: TraceArray, systems: Iterable[str]) -> None:
        super().__init__(trace, EVENTS)
        self._systems: dict[str, Kobject] = {system: SystemDir(trace, system) for system in systems}
        self._systems["ftrace"] = FtraceSystemDir()

    def children(self) -> Mapping[str, Kobject]:
        return self._systems

    @header_page.show
    def _header_page(self) -> str:
        return (
            "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
            "\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n"
            "\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n"
            f"\tfield: char data;\toffset:16;\tsize:{_PAGE_DATA_BYTES};\tsigned:0;\n"
        )

    @header_event.show
    def _header_event(self) -> str:
        return (
            "# compressed entry header\n"
            "\ttype_len    :    5 bits\n"
            "\ttime_delta  :   27 bits\n"
            "\tarray       :   32 bits\n"
            "\n"
            "\tpadding     : type == 29\n"
            "\ttime_extend : type == 30\n"
            "\ttime_stamp : type == 31\n"
            "\tdata max type_len  == 28\n"
        )


class EventSwitches(Kobject):
    """The files that name several events, or tasks."""

    set_event = Attr(
        Text(),
        mode=_READ_WRITE,
        doc="The events that are on; `system:event`, `system:*`, `!` switches off, `>` all off.",
    )
    set_event_pid = Attr(Text(), mode=_READ_WRITE, doc="Record events of these tasks only; empty: of all.")

    def __init__(self, trace: TraceArray) -> None:
        self._trace = trace

    @set_event.show
    def _set_event_show(self) -> str:
        return "".join(f"{event}\n" for event in EVENTS if event in self._trace.enabled)

    @set_event.store
    def _set_event_store(self, text: str) -> None:
        for word in text.split():
            events = find_events(word.removeprefix("!")) if len(word) <= MAX_WORD else []
            if not events:
                raise einval("no such event")
            self._trace.set_enabled(events, not word.startswith("!"))

    @set_event.truncate
    def _set_event_clear(self) -> None:
        self._trace.set_enabled(EVENTS, False)

    @set_event_pid.show
    def _pids_show(self) -> str:
        return "".join(f"{pid}\n" for pid in sorted(self._trace.event_pids))

    @set_event_pid.store
    def _pids_store(self, text: str) -> None:
        self._trace.event_pids |= parse_pids(text)

    @set_event_pid.truncate
    def _pids_clear(self) -> None:
        self._trace.event_pids = set()


class EventLists(Kobject):
    """What there is, once for all buffers."""

    available_events = Attr(Text(), mode=_READ, doc="Every event that can be switched, `system:event`.")
    printk_formats = Attr(Text(), mode=_READ, doc="Formats kept by address: there are none.")

    @available_events.show
    def _available_events(self) -> str:
        return "".join(f"{event}\n" for event in EVENTS)

    @printk_formats.show
    def _printk_formats(self) -> str:
        return ""


def parse_pids(text: str) -> set[int]:
    """Pids apart by space, of 32 bits each. OSError(EINVAL), or EPERM for more than a list of them can hold."""
    pids = set()
    for word in text.split():
        if len(word) > MAX_WORD:
            raise einval("too long")
        pid = parse_kstrto(word.encode("utf-8", "surrogateescape"), 0, signed=False) & 0xFFFFFFFF
        if pid >= MAX_PIDS:
            raise OSError(errno.EPERM, "no such pid")
        pids.add(pid)
    return pids
