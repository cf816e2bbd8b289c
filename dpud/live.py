# SPDX-License-Identifier: GPL-2.0-only
"""Reading this machine's own memory layout from /proc.

No lock holds the kernel still, and reading allocates memory itself. So all buffers exist and are touched
beforehand, files are opened once, and between the two readings of buddyinfo that frame kpageflags nothing
else is done. If both are equal, the free lists held still in between; otherwise it is read again."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpud.proctext import CaptureError, parse_maps
from dpud.rawcapture import (
    MAX_MAPPINGS_PER_PAGE,
    MAX_TEXT_BYTES,
    PM_PRESENT,
    TEXTS,
    WORDS,
    RawCapture,
    alloc_pages,
    end_pfn,
    zones_of,
)
from kernelsim.hostimage import VM_EXEC, VM_READ, VM_WRITE

PROC = Path("/proc")
EXTFRAG = Path("/sys/kernel/debug/extfrag")
INFORMATION = (PROC / "vmstat", PROC / "meminfo", EXTFRAG / "extfrag_index", EXTFRAG / "unusable_index")

READ_BYTES = 4 << 20
TEXT_BUFFER_BYTES = 4 << 20
PAUSE_S = 0.1
VM_ACCESS = VM_READ | VM_WRITE | VM_EXEC  # reservations without access have no pages
MAX_SCAN_PAGES = 1 << 26  # of one process' address space (256 GiB): reservations of terabytes are not walked

Progress = Callable[[str, float], None]
"""Called with what is being read and the done part of it, 0..1.
"""


@dataclass(frozen=True)
class LiveCapture:
    """This machine as read, and how still it held."""

    raw: RawCapture
    quiet: bool
    """buddyinfo was the same before and after kpageflags was read."""
    attempts: int
    nr_tasks: int
    nr_tasks_skipped: int
    """Gone while being read, unreadable, or beyond what a capture may hold."""


def read_live(attempts: int = 10, progress: Progress | None = None) -> LiveCapture:
    """Read this host until it held still, `attempts` times at most. Raises CaptureError (not root, no such
    files)."""
    report = progress or _silent
    with _one_line_errors(), ExitStack() as stack:
        reader = _Reader(stack)
        quiet, nr = reader.read(max(attempts, 1), report)
        raw = reader.capture()
        nr_tasks, nr_skipped = _read_tasks(raw, report)
        raw.texts |= _information()
    return LiveCapture(raw, quiet, nr, nr_tasks, nr_skipped)


def read_around(
    event: Callable[[], None],
    attempts: int = 10,
    progress: Progress | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> tuple[LiveCapture, LiveCapture]:
    """This host right before and right after `event`, with all buffers made in advance and nothing done in between.

    Processes are read first, which takes memory, then the host is prepared, and the pages come last, until they held
    still; then comes the event. After it the pages are read first, and once. Raises CaptureError, and what the
    callbacks raise.
    """
    report = progress or _silent
    with _one_line_errors(), ExitStack() as stack:
        first, second = _Reader(stack), _Reader(stack)
        tasks = first.empty_capture()
        nr_before = _read_tasks(tasks, report)
        information = _information()
        quiet, nr_attempts = first.read(max(attempts, 1), report, prepare)
        event()
        quiet_after, _ = second.read(1, report)
        before, after = first.capture(), second.capture()
        before.pagemap, before.texts["maps"] = tasks.pagemap, tasks.texts["maps"]
        before.texts |= information
        after.texts |= _information()
        nr_after = _read_tasks(after, report)
    return (
        LiveCapture(before, quiet, nr_attempts, *nr_before),
        LiveCapture(after, quiet_after, 1, *nr_after),
    )


def _silent(_what: str, _done: float) -> None:
    pass


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise CaptureError(
            f"{error.filename}: permission denied: reading physical memory's layout needs root"
        ) from None
    except OSError as error:
        raise CaptureError(f"{error.filename or '/proc'}: {error.strerror}") from None


def _information() -> dict[str, str]:
    return {path.name: path.read_text() for path in INFORMATION if path.is_file()}


def _open(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


class _Reader:
    """The open files and touched buffers of one reading."""

    def __init__(self, stack: ExitStack) -> None:
        self._files = {name: _open(PROC / name, stack) for name in (*TEXTS, *WORDS)}
        self._texts = {name: TextBuffer(self._files[name]) for name in TEXTS}
        self._end = TextBuffer(self._files["buddyinfo"])
        self._zones = zones_of({name: text.read() for name, text in self._texts.items()})
        self._flags, self._counts = (_touched(alloc_pages(self._zones)) for _ in WORDS)

    def read(self, attempts: int, report: Progress, prepare: Callable[[], None] = lambda: None) -> tuple[bool, int]:
        """Fill the buffers until buddyinfo was the same before and after; whether it was, and the attempts made. Before
        each attempt the host is prepared."""
        for attempt in range(1, attempts + 1):
            prepare()
            report(f"kpageflags (attempt {attempt})", 0.0)
            for text in self._texts.values():
                text.fill()
            _read_words(self._files["kpageflags"], "kpageflags", self._flags, end_pfn(self._zones))
            self._end.fill()
            report("kpagecount", 0.5)
            _read_words(self._files["kpagecount"], "kpagecount", self._counts, end_pfn(self._zones))
            quiet = self._end.read() == self._texts["buddyinfo"].read()
            if quiet or attempt == attempts:
                break
            time.sleep(PAUSE_S)
        return quiet, attempt

    def capture(self) -> RawCapture:
        """What `read` read."""
        captured = {name: text.read() for name, text in self._texts.items()} | {"buddyinfo.end": self._end.read()}
        zones = zones_of(captured)
        if end_pfn(zones) > len(self._flags):
            raise CaptureError("zoneinfo: memory was added while it was read")
        return RawCapture(captured, zones, self._flags, self._counts)

    def empty_capture(self) -> RawCapture:
        """One without pages, to read processes into."""
        return RawCapture({}, self._zones, self._flags[:0], self._counts[:0])


class TextBuffer:
    """A /proc text read without allocating anything."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._view = _touched(np.empty(TEXT_BUFFER_BYTES >> 3, dtype=np.uint64)).data.cast("B")
        self._nr_bytes = 0

    def fill(self) -> None:
        self._nr_bytes = 0
        while nr := os.preadv(self._fd, [self._view[self._nr_bytes :]], self._nr_bytes):
            self._nr_bytes += nr

    def read(self) -> str:
        if not self._nr_bytes:
            self.fill()
        return bytes(self._view[: self._nr_bytes]).decode()


