# SPDX-License-Identifier: GPL-2.0-only
"""Taking single pages from per-CPU lists, which are filled from the buddy lists in batches (mm/page_alloc.c, 6.12).

rmqueue_pcplist() gives the page at the front of the list of its CPU and type: the one freed last. An empty list is
first filled by rmqueue_bulk() with nr_pcp_alloc() pages: `batch`, doubled for each fill since the CPU last freed a
page, and never so many that the lists would go over `high`. As on Linux each fill lets `high` grow, while the zone is
above its high watermark; freeing makes fills small again (`alloc_factor`), and allocating makes bulk frees small
(`free_count`).

`alloc_factor` int64[zone, cpu] belongs to who allocates, because so far only a replay does (replay.py): the rest of the
emulation takes its pages from the buddy lists. Orders 1 to 3 and huge pages, which Linux keeps on such lists too, come
from the buddy lists here.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit
from kernelsim.list_head import list_add_tail, list_del
from kernelsim.mmzone import MAX_PAGE_ORDER, WMARK_HIGH, Blocks, Nodes, Pagesets, Zones, pageblock_order
from kernelsim.page import Pages
from kernelsim.page_alloc import rmqueue
from kernelsim.pcp import _PCP_BATCH_SCALE_MAX, pcp_list

FALLBACKS, FRAGMENTING = range(2)
"""Of `fallbacks` int64[2]: blocks taken from another type's lists, and those of them smaller than a pageblock."""


@njit
def note_fallback(zones: Zones, zone: int, order: int, migratetype: int, fallbacks: NDArray[np.int64]) -> None:
    """Count if the next block must come from another type's list: what mm_page_alloc_extfrag tells of a real one."""
    for current in range(order, MAX_PAGE_ORDER + 1):
        if zones[zone].nr_free[current, migratetype] > 0:
            return
    for current in range(MAX_PAGE_ORDER, order - 1, -1):
        for other in range(3):
            if zones[zone].nr_free[current, other] > 0:
                fallbacks[FALLBACKS] += 1
                fallbacks[FRAGMENTING] += current < pageblock_order
                return


@njit
def _nr_pcp_alloc(zones: Zones, zone: int, pageset: Pagesets, factor: int) -> tuple[int, int]:
    """(pages to fetch at once, alloc_factor from now on)."""
    high = min(max(pageset.high, pageset.high_min), pageset.high_max)
    pageset.high = high
    base = max(pageset.batch, 1)
    if high < base:
        return 1, factor
    batch = base << factor
    if pageset.high_min != pageset.high_max and zones[zone].free_pages >= zones[zone].watermark[WMARK_HIGH]:
        high = min(high + batch, pageset.high_max)
        pageset.high = high
    most = max(high - pageset.count - base, base)
    if batch <= most and factor < _PCP_BATCH_SCALE_MAX:
        factor += 1
    return int(min(batch, most)), factor


@njit
def rmqueue_pcplist(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    pagesets: Pagesets,
    alloc_factor: NDArray[np.int64],
    fallbacks: NDArray[np.int64],
    zone: int,
    cpu: int,
    migratetype: int,
) -> int:
    """A page of a CPU's list, whatever the watermarks say; refcount 1. -1: the buddy lists have none either."""
    pageset = pagesets[zone, cpu]
    head = pcp_list(pages, zones, nodes, pagesets, zone, cpu, migratetype)
    pageset.free_count >>= 1
    if pages[head].next == head:
        nr, alloc_factor[zone, cpu] = _nr_pcp_alloc(zones, zone, pageset, alloc_factor[zone, cpu])
        for _ in range(nr):
            note_fallback(zones, zone, 0, migratetype, fallbacks)
            pfn = rmqueue(pages, zones, blocks, zone, 0, migratetype)
            if pfn < 0:
                break
            pages[pfn].refcount = 0
            zones[zone].pgalloc -= 1
            list_add_tail(pages, pfn, head)
            pageset.count += 1
    pfn = int(pages[head].next)
    if pfn == head:
        return -1
    list_del(pages, pfn)
    pageset.count -= 1
    pages[pfn].refcount = 1
    zones[zone].pgalloc += 1
    return pfn
