# SPDX-License-Identifier: GPL-2.0-only
"""The bytes of physical memory: an anonymous mapping that costs host memory only where it is touched.

It is private, since all who use it are threads of one process, and kept out of children (MADV_DONTFORK): a fork to
start a command must not copy gigabytes of page tables. Huge host pages make touching and copying it several times
faster; they are asked for in the memory itself and the memory map, not for the sparse page-table array of a machine
without real bytes.
"""

import mmap

import numpy as np
from numpy.typing import NDArray

MAP_NORESERVE = 0x4000  # asm-generic/mman-common.h; Python 3.11 does not name it
_HUGE_FROM_BYTES = 64 << 20


def alloc_tables(nr: int, words: int) -> NDArray[np.uint64]:
    """Zeroed uint64[nr, words] for what the kernel keeps about pages: all of it is touched at boot."""
    return np.frombuffer(_map(nr * words * 8, huge=True), dtype=np.uint64).reshape(nr, words)


def _map(nr_bytes: int, huge: bool) -> mmap.mmap:
    mapping = mmap.mmap(-1, nr_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    mapping.madvise(mmap.MADV_DONTFORK)
    if huge and nr_bytes >= _HUGE_FROM_BYTES:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class PhysMem:
    """Makes the arrays of one machine, and gives parts of them back to the host."""

    def __init__(self) -> None:
        self._mappings: list[tuple[mmap.mmap, int]] = []

    def alloc(self, nr_pages: int, words: int) -> NDArray[np.uint64]:
        """Zeroed uint64[nr_pages, words]. Raises OSError(ENOMEM) where the host's limits forbid it."""
        page_bytes = words * 8
        if page_bytes == 0:
            return np.zeros((nr_pages, 0), dtype=np.uint64)
        mapping = _map(nr_pages * page_bytes, huge=not self._mappings)
        self._mappings.append((mapping, page_bytes))
        return np.frombuffer(mapping, dtype=np.uint64).reshape(nr_pages, words)

    def discard(self, pfn: int, nr_pages: int) -> None:
        """Forget the contents of free pages, as far as they fill host pages: they read as zeros and cost nothing."""
        for mapping, page_bytes in self._mappings:
            first = -(-pfn * page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (pfn + nr_pages) * page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                mapping.madvise(mmap.MADV_DONTNEED, first, last - first)
