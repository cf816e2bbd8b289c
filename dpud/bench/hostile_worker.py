# SPDX-License-Identifier: GPL-2.0-only
"""A client of the bench hostile: `python hostile_worker.py MOUNT JOB SECONDS UID [AMOUNT...]`.

Jobs are what somebody does to a daemon who wishes it ill, or does not know better; `use` is who just wants his files.
`pair` leaves the mount alone: it is a program and a server of its own. A job says `ready` when it has what it needs,
goes on for so many seconds, and prints what it saw as JSON. A process of its own, started by its path: it imports
nothing of ours.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import select
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from time import monotonic, perf_counter_ns, sleep, thread_time
from typing import TypeVar

NR_OPEN, NR_BEGUN, NR_BLOCKED, NR_ITEMS, NR_POLLED = 10_000, 4_000, 1_000, 1_000, 1_000
PIECE = 1 << 20
_SPACING_S = 0.001
"""Between two uses: a program that wants to know something now and then."""
_SLICE_S = 0.01
_SHORTEST_SLEEP_S = 0.0002
_GPU = "sys/kernel/config/gpu_memvirt/gpu0/clients"
_BUFFER_BYTES = 64 << 20
_IOCTLS = (0x5401, 0x541B, 0x80086601, 0xC0045877, 0xABCD)  # TCGETS, FIONREAD, FS_IOC_GETFLAGS, FIFREEZE, nonsense
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


T = TypeVar("T")


class Seen:
    """What one client saw."""

    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()
        self.nr_calls = 0
        self.nr_held = 0

    def attempt(self, call: Callable[..., T], *args: object) -> T | None:
        """What it gives; None if it failed, which is counted by its errno."""
        self.nr_calls += 1
        try:
            return call(*args)
        except OSError as error:
            self.errors[errno.errorcode.get(error.errno or 0, "?")] += 1
            return None


Steps = Generator[None, None, None]
Job = Callable[[Path, Seen], Steps]
"""Goes on in short steps, the first of which is the preparation."""


def opened_only(mount: Path, seen: Seen) -> Steps:
    """Opens files and never reads them."""
    fds = [seen.attempt(os.open, mount / "proc/buddyinfo", os.O_RDONLY) for _ in range(NR_OPEN)]
    seen.nr_held = len(fds) - fds.count(None)
    while True:
        yield
        sleep(_SLICE_S)


def begun(mount: Path, seen: Seen) -> Steps:
    """Reads a byte of each of many long texts, so that the rest has to be kept for it."""
    paths = [mount / "proc/zoneinfo", mount / "proc/vmstat"]
    for number in range(NR_BEGUN):
        fd = seen.attempt(os.open, paths[number % 2], os.O_RDONLY)
        seen.nr_held += fd is not None and seen.attempt(os.read, fd, 1) is not None
    while True:
        yield
        sleep(_SLICE_S)


def blocked(mount: Path, seen: Seen) -> Steps:
    """Many threads wait for a line in the log."""
    threading.stack_size(1 << 16)

    def wait() -> None:
        fd = os.open(mount / "dev/kmsg", os.O_RDONLY)
        os.lseek(fd, 0, os.SEEK_END)
        while seen.attempt(os.read, fd, 8192) is not None:
            pass
        seen.nr_held -= 1

    for _ in range(NR_BLOCKED):
        seen.nr_held += 1
        threading.Thread(target=wait, daemon=True).start()
    while True:
        yield
        sleep(_SLICE_S)


def polled(mount: Path, seen: Seen) -> Steps:
    """Asks without end whether there is a line in the log, through many descriptors."""
    poll = select.poll()
    for _ in range(NR_POLLED):
        fd = seen.attempt(os.open, mount / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        if fd is not None:
            os.lseek(fd, 0, os.SEEK_END)
            poll.register(fd, select.POLLIN)
            seen.nr_held += 1
    while True:
        yield
        seen.attempt(poll.poll, 1)


def logging(mount: Path, seen: Seen) -> Steps:
    """Writes to the log: 64 KiB at once, which is too much, and ten lines from each open file, which are not."""
    line, flood = b"<5>" + b"x" * 900 + b"\n", b"<5>" + b"x" * (1 << 16)
    while True:
        yield
        fd = seen.attempt(os.open, mount / "dev/kmsg", os.O_WRONLY)
        if fd is not None:
            for data in [line] * 10 + [flood]:
                seen.attempt(os.write, fd, data)
            os.close(fd)


def odd_calls(mount: Path, seen: Seen) -> Steps:
    """System calls that such files do not know, or not from everybody."""
    paths = [mount / path for path in ("proc/buddyinfo", "proc/sys/vm/extfrag_threshold", "dev/kmsg")]
    while True:
        for path in paths:
            yield
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            for number in _IOCTLS:
                seen.attempt(fcntl.ioctl, fd, number, bytes(64))
            seen.attempt(_mapped, fd, mmap.MAP_SHARED)
            seen.attempt(_mapped, fd, mmap.MAP_PRIVATE)
            seen.attempt(os.ftruncate, fd, 1 << 40)
            seen.attempt(os.truncate, path, 0)
            seen.attempt(os.pread, fd, 1 << 20, 1 << 62)
            seen.attempt(os.open, path, os.O_RDWR)
            seen.attempt(os.chmod, path, 0o666)
            seen.attempt(os.link, path, path.with_name("x"))
            os.close(fd)


def _mapped(fd: int, flags: int) -> None:
    address = _libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, flags, fd, ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(4096))


def listing(mount: Path, seen: Seen) -> Steps:
    """Lists whole trees, and keeps directories open in the middle of a list."""
    held = [os.scandir(mount / "proc/sys/vm") for _ in range(NR_BLOCKED)]
    for entries in held:
        seen.nr_held += next(entries, None) is not None
    while True:
        for root in ("proc/sys", "sys/devices", "sys/kernel/mm"):
            for _ in os.walk(mount / root):
                seen.nr_calls += 1
                yield


def names(mount: Path, seen: Seen) -> Steps:
    """Long and deep names, each another one, none of which is there."""
    number = 0
    while True:
        yield
        number += 1
        for name in ("x" * 250 + str(number), "x" * 4000, "x/" * 2000, f"a\nb\x01{number}"):
            seen.attempt(os.stat, mount / "sys/devices/system" / name)
            seen.attempt(os.stat, f"{mount}/proc/{name}")


def making(mount: Path, seen: Seen) -> Steps:
    """Makes many processes and takes them away again."""
    group = mount / "sys/kernel/config/kernelsim/mm"
    made: list[Path] = []
    try:
        while True:
            for number in range(NR_ITEMS):
                yield
                if path := seen.attempt(_made, group / f"hostile{number}"):
                    made.append(path)
                    seen.nr_held = max(seen.nr_held, len(made))
            while made:
                yield
                seen.attempt(os.rmdir, made.pop())
    finally:
        for path in made:
            path.rmdir()


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def buffers(mount: Path, seen: Seen) -> Steps:
    """Writes a GPU buffer over and over."""
    client = mount / _GPU / "hostile"
    buffer = client / "buffers/big"
    client.mkdir()
    buffer.mkdir()
    (buffer / "size").write_text(str(_BUFFER_BYTES))
    fd, noise = os.open(buffer / "data", os.O_WRONLY), os.urandom(PIECE)
    try:
        while True:
            for offset in range(0, _BUFFER_BYTES + PIECE, PIECE):  # the last piece is beyond its end
                yield
                seen.attempt(os.pwrite, fd, noise, offset)
    finally:
        os.close(fd)
        buffer.rmdir()
        client.rmdir()


def pair(per_s: float, own_s: float, server_s: float, nice: float) -> Steps:
    """A program that asks a server so many times a second, or as often as it can; what each of them computes for it.

    `nice`: the server's priority.
    """
    ours, its = socket.socketpair()
    if not os.fork():
        ours.close()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, int(nice))
        while its.recv(1):
            _compute(server_s)
            its.send(b"x")
        os._exit(0)
    its.close()
    due = monotonic()
    while True:
        yield
        _compute(own_s)
        ours.send(b"x")
        ours.recv(1)
        due = max(due + 1 / per_s, monotonic() - _SLICE_S)
        if (early := due - monotonic()) > _SHORTEST_SLEEP_S:
            sleep(early)


def _compute(seconds: float) -> None:
    """Take so much CPU time."""
    end = thread_time() + seconds
    while thread_time() < end:
        pass


def use(mount: Path, seconds: float) -> dict[str, object]:
    """What a program sees that reads a file and sets a knob now and then: nanoseconds for each, and what went wrong.

    `delays`: for how much of them, a read and a write in turns, it could have run and had no CPU.
    """
    reads, writes, delays, wrong = list[int](), list[int](), list[int](), list[str]()
    schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    knob, end, number = mount / "proc/sys/vm/extfrag_threshold", monotonic() + seconds, 0
    while monotonic() < end:
        sleep(_SPACING_S)
        number += 1
        at_first = _run_delay_ns(schedstat)
        begin = perf_counter_ns()
        text = _read(mount / "proc/buddyinfo")
        reads.append(perf_counter_ns() - begin)
        after_read = _run_delay_ns(schedstat)
        begin = perf_counter_ns()
        fd = os.open(knob, os.O_WRONLY | os.O_TRUNC)
        os.write(fd, b"%d\n" % (number % 1000))
        os.close(fd)
        writes.append(perf_counter_ns() - begin)
        delays += (after_read - at_first, _run_delay_ns(schedstat) - after_read)
        if not text.startswith(b"Node 0, zone") or _read(knob) != b"%d\n" % (number % 1000):
            wrong.append(f"use {number}")
    return {"reads": reads, "writes": writes, "delays": delays, "wrong": wrong}


def _run_delay_ns(schedstat: int) -> int:
    """So far (Documentation/scheduler/sched-stats.rst)."""
    return int(os.pread(schedstat, 100, 0).split()[1])


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


JOBS: dict[str, Job] = {
    job.__name__: job
    for job in (opened_only, begun, blocked, polled, logging, odd_calls, listing, names, making, buffers)
}


def become(uid: int) -> None:
    """Be an ordinary user, who may have more descriptors than are usual."""
    wanted = NR_OPEN + NR_POLLED + 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
    if uid != os.getuid():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def hurt(steps: Steps, seconds: float, seen: Seen) -> dict[str, object]:
    """Go through the steps for so long -> what was seen, the CPU time that it took, and how often it waited."""
    next(steps)
    print("ready", flush=True)
    before, end = resource.getrusage(resource.RUSAGE_SELF), monotonic() + seconds
    while monotonic() < end:
        next(steps)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    steps.close()
    nr_waits = after.ru_nvcsw - before.ru_nvcsw
    seen_of_it = {"errors": dict(seen.errors), "nr_calls": seen.nr_calls, "nr_held": seen.nr_held}
    return {"cpu_s": cpu_s, "nr_waits": nr_waits} | seen_of_it


def main() -> None:
    mount, job, seconds, uid, *amount = sys.argv[1:]
    become(int(uid))
    seen = Seen()
    if job == "use":
        outcome = use(Path(mount), float(seconds))
    else:
        steps = pair(*map(float, amount)) if job == "pair" else JOBS[job](Path(mount), seen)
        outcome = hurt(steps, float(seconds), seen)
    print(json.dumps(outcome), flush=True)
    os._exit(0)  # threads that wait need not be waited for


if __name__ == "__main__":
    main()
