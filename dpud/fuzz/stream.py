# SPDX-License-Identifier: GPL-2.0-only
"""What comes over the connection of a migration, from either side, from somebody who means harm.

The first byte of an input says whether it is bytes as they come, or frames, each a kind and a payload, which get good
numbers and checksums then. One input is one connection.
"""

import gc
from collections.abc import Iterator
from random import Random

import numpy as np

from dpud.fuzz.binaries import BETWEEN, RAW, SIGNED
from dpud.fuzz.mutate import Mutator
from dpud.gpu.check import violations
from dpud.gpu.memory import GpuMemory
from dpud.gpu.migration import MigrationModule
from dpud.gpu.migration.channel import Channel, ConnectionLost, Pipe
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.engine import Migration
from dpud.gpu.migration.receiver import Receiver
from dpud.gpu.migration.state import Progress
from dpud.gpu.migration.wire import HEADER_BYTES, MAX_PAYLOAD_BYTES, FrameWriter, Kind
from dpud.gpu.system import GpuConfig, build
from kernelsim.operation import Operation

_MIB = 1 << 20
_MOST_SLICES = 400
_CLIENT = "c"


def _small() -> GpuMemory:
    return build(GpuConfig(1, 8 * _MIB, 8 * _MIB, _MIB))


def _migration(memory: GpuMemory) -> MigrationModule:
    assert isinstance(memory.migration, MigrationModule)
    return memory.migration


def _filled(memory: GpuMemory) -> None:
    """A client with some pages of noise, some of zeros and some that were never written."""
    rng = np.random.default_rng(5)
    va = memory.allocate(_CLIENT, 24 << 10, page_size=4096)
    memory.write(_CLIENT, va, rng.bytes(9000))
    memory.write(_CLIENT, va + 12288, bytes(4096))


def _started(memory: GpuMemory, connect: "Peer | Recorder", strategy: Strategy) -> Migration:
    module = _migration(memory)
    module.settings.strategy, module.compression = strategy, "none"
    id = module._new_id()
    source, target = module.remote(id, _CLIENT, "there", connect.connect)
    return Migration(source, target, memory.clock, module.settings, Progress(id, _CLIENT, "there"), module.out_journal)


