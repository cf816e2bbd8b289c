# SPDX-License-Identifier: GPL-2.0-only
"""The file tree on plain objects: lookup, permission, open files, configfs directories. No FUSE, no content.

Theory of operation
    The registry holds the nodes; a Tree gives them the semantics of a file system. What differs between
    procfs, sysctl, sysfs, debugfs and configfs is a row of `rules.RULES`. Requests come in on many
    threads:

    - lookup, stat, readdir and open read only the registry's dictionaries, one access each, and take no
      lock;
    - whatever runs a hook or changes the registry goes through `call`, which holds the machine meanwhile
      and drives operations (generators), giving the machine away at each of their yields.

    What a file is asked for goes there as a `Request`, plain data that the `Performer` works on.

    An open file keeps its node. If the node was removed meanwhile, each access says so (`Rules.gone`).
"""

import errno
import os
import select
import stat
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

from fs import requests
from fs.access import READ, WRITE, Access
from fs.configfs import Ask, Items, ask_directly, error
from fs.performer import Performer, RunAs, run_directly
from fs.requests import ROOT as ROOT
from fs.requests import Cred as Cred
from fs.requests import Request
from fs.rules import RULES, Rules
from fs.seq_file import SeqFile
from kernelsim.attr import (
    Dir,
    File,
    Flavour,
    Link,
    Node,
    Registry,
    StreamOverrun,
    WaitQueue,
    complete,
)
from kernelsim.kinds import Bytes

R = TypeVar("R")

NAME_MAX = 255

POLL_READ = select.POLLIN | select.POLLRDNORM
DEFAULT_POLLMASK = POLL_READ | select.POLLOUT | select.POLLWRNORM
POLL_CHANGED = select.POLLERR | select.POLLPRI


def _never() -> bool:
    return False


class Call(Protocol):
    """How to run something that needs the machine (the daemon's `Owner.call`)."""

    def __call__(self, fn: Callable[..., Any], /, *args: Any, interrupted: Callable[[], bool] = ...) -> Any:
        """`fn(*args)` with the machine held; if it returns an operation, that one's result.

        Raises OSError(EINTR), the operation closed, once `interrupted()` says so.
        """
        ...


def call_directly(fn: Callable[..., Any], /, *args: Any, interrupted: Callable[[], bool] = _never) -> Any:
    """The Call of a program with one thread."""
    result = fn(*args)
    return complete(result) if hasattr(result, "send") else result


class Stat(NamedTuple):
    """stat(2) of a node; times in nanoseconds."""

    st_mode: int
    st_ino: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_blksize: int
    st_atime: int
    st_mtime: int
    st_ctime: int


class DirEntry(NamedTuple):
    """One name of a directory; `mode` holds the file type bits."""

    name: str
    mode: int
    ino: int


def _type_bits(node: Node) -> int:
    return stat.S_IFDIR if isinstance(node, Dir) else stat.S_IFLNK if isinstance(node, Link) else stat.S_IFREG


