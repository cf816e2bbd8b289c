# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's own compressed memory, as a peer: /dev/zram0, if it is there and nobody uses it.

There is one for the whole machine. So it is locked (flock on the device) as long as it is used, and reset afterwards,
to the algorithm it had. It is never swapped on.
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

DEVICE = Path("/dev/zram0")
SYSFS = Path("/sys/block/zram0")
_BLKDISCARD = 0x1277  # include/uapi/linux/fs.h
_WRITE_BYTES = 1 << 20


@dataclass(frozen=True)
class Stored:
    """What zram made of some bytes."""

    raw_bytes: int
    encoded_bytes: int
    used_bytes: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Raw bytes by all memory that zsmalloc took for them."""
        return self.raw_bytes / self.used_bytes


class ZramBusy(Exception):
    """There is none for us, and why."""


class Zram:
    """A device that was set up, opened with O_DIRECT."""

    def __init__(self, fd: int, nr_bytes: int) -> None:
        self._fd = fd
        self._nr_bytes = nr_bytes

    def store(self, data: bytes) -> Stored:
        """Write from the beginning, look at mm_stat, and discard everything."""
        with mmap.mmap(-1, len(data)) as buffer:  # O_DIRECT wants aligned memory
            buffer[:] = data
            seconds = self._write(memoryview(buffer))
        raw, encoded, used = map(int, (SYSFS / "mm_stat").read_text().split()[:3])
        fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("QQ", 0, self._nr_bytes))
        return Stored(raw, encoded, used, seconds)

    def _write(self, view: memoryview) -> float:
        begin = perf_counter()
        for at in range(0, len(view), _WRITE_BYTES):
            os.pwrite(self._fd, view[at : at + _WRITE_BYTES], at)
        seconds = perf_counter() - begin
        view.release()
        return seconds


@contextmanager
def zram(nr_bytes: int, algorithm: str) -> Iterator[Zram]:
    """/dev/zram0 with room for that much. Raises ZramBusy if it is missing, in use, or not ours to use."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        raise ZramBusy(f"{DEVICE}: {error.strerror}") from error
    try:
        _lock(fd)
        usual = _selected((SYSFS / "comp_algorithm").read_text())
        try:
            _set_up(algorithm, nr_bytes)
            yield Zram(fd, nr_bytes)
        finally:
            os.close(fd)  # a device that is open cannot be reset
            fd = -1
            _write(SYSFS / "reset", "1")
            _write(SYSFS / "comp_algorithm", usual)
    finally:
        if fd >= 0:
            os.close(fd)


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ZramBusy(f"{DEVICE} is locked by another process") from None
    if (SYSFS / "disksize").read_text().strip() != "0":
        raise ZramBusy(f"{DEVICE} is in use")


def _set_up(algorithm: str, nr_bytes: int) -> None:
    try:
        _write(SYSFS / "comp_algorithm", algorithm)
        _write(SYSFS / "disksize", str(nr_bytes))
    except OSError as error:
        raise ZramBusy(f"{SYSFS}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _selected(text: str) -> str:
    """`lzo [lz4]` -> `lz4`."""
    return text.partition("[")[2].partition("]")[0]
