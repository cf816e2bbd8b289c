# SPDX-License-Identifier: GPL-2.0-only
"""What is asked of the machine through its files, as plain data.

A request names what it is about by path and inode number, and holds everything else that its outcome depends on but who
asks. So it can be written down and done again: `Performer` takes it apart, whether it has just come in or is read
from a journal.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

# Verbs.
READ, READ_STREAM, WRITE, WRITE_STREAM, SKIP, TRUNCATE = (
    "read",
    "read-stream",
    "write",
    "write-stream",
    "skip",
    "truncate",
)
MKDIR, RMDIR, CHMOD, OPEN, RELEASE = "mkdir", "rmdir", "chmod", "open", "release"


class Request(NamedTuple):
    """One request. `changes`: it may change the machine; else it only looks, as far as is known beforehand."""

    verb: str
    path: str
    ino: int = 0
    """Of the file; a file of that path but another number is another one."""
    data: bytes = b""
    pos: int = 0
    """Offset of a stream, mode bits of a chmod, whether who opens is privileged."""
    size: int = 0
    """Bytes to read, or to take without effect."""
    flags: int = 0
    """Of an open(2); 1 for a read that will not wait."""
    user: int = 0
    """Number of the open file, where its attribute keeps something for each."""
    changes: bool = True
    kept: bool = False
    """It reads a text that is the same until somebody has held the machine (Attr.kept)."""
    apart: bool = False
    """It changes nothing of the kernel's memory (Kobject.apart)."""


@dataclass(frozen=True)
class Cred:
    """Who asks."""

    uid: int = 0
    gid: int = 0
    groups: Callable[[], frozenset[int]] = field(default=frozenset, compare=False)
    """Supplementary groups; asked for only where the answer depends on them."""
    pid: int = 0
    """Thread that asks, and its name; 0 and "" where that is not known."""
    comm: Callable[[], str] = field(default=str, compare=False)

    def in_group(self, gid: int) -> bool:
        return gid == self.gid or gid in self.groups()


ROOT = Cred()
