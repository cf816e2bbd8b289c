# SPDX-License-Identifier: GPL-2.0-only
"""Per-CPU page lists: where a freed page waits before the buddy allocator gets it back (mm/page_alloc.c).

Each zone has, for each CPU, a list for each of the types Unmovable, Movable and Reclaimable and each order up to 3, and
two for blocks of a pageblock's size (freed THPs). A block is freed to the front; when a list set holds `high` pages or
more, the oldest go to the buddy lists: between `batch` pages and as many as were freed in a row, first from the list
that was freed to, then from those behind it. `high` grows under frees up to `high_max`. Freeing blocks of order 1 to 3
one after the other, nothing else in between, empties the lists. Pages here are free, but they do not merge, no scanner
finds them, and /proc/buddyinfo does not count them: on a large machine a compaction can empty pageblock after pageblock
without a single huge page to show for it, because hundreds of megabytes rest here.

A block on a list has no flag, no reference, and its order; `pagesets[zone, cpu].count` is how many pages there are.

Differences from Linux: only an imported machine has these lists, filled as zoneinfo tells; a booted one frees straight
to the buddy lists (it has no columns in `pagesets`). Allocations never take from them, so `high` does not shrink for
them, and only compaction's own frees go to them. What rests on them in a capture is taken to be single pages.
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
    NR_PCP_LISTS,
    NR_PCP_TYPES,
    Blocks,
    Mem,
    Nodes,
    Pagesets,
    Zones,
    pageblock_order,
)
from kernelsim.page import Pages
from kernelsim.page_alloc import PAGE_ALLOC_COSTLY_ORDER, free_one_page
from kernelsim.trace_key import MM_PAGE_FREE, MM_PAGE_PCPU_DRAIN, trace_key, trace_row

_NR_LOWORDER_PCP_LISTS = NR_PCP_TYPES * (PAGE_ALLOC_COSTLY_ORDER + 1)
_PCP_BATCH_SCALE_MAX = 5  # CONFIG_PCP_BATCH_SCALE_MAX


@njit
def pcp_allowed_order(order: int) -> bool:
    return order <= PAGE_ALLOC_COSTLY_ORDER or order == pageblock_order


@njit
def order_to_pindex(migratetype: int, order: int) -> int:
    if order > PAGE_ALLOC_COSTLY_ORDER:
        return _NR_LOWORDER_PCP_LISTS + (migratetype == MIGRATE_MOVABLE)
    return NR_PCP_TYPES * order + migratetype


@njit
def pindex_to_order(pindex: int) -> int:
    return pageblock_order if pindex >= _NR_LOWORDER_PCP_LISTS else pindex // NR_PCP_TYPES


@njit
def pcp_list(pages: Pages, zones: Zones, nodes: Nodes, pagesets: Pagesets, zone: int, cpu: int, pindex: int) -> int:
    """Head of a list; they come below those of compaction (compaction_scan.py)."""
    before = len(zones) * NR_PAGE_ORDERS * (MIGRATE_TYPES + 1) + len(nodes) * NR_LRU_LISTS
    return int(len(pages) - 1 - (before + (zone * pagesets.shape[1] + cpu) * NR_PCP_LISTS + pindex))


@njit
def _is_free_high(pageset: Pagesets, order: int) -> bool:
    """Whether blocks of order 1 to 3 are being freed one after the other, so that all should go back."""
    if order == 0 or order > PAGE_ALLOC_COSTLY_ORDER:
        pageset.prev_free_high_order = 0
        return False
    many = pageset.free_count >= pageset.batch + pageset.high_min // 2
    again = pageset.prev_free_high_order != 0
    pageset.prev_free_high_order = 1
    return bool(many and again)


@njit
def _nr_pcp_high(pageset: Pagesets, free_high: bool) -> int:
    """The limit that holds now; grows so that a batch of frees fits (nr_pcp_high)."""
    high = min(max(pageset.high, pageset.high_min), pageset.high_max)
    pageset.high = high
    if free_high and high:
        pageset.high = max(high - (pageset.batch << _PCP_BATCH_SCALE_MAX), pageset.high_min)
        return 0
    if pageset.high_min != pageset.high_max and pageset.count >= high:
        need_high = pageset.free_count + pageset.batch
        if high < need_high:
            pageset.high = min(max(need_high, pageset.high_min), pageset.high_max)
    return int(high)


@njit
def _nr_pcp_free(pageset: Pagesets, high: int, free_high: bool) -> int:
    """How many pages go to the buddy lists at once (nr_pcp_free)."""
    if free_high:
        return int(min(pageset.count, pageset.batch << _PCP_BATCH_SCALE_MAX))
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
    pindex: int,
) -> None:
    """Give the oldest blocks back, first those of list `pindex`."""
    nr = min(nr, pagesets[zone, cpu].count)
    while nr > 0:
        head = pcp_list(pages, zones, nodes, pagesets, zone, cpu, pindex)
        order = pindex_to_order(pindex)
        while nr > 0 and pages[head].prev != head:
            pfn = int(pages[head].prev)
            list_del(pages, pfn)
            pages[pfn].order = 0
            migratetype = int(blocks[pfn >> pageblock_order])
            free_one_page(pages, zones, blocks, pfn, order)
            if trace_key() & MM_PAGE_PCPU_DRAIN:
                trace_row(MM_PAGE_PCPU_DRAIN, pfn, order, migratetype)
            pagesets[zone, cpu].count -= 1 << order
            nr -= 1 << order
        pindex = (pindex + 1) % NR_PCP_LISTS


@njit
def free_frozen_pages(
    pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pagesets: Pagesets, cpu: int, pfn: int, order: int
) -> None:
    """Free a cleared block on a CPU (free_frozen_page_commit)."""
    zone = int(pages[pfn].zone)
    zones[zone].pgfree += 1 << order
    if trace_key() & MM_PAGE_FREE:
        trace_row(MM_PAGE_FREE, pfn, order)
    migratetype = int(blocks[pfn >> pageblock_order])
    if pagesets.shape[1] == 0 or not pcp_allowed_order(order) or migratetype == MIGRATE_ISOLATE:
        free_one_page(pages, zones, blocks, pfn, order)
        return
    if migratetype >= NR_PCP_TYPES:
        migratetype = MIGRATE_MOVABLE
    pageset = pagesets[zone, cpu]
    pindex = order_to_pindex(migratetype, order)
    pages[pfn].order = order
    list_add(pages, pfn, pcp_list(pages, zones, nodes, pagesets, zone, cpu, pindex))
    pageset.count += 1 << order
    free_high = _is_free_high(pageset, order)
    if pageset.free_count < pageset.batch << _PCP_BATCH_SCALE_MAX:
        pageset.free_count += 1 << order
    high = _nr_pcp_high(pageset, free_high)
    if pageset.count >= high:
        nr = _nr_pcp_free(pageset, high, free_high)
        _free_pcppages_bulk(pages, zones, blocks, nodes, pagesets, zone, cpu, nr, pindex)


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
    _free_pcppages_bulk(pages, zones, blocks, nodes, pagesets, zone, cpu, nr, 0)


def drain_all_pages(mem: Mem) -> None:
    """Give everything on per-CPU lists back to the buddy lists."""
    for zone, cpu in np.ndindex(mem.pagesets.shape):
        drain_pages_zone(mem.pages, mem.zones, mem.blocks, mem.nodes, mem.pagesets, zone, cpu)
