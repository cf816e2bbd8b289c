# SPDX-License-Identifier: GPL-2.0-only
"""Stores that outlive the daemon: the compiled loop (fuse_loop.py) puts a copy of each into memory that it was given
before it answers. Whose memory that is, and what becomes of it, is for others to know (dpud/state_stores.py).

    word 0      whether stores are taken just now
    from HEAD   the last NR_STORES of them, each where the table has it, too
"""

from typing import Any

from fs.fuse_layout import NR_STORES, Table, store_dtype
from kernelsim.jit import i64, njit, u64
from kernelsim.raw_memory import load, store

HEAD = store_dtype.itemsize
KEPT_BYTES = HEAD + NR_STORES * store_dtype.itemsize
_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""The constants of SplitMix64 (Steele, Lea, Flood 2014)."""


@njit
def checksum(number: int, nodeid: int, value: int) -> int:
    """Tells a store that is whole from one that is torn, flipped, in another's place, or nothing but zeros."""
    mixed = u64(_ODD[0])
    for word in (number, nodeid, value):
        mixed = (mixed ^ u64(word)) + u64(_ODD[0])
        mixed = (mixed ^ (mixed >> u64(30))) * u64(_ODD[1])
        mixed = (mixed ^ (mixed >> u64(27))) * u64(_ODD[2])
        mixed = mixed ^ (mixed >> u64(31))
    return i64(mixed)


@njit
def are_taken(table: Table) -> bool:
    """Is there a place for one more? With `guard` held."""
    return bool(not table[0].kept_at or load(table[0].kept_at))


@njit
def keep(table: Table, kept: Any) -> None:
    """Put a copy of one that was just taken where it outlives us. With `guard` held."""
    kept.checksum = checksum(kept.number, kept.nodeid, kept.value)
    at = table[0].kept_at + HEAD + (kept.number & (NR_STORES - 1)) * HEAD
    store(at, kept.number)
    store(at + 8, kept.nodeid)
    store(at + 16, kept.value)
    store(at + 24, kept.checksum)
