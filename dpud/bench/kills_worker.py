# SPDX-License-Identifier: GPL-2.0-only
"""One client of a daemon that is killed again and again: it knows what it was told is done, and looks whether it is.

Run as a program: `kills_worker.py MOUNT NUMBER`, until its standard input ends; then it prints what it saw, as JSON.
Everything that it writes is its own, so what must be there is what was acknowledged last, or what it was just writing
when the daemon died. It needs no module of ours, so it starts at once.
"""

import errno
import json
import os
import random
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_SLOTS, _SLOT_BYTES = 64, 4096
_KNOBS = ("extfrag_threshold", "dpu_compact_min_fragments", "compaction_proactiveness", "watermark_scale_factor")
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.EIO, errno.ENODEV)
_LINES = 400
"""Log lines that are looked for; older ones may have left the ring."""


class Client:
    """What it holds to be so: of each thing, the values that it may have."""

    def __init__(self, mount: Path, number: int) -> None:
        self.mount, self.number = mount, number
        self.chance = random.Random(number)
        self.mm = mount / "sys/kernel/config/kernelsim/mm"
        self.gpu = mount / f"sys/kernel/config/gpu_memvirt/gpu0/clients/w{number}"
        self.knob = mount / "proc/sys/vm" / _KNOBS[number % len(_KNOBS)]
        self.known: dict[str, set[str]] = {}
        self.lines: list[int] = []
        self.nr_done = self.nr_checks = 0
        self.lost: list[str] = []

    def set(self, what: str, value: str, work: Callable[[], object]) -> None:
        """Do something that makes `what` be `value`; until it is acknowledged, it may or may not be."""
        self.known.setdefault(what, {"absent"}).add(value)
        work()
        self.known[what] = {value}
        self.nr_done += 1

    # Its work.

    def begin(self) -> None:
        """A buffer, where there is none."""
        for path in (self.gpu, self.gpu / "buffers/data"):
            if not path.exists():
                with suppress(FileExistsError):  # it came with the mount, just now
                    path.mkdir()
        if echoed(self.gpu / "buffers/data/size") == "0":
            echo(self.gpu / "buffers/data/size", str(_SLOTS * _SLOT_BYTES))
        if "knob" not in self.known:
            self.known["knob"] = {echoed(self.knob)}

    def step(self) -> None:
        number = self.chance.randrange(1000)
        choice = number % 10
        if choice < 4:
            self.write_slot(number % _SLOTS, self.chance.randrange(1, 1 << 30))
        elif choice < 6:
            value = str(number % 100 + 1)
            self.set("knob", value, lambda: echo(self.knob, value))
        elif choice < 7:
            self.log()
        elif choice < 9:
            self.work_on_process(f"w{self.number}-{number % 3}", number)
        else:
            self.disturb(number)

    def write_slot(self, slot: int, value: int) -> None:
        data = value.to_bytes(8, "little") * (_SLOT_BYTES // 8)
        self.set(f"slot{slot}", str(value), lambda: pwrite(self.gpu / "buffers/data/data", data, slot * _SLOT_BYTES))

    def log(self) -> None:
        number = self.lines[-1] + 1 if self.lines else 0
        echo(self.mount / "dev/kmsg", f"worker {self.number} line {number}")
        self.lines.append(number)
        self.nr_done += 1

    def work_on_process(self, name: str, number: int) -> None:
        path, there = self.mm / name, self.known.get(name, {"absent"}) != {"absent"}
        if not there:
            self.set(name, "0", path.mkdir)
        elif number % 7 == 0:
            self.set(name, "absent", path.rmdir)
        else:
            size = str((number % 5 + 1) << 18)
            self.set(name, size, lambda: echo(path / "anon", size))

    def disturb(self, number: int) -> None:
        """What shows nowhere, and makes all of it move."""
        work = [
            lambda: echo(self.mount / "sys/devices/system/node/node0/compact_dpu", "1"),
            lambda: echo(self.mount / "sys/devices/system/node/node1/compact", "1"),
            lambda: echo(self.gpu / "buffers/data/reclaim", "65536"),
            lambda: echo(self.mount / "sys/kernel/debug/dpu_compact/engine", ("host", "cpu", "upmem-v1a")[number % 3]),
        ]
        try:
            work[number % len(work)]()
        except OSError as error:
            if error.errno in _DEAD:
                raise

    # Its look at what is left.

    def check(self) -> None:
        for what, may_be in self.known.items():
            found = self.look(what)
            if found not in may_be:
                os.stat(self.mm)  # not there, with nothing mounted just now
                found = self.look(what)
            if found not in may_be:
                self.lost.append(f"worker {self.number}: {what} is {found}, not {' or '.join(sorted(may_be))}")
            self.known[what] = {found}
        self.check_log()
        self.nr_checks += 1

    def look(self, what: str) -> str:
        if what == "knob":
            return echoed(self.knob)
        if what.startswith("slot"):
            data = pread(self.gpu / "buffers/data/data", _SLOT_BYTES, int(what[4:]) * _SLOT_BYTES)
            values = {data[at : at + 8] for at in range(0, len(data), 8)}
            value = int.from_bytes(data[:8], "little")
            return "torn" if len(values) != 1 else str(value) if value else "absent"
        path = self.mm / what
        if not path.exists():
            return "absent"
        verified = echoed(path / "verify")
        return echoed(path / "anon") if verified == "ok" else f"damaged: {verified}"

    def check_log(self) -> None:
        mark = f";worker {self.number} line "
        found = {int(line.rpartition(" ")[2]) for line in read_log(self.mount / "dev/kmsg") if mark in line}
        for number in self.lines[-_LINES:]:
            if number not in found:
                self.lost.append(f"worker {self.number}: log line {number} is gone")
        self.lines = sorted(found)


def echo(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def echoed(path: Path) -> str:
    return path.read_text().strip()


def pwrite(path: Path, data: bytes, pos: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        assert os.pwrite(fd, data, pos) == len(data)
    finally:
        os.close(fd)


def pread(path: Path, nr: int, pos: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, nr, pos)
    finally:
        os.close(fd)


def read_log(path: Path) -> list[str]:
    fd, lines = os.open(path, os.O_RDONLY | os.O_NONBLOCK), []
    try:
        while True:
            lines.append(os.read(fd, 8192).decode(errors="replace").strip())
    except BlockingIOError:
        return lines
    finally:
        os.close(fd)


def told_to_end() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def main(mount: Path, number: int) -> None:
    client = Client(mount, number)
    is_new = False
    while not told_to_end():
        try:
            if is_new or not client.nr_checks:
                client.begin()
                client.check()
                is_new = False
            client.step()
        except OSError as error:
            if error.errno not in _DEAD:
                raise
            is_new = True
            time.sleep(0.02)
    print(json.dumps({"nr_done": client.nr_done, "nr_checks": client.nr_checks, "lost": client.lost}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
