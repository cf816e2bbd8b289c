# SPDX-License-Identifier: GPL-2.0-only
"""Clients that do what they should not, beside one that only wants its files: how much longer does that one wait?

Whoever uses CPUs makes others wait, so each hostile client is held against neighbours that never touch the mount: a
program and its own server, of the daemon's priority, which compute as much as the client and the daemon on its behalf,
and wait for each other as often. What is beyond that is the daemon's fault. Both are measured in turns, beside the same
user, who opens, reads and closes /proc/buddyinfo and writes a sysctl about a thousand times a second.

Means decide, because all that he waits is in them. A percentile knows nothing of the longest waits: a thousand threads
that began to read the log at the same time once kept him for a quarter of a second, and p99 was as ever.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from dpud.bench import host
from dpud.bench.report import Line, Report, percentile

NOBODY = 65534
CLIENTS = {
    "opened_only": ("opens 10,000 files, reads none", NOBODY),
    "begun": ("begins to read 4,000 texts", NOBODY),
    "blocked": ("1,000 threads wait for the log", NOBODY),
    "polled": ("polls 1,000 open files", NOBODY),
    "odd_calls": ("mmap, truncate, odd ioctls", NOBODY),
    "listing": ("lists trees, holds 1,000 lists", NOBODY),
    "names": ("long and deep names", NOBODY),
    "logging": ("floods the log", 0),
    "making": ("makes 1,000 processes", 0),
    "buffers": ("writes a GPU buffer", 0),
}
"""Job -> what it does, and who does it: what only root may do, root does."""

ROUNDS, SECONDS = 3, 2.0
TARGET = 2.0
_FEWEST_WAITS_PER_S = 100.0
HEADINGS = ("Client", "Read, mean", "p99", "Write, mean", "p99", "Longest", "Refused with", "Daemon, MiB", "Verdict")
_WORKER = Path(__file__).with_name("hostile_worker.py")


class Figures(NamedTuple):
    """Of somebody's waits, in ns; or how often longer they are than another's."""

    read_mean: float
    read_p99: float
    write_mean: float
    write_p99: float
    longest: float


@dataclass
class Waits:
    """What the ordinary user waited, in ns, and what went wrong for it."""

    reads: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    delays: list[int] = field(default_factory=list)
    """Of a read and a write in turns: how long he could have run, and had no CPU."""
    wrong: list[str] = field(default_factory=list)

    def add(self, seen: dict[str, list[Any]]) -> None:
        self.reads += seen["reads"]
        self.writes += seen["writes"]
        self.delays += seen["delays"]
        self.wrong += seen["wrong"]

    def figures(self) -> Figures:
        reads, writes = ((fmean(each), percentile(each, 99)) for each in (self.reads, self.writes))
        return Figures(*reads, *writes, max(map(max, (self.reads, self.writes))))

    def for_cpu(self) -> float:
        """Of the longest hundredth of his waits, the part that was for a CPU of his own."""
        waits = chain.from_iterable(zip(self.reads, self.writes, strict=True))
        slowest = sorted(zip(waits, self.delays, strict=True))[-max(len(self.delays) // 100, 1) :]
        return sum(delay for _, delay in slowest) / sum(wait for wait, _ in slowest)


@dataclass
class Outcome:
    """One client's."""

    beside_client: Waits = field(default_factory=Waits)
    beside_neighbour: Waits = field(default_factory=Waits)
    errors: Counter[str] = field(default_factory=Counter)
    nr_held: int = 0
    nr_calls: int = 0
    own_cpus: float = 0.0
    daemon_cpus: float = 0.0
    """CPUs that it took itself, and the daemon on its behalf."""
    waits_per_s: float = 0.0
    """How often it waited for an answer."""
    rss_bytes: int = 0
    """Of the daemon while it was there."""

    def ratios(self) -> Figures:
        pairs = zip(self.beside_client.figures(), self.beside_neighbour.figures(), strict=True)
        return Figures(*(ours / peer for ours, peer in pairs))


def run() -> Report:
    report = Report(
        "hostile",
        "a client that means ill, beside one that does not",
        f"An ordinary program opens, reads and closes buddyinfo and sets a sysctl, some 1,000 times a second, {ROUNDS} "
        f"times for {SECONDS:g} s beside each client, and in turns beside a program and a server that compute as much "
        "as the client and the daemon on its behalf, and wait for each other as often, but leave the mount alone. "
        "Times are with the client, and in brackets how often longer than with those two: "
        f"the mean at most {TARGET:g} times. Memory is what the daemon has while the client is there.",
        headings=HEADINGS,
    )
    rows = []
    with host.daemon() as mount:
        pid = host.server_of(mount)
        quiet, own_cpus = quiet_use(mount, pid)
        rows.append(_row("nobody else", quiet, pid))
        for job, (what, uid) in CLIENTS.items():
            found = measured(mount, pid, job, uid, own_cpus)
            rows.append(_line(what, found))
            report.notes.append(f"{what}: {found.nr_calls:,} calls, {found.nr_held:,} held, {_cpus_of(found)}")
            report.notes += [f"{what}: wrong: {wrong}" for wrong in found.beside_client.wrong[:3]]
        rows.append(_row("nobody else, afterwards", quiet_use(mount, pid)[0], pid))
    report.figures = rows
    return report


