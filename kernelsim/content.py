# SPDX-License-Identifier: GPL-2.0-only
"""What is in a page: `memory`, uint64[nr_pages, words_per_page].

512 words a page are its 4096 real bytes; 1 word is a content stamp that travels with the page in place of bytes, for
machines too large to hold; with 0 words nothing is kept. Every loop is written for any number of words, so all kinds
run the same code.

Whoever writes a page picks a stamp, and word i becomes stamp + i * an odd constant: all words differ, two pages written
at different times differ in every word, and one number is enough to check all 4096 bytes. Stamp 0 is a page of zeros:
what a process finds in a page that it has but never wrote.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit, njit_alloc, u64

Memory: TypeAlias = NDArray[np.uint64]

WORDS_FULL = 512
WORDS_STAMP = 1
WORDS_NONE = 0

_STEP = np.uint64(0x9E3779B97F4A7C15)


@njit
def stamp_of(sequence: int) -> Any:
    """Spread a write's sequence number over 64 bits (the finalizer of splitmix64); 0 only for 0."""
    x = u64(sequence)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit
def fill_page(memory: Memory, pfn: int, stamp: Any) -> None:
    word = u64(stamp)
    step = _STEP if word else np.uint64(0)
    for i in range(memory.shape[1]):
        memory[pfn, i] = word
        word += step


@njit
def page_holds(memory: Memory, pfn: int, stamp: Any) -> bool:
    """True if every word is what fill_page() wrote for this stamp.

    Where nothing is kept, all that can be said is that a page which nobody wrote holds nothing.
    """
    if memory.shape[1] == 0:
        return bool(u64(stamp) != np.uint64(0))
    wrong = np.uint64(0)
    word = u64(stamp)
    step = _STEP if word else np.uint64(0)
    for i in range(memory.shape[1]):
        wrong |= memory[pfn, i] ^ word
        word += step
    return bool(wrong == np.uint64(0))


@njit
def copy_page(memory: Memory, dst: int, src: int) -> None:
    for i in range(memory.shape[1]):
        memory[dst, i] = memory[src, i]


@njit
def clear_huge_page(memory: Memory, head: int, nr_pages: int) -> None:
    """Fill a folio with zeros."""
    for pfn in range(head, head + nr_pages):
        fill_page(memory, pfn, np.uint64(0))


@njit
def folio_copy(memory: Memory, dst: int, src: int, nr_pages: int) -> None:
    for i in range(nr_pages):
        copy_page(memory, dst + i, src + i)


@njit_alloc
def new_stamps(nr: int, sequence: int) -> NDArray[np.uint64]:
    """uint64[nr]: the stamps of writes `sequence`, `sequence` + 1, ..."""
    stamps = np.empty(nr, dtype=np.uint64)
    for i in range(nr):
        stamps[i] = stamp_of(sequence + i)
    return stamps
