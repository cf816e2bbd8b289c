# SPDX-License-Identifier: GPL-2.0-only
"""The DPU program `dpu_compact`: works out the packed layout on its own and moves the pages there.

Host-visible symbols, all in 8-byte words (move.py has the offsets):

    DPU_INPUT_ARGUMENTS    WRAM  base_address, frag_num (in this DPU's slice), first_frag (how many come
                                 before the slice), nr_skip_runs, nr_slots (room per column)
    DPU_RESULTS            WRAM  status (a dpu_error_t: success, invalid mram access, corrupted memory),
                                 nr_retired
    __sys_used_mram_end    MRAM  the heap: fragment addresses and skip runs in, new addresses and
                                 page sums out
    __sys_print_length     WRAM  bytes that printf wrote
    __sys_print_buffer     MRAM  the text

The DPU whose slice begins the batch prints the one line of the log.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dpud.dpu import move
from dpud.dpu.faults import Fault, FaultKind
from dpud.dpu.move import I64
from dpud.dpu.rank import Rank, Space, Symbol

WORD_BYTES = 8
DPU_MRAM_HEAP_POINTER_NAME = "__sys_used_mram_end"
PARALLEL_MOVES = 4096
"""Waves shorter than this are not worth a second thread: it takes 0.1 ms to wake, they take less than 2 ms."""

DPU_INPUT_ARGUMENTS = "DPU_INPUT_ARGUMENTS"
DPU_RESULTS = "DPU_RESULTS"
PRINT_LENGTH = "__sys_print_length"
PRINT_BUFFER = "__sys_print_buffer"


def _words(space: Space, first: int, nr_words: int) -> Symbol:
    return Symbol(space, first * WORD_BYTES, nr_words * WORD_BYTES)


def dpu_printf(rank: Rank, dpu: int, text: str) -> None:
    """Put `text` in the DPU's print buffer, in place of what was there."""
    data = text.encode()[: move.PRINT_WORDS * WORD_BYTES]
    rank.bytes_of(Space.MRAM)[dpu, : len(data)] = np.frombuffer(data, np.uint8)
    rank.words_of(Space.WRAM)[dpu, move.PRINT_LENGTH] = len(data)


@dataclass(frozen=True)
class DpuCompact:
    """The program as the loader sees it. 11 tasklets saturate the pipeline of a real DPU (dpu.md 1.5)."""

    name: str
    symbols: Mapping[str, Symbol]
    nr_tasklets: int
    iram_bytes: int

    def main(self, rank: Rank, dpus: I64) -> FaultKind | None:
        """Plan, move, report. A refused batch moves nothing; a fault stops it before move `fault.move`."""
        mram, wram = rank.words_of(Space.MRAM), rank.words_of(Space.WRAM)
        nr_moves = move.plan_layout(mram, wram, dpus, rank.memory.shape[0])
        fault: Fault | None = None
        status = -nr_moves
        if nr_moves >= 0:
            fault = rank.take_fault(nr_moves)
            stop, flip_at, flip_bit = _limits(fault, nr_moves)
            status = _move(rank, dpus, stop, flip_at, flip_bit)
        move.report_retired(wram, dpus, int(rank.completion[0]))
        if status:
            wram[dpus, move.RES_STATUS] = status
        nr_retired = rank.completion[0]
        dpu_printf(rank, int(dpus[0]), f"dpu_compact: {nr_retired} pages moved, status {status}\n")
        if fault is None or fault.kind in (FaultKind.PARTIAL, FaultKind.CORRUPT):
            return None
        return fault.kind


def _move(rank: Rank, dpus: I64, stop: int, flip_at: int, flip_bit: int) -> int:
    """Carry out the moves before `stop`; -> program status, rank.completion[0] tells how many retired.

    The DPUs of a rank work side by side. So do two threads here, in each wave that is long enough to be worth it: its
    moves do not touch one another's pages. A failure in the first half leaves moves of the second half done but not
    retired; their sources are still whole, since only a later wave may write there.
    """
    mram, wram = rank.words_of(Space.MRAM), rank.words_of(Space.WRAM)

    def move_range(first: int, last: int, slot: int) -> int:
        return move.move_pages(rank.memory, mram, wram, dpus, first, last, flip_at, flip_bit, rank.completion, slot)

    if stop < 2 * PARALLEL_MOVES:
        return move_range(0, stop, 0)
    room = 2 * (stop // PARALLEL_MOVES + 1)
    ends, alone = np.empty(room, np.int64), np.empty(room, np.int64)
    nr = move.cut_segments(mram, wram, dpus, stop, PARALLEL_MOVES, ends, alone)
    first = 0
    for last, in_order in zip(ends[:nr].tolist(), alone[:nr].tolist(), strict=True):
        status = move_range(first, last, 0) if in_order else _move_wave(rank, move_range, first, last)
        if status:
            return status
        first = last
    return move.STATUS_OK


def _move_wave(rank: Rank, move_range: Callable[[int, int, int], int], first: int, last: int) -> int:
    """One wave, its halves at the same time; -> program status."""
    middle = (first + last) // 2
    rank.completion[1] = middle
    second = rank.helper.submit(move_range, middle, last, 1)
    try:
        status = move_range(first, middle, 0)
    finally:
        late_status = second.result()
    if status:
        return status
    rank.completion[0] = rank.completion[1]
    return late_status


def _limits(fault: Fault | None, nr_moves: int) -> tuple[int, int, int]:
    """Where a fault makes the program stop and what it flips -> (stop, flip_at, flip_bit)."""
    if fault is None:
        return nr_moves, -1, 0
    if fault.kind is FaultKind.CORRUPT:
        return nr_moves, fault.move, fault.bit
    if fault.kind is FaultKind.LOST_COMPLETION:
        return nr_moves, -1, 0
    return fault.move, -1, 0


DPU_COMPACT = DpuCompact(
    name="dpu_compact",
    symbols={
        DPU_INPUT_ARGUMENTS: _words(Space.WRAM, 0, move.NR_ARGS),
        DPU_RESULTS: _words(Space.WRAM, move.RES_STATUS, move.NR_RESULTS),
        PRINT_LENGTH: _words(Space.WRAM, move.PRINT_LENGTH, 1),
        PRINT_BUFFER: _words(Space.MRAM, 0, move.PRINT_WORDS),
        DPU_MRAM_HEAP_POINTER_NAME: _words(Space.MRAM, move.HEAP, move.MRAM_WORDS - move.HEAP),
    },
    nr_tasklets=11,
    iram_bytes=4096,
)
