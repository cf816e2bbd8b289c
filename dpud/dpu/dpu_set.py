# SPDX-License-Identifier: GPL-2.0-only
"""The host API, shaped like the SDK's `dpu_*` functions over a `dpu_set_t`.

Names, arguments and errors follow the C API (reference dpu.md 1.2) without the `dpu_` prefix; a call that would not
return DPU_OK raises `DpuError`. Transfers are in dpu_xfer.py, WRAM FIFOs in dpu_fifo.py, checkpoints in checkpoint.py.

A set that came from `alloc` owns whole ranks until `free`; `ranks()` and `dpus()` give views of it.

What is synchronous happens on the caller's thread, now, and finds out if the DPUs run; what is asynchronous happens on
each rank's own thread after what was asked of it before (nrJobsPerRank, nrThreadsPerRank), and its first error comes
out of `sync`.
"""

from collections.abc import Callable, Iterator
from enum import IntEnum, IntFlag
from functools import partial
from threading import Event
from typing import Any, Self

import numpy as np

from dpud.dpu.dpu_fifo import DpuFifos
from dpud.dpu.dpu_xfer import Part
from dpud.dpu.dpu_xfer import XferDirection as XferDirection
from dpud.dpu.dpu_xfer import XferFlags as XferFlags
from dpud.dpu.errors import DpuErr, DpuError, DpuJob
from dpud.dpu.program import PRINT_BUFFER, PRINT_LENGTH, WORD_BYTES
from dpud.dpu.rank import NR_CIS, NR_DPUS_PER_CI, DpuProgram, Rank, RankPool, RankState

DPU_ALLOCATE_ALL = (1 << 32) - 1
TARGET_HW = 3  # the target number in the SDK's own example of a log header


class LaunchPolicy(IntEnum):
    DPU_ASYNCHRONOUS = 0
    DPU_SYNCHRONOUS = 1


class CallbackFlags(IntFlag):
    DPU_CALLBACK_DEFAULT = 0
    DPU_CALLBACK_ASYNC = 1
    DPU_CALLBACK_NONBLOCKING = 2
    """A single call: the other ranks go on while the function runs. Asynchronous only."""
    DPU_CALLBACK_SINGLE_CALL = 4
    """Once for the whole set instead of once for each rank."""


def _wanted(number: int) -> int | None:
    return None if number == DPU_ALLOCATE_ALL else number


