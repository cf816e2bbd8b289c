# SPDX-License-Identifier: GPL-2.0-only
"""/sys/class/dpu_rank/dpu_rankN/: the live files, named as the UPMEM driver names them (dpu.md 1.7).

What a real rank tells of its DIMM (part and serial number, firmware, identification of chip and back end) has
nothing behind it here, and is left out.
"""

from dpud.dpu.rank import NR_DPUS_PER_CI, Rank, RankPool
from kernelsim.attr import Attr, Bool, Int, Kobject, Registry

CLASS_PATH = "/sys/class/dpu_rank"
COUNT = Int(0, 2**31 - 1)


class RankFiles(Kobject):
    """The files of one rank."""

    is_owned = Attr(Bool(), doc="Whether a set of DPUs holds the rank.")
    usage_count = Attr(COUNT, doc="How many users the rank has.")
    rank_id = Attr(COUNT, doc="Number of the rank.")
    rank_index = Attr(COUNT, doc="Place of the rank among all ranks.")
    rank_count = Attr(COUNT, doc="How many ranks there are.")
    nb_ci = Attr(COUNT, doc="Control interfaces, one a chip.")
    nb_dpus_per_ci = Attr(COUNT, doc="DPUs of each control interface.")
    mram_size = Attr(COUNT, doc="Bytes of MRAM of one DPU.")
    fck_frequency = Attr(COUNT, doc="Clock of the DPUs in MHz.")

    def __init__(self, rank: Rank, pool: RankPool) -> None:
        self._rank = rank
        self._pool = pool

    @is_owned.show
    def _is_owned_show(self) -> int:
        return int(self._rank.is_owned)

    @usage_count.show
    def _usage_count_show(self) -> int:
        return self._rank.usage_count

    @rank_id.show
    def _rank_id_show(self) -> int:
        return self._rank.rank_id

    @rank_index.show
    def _rank_index_show(self) -> int:
        return self._pool.ranks.index(self._rank)

    @rank_count.show
    def _rank_count_show(self) -> int:
        return len(self._pool.ranks)

    @nb_ci.show
    def _nb_ci_show(self) -> int:
        return -(-self._rank.nr_dpus // NR_DPUS_PER_CI)

    @nb_dpus_per_ci.show
    def _nb_dpus_per_ci_show(self) -> int:
        return min(self._rank.nr_dpus, NR_DPUS_PER_CI)

    @mram_size.show
    def _mram_size_show(self) -> int:
        return int(self._rank.chip.mram_bytes.value)

    @fck_frequency.show
    def _fck_frequency_show(self) -> int:
        return int(self._rank.chip.fck_frequency_mhz.value)


def add_rank_files(registry: Registry, pool: RankPool) -> None:
    """Show every rank of `pool`; the class is there without any, as the driver is."""
    registry.add(CLASS_PATH, Kobject())
    for rank in pool.ranks:
        registry.add(f"{CLASS_PATH}/dpu_rank{rank.rank_id}", RankFiles(rank, pool))
