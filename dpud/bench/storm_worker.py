# SPDX-License-Identifier: GPL-2.0-only
"""One reader or writer of the storm: `python storm_worker.py MOUNT read|write|change SEED SECONDS`.

Prints what it saw as JSON. A process of its own, because threads would wait for each other's interpreter; started by
its path, so that it imports nothing of ours.
"""

import errno
import json
import os
import sys
from pathlib import Path
from time import monotonic, perf_counter_ns
from typing import Any

READ = (
    "proc/buddyinfo",
    "proc/vmstat",
    "proc/meminfo",
    "proc/pagetypeinfo",
    "proc/stat",
    "sys/devices/system/node/node0/meminfo",
    "sys/kernel/debug/dpu_compact/stats",
    "sys/kernel/debug/extfrag/extfrag_index",
)
WRITTEN = (
    ("proc/sys/vm/extfrag_threshold", "0", "1000"),
    ("proc/sys/vm/compaction_proactiveness", "0", "100"),
    ("proc/sys/vm/dpu_compact_min_fragments", "1", "1024"),
    ("sys/kernel/mm/transparent_hugepage/enabled", "always", "madvise"),
    ("dev/kmsg", "<6>storm: one", "<7>storm: two"),
)
CHUNKS = (1, 7, 100, 512, 4096, 65536)
REPORTED = ("errors", "nr_texts", "nr_torn", "nr_calls", "worst_ns", "worst_served_ns", "worst_call")
_MAX_READS = 300  # of one file: what a reader of single bytes does before it turns to the next


class Stopwatch:
    """Tells how long something took, and how much of it this thread was not just ready to run and without a CPU."""

    def __init__(self) -> None:
        self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def start(self) -> None:
        self._queued_ns, self._begin_ns = self._queued(), perf_counter_ns()

    def stop(self) -> tuple[int, int]:
        taken_ns = perf_counter_ns() - self._begin_ns
        return taken_ns, max(taken_ns - (self._queued() - self._queued_ns), 0)

    def _queued(self) -> int:
        """Nanoseconds in run queues (sched-stats.rst)."""
        return int(os.pread(self._schedstat, 100, 0).split()[1])


class Worker:
    """What one worker saw."""

    def __init__(self, mount: Path, seed: int) -> None:
        self.mount = mount
        self.turn = seed
        self.errors: list[str] = []
        self.nr_texts = self.nr_torn = self.nr_calls = self.worst_ns = self.worst_served_ns = 0
        self.path, self.worst_call = mount, ""
        self._stopwatch = Stopwatch()

    def timed(self, call: Any, *args: object) -> Any:
        self._stopwatch.start()
        try:
            return call(*args)
        finally:
            taken_ns, served_ns = self._stopwatch.stop()
            self.worst_ns = max(self.worst_ns, taken_ns)
            if served_ns > self.worst_served_ns:
                self.worst_served_ns, self.worst_call = served_ns, f"{call.__name__} of {self.path.name}"
            self.nr_calls += 1

    def read(self) -> None:
        """One file in pieces, to its end or so far as a small size comes."""
        path = self.path = self.mount / READ[self.turn % len(READ)]
        size = CHUNKS[self.turn // len(READ) % len(CHUNKS)]
        fd = os.open(path, os.O_RDONLY)
        try:
            parts = [self.timed(os.read, fd, size)]
            while parts[-1] and len(parts) < _MAX_READS:
                parts.append(self.timed(os.read, fd, size))
        finally:
            os.close(fd)
        if not parts[-1]:
            self.nr_texts += 1
            self.nr_torn += not is_whole(b"".join(parts), path.name)

    def write(self) -> None:
        """A legal value, or one that is not."""
        name, *values = WRITTEN[self.turn % len(WRITTEN)]
        self.path = self.mount / name
        fd = os.open(self.path, os.O_WRONLY | os.O_TRUNC)
        try:
            if self.turn % 11 or name == "dev/kmsg":
                self.timed(os.write, fd, f"{values[self.turn % 2]}\n".encode())
            else:
                self._refused(fd)
        finally:
            os.close(fd)

    def _refused(self, fd: int) -> None:
        try:
            self.timed(os.write, fd, b"nonsense\n")
        except OSError as error:
            if error.errno == errno.EINVAL:
                return
            raise
        self.errors.append("nonsense was taken")

    def change(self) -> None:
        """Fragment a process and compact its node, so that every text moves."""
        mm = self.mount / "sys/kernel/config/kernelsim/mm/storm"
        mm.mkdir()
        try:
            (mm / "anon").write_text("64M")
            (mm / "holes").write_text("50")
            (self.mount / "sys/devices/system/node/node0/compact_dpu").write_text("1")
        finally:
            mm.rmdir()

    def run(self, job: str, seconds: float) -> None:
        end = monotonic() + seconds
        while monotonic() < end:
            self.turn += 1
            try:
                getattr(self, job)()
            except OSError as error:
                self.errors.append(f"{job}: {errno.errorcode.get(error.errno or 0)} {error.filename}")


def is_whole(text: bytes, name: str) -> bool:
    """Is this a whole text of that file, from its first line to its last, and of one moment?"""
    lines = text.decode().splitlines()
    if not text.endswith(b"\n") or "\0" in text.decode():
        return False
    if name == "buddyinfo":
        return all(len(line.split()) == 15 for line in lines)
    if name in ("vmstat", "stats"):
        return all(len(line.split()) == 2 for line in lines) and len({line.split()[0] for line in lines}) == len(lines)
    if name == "meminfo":
        return all(line.endswith(" kB") or "HugePages_" in line for line in lines)
    return True


def main() -> None:
    mount, job, seed, seconds = sys.argv[1:]
    worker = Worker(Path(mount), int(seed))
    worker.run(job, float(seconds))
    json.dump({name: getattr(worker, name) for name in REPORTED}, sys.stdout)


if __name__ == "__main__":
    main()
