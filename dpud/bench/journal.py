# SPDX-License-Identifier: GPL-2.0-only
"""What keeping the machine costs: an echo with and without a journal, and how long it takes to be there again."""

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time_ns

from dpud.bench.fuse import echo
from dpud.bench.kept import SMALL, Daemon, started
from dpud.bench.report import Figure, Report

NR_ROUNDS, NR_ECHOS = 9, 2000
NR_INPUTS = 100_000
TARGET_COST, TARGET_RECOVERY_S = 1.2, 5.0
_WRITTEN = "proc/sys/vm/extfrag_threshold"


def _round(daemon: Daemon, nr: int = NR_ECHOS) -> tuple[float, float]:
    """(CPU, wall) of one echo in us: the daemon's and ours."""
    path = str(daemon.mount / _WRITTEN)
    begin, cpu_ns = perf_counter(), daemon.cpu_ns() + process_time_ns()
    for _ in range(nr):
        echo(path)
    spent_ns = daemon.cpu_ns() + process_time_ns() - cpu_ns
    return spent_ns / nr / 1e3, (perf_counter() - begin) / nr * 1e6


def cost(folder: Path, nr_rounds: int = NR_ROUNDS) -> dict[str, tuple[float, float]]:
    """(CPU, wall) of an echo in us, medians of rounds in turns: without, with a journal, with one and a disk."""
    daemons = {
        "without": Daemon(folder / "without", keeps=False),
        "kept": Daemon(folder / "kept"),
        "kept, sync = 1000": Daemon(folder / "synced", sync="1000"),
    }
    with started(daemons["without"]), started(daemons["kept"]), started(daemons["kept, sync = 1000"]):
        for daemon in daemons.values():
            _round(daemon, 500)
        rounds = [{name: _round(daemon) for name, daemon in daemons.items()} for _ in range(nr_rounds)]
    return {name: (median(one[name][0] for one in rounds), median(one[name][1] for one in rounds)) for name in daemons}


def recovery(folder: Path, nr_inputs: int = NR_INPUTS) -> tuple[float, float, int]:
    """(CPU s, wall s, bytes): from exec to ready of a daemon whose journal has so many echos, beyond that of one
    whose journal is empty."""
    empty, full = Daemon(folder / "empty", SMALL), Daemon(folder / "full", SMALL)
    for daemon, nr in ((empty, 0), (full, nr_inputs)):
        with started(daemon):
            path = str(daemon.mount / _WRITTEN)
            with open(path, "wb", buffering=0) as file:
                for number in range(nr):
                    file.seek(0)
                    file.write(b"%d\n" % (number % 1000))
    times = []
    for daemon in (empty, full):
        begin = perf_counter()
        daemon.start()
        times.append((daemon.cpu_ns() / 1e9, perf_counter() - begin))
        daemon.kill()
    nr_bytes = (full.state / "journal").stat().st_size
    return times[1][0] - times[0][0], times[1][1] - times[0][1], nr_bytes


def run() -> Report:
    report = Report(
        "journal",
        "what it costs that nothing is lost",
        f"echo 1 > /{_WRITTEN} (open with O_TRUNC, write, close): CPU time of the daemon and of who echoes, and wall "
        f"time; medians of {NR_ROUNDS} rounds of {NR_ECHOS}, daemons in turns. Recovery: from exec to ready with "
        f"{NR_INPUTS} writes in the journal, less the same with none.",
    )
    with TemporaryDirectory(prefix="dpud-bench-") as scratch:
        taken = cost(Path(scratch))
        cpu_s, wall_s, nr_bytes = recovery(Path(scratch))
    without = taken["without"]
    report.figures = [
        Figure("an echo without a journal, CPU", without[0], "us"),
        Figure("an echo without a journal, wall", without[1], "us"),
        *(
            Figure(f"an echo, {name}, {clock}", taken[name][at], "us", without[at] * TARGET_COST, "120 %")
            for name in list(taken)[1:]
            for at, clock in enumerate(("CPU", "wall"))
        ),
        Figure(f"recovery of {NR_INPUTS} inputs, CPU", cpu_s, "s", TARGET_RECOVERY_S),
        Figure(f"recovery of {NR_INPUTS} inputs, wall", wall_s, "s", TARGET_RECOVERY_S),
        Figure("journal, bytes an input", nr_bytes / NR_INPUTS, "bytes"),
    ]
    return report
