# SPDX-License-Identifier: GPL-2.0-only
"""The host side of DPU compaction: `dpu_hw_compact_execute` over the DpuSet API.

Every batch takes one free rank through the same steps as the seed's C example: alloc, load, arguments,
fragment list, launch, results, log, free. `dpu_hw_compact_execute` does them on the caller's thread. `submit`
launches asynchronously and lets the rank's worker do the rest; when no rank is free it queues the batch, and
whoever frees a rank next starts it. So one batch more than there are ranks keeps all of them busy.

A device error is an outcome, not an exception: `DpuResult.error` has the SDK's text, `nr_retired` says how
far the batch came, and the rank is reset by the next allocation. OSError is only for having no device to
begin with.
"""

import errno
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from msgspec import structs

from dpud.dpu import move
from dpud.dpu.batch import Batch, compact_batch, list_batch, nr_slots
from dpud.dpu.dpu_set import DpuSet, LaunchPolicy, XferDirection
from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.faults import FaultPlan
from dpud.dpu.move import U64
from dpud.dpu.profile import Profile, Work, load_profile
from dpud.dpu.program import (
    DPU_COMPACT,
    DPU_INPUT_ARGUMENTS,
    DPU_MRAM_HEAP_POINTER_NAME,
    DPU_RESULTS,
    WORD_BYTES,
)
from dpud.dpu.properties import load_properties
from dpud.dpu.rank import NR_DPUS_MAX, DpuProgram, Rank, RankPool
from dpud.dpu.system import new_rank
from kernelsim.dpu_hw import ENGINES, DpuResult
from kernelsim.trace_hook import traced

TO_DPU, FROM_DPU = XferDirection.DPU_XFER_TO_DPU, XferDirection.DPU_XFER_FROM_DPU
ANSWERS = (DpuErr.OK, DpuErr.DPU_FAULT, DpuErr.CORRUPTED_MEMORY)
"""Ends of a batch after which the banks are the host's again and hold a layout."""


@dataclass(frozen=True)
class DpuConfig:
    """The DPUs of a machine. ValueError if there can be none such, DpuError if the profile is unknown."""

    nr_ranks: int = 1
    nr_dpus: int = NR_DPUS_MAX
    """DPUs of each rank."""
    disabled_mask: int = 0
    """A bit per DPU that no rank can use."""
    profile: str = "upmem-v1a"
    properties: str = ""
    """A profile string of the SDK (properties.py); $UPMEM_PROFILE_BASE and $UPMEM_PROFILE count too."""
    program: DpuProgram = DPU_COMPACT
    """What compacts; lists of moves are always the emulated program's."""

    def __post_init__(self) -> None:
        if self.nr_ranks < 0 or not 1 <= self.nr_dpus <= NR_DPUS_MAX or self.disabled_mask < 0:
            raise ValueError(f"nr_ranks must be at least 0, nr_dpus 1 to {NR_DPUS_MAX}, disabled_mask at least 0")
        load_profile(self.profile)
        load_properties(self.properties)


