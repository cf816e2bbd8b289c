# SPDX-License-Identifier: GPL-2.0-only
"""Getting pages when they are not simply there: __alloc_pages_slowpath() (mm/page_alloc.c, 6.12).

A request first takes what it can above the low watermark. Then, in this order:

1. kswapd is woken on every node (__GFP_KSWAPD_RECLAIM) and the lists are tried above the min watermark; __GFP_HIGH goes
   down to half of it, an atomic request another quarter below.
2. A costly request (order > 3), or a small one that is not movable, tries asynchronous direct compaction before any
   reclaim. With __GFP_NORETRY a costly one gives up where compaction could not even run.
3. Round after round: the lists, direct reclaim, direct compaction. NORETRY ends it after one round, so does a costly
   order without RETRY_MAYFAIL; else should_reclaim_retry() and should_compact_retry() decide.
4. Before such a request fails for good, it waits for a compaction that holds free frames to give them back, and starts
   over. On Linux a compaction holds few frames, and its request's own round ends with release_free_list(); here one
   holds them from slice to slice, while others run. So many as MAX_RECLAIM_RETRIES compactions are waited for.

Who may not block (no __GFP_DIRECT_RECLAIM: GFP_ATOMIC, GFP_NOWAIT, GFP_TRANSHUGE_LIGHT) never reclaims, never compacts
and never touches the DPU. At each direct-compaction point the DPU comes first (try_dpu_compact_zone), then
try_to_compact_pages(), then failure. Small orders do not go to the DPU.

Differences from Linux. No OOM killer: where it would run, the request fails with -ENOMEM (__GFP_NOFAIL waits for
someone else to free memory). No HighAtomic reserve, no PF_MEMALLOC, no cpusets, no NUMA policies beyond the
preferred node.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kernelsim import trace_events
from kernelsim.compact_control import COMPACT_DEFERRED, COMPACT_SKIPPED, COMPACT_SUCCESS
from kernelsim.compaction import COMPACT_PRIO_ASYNC, COMPACT_PRIO_SYNC_FULL, COMPACT_PRIO_SYNC_LIGHT
from kernelsim.fail_page_alloc import FailPageAlloc
from kernelsim.ftrace import traced
from kernelsim.gfp import (
    _GFP_DIRECT_RECLAIM,
    _GFP_FS,
    _GFP_HIGH,
    _GFP_KSWAPD_RECLAIM,
    _GFP_NOFAIL,
    _GFP_NOMEMALLOC,
    _GFP_NORETRY,
    _GFP_RETRY_MAYFAIL,
    _GFP_THISNODE,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL_ACCOUNT,
    gfp_compaction_allowed,
    gfp_migratetype,
    gfp_zone,
)
from kernelsim.kswapd import MAX_RECLAIM_RETRIES, Kswapd
from kernelsim.mm_types import Vm
from kernelsim.mmzone import MIGRATE_MOVABLE, WMARK_LOW, WMARK_MIN
from kernelsim.operation import Operation
from kernelsim.page_alloc import (
    ALLOC_MIN_RESERVE,
    ALLOC_NO_RESERVE,
    ALLOC_NON_BLOCK,
    ENOMEM,
    PAGE_ALLOC_COSTLY_ORDER,
    any_zone_ok,
    get_page_from_zonelist,
    zone_watermark_ok,
)
from kernelsim.reclaim import Reclaim
from kernelsim.show_mem import AllocFailure

MIN_COMPACT_COSTLY_PRIORITY = DEF_COMPACT_PRIORITY = COMPACT_PRIO_SYNC_LIGHT
MIN_COMPACT_PRIORITY = COMPACT_PRIO_SYNC_FULL
MAX_COMPACT_RETRIES = 16


class DirectCompaction(Protocol):
    """What the slow path asks of compaction.py."""

    def try_to_compact_pages(
        self,
        gfp: int,
        order: int,
        prio: int,
        zonelist: NDArray[np.int32],
        highest_type: int,
        migratetype: int,
    ) -> Operation[tuple[int, int]]:
        """(COMPACT_* of the best zone, captured pfn or -1)."""
        ...

    def compaction_defer_reset(self, zone: int, order: int, alloc_success: bool) -> Any: ...


class DpuDirect(Protocol):
    """What the slow path asks of the DPU (dpu_compact_direct.py)."""

    def worth_trying(self, zone: int, order: int, highest_type: int, movable: bool) -> bool:
        """Whether it is there and has something to work with."""
        ...

    def modelled_ns(self) -> int:
        """Modelled time that it has taken since boot, mapping updates included."""
        ...

    def try_dpu_compact_zone(self, zone: int, order: int, highest_type: int, movable: bool) -> Operation[bool]:
        """True if the zone now has a block of the order and stays above its min watermark."""
        ...


@dataclass
class AllocContext:
    """One request (struct alloc_context)."""

    gfp: int
    order: int
    zonelist: NDArray[np.int32]
    """Zones it may use, best first."""
    comm: str
    highest_type: int
    migratetype: int
    compact_result: int = COMPACT_SKIPPED
    no_progress_loops: int = 0
    compaction_retries: int = 0
    compact_priority: int = DEF_COMPACT_PRIORITY
    nr_waits: int = 0
    """Compactions that it has waited for."""
    steps: list[str] = field(default_factory=list)
    """What was done for it, in order: reclaim, dpu, compact_async, compact."""
    device_ns: int = 0
    """Modelled time that the DPU and the mapping updates after it took for it."""

    @property
    def outcome(self) -> str:
        """What a request that got its page had to wait for last; freelist: nothing."""
        return self.steps[-1] if self.steps else "freelist"

    @property
    def costly(self) -> bool:
        return self.order > PAGE_ALLOC_COSTLY_ORDER

    @property
    def movable(self) -> bool:
        """It may use CMA pages (ALLOC_CMA)."""
        return self.migratetype == MIGRATE_MOVABLE

    @property
    def can_direct_reclaim(self) -> bool:
        return self.gfp & _GFP_DIRECT_RECLAIM != 0

    @property
    def can_compact(self) -> bool:
        return gfp_compaction_allowed(self.gfp)

    @property
    def reserve(self) -> int:
        """How far below min it may go (gfp_to_alloc_flags)."""
        reserve = ALLOC_MIN_RESERVE if self.gfp & _GFP_HIGH else ALLOC_NO_RESERVE
        if not self.can_direct_reclaim and self.gfp & _GFP_NOMEMALLOC == 0:
            reserve |= ALLOC_NON_BLOCK
        return reserve


class AllocSlowpath:
    """Allocation for those who can wait, and for those who may not but want the rules applied."""

    def __init__(
        self,
        vm: Vm,
        reclaim: Reclaim,
        kswapds: list[Kswapd],
        compaction: DirectCompaction | None,
        dpu: DpuDirect | None,
        report: AllocFailure,
    ) -> None:
        """`compaction` None: CONFIG_COMPACTION is off; `dpu` None: CONFIG_DPU_COMPACTION is off."""
        self.vm = vm
        self.reclaim = reclaim
        self.kswapds = kswapds
        self.compaction = compaction
        self.dpu = dpu
        self.report = report
        self.fail_page_alloc = FailPageAlloc("fail_page_alloc", report.printk, report.now_ns)

    # Entry points.

    def context(self, gfp: int, order: int, nid: int, comm: str) -> AllocContext:
        mem = self.vm.mem
        highest_type = gfp_zone(gfp)
        zonelist = mem.zonelist[nid]
        fits = mem.zones["type"][zonelist] <= highest_type
        if gfp & _GFP_THISNODE:
            fits &= mem.zones["node"][zonelist] == nid
        migratetype = gfp_migratetype(gfp)
        return AllocContext(gfp, order, zonelist[fits], comm, highest_type, migratetype)

    def alloc_pages(self, gfp: int, order: int, nid: int, comm: str = "kernelsim") -> Operation[int]:
        """A block of 2^order pages, node `nid` first; its pfn (refcount 1) or -ENOMEM, which is then in the log."""
        return (yield from self.alloc(self.context(gfp, order, nid, comm)))

    @traced("__alloc_pages")
    def alloc(self, ac: AllocContext) -> Operation[int]:
        """The same for a request that was set up before; `ac.steps` tells afterwards what it took."""
        if self.fail_page_alloc.should_fail_alloc_page(ac.gfp, ac.order):
            return -ENOMEM
        pfn = self._get_page(ac, WMARK_LOW, ALLOC_NO_RESERVE)
        if pfn < 0:
            pfn = yield from self._slowpath(ac)
        if pfn < 0:
            self.report.warn_alloc(ac.gfp, ac.order, ac.comm)
        self.vm.trace(trace_events.mm_page_alloc, max(pfn, trace_events.NO_PFN), ac.order, ac.gfp, ac.migratetype)
        return pfn

    def make_room(self, nid: int, comm: str) -> Operation[bool]:
        """For a page fault in `nid` that found no page: reclaim until one is there above min; False: out of memory.

        Compiled code takes its pages itself, so this does everything for it but that. Where a movable page could have
        been had, from a CMA area, it was a page table that could not.
        """
        ac = self.context(GFP_HIGHUSER_MOVABLE, 0, nid, comm)
        if self._any_zone_ok(ac):
            ac = self.context(GFP_KERNEL_ACCOUNT, 0, nid, comm)
        self._wake_all_kswapds(ac)
        while True:
            progress = yield from self._direct_reclaim(ac)
            if self._any_zone_ok(ac):
                return True
            if self._should_reclaim_retry(ac, progress) or (yield from self._wait_for_held_pages(ac)):
                continue
            self.report.warn_alloc(ac.gfp, 0, comm)
            return False

    def _any_zone_ok(self, ac: AllocContext) -> bool:
        return any_zone_ok(self.vm.mem.zones, ac.zonelist, ac.order, WMARK_MIN, ac.highest_type, ac.movable)

    def wake_if_low(self, nid: int) -> None:
        """After a fault's own allocations: wake kswapd if no zone of the node's list is above low."""
        mem = self.vm.mem
        zonelist = mem.zonelist[nid]
        highest_type = gfp_zone(GFP_HIGHUSER_MOVABLE)
        if not any_zone_ok(mem.zones, zonelist, 0, WMARK_LOW, highest_type, True):
            for near in dict.fromkeys(mem.zones["node"][zonelist].tolist()):
                self.kswapds[near].wakeup_kswapd(GFP_HIGHUSER_MOVABLE, 0, highest_type)

    # The slow path.

    @traced("__alloc_pages_slowpath")
    def _slowpath(self, ac: AllocContext) -> Operation[int]:
        if len(ac.zonelist) == 0:
            return -ENOMEM
        self._wake_all_kswapds(ac)
        pfn = self._get_page(ac, WMARK_MIN, ac.reserve)
        if pfn >= 0:
            return pfn
        if self._compacts_before_reclaim(ac):
            pfn = yield from self._direct_compact(ac, COMPACT_PRIO_ASYNC)
            if pfn >= 0:
                return pfn
            if ac.costly and ac.gfp & _GFP_NORETRY:
                self.vm.pr_debug("%s: order %d, async compaction: %d\n", ac.comm, ac.order, ac.compact_result)
                if ac.compact_result in (COMPACT_SKIPPED, COMPACT_DEFERRED) or ac.gfp & _GFP_THISNODE:
                    return -ENOMEM
                ac.compact_priority = COMPACT_PRIO_ASYNC
        while True:
            pfn = yield from self._round(ac)
            if pfn != -ENOMEM or not (ac.gfp & _GFP_NOFAIL and ac.can_direct_reclaim):
                return pfn
            yield None

    def _compacts_before_reclaim(self, ac: AllocContext) -> bool:
        if not (ac.can_direct_reclaim and ac.can_compact):
            return False
        return ac.costly or (ac.order > 0 and ac.migratetype != MIGRATE_MOVABLE)

    def _round(self, ac: AllocContext) -> Operation[int]:
        """Lists, reclaim, compaction, again and again as long as it is worth it."""
        while True:
            self._wake_all_kswapds(ac)
            pfn = self._get_page(ac, WMARK_MIN, ac.reserve)
            if pfn >= 0 or not ac.can_direct_reclaim:
                return pfn
            progress = yield from self._direct_reclaim(ac)
            pfn = self._get_page(ac, WMARK_MIN, ac.reserve) if progress else -ENOMEM
            if pfn < 0:
                pfn = yield from self._direct_compact(ac, ac.compact_priority)
            if pfn >= 0 or ac.gfp & _GFP_NORETRY:
                return pfn
            if ac.costly and not (ac.can_compact and ac.gfp & _GFP_RETRY_MAYFAIL):
                return -ENOMEM
            if self._should_reclaim_retry(ac, progress):
                continue
            if progress and ac.can_compact and self._should_compact_retry(ac):
                continue
            if not (yield from self._wait_for_held_pages(ac)):
                return -ENOMEM

    @traced("get_page_from_freelist")
    def _get_page(self, ac: AllocContext, wmark: int, reserve: int) -> int:
        mem = self.vm.mem
        if len(ac.zonelist) == 0:
            return -ENOMEM
        return get_page_from_zonelist(
            mem.pages, mem.zones, mem.blocks, ac.zonelist, ac.order, ac.migratetype, ac.highest_type, wmark, reserve
        )

    @traced("wake_all_kswapds")
    def _wake_all_kswapds(self, ac: AllocContext) -> None:
        if ac.gfp & _GFP_KSWAPD_RECLAIM:
            for nid in dict.fromkeys(self.vm.mem.zones["node"][ac.zonelist].tolist()):
                self.kswapds[nid].wakeup_kswapd(ac.gfp, ac.order, ac.highest_type)

    # Reclaim.

    @traced("__alloc_pages_direct_reclaim")
    def _direct_reclaim(self, ac: AllocContext) -> Operation[int]:
        ac.steps.append("reclaim")
        return (yield from self.reclaim.try_to_free_pages(ac.zonelist, ac.order, ac.highest_type))

    @traced("should_reclaim_retry")
    def _should_reclaim_retry(self, ac: AllocContext, progress: int) -> bool:
        """Another round could succeed if everything reclaimable were free; not after 16 rounds without progress."""
        ac.no_progress_loops = 0 if progress and not ac.costly else ac.no_progress_loops + 1
        if ac.no_progress_loops > MAX_RECLAIM_RETRIES:
            return False
        zones = self.vm.mem.zones
        for zone in ac.zonelist:
            mark = int(zones["watermark"][zone, WMARK_MIN]) - self.reclaim.reclaimable_pages(int(zones["node"][zone]))
            if zone_watermark_ok(zones, zone, ac.order, mark, ac.highest_type, ac.movable):
                return True
        return False

    def _wait_for_held_pages(self, ac: AllocContext) -> Operation[bool]:
        """Let a compaction that holds free frames end, or give enough of them back; False: there is none to wait for.

        Who holds the mutex never waits for a page with this (hugetlb.py asks with flags that may not block).
        """
        vm, mutex = self.vm, self.vm.compaction_mutex
        if ac.nr_waits >= MAX_RECLAIM_RETRIES or not self._pages_are_held(ac):
            return False
        ac.nr_waits += 1
        ac.no_progress_loops = 0
        whose = mutex.nr_acquired
        while mutex.nr_acquired == whose and self._pages_are_held(ac) and not self._any_zone_ok(ac):
            yield vm.in_flight[0] if vm.in_flight else mutex.waiters
        return True

    def _pages_are_held(self, ac: AllocContext) -> bool:
        return bool(self.vm.mem.zones["held_pages"][ac.zonelist].any())

    # Compaction.

    @traced("__alloc_pages_direct_compact")
    def _direct_compact(self, ac: AllocContext, prio: int) -> Operation[int]:
        """__alloc_pages_direct_compact(), the DPU first. Sets ac.compact_result."""
        ac.compact_result = COMPACT_SKIPPED
        if ac.order == 0 or not ac.can_compact:
            return -ENOMEM
        pfn = yield from self._dpu_compact(ac)
        if pfn >= 0 or self.compaction is None:
            return pfn
        ac.steps.append("compact_async" if prio == COMPACT_PRIO_ASYNC else "compact")
        ac.compact_result, captured = yield from self.compaction.try_to_compact_pages(
            ac.gfp, ac.order, prio, ac.zonelist, ac.highest_type, ac.migratetype
        )
        if ac.compact_result == COMPACT_SKIPPED:
            return -ENOMEM
        pfn = captured if captured >= 0 else self._get_page(ac, WMARK_MIN, ac.reserve)
        return self._compacted(ac, pfn)

    def _dpu_compact(self, ac: AllocContext) -> Operation[int]:
        """The DPU over each zone, until one of them gives a page. It moves file pages, so __GFP_FS it must be."""
        if self.dpu is None or not ac.costly or ac.gfp & _GFP_FS == 0:
            return -ENOMEM
        for zone in ac.zonelist.tolist():
            if not self.dpu.worth_trying(zone, ac.order, ac.highest_type, ac.movable):
                continue
            before_ns = self.dpu.modelled_ns()
            helped = yield from self.dpu.try_dpu_compact_zone(zone, ac.order, ac.highest_type, ac.movable)
            ac.device_ns += self.dpu.modelled_ns() - before_ns
            ac.steps.append("dpu")
            self.vm.pr_debug("%s: order %d, the DPU helped zone %d: %d\n", ac.comm, ac.order, zone, helped)
            pfn = self._get_page(ac, WMARK_MIN, ac.reserve) if helped else -ENOMEM
            if pfn >= 0:
                ac.compact_result = COMPACT_SUCCESS
                return self._compacted(ac, pfn)
        return -ENOMEM

    def _compacted(self, ac: AllocContext, pfn: int) -> int:
        """Count a direct compaction that ran; a page in hand ends the zone's deferral."""
        events = self.vm.events
        events["compact_stall"] += 1
        if pfn < 0:
            events["compact_fail"] += 1
            return -ENOMEM
        events["compact_success"] += 1
        if self.compaction is not None:
            zone = int(self.vm.mem.pages["zone"][pfn])
            self.vm.mem.zones["compact_blockskip_flush"][zone] = 0
            self.compaction.compaction_defer_reset(zone, ac.order, True)
        return pfn

    @traced("should_compact_retry")
    def _should_compact_retry(self, ac: AllocContext) -> bool:
        """Compaction that worked is repeated some times; one that did not is tried harder, but not for ever."""
        if ac.order == 0 or self.compaction is None:
            return False
        if ac.compact_result == COMPACT_SKIPPED:
            zones = self.vm.mem.zones
            return self.reclaim.compaction_could_help(
                ac.zonelist,
                ac.order,
                ac.highest_type,
                lambda zone: (
                    int(zones["free_pages"][zone])
                    + self.reclaim.reclaimable_pages(int(zones["node"][zone])) // ac.order
                ),
            )
        if ac.compact_result == COMPACT_SUCCESS:
            ac.compaction_retries += 1
            if ac.compaction_retries <= (MAX_COMPACT_RETRIES // 4 if ac.costly else MAX_COMPACT_RETRIES):
                return True
        if ac.compact_priority > (MIN_COMPACT_COSTLY_PRIORITY if ac.costly else MIN_COMPACT_PRIORITY):
            ac.compact_priority -= 1
            ac.compaction_retries = 0
            return True
        return False
