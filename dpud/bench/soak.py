# SPDX-License-Identifier: GPL-2.0-only
"""`dpud bench soak`: a small machine left to chance, a million operations long, under the debug-VM check.

Requests run in slices and take turns. Chance chooses the requests, the turns, who is interrupted, how late the device
moves its pages and when it fails. Every CHECK_EVERY operations all invariants must hold with requests still under way;
then they are let finish, and every process must read back every byte that it wrote. In the end everything goes, and
every page must be free again.

The same seed makes the same run: the device has no threads and the clock stands still. Every LIFE operations a new
world begins, with the next seed and otherwise built. A failure names the seed of its world and how to get there again.

To add a kind of operation, add a line to OPERATIONS.
"""

import errno
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dpud.bench.report import Figure, Report
from dpud.dpu.faults import FaultKind
from dpud.errors import UserError
from dpud.lab import VM, Lab, SmallSlices, advance, settle
from kernelsim import dpu_compact_inject
from kernelsim.attr import Operation
from kernelsim.dpu_hw import ENGINES
from kernelsim.machine import NODES_SYSFS
from kernelsim.mm_types import LongOp
from kernelsim.timer import ManualClock

T = TypeVar("T")

NR_OPS = 1_000_000
LIFE = 20_000
CHECK_EVERY = 1000
MAX_RUNNING = 5
KSM = "/sys/kernel/mm/ksm"
CMA = "/sys/kernel/debug/cma"
ENGINE = "/sys/kernel/debug/dpu_compact/engine"
NAMES = ("a", "b", "c", "d")
KINDS = tuple(FaultKind)
PAGE_KINDS = dpu_compact_inject.KINDS
SHOWN = {
    "pages_moved": "pages moved by the DPU",
    "cpu_pages_moved": "pages moved by its CPU path",
    "pgmigrate_success": "pages moved in all",
    "failures": "batches that the device failed",
    "fallbacks": "regions that the CPU did or finished",
}
"""Counters that the report ends with."""

MAY_HAPPEN = {errno.ENOMEM, errno.EEXIST, errno.ESRCH, errno.EBUSY}


