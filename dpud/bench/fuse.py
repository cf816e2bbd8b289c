# SPDX-License-Identifier: GPL-2.0-only
"""Small reads and writes through FUSE against Debian's lxcfs, which serves a /proc/meminfo of its own the same way; and
/proc/kpageflags read whole against the real file.

A text is made once and kept until something may have changed it. So there are two kinds of figures: of files that are
read again and again, as monitors do on a machine where little happens, and of files that were changed before each read.
Of the two sysctls that are written, one is a number and nothing else, and setting the other one sets a third.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter_ns

from dpud.bench import host
from dpud.bench.report import Figure, Report, percentile

ROUND_NS = 300_000_000
NR_ROUNDS = 5
NR_READERS = (1, 8)
TARGET = 3.0
"""How many times lxcfs's rate ours has to be."""
TARGET_KPAGEFLAGS = 4.0
"""How many times the real file's time ours may take."""
_READ_SIZE = 1 << 16
_PIECE = 1 << 20
_WAKE_UP_NS = 1_000_000_000
_FILES = ("proc/meminfo", "proc/buddyinfo", "proc/zoneinfo", "proc/sys/vm/extfrag_threshold")
_CHANGED = ("proc/buddyinfo", "proc/zoneinfo")
_NODE_FILE = "sys/devices/system/node/node0/distance"
_CHANGING = "proc/sys/vm/nr_hugepages"
_WRITTEN = ("proc/sys/vm/dpu_compact_enabled", "proc/sys/vm/overcommit_ratio")
_PEER = "lxcfs"
Operation = Callable[[str], None]


def cat(path: str) -> None:
    """open, read, close: one read, as both servers give the whole text at once."""
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, _READ_SIZE)
    os.close(fd)


def echo(path: str, text: bytes = b"1\n") -> None:
    """What a shell's `echo 1 >` does to the file."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, text)
    os.close(fd)


_numbers = cycle((b"1\n", b"2\n"))


def change(path: str) -> None:
    """Write a number that was not there before."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, next(_numbers))
    os.close(fd)


def whole(path: str) -> int:
    """Read a file to its end -> its bytes."""
    nr = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_PIECE):
            nr += len(data)
    return nr


def latencies(operation: Operation, path: str, changed: str = "", duration_ns: int = ROUND_NS) -> list[int]:
    """How long `operation(path)` took, in ns, each time that it was done in so long; first the file `changed` is."""
    begin = now = perf_counter_ns()
    taken = []
    while now - begin < duration_ns:
        before = now
        if changed:
            change(changed)
            before = perf_counter_ns()
        operation(path)
        now = perf_counter_ns()
        taken.append(now - before)
    return taken


@dataclass
class Job:
    """One file in the hands of one or more readers, and what was measured."""

    what: str
    operation: Operation
    path: str
    nr: int
    server: int
    """pid of who serves the file."""
    changed: str = ""
    """What is written to before each read: a file of the machine's that changes its free lists."""
    cpu_ns: int = 0
    """CPU time that the server used meanwhile."""
    rates: list[float] = field(default_factory=list)
    taken_ns: list[int] = field(default_factory=list)

    def round(self, pool: Pool, duration_ns: int = ROUND_NS) -> None:
        before_ns = host.cpu_time_ns(self.server)
        each = (self.operation, self.path, self.changed, duration_ns)
        results = pool.starmap(latencies, [each] * self.nr, chunksize=1)
        self.cpu_ns += host.cpu_time_ns(self.server) - before_ns
        self.rates.append(sum(len(taken) * 1e9 / sum(taken) for taken in results))
        self.taken_ns += [ns for taken in results for ns in taken]

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def p99_us(self) -> float:
        return percentile(self.taken_ns, 99) / 1000


def _jobs(mount: Path, peer: Path | None, nr: int) -> list[Job]:
    ours, changing = host.server_of(mount), str(mount / _CHANGING)
    jobs = [Job(name, cat, str(mount / name), nr, ours) for name in (*_FILES, _NODE_FILE)]
    jobs += [Job(f"{name} after a change", cat, str(mount / name), nr, ours, changing) for name in _CHANGED]
    jobs += [Job(f"echo into {name}", echo, str(mount / name), nr, ours) for name in _WRITTEN]
    if peer is not None:
        jobs.append(Job(_PEER, cat, str(peer / "proc/meminfo"), nr, host.server_of(peer)))
    return jobs


