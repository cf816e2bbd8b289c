# SPDX-License-Identifier: GPL-2.0-only
"""/proc/sys/vm/dpu_compact_*: the knobs of DPU compaction."""

from kernelsim.attr import Attr, Bool, Int, Kobject


class DpuCompactSysctl(Kobject):
    """The sysctls, and the values that dpu_compact.py goes by."""

    dpu_compact_enabled = Attr(Bool(), 1, doc="1: compaction uses the DPU; 0: the CPU moves pages, 32 at a time.")
    dpu_compact_adaptive = Attr(
        Bool(), 0, doc="1: each region goes to the engine or the CPU, whichever was found to be faster for its size."
    )
    dpu_compact_min_fragments = Attr(
        Int(1, 1024), 32, doc="Regions with fewer movable fragments than this are left to the CPU."
    )
    dpu_compact_region_order = Attr(Int(9, 18), 9, doc="A batch packs a region of 2^N pages; 9 is 2 MiB, 18 is 1 GiB.")