class World:
    """A machine under several requests at once.

    `patience`: how late the device is (dpud/lab.py), None for one with threads. With `eager`, all invariants are
    checked after every single slice.
    """

    def __init__(
        self,
        nodes: Sequence[int],
        nr_ranks: int | None,
        patience: int | None,
        slice_pages: int,
        words: str = "stamp",
        *,
        cma: int = 0,
        eager: bool = True,
    ) -> None:
        self.patch = SmallSlices(slice_pages)
        self.eager = eager
        self.lab = Lab(nodes, words, nr_ranks=nr_ranks, patience=patience, cma=cma)
        self.lab.sysctl(dpu_compact_min_fragments=4)
        self.at_boot = self.lab.mem.zones["free_pages"].tolist()
        self.running: list[Operation[object]] = []
        self.lab.machine.kthreads.spawn = lambda operation, _name: self.running.append(operation)
        self.block = self.lab.allocator("block", count="3")
        for name, text in (("run", "1"), ("pages_to_scan", "9000"), ("max_page_sharing", "30")):
            self.lab.write(f"{KSM}/{name}", text)
        self.lab.spawn("a", anon="12M", holes="50 seed=9")

    def sound(self) -> None:
        """Raises AssertionError if an invariant is violated."""
        violated = self.lab.machine.check()
        assert not violated, violated

    @property
    def busy(self) -> bool:
        """No further request can begin."""
        return len(self.running) >= MAX_RUNNING

    # Each of these says whether there was something to do.

    def begin(self, operation: Operation[object]) -> bool:
        """Start a request, if there are not too many."""
        if self.busy:
            return False
        self.running.append(operation)
        self.turns(len(self.running) - 1, 1)
        return True

    def change(self, name: str, attr: str, text: str) -> bool:
        """echo into a process's file; mkdir first where there is none."""
        if name in self.lab.names:
            return self.begin(self.lab.start_set(name, attr, text))
        return name not in self.lab.machine.processes and self.begin(self._made(name, attr, text))

    def _made(self, name: str, attr: str, text: str) -> LongOp:
        yield from self.lab.start_spawn(name)
        yield from self.lab.start_set(name, attr, text)

    def look(self, name: str) -> bool:
        """cat verify."""
        return name in self.lab.names and self.begin(self.lab.start_verify(name))

    def leave(self, name: str) -> bool:
        """rmdir; once more, where the one before was interrupted."""
        return name in self.lab.machine.processes and not self.busy and self.begin(self.lab.end(name))

    def compact(self, nid: int, file: str = "compact_dpu") -> bool:
        """echo 1 into a node's file."""
        return self.write(f"{NODES_SYSFS}/node{nid % self.lab.mem.nr_nodes}/{file}", "1")

    def write(self, path: str, text: str) -> bool:
        """echo."""
        return self.begin(self.lab.start(path, text))

    def alloc(self, order: int, gfp: str) -> bool:
        """Three blocks from the page allocator."""
        for name, text in (("order", str(order)), ("gfp", f"{gfp}|__GFP_NOWARN")):
            self.lab.write(f"{self.block}/{name}", text)
        return self.write(f"{self.block}/alloc", "1")

    def free(self) -> None:
        """All of those go back."""
        self.lab.write(f"{self.block}/free", "1")

    def wake_threads(self) -> None:
        """Time passes; what kswapd, kcompactd and ksmd find to do takes turns with the requests."""
        clock = self.lab.machine.clock
        assert isinstance(clock, ManualClock)
        clock.advance(600_000_000)
        self.lab.machine.step(clock.now_ns())

    def contiguous(self, area: int, file: str, nr: int) -> bool:
        """echo into a CMA area's `alloc` or `free`."""
        areas = self.lab.vm.cma_areas
        return bool(areas) and self.write(f"{CMA}/{areas[area % len(areas)].name}/{file}", str(nr))

    def interrupt(self, which: int) -> bool:
        """A signal ends a request."""
        if not self.running:
            return False
        self.running.pop(which % len(self.running)).close()
        return True

    def turns(self, which: int, nr: int) -> None:
        """Some slices of one request."""
        for _ in range(nr):
            if not self.running:
                return
            which %= len(self.running)
            over, outcome = advance(self.running[which])
            if self.eager:
                self.sound()
            if over:
                del self.running[which]
                self.judge(outcome)
                return

    def judge(self, outcome: object) -> None:
        """Raises AssertionError for an error that nothing explains, and for a process that misses a byte."""
        if isinstance(outcome, OSError):
            assert outcome.errno in MAY_HAPPEN, outcome
        elif isinstance(outcome, bytes):
            assert outcome == b"ok\n", outcome

    def configure(self, enabled: int, order: int, least: int) -> None:
        self.lab.sysctl(dpu_compact_enabled=enabled, dpu_compact_region_order=order, dpu_compact_min_fragments=least)

    def choose(self, engine: str, adaptive: int) -> None:
        """Another engine; without a device, there are the CPU's."""
        self.lab.sysctl(dpu_compact_adaptive=adaptive)
        if self.lab.hw or engine in ("cpu", "cpu-batched"):
            self.lab.write(ENGINE, engine)

    def finish(self) -> None:
        """Let everything that runs come to its end; every process reads everything back."""
        running, self.running = self.running, []
        for outcome in settle(running):
            self.judge(outcome)
        half_gone = sorted(set(self.lab.machine.processes) - set(self.lab.names))  # their exit was interrupted
        settle([self.lab.end(name) for name in half_gone])
        self.lab.assert_at_rest()

    def end(self) -> None:
        """Everything goes; every page is free again."""
        self.finish()
        settle([self.lab.end(name) for name in sorted(self.lab.machine.processes)])
        self.lab.sysctl(nr_hugepages=0)
        self.free()
        for area in self.lab.vm.cma_areas:
            self.lab.write(f"{CMA}/{area.name}/free", self.lab.read(f"{CMA}/{area.name}/used"))
        self.lab.assert_at_rest()
        assert self.lab.mem.zones["free_pages"].tolist() == self.at_boot
        assert self.lab.vm.mms_in_use == set()
        assert self.lab.vm.vma_objects == []
        assert self.lab.vm.files == []

    def close(self) -> None:
        """The machine's memory goes now: it hangs in cycles, and the collector does not see how large it is."""
        self.patch.undo()
        if self.lab.hw is not None:
            self.lab.hw.close()
        del self.lab
        gc.collect()


