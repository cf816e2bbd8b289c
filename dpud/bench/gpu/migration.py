# SPDX-License-Identifier: GPL-2.0-only
"""Migration: beside the recurrence of pre-copy, and a real writer's memory over a link of limited rate beside stopping
it first.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np

from dpud.bench.gpu import veth
from dpud.bench.gpu.lent import kernel_can
from dpud.bench.report import Line, Report, percentile
from dpud.errors import UserError
from dpud.gpu.clock import ManualClock
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.migration import MigrationModule
from dpud.gpu.migration.channel import Channel, Pipe
from dpud.gpu.migration.converge import Prediction, Strategy, predict
from dpud.gpu.migration.engine import Migration
from dpud.gpu.migration.state import Progress
from kernelsim.operation import Operation

RATIOS = (0.3, 0.7, 0.9, 1.1)
NR_PAGES, SENDING_PAGES_PER_S = 8192, 8000.0
PAGE, WIRE_BYTES = 4096, 4096 + 28
MAX_ROUNDS, STOP_SHARE = 6, 0.2
WITHIN = 0.02

NR_BYTES, MBIT, DIRTY_PAGES_PER_S, LIMIT_MS, NR_RUNS = 256 << 20, 1000, 2000.0, 300, 5
PORT = 47047


def run() -> Report:
    report = Report(
        "gpu migration",
        "pre-copy beside its recurrence",
        f"{NR_PAGES} pages between two memories on a clock that only moves when told to; a writer hits all alike, "
        f"at D writes a second beside B pages a second that go over; the writer is held once no more than "
        f"{STOP_SHARE:.0%} of the pages are left, or after {MAX_ROUNDS} rounds. Expected: n(i+1) = M (1 - exp(-(D/B) "
        "n(i)/M)). No compression, no differences. Each cell: ours, expected, deviation.",
        headings=("D / B", "Rounds", "Total, s", "MiB sent", "Downtime, ms", "Verdict"),
        figures=[grid_line(ratio) for ratio in RATIOS],
    )
    report.parts.append(_real())
    return report


# The recurrence.


def grid_line(ratio: float, nr_pages: int = NR_PAGES) -> Line:
    progress, expected = simulate(ratio, nr_pages)
    pairs = (
        ((progress.end_ns - progress.begin_ns) / 1e9, expected.total_s, 1.0),
        (progress.moved_bytes, expected.nr_pages * WIRE_BYTES, 1 / (1 << 20)),
        (progress.downtime_ns / 1e9, expected.downtime_s, 1e3),
    )
    met = progress.rounds == expected.rounds and all(abs(ours / theirs - 1) <= WITHIN for ours, theirs, _ in pairs)
    cells = (f"{ours * unit:.2f}, {theirs * unit:.2f}, {ours / theirs - 1:+.2%}" for ours, theirs, unit in pairs)
    return Line(
        (f"{ratio}", f"{progress.rounds}, {expected.rounds}", *cells, "met" if met else "missed"), _verdict(met)
    )


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def simulate(ratio: float, nr_pages: int = NR_PAGES, seed: int = 1) -> tuple[Progress, Prediction]:
    """A migration with such a writer, and what was to be expected of it."""
    clock, rng = ManualClock(), np.random.default_rng(seed)
    source, target = _memory(clock, nr_pages), _memory(clock, nr_pages)
    va = source.allocate("writer", nr_pages * PAGE)
    source.write("writer", va, rng.bytes(nr_pages * PAGE))
    module = source.migration
    module.compression, module.cache_bytes = "none", 0
    settings = module.settings
    settings.strategy, settings.auto_converge, settings.max_rounds = Strategy.PRECOPY, False, MAX_ROUNDS
    settings.bandwidth_bytes_per_s = int(SENDING_PAGES_PER_S * WIRE_BYTES)
    limit_s = STOP_SHARE * nr_pages / SENDING_PAGES_PER_S
    settings.downtime_limit_ns = int(limit_s * 1e9)
    rate = ratio * SENDING_PAGES_PER_S
    progress = _migrate(source, target, _writer(source, va, nr_pages, rate, rng))
    return progress, predict(nr_pages, rate, SENDING_PAGES_PER_S, limit_s, MAX_ROUNDS)


def _memory(clock: ManualClock, nr_pages: int) -> GpuMemory:
    profile = DeviceProfile(memory_bytes=2 * nr_pages * PAGE)
    memory = GpuMemory([SimulatedDevice(profile, clock)], clock=clock)
    MigrationModule().attach(memory)
    return memory


def _writer(memory: GpuMemory, va: int, nr_pages: int, rate: float, rng: np.random.Generator) -> Callable[[], None]:
    """Writes as many pages as time has passed for, each time it is called."""
    region = memory.clients["writer"].regions[0]
    last_ns, due = memory.clock.now_ns(), 0.0

    def write() -> None:
        nonlocal last_ns, due
        now_ns = memory.clock.now_ns()
        due += (now_ns - last_ns) * rate / 1e9
        last_ns, nr = now_ns, int(due)
        due -= nr
        if region.held or region.released:
            return
        for page in rng.integers(0, nr_pages, nr).tolist():
            memory.write("writer", va + page * PAGE, b"written")

    return write


def _migrate(source: GpuMemory, target: GpuMemory, meanwhile: Callable[[], None]) -> Progress:
    """Over a pipe, both sides and the writer in turn."""
    ours, theirs = Pipe.pair()

    def connect() -> Operation[Channel]:
        yield None
        return ours

    sender, receiver = source.migration.remote("bench", "writer", "there", connect)
    progress = Progress("bench", "writer", "there")
    settings, journal = source.migration.settings, source.migration.out_journal
    sending = Migration(sender, receiver, source.clock, settings, progress, journal).run()
    serving: Iterator[object] = target.migration.receiver.serve(theirs)
    while next(sending, StopIteration) is not StopIteration:
        next(serving, None)
        meanwhile()
    return progress


# The real one.


def _real() -> Report:
    report = Report(
        "gpu migration",
        "a live writer's memory over a veth of limited rate",
        f"A process of {NR_BYTES >> 20} MiB, 3/4 of it noise, writes to {DIRTY_PAGES_PER_S:.0f} pages a second "
        f"of a tenth of it; its memory goes to a process in another network namespace over {MBIT} Mbit/s (tc-tbf). "
        f"Written pages are found by userfaultfd and PAGEMAP_SCAN. {NR_RUNS} runs each; downtime limit {LIMIT_MS} ms. "
        "Downtime: from the stop of the writer until the other side owns the pages, digests of all of it included.",
        headings=("Strategy", "50 % ms down", "99 % ms down", "50 % s in all", "MiB sent", "Same bytes", "Verdict"),
    )
    reason = veth.why_not() or ("" if kernel_can() else "the kernel has no WP_ASYNC, or does not let us use it")
    if reason:
        report.notes.append(f"not run here: {reason}")
        return report
    try:
        with veth.link(MBIT) as link:
            report.figures = _real_lines(link)
    except subprocess.CalledProcessError as error:
        report.notes.append(f"not run here: {error.cmd[0]}: {error.stderr.decode().strip()}")
    return report


def _real_lines(link: veth.Link) -> list[Line]:
    peer, lines = 0.0, []
    for strategy in (Strategy.STOP_AND_COPY, Strategy.PRECOPY, Strategy.POSTCOPY):
        runs = [one_run(link, strategy) for _ in range(NR_RUNS)]
        down = [run["downtime_ns"] / 1e6 for run in runs]
        peer = peer or percentile(down, 50)
        same = sum(run["same"] for run in runs)
        met = same == NR_RUNS and (strategy is Strategy.STOP_AND_COPY or percentile(down, 99) < peer)
        cells = (
            f"{percentile(down, 50):.0f}",
            f"{percentile(down, 99):.0f}",
            f"{percentile([run['total_ns'] / 1e9 for run in runs], 50):.2f}",
            f"{percentile([run['moved_bytes'] for run in runs], 50) / (1 << 20):.0f}",
            f"{same} of {NR_RUNS}",
        )
        lines.append(Line((strategy.value, *cells, _verdict(met)), _verdict(met)))
    return lines


def one_run(link: veth.Link, strategy: Strategy, nr_bytes: int = NR_BYTES, rate: float = DIRTY_PAGES_PER_S) -> dict:  # type: ignore[type-arg]
    """What both ends say, and whether they have the same bytes. Raises UserError where one of them fails."""
    module = [sys.executable, "-P", "-m", "dpud.bench.gpu.migration_worker"]
    address = f"tcp:{veth.THERE}:{PORT}"
    there = subprocess.Popen(link.there(*module, "target", address, str(nr_bytes)), stdout=subprocess.PIPE, text=True)
    try:
        assert there.stdout is not None
        if not there.stdout.readline():
            raise UserError("the target did not start")
        command = [*module, "source", address, str(nr_bytes), str(rate), strategy.value, str(LIMIT_MS)]
        here = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if here.returncode:
            raise UserError(f"the source failed: {here.stderr.strip()}")
        found: dict[str, object] = json.loads(here.stdout)
        if found["state"] != "completed":
            raise UserError(f"the migration {found['state']}: {found['why']}")
        other = json.loads(there.stdout.readline())
        return {**other, **found, "same": other["sha256"] == found["sha256"]}
    finally:
        there.kill()
        there.wait()
