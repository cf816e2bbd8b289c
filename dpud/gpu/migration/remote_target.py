# SPDX-License-Identifier: MIT
"""The target that is another daemon, or another process: what the engine says, in frames."""

import errno
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Literal

import msgspec
import numpy as np

from dpud.gpu.blob import PageCodec
from dpud.gpu.errors import GpuError
from dpud.gpu.migration.channel import Channel, ConnectionLost, receive, send
from dpud.gpu.migration.encoding import DEFAULT_CACHE_BYTES, PageEncoder
from dpud.gpu.migration.hashes import PageHashes
from dpud.gpu.migration.pages import Area, Manifest, Mask, Pages, Source
from dpud.gpu.migration.wire import Frame, Kind, ProtocolError
from kernelsim.operation import Operation

Connect = Callable[[], Operation[Channel]]

ID_PATTERN = r"^[A-Za-z0-9_.-]{1,40}\Z"


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source's first word."""

    id: Annotated[str, msgspec.Meta(pattern=ID_PATTERN)]
    intent: Literal["new", "resume"]
    manifest: Manifest | None = None


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The destination's. `new`: let it come; the rest is what it has of one to be resumed."""

    status: Literal["new", "absent", "prepared", "owner", "running"]
    digest: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z")] = ""
    """Of what is prepared."""


MISSING_HEAD = struct.Struct("<HI")
"""Area, first page (a multiple of 8); a bit for each page from there on follows, lowest first."""
WANT = struct.Struct("<HII")
"""Area, first page, number of pages."""
_MISSING_BYTES = 1 << 20
MAX_WANTED = 512


def missing_payloads(missing: list[Mask]) -> list[bytes]:
    """The masks as they go over."""
    payloads = []
    for area, mask in enumerate(missing):
        bits = np.packbits(mask, bitorder="little").tobytes()
        for at in range(0, len(bits), _MISSING_BYTES):
            payloads.append(MISSING_HEAD.pack(area, at * 8) + bits[at : at + _MISSING_BYTES])
    return payloads


def put_missing(payload: bytes, areas: list[Area], missing: list[Mask]) -> None:
    """One of them, into masks. Raises ProtocolError."""
    if len(payload) <= MISSING_HEAD.size:
        raise ProtocolError("pages missing of nothing")
    area, first = MISSING_HEAD.unpack_from(payload)
    if area >= len(areas) or first % 8 or first >= areas[area].nr_pages:
        raise ProtocolError(f"pages missing from {first} of area {area}")
    bits = np.unpackbits(np.frombuffer(payload, np.uint8, -1, MISSING_HEAD.size), bitorder="little")
    room = areas[area].nr_pages - first
    if bits[room:].any() or len(bits) - 8 >= room + 8:
        raise ProtocolError(f"pages missing beyond area {area}")
    missing[area][first : first + len(bits)] = bits[:room].astype(np.bool_)