def _touched(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same array, with real memory behind every page of it."""
    words.fill(1)
    return words


def _read_words(fd: int, name: str, words: NDArray[np.uint64], needed: int) -> None:
    view = words.data.cast("B")
    nr_bytes = 0
    while nr_bytes < len(view):
        nr = os.preadv(fd, [view[nr_bytes : nr_bytes + READ_BYTES]], nr_bytes)
        if not nr:
            break
        nr_bytes += nr
    if nr_bytes < needed * 8:
        raise CaptureError(f"{name}: the kernel shows {nr_bytes // 8} pages, zoneinfo has {needed}")


def _read_tasks(raw: RawCapture, report: Progress) -> tuple[int, int]:
    """Add all processes' maps and pagemaps to `raw`. Returns how many there are, and how many were left
    out."""
    room, text_room = end_pfn(raw.zones) * MAX_MAPPINGS_PER_PAGE, MAX_TEXT_BYTES
    buffer = np.empty(READ_BYTES >> 3, dtype=np.uint64)
    maps: list[str] = []
    entries = [raw.pagemap]
    nr_tasks = nr_skipped = 0
    pids = sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())
    for index, pid in enumerate(pids):
        report("pagemap", index / len(pids))
        try:
            text, present = _read_task(PROC / str(pid), buffer)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            nr_skipped += 1
            continue
        if len(present) > room or len(text.encode()) > text_room:
            nr_skipped += 1
        elif text:  # kernel threads have none
            nr_tasks += 1
            room -= len(present)
            text_room -= len(text.encode())
            maps.append(text)
            entries.append(present)
    raw.texts["maps"] = "".join(maps)
    raw.pagemap = np.concatenate(entries)
    return nr_tasks, nr_skipped


def _read_task(folder: Path, buffer: NDArray[np.uint64]) -> tuple[str, NDArray[np.uint64]]:
    """The process' part of `maps` and its pagemap entries (see rawcapture)."""
    maps = (folder / "maps").read_bytes().decode(errors="replace")
    if not maps:
        return "", np.empty((0, 2), dtype=np.uint64)
    comm = " ".join((folder / "comm").read_text(errors="replace").split())
    with ExitStack() as stack:
        fd = _open(folder / "pagemap", stack)
        vmas = parse_maps(maps.split("\n")[:-1], f"{folder}/maps")
        present = np.concatenate(list(_present_entries(fd, vmas, buffer)))
    return f"Task {folder.name} {len(present)} {comm}\n{maps}", present


def _present_entries(
    fd: int, vmas: tuple[tuple[int, int, int], ...], buffer: NDArray[np.uint64]
) -> Iterator[NDArray[np.uint64]]:
    yield np.empty((0, 2), dtype=np.uint64)
    room = MAX_SCAN_PAGES
    for start, end, flags in vmas:
        if not flags & VM_ACCESS or end - start > room:
            continue
        room -= end - start
        while start < end:
            window = buffer[: end - start]
            nr = os.preadv(fd, [window.data.cast("B")], start * 8) >> 3
            if not nr:
                break
            at = np.flatnonzero(window[:nr] & np.uint64(PM_PRESENT))
            yield np.stack((at.astype(np.uint64) + np.uint64(start), window[at]), axis=1)
            start += nr
