# SPDX-License-Identifier: GPL-2.0-only
"""CONFIG_DEBUG_VM, free memory: the buddy lists, per-CPU lists, and what compaction holds (part of debug_vm.py)."""

import numpy as np
from numpy.typing import NDArray

from kernelsim.compact_control import vm_arrays
from kernelsim.compaction_free import freepages_list
from kernelsim.jit import njit
from kernelsim.mm_types import Vm
from kernelsim.mmzone import (
    MIGRATE_CMA,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    Blocks,
    Mem,
    Zones,
    blocks_of_type,
    pageblock_order,
)
from kernelsim.page import Pages, PG_buddy, PG_held, PG_mlocked
from kernelsim.page_alloc import free_list
from kernelsim.pcp import pcp_list, pindex_to_order

_NO_PAGES = np.zeros(0, dtype=np.int64)


@njit
def _walk_free_lists(
    pages: Pages, zones: Zones, blocks: Blocks, nr_free: NDArray[np.int64], cover: NDArray[np.uint8]
) -> int:
    """Count blocks on each free list and mark their pages in `cover`; returns the first bad pfn, or -1."""
    for zone in range(len(zones)):
        for order in range(NR_PAGE_ORDERS):
            for migratetype in range(MIGRATE_TYPES):
                head = free_list(pages, zone, order, migratetype)
                before = head
                pfn = pages[head].next
                while pfn != head:
                    page = pages[pfn]
                    good = page.flags == PG_buddy and page.order == order and page.zone == zone
                    good = good and page.prev == before and pfn & ((1 << order) - 1) == 0 and page.refcount == 0
                    if not good or blocks[pfn >> pageblock_order] != migratetype:
                        return int(pfn)
                    for covered in range(pfn, pfn + (1 << order)):
                        if cover[covered] or (covered != pfn and pages[covered].flags != 0):
                            return int(covered)
                        cover[covered] = 1
                    nr_free[zone, order, migratetype] += 1
                    before = pfn
                    pfn = page.next
    return -1


@njit
def _walk_list_off_the_buddy_lists(
    pages: Pages, head: int, zone: int, order: int, flags: int, cover: NDArray[np.uint8]
) -> tuple[int, int]:
    """Count the free blocks of a list that is not one of the buddy allocator's and mark their pages in `cover`; (how
    many, the first bad page or -1)."""
    nr = 0
    before = head
    pfn = int(pages[head].next)
    while pfn != head:
        page = pages[pfn]
        good = page.prev == before and page.zone == zone and page.order == order and page.refcount == 0
        if not good or pfn & ((1 << order) - 1):
            return nr, pfn
        for covered in range(pfn, pfn + (1 << order)):
            if cover[covered] or pages[covered].flags != flags:
                return nr, covered
            cover[covered] = 1
        nr += 1
        before = pfn
        pfn = int(page.next)
    return nr, -1