class OpenFile:
    """One open(2) of a file. Several threads may use it at once."""

    def __init__(self, tree: "Tree", node: File, flags: int, user: int = 0) -> None:
        self._tree = tree
        self.node = node
        self._user = user
        self._pos = 0  # where the next read(2) of a stream will be, as far as reads have told
        self._appends = bool(flags & os.O_APPEND)
        self._readable = flags & os.O_ACCMODE != os.O_WRONLY
        self._nr_appended = 0
        self._rules = RULES[node.flavour]
        self._seq = SeqFile()
        self._skipped = 0  # how far this reader's place in a stream is beyond its file position

    def read(
        self,
        size: int,
        offset: int,
        cred: Cred = ROOT,
        *,
        nonblock: bool = False,
        interrupted: Callable[[], bool] = _never,
    ) -> bytes:
        """pread(2). A stream gives the record at `offset`; `nonblock` makes it EAGAIN rather than wait."""
        node, attr = self.node, self.node.attr
        if node.flavour is Flavour.SYSCTL:
            self._tree.check_again(node, cred, READ)
            if offset:
                return b""  # proc handlers know one position only: a short buffer cuts the text off for good
        if not attr.readable:
            raise error(self._rules.no_read, node.path)
        if attr.is_stream:
            if not offset:
                self._skipped = 0
            try:
                return self._read_stream(size, offset, nonblock, cred, interrupted)
            except StreamOverrun as overrun:
                self._skipped = overrun.resume - offset
                if offset:
                    raise  # the reader is told once; one that only begins has missed nothing
                return self._read_stream(size, offset, nonblock, cred, interrupted)
        return self._seq.read(lambda: self._render(cred, interrupted), size, offset)

    @property
    def text(self) -> bytes | None:
        """What its reads are parts of."""
        return self._seq.text

    def read_on(self, text: bytes | None) -> None:
        """Be in the middle of a text, or None: of none yet."""
        self._seq = SeqFile(text)

    @property
    def appends(self) -> bool:
        return self._appends

    def _read_stream(
        self, size: int, offset: int, nonblock: bool, cred: Cred, interrupted: Callable[[], bool]
    ) -> bytes:
        pos, consumed = offset + self._skipped, self.node.attr.kind.consumed
        request = self._request(requests.READ_STREAM, pos=pos, size=size, flags=int(nonblock), changes=consumed)
        self._pos = pos
        data: bytes = self._tree.ask(request, cred, interrupted=interrupted)
        self._pos = offset + self._skipped + len(data)
        return data

    def poll(self, notify: Callable[[], object] | None = None) -> int:
        """poll(2) -> what is so now; `notify` is called once when that may have changed."""
        attr = self.node.attr
        if not attr.is_stream:
            unread = self._rules.poll_tells_changes and not self._seq.was_read
            return DEFAULT_POLLMASK | (POLL_CHANGED if unread else 0)
        if not attr.can_poll:
            return DEFAULT_POLLMASK
        queue: WaitQueue | None = self._tree.look(self._poll_stream, notify)
        return 0 if queue else POLL_READ

    def _poll_stream(self, notify: Callable[[], object] | None) -> WaitQueue | None:
        queue = self.node.attr.poll_stream(self.node.kobj, self._pos)
        if queue is not None and notify is not None:
            queue.notify_once(notify)
        return queue

    @property
    def hides_size(self) -> bool:
        """Is there a text to read although stat(2) says that there are 0 bytes?"""
        return self._readable and not self._rules.file_size and not self.node.attr.is_stream and self.node.attr.readable

    def release(self, *, interrupted: Callable[[], bool] = _never) -> None:
        """The last close(2)."""
        if self._user:
            self._tree.ask(self._request(requests.RELEASE, user=self._user), ROOT, interrupted=interrupted)

    def write(self, data: bytes, offset: int, cred: Cred = ROOT, *, interrupted: Callable[[], bool] = _never) -> int:
        """pwrite(2) -> bytes taken. Raises OSError as the attribute's kind and store do."""
        node, attr = self.node, self.node.attr
        if node.flavour is Flavour.SYSCTL:
            self._tree.check_again(node, cred, WRITE)
            if self._appends:  # proc goes by the file position; FUSE makes the offset from a cached size
                offset, self._nr_appended = self._nr_appended, self._nr_appended + len(data)
            if offset and attr.writable:  # kernel.sysctl_writes_strict = 1: the data do nothing, all of them are taken
                return self._write(self._request(requests.SKIP, size=len(data)), cred, interrupted)
        if not attr.writable:
            raise error(self._rules.no_write, node.path)
        if attr.is_stream:
            request = self._request(requests.WRITE_STREAM, data=data, pos=offset, user=self._user)
            nr_taken = self._write(request, cred, interrupted)
            if not (self._appends or isinstance(attr.kind, Bytes)):
                self._skipped -= nr_taken  # the file position went on, a reader's place among records did not
            return nr_taken
        window = data[: self._rules.write_window]
        return self._write(self._request(requests.WRITE, data=window), cred, interrupted)

    def _write(self, request: Request, cred: Cred, interrupted: Callable[[], bool]) -> int:
        nr_taken: int = self._tree.ask(request, cred, interrupted=interrupted)
        return nr_taken

    def truncate(self, cred: Cred = ROOT, *, interrupted: Callable[[], bool] = _never) -> None:
        """ftruncate(2), and what open(2) with O_TRUNC comes to."""
        if self.node.attr.truncatable:
            self._tree.ask(self._request(requests.TRUNCATE), cred, interrupted=interrupted)

    def _render(self, cred: Cred, interrupted: Callable[[], bool]) -> bytes:
        node = self.node
        request = self._request(requests.READ, changes=node.attr.kind.consumed, kept=node.attr.kept)
        text: bytes = self._tree.ask(request, cred, interrupted=interrupted)
        return _cut(text, self._rules)

    def _request(self, verb: str, **what: Any) -> Request:
        """For this file."""
        node = self.node
        return Request(verb, node.path, node.ino, apart=node.kobj.apart, **what)


def _cut(text: bytes, rules: Rules) -> bytes:
    return text[: rules.file_size - 1] if rules.file_size else text