@dataclass
class DpuStats:
    """Counts since the driver was made."""

    nr_batches: int = 0
    nr_pages_retired: int = 0
    device_ns: int = 0
    wall_ns: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Failed batches by SDK error name."""


class BatchCompletion:
    """A submitted batch; see kernelsim.dpu_hw.DpuCompletion."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._outcome: DpuResult | Exception | None = None

    def finish(self, outcome: DpuResult | Exception) -> None:
        """Set the outcome and wake who waits; the driver's side."""
        self._outcome = outcome
        self._over.set()

    def done(self) -> bool:
        """Is the batch over?"""
        return self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait at most that long; True once the batch is over."""
        return self._over.wait(timeout_s)

    def result(self) -> DpuResult:
        """The outcome of a batch that is over; OSError(ENODEV) if the last rank went before it started."""
        assert self._outcome is not None, "result() before done()"
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class DpuDriver:
    """All ranks of a machine behind kernelsim.dpu_hw.DpuHardware. Safe to call from several threads."""

    def __init__(self, config: DpuConfig | None = None, faults: FaultPlan | None = None) -> None:
        self.config = config or DpuConfig()
        self.properties = load_properties(self.config.properties)
        self.profile = self._fitted(load_profile(self.config.profile))
        self.faults = faults or FaultPlan()
        self.stats = DpuStats()
        self.last_log = ""  # what the program of the last failed batch printed
        self.pool = RankPool([self._new_rank(rank_id) for rank_id in range(self.config.nr_ranks)])
        engines = _engines(with_device=bool(self.pool.ranks))
        self.engines: Mapping[str, Profile] = {name: self._fitted(profile) for name, profile in engines.items()}
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Batch, BatchCompletion]] = deque()

    def _new_rank(self, rank_id: int) -> Rank:
        nr_dpus, mask = self.config.nr_dpus, self.config.disabled_mask
        return new_rank(rank_id, self.profile, self.properties, self.faults, nr_dpus=nr_dpus, disabled_mask=mask)

    def _fitted(self, profile: Profile) -> Profile:
        """A profile with the chip that the properties make of its own."""
        if profile.chip is None:
            return profile
        return structs.replace(profile, chip=self.properties.chip(profile.chip))

    @property
    def nr_present(self) -> int:
        """Ranks that are there, free or not."""
        return self.pool.nr_present

    @property
    def max_in_flight(self) -> int:
        """One batch per rank, and one ready to follow."""
        return len(self.pool.ranks) + 1

    def attach(self, memory: U64) -> None:
        """Give the ranks physical memory: uint64[nr_pages, words_per_page], C-contiguous and writable."""
        if memory.dtype != np.uint64 or memory.ndim != 2 or not memory.flags.c_contiguous:
            raise ValueError("memory must be a C-contiguous uint64[nr_pages, words_per_page]")
        for rank in self.pool.ranks:
            rank.memory = memory

    def close(self) -> None:
        """Let the batches in flight end and the workers join."""
        self.pool.close()

    # --- kernelsim.dpu_hw.DpuHardware ---

    @traced("dpu_hw_compact_execute")
    def dpu_hw_compact_execute(
        self, base_addr: int, frag_addrs: U64, num_frags: int, skip_runs: U64 | None = None
    ) -> DpuResult:
        """Run one batch on this thread; see kernelsim.dpu_hw. OSError(EINVAL) for a misshapen request."""
        return self._execute(compact_batch(base_addr, frag_addrs, num_frags, skip_runs, self.profile))

    @traced("dpu_hw_submit")
    def submit(self, base_addr: int, frag_addrs: U64, num_frags: int, skip_runs: U64 | None = None) -> BatchCompletion:
        """Start one batch, or queue it when every rank is busy; see kernelsim.dpu_hw."""
        return self._submit(compact_batch(base_addr, frag_addrs, num_frags, skip_runs, self.profile))

    @traced("dpu_hw_move_execute")
    def dpu_hw_move_execute(self, src_addrs: U64, dst_addrs: U64, num: int) -> DpuResult:
        """Run one list of moves on this thread; see kernelsim.dpu_hw. OSError(EINVAL) for a misshapen request."""
        return self._execute(list_batch(src_addrs, dst_addrs, num, self.profile))

    @traced("dpu_hw_submit_move")
    def submit_move(self, src_addrs: U64, dst_addrs: U64, num: int) -> BatchCompletion:
        """Start one list of moves, or queue it when every rank is busy; see kernelsim.dpu_hw."""
        return self._submit(list_batch(src_addrs, dst_addrs, num, self.profile))

    @property
    def engine(self) -> Profile:
        """The chosen profile, or the plain CPU's where no rank is built in."""
        return self.engines.get(self.profile.name, self.engines["cpu"])

    def select_engine(self, name: str) -> None:
        """Take another profile, and where it is that of a DPU, the limits of its chip; see kernelsim.dpu_hw."""
        self.profile = self.engines[name]
        if self.profile.chip is not None:
            for rank in self.pool.ranks:
                rank.refit(self.profile.chip)

    # --- which batch gets a rank ---

    def _execute(self, batch: Batch) -> DpuResult:
        dpus = self._alloc()
        if dpus is None:
            raise OSError(errno.ENOMEM, "no DPU rank is free")
        batch = self._drawn(batch)
        try:
            return self._collect(dpus, batch, self._launch(dpus, batch, LaunchPolicy.DPU_SYNCHRONOUS))
        finally:
            dpus.free()
            self._start_waiting()

    def _submit(self, batch: Batch) -> BatchCompletion:
        completion = BatchCompletion()
        if not self.pool.nr_present:
            raise _no_device()
        self._queue(self._drawn(batch), completion)
        return completion

    def _queue(self, batch: Batch, completion: BatchCompletion) -> None:
        with self._lock:
            self._waiting.append((batch, completion))
        self._start_waiting()

    def _drawn(self, batch: Batch) -> Batch:
        """The batch with the fault that it will meet."""
        fault = self.faults.take(len(batch.frag_addrs))
        return replace(batch, fault=fault) if fault else batch

    def _alloc(self) -> DpuSet | None:
        """A whole rank; None if all are busy, OSError(ENODEV) if there is none."""
        try:
            return DpuSet.alloc_ranks(self.pool, 1)
        except DpuError:
            if not self.pool.nr_present:
                raise _no_device() from None
            return None

    def _start_waiting(self) -> None:
        """Start queued batches, oldest first, as long as a rank is free."""
        while self._start_one():
            pass

    def _start_one(self) -> bool:
        """Start the oldest queued batch, or end it where no rank is left; False if none is queued, or all are busy."""
        with self._lock:
            if not self._waiting:
                return False
            try:
                dpus = self._alloc()
            except OSError as no_device:
                self._waiting.popleft()[1].finish(no_device)
                return True
            if dpus is None:
                return False
            batch, completion = self._waiting.popleft()
        self._start(dpus, batch, completion)
        return True

    def _start(self, dpus: DpuSet, batch: Batch, completion: BatchCompletion) -> None:
        """Launch asynchronously; the rank's worker collects the outcome behind it."""
        batch = replace(batch, started_ns=time.perf_counter_ns())  # waiting for a rank is not work
        error = self._launch(dpus, batch, LaunchPolicy.DPU_ASYNCHRONOUS)
        dpus.then(lambda dpus, late: self._end(dpus, batch, completion, error or late))

    def _end(self, dpus: DpuSet, batch: Batch, completion: BatchCompletion, error: DpuError | None) -> None:
        """On the worker: collect, free the rank, report, and let the next batch have it."""
        outcome: DpuResult | Exception
        try:
            outcome = self._collect(dpus, batch, error)
        except Exception as broken:  # whoever waits must see it
            outcome = broken
        dpus.free()
        completion.finish(outcome)
        self._start_waiting()

    # --- one batch ---

    def _launch(self, dpus: DpuSet, batch: Batch, policy: LaunchPolicy) -> DpuError | None:
        """Load the program, copy in the batch, launch; -> what went wrong."""
        args, heap = batch.deal(len(dpus))
        runs_at = move.NR_COLS * nr_slots(len(batch.frag_addrs), len(dpus)) * WORD_BYTES
        try:
            dpus.load(self.config.program if batch.program is DPU_COMPACT else batch.program)
            dpus.push_xfer(TO_DPU, DPU_INPUT_ARGUMENTS, 0, args)
            dpus.push_xfer(TO_DPU, DPU_MRAM_HEAP_POINTER_NAME, 0, heap)
            if len(batch.skip_runs):
                dpus.copy_to(DPU_MRAM_HEAP_POINTER_NAME, runs_at, batch.skip_runs)
            dpus.rank.drawn = [batch.fault]
            dpus.launch(policy)
        except DpuError as error:
            return error
        return None

    def _collect(self, dpus: DpuSet, batch: Batch, error: DpuError | None) -> DpuResult:
        """What the batch came to, after it ended with `error`."""
        rank = dpus.rank
        nr_retired = int(rank.completion[0])
        code = error.code if error else DpuErr.OK
        if not code and nr_retired < len(batch.frag_addrs):
            code = _read_status(dpus)
        new_addrs = self._layout(dpus, batch, code)
        if code and code in ANSWERS:
            self.last_log = next(dpus.dpus()).log_read()
        if not code and nr_retired < len(batch.frag_addrs):
            code = DpuErr.INTERNAL  # the program says all is well, yet left pages out
        nr_pages, nr_waves, nr_rounds = batch.effort(new_addrs, nr_retired, len(dpus))
        device_ns = batch.profile.device_ns(Work(nr_pages, nr_waves, nr_rounds, rank.run_ns))
        if code is DpuErr.TIMEOUT:
            device_ns += batch.profile.result_timeout_ns
        wall_ns = time.perf_counter_ns() - batch.started_ns
        text, reason = (code.text, code.name.lower()) if code else (None, None)
        result = DpuResult(nr_retired, new_addrs, device_ns, wall_ns, text, reason)
        self._account(result, nr_pages, code)
        return result

    def _layout(self, dpus: DpuSet, batch: Batch, code: DpuErr) -> U64:
        """The new addresses: from MRAM while the device answers, else by the rule it followed."""
        if code not in ANSWERS:
            return batch.layout_by_rule(dpus.rank.memory.shape[0])
        nr_frags = len(batch.frag_addrs)
        rows = np.empty((len(dpus), nr_slots(nr_frags, len(dpus))), np.uint64)
        offset = move.COL_NEW * rows.shape[1] * WORD_BYTES
        dpus.push_xfer(FROM_DPU, DPU_MRAM_HEAP_POINTER_NAME, offset, rows)
        return rows.reshape(-1)[:nr_frags]

    def _account(self, result: DpuResult, nr_pages: int, code: DpuErr) -> None:
        with self._lock:
            self.stats.nr_batches += 1
            self.stats.nr_pages_retired += nr_pages
            self.stats.device_ns += result.device_ns
            self.stats.wall_ns += result.wall_ns
            if code:
                self.stats.errors[code.sdk_name] += 1


def _engines(with_device: bool) -> dict[str, Profile]:
    """Every engine, or those of the CPU where no rank is built in."""
    profiles = [load_profile(name) for name in ENGINES]
    return {profile.name: profile for profile in profiles if with_device or profile.copier != "device"}


def _no_device() -> OSError:
    return OSError(errno.ENODEV, "no DPU rank is present")


def _read_status(dpus: DpuSet) -> DpuErr:
    """The first status that is not 0 among the DPUs."""
    results = np.empty((len(dpus), move.NR_RESULTS), np.int64)
    dpus.push_xfer(FROM_DPU, DPU_RESULTS, 0, results)
    statuses = set(results[:, 0].tolist())
    return next((code for code in DpuErr if code and code in statuses), DpuErr.OK)
