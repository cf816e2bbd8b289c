# SPDX-License-Identifier: GPL-2.0-only
"""Memory compaction as Linux does it (mm/compaction.c): who compacts which zone, how, and when it is not worth trying.

Four callers: a person (`compact_memory`, `node*/compact`: everything, skip bits ignored), an allocation that found no
block (direct compaction, by priority), kcompactd after a wake-up (light, from where it left off), and kcompactd on its
own initiative (down to a fragmentation score). The work is done by compaction_loop.py with the two scanners,
compaction_scan.py and compaction_free.py; it runs in slices, and between two of them everything is consistent.

A zone in which compaction failed is left alone for a while: after the n-th failure in a row for 2^n attempts, at most
2^6 (deferral). What it learnt about pageblocks (skip bits, cached positions) is forgotten when a deferral ends or when
kswapd goes to sleep.

Differences from Linux: one compaction at a time in the whole machine (also of the DPU's: both hold free frames), and no
CPU is ever contended for, so async runs are not cut short by need_resched().
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kernelsim import extfrag, trace_events
from kernelsim.compact_control import (
    COMPACT_COMPLETE,
    COMPACT_CONTENDED,
    COMPACT_CONTINUE,
    COMPACT_DEFERRED,
    COMPACT_NOT_SUITABLE_ZONE,
    COMPACT_PARTIAL_SKIPPED,
    COMPACT_SKIPPED,
    COMPACT_SUCCESS,
    MAX_MIGRATE_PAGES,
    MIGRATE_ASYNC,
    MIGRATE_SYNC,
    MIGRATE_SYNC_LIGHT,
    CompactControl,
    compact_control_dtype,
    vm_arrays,
)
from kernelsim.compaction_free import pageblock_start_pfn
from kernelsim.compaction_loop import compact_zone_slice, release_free_list, zone_blocks_ok
from kernelsim.compaction_sysctl import CompactionSysctl
from kernelsim.gfp import _GFP_FS, _GFP_IO
from kernelsim.jit import njit
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import (
    MIGRATE_MOVABLE,
    MIGRATE_UNMOVABLE,
    WMARK_HIGH,
    WMARK_LOW,
    WMARK_MIN,
    Blocks,
    Zones,
    pageblock_nr_pages,
    pageblock_order,
)
from kernelsim.operation import Operation
from kernelsim.page import Pages, PG_buddy, PG_lru, PG_nopage
from kernelsim.page_alloc import PAGE_ALLOC_COSTLY_ORDER, free_pages, zone_watermark_ok
from kernelsim.trace_hook import traced
from kernelsim.tracepoint import TraceEvent

__all__ = ["COMPACT_PRIO_ASYNC", "COMPACT_PRIO_SYNC_FULL", "COMPACT_PRIO_SYNC_LIGHT", "Compaction"]

COMPACT_PRIO_SYNC_FULL, COMPACT_PRIO_SYNC_LIGHT, COMPACT_PRIO_ASYNC = range(3)
COMPACT_MAX_DEFER_SHIFT = 6
SLICE_PAGES = 1 << 18  # pages looked at: a few milliseconds
_SAMPLE = 1 << PAGE_ALLOC_COSTLY_ORDER  # every how many pages a pageblock is looked at when skip bits are cleared


def compact_gap(order: int) -> int:
    """Free pages that a compaction may need on top: as many for copies as for originals."""
    return 2 << order


class Compaction:
    """Traditional compaction of one machine."""

    def __init__(self, vm: Vm, sysctl: CompactionSysctl) -> None:
        self.vm = vm
        self.sysctl = sysctl
        self.cpu: int | None = None  # where who compacts runs, if that is known
        self._src = np.zeros(MAX_MIGRATE_PAGES, dtype=np.int64)
        self._dst = np.zeros(MAX_MIGRATE_PAGES, dtype=np.int64)
        for zone in vm.mem.zones:
            zone["compact_cached_migrate_pfn"] = zone["start_pfn"]
            zone["compact_cached_free_pfn"] = pageblock_start_pfn(int(zone["end_pfn"]) - 1)
            zone["compact_init_migrate_pfn"] = zone["compact_cached_migrate_pfn"][0]
            zone["compact_init_free_pfn"] = zone["compact_cached_free_pfn"]

    # By hand.

    @traced("compact_nodes")
    def compact_nodes(self) -> LongOp:
        """Everything (compact_memory)."""
        for nid in range(self.vm.mem.nr_nodes):
            yield from self.compact_node(nid)

    @traced("compact_node")
    def compact_node(self, nid: int) -> LongOp:
        """All zones of a node, whatever skip bits and indices say."""
        for zone in self._populated(nid):
            yield from self._compact_zone(self._control(zone, -1, MIGRATE_SYNC, ignore_skip_hint=1, whole_zone=1))

    def _populated(self, nid: int) -> Iterable[int]:
        return [zone for zone in self.vm.mem.zones_of(nid) if self.vm.mem.zones["managed"][zone]]

    # For kcompactd.

    @traced("proactive_compact_node")
    def proactive_compact_node(self, nid: int) -> LongOp:
        """Each zone until its score is down at the low mark."""
        mark = self.fragmentation_score_wmark(True)
        for zone in self._populated(nid):
            cc = self._control(zone, -1, MIGRATE_SYNC_LIGHT, ignore_skip_hint=1, whole_zone=1, proactive_mark=mark)
            try:
                yield from self._compact_zone(cc)
            finally:
                self._count_daemon(cc)

    def compact_zone_for_kcompactd(self, zone: int, order: int, highest_type: int) -> Operation[int]:
        """Light, from the cached positions, for a block of `order`; COMPACT_*. The caller defers on failure."""
        watermark = self.vm.mem.zones["watermark"][zone]
        cc = self._control(zone, order, MIGRATE_SYNC_LIGHT, highest_type=highest_type, kcompactd=1)
        if self.sysctl.defrag_mode:
            cc["blocks_mark"] = watermark[WMARK_HIGH]
        mark = int(watermark[WMARK_HIGH if self.sysctl.defrag_mode else WMARK_MIN])
        try:
            return (yield from self._compact_zone_for_order(cc, mark))
        finally:
            self._count_daemon(cc)

    @traced("fragmentation_score_node")
    def fragmentation_score_node(self, nid: int) -> int:
        return extfrag.fragmentation_score_node(self.vm.mem, nid)

    def fragmentation_score_wmark(self, low: bool) -> int:
        return extfrag.fragmentation_score_wmark(self.sysctl.compaction_proactiveness, low)

    def _count_daemon(self, cc: CompactControl) -> None:
        self.vm.events["compact_daemon_migrate_scanned"] += cc["total_migrate_scanned"]
        self.vm.events["compact_daemon_free_scanned"] += cc["total_free_scanned"]

    # For an allocation.

    @traced("try_to_compact_pages")
    def try_to_compact_pages(
        self, gfp: int, order: int, prio: int, zonelist: Iterable[int], highest_type: int, migratetype: int
    ) -> Operation[tuple[int, int]]:
        """Direct compaction, zone by zone: (best COMPACT_* result, the captured block's pfn or -1).

        Failures are deferred here; the caller resets the deferral once its allocation succeeded.
        """
        best = COMPACT_SKIPPED
        if not gfp & _GFP_IO:
            return best, -1
        self.vm.trace(trace_events.mm_compaction_try_to_compact_pages, order, gfp, prio)
        for zone in zonelist:
            if prio > COMPACT_PRIO_SYNC_FULL and self.compaction_deferred(zone, order):
                best = max(best, COMPACT_DEFERRED)
                continue
            cc = self._direct_control(gfp, order, prio, zone, highest_type, migratetype)
            mark = int(self.vm.mem.zones["watermark"][zone][WMARK_MIN])
            try:
                status = yield from self._compact_zone_for_order(cc, mark)
            except GeneratorExit:
                self._free_captured(cc)
                raise
            captured = int(cc["captured"][0])
            if captured >= 0:
                status = COMPACT_SUCCESS
            best = max(best, status)
            if status == COMPACT_SUCCESS:
                self.compaction_defer_reset(zone, order, False)
                return best, captured
            if prio != COMPACT_PRIO_ASYNC and status in (COMPACT_COMPLETE, COMPACT_PARTIAL_SKIPPED):
                self.defer_compaction(zone, order)
        return best, -1

    def _free_captured(self, cc: CompactControl) -> None:
        """Give back a block caught for a request that was interrupted."""
        mem = self.vm.mem
        captured = int(cc["captured"][0])
        if captured >= 0:
            free_pages(mem.pages, mem.zones, mem.blocks, captured, int(cc["order"][0]))

    def _direct_control(
        self, gfp: int, order: int, prio: int, zone: int, highest_type: int, migratetype: int
    ) -> CompactControl:
        full = int(prio == COMPACT_PRIO_SYNC_FULL)
        return self._control(
            zone,
            order,
            MIGRATE_ASYNC if prio == COMPACT_PRIO_ASYNC else MIGRATE_SYNC_LIGHT,
            highest_type=highest_type,
            migratetype=migratetype,
            may_enter_fs=int(gfp & _GFP_FS != 0),
            direct_compaction=1,
            whole_zone=full,
            ignore_skip_hint=full,
            ignore_block_suitable=full,
            capture_wanted=1,
        )

    # Whether it is worth trying.

    @traced("compact_zone_order")
    def _compact_zone_for_order(self, cc: CompactControl, mark: int) -> Operation[int]:
        """Compact unless a block is there already or cannot be made (compaction_suit_allocation_order)."""
        zone, order, highest_type = (int(cc[name][0]) for name in ("zone", "order", "highest_type"))
        cma = bool(cc["migratetype"][0] == MIGRATE_MOVABLE)
        if cc["blocks_mark"][0] >= 0:
            enough = zone_blocks_ok(self.vm.mem.zones, zone, order, mark, highest_type)
        else:
            enough = zone_watermark_ok(self.vm.mem.zones, zone, order, mark, highest_type, cma)
        if enough:
            self.vm.pr_debug("zone %d: a block of order %d is there already\n", zone, order)
            return COMPACT_SUCCESS
        if not self.compaction_suitable(zone, order, highest_type):
            return COMPACT_SKIPPED
        if self._compaction_restarting(zone, order):
            self._reset_isolation_suitable(zone)
        return (yield from self._compact_zone(cc))

    @traced("compaction_suitable")
    def compaction_suitable(self, zone: int, order: int, highest_type: int) -> bool:
        """Free memory for the copies, and fragmentation, not lack of memory, as the trouble."""
        result = self.suitability(zone, order, highest_type)
        if self.vm.trace.is_on(trace_events.mm_compaction_suitable):
            nid, zone_type = (int(self.vm.mem.zones[name][zone]) for name in ("node", "type"))
            self.vm.trace(trace_events.mm_compaction_suitable, nid, zone_type, order, result)
        return result == COMPACT_CONTINUE

    def suitability(self, zone: int, order: int, highest_type: int) -> int:
        """COMPACT_CONTINUE, or why not: COMPACT_SKIPPED, COMPACT_NOT_SUITABLE_ZONE."""
        zones = self.vm.mem.zones
        costly = order > PAGE_ALLOC_COSTLY_ORDER
        watermark = int(zones["watermark"][zone][WMARK_LOW if costly else WMARK_MIN]) + compact_gap(order)
        if not zone_watermark_ok(zones, zone, 0, watermark, highest_type, True):
            return COMPACT_SKIPPED
        if costly:
            index = extfrag.fragmentation_index(zones, zone, order)
            if 0 <= index <= self.sysctl.extfrag_threshold:
                return COMPACT_NOT_SUITABLE_ZONE
        return COMPACT_CONTINUE

    # Deferral.

    @traced("defer_compaction")
    def defer_compaction(self, zone: int, order: int) -> None:
        """Compaction failed: skip the next attempts, twice as many as after the failure before."""
        record = self.vm.mem.zones[zone]
        record["compact_considered"] = 0
        record["compact_defer_shift"] = min(record["compact_defer_shift"] + 1, COMPACT_MAX_DEFER_SHIFT)
        record["compact_order_failed"] = min(record["compact_order_failed"], order)
        self._trace_defer(trace_events.mm_compaction_defer_compaction, zone, order)
        self.vm.pr_debug("zone %d: order %d failed, shift %d\n", zone, order, record["compact_defer_shift"])

    @traced("compaction_deferred")
    def compaction_deferred(self, zone: int, order: int) -> bool:
        """Whether this attempt is to be skipped; counts it."""
        record = self.vm.mem.zones[zone]
        limit = 1 << int(record["compact_defer_shift"])
        if order < record["compact_order_failed"]:
            return False
        record["compact_considered"] += 1
        if record["compact_considered"] >= limit:
            record["compact_considered"] = limit
            return False
        self._trace_defer(trace_events.mm_compaction_deferred, zone, order)
        return True

    @traced("compaction_defer_reset")
    def compaction_defer_reset(self, zone: int, order: int, alloc_success: bool) -> None:
        """Compaction helped; after an allocation that did succeed there is nothing to skip any more."""
        record = self.vm.mem.zones[zone]
        if alloc_success:
            record["compact_considered"] = record["compact_defer_shift"] = 0
        record["compact_order_failed"] = max(record["compact_order_failed"], order + 1)
        self._trace_defer(trace_events.mm_compaction_defer_reset, zone, order)

    def _trace_defer(self, event: TraceEvent, zone: int, order: int) -> None:
        if self.vm.trace.is_on(event):
            names = ("node", "type", "compact_considered", "compact_defer_shift", "compact_order_failed")
            nid, zone_type, considered, shift, failed = (int(self.vm.mem.zones[name][zone]) for name in names)
            self.vm.trace(event, nid, zone_type, order, considered, shift, failed)

    def _compaction_restarting(self, zone: int, order: int) -> bool:
        """The longest deferral has just ended."""
        record = self.vm.mem.zones[zone]
        shift = int(record["compact_defer_shift"])
        return bool(
            order >= record["compact_order_failed"]
            and shift == COMPACT_MAX_DEFER_SHIFT
            and record["compact_considered"] >= 1 << shift
        )

    @traced("reset_isolation_suitable")
    def reset_isolation_suitable(self, nid: int) -> None:
        """Forget skip bits where a direct compaction went all the way (kswapd going to sleep)."""
        for zone in self._populated(nid):
            self._reset_isolation_suitable(zone)

    @traced("__reset_isolation_suitable")
    def _reset_isolation_suitable(self, zone: int) -> None:
        mem = self.vm.mem
        if not mem.zones["compact_blockskip_flush"][zone]:
            return
        mem.zones["compact_blockskip_flush"][zone] = 0
        self.vm.pr_debug("zone %d: skip bits cleared\n", zone)
        _clear_skip_bits(mem.pages, mem.zones, mem.blocks, mem.skip, zone)

    # One zone.

    def _control(self, zone: int, order: int, mode: int, **fields: int) -> CompactControl:
        cc: CompactControl = np.zeros(1, dtype=compact_control_dtype)
        cc["zone"], cc["order"], cc["mode"] = zone, order, mode
        cc["search_order"] = order
        cc["migratetype"] = MIGRATE_UNMOVABLE
        cc["may_enter_fs"] = 1
        cc["unevictable_allowed"] = self.sysctl.compact_unevictable_allowed
        cc["proactive_mark"] = cc["blocks_mark"] = cc["captured"] = -1
        cc["cpu"] = self.cpu_at_work()
        for name, value in fields.items():
            cc[name] = value
        return cc

    def cpu_at_work(self) -> int:
        """Where who compacts runs: `cpu`, or else the one with the fullest page lists, which was at work last."""
        pagesets = self.vm.mem.pagesets
        if self.cpu is not None and self.cpu < pagesets.shape[1]:
            return self.cpu
        return int(pagesets["count"].sum(axis=0).argmax()) if pagesets.shape[1] else 0

    @traced("compact_zone")
    def _compact_zone(self, cc: CompactControl) -> Operation[int]:
        """Run the loop in slices; an interrupted run leaves no page behind."""
        yield from self.vm.compaction_mutex.acquire()
        result = COMPACT_CONTENDED
        try:
            self._set_up(cc)
            self._trace_span(trace_events.mm_compaction_begin, cc)
            while True:
                result = int(compact_zone_slice(vm_arrays(self.vm, self._src, self._dst), cc, SLICE_PAGES))
                if result != COMPACT_CONTINUE:
                    return result
                yield None
        except GeneratorExit:
            cc["capture_wanted"] = 0  # nobody is left to take a block
            raise
        finally:
            release_free_list(vm_arrays(self.vm, self._src, self._dst), cc)
            self.vm.events["compact_migrate_scanned"] += cc["total_migrate_scanned"]
            self.vm.events["compact_free_scanned"] += cc["total_free_scanned"]
            self._trace_span(
                trace_events.mm_compaction_end, cc, COMPACT_CONTENDED if result == COMPACT_CONTINUE else result
            )
            self.vm.compaction_mutex.release()

    def _trace_span(self, event: TraceEvent, cc: CompactControl, *status: int) -> None:
        if self.vm.trace.is_on(event):
            zone, migrate_pfn, free_pfn, mode = (int(cc[n][0]) for n in ("zone", "migrate_pfn", "free_pfn", "mode"))
            start, end = (int(self.vm.mem.zones[edge][zone]) for edge in ("start_pfn", "end_pfn"))
            self.vm.trace(event, start, migrate_pfn, free_pfn, end, mode != MIGRATE_ASYNC, *status)

    def _set_up(self, cc: CompactControl) -> None:
        """Where the scanners start: at the ends, or where the last run left off."""
        record = self.vm.mem.zones[int(cc["zone"][0])]
        start, end = int(record["start_pfn"]), int(record["end_pfn"])
        last_block = pageblock_start_pfn(end - 1)
        sync = int(cc["mode"][0] != MIGRATE_ASYNC)
        cached = record["compact_cached_migrate_pfn"]
        if cc["whole_zone"][0]:
            cc["migrate_pfn"], cc["free_pfn"] = start, last_block
        else:
            if not start <= record["compact_cached_free_pfn"] < end:
                record["compact_cached_free_pfn"] = last_block
            if not start <= cached[sync] < end:
                cached[:] = start
            cc["migrate_pfn"], cc["free_pfn"] = cached[sync], record["compact_cached_free_pfn"]
            if cc["migrate_pfn"][0] <= record["compact_init_migrate_pfn"]:
                cc["whole_zone"] = 1
        cc["update_cached"] = int(not sync and cached[0] == cached[1])


@njit
def _clear_skip_bits(pages: Pages, zones: Zones, blocks: Blocks, skip: Blocks, zone: int) -> None:
    """Clear the skip bits of blocks that hold something to move or to fill, and cache the outermost two of those
    (__reset_isolation_suitable). As Linux does, look at every eighth page only."""
    z = zones[zone]
    first = -1
    last = -1
    for block in range(z.start_pfn >> pageblock_order, ((z.end_pfn - 1) >> pageblock_order) + 1):
        start = max(block << pageblock_order, z.start_pfn)
        end = min((block << pageblock_order) + pageblock_nr_pages, z.end_pfn)
        whole = pages[start].flags & PG_buddy and pages[start].order >= pageblock_order
        if pages[start].flags & PG_nopage or whole:
            continue
        has_source = False
        has_target = False
        for pfn in range(start, end, _SAMPLE):
            if pages[pfn].flags & PG_lru:
                has_source = True
            if pages[pfn].flags & PG_buddy and blocks[block] == MIGRATE_MOVABLE:
                has_target = True
        if has_source or has_target:
            skip[block] = 0
        if has_source and first < 0:
            first = start
        if has_target:
            last = start
    if first >= 0:
        z.compact_init_migrate_pfn = first
        z.compact_cached_migrate_pfn[0] = first
        z.compact_cached_migrate_pfn[1] = first
    if last >= 0:
        z.compact_init_free_pfn = last & ~(pageblock_nr_pages - 1)
        z.compact_cached_free_pfn = z.compact_init_free_pfn
