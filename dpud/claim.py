# SPDX-License-Identifier: GPL-2.0-only
"""The directory the daemon mounts on: which one, whether it can be used, and what becomes of it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from dpud.errors import UserError
from fs.mountpoint import MountError, check_mountable, detach_stale


def default() -> str:
    """/run/dpud for root, else dpud in the user's runtime directory. Raises UserError if there is none."""
    if os.geteuid() == 0:
        return "/run/dpud"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise UserError("no place to mount on: give --mount DIR, or set XDG_RUNTIME_DIR")
    return os.path.join(runtime, "dpud")


@contextmanager
def claimed(path: str, remove: bool = False) -> Iterator[None]:
    """Hold `path` as a usable mount point, made where missing; afterwards remove it if made here or `remove`.

    The mount that a killed daemon left behind is cleared away. Raises UserError if the path is in use, is not
    an empty directory or cannot be made.
    """
    with ExitStack() as undo:
        try:
            detach_stale(path)
            if _make(path) or remove:
                undo.callback(_remove, path)
            undo.callback(os.close, _lock(path))
        except MountError as error:
            raise UserError(str(error)) from error
        yield


def _remove(path: str) -> None:
    with suppress(OSError):  # somebody's files are in it by now, or somebody took it away
        os.rmdir(path)


def _make(path: str) -> bool:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return False
    except OSError as error:
        raise MountError(f"{path}: cannot make that directory: {error.strerror}") from error
    return True


def _lock(path: str) -> int:
    """Check and lock the bare directory: of two daemons that start at once one is refused."""
    check_mountable(path)
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        check_mountable(path)
    except (BlockingIOError, MountError) as error:
        os.close(held)
        raise MountError(f"{path}: another dpud is starting there") from error
    return held
