# SPDX-License-Identifier: GPL-2.0-only
"""Rows of the table that requests are answered from (fuse_loop.py says what they are): compiled, for the loop that
answers, and for Python, which fills them (fuse_table.py)."""

import os
from typing import Any, cast

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from fs.fuse_layout import HIDES_SIZE, NR_SLOTS, NR_STORES, SHOWS_MEMORY, Counts, Table
from kernelsim.attr import Changes
from kernelsim.jit import F, i64, njit

_STORES, _MEMORY_TURNS = Changes.STORES, Changes.MEMORY_TURNS
_PAGE = 4096
_ACCMODE, _O_WRONLY = os.O_ACCMODE, os.O_WRONLY

_address = types.uintp
_c_memcpy = types.ExternalFunction("memcpy", types.uintp(_address, _address, types.uintp))
_c_free = types.ExternalFunction("free", types.void(_address))
_c_lock = types.ExternalFunction("pthread_mutex_lock", types.int32(_address))
_c_unlock = types.ExternalFunction("pthread_mutex_unlock", types.int32(_address))


def njit_brief(function: F) -> F:
    """For what Python calls and is over before the interpreter's lock could be dropped and had again: it is kept."""
    return cast(F, numba.njit(cache=True, _nrt=False)(function))


@njit
def lock(table: Table) -> None:
    _c_lock(table[0].guard.ctypes.data)


@njit
def unlock(table: Table) -> None:
    _c_unlock(table[0].guard.ctypes.data)


@njit
def take_row(table: Table, index: int, flags: int) -> int:
    """A row for an open file of a slot; there is one."""
    row: int = table[0].free_file
    file, slot = table[0].files[row], table[0].slots[index]
    table[0].free_file = file.next
    table[0].nr_taken += 1
    file.slot, file.text, file.open_flags, file.is_quick = index, -1, flags, 1
    slot.nr_open += 1
    if (flags & _ACCMODE) != _O_WRONLY and slot.traits & HIDES_SIZE:
        slot.nr_readers += 1
    return row


@njit
def use(user: Any, table: Table, text: int) -> None:
    """Let a slot or a file point at another text, or with -1 at none."""
    if text >= 0:
        table[0].texts[text].nr_users += 1
    if user.text >= 0:
        before = table[0].texts[user.text]
        before.nr_users -= 1
        if before.is_own and not before.nr_users:
            _c_free(before.address)
            before.is_own = 0
    user.text = text


@njit
def free_text(table: Table) -> int:
    """A row for a text; there is one."""
    text = 0
    while table[0].texts[text].nr_users:
        text += 1
    return text


@njit
def close_row(table: Table, row: int) -> None:
    file = table[0].files[row]
    slot = table[0].slots[file.slot]
    use(file, table, -1)
    slot.nr_open -= 1
    if (file.open_flags & _ACCMODE) != _O_WRONLY and slot.traits & HIDES_SIZE:
        slot.nr_readers -= 1
    table[0].nr_taken -= 1
    file.next, file.is_quick = table[0].free_file, 0
    table[0].free_file = row


# What Python does to the table, with the turn.


@njit_brief
def enter(table: Table, nodeid: int, by_owner: int, by_anyone: int, traits: int, lo: int, hi: int, flags: int) -> int:
    """A file is opened, and its next opens shall be answered here -> the row of this one.

    -1: another file is in its place and open, or all rows are taken.
    """
    index, row = nodeid & (NR_SLOTS - 1), -1
    slot = table[0].slots[index]
    lock(table)
    if (slot.nodeid == nodeid or not slot.nr_open) and table[0].free_file >= 0:
        if slot.nodeid != nodeid:
            use(slot, table, -1)
            slot.has_form = 0
        slot.nodeid, slot.is_known, slot.by_owner, slot.by_anyone = nodeid, 1, by_owner, by_anyone
        slot.traits, slot.lo, slot.hi = traits, lo, hi
        row = take_row(table, index, flags)
    unlock(table)
    return row


