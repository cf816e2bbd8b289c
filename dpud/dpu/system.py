# SPDX-License-Identifier: GPL-2.0-only
"""What is plugged in: ranks made from a profile (the timing file), and from a profile string (the SDK's properties)."""

from dpud.dpu.faults import FaultPlan
from dpud.dpu.profile import Profile, load_profile
from dpud.dpu.properties import CHIPS, Properties
from dpud.dpu.rank import NR_DPUS_MAX, Rank, RankOptions

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
    """One rank; `profile` has the properties' chip already."""
    most = properties.sg_xfer_max_blocks_per_dpu or nr_dpus
    options = RankOptions(
        chip_id=properties.chip_id or chip_id_of(profile),
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
    return Rank(rank_id, profile.chip, faults, nr_dpus, disabled_mask | properties.disabled_mask, options)


def chip_id_of(profile: Profile) -> int:
    """dpu_chip_id_e of the chip that has the profile's number of tasklets."""
    return next(
        number
        for number, name in CHIPS.items()
        if load_profile(name).chip.nr_tasklets.value == profile.chip.nr_tasklets.value
    )
