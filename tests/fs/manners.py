# SPDX-License-Identifier: GPL-2.0-only
"""What programs do to a pseudo-file, one system call at a time: the table that test_manners.py goes through.

An operation takes a path and gives something comparable: what was read, how much was written, or an errno.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

Operation = Callable[[Path], object]
Step = Callable[[int], object]

R, W, RW = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_MAP_FAILED = ctypes.c_void_p(-1).value


def result_of(fn: Callable[..., object], *args: object) -> object:
    """What it gives, or the name of its errno."""
    try:
        return fn(*args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def opened(flags: int, *steps: Step) -> Operation:
    """Open, do each step with the descriptor, and report what each gave."""

    def run(path: Path) -> object:
        fd = os.open(path, flags)
        try:
            return [result_of(step, fd) for step in steps]
        finally:
            os.close(fd)

    return run


def opened_twice(flags: int, *steps: Callable[[int, int], object]) -> Operation:
    """Two opens of the same file, used in turns."""

    def run(path: Path) -> object:
        one, two = os.open(path, flags), os.open(path, flags)
        try:
            return [result_of(step, one, two) for step in steps]
        finally:
            os.close(one)
            os.close(two)

    return run


def write(data: bytes) -> Step:
    return lambda fd: os.write(fd, data)


def pwrite(data: bytes, offset: int) -> Step:
    return lambda fd: os.pwrite(fd, data, offset)


def read(size: int) -> Step:
    return lambda fd: os.read(fd, size)


def pread(size: int, offset: int) -> Step:
    return lambda fd: os.pread(fd, size, offset)


def seek(offset: int, whence: int) -> Step:
    return lambda fd: os.lseek(fd, offset, whence)


def readv(*sizes: int) -> Step:
    """The buffers as readv(2) filled them."""

    def step(fd: int) -> object:
        buffers = [bytearray(size) for size in sizes]
        return os.readv(fd, buffers), buffers

    return step


def as_nobody(operation: Operation) -> Operation:
    """The operation in a child with another uid; only its errno is told."""

    def run(path: Path) -> object:
        child = os.fork()
        if not child:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            result = result_of(operation, path)
            os._exit(getattr(errno, result) if isinstance(result, str) else 0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run


def handed_to_nobody(flags: int, step: Step) -> Operation:
    """Opened by root, used by somebody else."""

    def run(path: Path) -> object:
        fd = os.open(path, flags)
        try:
            return as_nobody(lambda _path: step(fd) and 0)(path)
        finally:
            os.close(fd)

    return run


def passed_over_a_socket(flags: int, step: Step) -> Operation:
    """SCM_RIGHTS: the descriptor that arrives is of the same open file."""

    def run(path: Path) -> object:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fd = os.open(path, flags)
            socket.send_fds(ours, [b"x"], [fd])
            os.close(fd)
            arrived = socket.recv_fds(theirs, 1, 1)[1][0]
            try:
                return result_of(step, arrived)
            finally:
                os.close(arrived)

    return run


def polled(fd: int) -> object:
    poll = select.poll()
    poll.register(fd, 0x7FFF)
    return [mask for _fd, mask in poll.poll(0)]


def epolled(fd: int) -> object:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        return len(epoll.poll(0))


def spliced(fd: int) -> object:
    reading, writing = os.pipe()
    try:
        return os.splice(fd, writing, 4096)
    finally:
        os.close(reading)
        os.close(writing)


def sent(fd: int) -> object:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        return os.sendfile(ours.fileno(), fd, 0, 4096)


def mapped(flags: int, protection: int) -> Step:
    """mmap(2) itself: Python's own looks at st_size first."""

    def step(fd: int) -> object:
        address = _libc.mmap(None, ctypes.c_size_t(4096), protection, flags, fd, ctypes.c_long(0))
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "mmap")
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(4096))
        return 0

    return step


def ioctl(fd: int) -> object:
    return fcntl.ioctl(fd, 0x5401)  # TCGETS: isatty(3) asks it of every file


