# SPDX-License-Identifier: MIT
"""Page tables of the unified range: one directory tree, and for each location (processor) its own entries.

Theory of operation
    An address has 48 bits: three directories of 512 entries, then an offset into a *chunk* of 2 MiB. All pages of a
    chunk have one size (2 KiB, 4 KiB, 64 KiB or 2 MiB), and the last directory says which, with where the chunk's
    entries begin. So a walk is three loads and the entry, whatever the page size, as in a GPU's MMU where the last
    directory has a pointer to a table of big or of small pages.

        47        39 38        30 29        21 20                 0
        [ dirs 0   ] [ dirs 1   ] [ dirs 2   ] [ page | in page   ]

    Entries are in one flat array a location, [location, index]. A region's entries lie in one run, so what concerns a
    range is a slice. The directories are shared: what differs between processors is who can reach a page, not where in
    the range it is.

    A present entry says in which location's memory (its own, or another's over the link) the page is, and its frame in
    units of 2 KiB. A physical address is location << 40 | byte.

Invariants
    - A leaf run is used by one region. Entries outside of runs in use are 0.
    - Entries are only read through a TLB (tlb.py), or here by tests and bulk translation.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import i64, njit, u64

CHUNK_SHIFT = 21
CHUNK_BYTES = 1 << CHUNK_SHIFT
FRAME_SHIFT = 11
FRAME_BYTES = 1 << FRAME_SHIFT
PAGE_SHIFTS = (11, 12, 16, 21)
VA_BITS = 48
PHYS_BITS = 40
"""Bytes of one location; above them is the location."""

PTRS_PER_DIR = 512
_SHIFT_BITS = 6  # of a last directory's entry: page shift below, leaf index above

PTE_PRESENT = np.uint64(1 << 0)
PTE_WRITE = np.uint64(1 << 1)
"""May be written without asking: the only copy, and no store holds an older one."""
PTE_ACCESSED = np.uint64(1 << 5)
PTE_DIRTY = np.uint64(1 << 6)
_LOCATION_SHIFT = np.uint64(8)
_LOCATION_MASK = np.uint64(0xFF)
_PTE_FRAME_SHIFT = np.uint64(16)
_PTE_BITS = np.uint64(0xFFFF)
_NONE = np.uint64(0)

NOT_RESIDENT = -1
NOT_MAPPED = -2

Dirs: TypeAlias = NDArray[np.int64]
Ptes: TypeAlias = NDArray[np.uint64]
Vas: TypeAlias = NDArray[np.int64]


@njit
def pte_frame(pte: Any) -> int:
    return i64(u64(pte) >> _PTE_FRAME_SHIFT)


@njit
def pte_location(pte: Any) -> int:
    return i64((u64(pte) >> _LOCATION_SHIFT) & _LOCATION_MASK)


@njit
def pte_phys(pte: Any, offset: int) -> int:
    """Physical address of a byte in the page of a present entry."""
    return (pte_location(pte) << PHYS_BITS) | ((pte_frame(pte) << FRAME_SHIFT) + offset)


@njit
def find_chunk(dirs: Dirs, va: int) -> int:
    """The last directory's entry for an address: leaf index << 6 | page shift; 0 where nothing is."""
    if va < 0 or va >> VA_BITS:
        return 0
    table = dirs[(va >> 39) & 511]
    if table == 0:
        return 0
    table = dirs[table * PTRS_PER_DIR + ((va >> 30) & 511)]
    if table == 0:
        return 0
    return i64(dirs[table * PTRS_PER_DIR + ((va >> 21) & 511)])


@njit
def translate_bulk(dirs: Dirs, ptes: Ptes, vas: Vas, out: Vas) -> int:
    """Physical address of each virtual one in a location's table, NOT_RESIDENT or NOT_MAPPED -> how many are there."""
    nr = 0
    for i in range(len(vas)):
        va = vas[i]
        chunk = find_chunk(dirs, va)
        if chunk == 0:
            out[i] = NOT_MAPPED
            continue
        shift = chunk & 63
        pte = ptes[(chunk >> _SHIFT_BITS) + ((va & (CHUNK_BYTES - 1)) >> shift)]
        if pte & PTE_PRESENT == _NONE:
            out[i] = NOT_RESIDENT
            continue
        out[i] = pte_phys(pte, va & ((1 << shift) - 1))
        nr += 1
    return nr


