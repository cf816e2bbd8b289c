# SPDX-License-Identifier: GPL-2.0-only
"""`dpud snapshot --compact DIR`: this host before and after its own compact_memory, for `dpud bench fidelity DIR`.

DIR/before and DIR/after are captures (`rawcapture` has the files), DIR/result.txt has `name value` lines: what the
kernel's counters rose by, how long the write took, and the circumstances. Nothing is written, and as little as possible
is done, between the first reading and the second: page cache that the capture itself makes would be compacted too, and
a dirty large folio in the page cache can end a compaction. The process stays on one CPU, which is told, because pages
that a compaction frees go to the lists of the CPU that it runs on.
"""

import ctypes
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpud import prepare
from dpud.fragment import fragmented
from dpud.live import LiveCapture, Progress, TextBuffer, read_around
from dpud.proctext import CaptureError
from dpud.snapshot import check_target, files_of, write_whole

COMPACT_MEMORY = Path("/proc/sys/vm/compact_memory")
VMSTAT = Path("/proc/vmstat")
COUNTERS = ("pgmigrate_success", "pgmigrate_fail", "compact_migrate_scanned", "compact_free_scanned")
"""What every result.txt has; other counters of _OTHERS are there if they changed."""
_OTHERS = ("compact_", "thp_migration_", "thp_split_")


@dataclass(frozen=True)
class Fragmentation:
    """How the memory is to be fragmented first (`fragment` has the patterns)."""

    pattern: str
    mb: int
    keep_percent: int


@dataclass(frozen=True)
class RealCompaction:
    """A compaction that took place: vmstat before and after it, and the wall time of the write."""

    before: dict[str, int]
    after: dict[str, int]
    seconds: float
    cpu: int

    def delta(self, name: str) -> int:
        return self.after.get(name, 0) - self.before.get(name, 0)

    @property
    def others_allocated(self) -> int:
        """Pages that something else than the compaction allocated meanwhile (its targets do not count as allocated)."""
        return sum(self.delta(name) for name in self.after if name.startswith("pgalloc_"))

    @property
    def others_freed(self) -> int:
        """Pages that were freed beyond those that the compaction vacated, and the few targets it did not use."""
        return max(self.delta("pgfree") - self.delta("pgmigrate_success"), 0)


@dataclass(frozen=True)
class CompactReport:
    """What was captured."""

    directory: Path
    compaction: RealCompaction
    before: LiveCapture
    nr_bytes: int

    def __str__(self) -> str:
        run = self.compaction
        held = "" if self.before.quiet else "; the free lists never held still before it: counts will differ a little"
        moved, failed = run.delta("pgmigrate_success"), run.delta("pgmigrate_fail")
        return (
            f"{self.directory}: {moved} pages migrated, {failed} failed, in {run.seconds * 1e3:.1f} ms; "
            f"{self.before.nr_tasks} processes, {self.nr_bytes / 1e6:.1f} MB{held}"
        )


def snapshot_compact(
    directory: Path,
    fragmentation: Fragmentation | None = None,
    *,
    as_is: bool = False,
    attempts: int = 10,
    progress: Progress | None = None,
) -> CompactReport:
    """Capture, compact and capture this host into `directory`, which must be empty or not there. Needs root. `as_is`:
    do not prepare it. Raises CaptureError."""
    check_target(directory)
    how = fragmentation
    folder = directory.resolve().parent
    compactor = _Compactor()
    try:
        with _on_one_cpu(compactor) as cpus, ExitStack() as stack:
            compactor.open(stack)
            ready = (lambda: None) if as_is else partial(prepare.prepare, cpus)
            if not as_is:
                stack.enter_context(prepare.short_lists())
            with fragmented(how.pattern, how.mb, how.keep_percent, folder) if how else nullcontext():
                before, after = read_around(compactor.compact, attempts, progress, ready)
        run = compactor.outcome()
        files = {"result.txt": result_text(run, how, before, as_is).encode()}
        files |= {f"before/{name}": content for name, content in files_of(before).items()}
        files |= {f"after/{name}": content for name, content in files_of(after).items()}
        nr_bytes = write_whole(directory, files)
    except PermissionError as error:
        raise CaptureError(f"{error.filename}: permission denied: compacting memory needs root") from None
    except OSError as error:
        raise CaptureError(f"{error.filename or directory}: {error.strerror}") from None
    return CompactReport(directory, run, before, nr_bytes)


class _Compactor:
    """Writes 1 to compact_memory, with everything that it takes made beforehand."""

    def __init__(self) -> None:
        self.cpu = -1
        self._fd = -1
        self._texts: list[TextBuffer] = []
        self._seconds = 0.0

    def open(self, stack: ExitStack) -> None:
        self._fd = os.open(COMPACT_MEMORY, os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, self._fd)
        vmstat = os.open(VMSTAT, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, vmstat)
        self._texts = [TextBuffer(vmstat), TextBuffer(vmstat)]

    def compact(self) -> None:
        before, after = self._texts
        before.fill()
        begin = time.perf_counter()
        os.write(self._fd, b"1")
        self._seconds = time.perf_counter() - begin
        after.fill()

    def outcome(self) -> RealCompaction:
        before, after = (_counts(text.read()) for text in self._texts)
        return RealCompaction(before, after, self._seconds, self.cpu)


def _counts(vmstat: str) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in vmstat.splitlines())}


@contextmanager
def _on_one_cpu(compactor: _Compactor) -> Iterator[set[int]]:
    """Stay on the CPU that this runs on, and tell the compactor which. Gives all CPUs it may run on."""
    allowed = os.sched_getaffinity(0)
    cpu = int(ctypes.CDLL(None).sched_getcpu())
    os.sched_setaffinity(0, {cpu})
    compactor.cpu = cpu
    try:
        yield allowed
    finally:
        os.sched_setaffinity(0, allowed)


def result_text(run: RealCompaction, how: Fragmentation | None, before: LiveCapture, as_is: bool) -> str:
    """The `name value` lines of result.txt."""
    nr_moved = run.delta("pgmigrate_success")
    lines = [
        f"pattern {how.pattern if how else 'none'}",
        f"mb {how.mb if how else 0}",
        f"keep_percent {how.keep_percent if how else 100}",
        *(f"{name} {run.delta(name)}" for name in COUNTERS),
        f"seconds {run.seconds:.6f}",
        f"ns_per_page {run.seconds / nr_moved * 1e9:.0f}" if nr_moved else "ns_per_page inf",
        f"cpu {run.cpu}",
        f"kernel {platform.release()}",
        f"nr_tasks {before.nr_tasks}",
        f"nr_ptes {len(before.raw.pagemap)}",
        f"quiet {int(before.quiet)}",
        f"prepared {'no' if as_is else prepare.PREPARED}",
        f"others_allocated {run.others_allocated}",
        f"others_freed {run.others_freed}",
    ]
    others = [name for name in run.after if name.startswith(_OTHERS) and name not in COUNTERS and run.delta(name)]
    return "".join(f"{line}\n" for line in [*lines, *(f"{name} {run.delta(name)}" for name in others)])
