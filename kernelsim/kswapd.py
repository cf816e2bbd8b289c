# SPDX-License-Identifier: GPL-2.0-only
"""kswapd: one thread for each node that reclaims in the background (mm/vmscan.c).

Allocations wake it where no zone of theirs is above its low watermark. It reclaims until one zone of the node could
give a block of the order that was asked for and stay above its high watermark, with rising pressure from priority 12
to 1. Once it freed compact_gap(order) pages it goes on for single pages only: the rest is for compaction. On its way to
sleep it clears the zones' skip information and wakes kcompactd with the order that was wanted.

A node for which MAX_RECLAIM_RETRIES (16) rounds in a row freed nothing is hopeless; kswapd leaves it alone until direct
reclaim frees something there. Differences from Linux: no watermark boost, no short sleep before the long one.
"""

from collections.abc import Callable

from kernelsim.compaction import Compaction, compact_gap
from kernelsim.gfp import _GFP_DIRECT_RECLAIM
from kernelsim.kthread import Kthread
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import WMARK_HIGH
from kernelsim.operation import Operation
from kernelsim.page_alloc import zone_watermark_ok
from kernelsim.reclaim import DEF_PRIORITY, Reclaim
from kernelsim.trace_hook import traced
from kernelsim.vmscan import SWAP_CLUSTER_MAX

MAX_RECLAIM_RETRIES = 16

WakeupKcompactd = Callable[[int, int, int], None]
"""(nid, order, highest zone type)"""


class Kswapd(Kthread):
    """One node's kswapd."""

    def __init__(
        self,
        vm: Vm,
        reclaim: Reclaim,
        nid: int,
        compaction: Compaction | None,
        wakeup_kcompactd: WakeupKcompactd,
    ) -> None:
        super().__init__(f"kswapd{nid}", nid)
        self.vm = vm
        self.reclaim = reclaim
        self._compaction = compaction
        self._wakeup_kcompactd = wakeup_kcompactd
        self._zones = vm.mem.zones_of(nid)
        self._wanted: tuple[int, int] | None = None  # order and highest zone type of who woke it

    @traced("wakeup_kswapd")
    def wakeup_kswapd(self, gfp: int, order: int, highest_type: int) -> None:
        """A request found no zone above low. A balanced node leaves one that may not compact itself to kcompactd."""
        if not any(self.vm.mem.zones["managed"][zone] for zone in self._zones):
            return
        if self.hopeless or self.balanced(order, highest_type):
            if gfp & _GFP_DIRECT_RECLAIM == 0:
                self._wakeup_kcompactd(self.nid, order, highest_type)
            return
        wanted_order, wanted_type = self._wanted or (0, 0)
        self._wanted = max(order, wanted_order), max(highest_type, wanted_type)

    @property
    def hopeless(self) -> bool:
        return bool(self.reclaim.failures[self.nid] >= MAX_RECLAIM_RETRIES)

    def balanced(self, order: int, highest_type: int) -> bool:
        """One zone that the request may use could serve it above the high watermark (pgdat_balanced)."""
        zones = self.vm.mem.zones
        return any(
            zone_watermark_ok(zones, zone, order, int(zones["watermark"][zone, WMARK_HIGH]), highest_type)
            for zone in self._zones
            if zones["type"][zone] <= highest_type
        )

    # The thread.

    def due_ns(self, now_ns: int) -> int | None:
        return None if self._wanted is None else now_ns

    def work(self, now_ns: int) -> LongOp | None:
        assert self._wanted is not None
        order, highest_type = self._wanted
        self._wanted = None
        return self._run(order, highest_type)

    def _run(self, order: int, highest_type: int) -> LongOp:
        reclaim_order = yield from self.balance_pgdat(order, highest_type)
        if reclaim_order < order and not self.balanced(reclaim_order, highest_type):
            yield from self.balance_pgdat(reclaim_order, highest_type)
        if self.hopeless or self.balanced(reclaim_order, highest_type):
            if self._compaction is not None:
                self._compaction.reset_isolation_suitable(self.nid)
            self._wakeup_kcompactd(self.nid, order, highest_type)

    @traced("balance_pgdat")
    def balance_pgdat(self, order: int, highest_type: int) -> Operation[int]:
        """Reclaim until the node is balanced or the pressure is at its highest; returns the order that is left."""
        self.vm.events["pageoutrun"] += 1
        zones = self.vm.mem.zones
        nr_reclaimed = 0
        priority = DEF_PRIORITY
        while priority >= 1 and not self.balanced(order, highest_type):
            nr_wanted = sum(
                max(int(zones["watermark"][zone, WMARK_HIGH]), SWAP_CLUSTER_MAX)
                for zone in self._zones
                if zones["type"][zone] <= highest_type
            )
            freed = yield from self.reclaim.shrink_node(self.nid, priority, highest_type, nr_wanted, "kswapd")
            nr_reclaimed += freed
            if order and freed >= compact_gap(order):
                order = 0
            if freed < nr_wanted:
                priority -= 1
        if nr_reclaimed == 0 and not self.balanced(order, highest_type):
            self.reclaim.failures[self.nid] += 1
            self.vm.pr_debug("kswapd%d freed nothing, %d times in a row\n", self.nid, self.reclaim.failures[self.nid])
        return order
