# SPDX-License-Identifier: GPL-2.0-only
"""The tree served by reading /dev/fuse ourselves: no FUSE library, a sixth of the processor time of one.

Theory of operation
    A few threads read requests, each into a buffer of its own, in compiled code that answers most opens, reads and
    closes by itself (fuse_loop.py). Any other request is answered here, one at a time, by a thread that has the turn
    (fuse_turn.py). A request that has to wait gives the turn away, and its thread goes on alone (fuse_threads.py). So a
    blocked reader or a long store holds nothing but its thread.

    - A node's id is its inode number, which is never used again; one that was removed meanwhile is ENOENT.
    - Every open gets FOPEN_DIRECT_IO, so sizes may lie as they do in /proc and each read(2) reaches us, and
      FOPEN_NOFLUSH. O_TRUNC comes with the open. That makes `cat` 4 requests and `echo >` 3.
    - Writers of one file wait for each other in the kernel, which has its inode locked from the request to the reply.
      FOPEN_PARALLEL_DIRECT_WRITES would not change that: it is not for writes beyond the size that the kernel knows,
      and that is 0 after an O_TRUNC (fs/fuse/file.c, fuse_dio_wr_exclusive_lock, fuse_truncate_update_attr).
    - Operations that say nothing new are ENOSYS: the kernel hears it once and stops asking.
    - sendfile(2) and splice(2) read through the page cache, which ends at the size that the kernel knows: 0 for files
      of /proc. So a reader's open also stores a byte far out in the cache (it is dropped as the open ends), which moves
      that end; each time in another page, as we would have to wait for one that somebody is dropping. stat(2) asks for
      the size from then on, and is still told 0. While somebody reads the file its reply would move the end back, were
      it not older than one more such byte.
    - poll(2) is answered at once. Who polls a stream that has nothing is told when it has; of each open file the last
      poll is remembered.
    - A user may have so many open files, texts and waiting requests (shares.py). What the kernel would not send is
      EINVAL; a handle or a node it does not know are EBADF and ESTALE.
    - The kernel checks mode bits of ordinary users (`default_permissions`); what it lets root do is checked here.
    - OSError becomes its errno. Anything else is a bug: EIO, a traceback in the log and a count.
"""

import errno
import itertools
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from fs import fuse_abi as abi
from fs import fuse_layout as layout
from fs import fuse_loop as loop
from fs import fuse_turn as turn
from fs.caller import comm_of, groups_of
from fs.ending import ending_signals
from fs.fuse_abi import NAME_AT, Opcode
from fs.fuse_attach import attach, detach, let_go
from fs.fuse_dirs import OpenDirs
from fs.fuse_nodes import KnownNodes, name_in
from fs.fuse_table import QuickFiles
from fs.fuse_threads import Request, Threads
from fs.kernfs import Cred, OpenFile, Tree
from fs.mountpoint import check_mountable
from fs.shares import Shares
from kernelsim.attr import Node

log = logging.getLogger(__name__)

CACHE_S = 1
"""How long the kernel may keep a name or a mode without asking (fuse_ops.py says more)."""

_BODY = abi.IN_HEADER.size
_FAR_OUT = (1 << 30) + 1  # larger than any text; not the start of a page, which would make the page readable
_MAX_CREDS = 256
_INIT_FLAGS = abi.ASYNC_READ | abi.ATOMIC_O_TRUNC | abi.BIG_WRITES | abi.PARALLEL_DIROPS | abi.MAX_PAGES
_REFUSED = (Opcode.SYMLINK, Opcode.LINK, Opcode.RENAME, Opcode.RENAME2)
_TRANSIENT = (errno.EINTR, errno.EAGAIN, errno.ENOENT)  # of read(2); ENOENT: taken back while it was read


