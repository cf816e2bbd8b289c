# SPDX-License-Identifier: GPL-2.0-only
"""Python's side of the table that fuse_loop.py answers from: what gets into it, and open files that come out of it.

All of this is called with the turn, but `settle`, `forget` and `renew`, which are called with the machine. A text goes
in with the number of the turn of the machine before which it was begun to be made; if that is still the number when it
is there, nothing can have changed it meanwhile.
"""

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fs import fuse_layout as layout
from fs import fuse_rows as rows
from fs import slices
from fs.kernfs import OpenFile, Tree
from fs.rules import RULES
from kernelsim.attr import Changes, CounterText, File, Flavour, Int, Node, nr_values_set

_MAX_MADE = 256
_MAX_RENEWED = 8
_MAX_UNREAD = 32
"""Turns of memory after which a text that nobody reads is not made anew."""
_MAX_RENEWAL_NS, _MAX_SLOW = 200_000, 3
"""CPU time beyond which a text takes too long to be made for others, if it does more than so many times in a row."""
_NO_NUMBER, _NO_STORE = Int(0, 0), (0, 0)
_LARGEST = 2**63 - 1


class Now(NamedTuple):
    """Turns of the machine and of its memory, stores, and values that were set: how many there were."""

    turns: int
    memory_turns: int
    stores: int
    sets: int


