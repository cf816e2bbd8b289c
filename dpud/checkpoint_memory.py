# SPDX-License-Identifier: GPL-2.0-only
"""Bytes of arrays and mappings that are mostly empty: only what the host has populated is looked at.

A machine's memory is a sparse mapping. Which of its pages the host has given, the kernel tells a process of itself: a
64-bit word for each page in /proc/self/pagemap, bit 63 "present", bit 62 "swapped"
(Documentation/admin-guide/mm/pagemap.rst). All others read as zeros. Without that file everything is read.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 1 << 18
_WORD_BYTES = 8
_THERE_SHIFT = 62
_SMALL_BYTES = 1 << 20


def address_of(obj: Any) -> int:
    """Where the bytes of an array, a mapping or a bytearray begin."""
    if isinstance(obj, np.ndarray):
        return int(obj.__array_interface__["data"][0])
    return ctypes.addressof(ctypes.c_char.from_buffer(obj))


def raw(address: int, nr_bytes: int) -> NDArray[np.uint8]:
    """Bytes by address. Whoever asks holds what they belong to."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nr_bytes).from_address(address))


def populated(address: int, nr_bytes: int) -> list[tuple[int, int]]:
    """[begin, end) of the parts that may hold something, as offsets."""
    if nr_bytes <= _SMALL_BYTES:
        return [(0, nr_bytes)]
    first, last = address // mmap.PAGESIZE, -(-(address + nr_bytes) // mmap.PAGESIZE)
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return [(0, nr_bytes)]
    try:
        words = np.frombuffer(_read(fd, (last - first) * _WORD_BYTES, first * _WORD_BYTES), dtype=np.uint64)
    finally:
        os.close(fd)
    there = np.zeros(last - first + 2, dtype=np.int8)
    there[1 : len(words) + 1] = words >> np.uint64(_THERE_SHIFT) != 0
    edges = (np.flatnonzero(np.diff(there)) + first) * mmap.PAGESIZE - address
    runs = edges.reshape(-1, 2).clip(0, nr_bytes)
    return [(int(begin), int(end)) for begin, end in runs if end > begin]


def _read(fd: int, nr_bytes: int, at: int) -> bytes:
    found = b""
    while len(found) < nr_bytes and (piece := os.pread(fd, nr_bytes - len(found), at + len(found))):
        found += piece
    return found


def pieces(address: int, nr_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of all that is not zero, in pieces."""
    whole = raw(address, nr_bytes)
    for begin, end in populated(address, nr_bytes):
        for offset in range(begin, end, PIECE_BYTES):
            piece = whole[offset : min(offset + PIECE_BYTES, end)]
            if piece.any():
                yield offset, piece.tobytes()


def clear(address: int, nr_bytes: int) -> None:
    """Make all of it zeros, without touching what is not there."""
    whole = raw(address, nr_bytes)
    for begin, end in populated(address, nr_bytes):
        whole[begin:end] = 0