@njit_brief
def forget(table: Table, nodeid: int) -> None:
    """A file went, or got another mode."""
    slot = table[0].slots[nodeid & (NR_SLOTS - 1)]
    lock(table)
    if slot.nodeid == nodeid:
        slot.is_known = 0
        use(slot, table, -1)
    unlock(table)


@njit_brief
def put_text(
    table: Table,
    counts: Counts,
    row: int,
    turns: int,
    stores: int,
    sets: int,
    content: NDArray[np.uint8],
    nr_bytes: int,
) -> int:
    """A reader was given a text, which is the file's as of these if they still are the counts -> the text's row.

    `content` has to stay where it is until another text gets that row.
    """
    file = table[0].files[row]
    slot = table[0].slots[file.slot]
    lock(table)
    text = free_text(table)
    table[0].texts[text].address, table[0].texts[text].nr_bytes = content.ctypes.data, nr_bytes
    use(file, table, text)
    use(slot, table, text)
    no_stores = stores == counts[_STORES]
    slot.turns = turns if no_stores or slot.traits & SHOWS_MEMORY else -1
    slot.sets, slot.stores = sets if no_stores else -1, stores
    slot.read_at = counts[_MEMORY_TURNS]
    unlock(table)
    return text


@njit_brief
def renew_text(table: Table, counts: Counts, nodeid: int, content: NDArray[np.uint8], nr_bytes: int) -> int:
    """What a file's text will be when the turn of memory that is just ending is over -> the text's row, as `put_text`.

    -1: the file is not known here.
    """
    slot = table[0].slots[nodeid & (NR_SLOTS - 1)]
    lock(table)
    text = -1
    if slot.nodeid == nodeid and slot.is_known:
        text = free_text(table)
        table[0].texts[text].address, table[0].texts[text].nr_bytes = content.ctypes.data, nr_bytes
        use(slot, table, text)
        slot.turns, slot.stores = counts[_MEMORY_TURNS] + 1, table[0].nr_settled
    unlock(table)
    return text


@njit_brief
def put_form(table: Table, row: int, form: NDArray[Any]) -> int:
    """An open file's text can be made by this record of `form_dtype` -> its slot.

    What it points at has to stay where it is until another is put there, and nobody makes a text (`nr_rendering`).
    """
    index: int = table[0].files[row].slot
    lock(table)
    _c_memcpy(table[0].forms.ctypes.data + index * form.itemsize, form.ctypes.data, form.itemsize)
    table[0].slots[index].has_form = 1
    unlock(table)
    return index


@njit_brief
def own_text(table: Table, row: int, into: NDArray[np.uint8]) -> int:
    """Copy the text that an open file's reader is at, if it was made here -> its bytes; -1: it was not."""
    file, nr_bytes = table[0].files[row], -1
    lock(table)
    if file.text >= 0 and table[0].texts[file.text].is_own:
        nr_bytes = table[0].texts[file.text].nr_bytes
        _c_memcpy(into.ctypes.data, table[0].texts[file.text].address, nr_bytes)
    unlock(table)
    return nr_bytes


@njit_brief
def take_stores(table: Table, counts: Counts, into: NDArray[np.int64]) -> int:
    """Move what was stored and is not set yet, (nodeid, value) in its order -> how many."""
    lock(table)
    first, nr = table[0].nr_settled, counts[_STORES] - table[0].nr_settled
    for at in range(nr):
        store = table[0].stores[(first + at) & (NR_STORES - 1)]
        into[at, 0], into[at, 1] = store.nodeid, store.value
    table[0].nr_settled = counts[_STORES]
    unlock(table)
    return i64(nr)


@njit_brief
def hand_over(table: Table, row: int) -> None:
    """From now on an open file is Python's; its row stays taken."""
    lock(table)
    table[0].files[row].is_quick = 0
    unlock(table)


@njit_brief
def close(table: Table, row: int) -> None:
    """The end of one that was handed over."""
    lock(table)
    close_row(table, row)
    unlock(table)


@njit_brief
def next_far_out(table: Table) -> int:
    """A position beyond all that were taken before."""
    lock(table)
    table[0].far_out += _PAGE
    position: int = table[0].far_out
    unlock(table)
    return position
