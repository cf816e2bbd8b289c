# SPDX-License-Identifier: GPL-2.0-only
"""What keeping the machine costs: an echo with and without a journal, how long it takes to be there again, with and
without a checkpoint, and for how long that holds the machine up."""

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time_ns, sleep

from dpud.bench.fuse import echo
from dpud.bench.kept import SMALL, Daemon, started
from dpud.bench.report import Figure, Report
from dpud.errors import UserError

NR_ROUNDS, NR_ECHOS = 9, 2000
NR_INPUTS = 100_000
TARGET_COST, TARGET_RECOVERY_S = 1.2, 5.0
TEXTS = {"1": b"1\n", "0x1": b"0x1\n"}
"""The second is no plain decimal number: such a request is Python's, and is noted by itself."""
_WRITTEN = "proc/sys/vm/extfrag_threshold"
_STATE = "sys/kernel/dpud_state"
LARGE = """
[machine]
cpus = 2
[[machine.nodes]]
memory = "4G"
"""
FILLED = "1G"
TARGET_STALL_MS = 100.0


def _round(daemon: Daemon, text: bytes, nr: int = NR_ECHOS) -> tuple[float, float]:
    """(CPU, wall) of one echo in us: the daemon's and ours."""
    path = str(daemon.mount / _WRITTEN)
    begin, cpu_ns = perf_counter(), daemon.cpu_ns() + process_time_ns()
    for _ in range(nr):
        echo(path, text)
    spent_ns = daemon.cpu_ns() + process_time_ns() - cpu_ns
    return spent_ns / nr / 1e3, (perf_counter() - begin) / nr * 1e6


def cost(folder: Path, text: bytes, nr_rounds: int = NR_ROUNDS) -> dict[str, tuple[float, float]]:
    """(CPU, wall) of an echo in us, medians of rounds in turns: without, with a journal, with one and a disk."""
    folder.mkdir()
    daemons = {
        "without": Daemon(folder / "without", keeps=False),
        "kept": Daemon(folder / "kept"),
        "kept, sync = 1000": Daemon(folder / "synced", sync="1000"),
    }
    with started(daemons["without"]), started(daemons["kept"]), started(daemons["kept, sync = 1000"]):
        for daemon in daemons.values():
            _round(daemon, text, 500)
        rounds = [{name: _round(daemon, text) for name, daemon in daemons.items()} for _ in range(nr_rounds)]
    return {name: (median(one[name][0] for one in rounds), median(one[name][1] for one in rounds)) for name in daemons}


def checkpointed(daemon: Daemon) -> dict[str, int]:
    """Have a checkpoint made -> what the daemon says of it."""
    nr = stats(daemon)["checkpoints"]
    (daemon.mount / _STATE / "checkpoint").write_text("1")
    while (found := stats(daemon))["checkpoints"] == nr:
        if found["checkpoints_failed"]:
            raise UserError((daemon.mount / _STATE / "problem").read_text())
        sleep(0.01)
    return found


def stats(daemon: Daemon) -> dict[str, int]:
    lines = (daemon.mount / _STATE / "stats").read_text().splitlines()
    return {name: int(number) for name, number in map(str.split, lines)}


def large(folder: Path) -> dict[str, int]:
    """The same of a machine with FILLED of memory in use."""
    with started(Daemon(folder / "large", LARGE)) as daemon:
        web = daemon.mount / "sys/kernel/config/kernelsim/mm/web"
        web.mkdir()
        (web / "anon").write_text(FILLED)
        return checkpointed(daemon)


def recovery(folder: Path, nr_inputs: int = NR_INPUTS) -> tuple[list[tuple[float, float]], int, dict[str, int]]:
    """From exec to ready of a daemon whose journal has so many echos, and after a checkpoint, beyond that of one whose
    journal is empty -> ((CPU s, wall s) of both; the journal's bytes; what was said of the checkpoint)."""
    empty, full = Daemon(folder / "empty", SMALL), Daemon(folder / "full", SMALL)
    for daemon, nr in ((empty, 0), (full, nr_inputs)):
        with started(daemon):
            path = str(daemon.mount / _WRITTEN)
            with open(path, "wb", buffering=0) as file:
                for number in range(nr):
                    file.seek(0)
                    file.write(b"%#x\n" % (number % 1000))
    nr_bytes = (full.state / "journal").stat().st_size
    times: list[tuple[float, float]] = []
    made: dict[str, int] = {}
    for daemon in (empty, full, full):
        begin = perf_counter()
        daemon.start()
        times.append((daemon.cpu_ns() / 1e9, perf_counter() - begin))
        if daemon is full and not made:
            made = checkpointed(full)
        daemon.kill()
    return [(cpu_s - times[0][0], wall_s - times[0][1]) for cpu_s, wall_s in times[1:]], nr_bytes, made


def _costs(text: str, taken: dict[str, tuple[float, float]]) -> list[Figure]:
    without = taken["without"]
    return [
        Figure(f"echo {text} without a journal, CPU", without[0], "us"),
        Figure(f"echo {text} without a journal, wall", without[1], "us"),
        *(
            Figure(f"echo {text}, {name}, {clock}", taken[name][at], "us", without[at] * TARGET_COST, "120 %")
            for name in list(taken)[1:]
            for at, clock in enumerate(("CPU", "wall"))
        ),
    ]


def run() -> Report:
    report = Report(
        "journal",
        "what it costs that nothing is lost",
        f"echo 1 > /{_WRITTEN} (open with O_TRUNC, write, close), and 0x1, for which Python is needed: CPU time of the "
        f"daemon and of who echoes, and wall time; medians of {NR_ROUNDS} rounds of {NR_ECHOS}, daemons in turns. "
        f"Recovery: from exec to ready with {NR_INPUTS} such writes as 0x1 in the journal, a record each, and after a "
        "checkpoint, less the same with none. Stall: for how long a "
        f"checkpoint held the machine; {FILLED} of memory in use on the large one.",
    )
    with TemporaryDirectory(prefix="dpud-bench-") as scratch:
        taken = {name: cost(Path(scratch, name), text) for name, text in TEXTS.items()}
        times, nr_bytes, small_one = recovery(Path(scratch))
        large_one = large(Path(scratch))
    report.figures = [
        *(figure for name, found in taken.items() for figure in _costs(name, found)),
        *(
            Figure(f"recovery of {NR_INPUTS} inputs{how}, {clock}", taken_s[at], "s", TARGET_RECOVERY_S)
            for how, taken_s in zip(("", " after a checkpoint"), times, strict=True)
            for at, clock in enumerate(("CPU", "wall"))
        ),
        *(
            figure
            for name, made in (("small", small_one), ("large", large_one))
            for figure in (
                Figure(f"checkpoint of the {name} machine, stall", made["last_stall_us"] / 1e3, "ms", TARGET_STALL_MS),
                Figure(f"checkpoint of the {name} machine, until on disk", made["last_write_ms"], "ms"),
                Figure(f"checkpoint of the {name} machine, size", made["last_bytes"], "bytes"),
            )
        ),
        Figure("journal, bytes an input", nr_bytes / NR_INPUTS, "bytes"),
    ]
    return report
