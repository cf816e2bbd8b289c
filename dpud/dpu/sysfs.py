# SPDX-License-Identifier: GPL-2.0-only
"""/sys/class/dpu_rank/dpu_rankN/: the live files, named and printed as the UPMEM driver does (dpu.md 1.7).

Left out, because nothing is behind it here: mcu_version, part_number, serial_number, signal_led and dimm_vpd (there is
no DIMM with a controller), channel_id (no memory channel), backend_id and byte_order (no address translation),
capabilities (of that translation), and /sys/module/dpu/version (no module; `ignoreVersion` has no effect).

`mode` and `debug_mode` are the driver's own state, kept per rank: mode 1 perf, 2 safe, 3 hybrid, 0 not chosen yet. No
access here goes by them, as none goes through a device file; they follow the driver's rules.
"""

import errno

from dpud.dpu.properties import chip_id_of
from dpud.dpu.rank import NR_DPUS_PER_CI, Rank, RankPool
from kernelsim.attr import Attr, Bool, Int, Kobject, Registry

CLASS_PATH = "/sys/class/dpu_rank"
COUNT = Int(0, 2**31 - 1)
U8 = Int(0, 255)
PERF, SAFE = 1, 2


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
    dpu_chip_id = Attr(COUNT, doc="The SDK's number of the chip: 4 is v1A, 68 is v1B.")
    fck_frequency = Attr(COUNT, doc="Clock of the chip in MHz; its DPUs run at this divided by clock_division.")
    clock_division = Attr(COUNT, doc="What the clock is divided by for the DPUs.")
    mode = Attr(U8, doc="How the rank is accessed: 1 perf, 2 safe. 3 (hybrid) and 0 (none yet) can only be read.")
    debug_mode = Attr(U8, doc="Not 0: a debugger holds the rank; freeing the rank resets it.")

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

    @dpu_chip_id.show
    def _dpu_chip_id_show(self) -> int:
        return chip_id_of(self._rank.chip)

    @fck_frequency.show
    def _fck_frequency_show(self) -> int:
        return round(self._rank.chip.fck_frequency_mhz.value * self._rank.options.clock_division)

    @clock_division.show
    def _clock_division_show(self) -> int:
        return self._rank.options.clock_division

    @mode.show
    def _mode_show(self) -> int:
        return self._rank.mode

    @mode.store
    def _mode_store(self, value: int) -> None:
        if value not in (PERF, SAFE):
            raise OSError(errno.EINVAL, "no such mode")
        if value == PERF and self._rank.mode == SAFE and self._rank.is_owned:
            raise OSError(errno.EBUSY, "the rank is allocated in safe mode")
        self._rank.mode = value

    @debug_mode.show
    def _debug_mode_show(self) -> int:
        return self._rank.debug_mode

    @debug_mode.store
    def _debug_mode_store(self, value: int) -> None:
        self._rank.debug_mode = value


def add_rank_files(registry: Registry, pool: RankPool) -> None:
    """Show every rank of `pool`; the class is there without any, as the driver is."""
    registry.add(CLASS_PATH, Kobject())
    for rank in pool.ranks:
        registry.add(f"{CLASS_PATH}/dpu_rank{rank.rank_id}", RankFiles(rank, pool))
