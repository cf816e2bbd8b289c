# SPDX-License-Identifier: GPL-2.0-only
"""Knobs of allocation and reclaim in /proc/sys/vm: watermarks, reserves, per-CPU lists, dropping the page cache."""

from __future__ import annotations

from kernelsim.attr import Attr, Int, IntVector, Kobject, Text
from kernelsim.kinds import einval
from kernelsim.mm_types import LongOp
from kernelsim.mmzone import MAX_NR_ZONES, ZONE_MOVABLE, Mem
from kernelsim.mmzone import lowmem_reserve_ratio as DEFAULT_RESERVE_RATIO
from kernelsim.printk import Printk
from kernelsim.reclaim import Reclaim
from kernelsim.task import Current

_DROP_PAGECACHE, _DROP_SLAB, _DROP_SILENTLY = 1, 2, 4


class PageAllocSysctl(Kobject):
    """The watermark sysctls recompute every zone's watermarks (setup_per_zone_wmarks)."""

    min_free_kbytes = Attr(
        Int(), doc="Memory in kB that the zones' min watermarks share; low and high follow.", kept=True
    )
    watermark_scale_factor = Attr(
        Int(1, 3000), 10, doc="Distance between the watermarks, in 10000ths of a zone (if more than min / 4)."
    )
    lowmem_reserve_ratio = Attr(
        IntVector(MAX_NR_ZONES),
        DEFAULT_RESERVE_RATIO,
        doc="By zone: it keeps 1/N of the zones above back from requests that could be met there; 0: nothing.",
    )
    numa_zonelist_order = Attr(
        Text(), doc="Zonelists go by node: `Node` is shown, and all that can be written.", kept=True
    )
    stat_refresh = Attr(Text(), mode=0o600, doc="Brings counters up to date, which they always are.")
    drop_caches = Attr(
        Int(1, 4),
        doc="1: drop unmapped page cache; 2: slab (there is none to drop); 3: both; 4: log no more.",
        mode=0o200,
    )

    def __init__(self, mem: Mem, reclaim: Reclaim, printk: Printk, current: Current) -> None:
        self.mem = mem
        self.reclaim = reclaim
        self.printk = printk
        self.current = current
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
        self.mem.setup_watermarks(self._min_free_kbytes, self.watermark_scale_factor, self.lowmem_reserve_ratio)

    @lowmem_reserve_ratio.store
    def _set_reserve_ratio(self, given: tuple[int, ...]) -> None:
        """A write may give fewer numbers than there are zones; below 1 means none."""
        kept = self.lowmem_reserve_ratio[len(given) :]
        self.lowmem_reserve_ratio = (*(max(ratio, 0) for ratio in given), *kept)
        self._setup()

    @numa_zonelist_order.show
    def _show_order(self) -> str:
        return "Node"

    @numa_zonelist_order.store
    def _set_order(self, text: str) -> None:
        """Only the first letter counts: Default or Node (__parse_numa_zonelist_order)."""
        if text[:1] not in ("d", "D", "n", "N") or not text:
            raise einval("zonelists go by node")

    @stat_refresh.show
    def _refreshed(self) -> str:
        return ""

    @stat_refresh.store
    def _refresh(self, _text: str) -> None:
        """Counters have no per-CPU parts to be added up here."""

    @drop_caches.store
    def _drop(self, what: int) -> LongOp:
        if what & _DROP_PAGECACHE:
            yield from self.reclaim.drop_pagecache()
        if what & _DROP_SLAB:
            self.reclaim.vm.events["drop_slab"] += 1
        if not self._quiet:
            task = self.current.task
            self.printk(f"{task.comm} ({task.pid}): drop_caches: {what}")
        self._quiet |= what & _DROP_SILENTLY != 0
