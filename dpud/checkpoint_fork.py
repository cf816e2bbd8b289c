# SPDX-License-Identifier: GPL-2.0-only
"""Writing while the machine goes on: a child of this process has the machine as it was, and writes that.

fork(2) copies page tables, not pages; a page is copied when one of the two writes to it. So the machine stands still
only as long as the page tables take (Redis' BGSAVE does the same).

The child has one thread, this one's copy. What other threads held at that moment stays locked in it: so it does
nothing that could need that. It prints and logs nothing, opens no library, computes nothing compiled; it closes all
descriptors but those that it was told to keep (a connection to /dev/fuse that is open in a second process would outlive
the daemon), reads memory, and writes. It dies with its parent. A child that comes to no end is killed by whoever waits.
"""

import gc
import mmap
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn

from dpud import namespace

_NICE = 10
_STDERR = 2


class ChildFailed(Exception):
    """It said why, or was killed."""


class Child:
    """A process that does `work` with the memory of now; `work` returns what is to be told. Raises OSError."""

    def __init__(self, work: Callable[[], str], keep: Iterable[int], mappings: Iterable[mmap.mmap]) -> None:
        """`mappings` are kept out of other children."""
        parent, mappings = os.getpid(), list(mappings)
        self._answers, told = os.pipe()
        _advise(mappings, mmap.MADV_DOFORK)
        try:
            self.pid = os.fork()
        except OSError:
            os.close(self._answers)
            os.close(told)
            raise
        if self.pid == 0:
            _live(parent, work, {*keep, told}, told)
        _advise(mappings, mmap.MADV_DONTFORK)
        os.close(told)

    def wait(self, timeout_s: float) -> str:
        """What it tells. Raises ChildFailed; it is no more then either."""
        told, deadline = b"", time.monotonic() + timeout_s
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                if select.select([self._answers], [], [], left_s)[0]:
                    piece = os.read(self._answers, 1 << 16)
                    told += piece
                    if not piece:
                        break
            else:
                self.kill()
        finally:
            os.close(self._answers)
            _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            raise ChildFailed(told.decode(errors="replace") or f"its process ended with {code}")
        return told.decode()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _advise(mappings: Iterable[mmap.mmap], advice: int) -> None:
    for mapping in mappings:
        mapping.madvise(advice)


def _live(parent: int, work: Callable[[], str], keep: set[int], told: int) -> NoReturn:
    code = 1
    try:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)
        gc.disable()
        namespace.die_with_parent(parent, signal.SIGKILL)
        _close_others(keep)
        with suppress(OSError):
            os.nice(_NICE)
        os.write(told, work().encode())
        code = 0
    except BaseException as error:  # there is nobody to raise it to
        os.write(told, f"{type(error).__name__}: {error}".encode()[:4096])
    finally:
        os._exit(code)


def _close_others(keep: set[int]) -> None:
    begin = _STDERR + 1
    for fd in sorted(fd for fd in keep if fd > _STDERR):
        os.closerange(begin, fd)
        begin = fd + 1
    os.closerange(begin, os.sysconf("SC_OPEN_MAX"))