class Recorder:
    """Takes a migration down that goes well, frame by frame in both directions."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.serving: list[Operation[None]] = []
        self.out: list[bytes] = []
        self.back: list[bytes] = []

    def connect(self) -> Operation[Channel]:
        yield None
        ours, theirs = Pipe.pair()
        for pipe, frames in ((ours, self.out), (theirs, self.back)):
            pipe.send_bytes = _noting(pipe, frames)  # type: ignore[method-assign]
        self.serving.append(self._receiver.serve(theirs))
        return ours


def _noting(pipe: Pipe, frames: list[bytes]):  # type: ignore[no-untyped-def]
    plain = pipe.send_bytes

    def send_bytes(data: bytes) -> None:
        frames.append(data)
        plain(data)

    return send_bytes


def recorded(strategy: Strategy) -> tuple[list[bytes], list[bytes]]:
    """(frames that went out, frames that came back)."""
    here, there = _small(), _small()
    _filled(here)
    recorder = Recorder(_migration(there).receiver)
    running = _started(here, recorder, strategy).run()
    while True:
        for serving in recorder.serving:
            next(serving, None)
        try:
            next(running)
        except StopIteration:
            return recorder.out, recorder.back


def _as_input(frames: list[bytes]) -> bytes:
    return SIGNED + BETWEEN.join(frame[6:7] + frame[HEADER_BYTES:] for frame in frames)


def _frames(data: bytes) -> Iterator[bytes]:
    """An input, as it goes over the connection."""
    if data[:1] == RAW:
        yield data[1:]
        return
    writer = FrameWriter()
    kinds = {kind.value: kind for kind in Kind}
    for part in data[1:].split(BETWEEN):
        kind = kinds.get(part[0]) if part else None
        if kind is not None:
            yield writer.frame(kind, part[1 : 1 + MAX_PAYLOAD_BYTES])


def _mutator(which: int) -> Mutator:
    seeds = []
    for strategy in (Strategy.PRECOPY, Strategy.HYBRID, Strategy.STOP_AND_COPY):
        frames = recorded(strategy)[which]
        seeds += [_as_input(frames), RAW + b"".join(frames)]
    words = [BETWEEN, BETWEEN + bytes([Kind.PAGES]), *(bytes([kind]) for kind in Kind)]
    words += [
        b'"nr_bytes":',
        b'"areas":[',
        b'{"id":"x","intent":"resume"}',
        b"\\n",
        b"[" * 3000,
        b"\xff\xff\xff\xff",
        b"c\\n",
    ]
    words += [
        b'{"status":"running"}',
        b'{"status":"owner"}',
        b'{"status":"prepared","digest":""}',
        b'{"status":"absent"}',
    ]
    return Mutator(seeds, words)


class Incoming:
    """The World of a destination: it must have everything in the end, or nothing."""

    def __init__(self, _seed: int) -> None:
        self._mutator = _mutator(0)
        self._begin()

    def _begin(self) -> None:
        self._memory = _small()
        gc.collect()  # the one before hangs in cycles, and the collector does not see how large it is
        self._receiver = _migration(self._memory).receiver

    def draw(self, chance: Random) -> bytes:
        return self._mutator.draw(chance)

    def run(self, data: bytes) -> str:
        ours, theirs = Pipe.pair()
        serving = self._receiver.serve(theirs)
        refused = self._receiver.nr_refused
        ended = _advance(serving)
        for frame in _frames(data):
            if ended:
                break
            ours.send_bytes(frame)
            ended = _advance(serving)
        ours.close()
        ended = ended or _advance(serving)
        assert ended, "it goes on without a connection"
        outcome = "refused" if self._receiver.nr_refused > refused else "lost"
        if self._receiver.sessions or self._memory.clients:
            outcome = ",".join(sorted(session.phase.value for session in self._receiver.sessions.values())) or "client"
            self.check()
            self._begin()
        return outcome

    def check(self) -> Iterator[None]:
        violated = violations(self._memory)
        assert not violated, violated[:3]
        yield
        if not self._receiver.sessions and not self._memory.clients:
            for location in self._memory.locations:
                assert location.frames.nr_free == location.frames.nr_frames, "pages of nobody"

    def close(self) -> None:
        pass


class Peer:
    """A destination that says what an input says, whatever it is told: a frame each time that it is asked."""

    def __init__(self, frames: Iterator[bytes]) -> None:
        self._frames = frames

    def connect(self) -> Operation[Channel]:
        yield None
        first = next(self._frames, None)
        if first is None:
            raise ConnectionLost("nobody listens")
        ours, theirs = Pipe.pair()
        plain = ours.receive
        theirs.send_bytes(first)

        def receive():  # type: ignore[no-untyped-def]
            frame = plain()
            if frame is None and (more := next(self._frames, None)) is not None:
                theirs.send_bytes(more)
                frame = plain()
            if frame is None:
                theirs.close()
            return frame

        ours.receive = receive  # type: ignore[method-assign]
        return ours


class Outgoing:
    """The World of a source: until it was told that another one is the owner, it has its client."""

    def __init__(self, _seed: int) -> None:
        self._mutator = _mutator(1)
        self._begin()

    def _begin(self) -> None:
        self._memory = _small()
        gc.collect()  # the one before hangs in cycles, and the collector does not see how large it is
        _filled(self._memory)
        self._bytes = self._read()

    def _read(self) -> list[bytes]:
        return [self._memory.read(_CLIENT, each.va, each.nr_bytes) for each in self._memory.clients[_CLIENT].regions]

    def draw(self, chance: Random) -> bytes:
        return self._mutator.draw(chance)

    def run(self, data: bytes) -> str:
        strategy = tuple(Strategy)[len(data) % len(Strategy)]
        migration = _started(self._memory, Peer(_frames(data)), strategy)
        running = migration.run()
        if not _advance(running):
            running.close()
        state = str(migration.progress.state)
        assert migration.progress.is_over, state
        held = any(region.held for region in self._memory.clients[_CLIENT].regions)
        if state == "completed" or held:
            self.check()
            self._begin()
            return f"{state}, held" if held else state
        return state

    def check(self) -> Iterator[None]:
        violated = violations(self._memory)
        assert not violated, violated[:3]
        yield
        regions = self._memory.clients[_CLIENT].regions
        assert not regions or any(region.held for region in regions) or self._read() == self._bytes

    def close(self) -> None:
        pass


def _advance(operation: Operation[None]) -> bool:
    """As far as it goes without hearing anything new -> whether it has ended."""
    for _ in range(_MOST_SLICES):
        try:
            next(operation)
        except StopIteration:
            return True
    return False