class RemoteTarget:
    """An engine.Target."""

    def __init__(
        self,
        name: str,
        id: str,
        source: Source,
        connect: Connect,
        codec: PageCodec,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.name = name
        self._id, self._source, self._connect, self._codec = id, source, connect, codec
        self.encoder = PageEncoder(codec, cache_bytes)
        self._channel: Channel | None = None
        self._nr_rounds = 0
        self._missing: list[Mask] = []
        self._hashes = PageHashes(source.manifest.areas)
        self._digest = b""
        self._lost: ConnectionLost | None = None

    @property
    def channel(self) -> Channel:
        if self._channel is None:
            raise ConnectionLost
        return self._channel

    def setup(self) -> Operation[None]:
        yield from self._hello(Hello(self._id, "new", self._source.manifest))

    def _hello(self, hello: Hello) -> Operation[Welcome]:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._channel = yield from self._connect()
        yield from send(self.channel, Kind.HELLO, msgspec.json.encode(hello))
        frame = yield from self._answer(Kind.WELCOME)
        try:
            return msgspec.json.decode(frame.payload, type=Welcome)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ProtocolError(f"a strange welcome: {error}") from error

    def _answer(self, *kinds: Kind) -> Operation[Frame]:
        """The next frame, of one of these kinds. Raises GpuError: what the other side refused with."""
        frame = yield from receive(self.channel)
        if frame.kind is Kind.REFUSE:
            raise refusal(frame.payload)
        if frame.kind not in kinds:
            raise ProtocolError(f"{frame.kind.name} where {kinds[0].name} has to come")
        return frame

    def send(self, area: int, pages: Pages) -> Operation[int]:
        rows, lost = self._source.read(area, pages)
        if not self._digest:
            self._hashes.put(area, pages, rows, lost)
        before = self.channel.nr_sent_bytes
        yield from send(self.channel, Kind.PAGES, self.encoder.encode(area, pages, rows, lost))
        return self.channel.nr_sent_bytes - before

    def end_round(self) -> Operation[None]:
        number = struct.pack("<I", self._nr_rounds)
        self._nr_rounds += 1
        yield from send(self.channel, Kind.ROUND, number)
        frame = yield from self._answer(Kind.ARRIVED)
        if frame.payload != number:
            raise ProtocolError("another round has arrived")

    def prepare(self, missing: list[Mask] | None) -> Operation[str]:
        self._missing = [np.zeros(area.nr_pages, dtype=np.bool_) for area in self._source.manifest.areas]
        if missing is not None:
            self._missing = [mask.copy() for mask in missing]
            self.encoder = PageEncoder(self._codec, 0)  # the versions sent before are thrown away over there
            for payload in missing_payloads(missing):
                yield from send(self.channel, Kind.MISSING, payload)
        yield from send(self.channel, Kind.FINAL)
        self._digest = self._hashes.digest(missing)
        frame = yield from self._answer(Kind.PREPARED)
        if frame.payload != self._digest:
            raise GpuError(errno.EIO, f"the digest is {self._digest.hex()} here, {frame.payload.hex()} there")
        return self._digest.hex()

    def commit(self) -> Operation[None]:
        try:
            yield from send(self.channel, Kind.COMMIT, self._digest)
            yield from self._answer(Kind.OWNED)
        except ConnectionLost:
            raise
        except GpuError as error:  # whatever else was said: it may have taken the pages
            raise ConnectionLost(str(error.strerror)) from error

    def resume(self) -> Operation[str]:
        welcome = yield from self._hello(Hello(self._id, "resume"))
        if welcome.status == "running":
            yield from self._learn_missing()
        self._digest = bytes.fromhex(welcome.digest)
        return welcome.status

    def _learn_missing(self) -> Operation[None]:
        areas = self._source.manifest.areas
        self._missing = [np.zeros(area.nr_pages, dtype=np.bool_) for area in areas]
        self.encoder = PageEncoder(self._codec, 0)
        while (frame := (yield from self._answer(Kind.MISSING, Kind.ARRIVED))).kind is Kind.MISSING:
            put_missing(frame.payload, areas, self._missing)

    def missing(self) -> list[Mask]:
        return self._missing

    def wanted(self) -> tuple[int, Pages] | None:
        self.channel.arrived().wait(0)
        frame = self.channel.receive()
        if frame is None:
            return None
        if frame.kind is not Kind.WANT:
            raise ConnectionLost(f"{frame.kind.name} in post-copy")
        return self._wanted(frame)

    def _wanted(self, frame: Frame) -> tuple[int, Pages]:
        areas = self._source.manifest.areas
        if len(frame.payload) != WANT.size:
            raise ConnectionLost("half a want")
        area, first, nr = WANT.unpack(frame.payload)
        if area >= len(areas) or nr > MAX_WANTED or first + nr > areas[area].nr_pages:
            raise ConnectionLost(f"pages {first}+{nr} of area {area} are wanted")
        return area, np.arange(first, first + nr)

    def finish(self) -> Operation[None]:
        yield from send(self.channel, Kind.END)
        while True:
            try:
                frame = yield from self._answer(Kind.DONE, Kind.WANT)
            except ConnectionLost:
                raise
            except GpuError as error:
                raise ConnectionLost(str(error.strerror)) from error
            if frame.kind is Kind.DONE:
                self._close()
                return

    def abort(self, why: str) -> None:
        if self._channel is not None:
            with suppress(ConnectionLost):  # then it has no ears any more either
                self._channel.send(Kind.ABORT, why.encode()[:200])
            self._close()

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def refusal(payload: bytes) -> GpuError:
    """What a REFUSE says: errno u16, text."""
    number = int.from_bytes(payload[:2], "little") if len(payload) >= 2 else 0
    text = payload[2:202].decode("utf-8", "replace")
    return GpuError(number if number in errno.errorcode else errno.EPROTO, f"refused: {text}")


def refuse_payload(error: OSError) -> bytes:
    return (error.errno or errno.EIO).to_bytes(2, "little") + str(error.strerror).encode()[:200]
