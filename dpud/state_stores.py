# SPDX-License-Identifier: GPL-2.0-only
"""The file `stores` of a state directory: values that were written into files without Python, and are not in a journal.

Theory of operation
    A plain number written into a sysctl is taken by compiled code (fs/fuse_loop.py), and set by whoever has the machine
    next. What was acknowledged must not depend on that, so it is put into this file first: memory that is shared with
    the kernel, which has it when the daemon is killed, at the cost of four words. It is a ring of the last NR_STORES.

    Who sets them writes one record for all into the journal (journal_turns.py), with how many there had been by then.
    While he does that none is taken, so that none that is in no journal is overwritten. None is taken either unless
    the journal has room for that record.

    The next start does the journal's turns again, and knows from them how many stores are in there. Those in the ring
    that come after them are set and noted then. If one of these is not whole and a later one is, something that was
    acknowledged is lost, and the user has to say that it may be: as with a damaged journal. The last one may be torn:
    nobody was told of it.

    What of this survives a loss of power is for `sync_ms` to say, as of the journal. With `always` nothing is taken
    this way. A file system that copies on write and is full cannot take a page of it, which kills the daemon; then too
    the next one comes back with all that was acknowledged.
"""

import logging
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fs.fuse_layout import NR_STORES, store_dtype
from fs.fuse_stores import HEAD, KEPT_BYTES, checksum

FILE_NAME = "stores"

_log = logging.getLogger("dpud")


class Store(NamedTuple):
    """A value for the file with an inode number."""

    nodeid: int
    value: int


@dataclass(frozen=True)
class Pending:
    """What a daemon that was killed had taken, and nobody had noted."""

    stores: list[Store]
    problem: str = ""
    """Why there may have been more."""


def read_pending(path: Path, number: int) -> Pending:
    """Of a file that nobody has: those that come after the first `number`. Raises OSError."""
    data = path.read_bytes()[:KEPT_BYTES].ljust(KEPT_BYTES, b"\0")
    return _pending(np.frombuffer(data, dtype=store_dtype, offset=HEAD), number)


def _pending(ring: NDArray[np.void], number: int) -> Pending:
    whole = {}
    for at, (found, nodeid, value, code) in enumerate(ring.tolist()):
        if found % NR_STORES == at and checksum(found, nodeid, value) == code:
            whole[found] = Store(nodeid, value)
    stores: list[Store] = []
    while number + len(stores) in whole:
        stores.append(whole[number + len(stores)])
    missing = number + len(stores)
    later = sum(found > missing for found in whole)
    return Pending(stores, f"store {missing} is not whole, and {later} later ones are" if later else "")


class KeptStores:
    """The file, of the process that holds the directory."""

    def __init__(self, path: Path, sync_ms: int | None = None) -> None:
        """Make it, or take it as it is; with `sync_ms` 0 none is taken. Raises OSError."""
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(self._fd, 0, KEPT_BYTES)
            memory = mmap.mmap(self._fd, KEPT_BYTES)
        except OSError:
            os.close(self._fd)
            raise
        self._words = np.frombuffer(memory, dtype=np.int64)
        self._ring = np.frombuffer(memory, dtype=store_dtype, offset=HEAD)
        self._may_be_open = sync_ms != 0
        self.is_open = False
        self._sync_ms = sync_ms
        self._closing = threading.Event()
        self._syncer: threading.Thread | None = None

    @property
    def address(self) -> int:
        """Of what fs/fuse_stores.py describes."""
        return int(self._words.ctypes.data)

    @property
    def is_open(self) -> bool:
        """Are stores taken?"""
        return bool(self._words[0])

    @is_open.setter
    def is_open(self, value: bool) -> None:
        self._words[0] = value and self._may_be_open

    def pending(self, number: int) -> Pending:
        """Those that come after the first `number`."""
        return _pending(self._ring, number)

    def begin(self) -> None:
        """All that is in it was noted: from now on it is this process's."""
        self._words[:] = 0
        if self._sync_ms:
            self._syncer = threading.Thread(target=self._sync_now_and_then, name="dpud-stores", daemon=True)
            self._syncer.start()

    def _sync_now_and_then(self) -> None:
        assert self._sync_ms is not None
        known = 0
        while not self._closing.wait(self._sync_ms / 1000):
            if (newest := int(self._ring["number"].max())) != known:
                known = newest
                try:
                    os.fdatasync(self._fd)
                except OSError as error:  # from now on the journal has to do, which says the same of its disk
                    _log.error("%s: %s: nothing is stored there any more", self.path, error.strerror)
                    self._may_be_open = self.is_open = False
                    return

    def close(self) -> None:
        """Take none any more."""
        self.is_open = False
        self._closing.set()
        if self._syncer is not None:
            self._syncer.join()
        os.close(self._fd)
