# SPDX-License-Identifier: GPL-2.0-only
"""Fragments this host's real memory, in a process of its own, for as long as it is wanted.

    python -m dpud.fragment PARENT PATTERN MB KEEP FOLDER

It takes MB mebibytes in single pages and gives a part of them back, so that KEEP percent stay in use, scattered. Then
it writes `ready` and waits until its standard input ends or PARENT dies; its memory goes with it. Anything else it
writes is one line that says what failed. Patterns, after `hostfrag.c`, which made the first captures:

- random: each page is kept by chance;
- runs: alternating runs of kept and freed pages, up to KEEP and 100 - KEEP long;
- fork: random, and four children that share the pages and each let go of another tenth;
- pinned: random, and up to 3000 pages are held in pipes (vmsplice), so that they cannot migrate;
- files: random, and as much page cache, of a file in FOLDER, a part of it dropped.
"""

import ctypes
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpud import namespace
from dpud.proctext import CaptureError

PATTERNS = ("random", "runs", "fork", "pinned", "files")
SEED = 7

NR_CHILDREN = 4
CHILD_DROPS = 0.1
MAX_PINNED, PINNED_PER_PIPE = 3000, 12
SPLICE_F_NONBLOCK = 2  # linux/splice.h
_RESERVE_MB = 512  # that must stay available
_CHUNK_BYTES = 1 << 16


@contextmanager
def fragmented(pattern: str, mb: int, keep_percent: int, folder: Path) -> Iterator[None]:
    """Keep this host's memory fragmented within the block. Raises CaptureError."""
    available = _available_mb()
    needed = mb * (2 if pattern == "files" else 1) + _RESERVE_MB
    if needed > available:
        raise CaptureError(f"--mb {mb}: needs {needed} MiB, {available} MiB of memory are available")
    words = [str(os.getpid()), pattern, str(mb), str(keep_percent), str(folder)]
    command = [sys.executable, "-P", "-m", "dpud.fragment", *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = process.stdout.readline().strip()
        if said != "ready":
            raise CaptureError(f"--fragment {pattern}: {said or 'the process that does it died'}")
        yield
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def _available_mb() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    raise CaptureError("/proc/meminfo: no MemAvailable")


class _Fragmenter:
    """The memory of this process, and what keeps parts of it."""

    def __init__(self, mb: int, keep_percent: int) -> None:
        self.nr_pages = mb << 20 >> 12
        self.keep_percent = keep_percent
        self.random = np.random.default_rng(SEED)
        self.memory = mmap.mmap(-1, self.nr_pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        words = np.frombuffer(self.memory, dtype=np.uint64)
        self.address = words.ctypes.data
        words[:: mmap.PAGESIZE // 8] = np.arange(self.nr_pages) | 1
        self.held: list[object] = []

    def drop(self, pages: NDArray[np.int64]) -> None:
        """Give these back, one by one and in this order."""
        for page in pages.tolist():
            self.memory.madvise(mmap.MADV_DONTNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)

    def chosen(self, part: float) -> NDArray[np.int64]:
        """About this part of all pages, ascending."""
        return np.flatnonzero(self.random.random(self.nr_pages) < part)

    def random_half(self) -> None:
        self.drop(self.chosen(1 - self.keep_percent / 100))

    def runs(self) -> None:
        page, kept = 0, True
        while page < self.nr_pages:
            length = int(self.random.integers(1, self.keep_percent if kept else 100 - self.keep_percent, endpoint=True))
            if not kept:
                self.drop(np.arange(page, min(page + length, self.nr_pages)))
            page, kept = page + length, not kept

    def fork(self) -> None:
        self.random_half()
        for _ in range(NR_CHILDREN):
            dropped = self.chosen(CHILD_DROPS)
            done, tell = os.pipe()
            if os.fork() == 0:
                self.drop(dropped)
                os.close(tell)
                _wait()
                os._exit(0)
            os.close(tell)
            os.read(done, 1)  # ends when the child has closed its side
            os.close(done)

    def pin(self) -> None:
        self.random_half()
        libc = ctypes.CDLL(None, use_errno=True)
        pipe = (-1, -1)
        for number, page in enumerate(self.chosen(0.001)[:MAX_PINNED].tolist()):
            if number % PINNED_PER_PIPE == 0:
                pipe = os.pipe()
                fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 65536)
                self.held.append(pipe)
            vector = (ctypes.c_void_p * 2)(self.address + page * mmap.PAGESIZE, mmap.PAGESIZE)
            if libc.vmsplice(pipe[1], vector, ctypes.c_size_t(1), SPLICE_F_NONBLOCK) != mmap.PAGESIZE:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))

    def cache(self, folder: str) -> None:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (kept until this process ends)
        self.held.append(file)
        chunk = bytes([3]) * _CHUNK_BYTES
        for _ in range(self.nr_pages * mmap.PAGESIZE // _CHUNK_BYTES):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        for page in self.chosen(1 - self.keep_percent / 100).tolist():
            os.posix_fadvise(file.fileno(), page * mmap.PAGESIZE, mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)
            self.memory.madvise(mmap.MADV_DONTNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)


def _wait() -> None:
    """Until standard input ends: until nobody wants this any more."""
    while os.read(0, 4096):
        pass


def main(parent: str, pattern: str, mb: str, keep_percent: str, folder: str) -> None:
    namespace.die_with_parent(int(parent), signal.SIGKILL)
    try:
        fragmenter = _Fragmenter(int(mb), int(keep_percent))
        fragment: dict[str, Callable[[], None]] = {
            "random": fragmenter.random_half,
            "runs": fragmenter.runs,
            "fork": fragmenter.fork,
            "pinned": fragmenter.pin,
            "files": lambda: fragmenter.cache(folder),
        }
        fragment[pattern]()
    except OSError as error:
        print(error.strerror, flush=True)
        return
    print("ready", flush=True)
    _wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