def locked(fd: int) -> object:
    fcntl.flock(fd, fcntl.LOCK_SH)
    return 0


def fallocated(fd: int) -> object:
    if _libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(4096)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return 0


def echo(text: str, redirection: str) -> Operation:
    """As a shell writes it: `printf text > file`."""

    def run(path: Path) -> object:
        return os.waitstatus_to_exitcode(os.system(f"printf '{text}' 2>/dev/null {redirection} '{path}'"))

    return run


def sibling(name: str, operation: Operation) -> Operation:
    return lambda path: operation(path.with_name(name))


def on_directory(operation: Operation) -> Operation:
    return lambda path: operation(path.parent)


NUMBERS = [
    b"7", b"7\n", b"  7  \n", b"\t7\t\n", b"7\n\n", b"\n7", b"0x10", b"0X10", b"010", b"-0", b"+7", b"7 8",
    b"7 abc", b" ", b"\n", b"abc", b"-", b"--7", b"- 7", b"7-", b"0x", b"0b1", b"1.5", b"7abc", b"7,8", b"08",
    b"7\r\n", b"7\0", b"7\0x", b"\0", b"\v7", b"7\f", b"-1", b"0", b"1000", b"1001", b"2147483647",
    b"2147483648", b"4294967296", b"18446744073709551615", b"18446744073709551617", b"00000000000000000007",
    b"000000000000000000007", b" " * 4094 + b"7", b" " * 4095 + b"7", b"7" + b" " * 4094, b"7" + b" " * 4095,
    b"7" + b" " * 5000, b"7\n" + b"x" * 4095, b"7" * 4096, b"7" * 5000, b"7" + b" " * 70000, b"",
    b"0o7", b"7_0", "\u0667".encode(), b"\xff7", b"on", b"Y", b"7;8", b"7\t8", b"1e1", b"'7'",
]  # fmt: skip


def writes(values: list[bytes]) -> dict[str, Operation]:
    """One write(2) of each value."""
    return {f"write {data[:24]!r}*{len(data)}": opened(W, write(data)) for data in values}


READING: dict[str, Operation] = {
    "read twice": opened(R, read(4096), read(4096)),
    "read byte by byte": opened(R, *[read(1)] * 7),
    "read, seek to 0, read": opened(R, read(1), seek(0, os.SEEK_SET), read(4096)),
    "read nothing": opened(R, read(0), read(4096)),
    "pread": opened(R, pread(4096, 0), pread(4096, 1), pread(4096, 4096), pread(2, 0)),
    "pread beyond": opened(R, pread(100, 100_000), pread(100, 2**40)),
    "read after pread": opened(R, pread(1, 0), read(4096)),
    "readv": opened(R, readv(1, 1, 4096), readv(4096)),
    "two opens in turns": opened_twice(
        R, lambda a, _: os.read(a, 1), lambda _, b: os.read(b, 4096), lambda a, _: os.read(a, 4096)
    ),
}

COPYING: dict[str, Operation] = {
    "splice to a pipe": opened(R, spliced),
    "sendfile": opened(R, sent),
}
"""To be done last: over FUSE these leave st_size as it was read, for a second."""

POSITION: dict[str, Operation] = {
    "seek to 0 from the current position": opened(R, read(1), seek(0, os.SEEK_CUR), read(1)),
    "seek backwards": opened(R, seek(5, os.SEEK_SET), seek(-5, os.SEEK_CUR), read(4096)),
    "seek before the start": opened(R, seek(-1, os.SEEK_SET)),
    "seek with a bad whence": opened(R, lambda fd: os.lseek(fd, 0, 99)),
    "seek to the end": opened(R, seek(0, os.SEEK_END), read(4096)),
}

