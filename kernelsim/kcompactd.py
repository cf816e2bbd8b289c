# SPDX-License-Identifier: GPL-2.0-only
"""kcompactd: one thread for each node that compacts in the background (mm/compaction.c).

It is woken with an order by kswapd on its way to sleep, and for requests that may not compact themselves, if some zone
is suitable. Then it goes over the node's zones: one that is deferred or not suitable is passed by; for a costly order
the DPU is asked first, where it is there (dpu_compact_direct.py); if no block came of it, the two scanners run
(MIGRATE_SYNC_LIGHT, from the cached positions).

Between wake-ups it looks every 500 ms whether the node's fragmentation score is above its high mark while kswapd is
idle. If so it compacts proactively, each zone down to its low mark, the DPU first again; if that did not bring the
score down, the next look is 500 ms << 6 later. compaction_proactiveness 0 turns these looks off.

Compaction by hand (compact_memory) and this thread take turns (Vm.compaction_mutex). Both move the cached scanner
positions, which are hints: the worst is a block that is looked at twice.
"""

from typing import Protocol

from kernelsim import trace_events
from kernelsim.compact_control import COMPACT_COMPLETE, COMPACT_PARTIAL_SKIPPED, COMPACT_SUCCESS
from kernelsim.compaction import COMPACT_MAX_DEFER_SHIFT
from kernelsim.dpu_compact_direct import MAX_REGION_ORDER, DpuDirectCompaction
from kernelsim.kswapd import Kswapd
from kernelsim.kthread import Kthread
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import ZONE_MOVABLE, pageblock_order
from kernelsim.operation import Operation
from kernelsim.trace_hook import traced

HPAGE_FRAG_CHECK_INTERVAL_NS = 500_000_000


class ProactivenessSysctl(Protocol):
    compaction_proactiveness: int


class BackgroundCompaction(Protocol):
    """What the thread asks of compaction.py."""

    def compaction_suitable(self, zone: int, order: int, highest_type: int) -> bool: ...

    def compaction_deferred(self, zone: int, order: int) -> bool: ...

    def defer_compaction(self, zone: int, order: int) -> None: ...

    def compaction_defer_reset(self, zone: int, order: int, alloc_success: bool) -> None: ...

    def compact_zone_for_kcompactd(self, zone: int, order: int, highest_type: int) -> Operation[int]: ...

    def proactive_compact_node(self, nid: int) -> LongOp: ...

    def fragmentation_score_node(self, nid: int) -> int: ...

    def fragmentation_score_wmark(self, low: bool) -> int: ...


