# SPDX-License-Identifier: GPL-2.0-only
"""dpu_compact_adaptive: the engine or the CPU for each batch, by what both were found to take.

Both are taken to cost so much for each batch and so much for each page in it. What regions took, from isolation to
remapping, by the engine's clock, feeds a running least-squares fit of these two costs, in which each region counts
DECAY times as much as the next. Where all regions are of one size, the two cannot be told apart; then it is all put
down to the pages.

On the wall clock, the first region of each path is left out: caches were cold.

The engine is taken where its predicted cost is lower. First, and again every PROBE_PERIOD decisions, the path that is
not taken gets one region, or its figures would grow old.

Several regions may be in flight, and which of them are done when the next is decided on depends on threads. So a
decision only looks at regions that must be done by then: those at least `lag` before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY = 0.9
MIN_SAMPLES = 2
PROBE_PERIOD = 64
_SAME_SIZE = 1e-2
"""Relative variance of sizes (10 % squared) below which they are one size: a line through them would be a guess."""

UNKNOWN, NO_BREAK_EVEN = 0, -1


@dataclass
class Cost:
    """A running fit of ns = batch_ns + nr_pages * page_ns."""

    nr_samples: int = 0
    _weight: float = 0.0
    _pages: float = 0.0
    _ns: float = 0.0
    _pages_pages: float = 0.0
    _pages_ns: float = 0.0

    def add(self, nr_pages: int, ns: int) -> None:
        """One region took so long."""
        self.nr_samples += 1
        for name, value in (
            ("_weight", 1.0),
            ("_pages", nr_pages),
            ("_ns", ns),
            ("_pages_pages", float(nr_pages) ** 2),
            ("_pages_ns", float(nr_pages) * ns),
        ):
            setattr(self, name, DECAY * getattr(self, name) + value)

    def fit(self) -> tuple[float, float]:
        """(batch_ns, page_ns), neither below 0. Only after a sample."""
        mean = self._pages / self._weight
        variance = self._pages_pages / self._weight - mean**2
        through_origin = 0.0, self._ns / self._pages
        if variance <= _SAME_SIZE * mean**2:
            return through_origin
        page_ns = (self._pages_ns / self._weight - mean * self._ns / self._weight) / variance
        batch_ns = self._ns / self._weight - page_ns * mean
        if batch_ns < 0:
            return through_origin
        return (batch_ns, page_ns) if page_ns >= 0 else (self._ns / self._weight, 0.0)

    def __str__(self) -> str:
        batch_ns, page_ns = self.fit()
        return f"{batch_ns:.0f} ns + {page_ns:.0f} ns/page"


def breakeven(engine: Cost, cpu: Cost) -> int:
    """Pages from which the engine is faster; NO_BREAK_EVEN if a page costs it no less than the CPU."""
    (engine_batch, engine_page), (cpu_batch, cpu_page) = engine.fit(), cpu.fit()
    if engine_page >= cpu_page:
        return NO_BREAK_EVEN
    return max(1, math.ceil((engine_batch - cpu_batch) / (cpu_page - engine_page)))


@dataclass(frozen=True)
class _Sample:
    path: str
    clock: str
    nr_pages: int
    ns: int


class Adaptive:
    """The policy. Paths are engines by name, clocks "modelled" or "wall"."""

    def __init__(self) -> None:
        self.nr_cpu = 0
        self.nr_engine = 0
        self.breakeven_pages = UNKNOWN
        self.news: str | None = None
        """What changed with the last decision, for the log."""
        self._costs: dict[tuple[str, str], Cost] = {}
        self._samples: dict[int, list[_Sample]] = {}
        self._told: dict[str, int] = {}
        self._warm: set[str] = set()
        self._number = 0
        self._absorbed = 0
        self._since_probe = 0

    def begin(self, lag: int) -> int:
        """A region comes up; its number, to be given to `sample`. All but the last `lag` before it are done."""
        self._number += 1
        self._absorb(self._number - lag - 1)
        return self._number

    def sample(self, number: int, path: str, nr_pages: int, modelled_ns: int, wall_ns: int) -> None:
        """Region `number` was done by that path."""
        if nr_pages:
            took = {"modelled": modelled_ns, "wall": wall_ns}
            samples = [_Sample(path, clock, nr_pages, ns) for clock, ns in took.items()]
            self._samples.setdefault(number, []).extend(samples)

    def use_engine(self, engine: str, clock: str, nr_pages: int) -> bool:
        """Whether the region that came up last is for the engine."""
        self.news = None
        chosen = self._choose(self._cost(engine, clock), self._cost("cpu", clock), engine, nr_pages)
        if chosen:
            self.nr_engine += 1
        else:
            self.nr_cpu += 1
        return chosen

    def _cost(self, path: str, clock: str) -> Cost:
        return self._costs.setdefault((path, clock), Cost())

    def _absorb(self, last: int) -> None:
        for number in range(self._absorbed + 1, last + 1):
            for sample in self._samples.pop(number, []):
                if sample.clock == "wall" and sample.path not in self._warm:
                    self._warm.add(sample.path)
                    continue
                self._cost(sample.path, sample.clock).add(sample.nr_pages, sample.ns)
        self._absorbed = max(self._absorbed, last)

    def _choose(self, engine: Cost, cpu: Cost, name: str, nr_pages: int) -> bool:
        if min(engine.nr_samples, cpu.nr_samples) < MIN_SAMPLES:
            self.breakeven_pages = UNKNOWN
            if max(engine.nr_samples, cpu.nr_samples) < MIN_SAMPLES:
                return self._number % 2 == 1
            return engine.nr_samples < MIN_SAMPLES
        self._note_breakeven(engine, cpu, name)
        (engine_batch, engine_page), (cpu_batch, cpu_page) = engine.fit(), cpu.fit()
        better = engine_batch + nr_pages * engine_page < cpu_batch + nr_pages * cpu_page
        self._since_probe += 1
        if self._since_probe >= PROBE_PERIOD:
            self._since_probe = 0
            return not better
        return better

    def _note_breakeven(self, engine: Cost, cpu: Cost, name: str) -> None:
        """News are: the first figures, and a break-even that comes, goes or moves by a factor of two."""
        old = self._told.get(name, UNKNOWN)
        new = self.breakeven_pages = breakeven(engine, cpu)
        if old == new or (old > 0 and old / 2 < new < old * 2):
            return
        self._told[name] = new
        choice = "using the CPU" if new == NO_BREAK_EVEN else f"using {name} from {new} pages on"
        self.news = f"{name} takes {engine}, the CPU {cpu}: {choice}"
