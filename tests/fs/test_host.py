# SPDX-License-Identifier: GPL-2.0-only
"""The same operations on the running kernel's own file and on its twin in the mounted toy registry.

Every operation must give the same result, or the same errno, and leave the same value behind.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounted import Mounted, is_available, mounted

pytestmark = [
    pytest.mark.host,
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="writes to the kernel's files and mounts"),
]

SYSCTL = (Path("/proc/sys/vm/extfrag_threshold"), "proc/sys/vm/threshold", b"500\n")
SYSFS = (
    Path("/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan"),
    "sys/devices/system/node/node0/scale",
    b"4096\n",
)
PROC = (Path("/proc/buddyinfo"), "proc/buddyinfo", None)

Operation = Callable[[Path], object]


def opened(flags: int, *steps: Callable[[int], object]) -> Operation:
    """Open, do each step with the descriptor, and report what each gave."""

    def run(path: Path) -> object:
        fd = os.open(path, flags)
        try:
            return [result_of(step, fd) for step in steps]
        finally:
            os.close(fd)

    return run


def write(data: bytes) -> Callable[[int], object]:
    return lambda fd: os.write(fd, data)


def pwrite(data: bytes, offset: int) -> Callable[[int], object]:
    return lambda fd: os.pwrite(fd, data, offset)


def read(size: int) -> Callable[[int], object]:
    return lambda fd: os.read(fd, size)


def pread(size: int, offset: int) -> Callable[[int], object]:
    return lambda fd: os.pread(fd, size, offset)


def seek(offset: int, whence: int) -> Callable[[int], object]:
    return lambda fd: os.lseek(fd, offset, whence)


def as_nobody(operation: Operation) -> Operation:
    """The operation in a child with another uid; only its errno is told."""

    def run(path: Path) -> object:
        child = os.fork()
        if not child:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            result = result_of(operation, path)
            os._exit(result if isinstance(result, int) and result > 0 else 0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run


def handed_to_nobody(flags: int, step: Callable[[int], object]) -> Operation:
    """Opened by root, used by somebody else."""

    def run(path: Path) -> object:
        fd = os.open(path, flags)
        try:
            return as_nobody(lambda _path: step(fd) and 0)(path)
        finally:
            os.close(fd)

    return run


def result_of(fn: Callable[..., object], *args: object) -> object:
    """What it gives, or its errno."""
    try:
        return fn(*args)
    except OSError as error:
        return error.errno


R, W, RW = os.O_RDONLY, os.O_WRONLY, os.O_RDWR

NUMBERS = [
    b"7", b"7\n", b"  7  \n", b"\t7\t\n", b"7\n\n", b"\n7", b"0x10", b"0X10", b"010", b"-0", b"+7", b"7 8",
    b"7 abc", b" ", b"\n", b"abc", b"-", b"--7", b"- 7", b"7-", b"0x", b"0b1", b"1.5", b"7abc", b"7,8", b"08",
    b"7\r\n", b"7\0", b"7\0x", b"\v7", b"7\f", b"-1", b"0", b"1000", b"1001", b"2147483648", b"4294967296",
    b"18446744073709551617", b"00000000000000000007", b"000000000000000000007", b" " * 4094 + b"7",
    b" " * 4095 + b"7", b"7" + b" " * 5000, b"7\n" + b"x" * 4095, b"7" * 4096, b"7" * 5000, b"",
]  # fmt: skip

WRITES: dict[str, Operation] = {f"write {data[:24]!r}*{len(data)}": opened(W, write(data)) for data in NUMBERS}

OPERATIONS: dict[str, Operation] = {
    **WRITES,
    "two writes": opened(W, write(b"5"), write(b"6")),
    "two pwrites": opened(W, pwrite(b"5", 0), pwrite(b"6", 0)),
    "pwrite at 3": opened(W, pwrite(b"9", 3), pwrite(b"garbage", 3)),
    "append": opened(W | os.O_APPEND, write(b"8")),
    "open with O_TRUNC": opened(W | os.O_TRUNC),
    "open with O_TRUNC and write": opened(W | os.O_TRUNC, write(b"11\n")),
    "open with O_CREAT": opened(W | os.O_CREAT, write(b"12\n")),
    "open with O_EXCL": opened(W | os.O_CREAT | os.O_EXCL),
    "ftruncate": opened(W, lambda fd: os.ftruncate(fd, 0)),
    "read twice": opened(R, read(4096), read(4096)),
    "read byte by byte": opened(R, *[read(1)] * 7),
    "read, seek to 0, read": opened(R, read(1), seek(0, os.SEEK_SET), read(4096)),
    "pread": opened(R, pread(4096, 0), pread(4096, 1), pread(4096, 4096), pread(2, 0)),
    "seek to the end": opened(R, seek(0, os.SEEK_END), read(4096)),
    "write then read": opened(RW, write(b"13\n"), read(4096), pread(4096, 0)),
    "write on a descriptor for reading": opened(R, write(b"1")),
    "read on a descriptor for writing": opened(W, read(1)),
    "mkdir over it": os.mkdir,
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "readlink": os.readlink,
    "list": os.listdir,
    "touch": os.utime,
    "nobody reads": as_nobody(lambda path: path.read_bytes() and 0),
    "nobody writes": as_nobody(opened(W, write(b"1"))),
    "nobody opens for both": as_nobody(opened(RW)),
    "nobody writes what root opened": handed_to_nobody(W, write(b"1")),
    "nobody reads what root opened": handed_to_nobody(R, read(100)),
}

SIBLINGS: dict[str, Operation] = {
    "create": lambda path: os.open(path.with_name("no_such_file"), W | os.O_CREAT),
    "open a missing name": lambda path: os.open(path.with_name("no_such_file"), R),
    "mkdir": lambda path: os.mkdir(path.with_name("no_such_file")),
    "mknod": lambda path: os.mknod(path.with_name("no_such_file")),
    "symlink": lambda path: os.symlink("x", path.with_name("no_such_file")),
    "rmdir the directory": lambda path: os.rmdir(path.parent),
    "unlink the directory": lambda path: os.unlink(path.parent),
}


# What a FUSE server cannot tell: the kernel finds a wrong type before it asks for permission, allows pwrite,
# ends a write of no bytes itself, and seeks by st_size.
UNLIKE_SYSCTL = {"rmdir", "unlink the directory"}
UNLIKE_PROC = {"write b''*0", "two pwrites", "pwrite at 3", "seek to the end"}
SYSCTL_OPERATIONS = {name: op for name, op in (OPERATIONS | SIBLINGS).items() if name not in UNLIKE_SYSCTL}
PROC_OPERATIONS = {name: op for name, op in OPERATIONS.items() if name not in UNLIKE_PROC and "read" not in name}


@pytest.fixture(scope="module", params=["mfusepy-libfuse2", "dev-fuse"])
def mnt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    if not is_available(request.param):
        pytest.skip("no FUSE here")
    folder = tmp_path_factory.mktemp("host")
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    with mounted(folder, request.param) as found:
        yield found


def compare(mnt: Mounted, twins: tuple[Path, str, bytes | None], operation: Operation) -> None:
    real, name, value = twins
    if not real.exists():
        pytest.skip(f"this kernel has no {real}")
    outcomes = []
    for path in (real, mnt.root / name):
        before = path.read_bytes()
        try:
            if value is not None:
                path.write_bytes(value)
            result = result_of(operation, path)
            outcomes.append((result, path.read_bytes() if value is not None else None))
        finally:
            if value is not None:
                path.write_bytes(before)
    assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("name", SYSCTL_OPERATIONS)
def test_sysctl(mnt: Mounted, name: str) -> None:
    compare(mnt, SYSCTL, SYSCTL_OPERATIONS[name])


@pytest.mark.parametrize("name", OPERATIONS | SIBLINGS)
def test_sysfs(mnt: Mounted, name: str) -> None:
    compare(mnt, SYSFS, (OPERATIONS | SIBLINGS)[name])


@pytest.mark.parametrize("name", PROC_OPERATIONS)
def test_proc(mnt: Mounted, name: str) -> None:
    compare(mnt, PROC, PROC_OPERATIONS[name])


@pytest.mark.parametrize("twins", [SYSCTL, SYSFS, PROC], ids=["sysctl", "sysfs", "proc"])
def test_stat(mnt: Mounted, twins: tuple[Path, str, bytes | None]) -> None:
    real, name, _value = twins
    if not real.exists():
        pytest.skip(f"this kernel has no {real}")
    for one, two in ((real, mnt.root / name), (real.parent, (mnt.root / name).parent)):
        here, there = os.stat(one), os.stat(two)
        fields = ("st_mode", "st_size", "st_blksize", "st_blocks", "st_uid", "st_gid")
        assert {f: getattr(there, f) for f in fields} == {f: getattr(here, f) for f in fields}