class Tree:
    """A registry as a file system, owned by one user.

    registry    what there is
    call        runs what needs the machine
    look        the same for what changes nothing, where the turns of the machine are counted
    uid, gid    who the files belong to: whoever runs the emulated kernel is its root
    control_gid group that may use what can be written (access.py)
    now_ns      shown as the time of every node
    run_as      drives an operation on behalf of whoever asks
    request     `call` for requests, as (perform, request, cred); `call` itself if None
    settles     these three begin with Changes.settle where there is something to be set
    stores_at   address of where what is to be set has to be kept until it was, or 0 (fuse_stores.py)
    outside     what does not follow from requests is read through it
    """

    def __init__(
        self,
        registry: Registry,
        call: Call = call_directly,
        look: Call | None = None,
        *,
        uid: int = 0,
        gid: int = 0,
        control_gid: int | None = None,
        now_ns: int = 0,
        run_as: RunAs = run_directly,
        request: Callable[..., Any] | None = None,
        outside: Ask = ask_directly,
        settles: bool = False,
        stores_at: int = 0,
    ) -> None:
        self.call = call
        self.look = look or call
        self.counts_turns = look is not None
        self.changes = registry.changes
        self.uid = uid
        self.access = Access(registry, uid, gid, control_gid)
        self.settles, self.stores_at = settles, stores_at
        self._request = request
        self._registry = registry
        self._nodes = registry.nodes
        self._items = Items(registry, outside)
        self.performer = Performer(registry, self._items, run_as, outside)
        self._now_ns = now_ns

    # Reading the tree. Paths are absolute below the mount point.

    @property
    def root(self) -> Node:
        return self._registry.root

    def child(self, directory: Node, name: str) -> Node:
        """What has a name in a directory. Raises ENOENT, ENOTDIR."""
        if not isinstance(directory, Dir):
            raise error(errno.ENOTDIR, directory.path)
        node = directory.entries.get(name)
        return node if node is not None else self._lookup(f"{directory.path.rstrip('/')}/{name}")

    def getattr(self, path: str) -> Stat:
        """stat(2). Raises ENOENT."""
        return self.stat(self._lookup(path))

    def stat(self, node: Node, *, interrupted: Callable[[], bool] = _never) -> Stat:
        """fstat(2); a removed node still has its numbers."""
        rules = RULES[node.flavour]
        blksize = rules.blksize
        if isinstance(node, File):
            mode, nlink, size = node.mode, 1, rules.file_size
            if node.attr.is_stream:
                size = self.look(node.attr.stream_size, node.kobj, interrupted=interrupted)
            if isinstance(node.attr.kind, Bytes):
                blksize = Bytes.BLKSIZE
        elif isinstance(node, Dir):
            mode, size = self.access.dir_mode(node), 0
            nlink = 2 + node.nr_dirs if rules.counts_subdirs else 1
        else:
            mode, nlink, size = 0o777, 1, 0
        times = (self._now_ns,) * 3
        gid = self.access.gid(node)
        return Stat(_type_bits(node) | mode, node.ino, nlink, self.uid, gid, size, blksize, *times)

    def readdir(self, path: str) -> list[DirEntry]:
        """Names in a stable order, `.` and `..` first: `sysctl -a` drops two unseen. Raises ENOTDIR."""
        directory = self._lookup(path)
        if not isinstance(directory, Dir):
            raise error(errno.ENOTDIR, path)
        parent = self._nodes.get(path.rpartition("/")[0] or "/", directory)
        dots = [DirEntry(".", stat.S_IFDIR, directory.ino), DirEntry("..", stat.S_IFDIR, parent.ino)]
        return dots + [DirEntry(name, _type_bits(n), n.ino) for name, n in tuple(directory.entries.items())]

    def readlink(self, path: str) -> str:
        """The target of a link. Raises EINVAL for anything else."""
        node = self._lookup(path)
        if not isinstance(node, Link):
            raise error(errno.EINVAL, path)
        return node.target

    def open(self, path: str, flags: int, cred: Cred = ROOT, *, interrupted: Callable[[], bool] = _never) -> OpenFile:
        """open(2) of a file that is there. O_TRUNC is for `OpenFile.truncate`, as FUSE asks for it. Raises EACCES."""
        node = self._lookup(path)
        if not isinstance(node, File):
            raise error(errno.EISDIR if isinstance(node, Dir) else errno.ELOOP, path)
        access = {os.O_RDONLY: READ, os.O_WRONLY: WRITE}.get(flags & os.O_ACCMODE, READ | WRITE)
        needed = access | (WRITE if flags & os.O_TRUNC else 0)
        if access & ~self.access.openable(node) or not self.access.may_open(node, cred, needed):
            raise error(errno.EACCES, path)
        user = 0
        if node.attr.has_users:
            privileged, writes = int(self.access.is_owner(cred)), bool(access & WRITE)
            apart = node.kobj.apart
            request = Request(requests.OPEN, path, node.ino, pos=privileged, flags=flags, changes=writes, apart=apart)
            user = self.ask(request, cred, interrupted=interrupted)
        return OpenFile(self, node, flags, user)

    # Changing the tree.

    def create(self, path: str) -> NoReturn:
        """open(2) with O_CREAT of a name that is not there: none of these file systems makes files."""
        raise error(self._rules_of_parent(path).create, path)

    def make(self, path: str) -> NoReturn:
        """mknod, symlink, link and rename."""
        raise error(self._rules_of_parent(path).make, path)

    def unlink(self, path: str) -> NoReturn:
        """Files go with what they describe, not by unlink(2)."""
        raise error(RULES[self._lookup(path).flavour].remove, path)

    def mkdir(self, path: str, cred: Cred = ROOT, *, interrupted: Callable[[], bool] = _never) -> None:
        """Make an item in a configfs directory."""
        self._check_items(path, cred)
        self.ask(Request(requests.MKDIR, path), cred, interrupted=interrupted)

    def rmdir(self, path: str, cred: Cred = ROOT, *, interrupted: Callable[[], bool] = _never) -> None:
        """Remove an item of a configfs directory; only the wait for requests inside it can be interrupted."""
        self._check_items(path, cred)
        while not self.ask(Request(requests.RMDIR, path), cred):
            self.call(self._items.idle, path, interrupted=interrupted)

    def truncate(self, path: str, cred: Cred = ROOT) -> None:
        """truncate(2) of a file; most have nothing that could be."""
        node = self._lookup(path)
        if isinstance(node, File):
            if not self.access.permits(node, cred, WRITE):
                raise error(errno.EACCES, path)
            OpenFile(self, node, os.O_WRONLY).truncate(cred)

    def chmod(self, path: str, mode: int, cred: Cred = ROOT) -> None:
        """chmod(2) of a file. Raises EPERM for sysctls and directories, and for anybody but the owner."""
        node = self._lookup(path)
        self.access.check_owner(node, cred)
        if node.flavour is Flavour.SYSCTL or not isinstance(node, File):
            raise error(errno.EPERM, path)
        self.ask(Request(requests.CHMOD, path, node.ino, pos=stat.S_IMODE(mode) & 0o777), ROOT)

    def chown(self, path: str, uid: int, gid: int, cred: Cred = ROOT) -> None:
        """chown(2); -1 leaves one as it is. Raises EPERM for sysctls, and for any new owner."""
        node = self._lookup(path)
        self.access.check_owner(node, cred)
        is_same = uid in (-1, self.uid) and gid in (-1, self.access.gid(node))
        if node.flavour is Flavour.SYSCTL or not is_same:
            raise error(errno.EPERM, path)

    def fsync(self, path: str) -> None:
        """fsync(2) of a file or a directory. Raises EINVAL where the kernel's has none."""
        node = self._lookup(path)
        rules = RULES[node.flavour]
        if not (rules.has_dir_fsync if isinstance(node, Dir) else rules.has_fsync):
            raise error(errno.EINVAL, path)

    # For open files.

    def ask(self, request: Request, cred: Cred, *, interrupted: Callable[[], bool] = _never) -> Any:
        """Have a request performed by whoever owns the machine."""
        run = self._request or (self.look if request.kept else self.call)
        return run(self.performer.perform, request, cred, interrupted=interrupted)

    def text_of(self, file: File) -> bytes:
        """What a file that is kept has now; for whoever holds the machine."""
        return _cut(complete(file.attr.read_text(file.kobj)), RULES[file.flavour])

    def check_again(self, file: File, cred: Cred, access: int) -> None:
        """sysctl asks for permission at each read and write, whoever opened the file. Raises EPERM."""
        if not self.access.permits(file, cred, access):
            raise error(errno.EPERM, file.path)

    def _check_items(self, path: str, cred: Cred) -> None:
        """May an item of that path be made or removed? Raises EACCES."""
        self.access.check_items(self._nodes.get(path.rpartition("/")[0] or "/"), cred)

    def _lookup(self, path: str) -> Node:
        node = self._nodes.get(path)
        if node is None:
            parent, _, name = path.rpartition("/")
            in_dir = self._nodes.get(parent or "/")
            is_long = len(os.fsencode(name)) > NAME_MAX and in_dir is not None and RULES[in_dir.flavour].has_name_max
            raise error(errno.ENAMETOOLONG if is_long else errno.ENOENT, path)
        return node

    def _rules_of_parent(self, path: str) -> Rules:
        return RULES[self._lookup(path.rpartition("/")[0] or "/").flavour]
