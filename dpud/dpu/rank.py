# SPDX-License-Identifier: GPL-2.0-only
"""A rank: up to 64 DPUs behind one control interface, as the emulated hardware.

Each DPU has its MRAM, WRAM and IRAM; the host reaches MRAM only while the rank does not run (one multiplexer
hands the bank to the one side or the other). The MRAM is real memory, mapped sparsely, so that a rank of 64 x
64 MiB costs what was written to it. Where a real DPU sees only its own bank, this one also sees the
emulator's physical memory: the pages of that memory stand for pages in the banks.

    IDLE --launch--> RUNNING --> IDLE | FAULT | HUNG | LOST
    reset (on alloc): FAULT, HUNG --> IDLE        revive: LOST --> IDLE

A rank that is HUNG or LOST writes nothing more: what its counter says is final.

`completion[0]` is the one thing that the host can read in every state: how many moves the running program has
retired. (`completion[1]` is the same for the `helper`, the second thread that long waves are moved with.) A rank
belongs to one allocated set at a time. Its jobs (asynchronous launches, callbacks) run in order on a worker thread of
its own, started by the first of them; a synchronous launch runs on the caller's thread.
"""

import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.faults import FaultKind, FaultPlan
from dpud.dpu.move import I64, U64
from dpud.dpu.profile import Chip

U8 = NDArray[np.uint8]

NR_CIS = 8
NR_DPUS_PER_CI = 8
NR_DPUS_MAX = NR_CIS * NR_DPUS_PER_CI

# Rows a power of two apart would all fall into one set of the host's caches.
ROW_PADDING_BYTES = 4096 + 64
MAP_NORESERVE = 0x4000  # in the mmap module only since Python 3.12


class Space(IntEnum):
    """The memories of a DPU that a symbol can lie in."""

    WRAM = 0
    MRAM = 1


@dataclass(frozen=True)
class Symbol:
    """A host-visible variable of a DPU program."""

    space: Space
    offset_bytes: int
    size_bytes: int


class DpuProgram(Protocol):
    """What an ELF file is to a real DPU."""

    @property
    def name(self) -> str: ...

    @property
    def symbols(self) -> Mapping[str, Symbol]: ...

    @property
    def nr_tasklets(self) -> int: ...

    @property
    def iram_bytes(self) -> int: ...

    def main(self, rank: "Rank", dpus: I64) -> FaultKind | None:
        """Run on those DPUs of the rank; -> the hardware fault that ended the run early."""
        ...


class RankState(IntEnum):
    IDLE = 0
    RUNNING = 1
    FAULT = 2
    HUNG = 3
    LOST = 4


AFTER_FAULT = {
    FaultKind.DPU_FAULT: (RankState.FAULT, DpuErr.DPU_FAULT),
    FaultKind.TIMEOUT: (RankState.HUNG, DpuErr.TIMEOUT),
    FaultKind.RANK_LOST: (RankState.LOST, DpuErr.DRIVER),
}
NO_ACCESS = {
    RankState.RUNNING: DpuErr.MRAM_BUSY,
    RankState.HUNG: DpuErr.MRAM_BUSY,
    RankState.LOST: DpuErr.DRIVER,
}
NO_LAUNCH = {
    RankState.RUNNING: DpuErr.DPU_ALREADY_RUNNING,
    RankState.HUNG: DpuErr.DPU_ALREADY_RUNNING,
    RankState.FAULT: DpuErr.DPU_FAULT,
    RankState.LOST: DpuErr.DRIVER,
}


def _sparse_rows(nr_rows: int, row_bytes: int) -> U8:
    """uint8[nr_rows, row_bytes and padding] of zeros that take host memory only where they are written.

    DpuError(ALLOCATION) if the host has no address space for them.
    """
    stride = row_bytes + ROW_PADDING_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        mapping = mmap.mmap(-1, nr_rows * stride, flags=flags)
    except OSError as error:
        raise DpuError(DpuErr.ALLOCATION) from error
    return np.frombuffer(mapping, np.uint8).reshape(nr_rows, stride)


