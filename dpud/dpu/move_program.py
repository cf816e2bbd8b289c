# SPDX-License-Identifier: GPL-2.0-only
"""The DPU program `dpu_move`: moves listed folios to listed places, for who empties a range of memory.

Host-visible symbols are those of `dpu_compact` (program.py), and so are faults and the way moves retire. No place in
the list overlaps another, so all moves are one wave.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dpud.dpu import move, move_list
from dpud.dpu.faults import Fault, FaultKind
from dpud.dpu.move import I64
from dpud.dpu.program import DPU_COMPACT, PARALLEL_MOVES, _limits, _move_wave, dpu_printf
from dpud.dpu.rank import Rank, Space, Symbol


@dataclass(frozen=True)
class DpuMove:
    """The program as the loader sees it."""

    name: str
    symbols: Mapping[str, Symbol]
    nr_tasklets: int
    iram_bytes: int

    def main(self, rank: Rank, dpus: I64) -> FaultKind | None:
        """Check, move, report. A refused list moves nothing; a fault stops it before move `fault.move`."""
        mram, wram = rank.words_of(Space.MRAM), rank.words_of(Space.WRAM)
        nr_moves = move_list.check_list(mram, wram, dpus, rank.memory.shape[0])
        if nr_moves > 0 and move_list.overlap(mram, wram, dpus):
            nr_moves = -move.STATUS_BAD_ACCESS
        fault: Fault | None = None
        status = -nr_moves
        if nr_moves >= 0:
            fault = rank.take_fault(nr_moves)
            stop, flip_at, flip_bit = _limits(fault, nr_moves)
            status = _move(rank, dpus, stop, flip_at, flip_bit)
        move.report_retired(wram, dpus, int(rank.completion[0]))
        if status:
            wram[dpus, move.RES_STATUS] = status
        dpu_printf(rank, int(dpus[0]), f"dpu_move: {rank.completion[0]} moves done, status {status}\n")
        if fault is None or fault.kind in (FaultKind.PARTIAL, FaultKind.CORRUPT):
            return None
        return fault.kind


def _move(rank: Rank, dpus: I64, stop: int, flip_at: int, flip_bit: int) -> int:
    """Carry out the moves before `stop`, a long list by two threads; -> program status."""
    mram, wram = rank.words_of(Space.MRAM), rank.words_of(Space.WRAM)

    def move_range(first: int, last: int, slot: int) -> int:
        return move.move_pages(rank.memory, mram, wram, dpus, first, last, flip_at, flip_bit, rank.completion, slot)

    return move_range(0, stop, 0) if stop < 2 * PARALLEL_MOVES else _move_wave(rank, move_range, 0, stop)


DPU_MOVE = DpuMove(
    name="dpu_move",
    symbols=DPU_COMPACT.symbols,
    nr_tasklets=DPU_COMPACT.nr_tasklets,
    iram_bytes=DPU_COMPACT.iram_bytes,
)
