# SPDX-License-Identifier: MIT
"""What goes over the connection: frames. Neither side trusts the other.

    magic   4 bytes  "DPUM"
    version u16      1
    kind    u16      see Kind
    number  u32      0, 1, 2, ... of each direction
    length  u32      bytes that follow the header, at most MAX_PAYLOAD_BYTES
    check   u64      xxh3_64 of the header before this field, and of what follows

All little-endian. A frame that is not the next one, is longer than it may be, or whose check is wrong ends the
connection: there is no way to find the next frame behind garbage, and none is looked for.
"""

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from dpud.gpu.errors import GpuError

MAGIC = b"DPUM"
VERSION = 1
MAX_PAYLOAD_BYTES = 5 << 20
"""A page of 2 MiB that does not compress, or 4 MiB of smaller ones, and what describes them."""

_HEAD = struct.Struct("<4sHHII")
_CHECK = struct.Struct("<Q")
HEADER_BYTES = _HEAD.size + _CHECK.size


class Kind(IntEnum):
    # From the source.
    HELLO = 1
    """Who comes, with what; or which one that was broken off is to go on."""
    PAGES = 2
    ROUND = 3
    """All of a round was sent."""
    MISSING = 4
    """Which pages come after the switch."""
    FINAL = 5
    """All before the switch was sent: compare."""
    COMMIT = 6
    """It is yours, if this is your digest too."""
    ABORT = 7
    END = 8
    """Nothing more to send."""
    # From the destination.
    WELCOME = 32
    ARRIVED = 33
    """All of a round is here."""
    PREPARED = 34
    """All is here, and this is its digest."""
    OWNED = 35
    """It is mine."""
    WANT = 36
    """These pages first: somebody waits."""
    DONE = 37
    REFUSE = 38


class ProtocolError(GpuError):
    """The other side said what makes no sense."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EPROTO, why)


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    payload: bytes


class FrameWriter:
    """One direction, sending."""

    def __init__(self) -> None:
        self._number = 0

    def frame(self, kind: Kind, payload: bytes = b"") -> bytes:
        """Its bytes."""
        assert len(payload) <= MAX_PAYLOAD_BYTES
        head = _HEAD.pack(MAGIC, VERSION, kind, self._number, len(payload))
        self._number += 1
        return b"".join((head, _CHECK.pack(_check(head, payload)), payload))


class FrameReader:
    """One direction, receiving. After a ProtocolError it gives no frame any more."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._number = 0
        self._broken: ProtocolError | None = None

    @property
    def nr_wanted(self) -> int:
        """Bytes that the frame under way lacks; never more than a frame has."""
        if len(self._data) < HEADER_BYTES:
            return HEADER_BYTES - len(self._data)
        return max(1, HEADER_BYTES + self._length() - len(self._data))

    def feed(self, data: bytes | memoryview) -> None:
        """More bytes."""
        self._data += data

    def next(self) -> Frame | None:
        """The next frame, if all of it is here. Raises ProtocolError."""
        if self._broken is not None:
            raise self._broken
        try:
            return self._next()
        except ProtocolError as error:
            self._broken = error
            self._data.clear()
            raise

    def _length(self) -> int:
        return int(_HEAD.unpack_from(self._data)[4])

    def _next(self) -> Frame | None:
        if len(self._data) < HEADER_BYTES:
            return None
        magic, version, kind, number, length = _HEAD.unpack_from(self._data)
        _require(magic == MAGIC, f"no frame begins with {magic!r}")
        _require(version == VERSION, f"version {version}, not {VERSION}")
        _require(number == self._number, f"frame {number} where {self._number} has to come")
        _require(length <= MAX_PAYLOAD_BYTES, f"a frame of {length} bytes")
        _require(kind in set(Kind), f"frame of kind {kind}")
        if len(self._data) < HEADER_BYTES + length:
            return None
        payload = bytes(memoryview(self._data)[HEADER_BYTES : HEADER_BYTES + length])
        (check,) = _CHECK.unpack_from(self._data, _HEAD.size)
        _require(check == _check(bytes(self._data[: _HEAD.size]), payload), f"the check of frame {number} is wrong")
        del self._data[: HEADER_BYTES + length]
        self._number += 1
        return Frame(Kind(kind), payload)


def _check(head: bytes, payload: bytes) -> int:
    digest = xxhash.xxh3_64(head)
    digest.update(payload)
    return digest.intdigest()


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ProtocolError(why)