@njit
def point_elsewhere(
    ptes: Ptes, at: NDArray[np.int64], home: int, frames: NDArray[np.int64], reached: NDArray[np.bool_]
) -> None:
    """Entries `at` of each location's table that point to `home` point to these frames of it, and keep their bits.

    reached     is set where one did
    """
    for location in range(len(ptes)):
        for i in range(len(at)):
            pte = ptes[location, at[i]]
            if pte & PTE_PRESENT != _NONE and pte_location(pte) == home:
                ptes[location, at[i]] = (pte & _PTE_BITS) | (u64(frames[i]) << _PTE_FRAME_SHIFT)
                reached[location, i] = True


def frames_of(ptes: Ptes) -> NDArray[np.int64]:
    """Frames of an array of entries."""
    return (ptes >> _PTE_FRAME_SHIFT).astype(np.int64)


def location_of(pte: int) -> int | None:
    """Location of one entry, as a Python int; None of one that is not present."""
    return pte >> int(_LOCATION_SHIFT) & int(_LOCATION_MASK) if pte & int(PTE_PRESENT) else None


def locations_of(ptes: Ptes) -> NDArray[np.int64]:
    """Locations of an array of entries."""
    return ((ptes >> _LOCATION_SHIFT) & _LOCATION_MASK).astype(np.int64)


def make_ptes(location: int, frames: NDArray[np.int64], bits: np.uint64) -> Ptes:
    """Present entries for frames of a location."""
    head = np.uint64(location) << _LOCATION_SHIFT | PTE_PRESENT | bits
    return (frames.astype(np.uint64) << _PTE_FRAME_SHIFT) | head


class PageTable:
    """The directories, and every location's entries. Arrays grow; take them from here anew after a `map_region`."""

    def __init__(self, nr_locations: int) -> None:
        self.dirs: Dirs = np.zeros(PTRS_PER_DIR * 2, dtype=np.int64)
        self.ptes: Ptes = np.zeros((nr_locations, 1 << 12), dtype=np.uint64)
        self._nr_dirs = 1
        self._free_runs: list[tuple[int, int]] = [(0, 1 << 12)]  # (start, end) of unused leaf entries

    @property
    def nr_bytes(self) -> int:
        """What the tables take."""
        return self.dirs.nbytes + self.ptes.nbytes

    def map_region(self, va: int, nr_chunks: int, page_shift: int) -> int:
        """Enter chunks of empty entries at an aligned address -> the index of the first entry."""
        per_chunk = 1 << (CHUNK_SHIFT - page_shift)
        first = self._take_run(nr_chunks * per_chunk)
        for number in range(nr_chunks):
            slot = self._slot(va + number * CHUNK_BYTES)
            assert self.dirs[slot] == 0, "two regions in one chunk"
            self.dirs[slot] = (first + number * per_chunk) << _SHIFT_BITS | page_shift
        return first

    def unmap_region(self, va: int, nr_chunks: int, page_shift: int, first: int) -> None:
        """The inverse; the entries must be empty by now."""
        nr = nr_chunks << (CHUNK_SHIFT - page_shift)
        assert not self.ptes[:, first : first + nr].any(), "pages are still mapped"
        for number in range(nr_chunks):
            self.dirs[self._slot(va + number * CHUNK_BYTES)] = 0
        self._give_run(first, first + nr)

    def _slot(self, va: int) -> int:
        """Index of the last directory's entry, its directories made where missing."""
        table = 0
        for shift in (39, 30):
            at = table * PTRS_PER_DIR + ((va >> shift) & 511)
            if self.dirs[at] == 0:
                self.dirs[at] = self._new_dir()
            table = int(self.dirs[at])
        return table * PTRS_PER_DIR + ((va >> CHUNK_SHIFT) & 511)

    def _new_dir(self) -> int:
        number = self._nr_dirs
        self._nr_dirs += 1
        if self._nr_dirs * PTRS_PER_DIR > len(self.dirs):
            self.dirs = np.concatenate((self.dirs, np.zeros_like(self.dirs)))
        return number

    def _take_run(self, nr: int) -> int:
        for index, (start, end) in enumerate(self._free_runs):
            if end - start >= nr:
                self._free_runs[index : index + 1] = [(start + nr, end)] if end - start > nr else []
                return start
        self._grow(nr)
        return self._take_run(nr)

    def _give_run(self, start: int, end: int) -> None:
        self._free_runs.append((start, end))
        self._free_runs.sort()
        joined: list[tuple[int, int]] = []
        for run in self._free_runs:
            if joined and joined[-1][1] == run[0]:
                joined[-1] = (joined[-1][0], run[1])
            else:
                joined.append(run)
        self._free_runs = joined

    def _grow(self, nr: int) -> None:
        nr_locations, old = self.ptes.shape
        more = max(old, nr)
        self.ptes = np.concatenate((self.ptes, np.zeros((nr_locations, more), dtype=np.uint64)), axis=1)
        self._give_run(old, old + more)
