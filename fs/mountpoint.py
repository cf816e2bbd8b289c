# SPDX-License-Identifier: GPL-2.0-only
"""Is a directory fit to be mounted on, and what to do about the mount of a daemon that was killed.

A FUSE server that dies by SIGKILL leaves its mount: every path under it answers ENOTCONN, `mountpoint -q`
still says yes, and mounting over it fails. Only a lazy unmount gets rid of it while files are open there.
"""

import ctypes
import errno
import os
import shutil
import subprocess

_MNT_DETACH = 2
_GONE = (errno.ENOTCONN, errno.ECONNABORTED)
"""The second for who was waiting for an answer when it went."""
_MAX_STACKED = 16  # stale mounts on top of each other


class MountError(Exception):
    """Why there is no mount, in one line for the user."""


def is_stale(path: str) -> bool:
    """True for a mount point whose FUSE server is gone."""
    try:
        os.statvfs(path)  # stat(2) may be answered from the kernel's cache
    except OSError as error:
        return error.errno in _GONE
    return False


def detach_stale(path: str) -> bool:
    """Unmount what a killed server left at `path` -> was there anything? Raises MountError where it stays."""
    for nr_detached in range(_MAX_STACKED):
        if not is_stale(path):
            return nr_detached > 0
        _detach(path)
    raise MountError(f"{path}: stale FUSE mounts keep coming back")


def _detach(path: str) -> None:
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(path), _MNT_DETACH):
            raise MountError(f"{path}: cannot unmount what is left there: {os.strerror(ctypes.get_errno())}")
        return
    helper = shutil.which("fusermount") or shutil.which("fusermount3")
    if helper is None:
        raise MountError(f"{path}: fusermount is missing, so the stale mount there cannot be removed")
    done = subprocess.run([helper, "-uz", path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MountError(f"{path}: cannot unmount what is left there: {done.stderr.strip()}")


def check_mountable(path: str) -> None:
    """Raises MountError unless `path` is an empty directory, not mounted on, and /dev/fuse can be opened."""
    if is_stale(path):
        raise MountError(f"{path}: the mount of a killed daemon is still there")
    if not os.path.exists(path):
        raise MountError(f"{path}: no such directory")
    if not os.path.isdir(path):
        raise MountError(f"{path}: not a directory")
    if os.path.ismount(path):
        raise MountError(f"{path}: something is mounted there already")
    if os.listdir(path):
        raise MountError(f"{path}: directory is not empty")
    check_fuse()


def check_fuse() -> None:
    """Raises MountError, which says what can be done, unless /dev/fuse can be opened."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        way_out = ": run dpud as root, or have root `chmod 666 /dev/fuse`" if error.errno == errno.EACCES else ""
        raise MountError(f"cannot open /dev/fuse as uid {os.geteuid()}: {error.strerror}{way_out}") from error
