# SPDX-License-Identifier: MIT
"""The real file behind a tier: whole blocks at block addresses, past the page cache where the file system allows it.

A file is
    in memory   memfd_create(2)
    temporary   without a name in some folder, gone when it is closed
    named       kept for the next start

O_DIRECT wants buffers, lengths and offsets that are aligned; the buffer here is a private mapping of whole pages. Where
the file system refuses O_DIRECT, the page cache is used and the log says so.

Every failure is a GpuError: ENOSPC for all the ways in which a file system says that there is no room, EIO for the
rest. A read beyond the end of the file is EIO too: somebody has cut it.
"""

import errno
import fcntl
import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dpud.gpu.errors import GpuError

BLOCK_BYTES = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger("dpud.gpu.swap")


class BlockFile:
    """`nr_blocks` blocks of 4 KiB. One transfer at a time."""

    def __init__(self, name: str, nr_blocks: int, fd: int, path: Path | None = None) -> None:
        self.name = name
        self.nr_blocks = nr_blocks
        self.path = path
        self._fd = fd
        self._buffer = mmap.mmap(-1, BLOCK_BYTES)
        self.is_direct = False
        self.before_write: Callable[[int, int], object] | None = None
        """Told of (block, how many) that are going to be overwritten."""

    @classmethod
    def in_memory(cls, name: str, nr_blocks: int) -> "BlockFile":
        return cls(name, nr_blocks, os.memfd_create(f"dpud-swap-{name}"))._sized()

    @classmethod
    def temporary(cls, name: str, nr_blocks: int, folder: Path | None = None) -> "BlockFile":
        fd, path = tempfile.mkstemp(prefix=f"dpud-swap-{name}-", dir=folder)
        os.unlink(path)
        return cls(name, nr_blocks, fd)._sized()._past_the_cache()

    @classmethod
    def named(cls, name: str, nr_blocks: int, path: Path) -> "BlockFile":
        """Its contents are kept, if it is there already. Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return cls(name, nr_blocks, fd, path)._sized()._past_the_cache()

    def _sized(self) -> "BlockFile":
        try:
            os.ftruncate(self._fd, self.nr_blocks * BLOCK_BYTES)
        except OSError as error:
            self.close()
            raise _explained(self.name, error) from error
        return self

    def _past_the_cache(self) -> "BlockFile":
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            os.preadv(self._fd, [self._buffer], 0)
            self.is_direct = True
        except OSError as error:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
            log.info("%s: no O_DIRECT here (%s), so the page cache is used", self.name, error.strerror)
        return self

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def buffer(self, nr_bytes: int) -> memoryview:
        """An aligned buffer of whole blocks for so many bytes; the next call gives the same one."""
        size = -(-nr_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if len(self._buffer) < size:
            self._buffer = mmap.mmap(-1, 1 << (size - 1).bit_length())
        return memoryview(self._buffer)[:size]

    def write(self, block: int, data: memoryview) -> None:
        """Whole blocks out of `buffer`. Raises GpuError(ENOSPC | EIO); any part of them may be written then."""
        if self.before_write is not None:
            self.before_write(block, len(data) // BLOCK_BYTES)
        done = 0
        while done < len(data):
            try:
                nr = os.pwritev(self._fd, [data[done:]], block * BLOCK_BYTES + done)
            except OSError as error:
                raise _explained(self.name, error) from error
            if not (whole := nr // BLOCK_BYTES * BLOCK_BYTES):
                raise GpuError(errno.ENOSPC, f"{self.name}: {nr} of {len(data) - done} bytes were taken")
            done += whole

    def read(self, block: int, nr_bytes: int) -> memoryview:
        """Bytes from a block on, in `buffer`. Raises GpuError(EIO) for an error or an end."""
        view = self.buffer(nr_bytes)
        try:
            nr = os.preadv(self._fd, [view], block * BLOCK_BYTES)
        except OSError as error:
            raise GpuError(errno.EIO, f"{self.name}: {error.strerror}") from error
        if nr < nr_bytes:
            raise CutShort(f"{self.name}: its file ends at {block * BLOCK_BYTES + nr}")
        return view[:nr_bytes]

    def peek(self, block: int, nr_blocks: int) -> bytes:
        """Blocks as they are, past `buffer`. Raises OSError."""
        with mmap.mmap(-1, nr_blocks * BLOCK_BYTES) as view:
            nr = os.preadv(self._fd, [view], block * BLOCK_BYTES)
            return view[:nr]

    def extents(self) -> Iterator[tuple[int, int]]:
        """[begin, end) in bytes, whole blocks, of the parts that were ever written to. Raises OSError."""
        at, size = 0, self.nr_blocks * BLOCK_BYTES
        while at < size:
            try:
                begin = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            at = min(-(-os.lseek(self._fd, begin, os.SEEK_HOLE) // BLOCK_BYTES) * BLOCK_BYTES, size)
            yield begin // BLOCK_BYTES * BLOCK_BYTES, at

    def clear(self) -> None:
        """Have nothing but zeros. Raises OSError."""
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, self.nr_blocks * BLOCK_BYTES)

    @property
    def fd(self) -> int:
        return self._fd

    def trouble(self) -> str | None:
        """What has become of the file behind our back, in a few words; None if nothing."""
        status = os.fstat(self._fd)
        if status.st_size < self.nr_blocks * BLOCK_BYTES:
            return f"its file was cut to {status.st_size} bytes"
        if self.path is not None and not _is_at(self.path, status):
            return f"{self.path} is gone"
        return None


class CutShort(GpuError):
    """The file is shorter than it was."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EIO, why)


def _is_at(path: Path, status: os.stat_result) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino)


def _explained(name: str, error: OSError) -> GpuError:
    number = errno.ENOSPC if error.errno in _NO_ROOM else errno.EIO
    return GpuError(number, f"{name}: {error.strerror}")
