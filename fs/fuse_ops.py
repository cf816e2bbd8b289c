# SPDX-License-Identifier: GPL-2.0-only
"""FUSE requests <-> kernfs. The only file that imports the FUSE library.

Theory of operation
    The API is fusepy's. mfusepy, which is maintained and also knows libfuse3, is taken where it is
    installed. One connection, one thread per waiting request: a blocked reader or a long store holds
    nothing but its own thread.

    - Every open gets FOPEN_DIRECT_IO, so sizes may lie as they do in /proc and each read(2) reaches us.
    - Operations that say nothing new (flush, getxattr, access, lseek) are left out: the kernel hears
      ENOSYS once and stops asking. That makes `cat` 4 requests and `echo >` 6, and no process can be
      stuck in FLUSH.
    - poll is answered at once. Who polls a stream that has nothing is told by fuse_notify_poll() when it
      has; of each open file the last such handle is kept. fusepy knows no poll: there the kernel takes
      every file for ready.
    - Paths are not asked for where an open file is at hand (`flag_nopath`), so that libfuse's own path
      locks do not tie rmdir to readers.
    - The kernel checks mode bits of ordinary users (`default_permissions`); what it lets root do is
      checked here.
    - A request whose caller was killed is noticed by polling `fuse_interrupted()`; so is the end of the
      session, because libfuse waits for its threads before it unmounts.
    - OSError becomes its errno. Anything else is a bug: EIO, a traceback in the log and a count.
"""

import ctypes
import errno
import functools
import itertools
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

from fs import thread_state
from fs.caller import comm_of
from fs.kernfs import Cred, OpenFile, Tree
from fs.mountpoint import MountError, check_mountable

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

CACHE_S = 1.0
"""How long the kernel may keep a name or a mode without asking. What the machine removes by itself is seen to
be gone after this; what it adds, and what mkdir and rmdir do, at once (missing names are not kept)."""

MAX_THREADS = 1024
"""libfuse3 stops at 10 threads, so 10 blocked readers would stop everything. libfuse2 has no limit."""


def operation(method: Callable[Concatenate["FuseOps", P], R]) -> Callable[Concatenate["FuseOps", P], R]:
    """The errno of an expected failure; EIO, a log entry and a count for any other exception."""

    @functools.wraps(method)
    def guarded(self: "FuseOps", /, *args: P.args, **kwargs: P.kwargs) -> R:
        thread_state.keep()
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                raise
            self.nr_failures += 1
            log.exception("%s%r failed", method.__name__, args)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error

    return guarded


