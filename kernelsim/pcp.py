# SPDX-License-Identifier: GPL-2.0-only
"""Per-CPU page lists: where a freed page waits before the buddy allocator gets it back (mm/page_alloc.c).

Each zone has, for each CPU and each of the types Unmovable, Movable and Reclaimable, a list of single pages. A page is
freed to the front; when a list set holds `high` pages or more, the oldest go to the buddy lists: between `batch` pages
and as many as were freed in a row. `high` grows under frees up to `high_max`. Pages here are free, but they do not
merge, no scanner finds them, and /proc/buddyinfo does not count them: on a large machine a compaction can empty
pageblock after pageblock without a single huge page to show for it, because hundreds of megabytes rest here.

A page on a list has no flag and no reference; `pagesets[zone, cpu].count` is how many there are.

Differences from Linux: only an imported machine has these lists, filled as zoneinfo tells; a booted one frees straight
to the buddy lists (it has no columns in `pagesets`). Allocations never take from them, so `high` never shrinks, and
only compaction's own frees go to them. Orders above 0 are not kept here.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit
from kernelsim.list_head import list_add, list_add_tail, list_del
from kernelsim.mmzone import (
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_TYPES,
    NR_LRU_LISTS,
    NR_PAGE_ORDERS,
    NR_PCP_TYPES,
    Blocks,
    Mem,
    Nodes,
    Pagesets,
    Zones,
    pageblock_order,
)
from kernelsim.page import Pages
from kernelsim.page_alloc import free_one_page
from kernelsim.trace_key import MM_PAGE_FREE, MM_PAGE_PCPU_DRAIN, trace_key, trace_row

_PCP_BATCH_SCALE_MAX = 5  # CONFIG_PCP_BATCH_SCALE_MAX


@njit
def pcp_list(
    pages: Pages, zones: Zones, nodes: Nodes, pagesets: Pagesets, zone: int, cpu: int, migratetype: int
) -> int:
    """Head of a list; they come below those of compaction (compaction_scan.py)."""
    before = len(zones) * NR_PAGE_ORDERS * (MIGRATE_TYPES + 1) + len(nodes) * NR_LRU_LISTS
    return int(len(pages) - 1 - (before + (zone * pagesets.shape[1] + cpu) * NR_PCP_TYPES + migratetype))


@njit
def _nr_pcp_high(pageset: Pagesets) -> int:
    """The limit that holds now; grows so that a batch of frees fits (nr_pcp_high)."""
    high = min(max(pageset.high, pageset.high_min), pageset.high_max)
    pageset.high = high
    if pageset.high_min != pageset.high_max and pageset.count >= high:
        need_high = pageset.free_count + pageset.batch
        if high < need_high:
            pageset.high = min(max(need_high, pageset.high_min), pageset.high_max)
    return int(high)


@njit
def _nr_pcp_free(pageset: Pagesets, high: int) -> int:
    """How many pages go to the buddy lists at once (nr_pcp_free)."""
    if high < pageset.batch:
        return 1
    return int(min(max(pageset.free_count, pageset.batch), max(high - pageset.batch, pageset.batch)))


@njit
def _free_pcppages_bulk(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    pagesets: Pagesets,
    zone: int,
    cpu: int,
    nr: int,
    migratetype: int,
) -> None:
    """Give the oldest pages back, first those of `migratetype`'s list."""
    nr = min(nr, pagesets[zone, cpu].count)
    while nr > 0:
        head = pcp_list(pages, zones, nodes, pagesets, zone, cpu, migratetype)
        while nr > 0 and pages[head].prev != head:
            pfn = int(pages[head].prev)
            list_del(pages, pfn)
            free_one_page(pages, zones, blocks, pfn, 0)
            if trace_key() & MM_PAGE_PCPU_DRAIN:
                trace_row(MM_PAGE_PCPU_DRAIN, pfn, 0, migratetype)
            pagesets[zone, cpu].count -= 1
            nr -= 1
        migratetype = (migratetype + 1) % NR_PCP_TYPES


@njit
def free_frozen_page(
    pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pagesets: Pagesets, cpu: int, pfn: int
) -> None:
    """Free one cleared page on a CPU (free_frozen_page_commit)."""
    zone = int(pages[pfn].zone)
    zones[zone].pgfree += 1
    if trace_key() & MM_PAGE_FREE:
        trace_row(MM_PAGE_FREE, pfn, 0)
    migratetype = int(blocks[pfn >> pageblock_order])
    if pagesets.shape[1] == 0 or migratetype == MIGRATE_ISOLATE:
        free_one_page(pages, zones, blocks, pfn, 0)
        return
    if migratetype >= NR_PCP_TYPES:
        migratetype = MIGRATE_MOVABLE
    pageset = pagesets[zone, cpu]
    list_add(pages, pfn, pcp_list(pages, zones, nodes, pagesets, zone, cpu, migratetype))
    pageset.count += 1
    if pageset.free_count < pageset.batch << _PCP_BATCH_SCALE_MAX:
        pageset.free_count += 1
    high = _nr_pcp_high(pageset)
    if pageset.count >= high:
        nr = _nr_pcp_free(pageset, high)
        _free_pcppages_bulk(pages, zones, blocks, nodes, pagesets, zone, cpu, nr, migratetype)


@njit
def _fill(
    pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pagesets: Pagesets, cpu: int, pfns: NDArray[np.int64]
) -> None:
    for pfn in pfns:
        pages[pfn].refcount = 0
        zone = int(pages[pfn].zone)
        migratetype = min(int(blocks[pfn >> pageblock_order]), MIGRATE_MOVABLE)
        list_add_tail(pages, pfn, pcp_list(pages, zones, nodes, pagesets, zone, cpu, migratetype))
        pagesets[zone, cpu].count += 1


def fill_pagesets(mem: Mem, cpu: int, pfns: NDArray[np.int64]) -> None:
    """Put pages that are in use by nobody on a CPU's lists, the first of `pfns` (int64[n]) freed last."""
    _fill(mem.pages, mem.zones, mem.blocks, mem.nodes, mem.pagesets, cpu, pfns)


@njit
def drain_pages_zone(
    pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pagesets: Pagesets, zone: int, cpu: int
) -> None:
    """Give a CPU's pages of one zone back to the buddy lists."""
    nr = pagesets[zone, cpu].count
    _free_pcppages_bulk(pages, zones, blocks, nodes, pagesets, zone, cpu, nr, MIGRATE_MOVABLE)


def drain_all_pages(mem: Mem) -> None:
    """Give everything on per-CPU lists back to the buddy lists."""
    for zone, cpu in np.ndindex(mem.pagesets.shape):
        drain_pages_zone(mem.pages, mem.zones, mem.blocks, mem.nodes, mem.pagesets, zone, cpu)
