# SPDX-License-Identifier: GPL-2.0-only
"""The daemon's files against the running kernel's of the same kind, operation by operation, errno by errno.

Each operation of manners.py is done to a real file and to its emulated twin; both must give the same and leave the
same value behind. What a FUSE server cannot answer for is in UNLIKE, with the reason, and must be unlike indeed.
"""

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import manners
import pytest
from emulated import Emulated, emulated, has_fuse
from manners import BOTH, COPYING, DIRECTORY, FILE, NUMBERS, POSITION, READING, WRITING, Operation, result_of, writes

pytestmark = [
    pytest.mark.host,
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0 or not has_fuse(), reason="writes to the kernel's files and mounts"),
]

SMALL_NUMBERS = [data for data in NUMBERS if not re.fullmatch(rb"0|[0-9]{4,20}", data)]
FEW = [b"abc", b" ", b"\n", b"\0", b"x" * 4097, b"x" * 70000]
DEBUGFS = Path("/sys/kernel/debug")


@dataclass(frozen=True)
class Twins:
    """A real file and the emulated one that stands for the same kind."""

    real: str
    emulated: str
    value: bytes | None = None
    """Written to both first, and read from both afterwards; None: they hold no value, or each its own text."""
    operations: dict[str, Operation] = field(default_factory=dict)
    has_text: bool = False
    """The texts differ; that there is one must not."""
    unlike: frozenset[str] = frozenset()


ANY = {**READING, **POSITION, **FILE, **DIRECTORY, **COPYING}
STORED = {**WRITING, **BOTH, **ANY}

# Why: the kernel's FUSE client decides these before, or without, asking the server.
_SPLICE = {"splice to a pipe", "sendfile"}  # debugfs has none, and a FUSE server cannot refuse it
_NO_TMPFILE = {"open the directory with O_TMPFILE"}  # libfuse has no such operation
_NOBODY = {"nobody makes a directory"}  # default_permissions looks at the directory's bits before it asks
_WRONG_TYPE = {"rmdir", "unlink the directory"}  # the VFS finds a wrong type before FUSE checks permission
_XATTR = {"getxattr", "get the capability xattr"}  # answered by no operation, which saves a request at each write
_PROC_FILE = {
    "seek to the end",  # goes by st_size
    "two pwrites", "pwrite at 3",  # every FUSE file can pwrite
    "mmap shared",  # refused for direct_io
    "write b''*0",  # a write of no bytes does not reach the server
}  # fmt: skip
SYSCTL = frozenset(_NO_TMPFILE | _NOBODY | _WRONG_TYPE)
PROC = frozenset(_NOBODY | _PROC_FILE)
_ROOT_CAN_ACCESS = {"access"}  # default_permissions grants root what open(2) then refuses
SYSCTL_WO = SYSCTL | {"write b''*0", "getxattr"} | _ROOT_CAN_ACCESS
_MOUNT_ROOT = {"rmdir the directory"}  # the real /proc is a mount point

READ_ONLY = {name: op for name, op in ANY.items() if "writing" not in name and "truncate" not in name}
"""What can be done under lockdown(7), which keeps root from opening debugfs files for writing."""