class Worker:
    """Runs jobs one after the other on a daemon thread, which the first job starts.

    Jobs deal with their own errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], object]] = deque()
        self._busy = False
        self._closing = False

    @property
    def started(self) -> bool:
        """Is there a thread?"""
        return self._thread is not None

    def put(self, job: Callable[[], object]) -> None:
        """Queue a job."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._busy = True
            job()

    def drain(self) -> None:
        """Wait until no job is queued or running; at once if called by a job."""
        if self._thread is not threading.current_thread():
            with self._changed:
                self._changed.wait_for(lambda: not self._jobs and not self._busy)

    def close(self) -> None:
        """Let the queued jobs end, then join the thread; a later job starts a new one."""
        while self._thread is not None:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()
            with self._changed:
                self._thread, self._closing = None, False
                if self._jobs:  # put there as the thread was leaving
                    self._start()


class Rank:
    """One rank. `disabled_mask` has a bit per DPU that the rank was sold without."""

    def __init__(
        self, rank_id: int, chip: Chip, faults: FaultPlan, nr_dpus: int = NR_DPUS_MAX, disabled_mask: int = 0
    ) -> None:
        self.rank_id = rank_id
        self.chip = chip
        self.faults = faults
        self.nr_dpus = nr_dpus
        self.enabled: I64 = np.array([d for d in range(nr_dpus) if not disabled_mask >> d & 1], np.int64)
        self.state = RankState.IDLE
        self.is_owned = False
        self.usage_count = 0
        self.program: DpuProgram | None = None
        self.memory: U64 = np.zeros((0, 1), np.uint64)
        self.completion: I64 = np.zeros(2, np.int64)
        self.helper = self._new_helper()
        self.run_ns = 0
        self.async_error = DpuErr.OK
        self.worker = Worker(f"dpu_rank{rank_id}")
        self._spaces: dict[Space, U8] = {}
        self._words: dict[Space, I64] = {}
        self._linked: DpuProgram | None = None
        self._variables = slice(0, 0)

    def _new_helper(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, f"dpu_rank{self.rank_id}_helper")

    def close(self) -> None:
        """End the threads; they start again when they are needed."""
        self.worker.close()
        self.helper.shutdown()
        self.helper = self._new_helper()

    @property
    def present(self) -> bool:
        """Is the rank there, with at least one DPU to use?"""
        return self.state is not RankState.LOST and len(self.enabled) > 0

    def bytes_of(self, space: Space) -> U8:
        """uint8[nr_dpus, size and padding]: one memory of all DPUs, mapped at its first use."""
        if space not in self._spaces:
            size = self.chip.wram_bytes if space is Space.WRAM else self.chip.mram_bytes
            self._spaces[space] = _sparse_rows(int(self.enabled[-1]) + 1, int(size.value))
        return self._spaces[space]

    def words_of(self, space: Space) -> I64:
        """The same as int64 words, which is how the DPU sees it."""
        if space not in self._words:
            self._words[space] = self.bytes_of(space).view(np.int64)
        return self._words[space]

    def reset(self) -> None:
        """What an allocation does first: a faulted or hung rank works again, a lost one stays lost."""
        if self.state is not RankState.LOST:
            self.state = RankState.IDLE
        self.program = None
        self.async_error = DpuErr.OK
        self.completion[0] = 0
        self.run_ns = 0

    def revive(self) -> None:
        """Plug a lost rank in again."""
        if self.state is RankState.LOST:
            self.state = RankState.IDLE

    def check_access(self, space: Space) -> None:
        """DpuError unless the host may read and write that memory now."""
        if self.state in NO_ACCESS and (space is Space.MRAM or self.state is RankState.LOST):
            raise DpuError(NO_ACCESS[self.state])

    def load(self, program: DpuProgram) -> None:
        """Put a program in IRAM and its host variables to 0; DpuError where it does not fit."""
        self.check_access(Space.MRAM)
        if program is not self._linked:
            self._check_fit(program)
            self._linked = program
        self.bytes_of(Space.WRAM)[:, self._variables] = 0
        self.program = program

    def refit(self, chip: Chip) -> None:
        """Hold programs that are loaded from now on to another chip's limits; what runs is not disturbed."""
        self.chip = chip
        self._linked = None

    def _check_fit(self, program: DpuProgram) -> None:
        """DpuError unless the chip can hold `program`; notes which part of WRAM its variables take."""
        if program.iram_bytes > self.chip.iram_bytes.value:
            raise DpuError(DpuErr.INVALID_IRAM_ACCESS)
        if program.nr_tasklets > self.chip.nr_tasklets.value:
            raise DpuError(DpuErr.TOO_MANY_TASKLETS)
        ends = dict.fromkeys(Space, 0)
        for symbol in program.symbols.values():
            ends[symbol.space] = max(ends[symbol.space], symbol.offset_bytes + symbol.size_bytes)
        if ends[Space.WRAM] > self.chip.wram_bytes.value:
            raise DpuError(DpuErr.INVALID_WRAM_ACCESS)
        if ends[Space.MRAM] > self.chip.mram_bytes.value:
            raise DpuError(DpuErr.INVALID_MRAM_ACCESS)
        self._variables = slice(0, ends[Space.WRAM])

    def check_launch(self) -> None:
        """DpuError unless the DPUs are ready to run."""
        if self.program is None:
            raise DpuError(DpuErr.NO_PROGRAM_LOADED)
        if self.state in NO_LAUNCH:
            raise DpuError(NO_LAUNCH[self.state])

    def begin(self) -> None:
        """Hand the banks to the DPUs."""
        self.completion[0] = 0
        self.state = RankState.RUNNING

    def execute(self, dpus: I64) -> DpuErr:
        """Run the program after `begin()`, on this thread, to its end; the banks go back to the host."""
        assert self.program is not None
        started_ns = time.perf_counter_ns()
        try:
            fault = self.program.main(self, dpus)
        except BaseException:
            self.state = RankState.FAULT
            raise
        self.run_ns = time.perf_counter_ns() - started_ns
        self.state, error = (RankState.IDLE, DpuErr.OK) if fault is None else AFTER_FAULT[fault]
        return error

    def execute_async(self, dpus: I64) -> None:
        """The same as a job; the first error is kept for `dpu_sync`."""
        try:
            error = self.execute(dpus)
        except Exception:
            logging.exception("dpu_rank%d: the program broke", self.rank_id)
            error = DpuErr.INTERNAL
        self.async_error = self.async_error or error


