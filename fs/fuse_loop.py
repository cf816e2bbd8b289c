# SPDX-License-Identifier: GPL-2.0-only
"""The compiled part of fuse_dev: opens, reads, writes and closes that need no Python, answered without it.

Theory of operation
    Most requests are for a few small files, by programs that read them over and over, and mean open, read, close.
    Python takes ten times as long to answer those as the kernel takes to bring them, and does it on one CPU only. So
    each serving thread is in `serve` most of the time, without the interpreter's lock. Requests that a table has the
    answer to are answered there, on as many CPUs as there are threads; with any other the thread takes the turn and
    goes back to Python (fuse_dev.py), which fills the table (fuse_table.py). If another thread has it, the request is
    set aside for that one (fuse_turn.py): ready answers wait for nothing. The reply that Python made is sent here too,
    as the thread comes back, without the interpreter's lock.

    The table has three kinds of rows.
    - A slot is a file that was opened before: who may open it how, and its text if one was made. Where the file's
      inode number says; a file whose slot another has open is answered by Python.
    - A file is an open file, the handle its index. Its text is the one its reader began to read.
    - A text is bytes that Python keeps, and how many slots and files point at it. Only a text without any is dropped.

    A slot holds until its file goes or gets another mode, its text as long as no turn of the machine began in which it
    could have changed (kernelsim.attr.Changes). A turn is counted before anything is changed in it, and nobody hears
    of a change before the turn in which it was made has begun; so who reads after he was told of a change gets a text
    from after it. Who reads meanwhile gets the old one or the new one. A text that is just a value holds as long as
    nobody set any (kernelsim.attr.nr_values_set), so those who read a sysctl do not wait for a long turn.

    A text that is numbers of the machine (kernelsim/seq_counters.py) is made here, too, while nobody has the machine:
    by a seqlock whose sequence is the turns. If none is under way before, and none began until the text is there, it
    is of one moment. Else Python asks for the machine.

    Texts of the kernel's memory hold until such a turn is over, before which nobody hears of its changes either. Those
    that were read a short while ago are made anew then by whoever had the turn: who reads them does not wait for those
    who change memory, be they at it all the time.

    A whole number written into a file that is just that number (Attr.plain) goes into a list, and is taken with that.
    Whoever gets the machine next sets it, before he does or looks at anything else, so nobody can tell that it was not
    set at once. Only plain decimal numbers are read here; with all else that a sysctl takes Python has to deal.
    Where the machine is kept, it is put where it outlives the daemon, too, before the answer (fuse_stores.py).

    `guard` is held for the table, for no longer than a text takes to copy, and never in a call that could wait; the
    turn is held while Python answers.
"""

import errno
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from fs import fuse_abi as abi
from fs.fuse_abi import Opcode
from fs.fuse_layout import (
    FORM_AT,
    HIDES_SIZE,
    MAX_DIGITS,
    MAX_REQUEST,
    MAX_TEXT,
    NOTIFY_AT,
    NR_FILES,
    NR_NOTIFY,
    NR_SHARED,
    NR_SLOTS,
    NR_STORES,
    ONE_POSITION,
    PLAIN,
    QUICK,
    REPLY_BODY,
    REQUEST_AT,
    SETS_OTHERS,
    SHOWS_ITSELF,
    SHOWS_MEMORY,
    TRUNCATABLE,
    Buffer,
    Counts,
    Table,
    make_buffer,
    make_table,
)
from fs.fuse_rows import (
    close,
    close_row,
    enter,
    forget,
    free_text,
    hand_over,
    lock,
    next_far_out,
    own_text,
    put_form,
    put_text,
    renew_text,
    take_row,
    take_stores,
    unlock,
    use,
)
from fs.fuse_stores import are_taken, keep
from fs.fuse_turn import give_turn, interrupt_aside, is_set_aside, keeps_turn, take_aside, take_turn, takes_over
from fs.slices import be_ready, set_to_work
from kernelsim.attr import NR_COUNTS, Changes
from kernelsim.jit import i64, njit
from kernelsim.raw_memory import load as load_word
from kernelsim.seq_counters import form_dtype, render

