# SPDX-License-Identifier: MIT
"""The destination: takes what comes, believes nothing of it, and becomes the owner only when it has everything.

Theory of operation
    A session is one migration; it may outlive its connection. Each frame is allowed in some of its phases (_RULES) and
    nowhere else. What the frames say is checked against the manifest, and the manifest against what there is room for,
    before anything is done. The first thing that is wrong ends the connection. A session that owns nothing yet is then
    thrown away, unless it is `prepared`: its source may have promised it the pages, so it waits for the source to come
    back. Throwing it away is always safe: a source runs again once it hears `absent`.

    In the journal of this side:
        receiving   nothing is promised
        prepared    all pages are here, and their digest is known
        owner       ours, complete            running   ours, pages still missing (post-copy)
        got         of `running`: these are here now
        done        the last of `running` came
        abandoned
"""

import errno
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

import msgspec
import numpy as np

from dpud.gpu.clock import Clock
from dpud.gpu.errors import GpuError
from dpud.gpu.migration.channel import Channel, ConnectionLost, receive, send
from dpud.gpu.migration.encoding import decode_pages
from dpud.gpu.migration.hashes import PageHashes
from dpud.gpu.migration.journal import Journal
from dpud.gpu.migration.pages import Manifest, Mask, Pages, Sink, runs
from dpud.gpu.migration.remote_target import (
    MAX_WANTED,
    WANT,
    Hello,
    Welcome,
    missing_payloads,
    put_missing,
    refuse_payload,
)
from dpud.gpu.migration.state import Progress, State
from dpud.gpu.migration.wire import Frame, Kind, ProtocolError
from dpud.gpu.swap.latency import Latencies
from kernelsim.operation import Operation
from kernelsim.wait import WaitQueue

log = logging.getLogger("dpud.gpu.migration")


class Phase(Enum):
    RECEIVING = "receiving"
    PREPARED = "prepared"
    RUNNING = "running"
    OWNER = "owner"


class Sinks(Protocol):
    """Where sessions' pages are put."""

    def open(self, manifest: Manifest, /) -> Operation[Sink]:
        """Room for all of it. Raises OSError where there is none, or may not be."""
        ...


@dataclass(eq=False)
class Session:
    """One migration that comes in."""

    id: str
    manifest: Manifest
    sink: Sink
    progress: Progress
    phase: Phase = Phase.RECEIVING
    missing: list[Mask] = field(default_factory=list)
    channel: Channel | None = None
    postcopy: bool = False
    asked: set[tuple[int, int]] = field(default_factory=set)
    waits: Latencies = field(default_factory=Latencies)
    """ns that each access had to wait for pages in post-copy: QEMU's blocktime."""
    waited_ns: int = 0

    def __post_init__(self) -> None:
        self.hashes = PageHashes(self.manifest.areas)
        self.lost: list[Mask] = []
        """Pages that had no bytes when both sides compared them."""
        if not self.missing:
            self.missing = [np.zeros(area.nr_pages, dtype=np.bool_) for area in self.manifest.areas]

    @property
    def nr_missing(self) -> int:
        return sum(int(np.count_nonzero(mask)) for mask in self.missing)

    def to(self, phase: Phase, state: State, now_ns: int) -> None:
        self.phase = phase
        if self.progress.state is not state:
            self.progress.to(state, now_ns)


_RULES: dict[Kind, tuple[Phase, ...]] = {
    Kind.PAGES: (Phase.RECEIVING, Phase.RUNNING),
    Kind.ROUND: (Phase.RECEIVING,),
    Kind.MISSING: (Phase.RECEIVING,),
    Kind.FINAL: (Phase.RECEIVING,),
    Kind.COMMIT: (Phase.PREPARED,),
    Kind.ABORT: (Phase.RECEIVING, Phase.PREPARED),
    Kind.END: (Phase.RUNNING,),
}


