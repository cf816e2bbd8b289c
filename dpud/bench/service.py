# SPDX-License-Identifier: GPL-2.0-only
"""What the daemon costs whoever keeps one running: its start, its stop, and what it takes while nobody asks."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dpud.bench.report import Figure, Report
from dpud.errors import UserError

NR_STARTS = 5
IDLE_S = 10.0
START_S, STOP_S, IDLE_PERCENT = 1.5, 1.0, 0.5
_TIMEOUT_S = 60


@dataclass
class Started:
    """A daemon that has told systemd, which is us, that it is ready."""

    process: "subprocess.Popen[bytes]"
    start_s: float
    cpu_s: float
    """Processor time of the start."""


@contextmanager
def _started(folder: Path) -> Iterator[Started]:
    address = str(folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(address)
        channel.settimeout(_TIMEOUT_S)
        command = [sys.executable, "-P", "-m", "dpud", "run", "--mount", str(folder / "mnt")]
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=_environment(address), stderr=subprocess.DEVNULL)
        try:
            _wait_until_ready(channel)
            yield Started(process, time.perf_counter() - begin, _cpu_ns(process.pid) / 1e9)
        finally:
            process.terminate()
            process.wait(_TIMEOUT_S)
            os.unlink(address)


def _environment(address: str) -> dict[str, str]:
    """Ours, but bytecode is kept: a service has it, for what installs dpud makes it."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"NOTIFY_SOCKET": address}


def _wait_until_ready(channel: socket.socket) -> None:
    try:
        while b"READY=1" not in channel.recv(4096).split(b"\n"):
            pass
    except TimeoutError:
        raise UserError("the daemon to be measured did not start") from None


def _cpu_ns(pid: int) -> int:
    """Of all its threads, as the scheduler counts (the first number of schedstat)."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _stop(started: Started) -> float:
    begin = time.perf_counter()
    started.process.send_signal(signal.SIGTERM)
    started.process.wait(_TIMEOUT_S)
    return time.perf_counter() - begin


def _memory(pid: int) -> dict[str, int]:
    """Bytes by kind, from smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(size) << 10 for name, size, *_ in (line.replace(":", "").split() for line in lines)}


def run() -> Report:
    report = Report(
        "service",
        "a daemon as a service: the default machine",
        f"Start: from exec to READY=1 (files can be read), bytecode and compiled loops cached; medians of {NR_STARTS}. "
        f"Idle: {IDLE_S:.0f} s in which nobody asks anything.",
    )
    with tempfile.TemporaryDirectory(prefix="dpud-bench-") as folder:
        with _started(Path(folder)) as first:  # fills the caches
            time.sleep(1)
            before = _cpu_ns(first.process.pid)
            time.sleep(IDLE_S)
            idle = (_cpu_ns(first.process.pid) - before) / 1e9 / IDLE_S
            memory = _memory(first.process.pid)
        starts, stops = [], []
        for _ in range(NR_STARTS):
            with _started(Path(folder)) as started:
                starts.append((started.start_s, started.cpu_s))
                stops.append(_stop(started))
    report.figures = [
        Figure("start to ready", median(wall for wall, _ in starts), "s", START_S),
        Figure("processor time of that", median(cpu for _, cpu in starts), "s"),
        Figure("SIGTERM to gone", median(stops), "s", STOP_S),
        Figure("idle: processor", 100 * idle, "%", IDLE_PERCENT),
        Figure("idle: memory of its own", memory["Pss_Anon"] / (1 << 20), "MiB"),
        Figure("idle: resident, with libraries", memory["Rss"] / (1 << 20), "MiB"),
    ]
    return report
