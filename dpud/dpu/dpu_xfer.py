# SPDX-License-Identifier: GPL-2.0-only
"""Transfers between the host and the memories of DPUs: the `dpu_copy_*`, `dpu_*_xfer` half of the host API.

What is legal (reference dpu.md 1.2, 1.5): a transfer stays within its symbol (INVALID_SYMBOL_ACCESS); WRAM is accessed
in words of 4 bytes, IRAM and MRAM of 8 (INVALID_*_ACCESS); nobody reaches MRAM whose DPU runs (MRAM_BUSY). A push moves
the buffers that were prepared, one for each DPU; a DPU that has none is left out.

Asynchronous transfers are checked when they are asked for and happen in the rank's order of jobs. Their buffers belong
to the transfer until then.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum, IntFlag
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dpud.dpu.errors import DpuErr, DpuError, DpuJob
from dpud.dpu.move import I64
from dpud.dpu.rank import BAD_ACCESS, Rank, Space, Symbol

Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]

WORD_BYTES = 8
WRAM_WORD_BYTES = 4


class XferDirection(IntEnum):
    DPU_XFER_TO_DPU = 0
    DPU_XFER_FROM_DPU = 1


class XferFlags(IntFlag):
    DPU_XFER_DEFAULT = 0
    DPU_XFER_NO_RESET = 1
    """Keep the prepared buffers for another push."""
    DPU_XFER_ASYNC = 2
    DPU_XFER_PARALLEL = 4
    """While the DPUs run; WRAM only."""


class SgXferFlags(IntFlag):
    DPU_SG_XFER_DEFAULT = 0
    DPU_SG_XFER_ASYNC = 2
    DPU_SG_XFER_DISABLE_LENGTH_CHECK = 4


TO_DPU, FROM_DPU = XferDirection.DPU_XFER_TO_DPU, XferDirection.DPU_XFER_FROM_DPU
DEFAULT = XferFlags.DPU_XFER_DEFAULT

GetBlock = Callable[[int, int], Buffer | None]
"""(index of the DPU in the set, index of the block) -> the block; None after the last one."""

Part = tuple[Rank, I64]
"""A rank of a set and which of its DPUs belong to it (int64[n], ascending)."""

_JOBS = {
    (Space.WRAM, TO_DPU): DpuJob.COPY_WRAM_TO_MATRIX,
    (Space.IRAM, TO_DPU): DpuJob.COPY_IRAM_TO_MATRIX,
    (Space.MRAM, TO_DPU): DpuJob.COPY_MRAM_TO_MATRIX,
    (Space.WRAM, FROM_DPU): DpuJob.COPY_WRAM_FROM_MATRIX,
    (Space.IRAM, FROM_DPU): DpuJob.COPY_IRAM_FROM_MATRIX,
    (Space.MRAM, FROM_DPU): DpuJob.COPY_MRAM_FROM_MATRIX,
}


def rows_of(dpus: I64) -> slice | I64:
    """Index of some DPUs' rows: a slice where they follow one another, which numpy copies much faster."""
    first, last = int(dpus[0]), int(dpus[-1])
    return slice(first, last + 1) if last - first == len(dpus) - 1 else dpus


def as_bytes(buffer: Buffer) -> memoryview:
    """A buffer as bytes; DpuError(INVALID_MEMORY_TRANSFER) for one that is not C-contiguous."""
    view: memoryview = memoryview(buffer)  # type: ignore[arg-type]
    if not view.c_contiguous:
        raise DpuError(DpuErr.INVALID_MEMORY_TRANSFER)
    return view.cast("B") if view.nbytes else memoryview(b"")


