# SPDX-License-Identifier: GPL-2.0-only
"""`dpud bench fuzz`: millions of inputs that nobody would write, to every parser and every file (dpud/fuzz).

Inputs come in batches, each in a child process, as many of them at once as there are CPUs, up to NR_CHILDREN. A crash
ends its batch; it is made short, and printed with what leads there. The same seed gives the same batches.
"""

import logging
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random, SystemRandom

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpud.bench.report import Line, Report
from dpud.daemon import load_loops
from dpud.errors import UserError
from dpud.fuzz import coverage
from dpud.fuzz.child import Child, Driver, drawn
from dpud.fuzz.live import LIMIT_NS, Batch, Crash
from dpud.fuzz.target import Target
from dpud.fuzz.targets import TARGETS, named

NR_INPUTS = 10_000_000
NR_CHILDREN = 2
BATCH = 5_000
_POLL_S = 0.5
_WIDTH = 120  # where the terminal does not say
_NR_SHOWN = 4
"""Outcomes of a target that are shown."""


@dataclass(frozen=True)
class Job:
    """A batch to be."""

    target: Target
    seed: int
    nr: int
    driver: Driver


@dataclass
class Sum:
    """All batches of one target."""

    target: Target
    nr_inputs: int = 0
    cpu_ns: int = 0
    longest_ns: int = 0
    peak_bytes: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: dict[str, Crash] = field(default_factory=dict)
    nr_crashes: int = 0

    def add(self, batch: Batch) -> None:
        self.nr_inputs += batch.nr_inputs
        self.cpu_ns += batch.cpu_ns
        self.longest_ns = max(self.longest_ns, batch.longest_ns)
        self.peak_bytes = max(self.peak_bytes, batch.peak_bytes)
        self.outcomes.update(batch.outcomes)
        if batch.crash is not None:
            self.nr_crashes += 1
            self.crashes.setdefault(batch.crash.kind, batch.crash)

    def line(self) -> Line:
        most = [f"{name} {nr}" for name, nr in self.outcomes.most_common(_NR_SHOWN)]
        rate = self.nr_inputs / (self.cpu_ns / 1e9) if self.cpu_ns else 0.0
        cells = (
            self.target.name,
            f"{self.nr_inputs:,}",
            f"{rate:,.0f}",
            f"{len(self.outcomes)}: {', '.join(most)}",
            f"{self.longest_ns / 1e6:.1f}",
            f"{self.peak_bytes >> 20}",
            str(self.nr_crashes),
        )
        return Line(cells, "missed" if self.nr_crashes else "met")


HEADINGS = ("Target", "Inputs", "Inputs per CPU s", "Outcomes", "Longest, ms", "Peak, MiB", "Crashes")


def jobs(targets: Sequence[Target], nr_inputs: int, seed: int) -> Iterator[Job]:
    """What a run is made of, in an order by chance: every target is met soon."""
    shares = sum(target.share for target in targets)
    todo: list[Job] = []
    chance = Random(seed)
    for target in targets:
        left = max(1, nr_inputs * target.share // shares)
        while left > 0:
            nr = min(left, BATCH)
            by_coverage = bool(target.modules) and len(todo) % 2 == 1 and coverage.is_there()
            todo.append(Job(target, chance.randrange(1 << 31), nr, coverage.explore if by_coverage else drawn))
            left -= nr
    chance.shuffle(todo)
    yield from todo


def fuzz(work: Iterator[Job], told: Callable[[Batch], object], nr_children: int = NR_CHILDREN) -> None:
    """Do it all; `told` of each batch."""
    running: list[Child] = []
    try:
        while True:
            while len(running) < nr_children and (job := next(work, None)) is not None:
                running.append(Child(job.target, job.seed, job.nr, job.driver))
            if not running:
                return
            select.select([child.fd for child in running], [], [], _POLL_S)
            for child in [child for child in running if child.look()]:
                running.remove(child)
                told(child.end())
    finally:
        for child in running:
            child.kill()


def run(seed: int | None = None, inputs: int | None = None, target: str | None = None) -> Report:
    """Raises UserError where something was found, after printing it."""
    seed = SystemRandom().randrange(1 << 31) if seed is None else seed
    nr_inputs = NR_INPUTS if inputs is None else inputs
    targets = TARGETS if target is None else (named(target),)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else _WIDTH)
    console.print(f"fuzz: seed {seed}, {nr_inputs} inputs, {', '.join(each.name for each in targets)}")
    logging.getLogger().addHandler(logging.NullHandler())
    load_loops()
    sums = {each.name: Sum(each) for each in targets}
    begin = time.perf_counter()
    with Progress(*_COLUMNS, console=console) as bar:
        task = bar.add_task("fuzz", total=nr_inputs)

        def told(batch: Batch) -> None:
            mine = sums[batch.target]
            if batch.crash is not None and batch.crash.kind not in mine.crashes:
                console.print(described(batch.crash), markup=False, highlight=False, soft_wrap=True)
            mine.add(batch)
            bar.update(task, advance=batch.nr_inputs)

        try:
            fuzz(jobs(targets, nr_inputs, seed), told, min(NR_CHILDREN, len(os.sched_getaffinity(0))))
        except (KeyboardInterrupt, SystemExit):  # a run takes hours: what was done by then is told
            console.print("fuzz: ended before its time")
    report = _report(seed, list(sums.values()), time.perf_counter() - begin)
    if any(each.nr_crashes for each in sums.values()):
        console.print(report.table())
        raise UserError(f"crashes: {', '.join(each.target.name for each in sums.values() if each.nr_crashes)}")
    return report


_COLUMNS = TextColumn("fuzz"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()


def described(crash: Crash) -> str:
    """What was found, and how to get there again."""
    lines = [f"{crash.target}: {crash.kind}, batch {crash.seed}, input {crash.number}", crash.text]
    if not crash.is_again:
        lines.append("It did not come again.")
    lines += [f"input: {data[:2000]!r}" for data in crash.inputs[:20]]
    return "\n".join(lines)


def _report(seed: int, sums: Sequence[Sum], seconds: float) -> Report:
    nr_inputs = sum(each.nr_inputs for each in sums)
    peak = max(each.peak_bytes for each in sums) >> 20
    drivers = "atheris takes turns with the mutator" if coverage.is_there() else "atheris is not installed"
    return Report(
        "fuzz",
        "inputs that nobody would write",
        f"Seed {seed}. A crash is an exception that is not documented, also one that is only logged, a violated "
        f"invariant, an input of more than {LIMIT_NS / 1e9:.0f} s of CPU time, memory that stays, or a process that "
        f"dies. {drivers}.",
        [each.line() for each in sums],
        [f"{nr_inputs:,} inputs in {seconds:,.0f} s, at most {peak} MiB a process"],
        HEADINGS,
    )