class QuickFiles:
    """Files and open files that are answered without Python.

    tree    what is served
    node    the node of a nodeid that the kernel knows
    """

    def __init__(self, tree: Tree, node: Callable[[int], Node], far_out: int, *, is_used: bool = True) -> None:
        self._tree = tree
        self._node = node
        self._is_used = is_used
        self._changes = tree.changes
        self._counts = tree.changes.counts
        self._made: dict[tuple[int, int], OpenFile] = {}
        self._texts: list[bytes] = [b""] * layout.NR_TEXTS
        self._texts_guard = threading.Lock()  # so that a row of the table is never another's before the list says so
        self._renewed: dict[int, File] = {}
        self._nr_slow: Counter[int] = Counter()  # times in a row that it took long
        self._own_text = np.zeros(layout.MAX_TEXT, dtype=np.uint8)
        self._forms: dict[int, CounterText] = {}
        self._old_forms: list[CounterText] = []
        self._plain: dict[int, File] = {}
        self._stores = np.zeros((layout.NR_STORES, 2), dtype=np.int64)
        self.counts = np.frombuffer(self._counts, dtype=np.int64)
        self.table = layout.make_table(tree.uid, far_out)
        self.table["nr_settled"], self.table["kept_at"] = self._changes.nr_settled, tree.stores_at
        self.table["nr_values_set_at"] = np.frombuffer(nr_values_set, dtype=np.int64).ctypes.data
        slices.set_up(self.table)
        self._changes.settle, self._changes.forget, self._changes.renew = self.settle, self.forget, self.renew
        slots, files = self.table[0]["slots"], self.table[0]["files"]
        self._nr_taken, self._nr_rendering = self.table["nr_taken"].item, self.table["nr_rendering"].item
        self._nodeid_of, self._nr_readers, self._read_at, self._has_form = (
            slots[name].item for name in ("nodeid", "nr_readers", "read_at", "has_form")
        )
        self._slot_of, self._text_of, self._flags_of, self._is_quick = (
            files[name].item for name in ("slot", "text", "open_flags", "is_quick")
        )

    def has_room(self) -> bool:
        """Are there rows that ordinary users may have?"""
        return bool(self._nr_taken(0) < layout.NR_SHARED)

    def open(self, nodeid: int, file: OpenFile, flags: int) -> int | None:
        """A handle of the table's for a file that was just opened, if it can have one."""
        node = file.node
        if not self._is_used or node.attr.is_stream:
            return None
        names = self._counts[Changes.NAMES]
        kind, number = node.attr.kind, _NO_NUMBER
        if self._tree.settles and node.flavour is Flavour.SYSCTL and node.attr.plain and isinstance(kind, Int):
            number = kind
            self._plain[nodeid] = node
        if not node.alive:
            return None
        rights, traits = self._tree.access.rights(node), _traits(node, number)
        row = rows.enter(self.table, nodeid, *rights, traits, number.lo, min(number.hi, _LARGEST), flags)
        if names != self._counts[Changes.NAMES]:  # it may have become wrong before it was there to be forgotten
            self.forget(nodeid)
        return layout.QUICK | row if row >= 0 else None

    def open_file(self, handle: int) -> OpenFile:
        """What a handle of the table's stands for, for one request. Raises EBADF for any other handle.

        All open files of one node and the same flags differ in their texts only, so one object does for them, in turns.
        """
        if not handle & layout.QUICK:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        row = handle ^ layout.QUICK
        if row >= layout.NR_FILES or not self._is_quick(row):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        nodeid, flags = self._nodeid_of(self._slot_of(row)), self._flags_of(row)
        file = self._made.pop((nodeid, flags), None)
        if file is None:
            node = self._node(nodeid)
            assert isinstance(node, File)
            file = OpenFile(self._tree, node, flags)
        with self._texts_guard:
            file.read_on(self._text_at(row))
        return file

    def _text_at(self, row: int) -> bytes | None:
        """The one that the reader of an open file is at."""
        nr_bytes = rows.own_text(self.table, row, self._own_text)
        if nr_bytes >= 0:
            return self._own_text[:nr_bytes].tobytes()
        text = self._text_of(row)
        return self._texts[text] if text >= 0 else None

    def give_back(self, handle: int, file: OpenFile) -> None:
        """The request is over, and what `open_file` gave is not kept."""
        if len(self._made) >= _MAX_MADE:
            self._made.clear()
        row = handle ^ layout.QUICK
        self._made[self._nodeid_of(self._slot_of(row)), self._flags_of(row)] = file

    def was_read(self, handle: int, file: OpenFile, now: Now) -> bool:
        """A reader is at this file's text, which was begun to be made when the counts were these.

        False: the table cannot have it.
        """
        text = file.text
        if text is None or len(text) > layout.MAX_TEXT:
            return False
        memory, counts_turns = file.node.attr.shows_memory, self._tree.counts_turns
        at, then = (Changes.MEMORY_TURNS, now.memory_turns) if memory else (Changes.TURNS, now.turns)
        turns, sets = (then if then == self._counts[at] else -1, now.sets) if counts_turns else (-1, -1)
        content, row = np.frombuffer(text or b"\0", dtype=np.uint8), handle ^ layout.QUICK
        with self._texts_guard:
            number = rows.put_text(self.table, self.counts, row, turns, now.stores, sets, content, len(text))
            self._texts[number] = text
        had_form = self._has_form(self._slot_of(row))
        if file.node.counter_text is not None and counts_turns:
            self._put_form(row, file.node.counter_text)
        if memory and counts_turns and (had_form or file.node.counter_text is None):
            # It could not be made without us, for somebody has the machine: he might be at it all the time.
            if len(self._renewed) >= _MAX_RENEWED:
                self._renewed.clear()
            self._renewed[file.node.ino] = file.node
        return True

    def _put_form(self, row: int, text: CounterText) -> None:
        """From now on the text of that open file's node can be made without us."""
        slot = self._slot_of(row)
        if (self._forms.get(slot) is text and self._has_form(slot)) or text.room_bytes > layout.MAX_TEXT:
            return
        rows.put_form(self.table, row, text.form)
        if slot in self._forms:
            self._old_forms.append(self._forms[slot])
        self._forms[slot] = text
        if not self._nr_rendering(0):
            self._old_forms.clear()

    def renew(self) -> None:
        """A turn of memory ends: make those of its texts that were read a short while ago."""
        for nodeid, file in tuple(self._renewed.items()):
            text = self._text_to_renew(file)
            if text is None:
                self._renewed.pop(nodeid, None)
                continue
            content = np.frombuffer(text, dtype=np.uint8)
            with self._texts_guard:
                row = rows.renew_text(self.table, self.counts, nodeid, content, len(text))
                if row >= 0:
                    self._texts[row] = text

    def _text_to_renew(self, file: File) -> bytes | None:
        """None: it is not read any more, takes too long, or cannot be made: then who reads it next is told."""
        slot = file.ino & (layout.NR_SLOTS - 1)
        if self._nodeid_of(slot) != file.ino or not file.alive:
            return None
        if (
            self._counts[Changes.MEMORY_TURNS] - self._read_at(slot) > _MAX_UNREAD
            or self._nr_slow[file.ino] > _MAX_SLOW
        ):
            return None
        begin_ns = time.thread_time_ns()
        try:
            text = self._tree.text_of(file)
        except Exception:
            return None
        is_slow = time.thread_time_ns() - begin_ns > _MAX_RENEWAL_NS
        self._nr_slow[file.ino] = self._nr_slow[file.ino] + 1 if is_slow else 0
        return text or None

    def settle(self) -> list[tuple[str, int]]:
        """Set the values that were stored, in their order -> (path, value) of each. For whoever holds the machine."""
        nr, done = rows.take_stores(self.table, self.counts, self._stores), []
        stores = self._stores[:nr].tolist()
        for (nodeid, value), (following, _) in pairwise([*stores, _NO_STORE]):
            if nodeid != following:  # of several in a row nobody can tell
                file = self._plain[nodeid]
                file.attr.settle(file.kobj, value)
                done.append((file.path, value))
        self._changes.nr_settled += nr
        return done

    def forget(self, nodeid: int) -> None:
        """A file went or got another mode."""
        rows.forget(self.table, nodeid)

    def hand_over(self, handle: int) -> None:
        """From now on all requests for an open file come to us, so what was made up for it is its own."""
        rows.hand_over(self.table, handle ^ layout.QUICK)

    def close(self, handle: int) -> None:
        """The end of one that was handed over."""
        rows.close(self.table, handle ^ layout.QUICK)

    @property
    def now(self) -> Now:
        counts = self._counts
        turns, memory_turns, stores = counts[Changes.TURNS], counts[Changes.MEMORY_TURNS], counts[Changes.STORES]
        return Now(turns, memory_turns, stores, nr_values_set[0])

    def far_out(self) -> int:
        """A position beyond all that were taken before: only such a byte moves the end."""
        return rows.next_far_out(self.table)

    def has_readers(self, nodeid: int) -> bool:
        """Has anybody a file open whose text is longer than it says?"""
        slot = nodeid & (layout.NR_SLOTS - 1)
        return bool(self._nodeid_of(slot) == nodeid and self._nr_readers(slot))


def _traits(node: File, number: Int) -> int:
    attr = node.attr
    return (
        layout.HIDES_SIZE * (attr.readable and not RULES[node.flavour].file_size)
        | layout.ONE_POSITION * (node.flavour is Flavour.SYSCTL)
        | layout.TRUNCATABLE * attr.truncatable
        | layout.SHOWS_ITSELF * attr.shows_itself
        | layout.SHOWS_MEMORY * attr.shows_memory
        | layout.PLAIN * (number is not _NO_NUMBER)
        | layout.SETS_OTHERS * attr.sets_others
    )