class FuseOps:
    """The operations the binding calls, each on a thread of libfuse's."""

    use_ns = True
    flag_nullpath_ok = True
    flag_nopath = True

    def __init__(self, tree: Tree, binding: Any, on_ready: Callable[[], None]) -> None:
        self.nr_failures = 0
        self.was_mounted = False
        self._tree = tree
        self._binding = binding
        self._on_ready = on_ready
        self._open_files: dict[int, OpenFile] = {}
        self._poll_handles: dict[int, int] = {}
        self._directories: dict[int, str] = {}
        self._handles = itertools.count(1)
        self._session: int | None = None
        lib = binding._libfuse
        self._fuse_interrupted = ctypes.CFUNCTYPE(ctypes.c_int)(("fuse_interrupted", lib))
        self._session_exited = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(("fuse_session_exited", lib))
        self._notify_poll = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(("fuse_notify_poll", lib))
        self._destroy_poll = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("fuse_pollhandle_destroy", lib))
        self._getgroups = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)(("fuse_getgroups", lib))

    @operation
    def init(self, _path: str) -> None:
        get_session = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(("fuse_get_session", self._binding._libfuse))
        self._session = get_session(self._binding._libfuse.fuse_get_context().contents.fuse)
        self.was_mounted = True
        self._on_ready()

    # Names.

    @operation
    def getattr(self, path: str | None, fi: Any = None) -> dict[str, int]:
        found = self._tree.stat(self._open_files[fi.fh].node) if path is None else self._tree.getattr(path)
        return found._asdict()

    @operation
    def readlink(self, path: str) -> str:
        return self._tree.readlink(path)

    @operation
    def opendir(self, path: str) -> int:
        handle = next(self._handles)
        self._directories[handle] = path
        return handle

    @operation
    def readdir(self, _path: str | None, handle: int) -> list[tuple[str, dict[str, int], int]]:
        entries = self._tree.readdir(self._directories[handle])
        return [(name, {"st_mode": mode, "st_ino": ino}, 0) for name, mode, ino in entries]

    @operation
    def releasedir(self, _path: str | None, handle: int) -> int:
        del self._directories[handle]
        return 0

    # Files.

    @operation
    def open(self, path: str, fi: Any) -> int:
        file = self._tree.open(path, fi.flags, self._cred())
        fi.fh = next(self._handles)
        fi.direct_io = 1
        self._open_files[fi.fh] = file
        return 0

    @operation
    def read(self, _path: str | None, size: int, offset: int, fi: Any) -> bytes:
        nonblock = bool(fi.flags & os.O_NONBLOCK)
        return self._open_files[fi.fh].read(
            size, offset, self._cred(), nonblock=nonblock, interrupted=self._interrupted
        )

    @operation
    def write(self, _path: str | None, data: bytes, offset: int, fi: Any) -> int:
        return self._open_files[fi.fh].write(data, offset, self._cred(), interrupted=self._interrupted)

    @operation
    def release(self, _path: str | None, fi: Any) -> int:
        file = self._open_files.pop(fi.fh)
        if handle := self._poll_handles.pop(fi.fh, None):
            self._destroy_poll(handle)
        file.release()
        return 0

    @operation
    def poll(self, _path: str | None, fi: Any, handle: int | None, revents: Any) -> int:
        notify = None
        if handle:
            if replaced := self._poll_handles.pop(fi.fh, None):
                self._destroy_poll(replaced)
            self._poll_handles[fi.fh] = handle
            notify = self._wake_pollers
        revents[0] = self._open_files[fi.fh].poll(notify)
        return 0

    def _wake_pollers(self) -> None:
        """All who poll look again."""
        for fh in list(self._poll_handles):
            if handle := self._poll_handles.pop(fh, None):
                self._notify_poll(handle)
                self._destroy_poll(handle)

    @operation
    def fsync(self, path: str | None, _datasync: int, fi: Any) -> int:
        self._tree.fsync(self._open_files[fi.fh].node.path if path is None else path)
        return 0

    @operation
    def fsyncdir(self, _path: str | None, _datasync: int, handle: int) -> int:
        self._tree.fsync(self._directories[handle])
        return 0

    # Changes. What the kernel's own file systems refuse is refused with their error.

    @operation
    def create(self, path: str, _mode: int, _fi: Any) -> NoReturn:
        self._tree.create(path)

    @operation
    def mknod(self, path: str, _mode: int, _dev: int) -> NoReturn:
        self._tree.make(path)

    @operation
    def symlink(self, path: str, _target: str) -> NoReturn:
        self._tree.make(path)

    @operation
    def link(self, path: str, _source: str) -> NoReturn:
        self._tree.make(path)

    @operation
    def rename(self, _old: str, path: str) -> NoReturn:
        self._tree.make(path)

    @operation
    def unlink(self, path: str) -> NoReturn:
        self._tree.unlink(path)

    @operation
    def mkdir(self, path: str, _mode: int) -> int:
        self._tree.mkdir(path, self._cred())
        return 0

    @operation
    def rmdir(self, path: str) -> int:
        self._tree.rmdir(path, self._cred(), interrupted=self._interrupted)
        return 0

    @operation
    def chmod(self, path: str, mode: int) -> int:
        self._tree.chmod(path, mode, self._cred())
        return 0

    @operation
    def chown(self, path: str, uid: int, gid: int) -> int:
        self._tree.chown(path, _signed(uid), _signed(gid), self._cred())
        return 0

    @operation
    def truncate(self, path: str | None, _length: int, fi: Any = None) -> int:
        """Shells truncate before they write; for most files that changes nothing."""
        if fi is not None:
            self._open_files[fi.fh].truncate(self._cred())
        elif path is not None:
            self._tree.truncate(path, self._cred())
        # else: mfusepy over libfuse3 does not say which open file it is; the file stays as it is
        return 0

    def listxattr(self, _path: str) -> list[str]:
        """None of these file systems has any."""
        return []

    def utimens(self, _path: str | None, _times: Any = None) -> int:
        """`touch` is accepted."""
        return 0

    # The caller.

    def _cred(self) -> Cred:
        context = self._binding._libfuse.fuse_get_context().contents
        pid = context.pid
        return Cred(context.uid, context.gid, self._groups, pid, partial(comm_of, pid))

    def _groups(self) -> frozenset[int]:
        """Supplementary groups of the caller; none where libfuse cannot tell."""
        nr_groups = self._getgroups(0, None)
        groups = (ctypes.c_uint32 * max(nr_groups, 0))()
        return frozenset(groups) if nr_groups > 0 and self._getgroups(nr_groups, groups) > 0 else frozenset()

    def _interrupted(self) -> bool:
        return bool(self._fuse_interrupted()) or bool(self._session_exited(self._session))