_TURNS, _STORES, _MEMORY_TURNS, _ENDED = Changes.TURNS, Changes.STORES, Changes.MEMORY_TURNS, Changes.ENDED
_PAGE = 4096
READ, WRITE = 4, 2
_ACCMODE, _O_RDONLY, _O_WRONLY, _O_TRUNC, _O_APPEND = (
    *(os.O_ACCMODE, os.O_RDONLY, os.O_WRONLY, os.O_TRUNC, os.O_APPEND),
)
_OP_OPEN, _OP_READ, _OP_WRITE, _OP_RELEASE = (
    int(op) for op in (Opcode.OPEN, Opcode.READ, Opcode.WRITE, Opcode.RELEASE)
)
_NEWLINE, _DIGIT_0, _DIGIT_9 = b"\n09"
_OPEN_FLAGS = abi.FOPEN_DIRECT_IO | abi.FOPEN_NOFLUSH
_EINVAL = errno.EINVAL
_NR_HEADER = abi.IN_HEADER.size
_NR_SHORTEST, _NR_READ = _NR_HEADER + abi.OPEN_IN.size, _NR_HEADER + abi.READ_IN.size
_NR_OPEN_OUT, _NR_WRITE_OUT = abi.OPEN_OUT.size, abi.WRITE_OUT.size
_NR_WRITE_IN = abi.IN_HEADER.size + abi.WRITE_IN.size

_address, _size = types.uintp, types.uintp
_c_read: Callable[..., int] = types.ExternalFunction("read", types.intp(types.int32, _address, _size))
_c_write: Callable[..., int] = types.ExternalFunction("write", types.intp(types.int32, _address, _size))
_c_memcpy = types.ExternalFunction("memcpy", types.uintp(_address, _address, _size))
_c_errno: Callable[[], int] = types.ExternalFunction("__errno_location", types.uintp())
_c_malloc: Callable[[int], int] = types.ExternalFunction("malloc", types.uintp(_size))
_c_free = types.ExternalFunction("free", types.void(_address))

BAD_REPLY = -(1 << 20)


@njit
def serve(fd: int, buffer: Buffer, table: Table, counts: Counts, has_turn: bool, nr_reply: int) -> int:
    """Send the reply of so many bytes that Python made, and answer requests until one comes that cannot be answered
    here -> its bytes; the turn is taken then.

    0, -errno: there are no more to read, or none could be read. BAD_REPLY: the kernel did not take the reply.
    """
    reply = buffer.ctypes.data
    goes_on = keeps_turn(table) if has_turn else False
    if nr_reply and _c_write(fd, reply, nr_reply) < 0:
        _c_memcpy(reply + REQUEST_AT, _c_errno(), 4)
        if buffer[0].errno == _EINVAL:
            if not goes_on:
                take_turn(table)
            return BAD_REPLY
    if goes_on or (not has_turn and takes_over(table)):
        nr = take_aside(buffer, table)
        if nr:
            set_to_work(buffer, table)
            return nr
    be_ready(buffer, table)
    while True:
        nr = _c_read(fd, reply + REQUEST_AT, MAX_REQUEST)
        if nr < 0:
            _c_memcpy(reply + REQUEST_AT, _c_errno(), 4)
            nr = -int(buffer[0].errno)
        is_whole = nr >= _NR_HEADER and nr == buffer[0].length
        nr_reply = _answer(fd, buffer, table, counts) if is_whole and nr >= _NR_SHORTEST else 0
        if not nr_reply:
            if not is_whole:
                take_turn(table)
            elif is_set_aside(buffer, table, nr):
                continue
            set_to_work(buffer, table)
            return nr
        buffer[0].reply_bytes, buffer[0].reply_error, buffer[0].reply_unique = nr_reply, 0, buffer[0].unique
        _c_write(fd, reply, nr_reply)


@njit
def _answer(fd: int, buffer: Buffer, table: Table, counts: Counts) -> int:
    """Make the reply to what was read, all but its header -> its bytes; 0: Python has to."""
    opcode = buffer[0].opcode
    if opcode == _OP_READ:
        return _read(buffer, table, counts)
    if opcode == _OP_OPEN:
        return _open(fd, buffer, table)
    if opcode == _OP_WRITE:
        return _write(buffer, table, counts)
    if opcode == _OP_RELEASE:
        return _release(buffer, table)
    return 0


@njit
def _access(uid: int, slot: Any, table: Table) -> int:
    """What a user may do with a file."""
    access: int = slot.by_owner if uid == 0 or uid == table[0].owner_uid else slot.by_anyone
    return access


@njit
def _has_room(uid: int, table: Table) -> bool:
    """Is there a row for an open file of that user?"""
    is_limited = uid != 0 and uid != table[0].owner_uid
    return bool(table[0].nr_taken < (NR_SHARED if is_limited else NR_FILES))


