# SPDX-License-Identifier: MIT
"""The TLB of one location: which entries its processor still believes in.

Theory of operation
    Set-associative, least recently used within a set, tagged with page number and size. An access takes its entry from
    here and only walks the page table on a miss, so a translation that was not invalidated when its entry changed leads
    to wrong bytes: a bug that tests find. A range of more pages than `FLUSH_CEILING` is invalidated by flushing all, as
    x86's tlb_single_page_flush_ceiling has it.

    Entries are tags, ptes and stamps, [set * ways + way]; tag 0 is an empty entry.

Invariant
    Every entry equals the page table's, up to the accessed and dirty bits, whenever no operation is in progress.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.pagetable import (
    _NONE,
    _SHIFT_BITS,
    CHUNK_BYTES,
    PTE_ACCESSED,
    PTE_PRESENT,
    Dirs,
    Ptes,
    Vas,
    find_chunk,
)
from kernelsim.jit import njit

DEFAULT_SETS = 128
DEFAULT_WAYS = 4
FLUSH_CEILING = 33

Stamps: TypeAlias = NDArray[np.int64]
HITS, MISSES, CLOCK = range(3)


@njit
def tlb_tag(va: int, shift: int) -> int:
    """Page number and size in one word, never 0."""
    return ((va >> shift) << 6) | shift


@njit
def tlb_find(tags: Stamps, nr_sets: int, ways: int, tag: int) -> int:
    """Index of the entry with a tag, or -1."""
    first = ((tag >> 6) & (nr_sets - 1)) * ways
    for i in range(first, first + ways):
        if tags[i] == tag:
            return i
    return -1


@njit
def tlb_victim(tags: Stamps, stamps: Stamps, nr_sets: int, ways: int, tag: int) -> int:
    """Index of the entry that makes room for a tag: an empty one, else the one not used for longest."""
    first = ((tag >> 6) & (nr_sets - 1)) * ways
    oldest = first
    for i in range(first, first + ways):
        if tags[i] == 0:
            return i
        if stamps[i] < stamps[oldest]:
            oldest = i
    return oldest


@njit
def tlb_translate(
    tags: Stamps,
    entries: Ptes,
    stamps: Stamps,
    counts: Stamps,
    nr_sets: int,
    ways: int,
    dirs: Dirs,
    ptes: Ptes,
    va: int,
    shift: int,
    out: Ptes,
) -> None:
    """Entries of len(out) pages from `va` on, from the TLB or by a walk; 0 for one that is not present."""
    for page in range(len(out)):
        at = va + (page << shift)
        tag = tlb_tag(at, shift)
        counts[CLOCK] += 1
        index = tlb_find(tags, nr_sets, ways, tag)
        if index >= 0:
            counts[HITS] += 1
            stamps[index] = counts[CLOCK]
            out[page] = entries[index]
            continue
        counts[MISSES] += 1
        leaf = (find_chunk(dirs, at) >> _SHIFT_BITS) + ((at & (CHUNK_BYTES - 1)) >> shift)
        pte = ptes[leaf]
        if pte & PTE_PRESENT == _NONE:
            out[page] = _NONE
            continue
        ptes[leaf] = pte | PTE_ACCESSED
        index = tlb_victim(tags, stamps, nr_sets, ways, tag)
        tags[index] = tag
        entries[index] = pte
        stamps[index] = counts[CLOCK]
        out[page] = pte


@njit
def tlb_invalidate(tags: Stamps, nr_sets: int, ways: int, vas: Vas, shift: int) -> int:
    """Forget pages -> how many entries were there."""
    nr = 0
    for va in vas:
        index = tlb_find(tags, nr_sets, ways, tlb_tag(va, shift))
        if index >= 0:
            tags[index] = 0
            nr += 1
    return nr


class Tlb:
    """The TLB of one location."""

    def __init__(self, nr_sets: int = DEFAULT_SETS, ways: int = DEFAULT_WAYS) -> None:
        if nr_sets < 1 or nr_sets & (nr_sets - 1) or ways < 1:
            raise ValueError(f"a TLB of {nr_sets} sets and {ways} ways")
        self.nr_sets, self.ways = nr_sets, ways
        self.tags: Stamps = np.zeros(nr_sets * ways, dtype=np.int64)
        self.entries: Ptes = np.zeros(nr_sets * ways, dtype=np.uint64)
        self._stamps: Stamps = np.zeros(nr_sets * ways, dtype=np.int64)
        self._counts: Stamps = np.zeros(3, dtype=np.int64)
        self.nr_invalidated = 0
        self.nr_flushes = 0

    @property
    def nr_hits(self) -> int:
        return int(self._counts[HITS])

    @property
    def nr_misses(self) -> int:
        return int(self._counts[MISSES])

    def translate(self, dirs: Dirs, ptes: Ptes, va: int, shift: int, nr_pages: int) -> Ptes:
        """Entries of mapped pages from the page-aligned `va` on; those not present are 0."""
        out = np.empty(nr_pages, dtype=np.uint64)
        state = (self.tags, self.entries, self._stamps, self._counts, self.nr_sets, self.ways)
        tlb_translate(*state, dirs, ptes, va, shift, out)
        return out

    def invalidate(self, vas: Vas, shift: int) -> None:
        """Forget the pages that begin at these addresses."""
        if len(vas) > FLUSH_CEILING:
            self.flush()
        else:
            self.nr_invalidated += tlb_invalidate(self.tags, self.nr_sets, self.ways, vas, shift)

    def flush(self) -> None:
        """Forget everything."""
        self.nr_flushes += 1
        self.nr_invalidated += int(np.count_nonzero(self.tags))
        self.tags.fill(0)

    def believed(self) -> list[tuple[int, int, int]]:
        """(address, page shift, entry) of everything it holds, for checks."""
        held = np.flatnonzero(self.tags)
        shifts = self.tags[held] & 63
        vas = self.tags[held] >> 6 << shifts
        return list(zip(vas.tolist(), shifts.tolist(), self.entries[held].tolist(), strict=True))
