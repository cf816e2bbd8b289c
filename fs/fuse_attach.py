# SPDX-License-Identifier: GPL-2.0-only
"""Mounting without a FUSE library: mount(2) for root, the fusermount helper for everybody else.

fusermount opens /dev/fuse, mounts, and hands the descriptor over a socket that its environment names
(_FUSE_COMMFD). It enforces what ordinary users may do; its messages on stderr are the user's.
"""

import ctypes
import os
import shutil
import socket
import subprocess

from fs.mountpoint import MountError

_MS_NOSUID, _MS_NODEV, _MNT_DETACH = 2, 4, 2
_NAME = "dpud"
_libc = ctypes.CDLL(None, use_errno=True)


def attach(path: str, allow_other: bool) -> int:
    """Mount at `path` -> the descriptor of the connection. Raises MountError."""
    options = ["default_permissions", *(["allow_other"] if allow_other else [])]
    if os.geteuid() == 0:
        fd = _attach_as_root(path, options)
        if fd is not None:
            return fd
    return _attach_by_helper(path, [*options, f"fsname={_NAME}", f"subtype={_NAME}"])


def detach(path: str) -> None:
    """Take the mount out of sight; it ends when nobody uses it any more."""
    if os.geteuid() == 0 and _libc.umount2(os.fsencode(path), _MNT_DETACH) == 0:
        return
    if helper := _helper():
        subprocess.run([helper, "-uqz", path], stderr=subprocess.DEVNULL, check=False)


def let_go(fd: int) -> None:
    """Close a connection. Its number stays taken: a thread that is about to answer must not write into another file."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, fd, inheritable=False)
    os.close(null)


def _attach_as_root(path: str, options: list[str]) -> int | None:
    """None where even root must not mount (in a user namespace), so that the helper has its turn."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = [f"fd={fd}", "rootmode=40000", f"user_id={os.geteuid()}", f"group_id={os.getegid()}", *options]
    words = [os.fsencode(word) for word in (_NAME, path, f"fuse.{_NAME}", ",".join(data))]
    if _libc.mount(*words[:3], ctypes.c_ulong(_MS_NOSUID | _MS_NODEV), words[3]) == 0:
        return fd
    os.close(fd)
    return None


def _attach_by_helper(path: str, options: list[str]) -> int:
    helper = _helper()
    if helper is None:
        raise MountError("fusermount is missing; on Debian: apt install fuse")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [helper, "-o", ",".join(options), "--", path]
        env = os.environ | {"_FUSE_COMMFD": str(theirs.fileno())}
        done = subprocess.run(command, env=env, pass_fds=[theirs.fileno()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise MountError(f"{path}: FUSE did not mount: {done.stderr.strip()}")
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    os.set_inheritable(fds[0], False)
    return fds[0]


def _helper() -> str | None:
    return shutil.which("fusermount") or shutil.which("fusermount3")
