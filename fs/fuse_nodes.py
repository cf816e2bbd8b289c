# SPDX-License-Identifier: GPL-2.0-only
"""Nodes that the kernel knows by number, from their first LOOKUP until it forgets them; and names in requests."""

import errno

from fs import fuse_abi as abi
from kernelsim.attr import Node

_PATHS = (b"", b".", b"..")  # which the kernel resolves itself


class KnownNodes:
    """By nodeid, which is the inode number."""

    def __init__(self, root: Node) -> None:
        self._nodes: dict[int, Node] = {abi.ROOT_ID: root}
        self._nr_lookups: dict[int, int] = {}

    def get(self, nodeid: int) -> Node:
        """Be it alive or not. Raises ESTALE for one that is not known."""
        node = self._nodes.get(nodeid)
        if node is None:
            raise OSError(errno.ESTALE, "not known")
        return node

    def alive(self, nodeid: int) -> Node:
        """Raises ESTALE, and ENOENT for one that was removed."""
        node = self.get(nodeid)
        if not node.alive:
            raise OSError(errno.ENOENT, "removed")
        return node

    def look_up(self, node: Node) -> None:
        """The kernel is told of a node once more."""
        self._nodes[node.ino] = node
        self._nr_lookups[node.ino] = self._nr_lookups.get(node.ino, 0) + 1

    def forget(self, nodeid: int, nr_lookups: int) -> None:
        """It needs to know that often less of it."""
        left = self._nr_lookups.get(nodeid, 0) - nr_lookups
        if left > 0:
            self._nr_lookups[nodeid] = left
        elif nodeid != abi.ROOT_ID:
            self._nr_lookups.pop(nodeid, None)
            self._nodes.pop(nodeid, None)


def name_in(body: bytes) -> str:
    """The name that a body begins with. Raises EINVAL for one without end, and for what would be a path."""
    name, end, _ = body.partition(b"\0")
    if not end or b"/" in name or name in _PATHS:
        raise OSError(errno.EINVAL, "not a name")
    return name.decode("utf-8", "surrogateescape")
