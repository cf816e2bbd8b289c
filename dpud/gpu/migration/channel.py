# SPDX-License-Identifier: MIT
"""Two ends of a connection that carry frames. Reading and writing happen in `wait`, which is called without holding
the machine; `send` and `receive` only queue and take.

Pipe          both ends in one program, for the library and for tests; what it is cut by is a test's business
SocketChannel a stream socket, unix or TCP
"""

import errno
import re
import select
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol

from dpud.gpu.errors import GpuError
from dpud.gpu.migration.wire import Frame, FrameReader, FrameWriter, Kind
from kernelsim.operation import Operation, Waitable

TIMEOUT_S = 60.0
"""How long the other side may say nothing where it has to answer."""


class ConnectionLost(GpuError):
    """The other side is gone, or says nothing."""

    def __init__(self, why: str = "the connection is lost") -> None:
        super().__init__(errno.ECONNRESET, why)


class Channel(Protocol):
    """One end."""

    nr_sent_bytes: int

    def send(self, kind: Kind, payload: bytes = b"", /) -> None:
        """Queue a frame. Raises ConnectionLost."""
        ...

    def flushed(self) -> Waitable:
        """What to wait for until the queue is short."""
        ...

    def receive(self) -> Frame | None:
        """A frame, if one is here. Raises ConnectionLost, ProtocolError."""
        ...

    def arrived(self, timeout_s: float = TIMEOUT_S) -> Waitable:
        """What to wait for until `receive` has something to say."""
        ...

    def close(self) -> None: ...


def receive(channel: Channel, timeout_s: float = TIMEOUT_S) -> Operation[Frame]:
    """The next frame. Raises ConnectionLost, also where none comes in time, and ProtocolError."""
    while True:
        frame = channel.receive()
        if frame is not None:
            return frame
        yield channel.arrived(timeout_s)


def send(channel: Channel, kind: Kind, payload: bytes = b"") -> Operation[None]:
    """Send, and wait while too much is queued."""
    channel.send(kind, payload)
    yield channel.flushed()


class _Now:
    """Nothing to wait for."""

    def wait(self, timeout_s: float, /) -> bool:
        return True


class Pipe:
    """One end; `Pipe.pair()` gives both."""

    def __init__(self) -> None:
        self._writer, self._reader = FrameWriter(), FrameReader()
        self._peer: Pipe | None = None
        self.is_cut = False
        self.sent: deque[bytes] = deque()
        """Frames as they were sent, for who wants to see."""
        self.nr_sent_bytes = 0

    @classmethod
    def pair(cls) -> tuple["Pipe", "Pipe"]:
        one, other = cls(), cls()
        one._peer, other._peer = other, one
        return one, other

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        data = self._writer.frame(kind, payload)
        self.send_bytes(data)

    def send_bytes(self, data: bytes) -> None:
        """Anything at all."""
        if self.is_cut or self._peer is None or self._peer.is_cut:
            raise ConnectionLost
        self.nr_sent_bytes += len(data)
        self._peer._reader.feed(data)

    def flushed(self) -> Waitable:
        return _Now()

    def receive(self) -> Frame | None:
        frame = self._reader.next()
        if frame is None and (self.is_cut or self._peer is None or self._peer.is_cut):
            raise ConnectionLost
        return frame

    def arrived(self, timeout_s: float = TIMEOUT_S) -> Waitable:
        return _Now()

    def close(self) -> None:
        self.is_cut = True


