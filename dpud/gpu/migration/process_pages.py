# SPDX-License-Identifier: MIT
"""A real process's memory as what is migrated, by what Linux offers (uffd.py).

Theory of operation
    A process lends a range of its memory (`Lent.here`, called in it): anonymous, registered with a userfaultfd that
    nobody need read. Somebody else, who may be another process, is the source (`ProcessSource`): it asks the kernel
    which pages were written to, reads them through /proc/PID/mem, and stops the process with SIGSTOP for the switch.

    On the other side a process lends a range to be filled (`Lent.here(missing=True)`), passes the descriptor to the
    sink (`ProcessSink`), and waits (`Lent.wait_until_owned`) while pages are put there. Only itself may drop pages of
    its own again, so it does that meanwhile when the sink says so. In post-copy it goes on while some are missing: its
    first access to one waits, the sink is told (`faults`), and the page is asked for first.

A thread that holds Python's interpreter must not touch a missing page while another of the same process should serve
it: it would wait for itself. So the sink is in another process than the memory.
"""

import ctypes
import errno
import mmap
import os
import signal
import socket
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpud.gpu.errors import GpuError
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.migration import uffd
from dpud.gpu.migration.pages import Area, Manifest, Mask, Pages, runs
from kernelsim.operation import Operation

PAGE_BYTES: Literal[4096] = 4096
_STOP_S = 5.0
_QUANTUM_S = 0.01
"""Of throttling: of so much, the process is stopped for its share (QEMU's cpu-throttle has 10 ms too)."""


