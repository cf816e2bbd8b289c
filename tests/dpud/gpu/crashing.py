# SPDX-License-Identifier: GPL-2.0-only
"""Two real processes, a socket between them, pages in files; either can be killed with SIGKILL at any step.

A step is: an entry into the journal (before and after it), a frame about to be sent, a batch of pages written.
"""

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpud.gpu.clock import RealClock
from dpud.gpu.migration.channel import Channel, Connecting, Listening, SocketChannel
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.encoding import new_codec
from dpud.gpu.migration.engine import Migration, Settings
from dpud.gpu.migration.file_pages import FileSink, FileSinks, FileSource
from dpud.gpu.migration.journal import Journal
from dpud.gpu.migration.pages import Area, Manifest
from dpud.gpu.migration.receiver import Receiver
from dpud.gpu.migration.recovery import doubtful, recover_receiver
from dpud.gpu.migration.remote_target import RemoteTarget
from dpud.gpu.migration.state import Progress
from dpud.gpu.migration.wire import Kind
from kernelsim.operation import Operation, complete

AREAS = [Area(3 * 4096, 4096, name="small"), Area(40 * 2048, 2048, name="large")]
MANIFEST = Manifest("c", AREAS)
NR_WRITES = 12


class Bomb:
    """Kills the process at a step; says which one it was."""

    def __init__(self, at: int | None, log: Path) -> None:
        self._at, self._log, self._nr = at, log, 0

    def tick(self, step: str) -> None:
        with self._log.open("a") as file:
            file.write(step + "\n")
        if self._nr == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._nr += 1

    def arm(self) -> None:
        """From now on, in this process."""
        append, send, write = Journal.append, SocketChannel.send, FileSink.write

        def bomb_append(journal: Journal, id: str, step: str, **more: Any) -> None:
            self.tick(f"before {step}")
            append(journal, id, step, **more)
            self.tick(f"after {step}")

        def bomb_send(channel: SocketChannel, kind: Kind, payload: bytes = b"") -> None:
            self.tick(f"send {kind.name}")
            send(channel, kind, payload)

        def bomb_write(sink: FileSink, *args: Any) -> None:
            write(sink, *args)
            self.tick("write")

        Journal.append, SocketChannel.send, FileSink.write = bomb_append, bomb_send, bomb_write  # type: ignore[method-assign]


@dataclass
class Place:
    """Where both sides have their things."""

    folder: Path
    strategy: Strategy

    def __post_init__(self) -> None:
        for side in ("a", "b"):
            (self.folder / side).mkdir(parents=True)
        source = FileSource(self.source_path, MANIFEST, create=True)
        rng = np.random.default_rng(4)
        for rows in source.rows:
            rows[:] = rng.integers(0, 255, rows.shape, dtype=np.uint8)
            rows[1] = 0

    @property
    def source_path(self) -> Path:
        return self.folder / "a" / "c.pages"

    @property
    def address(self) -> str:
        return f"unix:{self.folder / 'socket'}"

    def journal(self, side: str) -> Journal:
        return Journal(self.folder / side / "journal")

    def steps(self, side: str) -> list[str]:
        path = self.folder / f"{side}.steps"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def start(self, side: str, bomb_at: int | None = None) -> int:
        """A process of its own -> its pid."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        signal.alarm(60)
        try:
            Bomb(bomb_at, self.folder / f"{side}.steps").arm()
            {"a": self._run_source, "b": self._run_target}[side]()
            code = 0
        except BaseException:
            (self.folder / f"{side}.error").write_text(traceback.format_exc())
        finally:
            os._exit(code)

    # Within the processes.

    def _connect(self) -> Operation[Channel]:
        connecting = Connecting(self.address)
        yield connecting
        return connecting.channel()

    def _run_source(self) -> None:
        """What is in doubt is settled; then, unless the pages are gone, a migration begins."""
        journal = self.journal("a")
        for id, postcopy in doubtful(journal):
            complete(self._migration(id, journal).resume(postcopy))
        while not (last := list(journal.last().values())[-1:]) or last[0]["step"] != "released":
            wait_for(lambda: (self.folder / "socket").exists())
            migration = self._migration(f"m{os.getpid()}.{len(journal.records)}", journal)
            writer = _Writer(migration.source)
            for waitable in migration.run():
                writer.step()
                while waitable is not None and not waitable.wait(0.05):
                    pass

    def _migration(self, id: str, journal: Journal) -> Migration:
        source = _Kept(self.source_path, MANIFEST)
        settings = Settings(self.strategy, downtime_limit_ns=0, max_rounds=2, retry_ns=5_000_000)
        target = RemoteTarget("b", id, source, self._connect, new_codec("lz4"))
        return Migration(source, target, RealClock(), settings, Progress(id, "c", "b"), journal)

    def _run_target(self) -> None:
        sinks = FileSinks(self.folder / "b")
        receiver = Receiver(sinks, RealClock(), self.journal("b"))
        recover_receiver(receiver, sinks.reopen)
        (self.folder / "socket").unlink(missing_ok=True)
        listening = Listening(self.address)
        while True:
            if (channel := listening.accept()) is not None:
                complete(receiver.serve(channel))
            else:
                listening.wait(1.0)


class _Kept(FileSource):
    """Keeps what it had at the switch, for comparison."""

    def release(self) -> None:
        self.released = True


class _Writer:
    """Whose memory it is: writes now and then, as long as it may."""

    def __init__(self, source: Any) -> None:
        self._source, self._nr = source, 0

    def step(self) -> None:
        self._nr += 1
        if self._nr <= NR_WRITES and not self._source.held:
            self._source.put(1, (7 * self._nr) % 40, b"write %d" % self._nr)


def wait_for(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError("it does not come")
        time.sleep(0.002)


def ended(pid: int, timeout_s: float = 20.0) -> int:
    """Wait for a process -> its status."""
    status: list[int] = []

    def is_over() -> bool:
        found, code = os.waitpid(pid, os.WNOHANG)
        if found:
            status.append(code)
        return bool(found)

    wait_for(is_over, timeout_s)
    return status[0]