class SocketChannel:
    """A connected stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._writer, self._reader = FrameWriter(), FrameReader()
        self._frames: deque[Frame] = deque()
        self._queue: deque[memoryview] = deque()
        self._lock = threading.Lock()
        self._error: GpuError | None = None
        self.nr_sent_bytes = 0

    @property
    def nr_queued_bytes(self) -> int:
        return sum(map(len, self._queue))

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        if self._error is not None:
            raise self._error
        data = self._writer.frame(kind, payload)
        self.nr_sent_bytes += len(data)
        self._queue.append(memoryview(data))

    def receive(self) -> Frame | None:
        if self._frames:
            return self._frames.popleft()
        if self._error is not None:
            raise self._error
        return None

    def flushed(self) -> Waitable:
        return _Flushed(self)

    def arrived(self, timeout_s: float = TIMEOUT_S) -> Waitable:
        return _Arrived(self, timeout_s)

    def close(self) -> None:
        """What is queued is tried once more, for a last word."""
        self.push()
        self._error = self._error or ConnectionLost("closed")
        self.sock.close()

    # Called without the machine, by whoever waits; several may wait at once.

    def push(self) -> bool:
        """Write what the socket takes -> whether nothing is left."""
        with self._lock:
            try:
                while self._queue:
                    nr = self.sock.send(self._queue[0])
                    self._queue[0] = self._queue[0][nr:]
                    if not self._queue[0]:
                        self._queue.popleft()
            except BlockingIOError:
                return False
            except OSError as error:
                self._queue.clear()
                self._error = self._error or ConnectionLost(f"the connection is lost: {error.strerror}")
        return True

    def pull(self) -> bool:
        """Read what is there, as far as a frame -> whether `receive` has something to say."""
        with self._lock:
            try:
                while not self._frames and self._error is None:
                    data = self.sock.recv(min(self._reader.nr_wanted, 1 << 20))
                    if not data:
                        raise ConnectionLost
                    self._reader.feed(data)
                    if (frame := self._reader.next()) is not None:
                        self._frames.append(frame)
            except BlockingIOError:
                return False
            except GpuError as error:
                self._error = error
            except OSError as error:
                self._error = ConnectionLost(f"the connection is lost: {error.strerror}")
        return True

    def lose(self, why: str) -> None:
        """Give the connection up."""
        self._error = self._error or ConnectionLost(why)

    def select(self, timeout_s: float, *, read: bool) -> None:
        """Sleep until there is something to read, if that is wanted, or room for what is queued."""
        try:
            select.select([self.sock] if read else [], [self.sock] if self._queue else [], [], timeout_s)
        except (OSError, ValueError):  # closed meanwhile
            self.lose("closed")


class _Flushed:
    """Little enough is queued."""

    def __init__(self, channel: SocketChannel) -> None:
        self._channel = channel
        self._deadline_s = time.monotonic() + TIMEOUT_S

    def wait(self, timeout_s: float, /) -> bool:
        if self._channel.push():
            return True
        if time.monotonic() > self._deadline_s:
            self._channel.lose("the other side takes nothing")
            return True
        self._channel.select(timeout_s, read=False)
        return self._channel.push()


class _Arrived:
    """A frame, an error, or the time is over."""

    def __init__(self, channel: SocketChannel, timeout_s: float) -> None:
        self._channel = channel
        self._deadline_s = time.monotonic() + timeout_s

    def wait(self, timeout_s: float, /) -> bool:
        self._channel.push()
        if self._channel.pull():
            return True
        if time.monotonic() > self._deadline_s:
            self._channel.lose("the other side says nothing")
            return True
        self._channel.select(timeout_s, read=True)
        return self._channel.pull()


# Addresses.


_HOST = re.compile(r"[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){0,9}")
_PORT = re.compile(r"[0-9]{1,5}")


def parse_address(text: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """`unix:/path` or `tcp:HOST:PORT`, as QEMU writes them. Raises GpuError(EINVAL)."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest.startswith("/"):
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and _HOST.fullmatch(host) and _PORT.fullmatch(port) and int(port) < 1 << 16:
        return socket.AF_INET, (host, int(port))
    raise GpuError(errno.EINVAL, f"{text!r} is neither unix:/path nor tcp:HOST:PORT")


def _is_number(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET, host)
    except OSError:
        return False
    return True


class Connecting:
    """A connection being made: wait for it, then `channel()`."""

    def __init__(self, address: str) -> None:
        """Raises GpuError(EINVAL)."""
        family, self._where = parse_address(address)
        self._sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(5.0)
        self._error: OSError | None = None

    def wait(self, timeout_s: float, /) -> bool:
        try:
            self._sock.connect(self._where)
        except OSError as error:
            self._error = error
        return True

    def channel(self) -> SocketChannel:
        """Raises OSError: nobody listens there."""
        if self._error is not None:
            self._sock.close()
            raise OSError(
                self._error.errno or errno.EHOSTUNREACH, f"no connection: {self._error.strerror or self._error}"
            )
        if self._sock.family == socket.AF_INET:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return SocketChannel(self._sock)


class Listening:
    """A socket that waits for connections."""

    def __init__(self, address: str) -> None:
        """Raises GpuError(EINVAL), OSError. A host is a number: names would be looked up while others wait."""
        family, where = parse_address(address)
        if isinstance(where, tuple) and not _is_number(where[0]):
            raise GpuError(errno.EINVAL, f"{where[0]!r} is not like 127.0.0.1")
        self.address = address
        self.sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if family == socket.AF_INET:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.sock.bind(where)
            self.sock.listen(8)
        except OSError:
            self.sock.close()
            raise
        self.sock.setblocking(False)
        self._accepted: deque[SocketChannel] = deque()

    def wait(self, timeout_s: float, /) -> bool:
        """True once somebody has come, or the socket was closed."""
        try:
            select.select([self.sock], [], [], timeout_s)
            self._accepted.append(SocketChannel(self.sock.accept()[0]))
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            return True
        return True

    def accept(self) -> SocketChannel | None:
        """Who has come."""
        return self._accepted.popleft() if self._accepted else None

    @property
    def is_closed(self) -> bool:
        return self.sock.fileno() < 0

    def close(self) -> None:
        self.sock.close()
        family, where = parse_address(self.address)
        if family == socket.AF_UNIX:
            Path(str(where)).unlink(missing_ok=True)
