# SPDX-License-Identifier: GPL-2.0-only
"""Knobs of allocation and reclaim in /proc/sys/vm: watermarks, and dropping the page cache."""

from kernelsim.attr import Attr, Int, Kobject
from kernelsim.mm_types import LongOp
from kernelsim.mmzone import ZONE_MOVABLE, Mem
from kernelsim.printk import Printk
from kernelsim.reclaim import Reclaim

_DROP_PAGECACHE, _DROP_SLAB, _DROP_SILENTLY = 1, 2, 4


class PageAllocSysctl(Kobject):
    """The watermark sysctls recompute every zone's watermarks (setup_per_zone_wmarks)."""

    min_free_kbytes = Attr(Int(), doc="Memory in kB that the zones' min watermarks share; low and high follow.")
    watermark_scale_factor = Attr(
        Int(1, 3000), 10, doc="Distance between the watermarks, in 10000ths of a zone (if more than min / 4)."
    )
    drop_caches = Attr(
        Int(1, 4),
        doc="1: drop unmapped page cache; 2: slab (there is none to drop); 3: both; 4: log no more.",
        mode=0o200,
    )

    def __init__(self, mem: Mem, reclaim: Reclaim, printk: Printk) -> None:
        self.mem = mem
        self.reclaim = reclaim
        self.printk = printk
        self._quiet = False
        self._min_free_kbytes = self._sum_of_min()

    def _sum_of_min(self) -> int:
        """What the watermarks in force came from: ZONE_MOVABLE's does not count (an import brings its own)."""
        zones = self.mem.zones
        return 4 * int(zones["watermark"][zones["type"] != ZONE_MOVABLE, 0].sum())

    @min_free_kbytes.show
    def _show_min_free(self) -> int:
        return self._min_free_kbytes

    @min_free_kbytes.store
    def _set_min_free(self, kbytes: int) -> None:
        self._min_free_kbytes = kbytes
        self._setup()

    @watermark_scale_factor.stored
    def _rescale(self, _old: int, _new: int) -> None:
        self._setup()

    def _setup(self) -> None:
        self.mem.setup_watermarks(self._min_free_kbytes, self.watermark_scale_factor)

    @drop_caches.store
    def _drop(self, what: int) -> LongOp:
        if what & _DROP_PAGECACHE:
            yield from self.reclaim.drop_pagecache()
        if what & _DROP_SLAB:
            self.reclaim.vm.events["drop_slab"] += 1
        if not self._quiet:
            self.printk(f"drop_caches: {what}")
        self._quiet |= what & _DROP_SILENTLY != 0
