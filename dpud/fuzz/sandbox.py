# SPDX-License-Identifier: GPL-2.0-only
"""A process that may write in one folder only, and speak to nobody: some files of the tree take paths and addresses.

By an audit hook of Python's (PEP 578): what it forbids fails with EACCES, as it would for a user who may not. It needs
no privileges, and it cannot be taken away again, so it is for a child that soon ends. It is no protection against code
that means harm; what is given to the tree here does not.
"""

import errno
import os
import socket
import sys
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = """
    os.mkdir os.rmdir os.remove os.rename os.link os.symlink os.truncate os.chmod os.chown os.utime os.setxattr
    os.removexattr shutil.rmtree
"""
_NEVER = "os.system os.exec os.posix_spawn os.spawn os.kill subprocess.Popen os.fork os.forkpty"
_CHANGING, _FORBIDDEN = frozenset(_CHANGES.split()), frozenset(_NEVER.split())


def confine(folder: str) -> None:
    """From now on, and to its end, for this process."""
    inside = os.path.realpath(folder)

    def is_inside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True  # what was opened before
        real = os.path.realpath(os.fsdecode(path))
        return real == "/dev/null" or real == inside or real.startswith(inside + "/")

    def may(event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            return not args[2] & _WRITES or is_inside(args[0])
        if event in _CHANGING:
            return all(is_inside(path) for path in args[:2] if isinstance(path, str | bytes | os.PathLike))
        if event == "socket.__new__":  # so no name is looked up either
            return args[1] in (socket.AF_UNIX, -1)
        if event in ("socket.connect", "socket.bind", "socket.sendto"):
            return isinstance(args[1], str) and is_inside(args[1])
        return event not in _FORBIDDEN

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not may(event, args):
            raise PermissionError(errno.EACCES, f"{event} outside of {inside}")

    sys.addaudithook(hook)