class Session:
    """One connection to the kernel's FUSE."""

    def __init__(self, tree: Tree, fd: int, on_ready: Callable[[], None], on_end: Callable[[], None]) -> None:
        self.nr_failures = 0
        self._tree = tree
        self._fd = fd
        self._on_ready, self._on_end = on_ready, on_end
        self._buffer = memoryview(b"")  # of the thread that has the turn
        self._nodes = KnownNodes(tree.root)
        self._open_files: dict[int, OpenFile] = {}
        self._polled: dict[int, int] = {}
        self._is_traced = log.isEnabledFor(logging.DEBUG)  # then each request is to be seen
        self._quick = QuickFiles(tree, self._nodes.get, _FAR_OUT, is_used=not self._is_traced)
        self._readers: Counter[int] = Counter()  # open files with `hides_size`, by nodeid
        self._shares = Shares(tree.uid)
        self._dirs = OpenDirs(tree, self._shares)
        self._handles = itertools.count(1)
        self._creds: dict[tuple[int, int, int], Cred] = {}
        self.threads = Threads(self._serve)
        self._handlers: dict[int, Callable[..., bytes | None]] = {
            int(op): partial(self._refuse, op) if op in _REFUSED else getattr(self, f"_{op.name.lower()}")
            for op in Opcode
        }

    # Threads.

    def _give_way(self, request: Request) -> bool:
        """The thread of `request`, which has the turn, is going to wait. False: it must not, and has the turn still."""
        if not self._shares.wait(request.uid):
            return False
        is_left = turn.give_turn(self._quick.table)
        if not self.threads.one_waits(request, is_left):
            self._shares.go_on(request.uid)
            turn.take_turn(self._quick.table)
            return False
        return True

    def _have_turn(self, request: Request) -> None:
        """After what may have been a wait."""
        if not request.has_turn:
            turn.take_turn(self._quick.table)
            request.has_turn = True

    def _serve(self) -> None:
        """What a thread does all its life."""
        table, counts, (buffer, view, reply) = self._quick.table, self._quick.counts, layout.make_buffer()
        has_turn, nr_reply = False, 0
        while True:
            nr = loop.serve(self._fd, buffer, table, counts, has_turn, nr_reply)
            has_turn, nr_reply = True, 0
            if nr > 0:
                self._buffer = view
                request, nr_reply = self._one_request(nr, reply)
                has_turn = request.has_turn
                if request.waits and not self._is_wanted_again(request):
                    return
            elif nr == loop.BAD_REPLY:
                nr_reply = self._refused(reply)
            elif -nr not in _TRANSIENT:
                turn.give_turn(table)
                self._on_end()
                return

    def _is_wanted_again(self, request: Request) -> bool:
        """The thread of a request that has waited; comes back when it is."""
        self._shares.go_on(request.uid)
        return self.threads.one_is_back(request)

    def _one_request(self, nr: int, reply: memoryview) -> tuple[Request, int]:
        """Answer the request in the buffer -> bytes of the reply, where that is to be sent as the thread comes back."""
        if nr < _BODY:  # there is no telling to whom
            return Request(self._give_way, 0, 0, False), 0
        length, opcode, unique, nodeid, uid, gid, pid, interrupted = abi.IN_HEADER.unpack_from(self._buffer)
        request = Request(self._give_way, unique, uid, bool(interrupted))
        handler = self._handlers.get(opcode)
        if self._is_traced:
            log.debug("opcode: %s (%d)", Opcode(opcode).name if handler else "?", opcode)
        error = 0
        data: bytes | None = b""
        if handler is None:
            error = errno.ENOSYS
        elif length != nr or nr < _BODY + abi.SHORTEST.get(opcode, 0):
            error = errno.EINVAL
        else:
            try:
                data = handler(request, nodeid, nr, self._cred(uid, gid, pid))
            except Exception as problem:
                error = self._errno(problem, opcode)
                if request.refused and error == errno.EINTR:
                    error = errno.EAGAIN
        if data is None:
            return request, 0
        if not request.waits and len(data) <= layout.MAX_TEXT:
            return request, _put_reply(reply, unique, -error, data)
        if request.waits and request.has_turn:
            request.has_turn = False
            request.is_left = turn.give_turn(self._quick.table)
        self._reply(unique, -error, data)
        return request, 0

    def _cred(self, uid: int, gid: int, pid: int) -> Cred:
        """Who asks. The last few are kept: what they are asked for is looked up only when it is needed."""
        cred = self._creds.get((uid, gid, pid))
        if cred is None:
            if len(self._creds) >= _MAX_CREDS:
                self._creds.clear()
            cred = Cred(uid, gid, partial(groups_of, pid), pid, partial(comm_of, pid))
            self._creds[uid, gid, pid] = cred
        return cred

    def _errno(self, error: Exception, opcode: int) -> int:
        """The number of an expected failure; EIO, a log entry and a count for any other exception."""
        if isinstance(error, OSError) and error.errno:
            return error.errno
        self.nr_failures += 1
        log.error("%s failed", Opcode(opcode).name, exc_info=error)
        return errno.EIO

    def _reply(self, unique: int, error: int, data: bytes = b"") -> None:
        """Answer; that nobody waits for it any more is not our business. What the kernel does not take is a bug."""
        head = abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(data), error, unique)
        try:
            os.writev(self._fd, (head, data))
        except OSError as problem:
            if problem.errno == errno.EINVAL and unique:
                instead = bytearray(head)
                if self._refused(memoryview(instead)):
                    os.write(self._fd, instead)

    def _refused(self, reply: memoryview) -> int:
        """The kernel did not take a reply: a bug. -> bytes of the one that is to be sent instead, in its place."""
        nr, error, unique = abi.OUT_HEADER.unpack_from(reply)
        self.nr_failures += 1
        log.error("bad reply %d, %d bytes", error, nr - abi.OUT_HEADER.size)
        return _put_reply(reply, unique, -errno.EIO, b"") if nr > abi.OUT_HEADER.size else 0

    # The connection.

    def _init(self, _request: Request, _nodeid: int, _nr: int, _cred: Cred) -> bytes:
        _, minor, readahead, flags = abi.INIT_IN.unpack_from(self._buffer, _BODY)
        self._on_ready()
        version = (abi.VERSION[0], min(minor, abi.VERSION[1]))
        return abi.INIT_OUT.pack(
            *version, readahead, flags & _INIT_FLAGS, 64, 48, layout.MAX_WRITE, 1, layout.MAX_WRITE >> 12, 0
        )

    def _destroy(self, *_: Any) -> bytes:
        return b""

    def _interrupt(self, _request: Request, _nodeid: int, _nr: int, _cred: Cred) -> None:
        """EAGAIN, if a thread has read the request but neither begun it nor set it aside: the kernel asks again, unless
        it was answered meanwhile."""
        (unique,) = abi.INTERRUPT_IN.unpack_from(self._buffer, _BODY)
        if not self.threads.interrupt(unique) and not turn.interrupt_aside(self._quick.table, unique):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _statfs(self, *_: Any) -> bytes:
        return abi.STATFS_OUT.pack(0, 0, 0, 0, 0, 512, 255, 512)

    # Names.

    def _name(self, opcode: Opcode, nr: int) -> str:
        return name_in(bytes(self._buffer[_BODY + NAME_AT[opcode] : nr]))

    def _path(self, nodeid: int, opcode: Opcode, nr: int) -> str:
        """The path that a request for a name in a directory is about."""
        directory = self._nodes.alive(nodeid).path
        return f"{directory if directory != '/' else ''}/{self._name(opcode, nr)}"

    def _attr(self, node: Node, request: Request) -> bytes:
        found = self._tree.stat(node, interrupted=request.goes_on)
        self._have_turn(request)
        times = (found.st_atime, found.st_mtime, found.st_ctime)
        seconds, rests = (time // 10**9 for time in times), (time % 10**9 for time in times)
        owner = (found.st_mode, found.st_nlink, found.st_uid, found.st_gid, 0, found.st_blksize, 0)
        return abi.ATTR.pack(found.st_ino, found.st_size, 0, *seconds, *rests, *owner)

    def _entry(self, node: Node, request: Request) -> bytes:
        attr = self._attr(node, request)
        self._nodes.look_up(node)
        return abi.ENTRY_OUT.pack(node.ino, 0, CACHE_S, CACHE_S, 0, 0) + attr

    def _lookup(self, request: Request, nodeid: int, nr: int, _cred: Cred) -> bytes:
        return self._entry(self._tree.child(self._nodes.alive(nodeid), self._name(Opcode.LOOKUP, nr)), request)

    def _forget(self, _request: Request, nodeid: int, _nr: int, _cred: Cred) -> None:
        self._nodes.forget(nodeid, *abi.FORGET_IN.unpack_from(self._buffer, _BODY))

    def _batch_forget(self, _request: Request, _nodeid: int, nr: int, _cred: Cred) -> None:
        count, _ = abi.BATCH_FORGET_IN.unpack_from(self._buffer, _BODY)
        start = _BODY + abi.BATCH_FORGET_IN.size
        if start + count * abi.FORGET_ONE.size > nr:
            raise OSError(errno.EINVAL, "fewer than it says")
        for number in range(count):
            self._nodes.forget(*abi.FORGET_ONE.unpack_from(self._buffer, start + number * abi.FORGET_ONE.size))

    def _getattr(self, request: Request, nodeid: int, _nr: int, _cred: Cred) -> bytes:
        (flags,) = abi.GETATTR_IN.unpack_from(self._buffer, _BODY)
        is_read = self._readers[nodeid] or self._quick.has_readers(nodeid)
        if is_read and not flags & abi.GETATTR_FH:  # with it, lseek(2) asks where the end is
            self._extend_cache(nodeid)
        return abi.ATTR_OUT.pack(CACHE_S, 0, 0) + self._attr(self._nodes.get(nodeid), request)

    def _extend_cache(self, nodeid: int) -> None:
        """Let readers through the page cache go on until a read is short."""
        self._reply(0, abi.NOTIFY_STORE, abi.NOTIFY_STORE_OUT.pack(nodeid, self._quick.far_out(), 1, 0) + b"\0")

    def _setattr(self, request: Request, nodeid: int, _nr: int, cred: Cred) -> bytes:
        """Times are taken without effect, and sizes for most files: the value stays what it is until a write."""
        valid, mode, uid, gid = abi.SETATTR_IN.unpack_from(self._buffer, _BODY)
        if valid & abi.FATTR_MODE:
            self._tree.chmod(self._nodes.alive(nodeid).path, mode, cred)
        if valid & abi.FATTR_SIZE:
            self._tree.truncate(self._nodes.alive(nodeid).path, cred)
        if valid & (abi.FATTR_UID | abi.FATTR_GID):
            owner = (uid if valid & abi.FATTR_UID else -1, gid if valid & abi.FATTR_GID else -1)
            self._tree.chown(self._nodes.alive(nodeid).path, *owner, cred)
        return abi.ATTR_OUT.pack(CACHE_S, 0, 0) + self._attr(self._nodes.get(nodeid), request)

    def _listxattr(self, _request: Request, _nodeid: int, _nr: int, _cred: Cred) -> bytes:
        """None of these file systems has any."""
        size, _ = abi.GETXATTR_IN.unpack_from(self._buffer, _BODY)
        return b"" if size else abi.GETXATTR_OUT.pack(0, 0)

    def _fsync(self, _request: Request, nodeid: int, _nr: int, _cred: Cred) -> bytes:
        self._tree.fsync(self._nodes.alive(nodeid).path)
        return b""

    _fsyncdir = _fsync

    def _readlink(self, _request: Request, nodeid: int, _nr: int, _cred: Cred) -> bytes:
        return os.fsencode(self._tree.readlink(self._nodes.alive(nodeid).path))

    # Directories.

    def _opendir(self, _request: Request, nodeid: int, _nr: int, cred: Cred) -> bytes:
        handle = next(self._handles)
        self._dirs.open(handle, self._nodes.alive(nodeid).path, cred.uid)
        return abi.OPEN_OUT.pack(handle, 0, 0)

    def _readdir(self, _request: Request, _nodeid: int, _nr: int, _cred: Cred) -> bytes:
        return self._dirs.read(*abi.READ_IN.unpack_from(self._buffer, _BODY)[:3])

    def _releasedir(self, _request: Request, _nodeid: int, _nr: int, _cred: Cred) -> bytes:
        self._dirs.close(*abi.RELEASE_IN.unpack_from(self._buffer, _BODY))
        return b""

    # Files.

    def _open(self, request: Request, nodeid: int, _nr: int, cred: Cred) -> bytes:
        flags, _ = abi.OPEN_IN.unpack_from(self._buffer, _BODY)
        file, handle = self._opened(self._nodes.alive(nodeid), flags, request, cred)
        if file.hides_size:
            self._extend_cache(nodeid)
        return abi.OPEN_OUT.pack(handle, abi.FOPEN_DIRECT_IO | abi.FOPEN_NOFLUSH, 0)

    def _opened(self, node: Node, flags: int, request: Request, cred: Cred) -> tuple[OpenFile, int]:
        """A file and its handle: one of the table's, or one that counts for who opens it. Raises ENFILE too."""
        spare = next(self._handles)
        if not self._shares.open(spare, cred.uid):
            raise OSError(errno.ENFILE, "too many")
        handle = None
        try:
            file = self._tree.open(node.path, flags, cred, interrupted=request.goes_on)
            if flags & os.O_TRUNC:
                file.truncate(cred, interrupted=request.goes_on)
            self._have_turn(request)
            if self._quick.has_room() or not self._shares.is_limited(cred.uid):
                handle = self._quick.open(node.ino, file, flags)
            if handle is None:
                handle = spare
                self._open_files[handle] = file
                self._readers[node.ino] += file.hides_size
        finally:
            if handle != spare:
                self._shares.close(spare)
        return file, handle

    def _file(self, handle: int, cred: Cred, *, keep: bool = False) -> OpenFile:
        """An open file. One of the table's is made up for the moment, unless there is more to `keep` than a text."""
        file = self._open_files.get(handle)
        if file is None:
            file = self._quick.open_file(handle)
            if keep or file.appends or not file.node.attr.kept:
                self._keep(handle, file, cred)
        return file

    def _keep(self, handle: int, file: OpenFile, cred: Cred) -> None:
        self._quick.hand_over(handle)
        self._open_files[handle] = file
        self._shares.open(handle, cred.uid)

    def _hold(self, handle: int, file: OpenFile) -> None:
        """Its text counts for whoever opened it. Raises ENOMEM, and keeps none then."""
        if not self._shares.hold(handle, len(file.text or b"")):
            file.read_on(None)
            raise OSError(errno.ENOMEM, "too much text")

    def _read(self, request: Request, _nodeid: int, _nr: int, cred: Cred) -> bytes:
        handle, offset, size, _, _, flags = abi.READ_IN.unpack_from(self._buffer, _BODY)
        if offset > abi.MAX_POSITION:
            raise OSError(errno.EINVAL, "beyond its end")
        nonblock = bool(flags & os.O_NONBLOCK)
        now = self._quick.now
        file = self._file(handle, cred)
        if handle in self._open_files:
            data = file.read(size, offset, cred, nonblock=nonblock, interrupted=request)
            self._hold(handle, file)
            return data
        before = file.text
        try:
            data = file.read(size, offset, cred, nonblock=nonblock, interrupted=request)
        finally:
            self._have_turn(request)
            is_new = file.text is not None and (offset == 0 or file.text is not before)
            if is_new and not self._quick.was_read(handle, file, now):
                self._keep(handle, file, cred)
            else:
                self._quick.give_back(handle, file)
        if handle in self._open_files:
            self._hold(handle, file)
        return data

    def _write(self, request: Request, _nodeid: int, nr: int, cred: Cred) -> bytes:
        handle, offset, size, *_ = abi.WRITE_IN.unpack_from(self._buffer, _BODY)
        start = _BODY + abi.WRITE_IN.size
        if start + size > nr or offset > abi.MAX_POSITION:
            raise OSError(errno.EINVAL, "beyond its end")
        data = bytes(self._buffer[start : start + size])
        file = self._file(handle, cred)
        try:
            return abi.WRITE_OUT.pack(file.write(data, offset, cred, interrupted=request), 0)
        finally:
            self._have_turn(request)
            if handle not in self._open_files:
                self._quick.give_back(handle, file)

    def _release(self, request: Request, _nodeid: int, _nr: int, _cred: Cred) -> bytes:
        (handle,) = abi.RELEASE_IN.unpack_from(self._buffer, _BODY)
        self._polled.pop(handle, None)
        file = self._open_files.pop(handle, None)
        if file is None:
            raise OSError(errno.EBADF, "not open")
        self._shares.close(handle)
        if handle & layout.QUICK:
            self._quick.close(handle)
        else:
            nodeid = file.node.ino
            self._readers[nodeid] -= file.hides_size
            if not self._readers[nodeid]:
                del self._readers[nodeid]
        file.release(interrupted=request.goes_on)
        return b""

    def _poll(self, _request: Request, _nodeid: int, _nr: int, cred: Cred) -> bytes:
        handle, kernel_handle, flags, _ = abi.POLL_IN.unpack_from(self._buffer, _BODY)
        notify = None
        if flags & abi.POLL_SCHEDULE_NOTIFY:
            self._polled[handle] = kernel_handle
            notify = self._wake_pollers  # the same for all: who polls again and again is on the queue once
        return abi.POLL_OUT.pack(self._file(handle, cred, keep=True).poll(notify), 0)

    def _wake_pollers(self) -> None:
        """Something has come somewhere: all who poll look again."""
        self._tree.changes.tell()
        for handle in list(self._polled):
            if (kernel_handle := self._polled.pop(handle, None)) is not None:
                self._reply(0, abi.NOTIFY_POLL, abi.NOTIFY_POLL_OUT.pack(kernel_handle))

    # Changes. What the kernel's own file systems refuse is refused with their error.

    def _create(self, _request: Request, nodeid: int, nr: int, _cred: Cred) -> bytes:
        self._tree.create(self._path(nodeid, Opcode.CREATE, nr))

    def _mknod(self, _request: Request, nodeid: int, nr: int, _cred: Cred) -> bytes:
        mode, _ = abi.MKNOD_IN.unpack_from(self._buffer, _BODY)
        refuse = self._tree.create if stat.S_ISREG(mode) else self._tree.make
        refuse(self._path(nodeid, Opcode.MKNOD, nr))

    def _refuse(self, opcode: Opcode, _request: Request, nodeid: int, nr: int, _cred: Cred) -> NoReturn:
        self._tree.make(self._path(nodeid, opcode, nr))

    def _unlink(self, _request: Request, nodeid: int, nr: int, _cred: Cred) -> bytes:
        self._tree.unlink(self._path(nodeid, Opcode.UNLINK, nr))

    def _mkdir(self, request: Request, nodeid: int, nr: int, cred: Cred) -> bytes:
        name = self._name(Opcode.MKDIR, nr)
        self._tree.mkdir(self._path(nodeid, Opcode.MKDIR, nr), cred, interrupted=request.goes_on)
        return self._entry(self._tree.child(self._nodes.alive(nodeid), name), request)

    def _rmdir(self, request: Request, nodeid: int, nr: int, cred: Cred) -> bytes:
        self._tree.rmdir(self._path(nodeid, Opcode.RMDIR, nr), cred, interrupted=request)
        return b""


def mount(
    tree: Tree, mountpoint: str, *, allow_other: bool = False, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Serve `tree` at `mountpoint` until it is unmounted or SIGTERM, SIGINT or SIGHUP arrives.

    For the main thread. `on_ready` is called once, when the mount is there and requests will be answered; it must not
    touch the mount itself. Raises MountError.
    """
    check_mountable(mountpoint)
    loop.load()
    fd = attach(mountpoint, allow_other)
    try:
        serve(tree, fd, on_ready)
    finally:
        detach(mountpoint)


def serve(tree: Tree, fd: int, on_ready: Callable[[], None] = lambda: None) -> None:
    """The same over a connection that somebody else mounted, and unmounts; it is let go of at the end."""
    try:
        with ending_signals() as (ended, end):
            session = Session(tree, fd, on_ready, end)
            session.threads.start()
            os.read(ended, 1)
            session.threads.close()
    finally:
        let_go(fd)


def _put_reply(reply: memoryview, unique: int, error: int, data: bytes) -> int:
    """-> its bytes."""
    nr_bytes = abi.OUT_HEADER.size + len(data)
    abi.OUT_HEADER.pack_into(reply, 0, nr_bytes, error, unique)
    reply[abi.OUT_HEADER.size : nr_bytes] = data
    return nr_bytes
