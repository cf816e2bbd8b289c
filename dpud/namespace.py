# SPDX-License-Identifier: GPL-2.0-only
"""A private view of the file system in which the real paths show the emulated kernel.

`enter()` moves this process into a mount namespace of its own, for a user who is not root also into a user
namespace in which that user is root. `lay_over()` then binds the emulated tree over the real one. Nothing is
changed outside, and nothing can be left behind: the namespace goes with its last process.

How the tree is laid over:
- A directory of `_SHARED` also holds files of the real kernel that stay in sight, so its entries are bound
  one by one: /proc/buddyinfo is emulated, /proc/self is not.
- Any other directory is bound whole. It shows only what is emulated: of /proc/sys/vm the emulated sysctls, of
  /sys/kernel/mm no DAMON, which would be the host's.
- A name that the real kernel lacks has no mount point to bind over. Under /sys the shared directory is
  rebuilt as a tmpfs that shows the old entries and has room for the new ones. /proc and /dev stay as they
  are: a file that is missing there is only seen under the daemon's mount point.
"""

import ctypes
import errno
import os
from collections.abc import Iterable
from contextlib import suppress

from dpud.errors import UserError

MS_RDONLY = 0x1
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1

_SHARED = frozenset(
    (
        "/",
        "/dev",
        "/proc",
        "/proc/sys",
        "/proc/sys/kernel",
        "/sys",
        "/sys/class",
        "/sys/devices",
        "/sys/devices/system",
        "/sys/kernel",
    )
)

_COVERED = ("/proc/pressure", "/proc/sys/vm", "/sys/devices/system/node", "/sys/kernel/debug", "/sys/kernel/tracing")
"""Directories that are never the real kernel's: empty where the emulated one was configured without them."""

_TRACEFS = "/sys/kernel/tracing"

_REAL = frozenset(("/proc/loadavg",))
"""Stay the real kernel's: the processes are its own, and some programs (atop) wait until they are as many."""

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(UserError):
    """The private view cannot be made here; the text is one line."""


def enter() -> None:
    """Move this process, which must have one thread only, into a mount namespace of its own.

    Raises NamespaceError where the system does not allow it.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS if uid == 0 else CLONE_NEWNS | CLONE_NEWUSER
    try:
        _check(_libc.unshare(ctypes.c_int(flags)))
        if flags & CLONE_NEWUSER:
            _become_root(uid, gid)
        mount("none", "/", flags=MS_PRIVATE | MS_REC)
    except OSError as error:
        kind = "mount" if uid == 0 else "user and mount"
        raise NamespaceError(f"cannot make a {kind} namespace as uid {uid}: {error.strerror}") from error


def step_aside() -> None:
    """Move this process into a copy of its mount namespace, so that a daemon left behind keeps the real paths.

    A daemon that saw its own files in their places would wait for itself as soon as its C library opened one:
    glibc reads /proc/sys/vm/overcommit_memory before it gives memory back. Raises NamespaceError.
    """
    try:
        _check(_libc.unshare(ctypes.c_int(CLONE_NEWNS)))
        mount("none", "/", flags=MS_PRIVATE | MS_REC)
    except OSError as error:
        raise NamespaceError(f"cannot make a second mount namespace: {error.strerror}") from error


def cover(emulated: str) -> None:
    """Make the real paths show the emulated tree at `emulated`. Raises OSError if a mount is refused."""
    _mount_tracefs()
    lay_over(emulated)
    for path in _COVERED:
        if os.path.isdir(path) and not os.path.lexists(emulated + path):
            mount("dpud", path, "tmpfs", flags=MS_RDONLY, data="mode=555")


def _mount_tracefs() -> None:
    """Put the real tracefs where the emulated one will cover it, if this system lets us.

    libtracefs goes by the type of what is mounted. Finding no tracefs it would mount one itself, over the emulated
    files, and trace the real kernel.
    """
    with suppress(OSError):
        mount("dpud", _TRACEFS, "tracefs")


def lay_over(emulated: str, real: str = "/") -> None:
    """Bind the emulated tree at `emulated` over the real paths, from `real` downwards.

    `emulated` is the daemon's mount point plus `real`. Raises OSError if a mount is refused.
    """
    names = [name for name in sorted(os.listdir(emulated)) if not _stays(real, name)]
    missing = [name for name in names if not os.path.lexists(os.path.join(real, name))]
    if missing and real.startswith("/sys"):
        _rebuild(real, missing, emulated)
        missing = []
    for name in names:
        source, target = os.path.join(emulated, name), os.path.join(real, name)
        if target in _SHARED:
            lay_over(source, target)
        elif name not in missing:
            mount(source, target, flags=MS_BIND | MS_REC)


def _stays(real: str, name: str) -> bool:
    """Whether the real kernel's entry is the one to be seen."""
    return (real == "/proc" and name.isdigit()) or os.path.join(real, name) in _REAL


def mount(source: str, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). Raises OSError, with the target as its file name."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, fstype, data)]
    _check(_libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]), target)


def detach(target: str) -> None:
    """umount2(MNT_DETACH): out of sight at once, gone with its last user. Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), ctypes.c_int(MNT_DETACH)), target)


def die_with_parent(parent: int, signum: int) -> None:
    """Have the kernel send this process `signum` when `parent`, its parent's pid, dies; or now, if it has."""
    _check(_libc.prctl(ctypes.c_int(PR_SET_PDEATHSIG), ctypes.c_ulong(signum), 0, 0, 0))
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


def _become_root(uid: int, gid: int) -> None:
    """Be uid 0 inside the new user namespace, so that mounting is allowed and 0644 files can be written."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _rebuild(directory: str, missing: Iterable[str], emulated: str) -> None:
    """Put a tmpfs over `directory` that shows what it held and has an empty place for each missing name."""
    held = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mount("dpud", directory, "tmpfs", data="mode=755")
        for entry in os.scandir(f"/proc/self/fd/{held}"):
            target = os.path.join(directory, entry.name)
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), target)
                continue
            _make_place(target, entry.is_dir())
            mount(entry.path, target, flags=MS_BIND | MS_REC)
    finally:
        os.close(held)
    for name in missing:
        _make_place(os.path.join(directory, name), os.path.isdir(os.path.join(emulated, name)))


def _make_place(path: str, is_dir: bool) -> None:
    if is_dir:
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC))


def _check(result: int, path: str | None = None) -> None:
    if result:
        code = ctypes.get_errno() or errno.EINVAL
        raise OSError(code, os.strerror(code), path)