@dataclass
class Lent:
    """A range of a process's memory, and the descriptor that reports on it."""

    pid: int
    address: int
    nr_bytes: int
    fd: int

    @classmethod
    def here(cls, nr_bytes: int, *, missing: bool = False) -> tuple["Lent", mmap.mmap]:
        """New memory of this process. Raises OSError where the kernel cannot, or does not allow it."""
        memory = mmap.mmap(-1, nr_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if missing:
            fd = uffd.userfaultfd(0)
            uffd.register(fd, address, nr_bytes, uffd.REGISTER_MISSING)
        else:
            fd = uffd.userfaultfd(uffd.WP_ASYNC | uffd.WP_UNPOPULATED)
            uffd.register(fd, address, nr_bytes, uffd.REGISTER_WP)
        return cls(os.getpid(), address, nr_bytes, fd), memory

    def give(self, sock: socket.socket) -> None:
        """Pass it to another process, over a unix socket."""
        text = f"{self.pid} {self.address} {self.nr_bytes}".encode()
        socket.send_fds(sock, [text], [self.fd])

    @classmethod
    def take(cls, sock: socket.socket) -> "Lent":
        """The other end."""
        text, (fd,), _, _ = socket.recv_fds(sock, 256, 1)
        pid, address, nr_bytes = (int(word) for word in text.split())
        return cls(pid, address, nr_bytes, fd)

    @staticmethod
    def wait_until_owned(sock: socket.socket, memory: mmap.mmap) -> bool:
        """In the process that is filled: until it may use its memory -> whether it ever may."""
        while words := sock.recv(256).split():
            if words[0] == b"own":
                return True
            first, nr = (int(word) * PAGE_BYTES for word in words[1:])
            memory.madvise(mmap.MADV_DONTNEED, first, nr)
            sock.send(b"dropped")
        return False

    @property
    def manifest(self) -> Manifest:
        return Manifest(f"pid{self.pid}", [Area(self.nr_bytes, PAGE_BYTES, name="memory")])


class _Memory:
    """Reads through /proc/PID/mem, which needs what ptrace(2) needs."""

    def __init__(self, lent: Lent) -> None:
        """Raises OSError."""
        self.lent = lent
        self.mem = os.open(f"/proc/{lent.pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def read(self, area: int, pages: Pages) -> tuple[Bytes, Mask]:
        rows = np.empty((len(pages), PAGE_BYTES), dtype=np.uint8)
        done = 0
        for first, nr in runs(pages):
            at, view = self.lent.address + first * PAGE_BYTES, rows[done : done + nr].data.cast("B")
            while view:
                nr_bytes = os.preadv(self.mem, [view], at)
                if not nr_bytes:
                    raise GpuError(errno.ESRCH, f"process {self.lent.pid} is gone")
                view, at = view[nr_bytes:], at + nr_bytes
            done += nr
        return rows, np.zeros(len(pages), dtype=np.bool_)

    def admission(self, area: int, nr_pages: int) -> Operation[None]:
        """Nobody limits a process of the host's."""
        yield from ()

    def close(self) -> None:
        os.close(self.mem)


class ProcessSource(_Memory):
    """A pages.Source."""

    def __init__(self, lent: Lent) -> None:
        super().__init__(lent)
        self.manifest = lent.manifest
        self._pagemap = os.open(f"/proc/{lent.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._dirty = np.zeros(0, dtype=np.bool_)
        self._percent = 0
        self._stopped = False

    def start(self) -> None:
        self._dirty = np.ones(self.lent.nr_bytes // PAGE_BYTES, dtype=np.bool_)
        uffd.write_protect(self.lent.fd, self.lent.address, self.lent.nr_bytes)

    def _scan(self) -> None:
        start = self.lent.address
        for first, end in uffd.scan_written(self._pagemap, start, start + self.lent.nr_bytes):
            self._dirty[(first - start) // PAGE_BYTES : (end - start) // PAGE_BYTES] = True

    def take(self, area: int) -> Pages:
        self._scan()
        pages = np.flatnonzero(self._dirty)
        self._dirty[:] = False
        return pages

    @property
    def nr_dirty_bytes(self) -> int:
        self._scan()
        return int(np.count_nonzero(self._dirty)) * PAGE_BYTES

    def read(self, area: int, pages: Pages) -> tuple[Bytes, Mask]:
        if not self._percent or self._stopped:
            return super().read(area, pages)
        self._stop()
        try:
            time.sleep(_QUANTUM_S * self._percent / 100)
            return super().read(area, pages)
        finally:
            self._continue()

    def throttle(self, percent: int, pages_per_s: float) -> None:
        self._percent = percent

    def freeze(self) -> None:
        """Raises GpuError(ETIMEDOUT) where the process does not stop."""
        if not len(self._dirty):
            self.start()
        self._stop()
        self._stopped = True

    def _stop(self) -> None:
        os.kill(self.lent.pid, signal.SIGSTOP)
        deadline = time.monotonic() + _STOP_S
        while _state_of(self.lent.pid) not in "TtZX":
            if time.monotonic() > deadline:
                raise GpuError(errno.ETIMEDOUT, f"process {self.lent.pid} does not stop")

    def _continue(self) -> None:
        os.kill(self.lent.pid, signal.SIGCONT)

    def thaw(self) -> None:
        self._stopped = False
        self._continue()

    def stop(self) -> None:
        """Protection that is left costs the process one fault a page, and nothing else."""
        self._percent = 0

    def release(self) -> None:
        """The process stays stopped: what to do with it is its parent's business."""


def _state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return chr(file.read().rpartition(b") ")[2][0])


class ProcessSink(_Memory):
    """A pages.Sink; `own` lets the process go on. `sock`: a connection to it that keeps messages apart."""

    def __init__(self, lent: Lent, sock: socket.socket) -> None:
        super().__init__(lent)
        self._sock = sock
        self._present = np.zeros(lent.nr_bytes // PAGE_BYTES, dtype=np.bool_)

    def write(self, area: int, pages: Pages, rows: Bytes, lost: Mask) -> None:
        """Raises GpuError(EIO) for lost pages: a process has no way to have none."""
        if lost.any():
            raise GpuError(errno.EIO, "lost pages cannot be put into a process")
        fresh = ~self._present[pages]
        for at, first, nr in _runs_at(pages, fresh):
            data = (ctypes.c_char * (nr * PAGE_BYTES)).from_buffer(np.ascontiguousarray(rows[at : at + nr]).data)
            uffd.copy(self.lent.fd, self.lent.address + first * PAGE_BYTES, data, nr * PAGE_BYTES)
        for at, first, nr in _runs_at(pages, ~fresh):
            os.pwrite(self.mem, rows[at : at + nr].tobytes(), self.lent.address + first * PAGE_BYTES)
        self._present[pages] = True

    def read(self, area: int, pages: Pages) -> tuple[Bytes, Mask]:
        """A page that is not there yet reads as zeros, and stays missing."""
        rows = np.zeros((len(pages), PAGE_BYTES), dtype=np.uint8)
        there = self._present[pages]
        if there.any():
            rows[there] = super().read(area, pages[there])[0]
        return rows, np.zeros(len(pages), dtype=np.bool_)

    def lost(self, area: int) -> Mask:
        """None: the kernel would have ended the process."""
        return np.zeros(len(self._present), dtype=np.bool_)

    def expect(self, area: int, missing: Mask) -> None:
        """What was there of them goes, so that the next access is reported. Raises OSError."""
        for first, nr in runs(np.flatnonzero(missing & self._present)):
            self._sock.send(b"drop %d %d" % (first, nr))
            if self._sock.recv(256) != b"dropped":
                raise GpuError(errno.ESRCH, f"process {self.lent.pid} is gone")
        self._present[missing] = False

    def own(self) -> None:
        self._sock.send(b"own")

    def abandon(self) -> None:
        """The process was never let use what was put there, and is told that it never will be."""
        self._sock.close()

    def faults(self) -> Pages:
        """Pages that the process waits for."""
        addresses = np.array(uffd.faults(self.lent.fd), dtype=np.int64)
        return np.unique((addresses - self.lent.address) // PAGE_BYTES)


def _runs_at(pages: Pages, chosen: Mask) -> list[tuple[int, int, int]]:
    """(index of the first, first page, number) of chosen pages in a row."""
    found = []
    index = np.flatnonzero(chosen)
    cuts = np.flatnonzero((np.diff(index) != 1) | (np.diff(pages[index]) != 1)) + 1
    for run in np.split(index, cuts) if len(index) else ():
        found.append((int(run[0]), int(pages[run[0]]), len(run)))
    return found