class Kcompactd(Kthread):
    """One node's kcompactd."""

    def __init__(
        self,
        vm: Vm,
        nid: int,
        compaction: BackgroundCompaction,
        sysctl: ProactivenessSysctl,
        dpu: DpuDirectCompaction | None,
        kswapd: Kswapd,
    ) -> None:
        super().__init__(f"kcompactd{nid}", nid)
        self.vm = vm
        self.compaction = compaction
        self.sysctl = sysctl
        self.dpu = dpu
        self.kswapd = kswapd
        self._zones = [zone for zone in vm.mem.zones_of(nid) if vm.mem.zones["managed"][zone]]
        self._wanted: tuple[int, int] | None = None
        self._next_check_ns: int | None = None
        self._triggered = False

    @traced("wakeup_kcompactd")
    def wakeup_kcompactd(self, order: int, highest_type: int) -> None:
        """Ask for blocks of an order; nothing happens for order 0 or where no zone is suitable."""
        if order == 0 or not self._suitable(order, highest_type):
            return
        self.vm.trace(trace_events.mm_compaction_wakeup_kcompactd, self.nid, order, highest_type)
        wanted_order, wanted_type = self._wanted or (0, 0)
        self._wanted = max(order, wanted_order), max(highest_type, wanted_type)

    def proactive_trigger(self) -> None:
        """compaction_proactiveness was written, not 0: look at once."""
        self._triggered = True

    @traced("kcompactd_node_suitable")
    def _suitable(self, order: int, highest_type: int) -> bool:
        """kcompactd_node_suitable()."""
        zones = self.vm.mem.zones
        return any(
            self.compaction.compaction_suitable(zone, order, highest_type)
            for zone in self._zones
            if zones["type"][zone] <= highest_type
        )

    # The thread.

    def due_ns(self, now_ns: int) -> int | None:
        if self._wanted is not None or self._triggered:
            return now_ns
        if self.sysctl.compaction_proactiveness == 0:
            self._next_check_ns = None
        elif self._next_check_ns is None:
            self._next_check_ns = now_ns + HPAGE_FRAG_CHECK_INTERVAL_NS
        return self._next_check_ns

    def work(self, now_ns: int) -> LongOp | None:
        if self._wanted is not None:
            order, highest_type = self._wanted
            self._wanted = None
            return self.do_work(order, highest_type)
        self._triggered = False
        self._next_check_ns = now_ns + HPAGE_FRAG_CHECK_INTERVAL_NS
        if self._should_proactive_compact():
            return self._proactive(now_ns)
        self._sleep()
        return None

    def _sleep(self) -> None:
        self.vm.trace(trace_events.mm_compaction_kcompactd_sleep, self.nid)

    @traced("kcompactd_do_work")
    def do_work(self, order: int, highest_type: int) -> LongOp:
        """kcompactd_do_work(): blocks of an order, from every zone that may have them."""
        self.vm.events["compact_daemon_wake"] += 1
        self.vm.trace(trace_events.mm_compaction_kcompactd_wake, self.nid, order, highest_type)
        for zone in self._zones:
            if self.vm.mem.zones["type"][zone] > highest_type or self.compaction.compaction_deferred(zone, order):
                continue
            if not self.compaction.compaction_suitable(zone, order, highest_type):
                continue
            yield from self._compact_zone(zone, order, highest_type)
        self._sleep()

    def _compact_zone(self, zone: int, order: int, highest_type: int) -> LongOp:
        helped = False
        if self.dpu is not None:
            helped = yield from self.dpu.try_dpu_compact_zone(zone, order, highest_type, False)
        result = COMPACT_SUCCESS
        if not helped:
            result = yield from self.compaction.compact_zone_for_kcompactd(zone, order, highest_type)
        if result == COMPACT_SUCCESS:
            self.compaction.compaction_defer_reset(zone, order, False)
        elif result in (COMPACT_COMPLETE, COMPACT_PARTIAL_SKIPPED):
            self.compaction.defer_compaction(zone, order)

    # Proactive.

    def _should_proactive_compact(self) -> bool:
        if self.sysctl.compaction_proactiveness == 0 or self.kswapd.running:
            return False
        return self.compaction.fragmentation_score_node(self.nid) > self.compaction.fragmentation_score_wmark(False)

    def _proactive(self, now_ns: int) -> LongOp:
        before = self.compaction.fragmentation_score_node(self.nid)
        self.vm.pr_debug("node %d: proactive compaction, score %d\n", self.nid, before)
        yield from self._proactive_by_dpu()
        if self.compaction.fragmentation_score_node(self.nid) > self.compaction.fragmentation_score_wmark(True):
            yield from self.compaction.proactive_compact_node(self.nid)
        if self.compaction.fragmentation_score_node(self.nid) >= before:
            self._next_check_ns = now_ns + (HPAGE_FRAG_CHECK_INTERVAL_NS << COMPACT_MAX_DEFER_SHIFT)
            self.vm.pr_debug("node %d: proactive compaction did not help, next look in 32 s\n", self.nid)
        self._sleep()

    def _proactive_by_dpu(self) -> LongOp:
        """The largest regions free the most blocks; zone by zone until the node is below its low mark."""
        if self.dpu is None or not self.dpu.available():
            return

        def done() -> bool:
            score = self.compaction.fragmentation_score_node(self.nid)
            return score <= self.compaction.fragmentation_score_wmark(True)

        for zone in self._zones:
            if self.dpu.worth_trying(zone, pageblock_order, ZONE_MOVABLE, True):
                yield from self.dpu.dpu.dpu_compact_memory(zone, MAX_REGION_ORDER, done)
