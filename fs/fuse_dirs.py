# SPDX-License-Identifier: GPL-2.0-only
"""Open directories of a FUSE connection, and their entries as READDIR wants them."""

import errno
import stat

from fs import fuse_abi as abi
from fs.kernfs import DirEntry, Tree
from fs.shares import Shares

ENTRY_BYTES = 128
"""What an entry of a list takes here, its name and its place in the list included; about."""


class OpenDirs:
    """Directories by handle. All of it is called with the turn."""

    def __init__(self, tree: Tree, shares: Shares) -> None:
        self._tree = tree
        self._shares = shares
        self._dirs: dict[int, tuple[str, list[DirEntry]]] = {}

    def open(self, handle: int, path: str, uid: int) -> None:
        """Raises ENFILE."""
        if not self._shares.open(handle, uid):
            raise OSError(errno.ENFILE, "too many")
        self._dirs[handle] = path, []

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Entries from number `offset` on; the list is made when it is read from the start. Raises EBADF, ENOMEM."""
        path, entries = self._of(handle)
        if offset == 0:
            entries = self._tree.readdir(path)
            if not self._shares.hold(handle, len(entries) * ENTRY_BYTES):
                entries = []
            self._dirs[handle] = path, entries
            if not entries:
                raise OSError(errno.ENOMEM, "too long a list")
        out = bytearray()
        for number, entry in enumerate(entries[offset:], offset + 1):
            name = entry.name.encode("utf-8", "surrogateescape")
            padded = len(name) + -len(name) % 8
            if len(out) + abi.DIRENT.size + padded > size:
                break
            out += abi.DIRENT.pack(entry.ino, number, len(name), stat.S_IFMT(entry.mode) >> 12) + name.ljust(
                padded, b"\0"
            )
        return bytes(out)

    def close(self, handle: int) -> None:
        """Raises EBADF."""
        self._of(handle)
        del self._dirs[handle]
        self._shares.close(handle)

    def _of(self, handle: int) -> tuple[str, list[DirEntry]]:
        found = self._dirs.get(handle)
        if found is None:
            raise OSError(errno.EBADF, "not open")
        return found