def _signed(number: int) -> int:
    """The uid_t or gid_t that leaves an owner as it is comes as 2**32 - 1."""
    return -1 if number == 0xFFFF_FFFF else number


def _comm(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().rstrip("\n")
    except OSError:  # gone, or in a pid namespace that we do not see
        return str(pid)


class _CallableFuseOps(FuseOps):
    """fusepy calls its operations by name, mfusepy as methods."""

    def __call__(self, name: str, *args: Any) -> Any:
        return getattr(self, name)(*args)


def load_binding() -> Any:
    """mfusepy, else fusepy. Raises MountError where neither finds a libfuse."""
    try:
        try:
            import mfusepy as binding
        except ImportError:
            import fuse as binding
    except (ImportError, OSError, AttributeError) as error:
        raise MountError(f"no usable FUSE library ({error}); on Debian: apt install fuse") from error
    return binding


def mount(
    tree: Tree, mountpoint: str, *, allow_other: bool = False, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Serve `tree` at `mountpoint` until it is unmounted or SIGTERM, SIGINT or SIGHUP arrives.

    For the main thread. `on_ready` is called once, when the mount is there and requests will be answered; it
    must not touch the mount itself. Raises MountError.
    """
    check_mountable(mountpoint)
    binding = load_binding()
    version = _libfuse_version(binding)
    options: dict[str, Any] = {"max_threads": MAX_THREADS} if version >= (3, 12) else {}
    if version < (3, 0):
        options["big_writes"] = True  # libfuse2 cuts a write(2) into pages otherwise; libfuse3 never does
    ops = (_CallableFuseOps if binding.__name__ == "fuse" else FuseOps)(tree, binding, on_ready)
    try:
        binding.FUSE(
            ops,
            mountpoint,
            raw_fi=True,
            foreground=True,
            fsname="dpud",
            subtype="dpud",
            allow_other=allow_other,
            default_permissions=True,
            use_ino=True,
            hard_remove=True,
            entry_timeout=CACHE_S,
            attr_timeout=CACHE_S,
            **options,
        )
    except RuntimeError as error:
        if not ops.was_mounted:  # libfuse3 also ends with an error after SIGTERM
            raise MountError(f"{mountpoint}: FUSE did not mount (libfuse {version[0]}.{version[1]})") from error


def _libfuse_version(binding: Any) -> tuple[int, int]:
    """(2, 9) or (3, 14): libfuse2 counts in tens, libfuse3 in hundreds."""
    number: int = binding._libfuse.fuse_version()
    return divmod(number, 10 if number < 100 else 100)
