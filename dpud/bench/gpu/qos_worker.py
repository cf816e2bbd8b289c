# SPDX-License-Identifier: GPL-2.0-only
"""One real process whose bandwidth is measured: `python qos_worker.py charge|naive|send|receive|write SECONDS ...`.

    charge SECONDS BATCH FILE     asks the file for each batch of bytes, then copies them in memory
    naive SECONDS BATCH RATE      copies as fast as a token bucket of its own says, sleeping for what is missing
    send SECONDS BATCH HOST PORT  sends on a TCP connection
    receive SECONDS BATCH HOST    takes one connection; prints the port, then what came
    write SECONDS BATCH FILE      writes past the page cache, again and again over the same file

Prints bytes/s. The first half second does not count: whoever paces may have let a burst through. Started by its path,
so that it imports nothing of ours.
"""

import mmap
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress

WARM_UP_S = 0.5
CHUNK = 1 << 20
FILE_BYTES = 64 << 20


def rate(seconds: float, step: Callable[[], int]) -> float:
    """Bytes/s of `step`, between the ends of two of its calls."""
    until = time.monotonic() + WARM_UP_S
    while time.monotonic() < until:
        if not step():
            return 0.0
    begin = now = time.monotonic()
    nr_bytes = 0
    while now < begin + seconds and (nr := step()):
        nr_bytes += nr
        now = time.monotonic()
    return nr_bytes / (now - begin) if nr_bytes else 0.0


class Copier:
    """Copies a batch from one half of its memory to the other."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._memory = memoryview(mmap.mmap(-1, 2 * CHUNK))

    def copy(self) -> None:
        left = self.batch
        while left > 0:
            nr = min(left, CHUNK)
            self._memory[CHUNK : CHUNK + nr] = self._memory[:nr]
            left -= nr


def charge(seconds: float, batch: int, file: str) -> float:
    copier, text = Copier(batch), str(batch).encode()
    fd = os.open(file, os.O_WRONLY)

    def step() -> int:
        os.pwrite(fd, text, 0)
        copier.copy()
        return batch

    return rate(seconds, step)


def naive(seconds: float, batch: int, rate_text: str) -> float:
    copier, tokens, last, bytes_per_s = Copier(batch), 0.0, time.monotonic(), float(rate_text)

    def step() -> int:
        nonlocal tokens, last
        now = time.monotonic()
        tokens = min(float(batch), tokens + (now - last) * bytes_per_s)
        last = now
        if tokens < batch:
            time.sleep((batch - tokens) / bytes_per_s)
            tokens, last = float(batch), time.monotonic()
        tokens -= batch
        copier.copy()
        return batch

    return rate(seconds, step)


def send(seconds: float, batch: int, host: str, port: str) -> float:
    data = bytes(batch)
    with socket.create_connection((host, int(port))) as connection, suppress(ConnectionError):
        return rate(seconds + 1, lambda: connection.send(data))
    return 0.0


def receive(seconds: float, batch: int, host: str) -> float:
    buffer = bytearray(batch)
    with socket.create_server((host, 0)) as server:
        print(server.getsockname()[1], flush=True)
        with server.accept()[0] as connection:
            return rate(seconds, lambda: connection.recv_into(buffer))


def write(seconds: float, batch: int, file: str) -> float:
    data = mmap.mmap(-1, batch)
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    at = 0

    def step() -> int:
        nonlocal at
        at = (at + batch) % FILE_BYTES
        return os.pwrite(fd, data, at)

    return rate(seconds, step)


def main() -> None:
    name, seconds, batch, *rest = sys.argv[1:]
    jobs: dict[str, Callable[..., float]] = {
        "charge": charge,
        "naive": naive,
        "send": send,
        "receive": receive,
        "write": write,
    }
    print(jobs[name](float(seconds), int(batch), *rest), flush=True)


if __name__ == "__main__":
    main()
