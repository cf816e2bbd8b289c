# SPDX-License-Identifier: GPL-2.0-only
"""The turn, which a thread has while Python answers its request, and the requests that are set aside meanwhile.

Theory of operation
    Requests come in one line, so a thread that waited for the turn with a request in its hands would keep those behind
    it from being read, be their answers ready or not: a thousand clients that want something of Python would make all
    others wait for it. So nobody waits with a request: it is set aside, in a copy, and the thread reads on. Whoever has
    the turn takes what was set aside before he gives it away.

    Those who ask are served in turns: of all requests that are set aside the next is one of the side that has waited
    longest since one of its own was served, so that who asks for much at once waits for himself. A user is a side;
    requests that nobody waits for (a file was closed, a name forgotten) are one, and interrupts another.

    An interrupt says that a caller got a signal, be it one that kills him or SIGCHLD. His request, if it is set aside,
    is marked, and begun all the same: like a kernel's such calls, most never wait and so cannot be interrupted. One
    that would have to wait ends (fuse_threads.Request).

    What was set aside is never left alone: whoever gives the turn away has taken the last of it, or knows of somebody
    who is coming for the turn (`nr_coming`), or is told to send somebody (`give_turn`). All of this is decided with
    `guard` held, under which nothing is set aside either unless somebody else has the turn or is coming for it. Who is
    coming has waited, for the machine or a line in a log, and gets the turn before any request that is new.
"""

from collections.abc import Callable

from numba import types

from fs.fuse_abi import MARK_AT, Opcode
from fs.fuse_layout import MAX_ASIDE_BYTES, NR_ASIDE, NR_SIDES, REQUEST_AT, Buffer, Table, aside_dtype
from fs.fuse_rows import lock, njit_brief, unlock
from kernelsim.jit import i64, njit
from kernelsim.raw_memory import store_octet

_INTERRUPTS, _NOBODYS = NR_SIDES - 1, NR_SIDES - 2
_NR_USERS = NR_SIDES - 2  # a power of two; users that are so many apart share a side
_OP_INTERRUPT = int(Opcode.INTERRUPT)
_UNWAITED = tuple(int(op) for op in (Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.FORGET, Opcode.BATCH_FORGET))
_ASIDE_BYTES = aside_dtype.itemsize

_address, _size = types.uintp, types.uintp
_c_memcpy = types.ExternalFunction("memcpy", types.uintp(_address, _address, _size))
_c_memmove = types.ExternalFunction("memmove", types.uintp(_address, _address, _size))
_c_malloc: Callable[[int], int] = types.ExternalFunction("malloc", types.uintp(_size))
_c_free = types.ExternalFunction("free", types.void(_address))
_c_lock = types.ExternalFunction("pthread_mutex_lock", types.int32(_address))
_c_trylock: Callable[[int], int] = types.ExternalFunction("pthread_mutex_trylock", types.int32(_address))
_c_unlock = types.ExternalFunction("pthread_mutex_unlock", types.int32(_address))


@njit
def _is_had(table: Table) -> bool:
    """Has the calling thread the turn now? Not if another one has, or is coming for it. With `guard` held."""
    return not table[0].nr_coming and _c_trylock(table[0].turn.ctypes.data) == 0


@njit
def take_turn(table: Table) -> None:
    """Wait for it."""
    lock(table)
    table[0].nr_coming += 1
    unlock(table)
    _c_lock(table[0].turn.ctypes.data)
    lock(table)
    table[0].nr_coming -= 1
    unlock(table)


@njit_brief
def give_turn(table: Table) -> bool:
    """Let another thread have it. True: something is set aside, and nobody known to be coming."""
    lock(table)
    _c_unlock(table[0].turn.ctypes.data)
    is_left = bool(table[0].nr_aside and not table[0].nr_coming)
    unlock(table)
    return is_left


@njit
def keeps_turn(table: Table) -> bool:
    """Has whoever had the turn to go on with what is set aside? If not he has it no longer."""
    lock(table)
    is_kept = bool(table[0].nr_aside and not table[0].nr_coming)
    if not is_kept:
        _c_unlock(table[0].turn.ctypes.data)
    unlock(table)
    return is_kept


@njit
def takes_over(table: Table) -> bool:
    """Is something set aside, and nobody at it? Then the calling thread has the turn now."""
    lock(table)
    is_taken = bool(table[0].nr_aside and _is_had(table))
    unlock(table)
    return is_taken


@njit
def is_set_aside(buffer: Buffer, table: Table, nr_bytes: int) -> bool:
    """Leave the request in the buffer to whoever has the turn. False: the calling thread has it now."""
    lock(table)
    is_had = _is_had(table)
    has_room = table[0].nr_aside < NR_ASIDE and table[0].aside_bytes + nr_bytes <= MAX_ASIDE_BYTES
    unlock(table)
    if is_had:
        return False
    address = _c_malloc(nr_bytes) if has_room else 0
    if address:
        _c_memcpy(address, buffer.ctypes.data + REQUEST_AT, nr_bytes)
        lock(table)
        is_had, has_room = _is_had(table), table[0].nr_aside < NR_ASIDE
        if has_room and not is_had:
            one = table[0].aside[table[0].nr_aside]
            one.address, one.nr_bytes, one.unique, one.side = address, nr_bytes, buffer[0].unique, _side(buffer)
            table[0].nr_aside += 1
            table[0].aside_bytes += nr_bytes
        unlock(table)
        if has_room and not is_had:
            return True
        _c_free(address)
        if is_had:
            return False
    take_turn(table)
    return False


@njit
def _side(buffer: Buffer) -> int:
    opcode = buffer[0].opcode
    if opcode == _OP_INTERRUPT:
        return _INTERRUPTS
    return _NOBODYS if opcode in _UNWAITED else i64(buffer[0].uid) & (_NR_USERS - 1)


@njit
def take_aside(buffer: Buffer, table: Table) -> int:
    """With the turn: put the next of the requests that were set aside into the buffer -> its bytes; 0: there is none,
    and the turn is given away."""
    lock(table)
    if not table[0].nr_aside:
        _c_unlock(table[0].turn.ctypes.data)
        unlock(table)
        return 0
    served, best = table[0].served, 0
    for at in range(1, table[0].nr_aside):
        if served[table[0].aside[at].side] < served[table[0].aside[best].side]:
            best = at
    one = table[0].aside[best]
    address, nr_bytes = i64(one.address), i64(one.nr_bytes)
    table[0].nr_served += 1
    served[one.side] = table[0].nr_served
    _remove(table, best)
    unlock(table)
    _c_memcpy(buffer.ctypes.data + REQUEST_AT, address, nr_bytes)
    _c_free(address)
    return nr_bytes


@njit
def _remove(table: Table, at: int) -> None:
    table[0].aside_bytes -= table[0].aside[at].nr_bytes
    table[0].nr_aside -= 1
    place = table[0].aside.ctypes.data + at * _ASIDE_BYTES
    _c_memmove(place, place + _ASIDE_BYTES, (table[0].nr_aside - at) * _ASIDE_BYTES)


@njit_brief
def interrupt_aside(table: Table, unique: int) -> bool:
    """Mark a request: its caller got a signal. False: it is not set aside."""
    lock(table)
    at, nr_aside = 0, i64(table[0].nr_aside)
    while at < nr_aside and table[0].aside[at].unique != unique:
        at += 1
    if at < nr_aside:
        store_octet(table[0].aside[at].address + MARK_AT, 1)
    unlock(table)
    return at < nr_aside
