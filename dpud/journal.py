# SPDX-License-Identifier: GPL-2.0-only
"""A file of records that is only ever added to, and what is left of it after an accident.

Theory of operation
    A record is a header (magic, length, number, checksum) and that many bytes. The checksum is xxh3 of the bytes,
    seeded with number and length, so a record that is torn, flipped, in the wrong place or there twice is known as
    such. Each is written by one write(2) when `append` is called; what a killed process has written is the kernel's, so
    the file survives kill -9 as it is. It survives power loss as far as `sync_ms` says.

    Room is taken before it is needed: the file is made longer by CHUNK_BYTES at a time (posix_fallocate), and who asks
    `reserve` first gets ENOSPC before anything has happened that would have to be noted. So the file ends with zeros.

    Reading stops at the first record that is not whole. If there is a whole one anywhere behind it, the file is damaged
    in the middle, else the last record was being written when the machine lost power. The first is an error, which
    nobody but the user can decide about, because what was acknowledged is lost; the second is cut off. This is the
    difference that PostgreSQL and RocksDB make too; unlike those, the rest is searched, since a damaged record does not
    say where the next one begins.
"""

import errno
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 28  # far more than a write through FUSE and the readings of a traced turn come to
_HEADER = struct.Struct("<4sIQQ")  # magic, length, number, checksum
HEADER_BYTES = _HEADER.size
_MAGIC = b"dpJr"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOW = (1 << 40) - 1


def _checksum(number: int, payload: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload, number & _LOW | len(payload) << 40)


def frame(number: int, payload: bytes) -> bytes:
    """A record as it stands in the file."""
    nr = len(payload)
    checksum = xxhash.xxh3_64_intdigest(payload, number & _LOW | nr << 40)  # as _checksum(), for every turn comes here
    return _HEADER.pack(_MAGIC, nr, number, checksum) + payload


@dataclass(frozen=True)
class End:
    """Where the whole records of a file end, and why."""

    offset: int
    number: int
    """Of the record that would come next."""
    problem: str | None = None
    """What is wrong with that one; None if there is just nothing."""
    next_whole: int | None = None
    """Offset of the next record that is whole again, or None: then nothing that was acknowledged can be missing."""


class Reader:
    """The whole records of a file, in order; `end` is known once they were all given."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._bytes: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        self.end = End(0, 0)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """(offset, payload)."""
        data, offset, number = self._bytes, 0, 0
        while (payload := self._payload(offset, number)) is not None:
            yield offset, payload
            offset += HEADER_BYTES + len(payload)
            number += 1
        self.end = End(offset, number)
        if any(data[offset : offset + HEADER_BYTES]):
            self.end = End(offset, number, self._problem(offset, number), self._next_whole(offset + 1))

    def _payload(self, offset: int, number: int | None) -> bytes | None:
        """Of the whole record at `offset`, if there is one, and of that number; any number if None."""
        header = self._bytes[offset : offset + HEADER_BYTES]
        if len(header) < HEADER_BYTES:
            return None
        magic, length, found, checksum = _HEADER.unpack(header)
        if magic != _MAGIC or length > MAX_RECORD_BYTES or (number is not None and found != number):
            return None
        payload = self._bytes[offset + HEADER_BYTES : offset + HEADER_BYTES + length]
        whole = len(payload) == length and _checksum(found, payload) == checksum
        return payload if whole else None

    def _problem(self, offset: int, number: int) -> str:
        header = self._bytes[offset : offset + HEADER_BYTES]
        if len(header) < HEADER_BYTES:
            return "its header is cut short"
        magic, length, found, _ = _HEADER.unpack(header)
        if magic != _MAGIC or length > MAX_RECORD_BYTES:
            return "its header is damaged"
        if found != number:
            return f"it says that it is record {found}"
        left = len(self._bytes) - offset - HEADER_BYTES
        return f"{left} of its {length} bytes are there" if left < length else "its checksum is wrong"

    def _next_whole(self, offset: int) -> int | None:
        while (offset := self._bytes.find(_MAGIC, offset)) >= 0:
            if self._payload(offset, None) is not None:
                return offset
            offset += 1
        return None


class Journal:
    """A file that grows. For one thread at a time.

    `sync_ms`: None leaves it to the kernel when the disk has a record, 0 waits for the disk with each, and any other
    number has a thread see to it that often.
    """

    def __init__(self, path: Path, end: End | None = None, sync_ms: int | None = None) -> None:
        """Make a file, or go on behind `end`; what is there is cut off. Raises OSError."""
        new = os.O_CREAT | os.O_EXCL if end is None else 0
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | new, 0o600)
        self.path = path
        self.nr_records, self._at = (end.number, end.offset) if end else (0, 0)
        os.ftruncate(self._fd, self._at)
        self._reserved = self._at
        self._sync_ms = sync_ms
        self._unsynced = False
        self._failed: OSError | None = None
        self._closing = threading.Event()
        self._syncer: threading.Thread | None = None
        if sync_ms:
            self._syncer = threading.Thread(target=self._sync_now_and_then, name="dpud-journal", daemon=True)
            self._syncer.start()

    @property
    def nr_bytes(self) -> int:
        """Of all records."""
        return self._at

    def reserve(self, nr_bytes: int) -> bool:
        """Make sure that a record with so many bytes can be written; False if there is no room. Raises OSError."""
        needed = self._at + HEADER_BYTES + nr_bytes
        if needed <= self._reserved:
            return True
        for more in (needed - self._reserved + CHUNK_BYTES, needed - self._reserved):
            try:
                os.posix_fallocate(self._fd, self._reserved, more)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
            else:
                self._reserved += more
                return True
        return False

    def append(self, payload: bytes) -> None:
        """Write a record. Raises OSError, and then it is not there: whoever depends on it cannot go on."""
        if self._failed is not None:
            raise self._failed
        record = frame(self.nr_records, payload)
        nr = os.pwrite(self._fd, record, self._at)
        if nr != len(record):
            raise OSError(errno.ENOSPC, "a record was cut short")
        self._at += nr
        self.nr_records += 1
        if self._at > self._reserved:
            self._reserved = self._at
        if self._sync_ms == 0:
            os.fdatasync(self._fd)
        elif self._sync_ms is not None:
            self._unsynced = True

    def _sync_now_and_then(self) -> None:
        assert self._sync_ms is not None
        while not self._closing.wait(self._sync_ms / 1000):
            if self._unsynced:
                self._unsynced = False
                try:
                    os.fdatasync(self._fd)
                except OSError as error:  # what the disk has is unknown from here on, and stays so
                    self._failed = error
                    return

    def sync(self) -> None:
        """Have the disk have it. Raises OSError."""
        os.fsync(self._fd)

    def rename(self, path: Path, *, syncs: bool = True) -> None:
        """Have the disk have it, then give it its name."""
        if syncs:
            self.sync()
        os.replace(self.path, path)
        self.path = path

    def close(self) -> None:
        """Have the disk have it all, and give back the room that was not needed."""
        self._closing.set()
        if self._syncer is not None:
            self._syncer.join()
        os.ftruncate(self._fd, self._at)
        os.fsync(self._fd)
        os.close(self._fd)
