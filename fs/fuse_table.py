# SPDX-License-Identifier: GPL-2.0-only
"""Python's side of the table that fuse_loop.py answers from: what gets into it, and open files that come out of it.

All of this is called with the turn. A text goes in with the number of the turn of the machine before which it was
begun to be made; if that is still the number when it is there, nothing can have changed it meanwhile.
"""

import errno
import os
from collections.abc import Callable

import numpy as np

from fs import fuse_loop as loop
from fs.kernfs import OpenFile, Tree
from fs.rules import RULES
from kernelsim.attr import File, Flavour, Node

_MAX_MADE = 256


class QuickFiles:
    """Files and open files that are answered without Python.

    tree    what is served
    node    the node of a nodeid that the kernel knows
    """

    def __init__(self, tree: Tree, node: Callable[[int], Node], far_out: int, *, is_used: bool = True) -> None:
        self._tree = tree
        self._node = node
        self._is_used = is_used
        self._counts = tree.changes.counts
        self._made: dict[tuple[int, int], OpenFile] = {}
        self._texts: list[bytes] = [b""] * loop.NR_TEXTS
        self.counts = np.frombuffer(self._counts, dtype=np.int64)
        self.table = loop.make_table(tree.uid, far_out)
        slots, files = self.table[0]["slots"], self.table[0]["files"]
        self._nodeid_of, self._nr_readers = slots["nodeid"].item, slots["nr_readers"].item
        self._slot_of, self._text_of, self._flags_of = (files[name].item for name in ("slot", "text", "open_flags"))

    def open(self, nodeid: int, file: OpenFile, flags: int) -> int | None:
        """A handle of the table's for a file that was just opened, if it can have one."""
        node = file.node
        if not self._is_used or node.attr.is_stream:
            return None
        names = self._counts[1]
        traits = loop.HIDES_SIZE * bool(not RULES[node.flavour].file_size and node.attr.readable)
        traits |= loop.ONE_POSITION * (node.flavour is Flavour.SYSCTL) | loop.TRUNCATABLE * node.attr.truncatable
        if not node.alive:
            return None
        row = loop.enter(self.table, nodeid, names, *self._tree.access(node), traits, flags)
        return loop.QUICK | row if row >= 0 else None

    def open_file(self, handle: int) -> OpenFile:
        """What a handle of the table's stands for, until the next request. Raises EBADF for any other handle.

        All open files of one node and the same flags differ in their texts only, so one object does for them.
        """
        if not handle & loop.QUICK:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        row = handle ^ loop.QUICK
        key = nodeid, flags = self._nodeid_of(self._slot_of(row)), self._flags_of(row)
        file = self._made.get(key)
        if file is None:
            node = self._node(nodeid)
            assert isinstance(node, File)
            if len(self._made) >= _MAX_MADE:
                self._made.clear()
            file = self._made[key] = OpenFile(self._tree, node, flags)
        text = self._text_of(row)
        file.read_on(self._texts[text] if text >= 0 else None)
        return file

    def was_read(self, handle: int, file: OpenFile, turn: int) -> bool:
        """A reader is at this file's text, which was begun to be made in that turn. False: the table cannot have it."""
        text = file.text
        if text is None or len(text) > loop.MAX_TEXT:
            return False
        fresh = turn if turn == self._counts[0] and self._tree.counts_turns else -1
        content = np.frombuffer(text or b"\0", dtype=np.uint8)
        self._texts[loop.put_text(self.table, handle ^ loop.QUICK, fresh, content, len(text))] = text
        return True

    def hand_over(self, handle: int) -> None:
        """From now on all requests for an open file come to us, so what was made up for it is its own."""
        row = handle ^ loop.QUICK
        loop.hand_over(self.table, row)
        self._made.pop((self._nodeid_of(self._slot_of(row)), self._flags_of(row)), None)

    def close(self, handle: int) -> None:
        """The end of one that was handed over."""
        loop.close(self.table, handle ^ loop.QUICK)

    @property
    def turn(self) -> int:
        """Number of the machine's turn that began last."""
        return self._counts[0]

    def far_out(self) -> int:
        """A position beyond all that were taken before: only such a byte moves the end."""
        return loop.next_far_out(self.table)

    def has_readers(self, nodeid: int) -> bool:
        """Has anybody a file open whose text is longer than it says?"""
        slot = nodeid & (loop.NR_SLOTS - 1)
        return bool(self._nodeid_of(slot) == nodeid and self._nr_readers(slot))
