# SPDX-License-Identifier: GPL-2.0-only
"""Every engine on the same fragmented memory, by its own model: how long a region takes, how long its pages are away.

Library mode, content stamps: nothing is measured but with the `host` engine, whose time is what it took here. The same
pages move to the same places each time; what differs is the time.
"""

from collections.abc import Iterator

from dpud.bench.report import Line, Report
from dpud.dpu.driver import DpuDriver
from dpud.inject import LiveClock
from kernelsim.dpu_compact_stats import Distribution
from kernelsim.dpu_hw import ENGINES
from kernelsim.machine import MM_CONFIGFS, NODES_SYSFS, Machine, MachineConfig, NodeConfig

NODE_BYTES = 1 << 30
FILLED = "800M"
HOLES = "50 seed=7"
REGION_ORDER = 13
ENGINE = "/sys/kernel/debug/dpu_compact/engine"


def compacted(engine: str, driver: DpuDriver, filled: str = FILLED) -> Machine:
    """A machine with half of a process's pages freed at random, compacted by that engine."""
    machine = Machine(MachineConfig(nodes=(NodeConfig(NODE_BYTES),), bytes="stamp"), driver, LiveClock())
    machine.registry.add(f"{MM_CONFIGFS}/bench", machine.new_process("bench"))
    for path, text in (
        (f"{MM_CONFIGFS}/bench/anon", filled),
        (f"{MM_CONFIGFS}/bench/holes", HOLES),
        ("/proc/sys/vm/dpu_compact_region_order", str(REGION_ORDER)),
        (ENGINE, engine),
        (f"{NODES_SYSFS}/node0/compact_dpu", "1"),
    ):
        machine.registry.write(path, text)
    return machine


def _us(distribution: Distribution) -> Iterator[str]:
    _, p50, p95, p99, longest = distribution.cells()
    return (f"{ns / 1e3:,.0f}" for ns in (p50, p95, p99, longest))


def engine_row(engine: str, filled: str = FILLED) -> Line:
    """One engine's line."""
    driver = DpuDriver()
    try:
        dpu = compacted(engine, driver, filled).dpu
    finally:
        driver.close()
    stats, books = dpu.stats, dpu.accounts
    taken = books.batches.engines[engine]
    nr_moved = stats.pages_moved + stats.cpu_pages_moved
    per_huge = f"{nr_moved / stats.huge_pages_gained:.0f}" if stats.huge_pages_gained > 0 else "-"
    region, away = (_us(group["modelled"]) for group in (taken.latency, taken.unavailable))
    per_page = f"{books.modelled_ns / nr_moved:.0f}"
    return Line((engine, *region, *list(away)[::3], per_page, per_huge))


def run() -> Report:
    report = Report(
        "engines",
        "the same compaction by every engine",
        f"{FILLED} of a process, a random half of it freed; regions of 2^{REGION_ORDER} pages; each by its own model.",
        headings=(
            "Engine",
            *(f"{what}, us" for what in ("p50", "p95", "p99", "max")),
            "away p50",
            "away max",
            "ns/page",
            "pages/huge",
        ),
    )
    report.figures = [engine_row(engine) for engine in ENGINES]
    report.notes = [
        "p50 to max: a region from isolation to remapping; away: how long a page could not be used (us); quantiles are "
        "rounded up by 1/16 at most; pages/huge: pages moved for each huge page gained",
        "host is this machine's own time, and that of a Python program around compiled loops; seed's figures measure "
        "nothing and leave isolation out",
    ]
    return report