class Report:
    """Collects what is wrong."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def equal(self, what: str, believed: object, found: object) -> None:
        if believed != found:
            self.faults.append(f"{what}: kernel says {believed}, found {found}")

    def none(self, what: str, pfn: int) -> None:
        if pfn >= 0:
            self.faults.append(f"{what} {pfn:#x}")


def check_free_memory(vm: Vm, report: Report) -> None:
    """Every free page is on exactly one list, and every count is what the lists hold."""
    cover = np.zeros(vm.mem.nr_pages, dtype=np.uint8)
    _check_free(vm.mem, cover, report)
    _check_pagesets(vm.mem, cover, report)
    _check_held(vm, cover, report)


def count(flags: NDArray[np.uint32], bit: int) -> int:
    """Pages with a flag."""
    return int(np.count_nonzero(flags & np.uint32(bit)))


def _zone_label(mem: Mem, zone: int) -> str:
    return f"node {mem.zones['node'][zone]} zone {mem.zone_name(zone)}"


def _check_free(mem: Mem, cover: NDArray[np.uint8], report: Report) -> None:
    nr_free = np.zeros_like(mem.zones["nr_free"])
    report.none("free list: page", _walk_free_lists(mem.pages, mem.zones, mem.blocks, nr_free, cover))
    sizes = 1 << np.arange(NR_PAGE_ORDERS)
    flags = mem.pages["flags"][: mem.nr_pages]
    for zone, record in enumerate(mem.zones):
        name = _zone_label(mem, zone)
        report.equal(f"{name} nr_free", record["nr_free"].tolist(), nr_free[zone].tolist())
        counted = np.delete(nr_free[zone], MIGRATE_ISOLATE, axis=1).sum(axis=1)
        report.equal(f"{name} free_pages", int(record["free_pages"]), int((counted * sizes).sum()))
        free_cma = int((nr_free[zone][:, MIGRATE_CMA] * sizes).sum())
        report.equal(f"{name} free_cma", int(record["free_cma"]), free_cma)
        nr_isolated = len(blocks_of_type(mem, zone, MIGRATE_ISOLATE))
        report.equal(f"{name} nr_isolate_pageblock", int(record["nr_isolate_pageblock"]), nr_isolated)
        span = slice(int(record["start_pfn"]), int(record["end_pfn"]))
        others = int(np.count_nonzero(mem.pages["zone"][span] != zone))
        report.equal(f"{name} pages of another zone", 0, others)
        report.equal(f"{name} buddy heads", int(nr_free[zone].sum()), count(flags[span], PG_buddy))
        report.equal(f"{name} held_pages", int(record["held_pages"]), count(flags[span], PG_held))
        mlocked = mem.pages[span][flags[span] & np.uint32(PG_mlocked) != 0]
        report.equal(f"{name} nr_mlock", int(record["nr_mlock"]), int((1 << mlocked["order"].astype(np.int64)).sum()))


def _check_pagesets(mem: Mem, cover: NDArray[np.uint8], report: Report) -> None:
    """Per-CPU page lists (pcp.py)."""
    for zone, cpu in np.ndindex(mem.pagesets.shape):
        found = 0
        for pindex in range(NR_PCP_LISTS):
            head = pcp_list(mem.pages, mem.zones, mem.nodes, mem.pagesets, zone, cpu, pindex)
            order = pindex_to_order(pindex)
            nr, bad = _walk_list_off_the_buddy_lists(mem.pages, head, zone, order, 0, cover)
            report.none("per-CPU list: page", bad)
            found += nr << order
        report.equal(f"{_zone_label(mem, zone)} CPU {cpu} count", int(mem.pagesets["count"][zone, cpu]), found)


def _check_held(vm: Vm, cover: NDArray[np.uint8], report: Report) -> None:
    """Held frames belong to who holds the mutex: a run of compaction_loop.py has all of them on its freepages lists and
    nothing isolated, one of dpu_compact.py has none there."""
    mem = vm.mem
    arrays = vm_arrays(vm, _NO_PAGES, _NO_PAGES)
    listed = np.zeros(len(mem.zones), dtype=np.int64)
    for zone, order in np.ndindex(len(mem.zones), NR_PAGE_ORDERS):
        head = freepages_list(arrays, zone, order)
        nr, bad = _walk_list_off_the_buddy_lists(mem.pages, head, zone, order, PG_held, cover)
        report.none("freepages list: page", bad)
        listed[zone] += nr << order
    nr_isolated = int(mem.nodes["nr_isolated_anon"].sum() + mem.nodes["nr_isolated_file"].sum())
    if listed.any():
        report.equal("held pages on freepages lists", mem.zones["held_pages"].tolist(), listed.tolist())
        report.equal("isolated pages between rounds of compaction", nr_isolated, 0)
    if not vm.in_flight and not vm.compaction_mutex.locked:
        report.equal("held pages without a compaction", int(mem.zones["held_pages"].sum()), 0)
        report.equal("isolated pages without a compaction", nr_isolated, 0)
        nr_blocks = int(mem.zones["nr_isolate_pageblock"].sum())
        report.equal("isolated pageblocks without a range being emptied", nr_blocks, 0)
