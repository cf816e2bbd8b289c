# SPDX-License-Identifier: GPL-2.0-only
"""What the DPU program `dpu_move` checks of its list: folios to go from listed places to listed places.

Arguments, results and heap lie as for `dpu_compact` (move.py): of the heap's three columns the first has the sources,
`pfn << 12 | order`, the second the destinations, byte addresses, and the third takes the sums. So the moves themselves
are those of move.move_pages().
"""

import numpy as np
from numpy.typing import NDArray

from dpud.dpu.move import (
    ARG_FIRST_FRAG,
    ARG_NR_FRAGS,
    ARG_NR_SLOTS,
    COL_NEW,
    HEAP,
    I64,
    MRAM_WORDS,
    NR_COLS,
    PAGE_SIZE,
    STATUS_BAD_ACCESS,
    U64,
)
from kernelsim.jit import njit

ORDER_MASK = PAGE_SIZE - 1
ORDER_MAX = 18
"""1 GiB, the largest folio there is."""


@njit
def check_list(mram: I64, wram: I64, dpus: I64, nr_pages: int) -> int:
    """Number of moves; -STATUS_BAD_ACCESS unless each lies within the memory of `nr_pages`, aligned to its size."""
    nr_done = 0
    for dpu in dpus:
        nr, nr_slots = wram[dpu, ARG_NR_FRAGS], wram[dpu, ARG_NR_SLOTS]
        if nr < 0 or nr > nr_slots or HEAP + NR_COLS * nr_slots > MRAM_WORDS or wram[dpu, ARG_FIRST_FRAG] != nr_done:
            return -STATUS_BAD_ACCESS
        heap = mram[dpu, HEAP:]
        for k in range(nr):
            order = heap[k] & ORDER_MASK
            if order > ORDER_MAX or heap[COL_NEW * nr_slots + k] & ORDER_MASK:
                return -STATUS_BAD_ACCESS
            size = 1 << order
            for place in (heap[k] // PAGE_SIZE, heap[COL_NEW * nr_slots + k] // PAGE_SIZE):
                if place < 0 or place % size or place + size > nr_pages:
                    return -STATUS_BAD_ACCESS
        nr_done += nr
    return nr_done


def overlap(mram: I64, wram: I64, dpus: I64) -> bool:
    """Does a place in the list overlap another one? (A list that check_list() took.)"""
    src, dst = (
        np.concatenate([mram[d, at : at + wram[d, ARG_NR_FRAGS]] for d in dpus for at in (_column(wram, d, column),)])
        for column in (0, COL_NEW)
    )
    size = np.int64(PAGE_SIZE) << (src & ORDER_MASK)
    starts = np.concatenate([src & ~np.int64(ORDER_MASK), dst])
    ends = starts + np.concatenate([size, size])
    by_start = np.argsort(starts)
    return bool((ends[by_start][:-1] > starts[by_start][1:]).any())


def _column(wram: I64, dpu: int, column: int) -> int:
    """Where in a DPU's MRAM a column of the heap begins."""
    return int(HEAP + column * wram[dpu, ARG_NR_SLOTS])


def busiest_dpu_pages(src_addrs: U64, nr_retired: int, nr_slots: int) -> int:
    """Pages that the DPU with the most of them moved, when `nr_retired` moves of a dealt list were carried out."""
    pages: NDArray[np.int64] = np.int64(1) << (src_addrs[:nr_retired].view(np.int64) & ORDER_MASK)
    return max((int(pages[at : at + nr_slots].sum()) for at in range(0, nr_retired, nr_slots)), default=0)
