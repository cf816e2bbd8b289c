# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's side of a FUSE connection, played over a pair of sockets: no mount, no root, one request at a time."""

import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fs import fuse_abi as abi
from fs.fuse_abi import Opcode
from fs.fuse_dev import Session
from fs.kernfs import Tree

_LARGEST = 1 << 20
_TIMEOUT_S = 60


class OtherSide:
    """Paths, handles and errors as a program would see them.

    `nr_stored` counts bytes put into the page cache, `nr_polled` those who were told to poll again.
    """

    def __init__(self, session: Session, ours: socket.socket) -> None:
        self.session = session
        self.nr_stored = self.nr_polled = 0
        self._answers: dict[int, tuple[int, bytes]] = {}
        self._socket = ours
        self._unique = 0
        self._nodeids: dict[str, int] = {"/": abi.ROOT_ID}
        self._of: dict[int, int] = {}

    def request(self, opcode: int, nodeid: int, body: bytes, uid: int = 0) -> bytes:
        """Body of the reply. Raises OSError with its error."""
        return self.answer(self.send(opcode, nodeid, body, uid))

    def send(self, opcode: int, nodeid: int, body: bytes, uid: int = 0, length: int | None = None) -> int:
        """A request whose answer may take a while -> its number. `length`: what it says of itself, if not the truth."""
        self._unique += 2
        length = abi.IN_HEADER.size + len(body) if length is None else length
        self.send_raw(abi.IN_HEADER.pack(length, opcode, self._unique, nodeid, uid, uid, 1, 0) + body)
        return self._unique

    def send_raw(self, request: bytes) -> None:
        self._socket.send(request)

    def answer(self, number: int) -> bytes:
        """Body of the reply to a request; those to others are kept. Raises OSError with its error."""
        while number not in self._answers:
            self._take_reply()
        error, body = self._answers.pop(number)
        if error:
            raise OSError(-error, os.strerror(-error))
        return body

    def has_answer(self, number: int) -> bool:
        """Has it come by now?"""
        while select.select([self._socket], [], [], 0)[0]:
            self._take_reply()
        return number in self._answers

    def _take_reply(self) -> None:
        reply = self._socket.recv(_LARGEST)
        nr, error, unique = abi.OUT_HEADER.unpack_from(reply)
        assert nr == len(reply)
        if unique:
            self._answers[unique] = error, reply[abi.OUT_HEADER.size :]
        else:
            assert error in (abi.NOTIFY_STORE, abi.NOTIFY_POLL)
            self.nr_stored += error == abi.NOTIFY_STORE
            self.nr_polled += error == abi.NOTIFY_POLL

    def lookup(self, path: str) -> int:
        """nodeid of a path; directories are remembered, as the kernel does."""
        parent, _, name = path.rpartition("/")
        directory = self._nodeids.get(parent or "/") or self.lookup(parent)
        reply = self.request(Opcode.LOOKUP, directory, name.encode() + b"\0")
        nodeid: int = abi.ENTRY_OUT.unpack_from(reply)[0]
        return nodeid

    def open(self, path: str, flags: int = os.O_RDONLY, uid: int = 0) -> int:
        nodeid = self.lookup(path)
        handle: int = abi.OPEN_OUT.unpack_from(self.request(Opcode.OPEN, nodeid, abi.OPEN_IN.pack(flags, 0), uid))[0]
        self._of[handle] = nodeid
        return handle

    def read(self, handle: int, size: int = 1 << 16, offset: int = 0, uid: int = 0) -> bytes:
        return self.request(Opcode.READ, self._of[handle], abi.READ_IN.pack(handle, offset, size, 0, 0, 0), uid)

    def write(self, handle: int, data: bytes, offset: int = 0, uid: int = 0) -> int:
        body = abi.WRITE_IN.pack(handle, offset, len(data), 0, 0, 0) + data
        nr: int = abi.WRITE_OUT.unpack_from(self.request(Opcode.WRITE, self._of[handle], body, uid))[0]
        return nr

    def release(self, handle: int) -> None:
        self.request(Opcode.RELEASE, self._of.pop(handle), abi.RELEASE_IN.pack(handle) + bytes(16))

    def cat(self, path: str) -> bytes:
        handle = self.open(path)
        try:
            return self.read(handle)
        finally:
            self.release(handle)

    def echo(self, text: str, path: str) -> None:
        handle = self.open(path, os.O_WRONLY | os.O_TRUNC)
        try:
            self.write(handle, text.encode())
        finally:
            self.release(handle)

    def mkdir(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        self.request(Opcode.MKDIR, self.lookup(parent), bytes(8) + name.encode() + b"\0")

    def rmdir(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        self.request(Opcode.RMDIR, self.lookup(parent), name.encode() + b"\0")

    def chmod(self, path: str, mode: int) -> None:
        body = abi.SETATTR_IN.pack(abi.FATTR_MODE, mode, 0, 0)
        self.request(Opcode.SETATTR, self.lookup(path), body)


@contextmanager
def served(tree: Tree) -> Iterator[OtherSide]:
    """`tree` served until the end of the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = set(threading.enumerate())
    ours.settimeout(_TIMEOUT_S)
    with ours, theirs:
        session = Session(tree, theirs.fileno(), lambda: None, lambda: None)
        session.threads.start()
        try:
            yield OtherSide(session, ours)
        finally:
            ours.close()
            session.threads.close()
            for thread in set(threading.enumerate()) - before:
                if thread.name == "dpud-fuse":  # it may not read from the next connection of that number
                    thread.join(_TIMEOUT_S)
        assert session.nr_failures == 0
