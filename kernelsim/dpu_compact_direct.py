# SPDX-License-Identifier: GPL-2.0-only
"""The DPU in the service of one request: try_dpu_compact_zone().

A request of more than PAGE_ALLOC_COSTLY_ORDER that finds no block large enough, and kcompactd, ask here first. The zone
is packed in regions large enough that one of them can free the block wanted (2^3 times its size, or
dpu_compact_region_order if that is more: packing a region of just that size would only free it where it becomes empty),
and the packing ends with the region that does. Whether it helped is decided as for any allocation: a free block of the
order, and the watermark still kept.

A zone that did not help is not tried every time: it is deferred as compaction_deferred() does it, on its own counters
(the next 2, 4, ... 64 requests of that order or more pass it by).
"""

from dataclasses import dataclass

from kernelsim.compaction import COMPACT_MAX_DEFER_SHIFT
from kernelsim.dpu_compact import DpuCompact
from kernelsim.mmzone import WMARK_MIN, Mem
from kernelsim.operation import Operation
from kernelsim.page_alloc import PAGE_ALLOC_COSTLY_ORDER, zone_watermark_ok
from kernelsim.trace_hook import traced

DPU_MIN_DIRECT_ORDER = PAGE_ALLOC_COSTLY_ORDER + 1
"""Small orders do not go to the DPU: a block of 8 pages is found faster than a batch is set up."""
REGION_HEADROOM_ORDERS = 3
MAX_REGION_ORDER = 18  # the sysctl's limit


@dataclass
class Deferral:
    """One zone's (mm/compaction.c defer_compaction)."""

    considered: int = 0
    shift: int = 0
    order_failed: int = 0

    def deferred(self, order: int) -> bool:
        """Count a request; True if it should not try."""
        if order < self.order_failed or self.shift == 0:
            return False
        limit = 1 << self.shift
        self.considered = min(self.considered + 1, limit)
        return self.considered < limit

    def defer(self, order: int) -> None:
        """It did not help."""
        self.considered = 0
        self.shift = min(self.shift + 1, COMPACT_MAX_DEFER_SHIFT)
        self.order_failed = min(self.order_failed, order) if self.order_failed else order

    def reset(self, order: int) -> None:
        """It did."""
        self.considered = self.shift = 0
        self.order_failed = max(self.order_failed, order + 1)


class DpuDirectCompaction:
    """Whether, and how, a request uses the DPU."""

    def __init__(self, mem: Mem, dpu: DpuCompact) -> None:
        self.mem = mem
        self.dpu = dpu
        self.deferral = [Deferral() for _ in mem.zones]

    def available(self) -> bool:
        """It is switched on, there, and the engine chosen; an engine that is the CPU has nothing over the scanners."""
        dpu = self.dpu
        on = bool(dpu.sysctl.dpu_compact_enabled) and dpu.engine.copier == "device"
        return on and dpu.hw is not None and dpu.hw.nr_present > 0

    @traced("dpu_compact_suitable")
    def worth_trying(self, zone: int, order: int, highest_type: int, movable: bool) -> bool:
        """Not a small order, and the pages for such a block are free, if scattered."""
        if order < DPU_MIN_DIRECT_ORDER or not self.available():
            return False
        zones = self.mem.zones
        return zone_watermark_ok(
            zones, zone, 0, int(zones["watermark"][zone, WMARK_MIN]) + (1 << order), highest_type, movable
        )

    def modelled_ns(self) -> int:
        """Modelled time since boot, of batches and of the mapping updates after them."""
        return self.dpu.stats.device_ns + self.dpu.stats.update_ns

    @traced("try_dpu_compact_zone")
    def try_dpu_compact_zone(self, zone: int, order: int, highest_type: int, movable: bool) -> Operation[bool]:
        """Pack the zone until it has a block of the order and stays above min; True if it then has."""
        if not self.worth_trying(zone, order, highest_type, movable) or self.deferral[zone].deferred(order):
            return False
        self.dpu.vm.pr_debug("zone %d: packing for order %d\n", zone, order)
        zones = self.mem.zones

        def done() -> bool:
            return zone_watermark_ok(
                zones, zone, order, int(zones["watermark"][zone, WMARK_MIN]), highest_type, movable
            )

        region_order = max(self.dpu.sysctl.dpu_compact_region_order, order + REGION_HEADROOM_ORDERS)
        yield from self.dpu.dpu_compact_memory(zone, min(region_order, MAX_REGION_ORDER), done)
        helped = done()
        if helped:
            self.deferral[zone].reset(order)
        else:
            self.deferral[zone].defer(order)
            self.dpu.vm.pr_debug("zone %d: no block of order %d came of it\n", zone, order)
        return helped