class Receiver:
    """All sessions of one daemon. `arrivals` is woken when pages have come."""

    def __init__(self, sinks: Sinks, clock: Clock, journal: Journal, arrivals: WaitQueue | None = None) -> None:
        self.sinks, self.clock, self.journal = sinks, clock, journal
        self.arrivals = arrivals or WaitQueue()
        self.sessions: dict[str, Session] = {}
        self.history: list[Progress] = []
        self.nr_refused = 0
        self.on_owned: Callable[[Session], None] = lambda _session: None
        self.on_done: Callable[[Session], None] = lambda _session: None
        """The last page of post-copy has come."""
        self.before_step: Callable[[str], None] = lambda _step: None
        """Told what comes next: for tests, which end the process there."""

    def serve(self, channel: Channel) -> Operation[None]:
        """One connection, to its end. Never raises OSError: what was wrong is told to the other side, and logged."""
        try:
            session = yield from self._welcome(channel)
            if session is not None:
                yield from self._follow(session, channel)
        except ConnectionLost as error:
            log.warning("%s", error.strerror)
            self._broken(channel, error)
        except OSError as error:
            self.nr_refused += 1
            log.warning("refused: %s", error.strerror)
            self._broken(channel, error)
            self._say(channel, error)
        except Exception as error:  # a mistake of ours must not end whoever serves the next one
            log.exception("migration in")
            self._broken(channel, GpuError(errno.EIO, f"{type(error).__name__}: {error}"))
        except GeneratorExit:
            self._broken(channel, GpuError(errno.EINTR, "the daemon was ended"))
            raise
        finally:
            for each in self._of(channel):
                each.channel = None
            channel.close()

    def _of(self, channel: Channel) -> list[Session]:
        """The session that has this connection; none once another one has taken its place."""
        return [session for session in self.sessions.values() if session.channel is channel]

    @staticmethod
    def _say(channel: Channel, error: OSError) -> None:
        try:
            channel.send(Kind.REFUSE, refuse_payload(error))
        except ConnectionLost:
            log.info("the other side did not wait to hear it")

    # Who comes.

    def _welcome(self, channel: Channel) -> Operation[Session | None]:
        frame = yield from receive(channel)
        if frame.kind is not Kind.HELLO:
            raise ProtocolError(f"{frame.kind.name} before HELLO")
        try:
            hello = msgspec.json.decode(frame.payload, type=Hello)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ProtocolError(f"a strange hello: {error}") from error
        if hello.intent == "resume":
            return (yield from self._again(hello, channel))
        session = yield from self._new(hello)
        session.channel = channel
        yield from self._answer(channel, Welcome("new"))
        return session

    @staticmethod
    def _answer(channel: Channel, welcome: Welcome) -> Operation[None]:
        yield from send(channel, Kind.WELCOME, msgspec.json.encode(welcome))

    def _new(self, hello: Hello) -> Operation[Session]:
        if hello.manifest is None:
            raise ProtocolError("nothing is to come")
        for area in hello.manifest.areas:
            if any(not 0 <= first < end <= area.nr_pages or not 0 <= bits < 8 for first, end, bits in area.permissions):
                raise ProtocolError("permissions for pages that are not there")
        if hello.id in self.sessions:
            raise GpuError(errno.EEXIST, f"migration {hello.id} is here already")
        self._forget_doubtful(hello.manifest.client)
        self.before_step("open")
        sink = yield from self._open(hello.id, hello.manifest)
        progress = Progress(hello.id, hello.manifest.client, "here", hello.manifest.nr_bytes)
        progress.begin_ns = self.clock.now_ns()
        progress.to(State.SETUP, progress.begin_ns)
        progress.to(State.ACTIVE, progress.begin_ns)
        self.history.append(progress)
        session = self.sessions[hello.id] = Session(hello.id, hello.manifest, sink, progress)
        return session

    def _open(self, id: str, manifest: Manifest) -> Operation[Sink]:
        """Entered before there is anything, so that nothing stays that nobody knows of."""
        self.journal.append(id, "receiving", manifest=msgspec.to_builtins(manifest))
        try:
            return (yield from self.sinks.open(manifest))
        except OSError as error:
            self.journal.append(id, "abandoned", why=str(error.strerror))
            raise

    def _forget_doubtful(self, client: str) -> None:
        """A source that begins anew does not want what it once sent."""
        for session in list(self.sessions.values()):
            if session.manifest.client == client and session.phase is Phase.PREPARED and session.channel is None:
                self._abandon(session, "its source has begun anew")

    def _again(self, hello: Hello, channel: Channel) -> Operation[Session | None]:
        """A source that was cut off asks what there is."""
        session = self.sessions.get(hello.id)
        if session is None or session.phase is Phase.RECEIVING:
            yield from self._answer(channel, Welcome("absent"))
            return None
        if session.channel is not None and session.channel is not channel:
            session.channel.close()
        session.channel = channel
        if session.phase is Phase.PREPARED:
            yield from self._answer(channel, Welcome("prepared", session.progress.digest))
            return session
        if session.phase is Phase.OWNER:
            yield from self._answer(channel, Welcome("owner"))
            return None
        yield from self._answer(channel, Welcome("running"))
        session.asked.clear()
        for payload in missing_payloads(session.missing):
            yield from send(channel, Kind.MISSING, payload)
        yield from send(channel, Kind.ARRIVED)
        if session.progress.state is State.POSTCOPY_PAUSED:
            session.progress.to(State.POSTCOPY_RECOVER, self.clock.now_ns())
            session.progress.to(State.POSTCOPY_ACTIVE, self.clock.now_ns())
        return session

    # What comes.

    def _follow(self, session: Session, channel: Channel) -> Operation[None]:
        while session.id in self.sessions and session.phase is not Phase.OWNER:
            frame = yield from receive(channel)
            if session.phase not in _RULES.get(frame.kind, ()):
                raise ProtocolError(f"{frame.kind.name} while {session.phase.value}")
            yield from self._do[frame.kind](self, session, channel, frame)

    def _pages(self, session: Session, channel: Channel, frame: Frame) -> Operation[None]:
        area, pages, rows, lost = decode_pages(frame.payload, session.manifest.areas, session.sink)
        times = 2 if session.phase is Phase.RECEIVING else 1  # written, and then read to be hashed
        yield from session.sink.admission(area, times * len(pages))
        if session.channel is not channel:
            raise ConnectionLost("its source came back meanwhile")
        if session.phase is Phase.RUNNING:
            wanted = session.missing[area][pages]
            pages, rows, lost = pages[wanted], rows[wanted], lost[wanted]
        self.before_step("write")
        if len(pages):
            session.sink.write(area, pages, rows, lost)
        if session.phase is Phase.RECEIVING:
            session.hashes.put(area, pages, *session.sink.read(area, pages))  # as they are now where they will stay
        session.progress.moved_bytes += len(frame.payload)
        session.progress.moved_pages += len(pages)
        if session.phase is Phase.RUNNING and len(pages):
            self._arrived(session, area, pages)
        yield None

    def _arrived(self, session: Session, area: int, pages: Pages) -> None:
        self.before_step("got")
        self._note(session, "got", area=area, runs=list(runs(pages)))
        session.missing[area][pages] = False
        session.progress.remaining_bytes = sum(
            int(np.count_nonzero(mask)) * each.page_bytes
            for mask, each in zip(session.missing, session.manifest.areas, strict=True)
        )
        self.arrivals.wake_up()

    def _round(self, session: Session, channel: Channel, frame: Frame) -> Operation[None]:
        if frame.payload != struct.pack("<I", session.progress.rounds):
            raise ProtocolError("rounds out of order")
        session.progress.rounds += 1
        yield from send(channel, Kind.ARRIVED, frame.payload)

    def _missing(self, session: Session, channel: Channel, frame: Frame) -> Operation[None]:
        put_missing(frame.payload, session.manifest.areas, session.missing)
        session.postcopy = True
        yield None

    def _final(self, session: Session, channel: Channel, frame: Frame) -> Operation[None]:
        """Everything is to be here by now."""
        session.lost = [session.sink.lost(area) for area in range(len(session.manifest.areas))]
        for area, lost in enumerate(session.lost):
            session.hashes.lose(area, lost)
        digest = session.hashes.digest(session.missing if session.postcopy else None)
        session.progress.digest = digest.hex()
        self.before_step("prepare")
        postcopy = [payload.hex() for payload in missing_payloads(session.missing)] if session.postcopy else None
        self._note(session, "prepared", digest=digest.hex(), missing=postcopy)
        session.to(Phase.PREPARED, State.DEVICE, self.clock.now_ns())
        self.before_step("prepared")
        yield from send(channel, Kind.PREPARED, digest)

    def _commit(self, session: Session, channel: Channel, frame: Frame) -> Operation[None]:
        if frame.payload.hex() != session.progress.digest:
            raise GpuError(errno.EIO, f"the digest is {frame.payload.hex()} there, {session.progress.digest} here")
        for area, lost in enumerate(session.lost):
            if (session.sink.lost(area) & ~lost).any():
                self._abandon(session, "pages were lost before they were taken over")
                raise GpuError(errno.EIO, session.progress.why)
        self.before_step("own")
        self.own(session)
        self.before_step("owned")
        yield from send(channel, Kind.OWNED)

    def own(self, session: Session) -> None:
        """Become the owner of a prepared session. Raises GpuError(EBUSY) for one that is not prepared."""
        if session.phase is not Phase.PREPARED:
            raise GpuError(errno.EBUSY, f"migration {session.id} is {session.phase.value}")
        if session.postcopy:
            for area, mask in enumerate(session.missing):
                session.sink.expect(area, mask)
        self._note(session, "running" if session.postcopy else "owner")
        now_ns = self.clock.now_ns()
        if session.postcopy:
            session.to(Phase.RUNNING, State.POSTCOPY_ACTIVE, now_ns)
        else:
            session.to(Phase.OWNER, State.COMPLETED, now_ns)
        session.sink.own()
        self.on_owned(session)

    def _end(self, session: Session, channel: Channel, frame: Frame) -> Operation[None]:
        if session.nr_missing:
            raise ProtocolError(f"{session.nr_missing} pages did not come")
        self.before_step("done")
        self._note(session, "done")
        session.to(Phase.OWNER, State.COMPLETED, self.clock.now_ns())
        self.on_done(session)
        self.arrivals.wake_up()
        yield from send(channel, Kind.DONE)

    def _abort(self, session: Session, channel: Channel, frame: Frame) -> Operation[None]:
        self._abandon(session, frame.payload.decode("utf-8", "replace"))
        yield None

    # Post-copy: what somebody waits for.

    def want(self, session: Session, area: int, pages: Pages) -> None:
        """Ask for pages that somebody waits for, once."""
        pages = pages[session.missing[area][pages]]
        fresh = np.array([page for page in pages.tolist() if (area, page) not in session.asked], dtype=np.int64)
        if session.channel is None or not len(fresh):
            return
        session.asked.update((area, page) for page in fresh.tolist())
        session.progress.postcopy_requests += 1
        for first, nr in runs(fresh):
            for at in range(first, first + nr, MAX_WANTED):
                try:
                    session.channel.send(Kind.WANT, WANT.pack(area, at, min(MAX_WANTED, first + nr - at)))
                except ConnectionLost as error:
                    log.warning("%s: %s", session.id, error.strerror)
                    return

    def bring(self, session: Session, area: int, pages: Pages) -> Operation[None]:
        """Returns when these pages are here; how long that took is counted."""
        if not session.missing[area][pages].any():
            return
        begin_ns = self.clock.now_ns()
        while session.missing[area][pages].any():
            self.want(session, area, pages)
            if session.channel is not None:
                yield session.channel.flushed()
            if session.missing[area][pages].any():
                yield self.arrivals
        ns = self.clock.now_ns() - begin_ns
        session.waits.add(ns)
        session.waited_ns += ns

    def overwritten(self, session: Session, area: int, pages: Pages) -> None:
        """Pages that are to come no more: all of them was written to."""
        gone = pages[session.missing[area][pages]]
        if len(gone):
            self._note(session, "got", area=area, runs=list(runs(gone)))
            session.missing[area][gone] = False

    # What ends.

    def _broken(self, channel: Channel, error: OSError) -> None:
        """The connection has ended before its time."""
        for session in self._of(channel):
            if session.phase is Phase.RECEIVING:
                self._abandon(session, str(error.strerror))
            elif session.phase is Phase.RUNNING and session.progress.state is State.POSTCOPY_ACTIVE:
                session.progress.why = str(error.strerror)
                session.progress.to(State.POSTCOPY_PAUSED, self.clock.now_ns())

    def drop(self, session: Session) -> None:
        """Throw a prepared one away: a source that comes back hears so, and goes on. Raises GpuError(EBUSY)."""
        if session.phase is not Phase.PREPARED:
            raise GpuError(errno.EBUSY, f"migration {session.id} is {session.phase.value}")
        self._abandon(session, "dropped")

    def _abandon(self, session: Session, why: str) -> None:
        """Nothing of it stays."""
        del self.sessions[session.id]
        session.sink.abandon()
        self._note(session, "abandoned", why=why)
        session.progress.why = why
        session.progress.to(State.FAILING, self.clock.now_ns())
        session.progress.to(State.FAILED, self.clock.now_ns())

    def _note(self, session: Session, step: str, **more: object) -> None:
        self.journal.append(session.id, step, **more)

    _do: ClassVar[dict[Kind, Callable[["Receiver", Session, Channel, Frame], Operation[None]]]] = {
        Kind.PAGES: _pages,
        Kind.ROUND: _round,
        Kind.MISSING: _missing,
        Kind.FINAL: _final,
        Kind.COMMIT: _commit,
        Kind.ABORT: _abort,
        Kind.END: _end,
    }