def _measure(jobs: list[Job], nr: int) -> None:
    """All in turns, so that what else the machine does hits all alike."""
    with get_context("fork").Pool(nr) as pool:
        for job in jobs:
            pool.apply(latencies, (job.operation, job.path, job.changed, _WAKE_UP_NS // 4))
        for _ in range(NR_ROUNDS):
            for job in jobs:
                job.round(pool)


def _figures(jobs: list[Job], where: str) -> Iterator[Figure]:
    peer = next((job for job in jobs if job.what == _PEER), None)
    for job in jobs:
        what = f"{job.what}, {job.nr} reader{'s' * (job.nr > 1)}, {where}"
        if job is not peer:
            limit = TARGET * peer.rate if peer else None
            yield Figure(what, job.rate, "/s", limit, f"{TARGET:g} x lxcfs", more=True)
        yield Figure(f"{what}: p99", job.p99_us, "us")
        if not job.changed:
            yield Figure(f"{what}: CPU time of the server", job.cpu_ns / 1000 / len(job.taken_ns), "us")


@contextmanager
def _fair_daemon() -> Iterator[Path]:
    """One that does not go before its peer when both want a CPU."""
    with TemporaryDirectory(prefix="dpud-bench-") as folder:
        config = Path(folder, "config.toml")
        config.write_text("[mount]\nnice = 0\n")
        with host.daemon("--config", str(config)) as mount:
            yield mount


@contextmanager
def _large_machine() -> Iterator[Path]:
    """A daemon whose machine has as many page frames as this one's kpageflags, and no contents."""
    frames = os.sysconf("SC_PHYS_PAGES") // 512 * 512
    with TemporaryDirectory(prefix="dpud-bench-") as folder:
        config = Path(folder, "config.toml")
        config.write_text(f'[machine]\nnodes = [{{memory = {frames * 4096}}}]\n[memory]\nbytes = "none"\n')
        with host.daemon("--config", str(config)) as mount:
            yield mount


def _per_entry_ns(path: str) -> float:
    """Of NR_ROUNDS readings of the whole file, the median time of one 64-bit entry."""
    times = []
    for _ in range(NR_ROUNDS):
        begin = perf_counter_ns()
        nr = whole(path) // 8
        times.append((perf_counter_ns() - begin) / nr)
    return median(times)


def _kpageflags() -> Iterator[Figure]:
    real = "/proc/kpageflags"
    with _large_machine() as mount:
        ours = _per_entry_ns(str(mount / "proc/kpageflags"))
        limit = TARGET_KPAGEFLAGS * _per_entry_ns(real) if os.access(real, os.R_OK) else None
    yield Figure("kpageflags read whole, per page frame", ours, "ns", limit, f"{TARGET_KPAGEFLAGS:g} x the real file")


def run() -> Report:
    report = Report(
        "fuse",
        "reads and writes of small files through the mount",
        f"open+read+close of each file, rates and p99 of {NR_ROUNDS} rounds of {ROUND_NS / 1e9} s, in turns with "
        f"{_PEER}'s proc/meminfo. `After a change`: the hugetlb pool grew or shrank just before. Unpinned with 1 and 8 "
        "readers, and with reader and both servers on one CPU, where what counts is CPU time and not how fast another "
        "CPU wakes up.",
    )
    figures: list[Figure] = []
    for where, place, readers in (
        ("unpinned", nullcontext(), NR_READERS),
        ("one CPU", host.pinned_to({max(os.sched_getaffinity(0))}), (1,)),
    ):
        with place, _fair_daemon() as mount, host.lxcfs() as peer:
            for nr in readers:
                jobs = _jobs(mount, peer, nr)
                _measure(jobs, nr)
                figures += _figures(jobs, where)
    report.figures = [*figures, *_kpageflags()]
    if peer is None:
        report.notes.append("no peer: lxcfs is missing (Debian: apt install lxcfs) or did not start (it wants root)")
    return report
