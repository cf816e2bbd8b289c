# SPDX-License-Identifier: GPL-2.0-only
"""A batch of inputs in a process of its own: its death, whatever kills it, is a finding like any other.

What a child is doing stands in memory that it shares with its parent, who also sees to it that a child that is stuck in
compiled code does not stay so for ever.
"""

import faulthandler
import gc
import mmap
import os
import pickle
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dpud import namespace, startup
from dpud.fuzz.live import Batch, Crash, live, shrink
from dpud.fuzz.sandbox import confine
from dpud.fuzz.target import Target, kind_of

STUCK_S = 20.0
"""CPU time of one input after which its process is killed: its own watch has come to nothing."""
ADDRESS_SPACE_BYTES = 8 << 30
"""More than the process has to begin with: an input that asks for more gets MemoryError."""
_HEAD = struct.Struct("<QQ")
_INPUT_BYTES = 1 << 17

Driver = Callable[["Child"], Batch]
"""Gives a child's inputs: `drawn`, or coverage.explore, which ends the process itself (`Child.finish`)."""


def drawn(child: "Child") -> Batch:
    """Those that its target draws."""
    return live(child.target, child.seed, child.nr, child.box.put)


class Box:
    """The input that a child is at."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _HEAD.size + _INPUT_BYTES)

    def put(self, number: int, data: bytes) -> None:
        data = data[:_INPUT_BYTES]
        self._map[: _HEAD.size] = _HEAD.pack(number, len(data))
        self._map[_HEAD.size : _HEAD.size + len(data)] = data

    def get(self) -> tuple[int, bytes]:
        number, length = _HEAD.unpack_from(self._map)
        return number, self._map[_HEAD.size : _HEAD.size + length]


class Child:
    """One batch under way."""

    def __init__(self, target: Target, seed: int, nr: int, driver: Driver = drawn) -> None:
        self.target, self.seed, self.nr = target, seed, nr
        self.box = Box()
        self.box.put(0, b"")
        self._seen = 0, 0.0
        self._pieces: list[bytes] = []
        self._stuck = False
        self._folder = tempfile.TemporaryDirectory(prefix="dpud-fuzz-", dir=_memory(), ignore_cleanup_errors=True)
        startup.find_stored()
        self.fd, writer = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(parent, writer, driver)
        os.close(writer)

    def _be(self, parent: int, writer: int, driver: Driver) -> NoReturn:
        """The child."""
        code = 1
        self.writer = writer
        try:
            os.close(self.fd)
            namespace.die_with_parent(parent, signal.SIGKILL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._settle()
            self.finish(driver(self))
            code = 0
        except BaseException as problem:  # of ours: a corpus that cannot be made
            self._tell(self._broken(problem))
        finally:
            os._exit(code)

    def _broken(self, problem: BaseException) -> Batch:
        text = "".join(traceback.format_exception(problem))
        crash = Crash(self.target.name, self.seed, 0, f"the fuzzer itself: {kind_of(problem)}", text)
        return Batch(self.target.name, self.seed, crash=crash)

    def _settle(self) -> None:
        faulthandler.disable()  # the parent tells
        os.chdir(self._folder.name)
        tempfile.tempdir = self._folder.name
        confine(self._folder.name)
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        begin = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        wanted = begin + ADDRESS_SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most < 0 else min(wanted, most), most))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        gc.freeze()

    def finish(self, batch: Batch) -> None:
        """Tell the parent."""
        if batch.crash is not None:
            shrink(self.target, batch.crash)
        self._tell(batch)

    def _tell(self, batch: Batch) -> None:
        with open(self.writer, "wb") as file:
            pickle.dump(batch, file)

    # The parent's side.

    def look(self) -> bool:
        """Take what it says -> whether it has ended. To be called when `fd` can be read, and now and then."""
        while select.select([self.fd], [], [], 0)[0]:
            piece = os.read(self.fd, 1 << 16)
            if not piece:
                return True
            self._pieces.append(piece)
        number, _ = self.box.get()
        cpu_s = _cpu_s(self.pid)
        if number != self._seen[0]:
            self._seen = number, cpu_s
        elif cpu_s - self._seen[1] > STUCK_S and not self._pieces:
            self._stuck = True
            os.kill(self.pid, signal.SIGKILL)
        return False

    def end(self) -> Batch:
        """What came of it."""
        os.close(self.fd)
        _, status, used = os.wait4(self.pid, 0)
        said = b"".join(self._pieces)
        batch: Batch = pickle.loads(said) if said else self._died(status)
        batch.peak_bytes = used.ru_maxrss << 10
        self._folder.cleanup()
        return batch

    def _died(self, status: int) -> Batch:
        """Without a word."""
        number, data = self.box.get()
        how = "is stuck" if self._stuck else _how(status)
        text = f"the process {how} at input {number}: {data[:200]!r}"
        inputs = [] if self.target.life else [data]
        crash = Crash(self.target.name, self.seed, number, f"the process {how}", text, inputs, self.seed)
        return Batch(self.target.name, self.seed, number, crash=crash)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.wait4(self.pid, 0)
        os.close(self.fd)
        self._folder.cleanup()


def _memory() -> str | None:
    """A folder that is no disk, where there is one: most inputs are files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exits with {code}"


def _cpu_s(pid: int) -> float:
    """User and system time: fields 14 and 15 of proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_one(target: Target, seed: int, nr: int, driver: Driver = drawn) -> Batch:
    """One batch, to its end."""
    sys.stdout.flush()
    child = Child(target, seed, nr, driver)
    while not child.look():
        time.sleep(0.01)
    return child.end()
