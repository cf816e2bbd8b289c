# SPDX-License-Identifier: GPL-2.0-only
"""Real processes that lend their memory: a writer, and one that is filled."""

import hashlib
import mmap
import os
import signal
import socket
import time
from collections.abc import Callable

import numpy as np

from dpud.gpu.migration import uffd
from dpud.gpu.migration.process_pages import Lent
from dpud.namespace import die_with_parent

PAGE = 4096


def kernel_can() -> bool:
    """Whether this kernel lets us."""
    try:
        os.close(uffd.userfaultfd(uffd.WP_ASYNC | uffd.WP_UNPOPULATED))
    except OSError:
        return False
    return os.access("/proc/self/mem", os.W_OK)


def spawn(run: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """A process of its own and a connection to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent, pid = os.getpid(), os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        ours.close()
        die_with_parent(parent, signal.SIGKILL)  # who is stopped, or writes for ever, ends by nothing else
        signal.alarm(120)
        run(theirs)
    finally:
        os._exit(0)


def writer(nr_bytes: int, pages_per_s: float, hot: float = 1.0) -> Callable[[socket.socket], None]:
    """Has noise, and writes to random pages of a share of its memory for ever."""

    def run(sock: socket.socket) -> None:
        lent, memory = Lent.here(nr_bytes)
        rng = np.random.default_rng(1)
        memory[: nr_bytes * 3 // 4] = rng.bytes(nr_bytes * 3 // 4)
        lent.give(sock)
        nr_pages, nr, begin = max(1, int(nr_bytes * hot)) // PAGE, 0, time.monotonic()
        while True:
            due = int((time.monotonic() - begin) * pages_per_s)
            for page in rng.integers(0, nr_pages, max(0, min(due - nr, 10_000))).tolist():
                memory[page * PAGE + 8 : page * PAGE + 16] = nr.to_bytes(8, "little")
                nr += 1
            nr = due
            time.sleep(0.001)

    return run


def filled(nr_bytes: int) -> Callable[[socket.socket], None]:
    """Says the sha256 of its memory as soon as it may, touching pages from the last to the first."""

    def run(sock: socket.socket) -> None:
        lent, memory = Lent.here(nr_bytes, missing=True)
        lent.give(sock)
        if Lent.wait_until_owned(sock, memory):
            sock.send(_digest_backwards(memory, nr_bytes))
        sock.recv(16)

    return run


def _digest_backwards(memory: mmap.mmap, nr_bytes: int) -> bytes:
    digest = hashlib.sha256()
    for at in range(nr_bytes - PAGE, -1, -PAGE):
        digest.update(memory[at : at + PAGE])
    return digest.digest()


def digest_of(lent: Lent) -> bytes:
    """The same of another process's memory, in which nobody writes."""
    digest = hashlib.sha256()
    with open(f"/proc/{lent.pid}/mem", "rb", buffering=0) as file:
        for at in range(lent.nr_bytes - PAGE, -1, -PAGE):
            file.seek(lent.address + at)
            digest.update(file.read(PAGE))
    return digest.digest()


def end(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
