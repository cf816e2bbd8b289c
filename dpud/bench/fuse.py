# SPDX-License-Identifier: GPL-2.0-only
"""Reads through FUSE against Debian's lxcfs, which serves a /proc/meminfo of its own the same way."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter_ns

from dpud.bench import host
from dpud.bench.report import Figure, Report

ROUND_NS = 300_000_000
NR_ROUNDS = 7
_READ_SIZE = 1 << 16
_WAKE_UP_NS = 1_000_000_000


def cat(path: str) -> None:
    """open, read, close: one read, as both servers give the whole text at once."""
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, _READ_SIZE)
    os.close(fd)


def echo(path: str) -> None:
    """What a shell's `echo 1 >` does to the file."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, b"1\n")
    os.close(fd)


def per_second(operation: Callable[[str], None], path: str, duration_ns: int = ROUND_NS) -> float:
    """How often `operation(path)` can be done in a second, tried for so long."""
    begin = now = perf_counter_ns()
    nr = 0
    while now - begin < duration_ns:
        operation(path)
        nr += 1
        now = perf_counter_ns()
    return nr * 1e9 / (now - begin)


def _compare(mount: Path, peer: Path | None) -> dict[str, list[float]]:
    """Rates per second of all rounds, ours and the peer's in turns."""
    sysctl = str(mount / "proc/sys/vm/dpu_compact_enabled")
    jobs = {"meminfo": (cat, str(mount / "proc/meminfo")), "sysctl": (cat, sysctl), "echo": (echo, sysctl)}
    if peer is not None:
        jobs["peer"] = (cat, str(peer / "proc/meminfo"))
    for operation, path in jobs.values():
        per_second(operation, path, _WAKE_UP_NS)
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(NR_ROUNDS):
        for name, (operation, path) in jobs.items():
            rates[name].append(per_second(operation, path))
    return rates


def _figures(where: str, rates: dict[str, list[float]]) -> list[Figure]:
    middle = {name: median(values) for name, values in rates.items()}
    return [
        Figure(f"open+read+close of proc/meminfo, {where}", middle["meminfo"], "/s", middle.get("peer"), "lxcfs", True),
        Figure(f"cat of dpu_compact_enabled, {where}", 1e6 / middle["sysctl"], "us"),
        Figure(f"echo into dpu_compact_enabled, {where}", 1e6 / middle["echo"], "us"),
    ]


def run() -> Report:
    report = Report(
        "fuse",
        "reads of a small file through the mount",
        f"One reader. Medians of {NR_ROUNDS} rounds of {ROUND_NS / 1e9} s, in turns with the peer. Unpinned, and with "
        "reader and both servers on one CPU, where what counts is CPU time and not how fast another CPU wakes up.",
    )
    for where, place in (("unpinned", nullcontext()), ("one CPU", host.pinned_to({max(os.sched_getaffinity(0))}))):
        with place, host.daemon() as mount, host.lxcfs() as peer:
            report.figures = [*report.figures, *_figures(where, _compare(mount, peer))]
    if peer is None:
        report.notes.append("no peer: lxcfs is missing (Debian: apt install lxcfs) or did not start (it wants root)")
    return report
