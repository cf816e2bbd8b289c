# SPDX-License-Identifier: GPL-2.0-only
"""What is plugged in: ranks made from a profile (the timing file), and from a profile string (the SDK's properties)."""

import threading
from collections.abc import Callable

from dpud.dpu.dpu_set import DpuSet
from dpud.dpu.faults import FaultPlan
from dpud.dpu.profile import Profile, load_profile, rank_chip
from dpud.dpu.properties import Properties, load_properties
from dpud.dpu.rank import NR_DPUS_MAX, Rank, RankOptions, RankPool

NR_SIMULATED = 64
"""Ranks that the simulator backend has, of one DPU each (dpu.md 1.5)."""
RESULT_TIMEOUT_MAX_S = 0.1
"""A thread of ours waits no longer than this for a device that does not answer, whatever the profile says."""


def new_rank(
    rank_id: int,
    profile: Profile,
    properties: Properties,
    faults: FaultPlan,
    *,
    nr_dpus: int = NR_DPUS_MAX,
    disabled_mask: int = 0,
) -> Rank:
    """One rank of the profile's chip, or the default one, with what the properties change."""
    most = properties.sg_xfer_max_blocks_per_dpu or nr_dpus
    options = RankOptions(
        clock_division=properties.clock_division,
        nr_jobs=properties.nr_jobs_per_rank,
        nr_threads=properties.nr_threads_per_rank,
        safe_checks=not properties.disable_safe_checks,
        mux_switch=not properties.disable_mux_switch,
        dpu_owns_mram=properties.mram_access_by_dpu_only,
        reset_on_alloc=not properties.disable_reset_on_alloc,
        sg_max_blocks=most if properties.sg_xfer_enable else None,
        mode=properties.region_mode,
        result_timeout_s=min(profile.result_timeout_ns / 1e9, RESULT_TIMEOUT_MAX_S),
    )
    chip = properties.chip(rank_chip(profile))
    return Rank(rank_id, chip, faults, nr_dpus, disabled_mask | properties.disabled_mask, options)


class System:
    """The ranks that programs of this process may allocate, by the profile string of each allocation.

    `hw` ranks have 64 DPUs less those disabled; there are `nr_ranks` of them. `simulator` ranks have one DPU.
    """

    def __init__(self, nr_ranks: int) -> None:
        self.nr_ranks = nr_ranks
        self._lock = threading.Lock()
        self._taken: dict[str, set[int]] = {"hw": set(), "simulator": set()}

    def alloc(self, argument: str, nr_dpus: int | None, nr_ranks: int) -> tuple[DpuSet, Callable[[], None]]:
        """dpu_alloc if `nr_dpus` is given, else dpu_alloc_ranks -> the set, and what frees it."""
        properties = load_properties(argument)
        profile = load_profile("upmem-v1a")
        simulated = properties.backend == "simulator"
        with self._lock:
            taken = self._taken[properties.backend]
            numbers = set(range(NR_SIMULATED if simulated else self.nr_ranks)) - taken
            pool = RankPool(
                [
                    new_rank(n, profile, properties, FaultPlan(), nr_dpus=1 if simulated else NR_DPUS_MAX)
                    for n in sorted(numbers)
                ]
            )
            dpus = DpuSet.alloc_ranks(pool, nr_ranks) if nr_dpus is None else DpuSet.alloc(pool, nr_dpus)
            mine = {rank.rank_id for rank in pool.ranks if rank.is_owned}
            taken |= mine

        def free() -> None:
            dpus.free()
            pool.close()
            with self._lock:
                taken.difference_update(mine)

        return dpus, free
