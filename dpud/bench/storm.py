# SPDX-License-Identifier: GPL-2.0-only
"""Many readers and writers at once: does any of them get an error that a kernel would not give, or have to wait long?

Readers take text files in small pieces and check that what one open file gives is one whole text. Writers write legal
values to knobs, and nonsense now and then, which must be refused with EINVAL. All the while a process is fragmented and
compacted. Then a hundred processes sleep on /dev/kmsg: others must not notice, and each must go when it is killed.
"""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns, sleep

from dpud.bench import host
from dpud.bench.report import Figure, Report, percentile
from dpud.bench.storm_worker import Stopwatch

NR_READERS, NR_WRITERS, NR_BLOCKED = 100, 20, 100
DURATION_S = 60
STALL_TARGET_MS = 100
OTHER_TARGET_MS = 10
KILL_TARGET_MS = 100


@dataclass(frozen=True)
class Seen:
    """What all workers saw together."""

    errors: tuple[str, ...]
    nr_texts: int
    """Texts that were read to their ends."""
    nr_torn: int
    nr_calls: int
    worst_ns: int
    worst_served_ns: int
    """The longest call without what its caller waited for a CPU, when it was ready to run; and what it was."""
    worst_call: str


def storm(mount: Path, seconds: float, nr_readers: int = NR_READERS, nr_writers: int = NR_WRITERS) -> Seen:
    """Let it blow."""
    jobs = ["read"] * nr_readers + ["write"] * nr_writers + ["change"]
    start = [sys.executable, "-P", str(Path(__file__).with_name("storm_worker.py")), str(mount)]
    workers = [
        subprocess.Popen([*start, job, str(seed), str(seconds)], stdout=subprocess.PIPE)
        for seed, job in enumerate(jobs)
    ]
    seen = [json.loads(worker.communicate()[0]) for worker in workers]
    worst = max(seen, key=lambda one: int(one["worst_served_ns"]))
    return Seen(
        errors=tuple(error for one in seen for error in one["errors"]),
        nr_texts=sum(one["nr_texts"] for one in seen),
        nr_torn=sum(one["nr_torn"] for one in seen),
        nr_calls=sum(one["nr_calls"] for one in seen),
        worst_ns=max(one["worst_ns"] for one in seen),
        worst_served_ns=worst["worst_served_ns"],
        worst_call=worst["worst_call"],
    )


@contextmanager
def blocked_readers(mount: Path, nr: int = NR_BLOCKED) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes that have read the log to its end and wait for more."""
    command = ["cat", str(mount / "dev/kmsg")]
    readers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(nr)]
    try:
        for reader in readers:
            _until_waiting(reader)
        yield readers
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def _until_waiting(reader: "subprocess.Popen[bytes]") -> None:
    wchan = Path(f"/proc/{reader.pid}/wchan")
    while "request_wait_answer" not in wchan.read_text():
        sleep(0.01)


def latencies_ns(path: Path, nr: int) -> list[int]:
    """How long open, read and close of `path` took together, each time; but for what we waited for a CPU ourselves."""
    stopwatch, samples = Stopwatch(), []
    for _ in range(nr):
        stopwatch.start()
        path.read_bytes()
        samples.append(stopwatch.stop()[1])
    return samples


def kill_ns(reader: "subprocess.Popen[bytes]") -> int:
    """From SIGKILL until the process is gone."""
    begin = perf_counter_ns()
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    return perf_counter_ns() - begin


def run() -> Report:
    report = Report(
        "storm",
        f"{NR_READERS} readers and {NR_WRITERS} writers for {DURATION_S} s",
        "Each is a process. Readers take texts in pieces of 1 byte to 64 KiB, writers write legal and illegal values, "
        "one process is fragmented and compacted all the while. What the daemon waits for a CPU always counts.",
    )
    with host.daemon() as mount:
        seen = storm(mount, DURATION_S)
        with blocked_readers(mount) as readers:
            others_ns = latencies_ns(mount / "proc/meminfo", 1000)
            killed_ns = [kill_ns(reader) for reader in readers]
    report.figures = [
        Figure("errors that a kernel would not give", len(seen.errors), "", 0),
        Figure("texts that were not whole", seen.nr_torn, "", 0),
        Figure("texts read", seen.nr_texts / DURATION_S, "/s"),
        Figure("reads and writes", seen.nr_calls / DURATION_S, "/s"),
        Figure("longest read or write", seen.worst_served_ns / 1e6, "ms", STALL_TARGET_MS),
        Figure("the same, with what its caller waited for a CPU", seen.worst_ns / 1e6, "ms"),
        Figure(f"reading meminfo with {NR_BLOCKED} blocked, p99", percentile(others_ns, 99) / 1e6, "ms",
               OTHER_TARGET_MS),
        Figure("a killed reader is gone, slowest", max(killed_ns) / 1e6, "ms", KILL_TARGET_MS),
    ]  # fmt: skip
    report.notes.append(f"longest: {seen.worst_call}")
    report.notes += [f"{what}: {nr} times" for what, nr in Counter(seen.errors).items()]
    return report
