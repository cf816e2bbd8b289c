# SPDX-License-Identifier: GPL-2.0-only
"""`dpud record DIR`: what this host's page allocator does, for `dpud replay DIR`.

DIR/before and DIR/after are captures of the host (`rawcapture` has the files) around DIR/trace.zst, the text of ftrace;
DIR/record.txt has `name value` lines. Nothing is done between the first capture and the beginning of the trace, nor
between its end and the second: both are read by the same calls that `snapshot --compact` uses. The recorder's own
allocations are in the trace as everybody's are.
"""

import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import zstandard

from dpud.errors import UserError
from dpud.live import LiveCapture, Progress, read_around
from dpud.proctext import CaptureError
from dpud.snapshot import check_target, drafted, files_of
from dpud.tracefs import TraceInstance

EVENTS = (
    "kmem/mm_page_alloc",
    "kmem/mm_page_free",
    "kmem/mm_page_alloc_extfrag",
    "compaction/mm_compaction_migratepages",
)
BUFFER_MB = 32
"""Of each CPU, at first."""
ZSTD_LEVEL = 3
PAUSE_S = 0.02


@dataclass(frozen=True)
class Recording:
    """What to record: a command, a time, or until Ctrl-C."""

    command: Sequence[str] = ()
    seconds: float | None = None
    buffer_mb: int = BUFFER_MB


@dataclass(frozen=True)
class RecordReport:
    """What was recorded."""

    directory: Path
    seconds: float
    nr_lines: int
    nr_lost: int
    """Lines that say that events were lost."""
    nr_bytes: int
    quiet: bool
    exit_code: int
    """Of the command; 0 without one."""

    def __str__(self) -> str:
        lost = f"; EVENTS WERE LOST in {self.nr_lost} places: take a larger --buffer" if self.nr_lost else ""
        held = "" if self.quiet else "; the free lists never held still before it: counts will differ a little"
        return (
            f"{self.directory}: {self.nr_lines} lines of trace in {self.seconds:.1f} s, "
            f"{self.nr_bytes / 1e6:.1f} MB{lost}{held}"
        )


def record(directory: Path, how: Recording, *, attempts: int = 3, progress: Progress | None = None) -> RecordReport:
    """Record into `directory`, which must be empty or not there. Needs root. Raises CaptureError, UserError."""
    check_target(directory)
    try:
        with drafted(directory) as draft, TraceInstance(_instance_name(), EVENTS, how.buffer_mb << 10) as instance:
            with (draft / "trace.zst").open("wb") as file:
                tracer = _Tracer(instance, file, how, progress)
                before, after = read_around(tracer.trace, attempts, progress)
                tracer.finish()
            nr_bytes = _write(draft, tracer, before, after)
    except OSError as error:
        raise CaptureError(f"{error.filename or directory}: {error.strerror}") from None
    return RecordReport(
        directory, tracer.seconds, tracer.nr_lines, tracer.nr_lost, nr_bytes, before.quiet, tracer.exit_code
    )


def _instance_name() -> str:
    return f"dpud-{time.monotonic_ns()}"


def _write(draft: Path, tracer: "_Tracer", before: LiveCapture, after: LiveCapture) -> int:
    """The files beside the trace; returns the size of all."""
    quiet = f"quiet_before {int(before.quiet)}\nquiet_after {int(after.quiet)}\n"
    files = {"record.txt": (tracer.text() + quiet).encode()}
    files |= {f"before/{name}": content for name, content in files_of(before).items()}
    files |= {f"after/{name}": content for name, content in files_of(after).items()}
    for name, content in files.items():
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_bytes(content)
    return sum(map(len, files.values())) + (draft / "trace.zst").stat().st_size


class _Tracer:
    """Traces into a compressed file while a command runs or time passes."""

    def __init__(self, instance: TraceInstance, file: Any, how: Recording, progress: Progress | None) -> None:
        self._instance = instance
        self._how = how
        self._progress = progress
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        self._writer = compressor.stream_writer(file, closefd=False)
        self._interrupted = False
        self.nr_lines = 0
        self.nr_lost = 0
        self.seconds = 0.0
        self.exit_code = 0

    def trace(self) -> None:
        """From here on everything is in the trace, until this returns."""
        with self._until_interrupted():
            self._instance.write("tracing_on", "1")
            begin = time.monotonic()
            child = None
            try:
                child = self._start()
                self._drain_while(child, begin)
            finally:
                self._instance.write("tracing_on", "0")
                if child is not None and child.poll() is None:  # we are being ended
                    child.terminate()
            self.seconds = time.monotonic() - begin

    def _start(self) -> "subprocess.Popen[bytes] | None":
        if not self._how.command:
            return None
        try:
            return subprocess.Popen(self._how.command)
        except OSError as error:
            raise UserError(f"{self._how.command[0]}: {error.strerror}") from None

    def _drain_while(self, child: "subprocess.Popen[bytes] | None", begin: float) -> None:
        limit = self._how.seconds
        while not (self._interrupted and child is None):
            if child is not None and (code := child.poll()) is not None:
                self.exit_code = code if code >= 0 else 128 - code
                return
            passed = time.monotonic() - begin
            if child is None and limit is not None and passed >= limit:
                return
            if not self._take():
                self._show(passed)
                time.sleep(PAUSE_S)

    @contextmanager
    def _until_interrupted(self) -> Iterator[None]:
        """Ctrl-C ends the trace, not this program: a command gets it as well and is waited for."""

        def interrupt(_signum: int, _frame: FrameType | None) -> None:
            self._interrupted = True

        old = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)

    def _show(self, passed: float) -> None:
        if self._progress is not None:
            share = passed / self._how.seconds if self._how.seconds else 0.0
            self._progress(f"Tracing: {self.nr_lines} lines", min(share, 1.0))

    def _take(self) -> bool:
        text = self._instance.read()
        if text:
            self.nr_lines += text.count(b"\n")
            self.nr_lost += text.count(b" EVENTS]\n")
            self._writer.write(text)
        return bool(text)

    def finish(self) -> None:
        """Take what was still in the buffers when the trace ended."""
        while self._take():
            pass
        self._writer.close()  # type: ignore[no-untyped-call]

    def text(self) -> str:
        """The `name value` lines of record.txt."""
        lines = {
            "seconds": f"{self.seconds:.6f}",
            "lines": self.nr_lines,
            "lost_places": self.nr_lost,
            "buffer_mb": self._how.buffer_mb,
            "kernel": platform.release(),
            "command": " ".join(self._how.command) or "-",
            "exit_code": self.exit_code,
        }
        return "".join(f"{name} {value}\n" for name, value in lines.items())