@njit
def _open(fd: int, buffer: Buffer, table: Table) -> int:
    nodeid, flags = buffer[0].nodeid, int(buffer[0].open_flags)
    accmode = flags & _ACCMODE
    access = READ if accmode == _O_RDONLY else WRITE if accmode == _O_WRONLY else READ | WRITE
    index = nodeid & (NR_SLOTS - 1)
    slot = table[0].slots[index]
    lock(table)
    known = slot.nodeid == nodeid and slot.is_known and _has_room(buffer[0].uid, table)
    truncates = flags & _O_TRUNC and slot.traits & TRUNCATABLE
    if not known or access & ~_access(buffer[0].uid, slot, table) or truncates:
        unlock(table)
        return 0
    buffer[0].reply_handle = QUICK | take_row(table, index, flags)
    buffer[0].reply_flags = _OPEN_FLAGS
    table[0].far_out += _PAGE
    buffer[0].notify_nodeid, buffer[0].notify_position = nodeid, table[0].far_out
    unlock(table)
    if access & READ and slot.traits & HIDES_SIZE:
        _c_write(fd, buffer.ctypes.data + NOTIFY_AT, NR_NOTIFY)  # fuse_dev.py says why
    return REPLY_BODY + _NR_OPEN_OUT


@njit
def _read(buffer: Buffer, table: Table, counts: Counts) -> int:
    handle, offset = buffer[0].handle, buffer[0].offset
    if not handle & QUICK or buffer[0].length < _NR_READ or offset < 0:
        return 0
    row = handle & (NR_FILES - 1)
    file = table[0].files[row]
    lock(table)
    slot = table[0].slots[file.slot]
    nr_reply, turn = 0, -1
    if file.is_quick and _access(buffer[0].uid, slot, table) & READ:
        if offset and slot.traits & ONE_POSITION:
            nr_reply = REPLY_BODY
        elif _has_text(file, slot, table, counts, offset):
            nr_reply = _put_part(buffer, table, file)
        elif slot.has_form and slot.is_known:
            turn = _begin_rendering(buffer, table, counts, file.slot)
    unlock(table)
    return _render(buffer, table, counts, row, turn) if turn >= 0 else nr_reply


@njit
def _put_part(buffer: Buffer, table: Table, file: Any) -> int:
    """Answer with what was asked for of the text that a reader is at."""
    text, offset = table[0].texts[file.text], buffer[0].offset
    nr = max(min(buffer[0].size, text.nr_bytes - offset), 0)
    _c_memcpy(buffer.ctypes.data + REPLY_BODY, text.address + offset, nr)
    return i64(REPLY_BODY + nr)


@njit
def _begin_rendering(buffer: Buffer, table: Table, counts: Counts, slot: int) -> int:
    """Take the form of a slot's text -> the turn that was the last one; -1: somebody has the machine, or is to."""
    turn: int = counts[_TURNS]
    if counts[_ENDED] != turn or counts[_STORES] != table[0].nr_settled:
        return -1
    nr_bytes = table[0].forms.itemsize
    _c_memcpy(buffer.ctypes.data + FORM_AT, table[0].forms.ctypes.data + slot * nr_bytes, nr_bytes)
    table[0].nr_rendering += 1
    return turn


@njit
def _render(buffer: Buffer, table: Table, counts: Counts, row: int, turn: int) -> int:
    """Make the text of an open file, and answer with it if nobody has had the machine since `turn`; else 0."""
    form = buffer[0].form
    room = _c_malloc(form.text_bytes + 8 * form.nr_values)
    nr_bytes = render(form, i64(room)) if room else -1
    file, nr_reply = table[0].files[row], 0
    lock(table)
    slot = table[0].slots[file.slot]
    table[0].nr_rendering -= 1
    is_whole = nr_bytes >= 0 and counts[_TURNS] == turn and counts[_STORES] == table[0].nr_settled
    if is_whole and file.is_quick:
        text = free_text(table)
        made = table[0].texts[text]
        made.address, made.nr_bytes, made.is_own = room, nr_bytes, 1
        use(file, table, text)
        use(slot, table, text)
        # No turn of memory has ended since either, or another would have begun.
        slot.turns = counts[_MEMORY_TURNS] if slot.traits & SHOWS_MEMORY else turn
        slot.stores, slot.read_at = counts[_STORES], counts[_MEMORY_TURNS]
        nr_reply = _put_part(buffer, table, file)
    unlock(table)
    if not nr_reply:
        _c_free(room)
    return nr_reply


