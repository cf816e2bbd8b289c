# SPDX-License-Identifier: GPL-2.0-only
"""What the driver can be asked for: a batch to compact, or a list of moves. Each knows its program and its layout.

Both deal their entries to the DPUs in consecutive even slices; a DPU's heap begins with its slice's columns, of which
the second (move.COL_NEW) holds, in the end, where each fragment is.
"""

import errno
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from dpud.dpu import move, move_list
from dpud.dpu.faults import Fault
from dpud.dpu.move import I64, U64
from dpud.dpu.move_program import DPU_MOVE
from dpud.dpu.profile import Profile
from dpud.dpu.program import DPU_COMPACT
from dpud.dpu.rank import DpuProgram

NO_RUNS: U64 = np.zeros((0, 2), np.uint64)


def nr_slots(nr_frags: int, nr_dpus: int) -> int:
    """Fragments per DPU when they are dealt in even slices."""
    return max(1, -(-nr_frags // nr_dpus))


@dataclass(frozen=True, kw_only=True)
class Batch(ABC):
    """One request to the driver. `frag_addrs` uint64[n]: what is to move."""

    program: ClassVar[DpuProgram]
    frag_addrs: U64
    skip_runs: U64 = field(default_factory=lambda: NO_RUNS)
    """uint64[n, 2], sent to every DPU behind its columns."""
    started_ns: int
    profile: Profile
    """What times it, whatever is chosen meanwhile."""
    fault: Fault | None = None
    """The injected fault that it will meet."""

    @abstractmethod
    def deal(self, nr_dpus: int) -> tuple[I64, U64]:
        """One slice per DPU -> (arguments int64[nr_dpus, NR_ARGS], heap uint64[nr_dpus, columns x nr_slots])."""

    @abstractmethod
    def layout_by_rule(self, nr_pages: int) -> U64:
        """Where the fragments go in a memory of `nr_pages`, for when the device cannot be asked."""

    @abstractmethod
    def effort(self, new_addrs: U64, nr_retired: int, nr_dpus: int) -> tuple[int, int, int]:
        """(pages, waves, rounds) of the first `nr_retired` moves, as profile.Work has them."""


@dataclass(frozen=True, kw_only=True)
class CompactBatch(Batch):
    """Fragments to pack from `base_addr` on, around `skip_runs`."""

    program: ClassVar[DpuProgram] = DPU_COMPACT
    base_addr: int

    def deal(self, nr_dpus: int) -> tuple[I64, U64]:
        args = np.empty((nr_dpus, move.NR_ARGS), np.int64)
        frags = np.zeros((nr_dpus, nr_slots(len(self.frag_addrs), nr_dpus)), np.uint64)
        move.deal_slices(self.base_addr, self.frag_addrs, len(self.skip_runs), args, frags)
        return args, frags

    def layout_by_rule(self, nr_pages: int) -> U64:
        """The layout that the program computed, computed here: its loop on a single slice.

        A batch that the rule refuses has none: its fragments stay at their own addresses.
        """
        args, frags = self.deal(1)
        heap = np.concatenate((frags[0], np.zeros_like(frags[0]), np.zeros_like(frags[0]), self.skip_runs.reshape(-1)))
        mram = np.concatenate((np.zeros(move.HEAP, np.int64), heap.view(np.int64)))
        nr_frags = len(self.frag_addrs)
        if move.plan_layout(mram[None], args, np.zeros(1, np.int64), nr_pages) < 0:
            return self.frag_addrs & ~np.uint64(move.PAGE_SIZE - 1)
        new = mram[move.HEAP + move.COL_NEW * frags.shape[1] :][:nr_frags]
        return new.view(np.uint64)

    def effort(self, new_addrs: U64, nr_retired: int, nr_dpus: int) -> tuple[int, int, int]:
        nr_pages = move.count_pages(self.frag_addrs, nr_retired)
        return nr_pages, *move.count_waves(self.frag_addrs, new_addrs, nr_retired, nr_dpus)


@dataclass(frozen=True, kw_only=True)
class ListBatch(Batch):
    """Folios `frag_addrs` (pfn << 12 | order) to move to `dst_addrs`."""

    program: ClassVar[DpuProgram] = DPU_MOVE
    dst_addrs: U64

    def deal(self, nr_dpus: int) -> tuple[I64, U64]:
        args = np.empty((nr_dpus, move.NR_ARGS), np.int64)
        src, dst = (np.zeros((nr_dpus, nr_slots(len(self.frag_addrs), nr_dpus)), np.uint64) for _ in range(2))
        move.deal_slices(0, self.frag_addrs, 0, args, src)
        dst.reshape(-1)[: len(self.dst_addrs)] = self.dst_addrs
        return args, np.ascontiguousarray(np.hstack((src, dst)))

    def layout_by_rule(self, nr_pages: int) -> U64:
        return self.dst_addrs

    def effort(self, new_addrs: U64, nr_retired: int, nr_dpus: int) -> tuple[int, int, int]:
        slots = nr_slots(len(self.frag_addrs), nr_dpus)
        nr_pages = move_list.busiest_dpu_pages(self.frag_addrs, nr_retired, max(nr_retired, 1))
        rounds = move_list.busiest_dpu_pages(self.frag_addrs, nr_retired, slots)
        return nr_pages, min(nr_retired, 1), rounds


def compact_batch(
    base_addr: int, frag_addrs: U64, num_frags: int, skip_runs: U64 | None, profile: Profile
) -> CompactBatch:
    """Check the shape of a request, else OSError(EINVAL); its addresses are for the program to judge."""
    started_ns = time.perf_counter_ns()
    runs = NO_RUNS if skip_runs is None else skip_runs
    if frag_addrs.ndim != 1 or not 0 <= num_frags <= len(frag_addrs) or not 0 <= base_addr <= move.ADDR_MAX:
        raise OSError(errno.EINVAL, "frag_addrs must be uint64[n >= num_frags], base_addr a physical address")
    if runs.ndim != 2 or runs.shape[1] != 2 or runs.dtype != np.uint64 or frag_addrs.dtype != np.uint64:
        raise OSError(errno.EINVAL, "skip_runs must be uint64[n, 2]")
    return CompactBatch(
        base_addr=base_addr,
        frag_addrs=np.ascontiguousarray(frag_addrs[:num_frags]),
        skip_runs=np.ascontiguousarray(runs),
        started_ns=started_ns,
        profile=profile,
    )


def list_batch(src_addrs: U64, dst_addrs: U64, num: int, profile: Profile) -> ListBatch:
    """The same for a list of moves."""
    started_ns = time.perf_counter_ns()
    for addrs in (src_addrs, dst_addrs):
        if addrs.ndim != 1 or addrs.dtype != np.uint64 or not 0 <= num <= len(addrs):
            raise OSError(errno.EINVAL, "src_addrs and dst_addrs must be uint64[n >= num]")
    src, dst = (np.ascontiguousarray(addrs[:num]) for addrs in (src_addrs, dst_addrs))
    return ListBatch(frag_addrs=src, dst_addrs=dst, started_ns=started_ns, profile=profile)