PAIRS = {
    "sysctl int": Twins(
        "/proc/sys/vm/extfrag_threshold",
        "proc/sys/vm/extfrag_threshold",
        b"500\n",
        STORED | writes(NUMBERS),
        unlike=SYSCTL,
    ),
    "sysctl of the DPU": Twins(
        "/proc/sys/vm/extfrag_threshold",
        "proc/sys/vm/dpu_compact_min_fragments",
        b"500\n",
        STORED | writes([data for data in SMALL_NUMBERS if data not in (b"1001", b"-0")]),
        unlike=SYSCTL,
    ),
    "sysctl write-only": Twins(
        "/proc/sys/vm/compact_memory",
        "proc/sys/vm/compact_memory",
        operations=STORED | writes([*FEW, b"0", b"2", b"-1", b"+1", b""]),
        unlike=SYSCTL_WO,
    ),
    "sysctl vector": Twins(
        "/proc/sys/kernel/printk",
        "proc/sys/kernel/printk",
        b"4 4 1 7\n",
        STORED | writes([*NUMBERS, b"5 6\n", b"5 x", b"1 2 3 4 5", b"4 4 1 7x", b"4,4", b"1\t2\t3\t4\n\n", b"-1 -2"]),
        unlike=SYSCTL,
    ),
    "sysctl seconds": Twins(
        "/proc/sys/kernel/printk_ratelimit",
        "proc/sys/kernel/printk_ratelimit",
        b"5\n",
        writes([*NUMBERS, b"8589934", b"8589935", b"-5"]),
    ),
    "sysctl any int": Twins(
        "/proc/sys/kernel/printk_ratelimit_burst", "proc/sys/kernel/printk_ratelimit_burst", b"10\n", writes(NUMBERS)
    ),
    "sysctl word": Twins(
        "/proc/sys/kernel/printk_devkmsg",
        "proc/sys/kernel/printk_devkmsg",
        b"ratelimit\n",
        writes([b"on", b"on\n", b"off\n", b"ratelimitx\n", b"onx\n", b"on \n", b" on\n", b"o\n", b"\n", b"on\n\n"]),
    ),
    "sysfs choice": Twins(
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "sys/kernel/mm/transparent_hugepage/enabled",
        b"madvise",
        STORED | writes([*FEW, b"always", b"never\n", b"never\n\n", b"never\0x", b" never", b"neverx", b"[never]"]),
        unlike=frozenset(_XATTR),
    ),
    "sysfs number": Twins(
        "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan",
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
        b"9\n",
        STORED | writes(SMALL_NUMBERS),
        unlike=frozenset(_XATTR),
    ),
    "sysfs read-only": Twins(
        "/sys/devices/system/node/node0/numastat",
        "sys/devices/system/node/node0/numastat",
        operations=ANY,
        has_text=True,
        unlike=frozenset(_XATTR),
    ),
    "sysfs write-only": Twins(
        "/sys/devices/system/node/node0/compact",
        "sys/devices/system/node/node0/compact_dpu",
        operations=ANY | writes([b"1", b"abc\n", b"\0", b"x" * 4096, b"x" * 4097, b""]),
        unlike=frozenset(_XATTR),
    ),
    "proc table": Twins(
        "/proc/buddyinfo", "proc/buddyinfo", operations=STORED | writes([*FEW, b""]), has_text=True,
        unlike=PROC | _MOUNT_ROOT,
    ),
    "proc table for root": Twins(
        "/proc/pagetypeinfo", "proc/pagetypeinfo", operations=ANY, has_text=True, unlike=PROC | _MOUNT_ROOT
    ),
    "debugfs table": Twins(
        "extfrag/extfrag_index", "sys/kernel/debug/extfrag/extfrag_index", operations=READ_ONLY, has_text=True,
        unlike=frozenset(_SPLICE | {"seek to the end", "chown to root", "open with O_TRUNC", "fallocate", "ftruncate",
                                    "ftruncate to more", "read on a descriptor for writing", "open for both"}),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def dpud() -> Iterator[Emulated]:
    with emulated() as found:
        yield found


@pytest.fixture(scope="module")
def debugfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kernel's debugfs, wherever it is; it may be mounted nowhere."""
    if (DEBUGFS / "extfrag").is_dir():
        yield DEBUGFS
        return
    folder = tmp_path_factory.mktemp("debugfs")
    if subprocess.run(["mount", "-t", "debugfs", "none", folder], capture_output=True, check=False).returncode:
        pytest.skip("this kernel has no debugfs")
    folder.parent.chmod(0o755)
    yield folder
    subprocess.run(["umount", folder], check=True)


def _outcome(twins: Twins, operation: Operation, path: Path) -> object:
    if twins.value is not None:
        path.write_bytes(twins.value)
    result = result_of(operation, path)
    if twins.has_text:
        result = re.sub(r"b'[^']{3,}'", "TEXT", re.sub(r"\d{2,}", "MANY", repr(result)))
    return result, path.read_bytes() if twins.value is not None else None


def _pairs(twins: Twins, dpud: Emulated, debugfs: Path) -> tuple[Path, Path]:
    real = debugfs / twins.real
    if not real.exists():
        pytest.skip(f"this kernel has no {real}")
    return real, dpud.mnt / twins.emulated


CASES = [(kind, name) for kind, twins in PAIRS.items() for name in twins.operations]


@pytest.mark.parametrize("kind", PAIRS)
def test_manners(dpud: Emulated, debugfs: Path, kind: str) -> None:
    twins = PAIRS[kind]
    real, ours = _pairs(twins, dpud, debugfs)
    before = {path: path.read_bytes() for path in (real, ours)} if twins.value is not None else {}
    differences = {}
    try:
        for name, operation in twins.operations.items():
            outcomes = [_outcome(twins, operation, path) for path in (real, ours)]
            if outcomes[0] != outcomes[1]:
                differences[name] = tuple(outcomes)
    finally:
        for path, text in before.items():
            path.write_bytes(re.sub(rb".*\[(.*)\].*\n", rb"\1", text))
    unexpected = {name: both for name, both in differences.items() if name not in twins.unlike}
    assert not unexpected, "\n".join(f"{name}: real {a}, emulated {b}" for name, (a, b) in unexpected.items())
    assert set(twins.unlike) & set(twins.operations) <= set(differences), "no longer unlike"


def test_there_are_many() -> None:
    assert len({name for _kind, name in CASES}) >= 100


@pytest.mark.parametrize("kind", PAIRS)
def test_stat(dpud: Emulated, debugfs: Path, kind: str) -> None:
    real, ours = _pairs(PAIRS[kind], dpud, debugfs)
    pairs = [(real, ours), (real.parent, ours.parent)] if debugfs != DEBUGFS else [(real, ours)]
    for one, two in pairs:
        here, there = os.stat(one), os.stat(two)
        assert {f: getattr(there, f) for f in manners.STAT_FIELDS} == {f: getattr(here, f) for f in manners.STAT_FIELDS}


# /dev/kmsg: what is logged for what is written.

LINES = [
    b"plain", b"plain\n", b"a\n\n", b"\n", b"a\nb\n", b"<>x", b"<3>x", b"<30>x", b"<+3>x", b"< 3>x", b"<0x3>x", b"<3x",
    b"<2056>x", b"<99999>x", b"<18446744073709551617>x", b"<3>", b"<3>\n", b"a\0b", b"\x013x", b"<3>\x014x",
    b"\xc3\xa9\t\\\x7f", b"\xff\xfe", b"x" * 1023, b"x" * 1024, b"x" * 1025, b"<3>" + b"x" * 1021, b"\n\n\n", b"a ",
    "<\u0663>x".encode(),
]  # fmt: skip


def _logged(path: Path, mark: bytes, line: bytes) -> object:
    """Write a line, then a mark; what stands before the mark: priority and text."""
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(reading, 0, os.SEEK_END)
        results = []
        ended = mark + b"\n"  # else the next record might still go on
        for data in (ended, line, ended):  # the first one tells where to begin: FUSE may know an older end
            writing = os.open(path, os.O_WRONLY)
            try:
                results.append(result_of(os.write, writing, data))
            finally:
                os.close(writing)
        return results[1], _between(reading, mark)
    finally:
        os.close(reading)


def _between(reading: int, mark: bytes) -> list[tuple[bytes, bytes]]:
    """Records between two marks; the kernel may need a moment until a reader sees them."""
    records: list[tuple[bytes, bytes]] = []
    nr_marks = 0
    while nr_marks < 2:
        try:
            head, text = os.read(reading, 8192).split(b";", 1)
        except BlockingIOError:
            time.sleep(0.01)
            continue
        if text.rstrip() == mark:
            nr_marks += 1
        elif nr_marks == 1:
            records.append((head.split(b",", 1)[0], text))
    return records


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line[:20]!r}*{len(line)}")
def test_what_is_logged_for_a_line(dpud: Emulated, line: bytes) -> None:
    mark = b"dpud test %d" % time.monotonic_ns()
    here, there = (_logged(path, mark, line) for path in (Path("/dev/kmsg"), dpud.mnt / "dev/kmsg"))
    assert there == here


def _kmsg_reading(path: Path) -> object:
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        results = [bool(poll.poll(0)), result_of(os.read, fd, 5)]
        while result_of(os.read, fd, 8192) != "EAGAIN":
            pass
        results += [poll.poll(0), result_of(os.read, fd, 8192)]
        os.write(fd, b"<6>dpud test: one\n")
        results += [[mask for _fd, mask in poll.poll(1000)], os.read(fd, 8192).split(b";")[1], poll.poll(0)]
        os.lseek(fd, 0, os.SEEK_SET)
        return [*results, os.read(fd, 8192).split(b",")[1].isdigit()]
    finally:
        os.close(fd)


def test_reading_and_polling_the_log(dpud: Emulated) -> None:
    """Too small a buffer, the end, what a reader sees of its own line, and what poll(2) says at each."""
    assert _kmsg_reading(dpud.mnt / "dev/kmsg") == _kmsg_reading(Path("/dev/kmsg"))


def _burst(path: Path) -> object:
    """Thirteen lines from one open file, and what is said of those that were too many."""
    mark = b"dpud burst %d\n" % time.monotonic_ns()
    fd = os.open(path, os.O_WRONLY)
    taken = [os.write(fd, mark) for _ in range(13)]
    os.close(fd)
    time.sleep(0.2)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    texts = []
    while isinstance(record := result_of(os.read, reading, 8192), bytes):
        texts.append(record.split(b";", 1)[1])
    os.close(reading)
    first = texts.index(mark)
    return taken, texts.count(mark), [text for text in texts[first:] if b"suppressed" in text]


def test_a_burst_of_lines_is_cut_off(dpud: Emulated) -> None:
    taken, nr_logged, suppressed = _burst(dpud.mnt / "dev/kmsg")  # type: ignore[misc]
    assert (taken, nr_logged, suppressed) == _burst(Path("/dev/kmsg"))
    assert nr_logged == 10
    assert b"3 output lines suppressed" in suppressed[-1]
