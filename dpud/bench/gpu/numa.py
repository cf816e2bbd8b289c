# SPDX-License-Identifier: GPL-2.0-only
"""NUMA: what an access costs on average with pages where each strategy puts them, beside the best there is.

All of it is simulated: the matrices are those of the topology files, time is the data path's. So it is the same on
every machine, and says nothing about a real one. The best is an assignment of pages to frames, solved by scipy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from dpud.bench.gpu.numa_load import STRATEGIES, Load, Run, Strategy, best_ns, make
from dpud.bench.report import Figure, Line, Report
from dpud.errors import UserError
from dpud.gpu.numa.topology import shipped

WINDOW = 1000
NR_WINDOWS = 24
CLOSE = 1.10
"""So near to the best is converged."""
_SETTLED = 6
"""Windows at the end of a phase that count as after convergence."""


@dataclass(frozen=True)
class Phase:
    """How one phase went. `ratios`: cost against the best, after each window of accesses."""

    ratios: tuple[float, ...]
    nr_moves: int

    @property
    def settled(self) -> float:
        last = self.ratios[-_SETTLED:]
        return sum(last) / len(last)

    @property
    def moves_per_1000(self) -> float:
        return self.nr_moves / len(self.ratios) * 1000 / WINDOW

    @property
    def converged_after(self) -> int | None:
        """Accesses until it was near the best, and stayed there; None: never."""
        far = [number for number, ratio in enumerate(self.ratios) if ratio > CLOSE]
        first = far[-1] + 1 if far else 0
        return None if first == len(self.ratios) else (first + 1) * WINDOW


def phases(load: Load, strategy: Strategy, nr_windows: int = NR_WINDOWS) -> list[Phase]:
    """Where pages do not move, one window is as good as many."""
    run = Run(load, strategy)
    found = []
    for phase, use in enumerate(load.phases):
        best, ratios, nr_moves = best_ns(use, run.numa), [], 0
        for seed in range(nr_windows if strategy.rule != "off" else 1):
            nr_moves += run.play(phase, WINDOW, seed) if strategy.rule != "off" else 0
            ratios.append(run.expected_ns(phase) / best)
        found.append(Phase(tuple(ratios), nr_moves))
    return found


def run() -> Report:
    """Raises UserError without scipy."""
    if find_spec("scipy") is None:
        raise UserError("gpu numa needs scipy: pip install scipy")
    reports = [_report(name) for name in sorted(shipped(), key=lambda name: len(make(name).topology.nodes))]
    reports[0].parts += reports[1:]
    return reports[0]


def _report(name: str) -> Report:
    load = make(name)
    results = {label: phases(load, strategy) for label, strategy in STRATEGIES.items()}
    ours = results[next(iter(STRATEGIES))]
    report = Report(
        "gpu numa",
        f"average cost of an access, {name}, simulated",
        f"{load.nr_pages} pages of 4 KiB, three quarters of the memory of {len(load.topology.nodes)} nodes, all first "
        "written by node 0. Each is used by one node for 80 %, by the others for the rest; popularity is Zipf's. In "
        f"phase 2 other nodes use other pages. Cost is the matrix's, against an optimal assignment; {NR_WINDOWS}000 "
        "accesses a phase, the last 6000 are after convergence. Moves per 1000 accesses over all of a phase.",
        headings=("Strategy", "1. phase 1", "1. moves", "1. near after", "2. phase 2", "2. moves", "2. near after"),
    )
    report.figures = [_line(label, each) for label, each in results.items()]
    figures: Sequence[Figure] = [
        Figure(f"phase {number}, after convergence, against the best", phase.settled, "x", CLOSE)
        for number, phase in enumerate(ours, 1)
    ]
    report.parts = [Report("gpu numa", f"dpud's rule, {name}", "The target is within 10 % of the optimum.", figures)]
    return report


def _line(label: str, found: Sequence[Phase]) -> Line:
    cells = [label]
    for phase in found:
        after = phase.converged_after
        cells += [f"{phase.settled:.3f} x", f"{phase.moves_per_1000:.1f}", "never" if after is None else str(after)]
    return Line(tuple(cells))