class Chance:
    """What happens next."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._rng.integers(len(choices)))]

    def number(self, stop: int) -> int:
        """0 .. stop-1"""
        return int(self._rng.integers(stop))

    def percent(self, *choices: int) -> str:
        """`30 seed=17`"""
        return f"{self.pick(choices)} seed={self.number(1000)}"


Act = Callable[[World, Chance], object]
"""Does something and says so; False if there was nothing to do."""


def setting(attr: str, *texts: str) -> Act:
    """One of `texts` into this file of any process."""
    return lambda world, chance: world.change(chance.pick(NAMES), attr, chance.pick(texts))


def portion(attr: str, *percents: int) -> Act:
    """One of these percentages, of pages chosen at random, into this file of any process."""
    return lambda world, chance: world.change(chance.pick(NAMES), attr, chance.percent(*percents))


def sysctl(name: str, *values: int) -> Act:
    return lambda world, chance: world.lab.write(f"{VM}/{name}", str(chance.pick(values)))


def request(name: str, *values: int) -> Act:
    """A sysctl whose write takes its turns with the other requests."""
    return lambda world, chance: world.write(f"{VM}/{name}", str(chance.pick(values)))


ORDERS = (0, 0, 3, 4, 9)
GFPS = ("GFP_ATOMIC", "GFP_KERNEL", "GFP_KERNEL|__GFP_RETRY_MAYFAIL", "GFP_USER|__GFP_MOVABLE|__GFP_COMP")


def disturb(world: World, chance: Chance) -> None:
    """Something happens to a page in mid-batch, in the next batches."""
    world.lab.machine.dpu.inject.points[chance.pick(PAGE_KINDS)].arm(chance.pick((0, 7)), chance.pick((1, 3)))


OPERATIONS: tuple[tuple[int, str, Act], ...] = (
    (12, "allocate", setting("anon", "0", "64K", "300K", "1M", "3M")),
    (1, "allocate much", setting("anon", "12M", "40M")),
    (10, "free", portion("holes", 10, 50, 97)),
    (2, "free in runs", setting("holes", "30 runs seed=1", "60 runs seed=2", "100")),
    (12, "fault", portion("touch", 1, 5, 30)),
    (1, "fault all", setting("touch", "100")),
    (5, "file", setting("file", "0", "64K", "600K")),
    (4, "fork", setting("fork", *NAMES)),
    (4, "exit", lambda world, chance: world.leave(chance.pick(NAMES))),
    (2, "thp", setting("thp", "0", "1")),
    (4, "same", lambda world, chance: world.change(chance.pick(NAMES), "same", chance.percent(10, 60) + " kinds=20")),
    (3, "mergeable", setting("mergeable", "0", "1", "1", "1")),
    (1, "ksm", lambda world, chance: world.write(f"{KSM}/run", chance.pick("01112"))),
    (4, "mlock", setting("mlock", "0", "30", "100")),
    (4, "pin", portion("pin", 0, 0, 3, 40)),
    (6, "compact by the DPU", lambda world, chance: world.compact(chance.number(2))),
    (4, "compact by Linux", lambda world, chance: world.compact(chance.number(2), "compact")),
    (1, "compact_memory", lambda world, _chance: world.write(f"{VM}/compact_memory", "1")),
    (2, "CMA alloc", lambda world, chance: world.contiguous(chance.number(2), "alloc", 1 + chance.number(600))),
    (2, "CMA free", lambda world, chance: world.contiguous(chance.number(2), "free", 1 + chance.number(900))),
    (4, "verify", lambda world, chance: world.look(chance.pick(NAMES))),
    (3, "nr_hugepages", request("nr_hugepages", 0, 0, 1, 4)),
    (4, "alloc", lambda world, chance: world.alloc(chance.pick(ORDERS), chance.pick(GFPS))),
    (2, "alloc: free", lambda world, _chance: world.free()),
    (2, "kernel threads", lambda world, _chance: world.wake_threads()),
    (1, "drop_caches", request("drop_caches", 1, 3)),
    (1, "min_free_kbytes", sysctl("min_free_kbytes", 512, 1024, 4096)),
    (1, "compaction_proactiveness", sysctl("compaction_proactiveness", 0, 20, 100)),
    (3, "interrupt", lambda world, chance: world.interrupt(chance.number(MAX_RUNNING))),
    (3, "device fault", lambda world, chance: world.lab.arm(chance.pick(KINDS), chance.pick((0, 3, 60, 300)))),
    (3, "page fault point", disturb),
    (2, "revive", lambda world, _chance: world.lab.revive()),
    (1, "dpu_compact_enabled", sysctl("dpu_compact_enabled", 0, 1, 1, 1)),
    (2, "dpu_compact_region_order", sysctl("dpu_compact_region_order", 9, 10, 12, 18)),
    (2, "dpu_compact_min_fragments", sysctl("dpu_compact_min_fragments", 1, 4, 32, 200)),
    (2, "engine", lambda world, chance: world.choose(chance.pick(ENGINES), chance.number(2))),
    (1, "compact_unevictable_allowed", sysctl("compact_unevictable_allowed", 0, 1)),
)
"""(how often, name, what it does)."""


@dataclass
class Soaked:
    """What happened: operations by kind, and the machine's own counters in the end."""

    counts: Counter[str] = field(default_factory=Counter)
    stats: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Soaked") -> None:
        self.counts.update(other.counts)
        self.stats.update(other.stats)


