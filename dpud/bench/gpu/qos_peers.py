# SPDX-License-Identifier: GPL-2.0-only
"""Two real processes that share a rate: under dpud, and under what Linux has. Each gives bytes/s of both together.

Peers need root: tc's token bucket filter on one end of a veth pair in a network namespace of its own, and cgroup v1's
blkio.throttle on the disk of the folder for temporary files. Where there is no such thing, there is no figure.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NR = 2
"""Processes."""
BATCH_NS = 5_000_000
"""Of the rate that a process asks for at a time."""
BURST_PER_S = 20
"""dpud and tbf have a burst of 50 ms: a process of a busy host oversleeps as long."""
_MIN_BATCH, _MAX_BATCH = 64 << 10, 4 << 20
_PAYLOAD, _FRAME = 1448, 1514
"""Bytes of an Ethernet frame, as tc counts them, that carry TCP's payload."""
_BLKIO = Path("/sys/fs/cgroup/blkio")
_CLIENTS = "sys/kernel/config/gpu_memvirt/gpu0/clients"
_QOS = "sys/class/gpu_memvirt/gpu0/qos"
_START = [sys.executable, "-P", str(Path(__file__).with_name("qos_worker.py"))]


def batch_of(rate: int) -> int:
    """Bytes at a time, a multiple of 4096."""
    return min(_MAX_BATCH, max(_MIN_BATCH, rate // NR * BATCH_NS // 1_000_000_000 >> 12 << 12))


def _together(commands: list[list[str]]) -> list[float]:
    """What each prints last."""
    workers = [subprocess.Popen([*_START, *command], stdout=subprocess.PIPE, text=True) for command in commands]
    return [float(worker.communicate()[0].split()[-1]) for worker in workers]


def dpud(mount: Path, rate: int, seconds: float) -> list[float]:
    """Two clients of equal shares in a total; each asks for a batch (qos_charge), then copies it."""
    names = [f"qos-bench-{number}" for number in range(NR)]
    for name in names:
        (mount / _CLIENTS / name).mkdir()
    (mount / _QOS / "total_bandwidth").write_text(str(rate))
    (mount / _QOS / "burst").write_text(str(max(64 << 10, rate // BURST_PER_S)))
    try:
        files = [mount / _CLIENTS / name / "qos_charge" for name in names]
        return _together([["charge", str(seconds), str(batch_of(rate)), str(file)] for file in files])
    finally:
        (mount / _QOS / "total_bandwidth").write_text("0")
        (mount / _QOS / "burst").write_text("0")
        for name in names:
            (mount / _CLIENTS / name).rmdir()


def naive(rate: int, seconds: float) -> list[float]:
    """Each has a bucket of its own, of 64 KiB, and sleeps for what is missing."""
    return _together([["naive", str(seconds), str(_MIN_BATCH), str(rate / NR)]] * NR)


def tbf(rate: int, seconds: float) -> list[float] | None:
    """Bytes on the wire, from the payload that came."""
    try:
        with _veth(rate) as (space, host):
            jobs = [_connection(space, host, rate, seconds) for _ in range(NR)]
            receivers = [receiver for receiver, _ in jobs]
            rates = [float(receiver.communicate()[0].split()[-1]) for receiver in receivers]
            for _, sender in jobs:
                sender.kill()
                sender.wait()
            return [each * _FRAME / _PAYLOAD for each in rates]
    except (OSError, subprocess.CalledProcessError):
        return None


def _connection(
    space: str, host: str, rate: int, seconds: float
) -> tuple["subprocess.Popen[str]", "subprocess.Popen[str]"]:
    job = [str(seconds), str(batch_of(rate)), host]
    inside = ["ip", "netns", "exec", space, *_START, "receive", *job]
    receiver = subprocess.Popen(inside, stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    port = receiver.stdout.readline().strip()
    sender = subprocess.Popen([*_START, "send", *job, port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return receiver, sender  # type: ignore[return-value]


@contextmanager
def _veth(rate: int) -> Iterator[tuple[str, str]]:
    """(network namespace, address in it), behind a token bucket filter."""
    space, ours = f"dpud-qos-{os.getpid()}", f"dq{os.getpid()}"
    _ip("netns", "add", space)
    try:
        _ip("link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("addr", "add", "198.18.77.1/30", "dev", ours)  # for benchmarks: RFC 2544
        _ip("link", "set", ours, "up")
        _ip("-n", space, "addr", "add", "198.18.77.2/30", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        burst = max(64 << 10, rate // BURST_PER_S)
        command = ["tc", "qdisc", "add", "dev", ours, "root", "tbf", "rate", f"{rate * 8}bit", "burst", str(burst)]
        subprocess.run([*command, "latency", "50ms"], check=True, capture_output=True)
        yield space, "198.18.77.2"
    finally:
        _ip("netns", "del", space)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def blkio(rate: int, seconds: float) -> list[float] | None:
    """Both in one cgroup, each writing to a file of its own."""
    group = _BLKIO / f"dpud-qos-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="dpud-qos-") as folder:
            return _throttled(group, Path(folder), rate, seconds)
    except OSError:
        return None
    finally:
        with suppress(OSError):
            group.rmdir()


def _throttled(group: Path, folder: Path, rate: int, seconds: float) -> list[float]:
    device = folder.stat().st_dev
    limit = f"{os.major(device)}:{os.minor(device)} {rate}"
    (group / "blkio.throttle.write_bps_device").write_text(limit)
    enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    job = [str(seconds), str(batch_of(rate))]
    workers = []
    for number in range(NR):
        file = folder / str(number)
        file.write_bytes(bytes(64 << 20))
        command = ["sh", "-c", enter, "sh", *_START, "write", *job, str(file)]
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    return [float(worker.communicate()[0].split()[-1]) for worker in workers]
