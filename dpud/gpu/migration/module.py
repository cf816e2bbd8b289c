# SPDX-License-Identifier: MIT
"""Migration as one part of a GpuMemory: what is asked for, what is under way, and who may use a client meanwhile.

    migration = MigrationModule()
    migration.attach(memory)
    migration.migrate("client=train device=1")

In the daemon `worker` and `listener` run in the background; `pass_gate` is what a file's reader or writer goes through.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.regions import Region
from dpud.gpu.clock import Debt, ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.memory import GpuMemory
from dpud.gpu.migration.channel import Channel, Connecting, Listening, parse_address
from dpud.gpu.migration.client_pages import ClientSink, ClientSource, open_client
from dpud.gpu.migration.device_target import DeviceTarget, LocalSource
from dpud.gpu.migration.encoding import DEFAULT_CACHE_BYTES, new_codec
from dpud.gpu.migration.engine import Migration, Settings, Target
from dpud.gpu.migration.journal import Journal
from dpud.gpu.migration.pages import Manifest
from dpud.gpu.migration.receiver import Receiver, Session
from dpud.gpu.migration.recovery import doubtful, recover_receiver
from dpud.gpu.migration.remote_target import Connect, RemoteTarget
from dpud.gpu.migration.state import Progress, State
from dpud.gpu.swap.latency import Latencies
from kernelsim.operation import Operation, complete
from kernelsim.wait import WaitQueue

_MAX_FOLDERS = 64  # Path.mkdir calls itself for each
NR_HISTORY = 64
"""Shown of each direction."""


class _ClientSinks:
    """receiver.Sinks of a GpuMemory."""

    def __init__(self, memory: GpuMemory) -> None:
        self._memory = memory

    def open(self, manifest: Manifest) -> Operation[ClientSink]:
        return open_client(self._memory, manifest)


class RemoteArrival:
    """A regions.Arrival of post-copy between daemons."""

    def __init__(self, module: "MigrationModule", session: Session, area: int) -> None:
        self.session, self.area = session, area
        self._module = module

    def bring(self, first: int, nr_pages: int, whole: NDArray[np.bool_] | None) -> None:
        """Raises GpuError(EAGAIN): whoever can wait does so at the gate before."""
        pages = np.arange(first, first + nr_pages)
        if whole is not None:
            self._module.overwrite(self.session, self.area, pages[whole])
        if not self.session.missing[self.area][pages].any():
            return
        self._module.receiver.want(self.session, self.area, pages)
        raise GpuError(errno.EAGAIN, "the page is still on its way from another daemon")


class MigrationModule:
    """`new_id` gives names of migrations, which have to be unique among all daemons that talk to each other."""

    def __init__(
        self, new_waiters: Callable[[], WaitQueue] = WaitQueue, new_id: Callable[[], str] | None = None
    ) -> None:
        self.settings = Settings()
        self.compression = "lz4"
        self.cache_bytes = DEFAULT_CACHE_BYTES
        self.waiters, self.work, self.listen_changes = new_waiters(), new_waiters(), new_waiters()
        self.current: Migration | None = None
        self.history: list[Progress] = []
        self.listening: Listening | None = None
        self.on_arrival: Callable[[str], None] = lambda _client: None
        """Told of a client that has come, for who shows it."""
        self.local_waits = Latencies()
        self._ids = iter(range(1, 1 << 62))
        self._new_id = new_id or (lambda: f"m{next(self._ids)}")
        self._memory: GpuMemory | None = None

    @property
    def memory(self) -> GpuMemory:
        assert self._memory is not None, "not attached"
        return self._memory

    def attach(self, memory: GpuMemory) -> None:
        """Serve a GpuMemory."""
        self._memory = memory
        memory.migration = self
        self._journals = Journal(), Journal()
        self.receiver = Receiver(_ClientSinks(memory), memory.clock, self._journals[1], self.waiters)
        self.receiver.on_owned = self._owned
        self.receiver.on_done = self._done

    def use_journal(self, folder: Path | None) -> None:
        """Keep promises there, and look at those of an earlier daemon, whose memory is gone with it; None: in memory.

        Raises OSError, and keeps the journal there is: EBUSY while something is under way, EINVAL for a file that is
        no journal.
        """
        if self.is_busy or self.receiver.sessions:
            raise GpuError(errno.EBUSY, "a migration is under way")
        before, new = self._journals, _journals_in(folder)
        self._journals, self.receiver.journal = new, new[1]
        try:
            recover_receiver(self.receiver, None)
            promised = doubtful(new[0])
        except OSError:
            self._journals, self.receiver.journal = before, before[1]
            _close(new)
            raise
        _close(before)
        for id, _postcopy in promised:
            progress = Progress(id, "?", "?", why="promised, and then the daemon was ended: ask the target")
            for state in (State.SETUP, State.DEVICE, State.FAILING, State.FAILED):
                progress.to(state, self.memory.clock.now_ns())
            self.history.append(progress)

    @property
    def out_journal(self) -> Journal:
        """What this side has promised."""
        return self._journals[0]

    @property
    def journal_folder(self) -> str:
        path = self._journals[0].path
        return "" if path is None else str(path.parent)

    # Out.

    @property
    def is_busy(self) -> bool:
        return self.current is not None and not self.current.progress.is_over

    def start(self, text: str) -> Migration:
        """`client=NAME device=N` or `client=NAME to=ADDRESS`: enter it; the worker does it.

        Raises GpuError: EINVAL, ENOENT without such a client, ENODATA where it has no memory, EBUSY.
        """
        if self.is_busy:
            raise GpuError(errno.EBUSY, "a migration is under way")
        words = _words(text)
        client = words["client"]
        if client not in self.memory.clients:
            raise GpuError(errno.ENOENT, f"no client {client}")
        if any(pin.region.client == client for pin in self.memory.residency.pins):
            raise GpuError(errno.EBUSY, f"pages of {client} are pinned")
        if ("device" in words) == ("to" in words):
            raise GpuError(errno.EINVAL, "either device= or to=")
        id = self._new_id()
        source, target = self._parties(id, client, words)
        progress = Progress(id, client, target.name, begin_ns=self.memory.clock.now_ns())
        self.current = Migration(source, target, self.memory.clock, self.settings, progress, self._journals[0])
        self.history.append(progress)
        self.work.wake_up()
        return self.current

    def _parties(self, id: str, client: str, words: dict[str, str]) -> tuple[ClientSource, Target]:
        if "to" in words:
            return self.remote(id, client, words["to"], _connector(words["to"]))
        if not words["device"].isdecimal():
            raise GpuError(errno.EINVAL, f"device {words['device']!r}")
        source = LocalSource(self.memory, client, self.waiters)
        target = DeviceTarget(source, int(words["device"]))
        target.waits = self.local_waits
        return source, target

    def remote(self, id: str, client: str, name: str, connect: Connect) -> tuple[ClientSource, Target]:
        """For whoever has a connection of his own."""
        source = ClientSource(self.memory, client, self.waiters)
        return source, RemoteTarget(name, id, source, connect, new_codec(self.compression), self.cache_bytes)

    def migrate(self, text: str) -> Progress:
        """`start`, and do it, in the library. Raises GpuError as `start`; how it ended is in the result."""
        migration = self.start(text)
        complete(migration.run())
        return migration.progress

    def cancel(self) -> None:
        """Raises GpuError: ESRCH where there is none, EBUSY where it is too late."""
        if self.current is None or not self.is_busy:
            raise GpuError(errno.ESRCH, "no migration is under way")
        self.current.cancel()

    def worker(self) -> Operation[None]:
        """Does in the background what `start` enters."""
        while True:
            if self.current is not None and self.current.progress.state is State.NONE:
                yield from self.current.run()
            else:
                yield self.work

    # In.

    def listen(self, address: str) -> None:
        """Take migrations there; empty for nowhere. Raises GpuError(EINVAL), OSError."""
        listening = Listening(address) if address else None
        if self.listening is not None:
            self.listening.close()
        self.listening = listening
        self.listen_changes.wake_up()

    def listener(self) -> Operation[None]:
        """Serves in the background who comes, one after the other."""
        while True:
            if self.listening is None:
                yield self.listen_changes
            elif (channel := self.listening.accept()) is not None:
                yield from self.receiver.serve(channel)
            else:
                yield self.listening

    def _owned(self, session: Session) -> None:
        sink = session.sink
        assert isinstance(sink, ClientSink)
        if session.postcopy:
            for area, region in enumerate(sink.regions):
                region.arrival = RemoteArrival(self, session, area)
        self.on_arrival(session.manifest.client)
        self.waiters.wake_up()

    @staticmethod
    def _done(session: Session) -> None:
        assert isinstance(session.sink, ClientSink)
        for region in session.sink.regions:
            region.arrival = None

    def decide(self, text: str) -> None:
        """`ID own` or `ID drop`, of what was prepared and never handed over: its source is gone for good.

        Raises GpuError: EINVAL, ENOENT, EBUSY.
        """
        id, _, verdict = text.strip().partition(" ")
        session = self.receiver.sessions.get(id)
        if session is None:
            raise GpuError(errno.ENOENT, f"no migration {id} has come in")
        if session.channel is not None or (session.postcopy and verdict == "own"):
            raise GpuError(errno.EBUSY, "its source is there, or has pages that are not here")
        if verdict not in ("own", "drop"):
            raise GpuError(errno.EINVAL, f"{verdict!r} is neither own nor drop")
        (self.receiver.own if verdict == "own" else self.receiver.drop)(session)

    def overwrite(self, session: Session, area: int, pages: NDArray[np.int64]) -> None:
        """Pages need not come: all of them is written now."""
        sink = session.sink
        assert isinstance(sink, ClientSink)
        gone = pages[session.missing[area][pages]]
        self.receiver.overwritten(session, area, pages)
        sink.settle(area, gone)

    # The gate.

    def pass_gate(self, region: Region, pos: int, nr_bytes: int, write: bool) -> Operation[None]:
        """Returns when bytes of a region may be used. Raises GpuError(EBUSY) where it went to another daemon."""
        while region.held and not region.released:
            yield self.waiters
        if region.released:
            raise GpuError(errno.EBUSY, "it is in another daemon now")
        arrival = region.arrival
        if isinstance(arrival, RemoteArrival):
            first, end = pos >> region.page_shift, -(-(pos + nr_bytes) >> region.page_shift)
            pages = np.arange(first, min(end, region.nr_pages))
            if write:
                inner = (pages << region.page_shift >= pos) & (pages + 1 << region.page_shift <= pos + nr_bytes)
                pages = pages[~inner]
            yield from self.receiver.bring(arrival.session, arrival.area, pages)
        if write and self.current is not None and self.is_busy and self.current.progress.client == region.client:
            yield from self._brake(self.current)

    def _brake(self, migration: Migration) -> Operation[None]:
        source = migration.source
        if isinstance(source, ClientSource) and not isinstance(self.memory.clock, ManualClock):
            debt = Debt(source.brake.next_ns)
            if source.brake.pages_per_s and not debt.is_over:
                yield debt

    # What is shown.

    def all_progress(self) -> Iterator[Progress]:
        """Oldest first of those that went out, then of those that came in."""
        yield from self.history[-NR_HISTORY:]
        yield from self.receiver.history[-NR_HISTORY:]

    @property
    def last(self) -> Progress | None:
        """That which began last, out or in."""
        return max([*self.history[-1:], *self.receiver.history[-1:]], key=lambda each: each.begin_ns, default=None)

    def blocktime(self) -> dict[str, int]:
        """How long accesses waited for pages in post-copy. ns."""
        sessions = list(self.receiver.sessions.values())
        waits = [self.local_waits, *(session.waits for session in sessions)]
        return {
            "nr": sum(each.nr for each in waits),
            "p50": max(each.quantile(0.5) for each in waits),
            "p99": max(each.quantile(0.99) for each in waits),
            "max": max(each.max_ns for each in waits),
        }

    def stats(self) -> dict[str, int]:
        """Counters over all migrations there were."""
        known = list(self.history)
        came = self.receiver.history
        ended = {state: sum(each.state is state for each in known) for state in State}
        return {
            "started": len(known),
            "completed": ended[State.COMPLETED],
            "failed": ended[State.FAILED],
            "cancelled": ended[State.CANCELLED],
            "moved_bytes": sum(each.moved_bytes for each in known),
            "moved_pages": sum(each.moved_pages for each in known),
            "rounds": sum(each.rounds for each in known),
            "postcopy_requests": sum(each.postcopy_requests for each in known),
            "came": len(came),
            "came_completed": sum(each.state is State.COMPLETED for each in came),
            "came_bytes": sum(each.moved_bytes for each in came),
            "refused": self.receiver.nr_refused,
        }


def _journals_in(folder: Path | None) -> tuple[Journal, Journal]:
    """(of what goes out, of what comes in). Raises OSError."""
    if folder is None:
        return Journal(), Journal()
    if len(folder.parts) > _MAX_FOLDERS:
        raise GpuError(errno.ENAMETOOLONG, f"{len(folder.parts)} folders inside each other")
    folder.mkdir(parents=True, exist_ok=True)
    out = Journal(folder / "out.journal")
    try:
        return out, Journal(folder / "in.journal")
    except OSError:
        out.close()
        raise


def _close(journals: Iterable[Journal]) -> None:
    for journal in journals:
        journal.close()


def _words(text: str) -> dict[str, str]:
    """key=value words. Raises GpuError(EINVAL)."""
    words: dict[str, str] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals or not value or key in words or key not in ("client", "device", "to"):
            raise GpuError(errno.EINVAL, f"{word!r} is neither client=, device= nor to=, or is there twice")
        words[key] = value
    if "client" not in words:
        raise GpuError(errno.EINVAL, "client= is missing")
    return words


def _connector(address: str) -> Connect:
    """Raises GpuError(EINVAL) for what is no address."""
    parse_address(address)

    def connect() -> Operation[Channel]:
        connecting = Connecting(address)
        yield connecting
        return connecting.channel()

    return connect
