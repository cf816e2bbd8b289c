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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dpud.dpu.errors import DpuErr, DpuError, DpuJob
from dpud.dpu.faults import Fault, FaultKind, FaultPlan
from dpud.dpu.move import I64, U64
from dpud.dpu.profile import Chip
from dpud.dpu.worker import NR_JOBS_PER_RANK, Worker

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
    IRAM = 2


@dataclass(frozen=True)
class Symbol:
    """A host-visible variable of a DPU program."""

    space: Space
    offset_bytes: int
    size_bytes: int
    open_ended: bool = False
    """It goes as far as the memory does, and so fits wherever its start does."""


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
    FaultKind.LOST_COMPLETION: (RankState.HUNG, DpuErr.TIMEOUT),
}
BAD_ACCESS = {
    Space.WRAM: DpuErr.INVALID_WRAM_ACCESS,
    Space.MRAM: DpuErr.INVALID_MRAM_ACCESS,
    Space.IRAM: DpuErr.INVALID_IRAM_ACCESS,
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


def _sizes(chip: Chip) -> tuple[int, ...]:
    """Bytes of each memory of a DPU, by Space."""
    return tuple(int(constant.value) for constant in (chip.wram_bytes, chip.mram_bytes, chip.iram_bytes))


@dataclass(frozen=True)
class RankOptions:
    """What a profile string or the profile says of a rank beside its chip."""

    clock_division: int = 2
    nr_jobs: int = NR_JOBS_PER_RANK
    nr_threads: int = 1
    """0: the rank does nothing asynchronously."""
    safe_checks: bool = True
    """False: the host's accesses are not checked for alignment, and may find a busy bank."""
    mux_switch: bool = True
    """False: the host has the banks all the time, so no access finds them busy."""
    dpu_owns_mram: bool = False
    """True: the DPUs have the banks all the time (mramAccessByDpuOnly)."""
    reset_on_alloc: bool = True
    sg_max_blocks: int | None = None
    """Blocks that a scatter-gather transfer may have for each DPU; None: no such transfers."""
    mode: int = 0
    result_timeout_s: float = 0.0
    """How long the thread of an asynchronous launch waits for a device that does not answer."""


@dataclass(frozen=True)
class DpuFault:
    """Why one DPU stopped: what `dpu_checkpoint` tells of it."""

    kind: str
    """"bkp", "dma" or "mem"."""
    tasklet: int
    bkp_id: int = 0
    """Of a breakpoint: which (BkpFault)."""


class Rank:
    """One rank. `disabled_mask` has a bit per DPU that the rank was sold without."""

    def __init__(
        self,
        rank_id: int,
        chip: Chip,
        faults: FaultPlan,
        nr_dpus: int = NR_DPUS_MAX,
        disabled_mask: int = 0,
        options: RankOptions | None = None,
    ) -> None:
        self.rank_id = rank_id
        self.chip = chip
        self._sizes = _sizes(chip)
        self.faults = faults
        self.options = options or RankOptions()
        self.nr_dpus = nr_dpus
        self.enabled: I64 = np.array([d for d in range(nr_dpus) if not disabled_mask >> d & 1], np.int64)
        self.state = RankState.IDLE
        self.mode = self.options.mode
        self.debug_mode = 0
        self.is_owned = False
        self.usage_count = 0
        self.program: DpuProgram | None = None
        self.own_programs: dict[int, DpuProgram] = {}
        self.dpu_faults: dict[int, DpuFault] = {}
        self.prepared: dict[int, memoryview] = {}
        self.drawn: list[Fault | None] = []
        self.memory: U64 = np.zeros((0, 1), np.uint64)
        self.completion: I64 = np.zeros(2, np.int64)
        self.helper = self._new_helper()
        self.run_ns = 0
        self.nr_launches_queued = 0
        self._launches = threading.Lock()
        self.async_error: tuple[DpuErr, DpuJob] | None = None
        self.worker = Worker(f"dpu_rank{rank_id}", self.options.nr_jobs)
        self._running: I64 = self.enabled[:0]
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

    @property
    def busy(self) -> bool:
        """Does it run, or will it, without anybody doing more?"""
        return self.state in (RankState.RUNNING, RankState.HUNG) or not self.worker.idle

    def size_of(self, space: Space) -> int:
        """Bytes of one memory of a DPU."""
        return self._sizes[space]

    def bytes_of(self, space: Space) -> U8:
        """uint8[nr_dpus, size and padding]: one memory of all DPUs, mapped at its first use."""
        if space not in self._spaces:
            self._spaces[space] = _sparse_rows(int(self.enabled[-1]) + 1, self.size_of(space))
        return self._spaces[space]

    def words_of(self, space: Space) -> I64:
        """The same as int64 words, which is how the DPU sees it."""
        if space not in self._words:
            self._words[space] = self.bytes_of(space).view(np.int64)
        return self._words[space]

    def reset(self) -> None:
        """What an allocation does first: a faulted or hung rank works again, a lost one stays lost.

        With disableResetOnAlloc the programs and what the DPUs came to are left as they are.
        """
        self.prepared.clear()
        self.drawn.clear()
        self.async_error = None
        if not self.options.reset_on_alloc:
            return
        if self.state is not RankState.LOST:
            self.state = RankState.IDLE
        self.program = None
        self.own_programs.clear()
        self.dpu_faults.clear()
        self.completion[0] = 0
        self.run_ns = 0

    def revive(self) -> None:
        """Plug a lost rank in again."""
        if self.state is RankState.LOST:
            self.state = RankState.IDLE

    def check_access(self, space: Space, dpus: I64 | None = None, queued: bool = False) -> None:
        """DpuError unless the host may read and write that memory of `dpus` now; `queued`: by a job of the rank."""
        if self.state is RankState.IDLE and not self.nr_launches_queued and not self.options.dpu_owns_mram:
            return  # the usual case, asked for with every transfer
        if self.state is RankState.LOST:
            raise DpuError(DpuErr.DRIVER)
        if space is not Space.MRAM:
            return
        if self.options.dpu_owns_mram:
            raise DpuError(DpuErr.MRAM_BUSY)
        if not self.options.mux_switch or not self.options.safe_checks:
            return
        if self.nr_launches_queued and not queued:
            raise DpuError(DpuErr.MRAM_BUSY)
        if self.state in (RankState.RUNNING, RankState.HUNG) and self._runs(dpus):
            raise DpuError(DpuErr.MRAM_BUSY)

    def _runs(self, dpus: I64 | None) -> bool:
        return dpus is None or len(self._running) == len(self.enabled) or bool(np.isin(dpus, self._running).any())

    def load(self, program: DpuProgram, dpus: I64 | None = None) -> None:
        """Put a program in IRAM, on all DPUs or on some, and its host variables to 0; DpuError if it does not fit."""
        self.check_access(Space.MRAM, dpus)
        if program is not self._linked:
            self._check_fit(program)
            self._linked = program
        if dpus is None or len(dpus) == len(self.enabled):
            self.bytes_of(Space.WRAM)[:, self._variables] = 0
            self.program = program
            self.own_programs.clear()
        else:
            self.bytes_of(Space.WRAM)[dpus, self._variables] = 0
            self.own_programs.update((dpu, program) for dpu in dpus.tolist())

    def program_of(self, dpus: I64) -> DpuProgram:
        """The program of these DPUs; DpuError(NO_PROGRAM_LOADED, DIFFERENT_DPU_PROGRAMS)."""
        program = self.program
        if self.own_programs:
            programs = {id(found): found for found in (self.own_programs.get(dpu, program) for dpu in dpus.tolist())}
            if len(programs) > 1:
                raise DpuError(DpuErr.DIFFERENT_DPU_PROGRAMS)
            (program,) = programs.values()
        if program is None:
            raise DpuError(DpuErr.NO_PROGRAM_LOADED)
        return program

    def refit(self, chip: Chip) -> None:
        """Hold programs that are loaded from now on to another chip's limits; what runs is not disturbed."""
        self.chip = chip
        self._sizes = _sizes(chip)
        self._linked = None

    def _check_fit(self, program: DpuProgram) -> None:
        """DpuError unless the chip can hold `program`; notes which part of WRAM its variables take."""
        if program.iram_bytes > self.chip.iram_bytes.value:
            raise DpuError(DpuErr.INVALID_IRAM_ACCESS)
        if program.nr_tasklets > self.chip.nr_tasklets.value:
            raise DpuError(DpuErr.TOO_MANY_TASKLETS)
        ends = dict.fromkeys(Space, 0)
        for symbol in program.symbols.values():
            size = 0 if symbol.open_ended else symbol.size_bytes
            ends[symbol.space] = max(ends[symbol.space], symbol.offset_bytes + size)
        for space, error in BAD_ACCESS.items():
            if ends[space] > self.size_of(space):
                raise DpuError(error)
        self._variables = slice(0, ends[Space.WRAM])

    def check_launch(self, dpus: I64, queued: bool = False) -> None:
        """DpuError unless the DPUs are ready to run."""
        for dpu in dpus.tolist() if self.own_programs else ():
            self.program_of(np.array([dpu]))
        if not self.own_programs and self.program is None:
            raise DpuError(DpuErr.NO_PROGRAM_LOADED)
        if self.nr_launches_queued and not queued:
            raise DpuError(DpuErr.DPU_ALREADY_RUNNING)
        if self.state in NO_LAUNCH and not (self.state is RankState.FAULT and self.is_sound(dpus)):
            raise DpuError(NO_LAUNCH[self.state])

    def is_sound(self, dpus: I64) -> bool:
        """The fault of the rank is known to be that of other DPUs."""
        return bool(self.dpu_faults) and not any(dpu in self.dpu_faults for dpu in dpus.tolist())

    def begin(self, dpus: I64) -> None:
        """Hand the banks to the DPUs."""
        self.completion[0] = 0
        self._running = dpus
        self.state = RankState.RUNNING

    def take_fault(self, nr_moves: int) -> Fault | None:
        """The injected fault of a run of `nr_moves`: as drawn when its batch was submitted, else drawn now."""
        if not self.drawn:
            return self.faults.take(nr_moves)
        fault = self.drawn.pop()
        return fault if fault and fault.move < nr_moves else None

    def execute(self, dpus: I64) -> DpuErr:
        """Run the programs after `begin()`, on this thread, to their end; the banks go back to the host."""
        started_ns = time.perf_counter_ns()
        fault: FaultKind | None = None
        try:
            for program, those in self._by_program(dpus):
                fault = program.main(self, those) or fault
        except BaseException:
            self.state = RankState.FAULT
            raise
        self.run_ns = time.perf_counter_ns() - started_ns
        self.state, error = (RankState.IDLE, DpuErr.OK) if fault is None else AFTER_FAULT[fault]
        if self.dpu_faults:
            self.state = max(self.state, RankState.FAULT)
        return error

    def _by_program(self, dpus: I64) -> Iterator[tuple[DpuProgram, I64]]:
        if not self.own_programs:
            assert self.program is not None
            yield self.program, dpus
            return
        groups: dict[int, list[int]] = {}
        for dpu in dpus.tolist():
            groups.setdefault(id(self.program_of(np.array([dpu]))), []).append(dpu)
        for group in groups.values():
            those = np.array(group, np.int64)
            yield self.program_of(those), those

    def launch_async(self, dpus: I64) -> None:
        """Queue a run; the first error of the rank's jobs is kept for `dpu_sync`."""
        self._check_thread()
        whole = len(dpus) == len(self.enabled)
        self._count_launch(1)
        if self.nr_launches_queued == 1 and self.worker.idle:
            self.begin(dpus)

        def run() -> DpuErr:
            try:
                if self.state is not RankState.RUNNING:
                    self.check_launch(dpus, queued=True)
                    self.begin(dpus)
                return self.execute(dpus)
            finally:
                self._count_launch(-1)

        self.queue(DpuJob.LAUNCH_RANK if whole else DpuJob.LAUNCH_DPU, run)

    def _count_launch(self, change: int) -> None:
        with self._launches:
            self.nr_launches_queued += change

    def queue(self, job: DpuJob, function: Callable[[], DpuErr | None]) -> None:
        """Have the worker run `function`; DpuError(NO_THREAD_PER_RANK) if the rank has none."""
        self._check_thread()
        self.worker.put(lambda: self._run_job(job, function))

    def _check_thread(self) -> None:
        if self.options.nr_threads == 0:
            raise DpuError(DpuErr.NO_THREAD_PER_RANK)

    def _run_job(self, job: DpuJob, function: Callable[[], DpuErr | None]) -> None:
        try:
            code = function() or DpuErr.OK
        except DpuError as error:
            code = error.code
        except Exception:
            logging.exception("dpu_rank%d: %s broke", self.rank_id, job.name.lower())
            code = DpuErr.INTERNAL
        if code is DpuErr.TIMEOUT:
            time.sleep(self.options.result_timeout_s)  # what the host's thread spends before it gives up
        if code and self.async_error is None:
            self.async_error = code, job

    def take_async_error(self) -> DpuError | None:
        """The first error of the jobs since the last call."""
        error, self.async_error = self.async_error, None
        return None if error is None else DpuError(*error)


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
                rank.debug_mode = 0
                rank.mode = rank.options.mode

    def close(self) -> None:
        """End the workers, and those that their last jobs started."""
        while True:
            for rank in self.ranks:
                rank.close()
            if not any(rank.worker.started for rank in self.ranks):
                return
