# SPDX-License-Identifier: GPL-2.0-only
"""The host API, shaped like the SDK's `dpu_*` functions over a `dpu_set_t`.

Names, arguments and errors follow the C API (reference dpu.md 1.2) without the `dpu_` prefix; a call that
would not return DPU_OK raises `DpuError`. This is a subset: programs load rank-wide, per-DPU buffers are the
rows of one array instead of `dpu_prepare_xfer` calls, and there are no parallel transfers, FIFOs or
checkpoints.

A set that came from `alloc` owns whole ranks until `free`; `ranks()` and `dpus()` give views of it.
"""

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dpud.dpu.errors import DpuErr, DpuError, DpuJob
from dpud.dpu.move import I64
from dpud.dpu.program import PRINT_BUFFER, PRINT_LENGTH, WORD_BYTES
from dpud.dpu.rank import NR_DPUS_PER_CI, DpuProgram, Rank, RankPool, RankState, Space, Symbol

DPU_ALLOCATE_ALL = (1 << 32) - 1
TARGET_HW = 3  # the target number in the SDK's own example of a log header


class LaunchPolicy(IntEnum):
    DPU_ASYNCHRONOUS = 0
    DPU_SYNCHRONOUS = 1


class XferDirection(IntEnum):
    DPU_XFER_TO_DPU = 0
    DPU_XFER_FROM_DPU = 1


ALIGNMENT = {
    Space.WRAM: (4, DpuErr.INVALID_WRAM_ACCESS),
    Space.MRAM: (WORD_BYTES, DpuErr.INVALID_MRAM_ACCESS),
}

Part = tuple[Rank, I64]
"""A rank of the set and which of its DPUs belong to it (int64[n], ascending)."""


def _rows(dpus: I64) -> slice | I64:
    """Index of some DPUs' rows: a slice where they follow one another, which numpy copies much faster."""
    first, last = int(dpus[0]), int(dpus[-1])
    return slice(first, last + 1) if last - first == len(dpus) - 1 else dpus


def _wanted(number: int) -> int | None:
    return None if number == DPU_ALLOCATE_ALL else number