@njit
def _has_text(file: Any, slot: Any, table: Table, counts: Counts, offset: int) -> bool:
    """Does an open file have the text to read from? From its start that is the slot's, if it still holds."""
    if offset and file.text >= 0:
        return True
    if slot.text < 0 or not slot.is_known:
        return False
    if slot.traits & SHOWS_ITSELF:
        holds = slot.sets == load_word(table[0].nr_values_set_at) and slot.stores >= table[0].nr_others_set
    elif slot.traits & SHOWS_MEMORY:
        holds = slot.turns == counts[_MEMORY_TURNS] and slot.stores >= table[0].nr_others_set
    else:
        holds = slot.turns == counts[_TURNS] and slot.stores == counts[_STORES]  # it may go by one of them
    if not holds:
        return False
    use(file, table, slot.text)
    slot.read_at = counts[_MEMORY_TURNS]
    return True


@njit
def _write(buffer: Buffer, table: Table, counts: Counts) -> int:
    handle, nr_bytes = buffer[0].handle, buffer[0].size
    if not handle & QUICK or buffer[0].offset or buffer[0].length != _NR_WRITE_IN + nr_bytes:
        return 0
    value = _number(buffer[0].octets, nr_bytes)
    if value < 0:
        return 0
    file = table[0].files[handle & (NR_FILES - 1)]
    lock(table)
    slot = table[0].slots[file.slot]
    is_taken = (
        file.is_quick
        and slot.traits & PLAIN
        and not file.open_flags & _O_APPEND
        and slot.is_known
        and _access(buffer[0].uid, slot, table) & WRITE
        and slot.lo <= value <= slot.hi
        and counts[_STORES] - table[0].nr_settled < NR_STORES
        and are_taken(table)
    )
    if is_taken:
        store = table[0].stores[counts[_STORES] & (NR_STORES - 1)]
        store.number, store.nodeid, store.value = counts[_STORES], slot.nodeid, value
        if table[0].kept_at:
            keep(table, store)
        counts[_STORES] += 1
        if slot.traits & SETS_OTHERS:
            table[0].nr_others_set = counts[_STORES]
        use(slot, table, -1)
    unlock(table)
    buffer[0].reply_handle = nr_bytes
    return REPLY_BODY + _NR_WRITE_OUT if is_taken else 0


@njit
def _number(octets: Any, nr_bytes: int) -> int:
    """What a plain decimal number, with or without a newline, comes to; -1 for anything else."""
    if not 0 < nr_bytes <= MAX_DIGITS:
        return -1
    nr_digits = nr_bytes - (octets[nr_bytes - 1] == _NEWLINE)
    if not nr_digits or (octets[0] == _DIGIT_0 and nr_digits > 1):  # octal, in some files
        return -1
    value = 0
    for at in range(nr_digits):
        if not _DIGIT_0 <= octets[at] <= _DIGIT_9:
            return -1
        value = value * 10 + i64(octets[at]) - _DIGIT_0
    return value


@njit
def _release(buffer: Buffer, table: Table) -> int:
    handle = buffer[0].handle
    if not handle & QUICK:
        return 0
    row = handle & (NR_FILES - 1)
    lock(table)
    is_quick = table[0].files[row].is_quick
    if is_quick:
        close_row(table, row)
    unlock(table)
    return REPLY_BODY if is_quick else 0


def load() -> None:
    """Have all of this compiled, or loaded from where it was kept."""
    table, (buffer, _, _), counts = make_table(0, 0), make_buffer(), np.zeros(NR_COUNTS, dtype=np.int64)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    serve(null, buffer, table, counts, False, 0)  # finds the end of the file
    os.close(null)
    give_turn(table)
    take_turn(table)
    interrupt_aside(table, 0)
    row = enter(table, abi.ROOT_ID, READ, READ, 0, 0, 0, 0)
    forget(table, abi.ROOT_ID)
    put_text(table, counts, row, 0, 0, 0, np.frombuffer(b"text", dtype=np.uint8), 4)
    renew_text(table, counts, abi.ROOT_ID, np.frombuffer(b"text", dtype=np.uint8), 4)
    put_form(table, row, np.zeros(1, dtype=form_dtype))
    own_text(table, row, np.zeros(MAX_TEXT, dtype=np.uint8))
    take_stores(table, counts, np.zeros((NR_STORES, 2), dtype=np.int64))
    hand_over(table, row)
    close(table, row)
    next_far_out(table)
