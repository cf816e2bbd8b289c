# SPDX-License-Identifier: GPL-2.0-only
"""The compiled loops of the DPU program `dpu_compact`: the layout, the moves, the waves.

The fragments of a batch are dealt to the DPUs of a set in consecutive slices, one row of MRAM each. Every DPU
holds the same skip runs, and where it starts to fill follows from them and from the fragments before its
slice. The emulator runs the slices one after the other and carries that place along, where a real DPU would walk to it
again.

A fragment is a folio of 2^order pages that moves whole; its entry is its address with the order in the low 12 bits.

Words are int64 here, so that addresses and counts mix without surprises; an address beyond 2^62 is out of any
memory.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import i64, njit

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

PAGE_SIZE = 4096
MAX_ORDER = 10  # of a fragment
ADDR_MAX = 1 << 62

# A DPU's memories in 8-byte words. DPU_INPUT_ARGUMENTS, DPU_RESULTS and the length of the printed text lie in
# WRAM; in MRAM the heap begins after the printf buffer of 1 MiB.
ARG_BASE, ARG_NR_FRAGS, ARG_FIRST_FRAG, ARG_NR_SKIP_RUNS, ARG_NR_SLOTS, NR_ARGS = range(6)
RES_STATUS = NR_ARGS
RES_NR_RETIRED = NR_ARGS + 1
NR_RESULTS = 2
PRINT_LENGTH = RES_STATUS + NR_RESULTS
MRAM_WORDS = (64 << 20) // 8
PRINT_WORDS = (1 << 20) // 8
HEAP = PRINT_WORDS

# The heap of one DPU: three columns of nr_slots words (fragment's entry, new address, checksum), then the
# skip runs.
COL_NEW, COL_SUM, NR_COLS = 1, 2, 3

STATUS_OK = 0
STATUS_BAD_ACCESS = 10  # DPU_ERR_INVALID_MRAM_ACCESS
STATUS_CORRUPTED = 18  # DPU_ERR_CORRUPTED_MEMORY


@njit
def _runs_ascend(runs: I64) -> bool:
    """Are `runs` (int64[2n]: address, nr_pages) whole pages in ascending order?"""
    last = 0
    for r in range(0, runs.shape[0], 2):
        start, nr_pages = runs[r], runs[r + 1]
        if start < last or start > ADDR_MAX or start % PAGE_SIZE:
            return False
        if nr_pages < 0 or nr_pages > ADDR_MAX // PAGE_SIZE:
            return False
        last = start
    return True


@njit
def deal_slices(base_addr: int, frag_addrs: U64, nr_skip_runs: int, args: I64, frags: U64) -> None:
    """Cut a batch into even slices: fills `args` [nr_dpus, NR_ARGS] and `frags` [nr_dpus, nr_slots]."""
    nr_dpus, nr_slots = frags.shape
    nr_frags = frag_addrs.shape[0]
    for dpu in range(nr_dpus):
        first = min(dpu * nr_slots, nr_frags)
        nr_mine = min(nr_frags - first, nr_slots)
        args[dpu, ARG_BASE] = base_addr
        args[dpu, ARG_NR_FRAGS] = nr_mine
        args[dpu, ARG_FIRST_FRAG] = first
        args[dpu, ARG_NR_SKIP_RUNS] = nr_skip_runs
        args[dpu, ARG_NR_SLOTS] = nr_slots
        for k in range(nr_mine):
            frags[dpu, k] = frag_addrs[first + k]


@njit
def frag_address(entry: int) -> int:
    """A fragment's byte address."""
    return entry & -PAGE_SIZE


@njit
def frag_bytes(entry: int) -> int:
    """A fragment's size."""
    return PAGE_SIZE << (entry & (PAGE_SIZE - 1))


@njit
def count_pages(frag_addrs: U64, nr_frags: int) -> int:
    """Pages in the first `nr_frags` fragments."""
    nr = 0
    for i in range(nr_frags):
        nr += 1 << (i64(frag_addrs[i]) & (PAGE_SIZE - 1))
    return nr


@njit
def _is_fragment(entry: int, last_end: int, memory_bytes: int) -> bool:
    """A legal order, aligned to its size, behind the fragment before and inside the memory."""
    if entry < 0 or entry > ADDR_MAX or entry & (PAGE_SIZE - 1) > MAX_ORDER:
        return False
    address, size = frag_address(entry), frag_bytes(entry)
    return address % size == 0 and last_end <= address <= memory_bytes - size