class DpuSet:
    """Some DPUs of some ranks. Make one with `alloc` or `alloc_ranks`."""

    def __init__(self, pool: RankPool, parts: list[Part], owner: Self | None = None, whole: bool = True) -> None:
        self._pool = pool
        self._parts = parts
        self._ranks = [rank for rank, _ in parts]
        self._owner = owner or self
        self._whole = whole
        self._freed = False
        self.nr_dpus = sum(len(dpus) for _, dpus in parts)

    # --- allocation and iteration ---

    @classmethod
    def alloc(cls, pool: RankPool, nr_dpus: int = DPU_ALLOCATE_ALL) -> Self:
        """dpu_alloc: `nr_dpus` DPUs, from whole ranks; DpuError(ALLOCATION) if there are not enough free."""
        ranks = pool.claim(_wanted(nr_dpus), lambda rank: len(rank.enabled))
        parts, missing = [], nr_dpus
        for rank in ranks:
            parts.append((rank, rank.enabled[:missing]))
            missing -= len(parts[-1][1])
        return cls(pool, parts)

    @classmethod
    def alloc_ranks(cls, pool: RankPool, nr_ranks: int = DPU_ALLOCATE_ALL) -> Self:
        """dpu_alloc_ranks: all DPUs of `nr_ranks` ranks."""
        ranks = pool.claim(_wanted(nr_ranks), lambda rank: 1)
        return cls(pool, [(rank, rank.enabled) for rank in ranks])

    def free(self) -> None:
        """dpu_free: wait for what runs, give the ranks back. Only for a set that came from `alloc`, once."""
        if self._owner is not self:
            raise DpuError(DpuErr.INVALID_DPU_SET)
        for rank in self._live_ranks():
            rank.worker.drain()
        self._freed = True
        self._pool.release(self._ranks)

    def __len__(self) -> int:
        return self.nr_dpus

    def ranks(self) -> Iterator[Self]:
        """DPU_RANK_FOREACH."""
        for part in self._parts:
            yield type(self)(self._pool, [part], self._owner)

    def dpus(self) -> Iterator[Self]:
        """DPU_FOREACH."""
        for rank, dpus in self._parts:
            for d in range(len(dpus)):
                part = (rank, dpus[d : d + 1])
                yield type(self)(self._pool, [part], self._owner, whole=len(dpus) == 1)

    def _live_ranks(self) -> list[Rank]:
        """The ranks, unless the set was freed."""
        if self._owner._freed:
            raise DpuError(DpuErr.INVALID_DPU_SET)
        return self._ranks

    @property
    def rank(self) -> Rank:
        """The one rank of the set; DpuError(INVALID_DPU_SET) if there are several."""
        ranks = self._live_ranks()
        if len(ranks) != 1:
            raise DpuError(DpuErr.INVALID_DPU_SET)
        return ranks[0]

    # --- program and symbols ---

    def load(self, program: DpuProgram) -> None:
        """dpu_load. A program loads into whole ranks, so the set must not be a view of single DPUs."""
        if not self._whole:
            raise DpuError(DpuErr.INVALID_DPU_SET)
        for rank in self._live_ranks():
            rank.load(program)

    def symbol(self, name: str) -> Symbol:
        """dpu_get_symbol; DpuError NO_PROGRAM_LOADED, DIFFERENT_DPU_PROGRAMS or UNKNOWN_SYMBOL."""
        ranks = self._live_ranks()
        program = ranks[0].program
        for rank in ranks:
            if rank.program is not program:
                raise DpuError(DpuErr.DIFFERENT_DPU_PROGRAMS)
        if program is None:
            raise DpuError(DpuErr.NO_PROGRAM_LOADED)
        symbol = program.symbols.get(name)
        if symbol is None:
            raise DpuError(DpuErr.UNKNOWN_SYMBOL)
        return symbol

    def _window(self, name: str, offset: int, length: int) -> tuple[Space, slice]:
        """Where `length` bytes at `offset` of a symbol lie; checks bounds, alignment and who has the bank."""
        symbol = self.symbol(name)
        if offset < 0 or length < 0 or offset + length > symbol.size_bytes:
            raise DpuError(DpuErr.INVALID_SYMBOL_ACCESS)
        alignment, error = ALIGNMENT[symbol.space]
        start = symbol.offset_bytes + offset
        if start % alignment or length % alignment:
            raise DpuError(error)
        for rank in self._ranks:
            rank.check_access(symbol.space)
        return symbol.space, slice(start, start + length)

    # --- transfers ---

    def copy_to(self, symbol: str, offset: int, source: bytes | bytearray | memoryview | NDArray[Any]) -> None:
        """dpu_copy_to: the same bytes to every DPU of the set. `source` is C-contiguous."""
        data = np.frombuffer(source, np.uint8)
        space, window = self._window(symbol, offset, len(data))
        for rank, dpus in self._parts:
            rank.bytes_of(space)[_rows(dpus), window] = data

    def copy_from(self, symbol: str, offset: int, length: int) -> bytes:
        """dpu_copy_from: `length` bytes of one DPU; DpuError(INVALID_DPU_SET) for a set of several."""
        rank, dpu = self._single()
        space, window = self._window(symbol, offset, length)
        return rank.bytes_of(space)[dpu, window].tobytes()

    def push_xfer(self, direction: XferDirection, symbol: str, offset: int, rows: NDArray[Any]) -> None:
        """dpu_prepare_xfer on each DPU and dpu_push_xfer: `rows[i]` goes to, or is filled from, DPU i of the
        set.

        `rows` is [nr_dpus, n] of any dtype, C-contiguous; else DpuError(INVALID_MEMORY_TRANSFER).
        """
        if rows.ndim != 2 or len(rows) != self.nr_dpus or not rows.flags.c_contiguous:
            raise DpuError(DpuErr.INVALID_MEMORY_TRANSFER)
        data = rows.view(np.uint8)
        space, window = self._window(symbol, offset, data.shape[1])
        at = 0
        for rank, dpus in self._parts:
            mine = data[at : at + len(dpus)]
            if direction == XferDirection.DPU_XFER_TO_DPU:
                rank.bytes_of(space)[_rows(dpus), window] = mine
            else:
                mine[:] = rank.bytes_of(space)[_rows(dpus), window]
            at += len(dpus)

    # --- running ---

    def launch(self, policy: LaunchPolicy) -> None:
        """dpu_launch. Synchronous: runs here, raises what the DPUs ended with. Asynchronous: `sync` does."""
        if policy not in (LaunchPolicy.DPU_ASYNCHRONOUS, LaunchPolicy.DPU_SYNCHRONOUS):
            raise DpuError(DpuErr.INVALID_LAUNCH_POLICY)
        ranks = self._live_ranks()
        for rank in ranks:
            rank.check_launch()
        for rank in ranks:
            rank.begin()
        if policy == LaunchPolicy.DPU_ASYNCHRONOUS:
            for rank, dpus in self._parts:
                rank.worker.put(lambda rank=rank, dpus=dpus: rank.execute_async(dpus))  # type: ignore[misc]
            return
        errors = [rank.execute(dpus) for rank, dpus in self._parts]
        if any(errors):
            raise DpuError(next(error for error in errors if error))

    def sync(self) -> None:
        """dpu_sync: wait for the asynchronous jobs; raises the first error among them (ASYNC_JOBS)."""
        for rank in self._live_ranks():
            rank.worker.drain()
        self._raise_async_error()

    def callback(self, function: Callable[[Self, DpuError | None], object]) -> None:
        """dpu_callback, asynchronous, on a set within one rank: run `function(set, error)` on the rank's
        worker.

        It runs after the jobs before it; `error` is what they ended with, and is thereby taken from `sync`.
        """
        self.rank.worker.put(lambda: function(self, self._take_async_error()))

    def _take_async_error(self) -> DpuError | None:
        errors = [rank.async_error for rank in self._ranks]
        for rank in self._ranks:
            rank.async_error = DpuErr.OK
        first = next((error for error in errors if error), None)
        return None if first is None else DpuError(first, DpuJob.LAUNCH_RANK)

    def _raise_async_error(self) -> None:
        error = self._take_async_error()
        if error is not None:
            raise error

    def status(self) -> tuple[bool, bool]:
        """dpu_status -> (done, fault)."""
        states = [rank.state for rank in self._live_ranks()]
        done = not any(state in (RankState.RUNNING, RankState.HUNG) for state in states)
        return done, RankState.FAULT in states

    # --- log ---

    def log_read(self) -> str:
        """dpu_log_read: what one DPU printed, under a line naming it; INVALID_DPU_SET for several."""
        rank, dpu = self._single()
        nr_bytes = int.from_bytes(self.copy_from(PRINT_LENGTH, 0, WORD_BYTES), "little")
        padded = -(-nr_bytes // WORD_BYTES) * WORD_BYTES
        text = self.copy_from(PRINT_BUFFER, 0, padded)[:nr_bytes].decode()
        slice_id, member = divmod(dpu, NR_DPUS_PER_CI)
        number = TARGET_HW << 28 | rank.rank_id << 16 | slice_id << 8 | member
        return f"=== DPU#0x{number:x} ===\n{text}"

    def _single(self) -> tuple[Rank, int]:
        if self.nr_dpus != 1:
            raise DpuError(DpuErr.INVALID_DPU_SET)
        rank, dpus = self._parts[0]
        return rank, int(dpus[0])
