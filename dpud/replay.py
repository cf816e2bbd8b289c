# SPDX-License-Identifier: GPL-2.0-only
"""`dpud replay`: a recorded trace against an imported machine, in trace time (kernelsim/replay.py has the theory).

The machine's clock stands at the time of the event that is being done, counted from the first one. Without compaction
nothing else happens. With it kcompactd runs as it does on a machine: every 500 ms of trace time it looks at the
fragmentation score, and it is woken where a request for more than a page finds nothing above the low watermark; such a
request also goes through the slow path (alloc_slowpath.py), direct compaction included, but without reclaim, which is
in the trace already.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpud.capture import CaptureError, read_capture
from dpud.dpu.driver import DpuConfig, DpuDriver
from dpud.errors import UserError
from dpud.physmem import PhysMem
from dpud.proctext import ZoneKey, parse_buddyinfo, parse_pagesets
from dpud.trace_text import TraceNotes, TraceReader
from kernelsim.alloc_slowpath import AllocContext
from kernelsim.dpu_compact_direct import MAX_REGION_ORDER
from kernelsim.hostimage import HostImage
from kernelsim.kswapd import Kswapd
from kernelsim.kthread import Kthreads
from kernelsim.machine import NODES_SYSFS, Machine
from kernelsim.mmzone import NR_PAGE_ORDERS, pageblock_order
from kernelsim.operation import Operation, complete
from kernelsim.reclaim import Reclaim
from kernelsim.replay import Replay, requests
from kernelsim.timer import ManualClock
from kernelsim.trace_scan import Events

MAX_SAMPLES = 20
"""Lines of the report's table; there are at least half as many, unless the trace is very short."""
FIRST_INTERVAL_NS = 1_000_000
FOREVER_NS = 1 << 62
TRACE_NAMES = ("trace.zst", "trace", "trace.txt")
_MAX_TEXT_BYTES = 1 << 20

Told = Callable[[float], None]
"""Takes how much of the trace is done, 0 to 1."""


@dataclass(frozen=True)
class ReplayOptions:
    """The command line of `dpud replay`."""

    trace: Path
    """The text of a trace, or a folder that `dpud record` made."""
    source: Path | None = None
    """The capture to begin with."""
    after: Path | None = None
    """A capture of the real machine when the trace ended."""
    compaction: str | None = None
    """None, "traditional" or "dpu"."""
    compact_at: tuple[float, ...] = ()
    """Seconds of trace time at which to compact everything."""
    proactiveness: int | None = None


@dataclass(frozen=True)
class Sample:
    """The machine at one moment, and what had happened by then."""

    time_ns: int
    allocs: int
    frees: int
    free_pages: int
    huge_blocks: int
    """Free blocks of pageblock_order that could be cut."""
    unusable: int
    """Per mille of free memory that is of no use to a request of pageblock_order."""
    fallbacks: int
    real_fallbacks: int


@dataclass
class Outcome:
    """What a replay found out."""

    options: ReplayOptions
    samples: list[Sample] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """kernelsim.replay_names.counts_dtype"""
    fallbacks: tuple[int, int] = (0, 0)
    """Ours: all, and those smaller than a pageblock."""
    failed: list[int] = field(default_factory=list)
    """[order]: requests that found no room here."""
    nr_free: dict[ZoneKey, tuple[int, ...]] = field(default_factory=dict)
    """By zone and order, at the end."""
    nr_pcp: int = 0
    """Pages on per-CPU lists at the end."""
    real_before: dict[ZoneKey, tuple[int, ...]] = field(default_factory=dict)
    real_after: dict[ZoneKey, tuple[int, ...]] | None = None
    real_pcp: int = 0
    compaction: dict[str, int] = field(default_factory=dict)
    """Counters of compaction that rose; empty without any."""
    notes: TraceNotes = field(default_factory=TraceNotes)
    wall_s: float = 0.0


def replay(options: ReplayOptions, told: Told | None = None) -> Outcome:
    """Do it all. Raises UserError."""
    trace, source, after = _places(options)
    try:
        image = read_capture(source)
        real_after = None if after is None else _read_after(after)
        begin = time.perf_counter()
        with ExitStack() as stack:
            player = Player(image, options, stack)
            outcome = player.play(TraceReader(trace), told or (lambda _done: None))
    except CaptureError as error:
        raise UserError(str(error)) from error
    outcome.wall_s = time.perf_counter() - begin
    outcome.real_before = parse_buddyinfo(image.buddyinfo) if image.buddyinfo else {}
    if real_after is not None:
        outcome.real_after, outcome.real_pcp = real_after
    return outcome


