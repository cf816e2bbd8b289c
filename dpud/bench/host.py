# SPDX-License-Identifier: GPL-2.0-only
"""Where the benchmarks run: what has to be said about this machine, and the servers that are measured.

Everything that is mounted is mounted in a mount namespace of the benchmark's own, and every process started here is
told to die with it. So nothing is left behind, however the benchmark ends.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from signal import SIGKILL, SIGTERM

from dpud import namespace
from dpud.errors import UserError
from dpud.exec import own_daemon

_START_TIMEOUT_S = 10


def conditions() -> str:
    """One paragraph on the machine: processor, memory, kernel, Python."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cpu = cpu_model(Path("/proc/cpuinfo").read_text())
    return (
        f"{time.strftime('%Y-%m-%d')}: {os.cpu_count()} CPUs ({cpu}), {gib:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}."
    )


def cpu_model(cpuinfo: str) -> str:
    """The name in /proc/cpuinfo, or `unknown`."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1] if found else "unknown"


def load() -> str:
    """`load average 0.42, not pinned`: what else the machine did, and where this process may run."""
    allowed = os.sched_getaffinity(0)
    pinned = "not pinned" if len(allowed) == os.cpu_count() else f"pinned to CPU {', '.join(map(str, sorted(allowed)))}"
    return f"load average {os.getloadavg()[0]:.2f}, {pinned}"


@contextmanager
def pinned_to(cpus: set[int]) -> Iterator[None]:
    """Keep this process, and what it starts, on some CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def daemon(*run_options: str) -> Iterator[Path]:
    """A dpud of our own, and where it is mounted. Raises UserError if it does not start (it has said why)."""
    with own_daemon(run_options) as mountpoint:
        if mountpoint is None:
            raise UserError("the daemon to be measured did not start")
        yield Path(mountpoint)


@contextmanager
def lxcfs() -> Iterator[Path | None]:
    """Debian's lxcfs, and where it is mounted; None if it is not installed or does not start."""
    program = shutil.which("lxcfs")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="dpud-lxcfs-") as scratch:
        mountpoint = Path(scratch, "mnt")
        mountpoint.mkdir()
        command = [program, "-f", "-p", str(Path(scratch, "pid")), str(mountpoint)]
        with started(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
            try:
                yield mountpoint if _comes_up(server, mountpoint / "proc/meminfo") else None
            finally:
                _end(server)
                if os.path.ismount(mountpoint):
                    namespace.detach(str(mountpoint))


def _comes_up(server: "subprocess.Popen[bytes]", file: Path) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        if file.exists():
            return True
        time.sleep(0.01)
    return False


@contextmanager
def started(
    command: Sequence[str], *, stdout: int = subprocess.PIPE, stderr: int | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block, or with this process."""
    die_with_us = partial(namespace.die_with_parent, os.getpid(), SIGKILL)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, preexec_fn=die_with_us)
    try:
        yield process
    finally:
        _end(process)
        if process.stdout:
            process.stdout.close()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(SIGTERM)
    try:
        process.wait(_START_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def server_of(mountpoint: Path) -> int:
    """pid of the process, started by this one, that was told to mount there. Raises StopIteration."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return next(int(pid) for pid in children if str(mountpoint) in Path(f"/proc/{pid}/cmdline").read_text().split("\0"))


def cpu_time_ns(pid: int) -> int:
    """CPU time, user and system, that a process has used: its clock, by the kernel's number for it (posix-timers.h)."""
    return time.clock_gettime_ns(~pid << 3 | 2)


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs one of this package's programs."""
    return [sys.executable, "-P", "-m", f"dpud.bench.{name}", *arguments]