class SoakError(Exception):
    """Something was found; the text says how to get there again."""


def soak(
    seed: int, nr_ops: int, words: str = "full", *, eager: bool = False, progress: Callable[[int], object] = int
) -> Soaked:
    """Run `nr_ops` operations and end the world. Raises SoakError.

    `eager`: check all invariants after every slice, which is slow. `progress` is told how many operations are done.
    """
    soaked = Soaked()
    chance = Chance(seed)
    nodes, slice_pages = chance.pick(((32,), (32, 34))), chance.pick((16, 100, 700))
    nr_ranks, patience, cma = chance.pick((1, 2, 3)), chance.pick((0, 3, 20)), chance.pick((0, 8))
    world = World(nodes, nr_ranks, patience, slice_pages, words, cma=cma, eager=eager)
    try:
        _live(world, chance, nr_ops, soaked.counts, progress)
        soaked.stats.update(world.lab.stats() | world.lab.vmstat())
        world.end()
        world.sound()
    except Exception as found:
        place = f"seed {seed}, operation {soaked.counts.total()}"
        raise SoakError(f"{place}: {found!r}; again: dpud bench soak --seed {seed} --ops {nr_ops}") from found
    finally:
        world.close()
    return soaked


def _live(world: World, chance: Chance, nr_ops: int, counts: Counter[str], progress: Callable[[int], object]) -> None:
    deck = [(name, act) for weight, name, act in OPERATIONS for _ in range(weight)]
    while counts.total() < nr_ops:
        while world.busy:
            world.turns(chance.number(MAX_RUNNING), 1 + chance.number(8))
        name, act = chance.pick(deck)
        if act(world, chance) is False:
            continue
        counts[name] += 1
        for _ in range(2):
            world.turns(chance.number(MAX_RUNNING), 1 + chance.number(8))
        if counts.total() % CHECK_EVERY == 0:
            world.sound()
            world.finish()
            world.sound()
            progress(counts.total())


def lives(seed: int, nr_ops: int) -> Iterator[tuple[int, int]]:
    """(seed, operations) of each world: a new one, otherwise built, every LIFE operations."""
    for number, first in enumerate(range(0, nr_ops, LIFE)):
        yield seed + number, min(LIFE, nr_ops - first)


def run(seed: int | None = None, ops: int | None = None) -> Report:
    """Raises UserError where something was found, after printing how it came about."""
    seed = time.time_ns() % 1_000_000 if seed is None else seed
    nr_ops = NR_OPS if ops is None else ops
    console = Console(stderr=True)
    console.print(f"soak: seed {seed}, {nr_ops} operations")
    begin = time.perf_counter()
    total = Soaked()
    with Progress(*_COLUMNS, console=console) as bar:
        task = bar.add_task("soak", total=nr_ops)
        try:
            for life, nr in lives(seed, nr_ops):
                done = total.counts.total()
                total.add(soak(life, nr, progress=_shown(bar, task, done)))
                bar.update(task, completed=total.counts.total())
        except SoakError as found:
            console.print_exception(max_frames=20)
            raise UserError(str(found)) from found
    return _report(seed, total, time.perf_counter() - begin)


def _shown(bar: Progress, task: TaskID, before: int) -> Callable[[int], object]:
    return lambda done: bar.update(task, completed=before + done)


_COLUMNS = TextColumn("soak"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()


def _report(seed: int, total: Soaked, seconds: float) -> Report:
    nr_ops = total.counts.total()
    return Report(
        "soak",
        "random operations under the debug-VM check",
        f"Seed {seed}, a new world every {LIFE} operations. Real bytes; every {CHECK_EVERY} operations all invariants "
        "were checked with requests under way, and every process read everything back. In the end of each world every "
        "page was free again.",
        [
            Figure("operations", nr_ops, ""),
            Figure("operations a second", nr_ops / seconds, ""),
            *(Figure(f"{name}, times", count, "") for name, count in total.counts.most_common()),
            *(Figure(what, total.stats[name], "") for name, what in SHOWN.items()),
        ],
        ["nothing was violated, nothing was lost"],
    )
