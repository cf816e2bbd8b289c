# SPDX-License-Identifier: GPL-2.0-only
"""Work lost to failures and to checkpoints, by how often these are made; on a memory whose device falls off the bus."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpud.gpu.clock import ManualClock
from dpud.gpu.fault.interval import daly
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.system import GpuConfig, build

MIB = 1 << 20
MTBF_NS = 10_000_000
_STEP_NS = 20_000
_NR_FAILURES = 30
_BUFFER = MIB // 4
_SHM = Path("/dev/shm")
"""Where files are, if there is such: their time is not the device's, and does not count here."""
Interval = Callable[[FaultModule], float]


@dataclass(frozen=True)
class Waste:
    """Of one run, in shares of its device time."""

    lost: float
    """Work that was done again: between the checkpoint and the failure."""
    spent: float
    """Making checkpoints."""
    interval_ns: float
    """From the end of one to the beginning of the next, at the end of the run."""
    cost_ns: float
    nr_rollbacks: int

    @property
    def total(self) -> float:
        return self.lost + self.spent


def failures(seed: int = 1) -> list[float]:
    """Times between failures, exponentially distributed."""
    gaps: list[float] = np.random.default_rng(seed).exponential(MTBF_NS, _NR_FAILURES).tolist()
    return gaps


def play(interval: Interval, gaps: Sequence[float], folder: Path) -> Waste:
    """A client that writes a page every 20 us on one of two devices; each failure takes the device it is on."""
    clock = ManualClock()
    memory = build(GpuConfig(2, 4 * MIB, 4 * MIB, 4 * MIB, compression=False, checkpoint_folder=folder), clock)
    fault: FaultModule = memory.fault
    va = memory.allocate("work", _BUFFER)
    memory.write("work", va, bytes(_BUFFER))
    rng = np.random.default_rng(2)
    begin_ns = clock.now_ns()
    spent_ns = _checkpoint(fault)
    last_ns = clock.now_ns()
    for gap in gaps:
        fails_ns = clock.now_ns() + gap
        while clock.now_ns() < fails_ns:
            memory.write("work", va + 4096 * int(rng.integers(_BUFFER // 4096)), rng.bytes(64))
            clock.sleep_until(clock.now_ns() + _STEP_NS)
            if clock.now_ns() - last_ns >= interval(fault):
                spent_ns += _checkpoint(fault)
                last_ns = clock.now_ns()
        location = memory.locations[memory.client("work").device]
        fault.lose(location)
        fault.reset(location)
    stats, total_ns = fault.stats(), clock.now_ns() - begin_ns
    cost_ns = fault.checkpoints.interval.cost_ns
    return Waste(stats["lost_work_ns"] / total_ns, spent_ns / total_ns, interval(fault), cost_ns, stats["rollbacks"])


def _checkpoint(fault: FaultModule) -> int:
    """-> what it took. Full, so that its cost does not depend on when the last one was."""
    return fault.checkpoints.create("work", full=True).cost_ns


def learnt(fault: FaultModule) -> float:
    """What the module makes of what it has seen, with a prior that fits this experiment's hardware."""
    known = fault.checkpoints.interval
    seen_ns = fault.memory.clock.now_ns() - known.started_ns
    return daly(known.cost_ns, (seen_ns + MTBF_NS) / (known.nr_failures + 1))


def optimum(fault: FaultModule) -> float:
    """With the mean time between failures known beforehand."""
    return daly(fault.checkpoints.interval.cost_ns, MTBF_NS)


def fixed(times: float) -> Interval:
    """So many times the optimum."""
    return lambda fault: times * optimum(fault)


INTERVALS: dict[str, Interval] = {
    "Daly, M known": optimum,
    "Daly, M learnt": learnt,
    "fixed, a fifth of that": fixed(0.2),
    "fixed, half": fixed(0.5),
    "fixed, three times": fixed(3),
    "fixed, ten times": fixed(10),
}


def run() -> dict[str, Waste]:
    """The same failures for all."""
    log = logging.getLogger("dpud.gpu")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        found = {}
        for name, interval in INTERVALS.items():
            with tempfile.TemporaryDirectory(prefix="dpud-bench-", dir=_SHM if _SHM.is_dir() else None) as folder:
                found[name] = play(interval, failures(), Path(folder))
        return found
    finally:
        log.setLevel(before)
