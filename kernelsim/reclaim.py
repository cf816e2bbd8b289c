# SPDX-License-Identifier: GPL-2.0-only
"""Direct reclaim and what it shares with kswapd: how much to scan, and when it was enough (mm/vmscan.c).

Reclaim goes over the nodes of a request with rising pressure: at priority p each list gives up to size >> p pages, p
from DEF_PRIORITY (12) down to 0. It is done with SWAP_CLUSTER_MAX (32) pages, or as soon as compaction has enough free
pages to work with, for a request of more than PAGE_ALLOC_COSTLY_ORDER.

Scanning gives the machine away after SLICE_PAGES pages.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kernelsim import vmscan
from kernelsim.compaction import Compaction, compact_gap
from kernelsim.filemap import File
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import (
    LRU_ACTIVE_FILE,
    LRU_INACTIVE_FILE,
    MAX_NR_ZONES,
    WMARK_HIGH,
    WMARK_LOW,
    WMARK_MIN,
)
from kernelsim.operation import Operation
from kernelsim.page_alloc import PAGE_ALLOC_COSTLY_ORDER, zone_watermark_ok
from kernelsim.trace_hook import traced
from kernelsim.vmscan import SWAP_CLUSTER_MAX
from kernelsim.vmstat import allocstall_names

DEF_PRIORITY = 12
SLICE_PAGES = 4096


class Reclaim:
    """Reclaim of one machine's file pages."""

    def __init__(self, vm: Vm, compaction: Compaction | None) -> None:
        """`compaction` None: CONFIG_COMPACTION is off."""
        self.vm = vm
        self.compaction = compaction
        self.failures = np.zeros(vm.mem.nr_nodes, dtype=np.int64)
        """Rounds of kswapd in a row that freed nothing, by node; direct reclaim that frees something clears it."""
        self._batch = np.zeros(SWAP_CLUSTER_MAX, dtype=np.int64)

    def reclaimable_pages(self, nid: int) -> int:
        """Pages on the lists that reclaim looks at (zone_reclaimable_pages, which Linux counts for each zone)."""
        lru = self.vm.mem.nodes["nr_lru"][nid]
        return int(lru[LRU_INACTIVE_FILE] + lru[LRU_ACTIVE_FILE])

    @traced("shrink_node")
    def shrink_node(
        self, nid: int, priority: int, highest_type: int, nr_wanted: int, by: str = "direct"
    ) -> Operation[int]:
        """Scan one node's file lists at one priority; returns the pages freed. `by`: direct or kswapd."""
        lru = self.vm.mem.nodes["nr_lru"][nid]
        left = np.array([lru[LRU_INACTIVE_FILE] >> priority, lru[LRU_ACTIVE_FILE] >> priority], dtype=np.int64)
        nr_reclaimed = 0
        while left.max() > 0 and nr_reclaimed < nr_wanted:
            nr_reclaimed += self._shrink_slice(nid, highest_type, left, nr_wanted - nr_reclaimed, by)
            yield None
        return nr_reclaimed

    def _shrink_slice(self, nid: int, highest_type: int, left: NDArray[np.int64], nr_wanted: int, by: str) -> int:
        vm, mem = self.vm, self.vm.mem
        nr_scanned, nr_reclaimed = vmscan.shrink_lruvec(
            mem.pages, mem.zones, mem.blocks, mem.nodes, vm.vmas, vm.avcs, vm.mms, vm.pt, vm.tlbs, vm.events,
            vm.i_pages, vm.touched(), self._batch, left, nid, highest_type, nr_wanted, SLICE_PAGES,
        )  # fmt: skip
        for name, nr in ((f"pgscan_{by}", nr_scanned), (f"pgsteal_{by}", nr_reclaimed)):
            vm.events[name] += nr
        vm.events["pgscan_file"] += nr_scanned
        vm.events["pgsteal_file"] += nr_reclaimed
        return nr_reclaimed

    @traced("try_to_free_pages")
    def try_to_free_pages(self, zonelist: NDArray[np.int32], order: int, highest_type: int) -> Operation[int]:
        """Direct reclaim for a request; returns the pages freed, or 1 where compaction can go on without more."""
        self.vm.events[allocstall_names[min(highest_type, MAX_NR_ZONES - 1)]] += 1
        nids = self._nodes_of(zonelist)
        nr_reclaimed = 0
        for priority in range(DEF_PRIORITY, -1, -1):
            for nid in nids:
                if self._compaction_ready(zonelist, nid, order, highest_type):
                    return max(nr_reclaimed, 1)
                nr_wanted = max(SWAP_CLUSTER_MAX, compact_gap(order) if order > PAGE_ALLOC_COSTLY_ORDER else 0)
                freed = yield from self.shrink_node(nid, priority, highest_type, nr_wanted)
                nr_reclaimed += freed
                if freed:
                    self.failures[nid] = 0
            if nr_reclaimed >= SWAP_CLUSTER_MAX:
                break
        self.vm.pr_debug("direct reclaim for order %d freed %lu pages\n", order, nr_reclaimed)
        return nr_reclaimed

    def _nodes_of(self, zonelist: NDArray[np.int32]) -> list[int]:
        """The nodes of a zonelist, nearest first."""
        return list(dict.fromkeys(int(nid) for nid in self.vm.mem.zones["node"][zonelist]))

    def _compaction_ready(self, zonelist: NDArray[np.int32], nid: int, order: int, highest_type: int) -> bool:
        """A costly request's node has enough free pages that compaction should be tried before more is reclaimed.

        compaction_ready(): in one of its zones the request would succeed, or compaction is the way to go and single
        pages are there beyond the high watermark to do it with.
        """
        if order <= PAGE_ALLOC_COSTLY_ORDER:
            return False
        zones = self.vm.mem.zones
        for zone in zonelist:
            if zones["node"][zone] != nid:
                continue
            if zone_watermark_ok(zones, zone, order, int(zones["watermark"][zone, WMARK_MIN]), highest_type):
                return True
            if self.compaction is None or not self.compaction.compaction_suitable(int(zone), order, highest_type):
                continue
            mark = int(zones["watermark"][zone, WMARK_HIGH]) + compact_gap(order)
            if zone_watermark_ok(zones, zone, 0, mark, highest_type):
                return True
        return False

    def compaction_could_help(
        self, zonelist: NDArray[np.int32], order: int, highest_type: int, available: Callable[[int], int]
    ) -> bool:
        """Some zone would have the pages to compact with, if `available(zone)` were free (compaction_suitable)."""
        zones = self.vm.mem.zones
        wmark = WMARK_LOW if order > PAGE_ALLOC_COSTLY_ORDER else WMARK_MIN
        return any(
            available(int(zone))
            > int(zones["watermark"][zone, wmark]) + int(zones["reserve"][zone, highest_type]) + compact_gap(order)
            for zone in zonelist
        )

    @traced("drop_pagecache_sb")
    def drop_pagecache(self) -> LongOp:
        """Drop every cached page that nobody maps, file by file (fs/drop_caches.c)."""
        for file in list(self.vm.files):
            for first in range(file.i_base, file.i_base + file.nr_pages, SLICE_PAGES):
                if file in self.vm.files:
                    self._invalidate(file, first)
                    yield None
        self.vm.events["drop_pagecache"] += 1

    def _invalidate(self, file: File, first: int) -> None:
        vm, mem = self.vm, self.vm.mem
        last = min(first + SLICE_PAGES, file.i_base + file.nr_pages)
        vmscan.invalidate_mapping_pages(mem.pages, mem.zones, mem.blocks, mem.nodes, vm.avcs, vm.i_pages, first, last)