class DpuTransfers:
    """The transfers of a set of DPUs; dpu_set.DpuSet is the whole."""

    _parts: list[Part]
    nr_dpus: int

    def live_parts(self) -> list[Part]:
        """The ranks and DPUs; DpuError(INVALID_DPU_SET) if the set was freed."""
        raise NotImplementedError

    # --- symbols ---

    def symbols(self) -> Mapping[str, Symbol]:
        """The symbols of the program; DpuError(NO_PROGRAM_LOADED, DIFFERENT_DPU_PROGRAMS)."""
        (first, dpus), *others = self.live_parts()
        program = first.program_of(dpus)
        if any(rank.program_of(dpus) is not program for rank, dpus in others):
            raise DpuError(DpuErr.DIFFERENT_DPU_PROGRAMS)
        return program.symbols

    def get_symbol(self, name: str) -> Symbol:
        """dpu_get_symbol; DpuError NO_PROGRAM_LOADED, DIFFERENT_DPU_PROGRAMS or UNKNOWN_SYMBOL."""
        symbol = self.symbols().get(name)
        if symbol is None:
            raise DpuError(DpuErr.UNKNOWN_SYMBOL)
        return symbol

    def _window(self, symbol: str | Symbol, offset: int, length: int) -> tuple[Space, slice]:
        """Where `length` bytes at `offset` of a symbol lie; checks bounds and alignment."""
        if isinstance(symbol, str):
            symbol = self.get_symbol(symbol)
        if offset < 0 or length < 0 or offset + length > symbol.size_bytes:
            raise DpuError(DpuErr.INVALID_SYMBOL_ACCESS)
        start = symbol.offset_bytes + offset
        rank = self.live_parts()[0][0]
        word = WRAM_WORD_BYTES if symbol.space is Space.WRAM else WORD_BYTES
        if (start % word or length % word) and rank.options.safe_checks:
            raise DpuError(BAD_ACCESS[symbol.space])
        if start + length > rank.size_of(symbol.space):
            raise DpuError(BAD_ACCESS[symbol.space])
        return symbol.space, slice(start, start + length)

    # --- copies ---

    def copy_to(self, symbol: str | Symbol, offset: int, source: Buffer, flags: XferFlags = DEFAULT) -> None:
        """dpu_copy_to, dpu_broadcast_to: the same bytes to every DPU of the set."""
        data = np.frombuffer(as_bytes(source), np.uint8)
        space, window = self._window(symbol, offset, len(data))

        def copy(rank: Rank, dpus: I64) -> None:
            rank.bytes_of(space)[rows_of(dpus), window] = data

        self._do(TO_DPU, space, flags, copy)

    broadcast_to = copy_to

    def copy_from(self, symbol: str | Symbol, offset: int, length: int) -> bytes:
        """dpu_copy_from: `length` bytes of one DPU; DpuError(INVALID_DPU_SET) for a set of several."""
        rank, dpu = self.single()
        space, window = self._window(symbol, offset, length)
        rank.check_access(space, self._parts[0][1])
        return rank.bytes_of(space)[dpu, window].tobytes()

    def single(self) -> tuple[Rank, int]:
        """The one DPU of the set: its rank and its number there; DpuError(INVALID_DPU_SET) for several."""
        parts = self.live_parts()
        if self.nr_dpus != 1:
            raise DpuError(DpuErr.INVALID_DPU_SET)
        rank, dpus = parts[0]
        return rank, int(dpus[0])

    # --- prepared transfers ---

    def prepare_xfer(self, buffer: Buffer) -> None:
        """dpu_prepare_xfer: what the next push moves to or from each DPU of the set.

        DpuError(TRANSFER_ALREADY_SET), nothing prepared, if one of them has a buffer already.
        """
        view = as_bytes(buffer)
        parts = self.live_parts()
        if any(dpu in rank.prepared for rank, dpus in parts for dpu in dpus.tolist()):
            raise DpuError(DpuErr.TRANSFER_ALREADY_SET)
        for rank, dpus in parts:
            rank.prepared.update((dpu, view) for dpu in dpus.tolist())

    def unprepare_xfer(self) -> None:
        """Forget the buffers that were prepared for the DPUs of the set. Not of the SDK."""
        for rank, dpus in self.live_parts():
            for dpu in dpus.tolist():
                rank.prepared.pop(dpu, None)

    def push_xfer(
        self,
        direction: XferDirection,
        symbol: str | Symbol,
        offset: int,
        what: int | NDArray[Any],
        flags: XferFlags = DEFAULT,
    ) -> None:
        """dpu_push_xfer: `what` bytes of each prepared buffer to its DPU, or from it.

        `what` may also be the buffers themselves, one row for each DPU of the set: [nr_dpus, n] of any dtype,
        C-contiguous. INVALID_MEMORY_TRANSFER: another shape, a buffer that is too small or cannot be written.
        """
        if not isinstance(what, int):
            self._push_rows(direction, symbol, offset, what, flags)
            return
        space, window = self._window(symbol, offset, what)
        buffers = [
            (rank, {dpu: rank.prepared[dpu] for dpu in dpus.tolist() if dpu in rank.prepared})
            for rank, dpus in self.live_parts()
        ]
        for _rank, prepared in buffers:
            if any(len(view) < what or (direction and view.readonly) for view in prepared.values()):
                raise DpuError(DpuErr.INVALID_MEMORY_TRANSFER)
        by_rank = dict(buffers)

        def copy(rank: Rank, _dpus: I64) -> None:
            memory = rank.bytes_of(space)
            for dpu, view in by_rank[rank].items():
                host = np.frombuffer(view, np.uint8)[:what]
                if direction == TO_DPU:
                    memory[dpu, window] = host
                else:
                    host[:] = memory[dpu, window]

        self._do(direction, space, flags, copy)
        if not flags & XferFlags.DPU_XFER_NO_RESET:
            for rank, prepared in buffers:
                for dpu in prepared:
                    del rank.prepared[dpu]

    def _push_rows(
        self, direction: XferDirection, symbol: str | Symbol, offset: int, rows: NDArray[Any], flags: XferFlags
    ) -> None:
        if rows.ndim != 2 or len(rows) != self.nr_dpus or not rows.flags.c_contiguous:
            raise DpuError(DpuErr.INVALID_MEMORY_TRANSFER)
        data = rows.view(np.uint8)
        space, window = self._window(symbol, offset, data.shape[1])
        if len(self._parts) == 1 and flags is DEFAULT:  # what every batch of the driver does
            rank, dpus = self._parts[0]
            rank.check_access(space, dpus)
            _copy_rows(direction, rank.bytes_of(space), rows_of(dpus), window, data)
            return
        places = {rank: first for first, (rank, _) in zip(self._first_rows(), self._parts, strict=True)}

        def copy(rank: Rank, dpus: I64) -> None:
            mine = data[places[rank] : places[rank] + len(dpus)]
            _copy_rows(direction, rank.bytes_of(space), rows_of(dpus), window, mine)

        self._do(direction, space, flags, copy)

    def _first_rows(self) -> Iterator[int]:
        """Place in the set of each part's first DPU."""
        at = 0
        for _, dpus in self._parts:
            yield at
            at += len(dpus)

    # --- scatter and gather ---

    def push_sg_xfer(
        self,
        direction: XferDirection,
        symbol: str | Symbol,
        offset: int,
        length: int,
        get_block: GetBlock,
        flags: SgXferFlags = SgXferFlags.DPU_SG_XFER_DEFAULT,
    ) -> None:
        """dpu_push_sg_xfer: the blocks that `get_block` names, one after the other, to or from each DPU.

        DpuError SG_NOT_ACTIVATED without the property sgXferEnable=true, SG_NOT_MRAM_SYMBOL, SG_TOO_MANY_BLOCKS
        (sgXferMaxBlocksPerDpu), SG_LENGTH_MISMATCH if a DPU's blocks are not `length` bytes together.
        """
        rank = self.live_parts()[0][0]
        if rank.options.sg_max_blocks is None:
            raise DpuError(DpuErr.SG_NOT_ACTIVATED)
        space, window = self._window(symbol, offset, length)
        if space is not Space.MRAM:
            raise DpuError(DpuErr.SG_NOT_MRAM_SYMBOL)
        lists = [self._blocks(get_block, i, rank.options.sg_max_blocks) for i in range(self.nr_dpus)]
        for blocks in lists:
            total = sum(map(len, blocks))
            checked = not flags & SgXferFlags.DPU_SG_XFER_DISABLE_LENGTH_CHECK
            if total > length or (checked and total != length):
                raise DpuError(DpuErr.SG_LENGTH_MISMATCH)
            if direction == FROM_DPU and any(block.readonly for block in blocks):
                raise DpuError(DpuErr.INVALID_MEMORY_TRANSFER)
        places = {rank: first for first, (rank, _) in zip(self._first_rows(), self._parts, strict=True)}

        def copy(rank: Rank, dpus: I64) -> None:
            for i, dpu in enumerate(dpus.tolist(), places[rank]):
                _copy_blocks(direction, rank.bytes_of(space)[dpu, window], lists[i])

        asynchronous = flags & SgXferFlags.DPU_SG_XFER_ASYNC
        self._do(direction, space, XferFlags.DPU_XFER_ASYNC if asynchronous else DEFAULT, copy)

    @staticmethod
    def _blocks(get_block: GetBlock, dpu_index: int, most: int) -> list[memoryview]:
        blocks: list[memoryview] = []
        while (block := get_block(dpu_index, len(blocks))) is not None:
            if len(blocks) == most:
                raise DpuError(DpuErr.SG_TOO_MANY_BLOCKS)
            blocks.append(as_bytes(block))
        return blocks

    # --- now or later ---

    def _do(self, direction: XferDirection, space: Space, flags: XferFlags, copy: Callable[[Rank, I64], None]) -> None:
        """Copy on every rank: at once, after all of them were found accessible, or as a job of each."""
        if flags is not DEFAULT and flags & XferFlags.DPU_XFER_PARALLEL and space is not Space.WRAM:
            raise DpuError(DpuErr.INVALID_PARALLEL_MEMORY_TRANSFER)
        if flags is DEFAULT or not flags & XferFlags.DPU_XFER_ASYNC:
            for rank, dpus in self._parts:
                rank.check_access(space, dpus)
            for rank, dpus in self._parts:
                copy(rank, dpus)
            return
        for rank, dpus in self._parts:

            def job(rank: Rank = rank, dpus: I64 = dpus) -> None:
                rank.check_access(space, dpus, queued=True)
                copy(rank, dpus)

            rank.queue(_JOBS[space, direction], job)


def _copy_rows(
    direction: XferDirection, memory: NDArray[np.uint8], rows: slice | I64, window: slice, host: NDArray[np.uint8]
) -> None:
    if direction == TO_DPU:
        memory[rows, window] = host
    else:
        host[:] = memory[rows, window]


def _copy_blocks(direction: XferDirection, memory: NDArray[np.uint8], blocks: list[memoryview]) -> None:
    at = 0
    for block in blocks:
        host = np.frombuffer(block, np.uint8)
        if direction == TO_DPU:
            memory[at : at + len(host)] = host
        else:
            host[:] = memory[at : at + len(host)]
        at += len(host)
