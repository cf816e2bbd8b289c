# SPDX-License-Identifier: GPL-2.0-only
"""What each pageblock holds, as far as /proc/kpageflags says it.

Theory of operation
    kpageflags has 8 bytes for each page frame, so a pageblock of 512 pages is one page of it: 16 MiB for 8 GiB. A
    machine can be too large to read whole each second. `Sweep` reads a bounded part of it each time it is asked, and
    comes round; what it has not read yet counts as unknown, and a picture may be as old as one round.

    A page is free (KPF_BUDDY), movable (KPF_LRU, or part of a huge page, without KPF_UNEVICTABLE), locked (movable,
    but KPF_UNEVICTABLE: mlocked), or else the kernel's, and stays where it is. No file says which pages are pinned:
    they are counted as movable, and only `skipped_pinned` in dpu_compact/stats tells of them.

The bits are those of include/uapi/linux/kernel-page-flags.h.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGES_PER_BLOCK = 512
KPF_LRU, KPF_BUDDY, KPF_HUGE, KPF_UNEVICTABLE, KPF_NOPAGE, KPF_THP = 5, 10, 17, 18, 20, 22
FREE, MOVABLE, LOCKED, KERNEL = range(4)
KINDS = ("free", "movable", "locked", "kernel")
_ENTRY = 8
_BLOCK_BYTES = PAGES_PER_BLOCK * _ENTRY


def kinds_of(flags: NDArray[np.uint64]) -> NDArray[np.int32]:
    """int32[pageblock, kind]: how many pages of each kind; a block of holes has none. `flags`: whole pageblocks."""

    def has(*bits: int) -> NDArray[np.bool_]:
        mask = np.uint64(sum(1 << bit for bit in bits))
        return np.asarray(flags & mask, np.bool_)

    there, free, fixed = ~has(KPF_NOPAGE), has(KPF_BUDDY), has(KPF_UNEVICTABLE)
    user = there & ~free & has(KPF_LRU, KPF_HUGE, KPF_THP, KPF_UNEVICTABLE)
    masks = (there & free, user & ~fixed, user & fixed, there & ~free & ~user)
    return np.stack([mask.reshape(-1, PAGES_PER_BLOCK).sum(axis=1, dtype=np.int32) for mask in masks], axis=1)


@dataclass
class Sweep:
    """Reads kpageflags a part at a time. `pages` is int32[pageblock, kind], -1 where nothing was read yet."""

    path: Path
    first_block: int
    end_block: int
    budget_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        self.pages = np.full((self.end_block - self.first_block, len(KINDS)), -1, np.int32)
        self._at = 0

    def read(self) -> None:
        """Read the next part. Raises OSError."""
        nr = min(max(self.budget_bytes // _BLOCK_BYTES, 1), len(self.pages) - self._at)
        with open(self.path, "rb", buffering=0) as file:
            file.seek((self.first_block + self._at) * _BLOCK_BYTES)
            data = _read_fully(file.fileno(), nr * _BLOCK_BYTES)
        flags = np.full(nr * PAGES_PER_BLOCK, 1 << KPF_NOPAGE, np.uint64)  # the last block may not be whole
        flags[: len(data) // _ENTRY] = np.frombuffer(data[: len(data) // _ENTRY * _ENTRY], np.uint64)
        self.pages[self._at : self._at + nr] = kinds_of(flags)
        self._at = (self._at + nr) % max(len(self.pages), 1)

    def read_all(self) -> None:
        """Read everything once. Raises OSError."""
        self._at, self.budget_bytes = 0, max(len(self.pages) * _BLOCK_BYTES, 1)
        self.read()


def _read_fully(fd: int, nr_bytes: int) -> bytes:
    parts, rest = [], nr_bytes
    while rest and (part := os.read(fd, min(rest, 1 << 20))):
        parts.append(part)
        rest -= len(part)
    return b"".join(parts)


def cells(pages: NDArray[np.int32], per_cell: int) -> NDArray[np.float64]:
    """float64[cell, kind]: shares of the pages of each `per_cell` neighbouring blocks; nan where there is no memory."""
    starts = np.arange(0, len(pages), per_cell)
    sums = (
        np.add.reduceat(pages.clip(0), starts, axis=0).astype(np.float64) if len(pages) else np.zeros((0, len(KINDS)))
    )
    total = sums.sum(axis=1, keepdims=True)
    shares = np.full_like(sums, np.nan)
    np.divide(sums, total, out=shares, where=total > 0)
    return shares