def _places(options: ReplayOptions) -> tuple[Path, Path, Path | None]:
    """(trace, capture before it, capture after it)"""
    path = options.trace
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if options.source is None:
            raise UserError(f"{path}: a trace alone: --from DIR must name a capture of the machine when it began")
        return path, options.source, options.after
    trace = next((path / name for name in TRACE_NAMES if (path / name).is_file()), None)
    if trace is None:
        raise UserError(f"{path}: has no {TRACE_NAMES[0]}: it is not a folder that `dpud record` made")
    after = path / "after" if (path / "after").is_dir() else None
    return trace, options.source or path / "before", options.after or after


def _read_after(folder: Path) -> tuple[dict[ZoneKey, tuple[int, ...]], int]:
    """Free blocks and pages on per-CPU lists of the real machine at the end."""
    texts = []
    for name in ("buddyinfo", "zoneinfo"):
        try:
            with (folder / name).open("rb") as file:
                texts.append(file.read(_MAX_TEXT_BYTES).decode())
        except OSError as error:
            raise CaptureError(f"{folder / name}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise CaptureError(f"{folder / name}: not text") from None
    pagesets = parse_pagesets(texts[1])
    return parse_buddyinfo(texts[0]), sum(one.count for zone in pagesets.values() for one in zone)


class NoReclaim(Reclaim):
    """What the real kernel reclaimed is in the trace."""

    def reclaimable_pages(self, nid: int) -> int:
        return 0

    def try_to_free_pages(self, zonelist: NDArray[np.int32], order: int, highest_type: int) -> Operation[int]:
        yield from ()
        return 0


class WakingKswapd(Kswapd):
    """Of kswapd, what is left without reclaim: it has kcompactd make blocks of the order that was asked for."""

    def wakeup_kswapd(self, gfp: int, order: int, highest_type: int) -> None:
        if not self.balanced(order, highest_type):
            self._wakeup_kcompactd(self.nid, order, highest_type)


class Sampler:
    """Keeps at most MAX_SAMPLES samples, evenly spaced: when there would be more, every other one goes."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._interval_ns = FIRST_INTERVAL_NS
        self.due_ns = 0

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.due_ns = sample.time_ns + self._interval_ns
        if len(self.samples) == MAX_SAMPLES:
            del self.samples[1::2]
            self._interval_ns *= 2
            self.due_ns = self.samples[-1].time_ns + self._interval_ns


class Player:
    """One machine and its trace."""

    def __init__(self, image: HostImage, options: ReplayOptions, stack: ExitStack) -> None:
        self._options = options
        self._clock = ManualClock()
        self._sampler = Sampler()
        self._pending = sorted(round(seconds * 1e9) for seconds in options.compact_at)
        hw = DpuDriver(DpuConfig()) if options.compaction == "dpu" else None
        if hw is not None:
            stack.callback(hw.close)
        self.machine = self._build(image, hw)
        self._kthreads = Kthreads([])
        if options.compaction is not None:
            self._enable_compaction()
        self._counted = self._compaction_counters()

    def _build(self, image: HostImage, hw: DpuDriver | None) -> Machine:
        def adopt(vm: Any, image: HostImage) -> Any:
            self.replay = Replay(vm)
            return self.replay.adopt(image)

        try:
            return Machine.from_image(image, None, hw, self._clock, alloc_words=PhysMem().alloc, owners=adopt)
        except (ValueError, OSError) as error:
            raise UserError(f"{self._options.source or self._options.trace}: {error}") from error

    def _enable_compaction(self) -> None:
        machine, slowpath = self.machine, self.machine.slowpath
        if self._options.compaction == "dpu":  # regions of 2 MiB, the default, could not free a block of that size
            machine.registry.write("/proc/sys/vm/dpu_compact_region_order", str(MAX_REGION_ORDER))
        if self._options.proactiveness is not None:
            machine.registry.write("/proc/sys/vm/compaction_proactiveness", str(self._options.proactiveness))
        slowpath.reclaim = NoReclaim(machine.vm, machine.compaction)
        slowpath.kswapds = [
            WakingKswapd(machine.vm, slowpath.reclaim, kcompactd.nid, machine.compaction, self._wakeup_kcompactd)
            for kcompactd in machine.kcompactds
        ]
        self._kthreads = Kthreads(machine.kcompactds)

    def _wakeup_kcompactd(self, nid: int, order: int, highest_type: int) -> None:
        self.machine.kcompactds[nid].wakeup_kcompactd(order, highest_type)

    def play(self, reader: TraceReader, told: Told) -> Outcome:
        """The whole trace."""
        begin_ns: int | None = None
        for events in reader.batches():
            timed = events["time_ns"][events["time_ns"] > 0]
            if begin_ns is None and len(timed):
                begin_ns = int(timed[0])
            events["time_ns"] -= begin_ns or 0
            self._play(events)
            told(reader.nr_bytes_read / max(reader.nr_bytes, 1))
        self._sample()
        return self._outcome(reader.notes)

    def _play(self, events: Events) -> None:
        highest, reserve = requests(events, self._reserve)
        done = 0
        while done < len(events):
            until_ns = self._next_stop()
            done = self.replay.run(events, highest, reserve, done, until_ns, bool(self._options.compaction))
            if done == len(events):
                self._clock.ns = max(self._clock.ns, int(events["time_ns"][-1]))
                return
            event = events[done]
            if event.time_ns < until_ns:
                self._clock.ns = max(self._clock.ns, int(event.time_ns))
                self._help(event, int(highest[done]), int(reserve[done]))
                done += 1
            else:
                self._clock.ns = max(self._clock.ns, until_ns)
                self._stop()

    @staticmethod
    def _reserve(gfp: int) -> int:
        return AllocContext(gfp, 0, np.zeros(0, dtype=np.int32), "", 0, 0).reserve

    def _next_stop(self) -> int:
        """When something else than events is due."""
        thread = self._kthreads.peek(self._clock.ns)
        by_hand = self._pending[0] if self._pending else FOREVER_NS
        return min(self._sampler.due_ns, FOREVER_NS if thread is None else thread, by_hand)

    def _stop(self) -> None:
        """Do what is due now."""
        now_ns = self._clock.ns
        if self._sampler.due_ns <= now_ns:
            self._sample()
        if self._pending and self._pending[0] <= now_ns:
            self._pending.pop(0)
            self._compact_all()
        self._kthreads.step(now_ns)

    def _help(self, event: Events, highest: int, reserve: int) -> None:
        """A request for more than a page that found nothing above low: the slow path, and wakes kcompactd."""
        mem, slowpath = self.machine.mem, self.machine.slowpath
        nid = int(mem.zones["node"][mem.pages["zone"][int(event.pfn)]])
        context = slowpath.context(int(event.gfp), int(event.order), nid, "replay")
        pfn = complete(slowpath.alloc(context))
        self.replay.place(event, pfn, highest, reserve)

    def _compact_all(self) -> None:
        write = self.machine.registry.write
        if self._options.compaction == "dpu":
            for nid in range(self.machine.mem.nr_nodes):
                write(f"{NODES_SYSFS}/node{nid}/compact_dpu", "1")
        else:
            write("/proc/sys/vm/compact_memory", "1")

    # Looking.

    def _sample(self) -> None:
        counts = self.replay.counts[0]
        by_order = self.machine.mem.zones["nr_free"].sum(axis=(0, 2))
        free_pages, huge_blocks, unusable = fragmentation(by_order.tolist())
        self._sampler.add(
            Sample(
                self._clock.ns, int(counts["allocs"]), int(counts["frees"]), free_pages, huge_blocks, unusable,
                int(self.replay.fallbacks[0]), int(counts["real_fallbacks"]),
            )
        )  # fmt: skip

    def _outcome(self, notes: TraceNotes) -> Outcome:
        now = self._compaction_counters()
        counts = self.replay.counts[0]
        return Outcome(
            options=self._options,
            samples=self._sampler.samples,
            counts={name: int(counts[name]) for name in counts.dtype.names},
            fallbacks=(int(self.replay.fallbacks[0]), int(self.replay.fallbacks[1])),
            failed=self.replay.failed[:NR_PAGE_ORDERS].tolist(),
            nr_free=parse_buddyinfo(self.machine.registry.read("/proc/buddyinfo").decode()),
            nr_pcp=int(self.machine.mem.pagesets["count"].sum()),
            compaction={name: now[name] - before for name, before in self._counted.items() if now[name] > before},
            notes=notes,
        )

    def _compaction_counters(self) -> dict[str, int]:
        """vmstat's and the DPU's, as the files show them."""
        read = self.machine.registry.read
        vmstat = dict(self._pairs(read("/proc/vmstat").decode()))
        counters = {name: value for name, value in vmstat.items() if re.match("pgmigrate_|compact_", name)}
        stats = dict(self._pairs(read("/sys/kernel/debug/dpu_compact/stats").decode()))
        names = ("pages_moved", "cpu_pages_moved", "regions", "device_ns", "modelled_ns", "huge_pages_gained")
        return counters | {f"dpu_{name}": stats[name] for name in names}

    @staticmethod
    def _pairs(text: str) -> Iterator[tuple[str, int]]:
        for line in text.splitlines():
            name, value = line.split()
            yield name, int(value)


def fragmentation(by_order: Sequence[int]) -> tuple[int, int, int]:
    """Of free blocks by order: (pages, blocks of pageblock_order that could be cut, unusable index in per mille)."""
    free_pages = sum(nr << order for order, nr in enumerate(by_order))
    huge_blocks = sum(nr << (order - pageblock_order) for order, nr in enumerate(by_order) if order >= pageblock_order)
    unusable = (free_pages - (huge_blocks << pageblock_order)) * 1000 // free_pages if free_pages else 1000
    return free_pages, huge_blocks, unusable
