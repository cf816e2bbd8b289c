# SPDX-License-Identifier: GPL-2.0-only
"""An emulated machine's physical memory made from a real one's (hostimage.py).

Every frame keeps its place: free blocks are linked exactly as they were cut from kpageflags (none merges, so
/proc/buddyinfo comes out equal), kernel pages (slab, page tables, reserved, unowned) stay where they are and never
move, anonymous and file pages go onto the LRU list their flags name. Who maps them is hostproc.py's business.

A compound page whose head is on an LRU list is a large folio, of whatever order, and moves whole; other compound pages
(slab, hugetlb, drivers') stay where they are. Contents are stamps; kernel pages get one too, which debug_vm uses to
find a device that overwrites what it must not touch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, fill_page, page_holds, stamp_of
from kernelsim.hostimage import HostImage
from kernelsim.jit import njit
from kernelsim.lruvec import lruvec_add_folio
from kernelsim.mm_types import Vm
from kernelsim.mmzone import MIGRATE_ISOLATE, Mem, Nodes, Zones, blocks_of_type, zone_names
from kernelsim.page import (
    Pages,
    PG_anon,
    PG_buddy,
    PG_head,
    PG_huge,
    PG_lru,
    PG_mlocked,
    PG_nopage,
    PG_private,
    PG_reserved,
    PG_slab,
    PG_swapbacked,
    PG_table,
    PG_tail,
    PG_thp,
    PG_unevictable,
    PG_writeback,
)
from kernelsim.page_alloc import add_to_free_list
from kernelsim.pcp import fill_pagesets

USE_NONE, USE_KERNEL, USE_ANON, USE_FILE, USE_TAIL, USE_COMPOUND, USE_TABLE, USE_UNOWNED = range(8)
"""What a frame is used for; USE_TAIL: as its head is, USE_COMPOUND: part of a compound page that is no folio; unowned
are kernel pages without any flag."""


def import_mem(image: HostImage, distance: NDArray[np.int64]) -> Mem:
    """Zones, pageblocks, free lists and page states as captured; nothing is mapped or on an LRU list yet."""
    spans = [(zone.node, zone_names.index(zone.name), zone.start_pfn, zone.end_pfn) for zone in image.zones]
    mem = Mem(spans, distance, max(len(zone.pagesets) for zone in image.zones))
    nr = mem.nr_pages
    mem.blocks[: len(image.block_migratetype)] = image.block_migratetype[: len(mem.blocks)]
    _import_states(mem.pages, image.flags[:nr], image.compound_order[:nr])
    _link_free_blocks(mem, image)
    _fill_pagesets(mem, image)
    mem.zones["present"] = [zone.present for zone in image.zones]
    mem.zones["managed"] = [zone.managed for zone in image.zones]
    isolated = [len(blocks_of_type(mem, zone, MIGRATE_ISOLATE)) for zone in range(len(mem.zones))]
    mem.zones["nr_isolate_pageblock"] = isolated
    mem.setup_watermarks()
    for record, zone in zip(mem.zones, image.zones, strict=True):
        record["watermark"] = [zone.min, zone.low, zone.high, zone.promo]
    mem.nodes["nr_page_table_pages"] = _count_by_node(mem, PG_table)
    mem.nodes["nr_hugetlb"] = _count_by_node(mem, PG_huge)
    mem.nodes["nr_slab"] = _count_by_node(mem, PG_slab)
    return mem


def _count_by_node(mem: Mem, flag: int) -> NDArray[np.int64]:
    pages = mem.pages[: mem.nr_pages]
    found = pages["zone"][pages["flags"] & np.uint32(flag) != 0]
    return np.bincount(mem.zones["node"][found], minlength=mem.nr_nodes)


@njit
def is_large_folio(head_flags: int) -> bool:
    """Whether the compound page with these flags on its head, as captured, is on an LRU list."""
    return bool(head_flags & PG_lru and head_flags & (PG_huge | PG_slab | PG_reserved) == 0)


@njit
def _import_states(pages: Pages, flags: NDArray[np.uint32], compound_order: NDArray[np.uint8]) -> None:
    """Flags and references of every frame that is in use; free ones are left cleared, holes as they are."""
    head = 0
    for pfn in range(len(flags)):
        state = flags[pfn]
        if state & PG_nopage:
            continue
        if state & PG_head:
            head = pfn
            if is_large_folio(state):
                state |= PG_thp
        elif state & PG_tail and is_large_folio(flags[head]):
            state = PG_tail | PG_thp
        if state & PG_buddy:
            pages[pfn].flags = 0
            continue
        if state & PG_tail:
            state &= ~PG_lru  # a tail is on no list of its own
        pages[pfn].flags = state & ~(PG_lru | PG_mlocked | PG_unevictable)
        pages[pfn].refcount = 0 if state & PG_tail else 1 + (state & PG_private != 0)
        if state & PG_head:
            pages[pfn].order = compound_order[pfn]
        elif state & PG_tail:
            pages[pfn].index = head


@njit
def _add_blocks(
    pages: Pages, zones: Zones, blocks: NDArray[np.uint8], pfns: NDArray[np.int64], orders: NDArray[np.uint8]
) -> None:
    for i in range(len(pfns) - 1, -1, -1):  # each goes to the front: the lowest address ends up first
        add_to_free_list(pages, zones, blocks, pfns[i], orders[i])


def _link_free_blocks(mem: Mem, image: HostImage) -> None:
    _add_blocks(mem.pages, mem.zones, mem.blocks, image.free_pfn, image.free_order)


def _fill_pagesets(mem: Mem, image: HostImage) -> None:
    """Share the pages that look free on per-CPU lists out over the zones' CPUs, by the counts of zoneinfo.

    What has been freed since those were read went to the CPU that was at work, the one with the fullest lists.
    """
    for number, zone in enumerate(image.zones):
        here = image.pcp_pfn[(image.pcp_pfn >= zone.start_pfn) & (image.pcp_pfn < zone.end_pfn)]
        surplus = max(len(here) - zone.nr_pcp, 0)
        fullest_first = sorted(range(len(zone.pagesets)), key=lambda cpu: -zone.pagesets[cpu].count)
        for cpu in fullest_first:
            host = zone.pagesets[cpu]
            mem.pagesets[number, cpu] = (0, host.high, host.high_min, host.high_max, host.batch, 0, 0)
            fill_pagesets(mem, cpu, here[: host.count + surplus])
            here = here[host.count + surplus :]
            surplus = 0


class KernelStamps:
    """Frames that belong to the kernel, and what they held at import."""

    def __init__(self, vm: Vm, pfns: NDArray[np.int64]) -> None:
        self._pfns = pfns
        _stamp_pages(vm.memory, pfns, 1 << 48)

    def first_bad(self, memory: Memory) -> int:
        """The first of them that was overwritten, or -1."""
        return _first_overwritten(memory, self._pfns, 1 << 48)


@njit
def _stamp_pages(memory: Memory, pfns: NDArray[np.int64], sequence: int) -> None:
    for pfn in pfns:
        fill_page(memory, pfn, stamp_of(sequence + pfn))


@njit
def _first_overwritten(memory: Memory, pfns: NDArray[np.int64], sequence: int) -> int:
    for pfn in pfns:
        if not page_holds(memory, pfn, stamp_of(sequence + pfn)):
            return int(pfn)
    return -1


@njit
def classify(pages: Pages, flags: NDArray[np.uint32], mapcount: NDArray[np.int32], kinds: NDArray[np.uint8]) -> None:
    """USE_* of every frame."""
    head = 0
    for pfn in range(len(flags)):
        state = flags[pfn]
        if state & PG_head:
            head = pfn
        if state & (PG_nopage | PG_buddy):
            kinds[pfn] = USE_NONE
        elif state & PG_tail and is_large_folio(flags[head]):
            kinds[pfn] = USE_TAIL
        elif state & (PG_head | PG_tail | PG_huge) and not (state & PG_head and is_large_folio(state)):
            kinds[pfn] = USE_COMPOUND
        elif state & PG_table:
            kinds[pfn] = USE_TABLE
        elif state & (PG_slab | PG_reserved):
            kinds[pfn] = USE_KERNEL
        elif state & PG_lru or mapcount[pfn] > 0:
            kinds[pfn] = USE_ANON if state & PG_anon else USE_FILE
        else:
            kinds[pfn] = USE_UNOWNED if state == 0 else USE_KERNEL


@njit
def import_lru(pages: Pages, zones: Zones, nodes: Nodes, flags: NDArray[np.uint32], kinds: NDArray[np.uint8]) -> None:
    for pfn in range(len(flags)):
        kind = kinds[pfn]
        if kind == USE_ANON:
            pages[pfn].flags |= PG_swapbacked
        if kind in (USE_ANON, USE_FILE):
            pages[pfn].flags |= flags[pfn] & (PG_unevictable | PG_mlocked)
            pages[pfn].flags &= ~PG_writeback
            if flags[pfn] & PG_mlocked:
                pages[pfn].mlock_count = 1
                zones[pages[pfn].zone].nr_mlock += 1 << pages[pfn].order
            lruvec_add_folio(pages, zones, nodes, pfn)