class DpuSet(DpuFifos):
    """Some DPUs of some ranks. Make one with `alloc` or `alloc_ranks`."""

    def __init__(self, pool: RankPool, parts: list[Part], owner: Self | None = None) -> None:
        self._pool = pool
        self._parts = parts
        self._owner = owner or self
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
        ranks = [rank for rank, _ in self.live_parts()]
        for rank in ranks:
            rank.worker.drain()
        self._freed = True
        self._pool.release(ranks)

    def __len__(self) -> int:
        return self.nr_dpus

    @property
    def nr_ranks(self) -> int:
        """dpu_get_nr_ranks."""
        return len(self._parts)

    def ranks(self) -> Iterator[Self]:
        """DPU_RANK_FOREACH."""
        for part in self._parts:
            yield type(self)(self._pool, [part], self._owner)

    def dpus(self) -> Iterator[Self]:
        """DPU_FOREACH."""
        for rank, dpus in self._parts:
            for d in range(len(dpus)):
                yield type(self)(self._pool, [(rank, dpus[d : d + 1])], self._owner)

    def get(self, slice_id: int, member_id: int) -> Self:
        """dpu_get: one DPU of a set of one rank, by control interface and place there.

        DpuError DPU_DISABLED if the rank was sold without it, INVALID_DPU_SET if it is not of this set.
        """
        rank = self.rank
        dpu = slice_id * NR_DPUS_PER_CI + member_id
        if not (0 <= slice_id < NR_CIS and 0 <= member_id < NR_DPUS_PER_CI and dpu < rank.nr_dpus):
            raise DpuError(DpuErr.INVALID_DPU_SET)
        if dpu not in rank.enabled:
            raise DpuError(DpuErr.DPU_DISABLED)
        if dpu not in self._parts[0][1]:
            raise DpuError(DpuErr.INVALID_DPU_SET)
        return type(self)(self._pool, [(rank, np.array([dpu], np.int64))], self._owner)

    def live_parts(self) -> list[Part]:
        """The ranks and DPUs; DpuError(INVALID_DPU_SET) if the set was freed."""
        if self._owner._freed:
            raise DpuError(DpuErr.INVALID_DPU_SET)
        return self._parts

    @property
    def rank(self) -> Rank:
        """The one rank of the set; DpuError(INVALID_DPU_SET) if there are several."""
        parts = self.live_parts()
        if len(parts) != 1:
            raise DpuError(DpuErr.INVALID_DPU_SET)
        return parts[0][0]

    # --- program ---

    def load(self, program: DpuProgram) -> None:
        """dpu_load, on every DPU of the set."""
        for rank, dpus in self.live_parts():
            rank.load(program, dpus)

    # --- running ---

    def launch(self, policy: LaunchPolicy) -> None:
        """dpu_launch. Synchronous: runs here, raises what the DPUs ended with. Asynchronous: `sync` does."""
        if policy not in (LaunchPolicy.DPU_ASYNCHRONOUS, LaunchPolicy.DPU_SYNCHRONOUS):
            raise DpuError(DpuErr.INVALID_LAUNCH_POLICY)
        parts = self.live_parts()
        if policy == LaunchPolicy.DPU_ASYNCHRONOUS:
            for rank, dpus in parts:
                rank.check_launch(dpus, queued=rank.busy and rank.state is not RankState.HUNG)
            for rank, dpus in parts:
                rank.launch_async(dpus)
            return
        for rank, dpus in parts:
            rank.check_launch(dpus)
        for rank, dpus in parts:
            rank.begin(dpus)
        errors = [rank.execute(dpus) for rank, dpus in parts]
        if any(errors):
            raise DpuError(next(error for error in errors if error))

    def sync(self) -> None:
        """dpu_sync: wait for the asynchronous jobs; raises the first error among them (ASYNC_JOBS)."""
        for rank, _ in self.live_parts():
            rank.worker.drain()
        error = self._take_async_error()
        if error is not None:
            raise error

    def _take_async_error(self) -> DpuError | None:
        errors = [rank.take_async_error() for rank, _ in self._parts]
        return next((error for error in errors if error), None)

    def status(self) -> tuple[bool, bool]:
        """dpu_status -> (done, fault)."""
        parts = self.live_parts()
        done = not any(rank.busy for rank, _ in parts)
        fault = any(rank.state is RankState.FAULT and not rank.is_sound(dpus) for rank, dpus in parts)
        return done, fault

    # --- callbacks ---

    def callback(
        self,
        function: Callable[[Self, int, Any], object],
        arg: Any = None,
        flags: CallbackFlags = CallbackFlags.DPU_CALLBACK_DEFAULT,
    ) -> None:
        """dpu_callback: `function(set of one rank, its index, arg)` for each rank, or once for the set.

        Asynchronous ones run on the ranks' threads after the jobs before them; what they raise comes out of `sync`.
        DpuError(NONBLOCKING_SYNC_CALLBACK) for one that is nonblocking and synchronous.
        """
        asynchronous = bool(flags & CallbackFlags.DPU_CALLBACK_ASYNC)
        nonblocking = bool(flags & CallbackFlags.DPU_CALLBACK_NONBLOCKING)
        if nonblocking and not asynchronous:
            raise DpuError(DpuErr.NONBLOCKING_SYNC_CALLBACK)
        ranks = [rank for rank, _ in self.live_parts()]
        if flags & CallbackFlags.DPU_CALLBACK_SINGLE_CALL:
            calls = [(ranks, partial(function, self, 0, arg))]
        else:
            calls = [([view.rank], partial(function, view, index, arg)) for index, view in enumerate(self.ranks())]
        for where, call in calls:
            if asynchronous:
                _queue_call(where, call, nonblocking)
            else:
                call()

    def then(self, function: Callable[[Self, DpuError | None], object]) -> None:
        """On a set within one rank: run `function(set, error)` on the rank's thread after the jobs before it.

        Not of the SDK. `error` is what those jobs ended with, and is thereby taken from `sync`.
        """
        self.rank.worker.put(lambda: function(self, self._take_async_error()))

    # --- log ---

    def log_read(self) -> str:
        """dpu_log_read: what one DPU printed, under a line naming it; INVALID_DPU_SET for several."""
        rank, dpu = self.single()
        symbols = self.symbols()
        if PRINT_BUFFER not in symbols or PRINT_LENGTH not in symbols:
            raise DpuError(DpuErr.LOG_CONTEXT_MISSING)
        nr_bytes = int.from_bytes(self.copy_from(PRINT_LENGTH, 0, WORD_BYTES), "little")
        padded = -(-nr_bytes // WORD_BYTES) * WORD_BYTES
        text = self.copy_from(PRINT_BUFFER, 0, padded)[:nr_bytes].decode("utf-8", "replace")
        slice_id, member = divmod(dpu, NR_DPUS_PER_CI)
        number = TARGET_HW << 28 | rank.rank_id << 16 | slice_id << 8 | member
        return f"=== DPU#0x{number:x} ===\n{text}"


def _queue_call(ranks: list[Rank], call: Callable[[], object], nonblocking: bool) -> None:
    """Run `call` on the first rank's thread once every rank has come to it; unless it is nonblocking, the others wait
    for its end before they go on."""
    done = Event()
    arrived = [Event() for _ in ranks[1:]]

    def wait_there(mine: Event) -> None:
        mine.set()
        if not nonblocking:
            done.wait()

    def run() -> None:
        for event in arrived:
            event.wait()
        try:
            call()
        finally:
            done.set()

    for rank, event in zip(ranks[1:], arrived, strict=True):
        rank.queue(DpuJob.CALLBACK, partial(wait_there, event))
    ranks[0].queue(DpuJob.CALLBACK, run)