def _line(what: str, found: Outcome) -> Line:
    ratios = found.ratios()
    is_met = max(ratios.read_mean, ratios.write_mean) <= TARGET and not found.beside_client.wrong
    verdict = "met" if is_met else "missed"
    refused = ", ".join(name for name, _ in found.errors.most_common(3))
    texts = [f"{_us(value)} ({ratio:.1f})" for value, ratio in zip(found.beside_client.figures(), ratios, strict=True)]
    return Line((what, *texts, refused, _mib(found.rss_bytes), verdict), verdict)


def _cpus_of(found: Outcome) -> str:
    for_cpu = f"{found.beside_client.for_cpu():.0%} ({found.beside_neighbour.for_cpu():.0%})"
    used = f"{found.own_cpus:.2f} + {found.daemon_cpus:.2f} CPUs, {found.waits_per_s:,.0f} waits/s"
    return f"{used}; {for_cpu} of the longest hundredth of the ordinary user's waits were for a CPU"


def _row(what: str, waits: Waits, pid: int) -> Line:
    return Line((what, *map(_us, waits.figures()), "", _mib(rss_bytes(pid)), ""))


def _us(value_ns: float) -> str:
    return f"{value_ns / 1000:,.0f} us"


def _mib(nr_bytes: int) -> str:
    return f"{nr_bytes >> 20:,}"


def measured(
    mount: Path, pid: int, job: str, uid: int, own_cpus: float, *, rounds: int = ROUNDS, seconds: float = SECONDS
) -> Outcome:
    """One client and its neighbour in turns. `own_cpus`: what the daemon takes for the ordinary user alone."""
    outcome = Outcome()
    for _ in range(rounds):
        with client(mount, job, uid, seconds) as hostile:
            before_ns = host.cpu_time_ns(pid)
            outcome.beside_client.add(use(mount, seconds))
            outcome.rss_bytes = max(outcome.rss_bytes, rss_bytes(pid))
            seen = hostile()
        outcome.daemon_cpus = max((host.cpu_time_ns(pid) - before_ns) / 1e9 / seconds - own_cpus, 0)
        outcome.own_cpus, outcome.waits_per_s = seen["cpu_s"] / seconds, seen["nr_waits"] / seconds
        outcome.errors.update(seen["errors"])
        outcome.nr_held = max(outcome.nr_held, seen["nr_held"])
        outcome.nr_calls += seen["nr_calls"]
        with neighbours(mount, pid, outcome, seconds):
            outcome.beside_neighbour.add(use(mount, seconds))
    return outcome


def quiet_use(mount: Path, pid: int, seconds: float = SECONDS) -> tuple[Waits, float]:
    """The ordinary user alone, and how many CPUs the daemon takes for it."""
    waits, before_ns = Waits(), host.cpu_time_ns(pid)
    waits.add(use(mount, seconds))
    return waits, (host.cpu_time_ns(pid) - before_ns) / 1e9 / seconds


def use(mount: Path, seconds: float) -> dict[str, Any]:
    """What the ordinary user sees."""
    with host.started(_command(mount, "use", seconds, os.getuid())) as user:
        seen: dict[str, Any] = json.loads(user.communicate()[0])
        return seen


@contextmanager
def client(mount: Path, job: str, uid: int, seconds: float, *amount: float) -> Iterator[Any]:
    """A client that has prepared itself; called, what it gives waits for its end and tells what it saw."""
    with host.started(_command(mount, job, seconds, uid if os.getuid() == 0 else os.getuid(), *amount)) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the client {job} did not start")
        yield lambda: json.loads(process.communicate()[0])


@contextmanager
def neighbours(mount: Path, pid: int, of: Outcome, seconds: float) -> Iterator[None]:
    """A program and its server, which do as much as a client and the daemon, and nothing else."""
    per_s = max(of.waits_per_s, _FEWEST_WAITS_PER_S)
    nice = os.getpriority(os.PRIO_PROCESS, pid)
    amounts = per_s, of.own_cpus / per_s, of.daemon_cpus / per_s, nice
    with client(mount, "pair", os.getuid(), seconds, *amounts):
        yield


def _command(mount: Path, job: str, seconds: float, uid: int, *amount: float) -> list[str]:
    return [sys.executable, "-P", str(_WORKER), str(mount), job, str(seconds), str(uid), *map(str, amount)]


def rss_bytes(pid: int) -> int:
    """Memory that a process has now (proc_pid_statm(5))."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
