# SPDX-License-Identifier: GPL-2.0-only
"""The records that the compiled loop (fuse_loop.py) and Python share: the table that requests are answered from, and
each thread's buffer. One record each, as what is passed to a compiled function costs by the piece."""

import mmap
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fs import fuse_abi as abi
from kernelsim.seq_counters import form_dtype

MAX_TEXT = 1 << 16
"""Longer texts are answered by Python."""
MAX_WRITE = 1 << 20
MAX_REQUEST = MAX_WRITE + (1 << 12)
QUICK = 1 << 62
"""Set in the handle of an open file that has a row here."""

NR_SLOTS, NR_FILES, NR_STORES = 1024, 1024, 256
NR_SHARED = NR_FILES // 2
"""Rows that ordinary users may have: who keeps thousands of files open must not send all others to Python."""
NR_TEXTS = NR_SLOTS + NR_FILES  # each has one at most

slot_dtype = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("nodeid", "is_known", "turns", "stores", "sets", "text", "by_owner", "by_anyone"),
            *("traits", "lo", "hi", "nr_open", "nr_readers", "read_at", "has_form"),
        )
    ]
)
"""is_known: the file is there, and what is said of it here holds. turns, stores and sets: Changes.counts and
nr_values_set as of which its text does; turns counts all, or those of memory. text: its row, or -1. by_owner and
by_anyone: what may be done with it, READ and WRITE. lo, hi: of the numbers that a plain file takes. read_at: turns of
memory when it was read last. has_form: its text can be made here, by the record of `forms` with the same number."""
HIDES_SIZE, ONE_POSITION, TRUNCATABLE, SHOWS_ITSELF, PLAIN, SETS_OTHERS, SHOWS_MEMORY = (1 << bit for bit in range(7))
"""Traits of a file: its text is longer than stat(2) says; all of it is read at position 0; O_TRUNC does something; its
text is just its value; numbers are taken here; and may change other files' values; it goes by nothing but the kernel's
memory."""
file_dtype = np.dtype([(name, np.int64) for name in ("slot", "text", "open_flags", "is_quick", "next")])
text_dtype = np.dtype([(name, np.int64) for name in ("address", "nr_bytes", "nr_users", "is_own")])
"""is_own: it was made here, in memory of malloc(3); else Python keeps it."""
store_dtype = np.dtype([(name, np.int64) for name in ("number", "nodeid", "value", "checksum")])
"""number: of stores before it. checksum: fuse_stores.checksum, where stores are kept."""
NR_ASIDE, MAX_ASIDE_BYTES = 4096, 16 << 20
"""Requests that wait for the turn, and what they may come to; a thread that has one more waits itself."""
NR_SIDES = 64 + 2
"""fuse_turn.py says whose they are."""
aside_dtype = np.dtype([(name, np.int64) for name in ("address", "nr_bytes", "unique", "side")])
table_dtype = np.dtype(
    [
        ("slots", slot_dtype, (NR_SLOTS,)),
        ("forms", form_dtype, (NR_SLOTS,)),
        ("files", file_dtype, (NR_FILES,)),
        ("texts", text_dtype, (NR_TEXTS,)),
        ("stores", store_dtype, (NR_STORES,)),
        ("kept_at", np.int64),  # address of where stores are kept, too (fuse_stores.py), or 0
        ("nr_settled", np.int64),
        ("nr_others_set", np.int64),  # Changes.stores as of the last store that may have changed others' values
        ("nr_rendering", np.int64),  # threads that make a text
        ("free_file", np.int64),
        ("nr_taken", np.int64),
        ("far_out", np.int64),
        ("nr_values_set_at", np.int64),  # address
        ("owner_uid", np.int64),
        ("turn", np.int64, (16,)),  # a pthread_mutex_t has 5 to 6 words; zeros are one that nobody holds
        ("guard", np.int64, (16,)),
        ("nr_coming", np.int64),  # threads that wait for the turn
        ("aside", aside_dtype, (NR_ASIDE,)),  # the first nr_aside, as they came
        ("nr_aside", np.int64),
        ("aside_bytes", np.int64),
        ("nr_served", np.int64),
        ("served", np.int64, (NR_SIDES,)),  # nr_served when one of that side was
        ("slice_call", np.int64),  # slices.py
        ("short_slice", np.int64, (6,)),
        ("long_slice", np.int64, (6,)),
    ]
)

