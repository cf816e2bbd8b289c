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
from tempfile import TemporaryDirectory
from time import perf_counter_ns, sleep

from dpud.bench import host
from dpud.bench.report import Figure, Report, percentile
from dpud.bench.storm_worker import READ, WRITTEN, Stopwatch

NR_READERS, NR_WRITERS, NR_BLOCKED = 100, 20, 100
DURATION_S = 60
PEER_DURATION_S = 20
_TMPFS = "/dev/shm"
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


def storm(
    mount: Path, seconds: float, nr_readers: int = NR_READERS, nr_writers: int = NR_WRITERS, *, changes: bool = True
) -> Seen:
    """Let it blow."""
    jobs = ["read"] * nr_readers + ["write"] * nr_writers + ["change"] * changes
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


def storm_in_tmpfs(mount: Path, seconds: float) -> Seen:
    """The same readers and writers on copies of the files, where no server has to answer.

    How long its calls take is what so many processes do to each other: they wait for a CPU, and for who holds a file's
    lock and waits for a CPU. (It takes nonsense too, so its errors say nothing.)
    """
    with TemporaryDirectory(prefix="dpud-bench-", dir=_TMPFS) as folder:
        for name in (*READ, *(name for name, *_ in WRITTEN)):
            copy = Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"" if name == "dev/kmsg" else (mount / name).read_bytes())
        return storm(Path(folder), seconds, changes=False)


@contextmanager
def blocked_readers(mount: Path, nr: int = NR_BLOCKED) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes that wait at the end of the log for more."""
    log = mount / "dev/kmsg"
    command = ["dd", f"if={log}", "status=none", "iflag=skip_bytes", f"skip={log.stat().st_size}"]
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
    """It sleeps in a request, and in the same one as a while ago: between two it would have run."""
    process, before = Path(f"/proc/{reader.pid}"), ""
    while True:
        seen = (process / "schedstat").read_text()
        if seen == before and "request_wait_answer" in (process / "wchan").read_text():
            return
        before = seen
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
        peer = storm_in_tmpfs(mount, PEER_DURATION_S)
        with blocked_readers(mount) as readers:
            others_ns = latencies_ns(mount / "proc/meminfo", 1000)
            killed_ns = [kill_ns(reader) for reader in readers]
    report.figures = [
        Figure("errors that a kernel would not give", len(seen.errors), "", 0),
        Figure("texts that were not whole", seen.nr_torn, "", 0),
        Figure("texts read", seen.nr_texts / DURATION_S, "/s"),
        Figure("reads and writes", seen.nr_calls / DURATION_S, "/s"),
        Figure("longest read or write", seen.worst_served_ns / 1e6, "ms", STALL_TARGET_MS),
        Figure("the same of copies of the files in a tmpfs", peer.worst_served_ns / 1e6, "ms"),
        Figure("longest read or write, with what its caller waited for a CPU", seen.worst_ns / 1e6, "ms"),
        Figure("the same of copies of the files in a tmpfs", peer.worst_ns / 1e6, "ms"),
        Figure(f"reading meminfo with {NR_BLOCKED} blocked, p99", percentile(others_ns, 99) / 1e6, "ms",
               OTHER_TARGET_MS),
        Figure("a killed reader is gone, slowest", max(killed_ns) / 1e6, "ms", KILL_TARGET_MS),
    ]  # fmt: skip
    report.notes.append(f"longest: {seen.worst_call}; in the tmpfs: {peer.worst_call}")
    report.notes += [f"{what}: {nr} times" for what, nr in Counter(seen.errors).items()]
    return report