@njit
def plan_layout(mram: I64, wram: I64, dpus: I64, nr_pages: int) -> int:
    """Give every fragment its new address by the rule of kernelsim/dpu_hw.py -> number of moves.

    Refuses the batch (-STATUS_BAD_ACCESS) before anything moves unless fragments are aligned to their size, inside
    the memory of `nr_pages` pages and ascending without overlap, and every move ends below its source. That is enough
    for safety: sources and destinations both ascend, so a destination below its own source lies below every source not
    yet moved.
    """
    first_dpu = dpus[0]
    nr_runs = wram[first_dpu, ARG_NR_SKIP_RUNS]
    runs_at = HEAP + NR_COLS * wram[first_dpu, ARG_NR_SLOTS]
    if nr_runs < 0 or runs_at < HEAP or runs_at + 2 * nr_runs > MRAM_WORDS:
        return -STATUS_BAD_ACCESS
    runs = mram[first_dpu, runs_at : runs_at + 2 * nr_runs]
    cursor = wram[first_dpu, ARG_BASE]
    if cursor < 0 or cursor % PAGE_SIZE or not _runs_ascend(runs):
        return -STATUS_BAD_ACCESS
    last_end, run, nr_done = 0, 0, 0
    for dpu in dpus:
        nr_frags, nr_slots = wram[dpu, ARG_NR_FRAGS], wram[dpu, ARG_NR_SLOTS]
        if nr_frags < 0 or nr_frags > nr_slots or HEAP + NR_COLS * nr_slots > MRAM_WORDS:
            return -STATUS_BAD_ACCESS
        if wram[dpu, ARG_FIRST_FRAG] != nr_done:
            return -STATUS_BAD_ACCESS
        heap = mram[dpu, HEAP:]
        for k in range(nr_frags):
            frag = heap[k]
            if not _is_fragment(frag, last_end, nr_pages * PAGE_SIZE):
                return -STATUS_BAD_ACCESS
            size = frag_bytes(frag)
            cursor = (cursor + size - 1) & -size
            while run < nr_runs and runs[2 * run] < cursor + size:
                if runs[2 * run + 1] > 0:
                    cursor = max(cursor, min(runs[2 * run], ADDR_MAX // 2) + runs[2 * run + 1] * PAGE_SIZE)
                    cursor = (cursor + size - 1) & -size
                run += 1
            if cursor + size > frag_address(frag):
                return -STATUS_BAD_ACCESS
            heap[COL_NEW * nr_slots + k] = cursor
            cursor += size
            last_end = frag_address(frag) + size
        nr_done += nr_frags
    return nr_done


@njit
def _copy_page(src: U64, dst: U64) -> int:
    """Copy a page and return the sum of the words read.

    A plain sum, because it comes for nothing beside the copy and no single flipped bit escapes it; sums that
    also know the position cost a tenth more per cold page here.
    """
    total = np.uint64(0)
    for j in range(src.shape[0]):
        word = src[j]
        dst[j] = word
        total += word
    return np.int64(total)  # type: ignore[return-value]


@njit
def page_sum(page: U64) -> int:
    """Sum of a page's words, modulo 2^64, as int64."""
    total = np.uint64(0)
    for j in range(page.shape[0]):
        total += page[j]
    return np.int64(total)  # type: ignore[return-value]


@njit
def _flip(page: U64, bit: int) -> None:
    if page.shape[0] == 0:  # a machine that keeps no contents has none to spoil
        return
    bit %= 64 * page.shape[0]
    page[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)


@njit
def move_pages(
    memory: U64,
    mram: I64,
    wram: I64,
    dpus: I64,
    first: int,
    stop: int,
    flip_at: int,
    flip_bit: int,
    retired: I64,
    slot: int,
) -> int:
    """Carry out the planned moves first .. stop-1 in order; -> program status.

    A move retires (`retired[slot]` is then its number plus one) once what it wrote was read back, page by page, and
    the sums found right. The writes before that hit pages that are free or vacated, so whatever goes wrong, the source
    still holds the content. `flip_at` and `flip_bit` corrupt what one move wrote on purpose (-1: none).
    """
    nr_slots = wram[dpus[0], ARG_NR_SLOTS]
    for i in range(first, stop):
        heap = mram[dpus[i // nr_slots], HEAP:]
        k = i % nr_slots
        src = heap[k] // PAGE_SIZE
        dst = heap[COL_NEW * nr_slots + k] // PAGE_SIZE
        nr_pages = 1 << (heap[k] % PAGE_SIZE)
        spoils = i == flip_at and memory.shape[1] > 0
        flipped = flip_bit // (64 * memory.shape[1]) % nr_pages if spoils else -1
        total = 0
        for p in range(nr_pages):
            page = memory[dst + p]
            expected = _copy_page(memory[src + p], page)
            if p == flipped:
                _flip(page, flip_bit)
            if page_sum(page) != expected:
                return STATUS_CORRUPTED
            total += expected
        heap[COL_SUM * nr_slots + k] = total
        retired[slot] = i + 1
    return STATUS_OK


@njit
def report_retired(wram: I64, dpus: I64, nr_retired: int) -> None:
    """Tell each DPU how many of its moves retired."""
    for dpu in dpus:
        mine = nr_retired - wram[dpu, ARG_FIRST_FRAG]
        wram[dpu, RES_NR_RETIRED] = min(max(mine, 0), wram[dpu, ARG_NR_FRAGS])


@njit
def _frag_end(entry: int) -> int:
    return frag_address(entry) + frag_bytes(entry)


@njit
def cut_segments(mram: I64, wram: I64, dpus: I64, stop: int, smallest: int, ends: I64, alone: I64) -> int:
    """Cut the moves 0 .. stop-1 into long waves and the stretches between them -> number of segments.

    A segment ends before move `ends[s]`. Where `alone[s]` is 0 it is a wave (see count_waves) of at least `smallest`
    moves, whose moves may go at the same time; else it is shorter waves, to be done in order. int64 both, with room for
    2 * stop / smallest + 2.
    """
    nr_slots = wram[dpus[0], ARG_NR_SLOTS]
    nr, start, p = 0, 0, 0
    done = 0  # where the last segment ended
    for k in range(stop + 1):
        ended = k == stop
        if not ended:
            heap = mram[dpus[k // nr_slots], HEAP:]
            new, size = heap[COL_NEW * nr_slots + k % nr_slots], frag_bytes(heap[k % nr_slots])
            p = max(p, start)
            while _frag_end(mram[dpus[p // nr_slots], HEAP + p % nr_slots]) <= new:
                p += 1
            ended = p < k and frag_address(mram[dpus[p // nr_slots], HEAP + p % nr_slots]) < new + size
        if not ended:
            continue
        if k - start >= smallest:
            if start > done:
                ends[nr], alone[nr] = start, 1
                nr += 1
            ends[nr], alone[nr] = k, 0
            nr += 1
            done = k
        start = k
    if stop > done:
        ends[nr], alone[nr] = stop, 1
        nr += 1
    return nr


@njit
def count_waves(src: U64, dst: U64, nr_moves: int, nr_dpus: int) -> tuple[int, int]:
    """Cut the first `nr_moves` moves into waves -> (nr_waves, nr_rounds). `src`: the fragments' entries.

    A wave is the longest run of moves of which none lands on the source of an earlier move of the same wave:
    those may go at the same time. A round is one page on each DPU: the sum over waves of ceil(pages / nr_dpus).
    Both lists ascend, so one pointer `p` follows the sources as the destinations rise.
    """
    nr_waves, nr_rounds, nr_pages = 0, 0, 0
    start, p = 0, 0
    for k in range(nr_moves):
        size, new = frag_bytes(i64(src[k])), i64(dst[k])
        p = max(p, start)
        while _frag_end(i64(src[p])) <= new:
            p += 1
        if p < k and frag_address(i64(src[p])) < new + size:
            nr_waves += 1
            nr_rounds += (nr_pages + nr_dpus - 1) // nr_dpus
            start, nr_pages = k, 0
        nr_pages += size // PAGE_SIZE
    if nr_moves > start:
        nr_waves += 1
        nr_rounds += (nr_pages + nr_dpus - 1) // nr_dpus
    return nr_waves, nr_rounds