REQUEST_AT, NOTIFY_AT = MAX_TEXT + 64, MAX_TEXT + 16
_BODY, REPLY_BODY = abi.IN_HEADER.size, abi.OUT_HEADER.size
MAX_DIGITS = 10
"""Bytes of a write that are looked at."""
FORM_AT = REQUEST_AT + MAX_REQUEST
NR_NOTIFY = REPLY_BODY + abi.NOTIFY_STORE_OUT.size + 1
_FIELDS = {
    "reply_bytes": ("i4", 0),
    "reply_error": ("i4", 4),
    "reply_unique": ("i8", 8),
    "reply_handle": ("i8", REPLY_BODY),
    "reply_flags": ("i8", REPLY_BODY + 8),
    "notify_bytes": ("i4", NOTIFY_AT),
    "notify_code": ("i4", NOTIFY_AT + 4),
    "notify_nodeid": ("i8", NOTIFY_AT + 16),
    "notify_position": ("i8", NOTIFY_AT + 24),
    "notify_size": ("i4", NOTIFY_AT + 32),
    "has_long_slice": ("i4", NOTIFY_AT + 44),
    "errno": ("i4", REQUEST_AT),
    "length": ("u4", REQUEST_AT),
    "opcode": ("i4", REQUEST_AT + 4),
    "unique": ("i8", REQUEST_AT + 8),
    "nodeid": ("i8", REQUEST_AT + 16),
    "uid": ("i4", REQUEST_AT + 24),
    "open_flags": ("i4", REQUEST_AT + _BODY),
    "handle": ("i8", REQUEST_AT + _BODY),
    "offset": ("i8", REQUEST_AT + _BODY + 8),
    "size": ("i4", REQUEST_AT + _BODY + 16),
    "octets": (f"({MAX_DIGITS},)u1", REQUEST_AT + _BODY + abi.WRITE_IN.size),
    "form": (form_dtype, FORM_AT),
}
"""Of a thread's buffer: of the reply, of a NOTIFY_STORE of one byte, of the request (see fuse_abi.py); and the form of
the text that it makes."""

Table: TypeAlias = Any
"""Array of one `table_dtype`."""
Buffer: TypeAlias = Any
"""Array of one record of _FIELDS."""
Counts: TypeAlias = NDArray[np.int64]
"""Changes.counts: turns, names, stores, turns of memory, ended."""


def make_table(owner_uid: int, far_out: int) -> Table:
    """An empty one. `far_out`: the first position that _extend_cache takes."""
    table = np.zeros(1, dtype=table_dtype)
    table["files"]["next"] = [*range(1, NR_FILES), -1]
    table["slots"]["text"] = -1
    table["owner_uid"], table["far_out"] = owner_uid, far_out
    return table


def make_buffer() -> tuple[Buffer, memoryview, memoryview]:
    """A thread's, and where in it Python finds the request and puts the reply."""
    formats, offsets = zip(*_FIELDS.values(), strict=True)
    fields = {"names": list(_FIELDS), "formats": formats, "offsets": offsets, "itemsize": FORM_AT + form_dtype.itemsize}
    dtype: np.dtype[Any] = np.dtype(fields)  # type: ignore[call-overload]
    # calloc(3) would clear recycled memory, and so have all of it
    memory = mmap.mmap(-1, dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer: NDArray[Any] = np.frombuffer(memory, dtype=dtype)
    buffer["notify_bytes"], buffer["notify_code"], buffer["notify_size"] = NR_NOTIFY, abi.NOTIFY_STORE, 1
    buffer["has_long_slice"] = 1
    octets = buffer.view(np.uint8).data
    return buffer, octets[REQUEST_AT:], octets[:NOTIFY_AT]