WRITING: dict[str, Operation] = {
    "two writes": opened(W, write(b"5"), write(b"6")),
    "two pwrites": opened(W, pwrite(b"5", 0), pwrite(b"6", 0)),
    "pwrite at 3": opened(W, pwrite(b"9", 3), pwrite(b"garbage", 3)),
    "append": opened(W | os.O_APPEND, write(b"8")),
    "append twice": opened(W | os.O_APPEND, write(b"8"), write(b"9")),
    "open with O_TRUNC and write": opened(W | os.O_TRUNC, write(b"11\n")),
    "open with O_CREAT": opened(W | os.O_CREAT, write(b"12\n")),
    "open with O_SYNC": opened(W | os.O_SYNC, write(b"12\n")),
    "open with O_NONBLOCK": opened(W | os.O_NONBLOCK, write(b"12\n")),
    "writev": opened(W, lambda fd: os.writev(fd, [b"1", b"4\n"])),
    "shell >": echo("15\n", ">"),
    "shell >>": echo("16\n", ">>"),
    "shell <>": echo("17\n", "1<>"),
    "shell > of nothing": echo("", ">"),
    "shell > of a word": echo("word\n", ">"),
    "two writers in turns": opened_twice(W, lambda a, _: os.write(a, b"5"), lambda _, b: os.write(b, b"6")),
    "dup": opened(W, lambda fd: os.write(os.dup(fd), b"5"), write(b"6")),
    "passed over a socket": passed_over_a_socket(W, write(b"18\n")),
    "handed to nobody": handed_to_nobody(W, write(b"1")),
}

BOTH: dict[str, Operation] = {
    "write then read": opened(RW, write(b"13\n"), read(4096), pread(4096, 0)),
    "read then write": opened(RW, read(1), write(b"14\n"), pread(4096, 0)),
}

FILE: dict[str, Operation] = {
    "open for both": opened(RW),
    "open for reading": opened(R),
    "open for writing": opened(W),
    "open with O_TRUNC": opened(W | os.O_TRUNC),
    "open for reading with O_TRUNC": opened(R | os.O_TRUNC),
    "open with O_EXCL": opened(W | os.O_CREAT | os.O_EXCL),
    "open with O_DIRECTORY": opened(R | os.O_DIRECTORY),
    "open with O_NOFOLLOW": opened(R | os.O_NOFOLLOW),
    "open with O_PATH": opened(os.O_PATH, read(1)),
    "open as if a directory": lambda path: os.open(f"{path}/", R),
    "open something in it": lambda path: os.open(path / "x", R),
    "write on a descriptor for reading": opened(R, write(b"1")),
    "read on a descriptor for writing": opened(W, read(1)),
    "ftruncate": opened(W, lambda fd: os.ftruncate(fd, 0)),
    "ftruncate to more": opened(W, lambda fd: os.ftruncate(fd, 100)),
    "truncate": lambda path: os.truncate(path, 0),
    "fallocate": opened(W, fallocated),
    "poll": opened(R, polled),
    "epoll": opened(R, epolled),
    "ioctl": opened(R, ioctl),
    "isatty": opened(R, os.isatty),
    "flock": opened(R, locked),
    "fsync": opened(R, os.fsync),
    "mmap shared": opened(R, mapped(mmap.MAP_SHARED, mmap.PROT_READ)),
    "mkdir over it": os.mkdir,
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "readlink": os.readlink,
    "list": os.listdir,
    "touch": os.utime,
    "rename": lambda path: os.rename(path, path.with_name("other")),
    "link": lambda path: os.link(path, path.with_name("other")),
    "chown to root": lambda path: os.chown(path, 0, 0),
    "getxattr": lambda path: os.getxattr(path, "user.x"),
    "listxattr": os.listxattr,
    "setxattr": lambda path: os.setxattr(path, "user.x", b"1"),
    "removexattr": lambda path: os.removexattr(path, "user.x"),
    "get the capability xattr": lambda path: os.getxattr(path, "security.capability"),
    "access": lambda path: [os.access(path, mode) for mode in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)],
    "exec": lambda path: os.waitstatus_to_exitcode(os.system(f"'{path}' 2>/dev/null")),
    "nobody reads": as_nobody(lambda path: path.read_bytes() and 0),
    "nobody writes": as_nobody(opened(W)),
    "nobody opens for both": as_nobody(opened(RW)),
    "nobody truncates": as_nobody(lambda path: os.truncate(path, 0)),
    "nobody unlinks": as_nobody(os.unlink),
    "nobody touches": as_nobody(os.utime),
    "nobody changes the mode": as_nobody(lambda path: os.chmod(path, 0o666)),
    "nobody reads what root opened": handed_to_nobody(R, read(100)),
}

