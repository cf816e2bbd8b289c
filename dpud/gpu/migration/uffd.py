# SPDX-License-Identifier: MIT
"""What the kernel offers to who moves a real process's memory: userfaultfd(2) and PAGEMAP_SCAN (ioctl on pagemap).

Write-protection is asynchronous (UFFD_FEATURE_WP_ASYNC, Linux 6.7): a write to a protected page takes the protection
away by itself and nobody waits. PAGEMAP_SCAN then says which pages lost it, and protects them again, in one step.
Missing pages are reported as events, and the thread that touched one waits until it is put there (UFFDIO_COPY).

Numbers are from include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h of Linux 6.18; layouts are of 64-bit.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from dpud.gpu.errors import GpuError

_SYS_USERFAULTFD = 323  # x86-64
_UFFD_API = 0xAA
_UFFD_USER_MODE_ONLY = 1

WP_UNPOPULATED = 1 << 13
WP_ASYNC = 1 << 15
_PAGEFAULT_FLAG_WP = 1 << 0

REGISTER_MISSING = 1 << 0
REGISTER_WP = 1 << 1

_IO_API = 0xC018AA3F
_IO_REGISTER = 0xC020AA00
_IO_WAKE = 0x8010AA02
_IO_COPY = 0xC028AA03
_IO_ZEROPAGE = 0xC020AA04
_IO_WRITEPROTECT = 0xC018AA06
_IO_PAGEMAP_SCAN = 0xC0606610

_EVENT_PAGEFAULT = 0x12
MESSAGE_BYTES = 32

_SCAN_WP_MATCHING = 1 << 0
_SCAN_CHECK_WPASYNC = 1 << 1
_PAGE_IS_WRITTEN = 1 << 1
_SCAN = struct.Struct("<12Q")
_REGION_BYTES = 24
_NR_REGIONS = 1 << 14

_libc = ctypes.CDLL(None, use_errno=True)


def userfaultfd(features: int) -> int:
    """A descriptor with these features, for the calling process's memory. Raises OSError: ENOSYS, EPERM, EINVAL."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd = _libc.syscall(_SYS_USERFAULTFD, flags)
    if fd < 0 and ctypes.get_errno() == errno.EPERM:
        fd = _libc.syscall(_SYS_USERFAULTFD, flags | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        number = ctypes.get_errno()
        raise GpuError(number, f"userfaultfd: {os.strerror(number)}")
    try:
        fcntl.ioctl(fd, _IO_API, bytearray(struct.pack("<QQQ", _UFFD_API, features, 0)))
    except OSError:
        os.close(fd)
        raise
    return int(fd)


def register(fd: int, start: int, nr_bytes: int, mode: int) -> None:
    """Have a range of the process's memory reported. Raises OSError."""
    fcntl.ioctl(fd, _IO_REGISTER, bytearray(struct.pack("<QQQQ", start, nr_bytes, mode, 0)))


def write_protect(fd: int, start: int, nr_bytes: int) -> None:
    """Raises OSError."""
    fcntl.ioctl(fd, _IO_WRITEPROTECT, bytearray(struct.pack("<QQQ", start, nr_bytes, 1)))


def copy(fd: int, to: int, data: ctypes.Array[ctypes.c_char], nr_bytes: int) -> None:
    """Put pages where there are none, and wake who waits for them. Raises OSError; EEXIST where there are some."""
    done, source = 0, ctypes.addressof(data)
    while done < nr_bytes:
        argument = bytearray(struct.pack("<QQQQq", to + done, source + done, nr_bytes - done, 0, 0))
        try:
            fcntl.ioctl(fd, _IO_COPY, argument)
            return
        except OSError as error:
            copied = struct.unpack("<QQQQq", argument)[4]
            if error.errno != errno.EAGAIN or copied < 0:
                raise
            done += copied


def wake(fd: int, start: int, nr_bytes: int) -> None:
    """Raises OSError."""
    fcntl.ioctl(fd, _IO_WAKE, bytearray(struct.pack("<QQ", start, nr_bytes)))


def faults(fd: int) -> list[int]:
    """Addresses of accesses that wait for a missing page, since it was last asked."""
    try:
        data = os.read(fd, MESSAGE_BYTES * 64)
    except BlockingIOError:
        return []
    return [
        struct.unpack_from("<Q", data, at + 16)[0]
        for at in range(0, len(data), MESSAGE_BYTES)
        if data[at] == _EVENT_PAGEFAULT
    ]


def scan_written(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the addresses written to since the last scan, which are protected again. Raises OSError."""
    regions = ctypes.create_string_buffer(_REGION_BYTES * _NR_REGIONS)
    at, flags = start, _SCAN_WP_MATCHING | _SCAN_CHECK_WPASYNC
    while at < end:
        argument = bytearray(
            _SCAN.pack(
                *(_SCAN.size, flags, at, end, 0, ctypes.addressof(regions), _NR_REGIONS, 0),
                *(0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN),
            )
        )
        nr = fcntl.ioctl(pagemap, _IO_PAGEMAP_SCAN, argument)
        for index in range(nr):
            first, last, _ = struct.unpack_from("<QQQ", regions, index * _REGION_BYTES)
            yield first, last
        at = _SCAN.unpack(argument)[4]
