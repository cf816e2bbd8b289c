# SPDX-License-Identifier: MIT
"""Two agents that move a real process's memory: one beside the process that has it, one beside the one that gets it."""

import errno
import select
from collections.abc import Callable

from dpud.gpu.clock import RealClock
from dpud.gpu.errors import GpuError
from dpud.gpu.migration.channel import SocketChannel
from dpud.gpu.migration.encoding import DEFAULT_CACHE_BYTES, new_codec
from dpud.gpu.migration.engine import Migration, Settings
from dpud.gpu.migration.journal import Journal
from dpud.gpu.migration.pages import Manifest, Pages
from dpud.gpu.migration.process_pages import Lent, ProcessSink, ProcessSource
from dpud.gpu.migration.receiver import Receiver, Session
from dpud.gpu.migration.remote_target import Connect, RemoteTarget
from dpud.gpu.migration.state import Progress
from kernelsim.operation import Operation, complete

_POLL_S = 0.05


def send_process(
    lent: Lent,
    connect: Connect,
    settings: Settings,
    *,
    compression: str = "lz4",
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    journal: Journal | None = None,
    id: str = "process",
) -> Progress:
    """Migrate what a process has lent; it is stopped from the switch on. How it ended is in the result."""
    source = ProcessSource(lent)
    try:
        target = RemoteTarget("process", id, source, connect, new_codec(compression), cache_bytes)
        progress = Progress(id, source.manifest.client, target.name)
        migration = Migration(source, target, RealClock(), settings, progress, journal or Journal())
        complete(migration.run())
        return progress
    finally:
        source.close()


class _OneProcess:
    """receiver.Sinks: there is one, and it is this."""

    def __init__(self, sink: ProcessSink) -> None:
        self._sink: ProcessSink | None = sink

    def open(self, manifest: Manifest) -> Operation[ProcessSink]:
        """Raises GpuError: EINVAL for another size, EBUSY for a second one."""
        yield None
        sink = self._sink
        if sink is None:
            raise GpuError(errno.EBUSY, "the process has its memory already")
        if [area.nr_bytes for area in manifest.areas] != [sink.lent.nr_bytes]:
            raise GpuError(errno.EINVAL, f"the process has lent {sink.lent.nr_bytes} bytes")
        self._sink = None
        return sink


class ProcessReceiver:
    """Fills what a process has lent."""

    def __init__(self, sink: ProcessSink, journal: Journal | None = None) -> None:
        self.sink = sink
        self.clock = RealClock()
        self.receiver = Receiver(_OneProcess(sink), self.clock, journal or Journal())
        self.receiver.on_owned = self._owned
        self.on_owned: Callable[[], None] = lambda: None
        self._session: Session | None = None
        self._waiting: dict[int, int] = {}

    def _owned(self, session: Session) -> None:
        self._session = session
        self.on_owned()

    def serve(self, channel: SocketChannel) -> Session | None:
        """One connection -> the session that is ours now, if any."""
        for waitable in self.receiver.serve(channel):
            self._look()
            while waitable is not None and not waitable.wait(0):
                self._sleep(channel)
                self._look()
        return self._session

    def _sleep(self, channel: SocketChannel) -> None:
        sockets = [channel.sock.fileno()] if channel.sock.fileno() >= 0 else []
        select.select([*sockets, self.sink.lent.fd], sockets if channel.nr_queued_bytes else [], [], _POLL_S)

    def _look(self) -> None:
        """Ask for what the process waits for, and note what has come of it."""
        session = self._session
        if session is None or not session.postcopy:
            return
        now_ns = self.clock.now_ns()
        pages: Pages = self.sink.faults()
        if len(pages):
            self._waiting.update(dict.fromkeys(pages.tolist(), now_ns))
            self.receiver.want(session, 0, pages)
        for page, since_ns in list(self._waiting.items()):
            if not session.missing[0][page]:
                session.waits.add(now_ns - since_ns)
                session.waited_ns += now_ns - since_ns
                del self._waiting[page]