class RankPool:
    """The ranks plugged into a machine, and who owns which."""

    def __init__(self, ranks: list[Rank]) -> None:
        self.ranks = ranks
        self._lock = threading.Lock()

    @property
    def nr_present(self) -> int:
        """Ranks that are there, free or not."""
        return sum(rank.present for rank in self.ranks)

    def claim(self, wanted: int | None, measure: Callable[[Rank], int]) -> list[Rank]:
        """Take free ranks until their `measure` adds up to `wanted`; all of them if that is None.

        DpuError(ALLOCATION), and none taken, if there are not enough.
        """
        with self._lock:
            claimed: list[Rank] = []
            got = 0
            for rank in self.ranks:
                if rank.present and not rank.is_owned and (wanted is None or got < wanted):
                    claimed.append(rank)
                    got += measure(rank)
            if not claimed or (wanted is not None and got < wanted):
                raise DpuError(DpuErr.ALLOCATION)
            for rank in claimed:
                rank.is_owned = True
                rank.usage_count += 1
                rank.reset()
            return claimed

    def release(self, ranks: list[Rank]) -> None:
        """Give ranks back."""
        with self._lock:
            for rank in ranks:
                rank.is_owned = False
                rank.usage_count -= 1

    def close(self) -> None:
        """End the workers, and those that their last jobs started."""
        while True:
            for rank in self.ranks:
                rank.close()
            if not any(rank.worker.started for rank in self.ranks):
                return