DIRECTORY: dict[str, Operation] = {
    "create": sibling("no_such_file", lambda path: os.open(path, W | os.O_CREAT)),
    "open a missing name": sibling("no_such_file", lambda path: os.open(path, R)),
    "stat a missing name": sibling("no_such_file", os.stat),
    "mkdir": sibling("no_such_file", os.mkdir),
    "mknod": sibling("no_such_file", os.mknod),
    "mkfifo": sibling("no_such_file", os.mkfifo),
    "symlink": sibling("no_such_file", lambda path: os.symlink("x", path)),
    "unlink a missing name": sibling("no_such_file", os.unlink),
    "rmdir a missing name": sibling("no_such_file", os.rmdir),
    "a name of 255 bytes": sibling("x" * 255, os.stat),
    "a name of 256 bytes": sibling("x" * 256, os.stat),
    "a name with a newline": sibling("a\nb", os.stat),
    "nobody makes a directory": as_nobody(sibling("no_such_file", os.mkdir)),
    "rmdir the directory": on_directory(os.rmdir),
    "unlink the directory": on_directory(os.unlink),
    "open the directory for writing": on_directory(opened(W)),
    "read the directory": on_directory(opened(R, read(10))),
    "open the directory with O_TMPFILE": on_directory(opened(W | os.O_TMPFILE)),
    "dots come first": on_directory(lambda path: _names(path)[:2]),
    "every name once": on_directory(lambda path: _repeated(path)),
    "every name can be stat": on_directory(
        lambda path: {n for n in _names(path) if not n.isdigit() and not os.path.lexists(path / n)}
    ),
    "list twice from one open": on_directory(lambda path: _listed_again(path)),
    "fsync the directory": on_directory(opened(R, os.fsync)),
    "list xattrs of the directory": on_directory(os.listxattr),
}

_DIRENT_NAME = 19  # struct linux_dirent64: ino 8, off 8, reclen 2, type 1


def _getdents(fd: int) -> list[str]:
    """Names as getdents64(2) gives them, in its order; os.listdir() leaves out the dots."""
    names, buffer = [], ctypes.create_string_buffer(1 << 16)
    while (nr := _libc.syscall(217, fd, buffer, len(buffer))) > 0:
        at = 0
        while at < nr:
            length = int.from_bytes(buffer.raw[at + 16 : at + 18], "little")
            names.append(buffer.raw[at + _DIRENT_NAME : at + length].split(b"\0")[0].decode())
            at += length
    return names


def _names(path: Path) -> list[str]:
    fd = os.open(path, R | os.O_DIRECTORY)
    try:
        return _getdents(fd)
    finally:
        os.close(fd)


def _repeated(path: Path) -> list[str]:
    """Names that come more than once; of /proc not the processes, which come and go meanwhile."""
    return [name for name, nr in Counter(_names(path)).items() if nr > 1 and not name.isdigit()]


def _listed_again(path: Path) -> bool:
    fd = os.open(path, R | os.O_DIRECTORY)
    try:
        first = _getdents(fd)
        os.lseek(fd, 0, os.SEEK_SET)
        return [n for n in _getdents(fd) if not n.isdigit()] == [n for n in first if not n.isdigit()]
    finally:
        os.close(fd)


STAT_FIELDS = ("st_mode", "st_size", "st_blksize", "st_blocks", "st_uid", "st_gid")
