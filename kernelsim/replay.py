# SPDX-License-Identifier: GPL-2.0-only
"""Replay: a real machine's page allocations and frees, done again by the emulated allocator.

Theory of operation
    The machine is imported from a capture that was made when the trace began. From there on each mm_page_alloc event is
    a request with the real one's order, migratetype, zones and watermark rights, on its node and CPU, and the emulated
    allocator chooses the frames. Each mm_page_free event gives back what the real one gave back, wherever that is by
    now. So the same work is done by both kernels, and what differs in the end is what they decided: where blocks were
    cut, which pageblocks were stolen, what compaction moved.

    A real page's name is its real pfn, from its allocation to its free (replay_names.py). Movable pages are the page
    cache of one file whose index is the real pfn: compaction moves them as it moves any page and keeps the cache's slot
    right, so the slot always says where the page is. All other pages never move; `where` says where they
    are. Pages that were there before the trace have their own pfn as their name: those on an LRU list belong to the
    file as well, mapped by nobody, since a trace tells of frees and not of unmappings. Contents are stamps, as in every
    imported machine.

    Single pages come from and go to per-CPU lists (pcp_alloc.py, pcp.py).

Invariants
    - A name has a page in the file or in `where`, never in both.
    - `where` is the pfn, NOT_HERE, or UNPLACED: the real kernel has this page, and ours found no room for it.

Differences from a real run. Reclaim is not run: what the real kernel reclaimed is in the trace as frees. Where no zone
is above its watermarks, a request may take what there is, as the real one was served. A page that the real kernel's
own compaction moved is freed in the trace and its new frame never allocated, so it is lost to us early; its later free
is counted as unknown.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import fill_page
from kernelsim.filemap import File
from kernelsim.gfp import gfp_zone
from kernelsim.hostimage import HostImage
from kernelsim.hostmem import USE_ANON, USE_FILE, classify, import_lru
from kernelsim.jit import njit
from kernelsim.mm_types import Vm
from kernelsim.mmap import Mm
from kernelsim.mmzone import (
    MAX_NR_ZONES,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    WMARK_LOW,
    WMARK_MIN,
    pageblock_order,
)
from kernelsim.page import GUP_PIN_BIAS, PG_anon, PG_buddy, PG_nopage, PG_private, PG_tail, compound_head
from kernelsim.page_alloc import alloc_mark, rmqueue, zone_watermark_ok
from kernelsim.pcp_alloc import note_fallback, rmqueue_pcplist
from kernelsim.replay_names import NOT_HERE, ReplayArrays, counts_dtype, free_names, place_block
from kernelsim.trace_scan import ALLOC, EXTFRAG, FREE, LOST, MIGRATED, Events

# Allocating.


@njit
def _take(a: ReplayArrays, zone: int, order: int, migratetype: int, cpu: int) -> int:
    """A block of one zone, or -1."""
    if order == 0 and a.pagesets.shape[1] > 0:
        cpu %= a.pagesets.shape[1]
        return rmqueue_pcplist(
            a.pages, a.zones, a.blocks, a.nodes, a.pagesets, a.alloc_factor, a.fallbacks, zone, cpu, migratetype
        )
    note_fallback(a.zones, zone, order, migratetype, a.fallbacks)
    return rmqueue(a.pages, a.zones, a.blocks, zone, order, migratetype)


@njit
def _try_zones(
    a: ReplayArrays, nid: int, order: int, migratetype: int, cpu: int, highest: int, wmark: int, reserve: int
) -> int:
    """A block of the first zone that stays above a watermark, any zone for `wmark` -1; or -1."""
    for zone in a.zonelists[nid, highest]:
        if zone < 0:
            break
        if wmark >= 0:
            mark = alloc_mark(a.zones, zone, wmark, reserve)
            if not zone_watermark_ok(a.zones, zone, order, mark, highest, migratetype == MIGRATE_MOVABLE):
                continue
        pfn = _take(a, zone, order, migratetype, cpu)
        if pfn >= 0:
            return pfn
    return -1


@njit
def _nid_of(a: ReplayArrays, real: int) -> int:
    return int(a.zones[a.pages[real].zone].node)


@njit
def _migratetype_of(event: Events) -> int:
    return int(event.migratetype) if event.migratetype <= MIGRATE_RECLAIMABLE else MIGRATE_UNMOVABLE


@njit
def take_anything(a: ReplayArrays, event: Events, highest: int, reserve: int) -> int:
    """A block for a request that the real kernel served: above min, or else whatever there is; or -1."""
    nid = _nid_of(a, event.pfn)
    migratetype = _migratetype_of(event)
    pfn = _try_zones(a, nid, event.order, migratetype, event.cpu, highest, WMARK_MIN, reserve)
    if pfn < 0:
        pfn = _try_zones(a, nid, event.order, migratetype, event.cpu, highest, -1, 0)
    return pfn


# Events.


@njit
def _replay_free(a: ReplayArrays, event: Events) -> None:
    counts = a.counts[0]
    unplaced = counts.free_unplaced
    freed = free_names(a, int(event.pfn), int(event.order), int(event.cpu))
    counts.frees += freed > 0
    counts.free_pages += freed
    counts.free_unknown += (1 << event.order) - freed - (counts.free_unplaced - unplaced)


@njit
def _forget(a: ReplayArrays, event: Events) -> None:
    """A name is given out anew: what it named before is gone, if the trace told so or not."""
    real = int(event.pfn)
    nr = 1 << event.order
    slot = a.avcs[a.mapping].i_base + real
    for i in range(nr):
        if a.i_pages[slot + i] >= 0 or a.where[real + i] != NOT_HERE:
            a.counts[0].unseen_free += free_names(a, real, int(event.order), int(event.cpu))
            return


@njit
def _replay_alloc(a: ReplayArrays, event: Events, highest: int, reserve: int, assisted: bool) -> bool:
    """False: nothing above the low watermark, and somebody wants to help with that."""
    if event.pfn < 0:
        a.counts[0].real_failed += 1
        return True
    _forget(a, event)
    nid = _nid_of(a, event.pfn)
    pfn = _try_zones(a, nid, event.order, _migratetype_of(event), event.cpu, highest, WMARK_LOW, 0)
    if pfn < 0 and assisted and event.order > 0:
        return False
    if pfn < 0:
        pfn = take_anything(a, event, highest, reserve)
    place_block(a, event, pfn)
    return True


@njit
def replay_events(
    a: ReplayArrays,
    events: Events,
    highest: NDArray[np.uint8],
    reserve: NDArray[np.uint8],
    first: int,
    until_ns: int,
    assisted: bool,
) -> int:
    """Do events first .. of before `until_ns`; returns the first that was not done.

    `highest`, `reserve`: of each event the highest zone type it may use and its ALLOC_* bits. If the event that comes
    back is before `until_ns`, it is an allocation of more than a page that found nothing above low (`assisted` only).
    """
    for i in range(first, len(events)):
        event = events[i]
        if event.time_ns >= until_ns:
            return i
        kind = event.kind
        if kind in (ALLOC, FREE) and event.pfn + (1 << event.order) > len(a.where):
            a.counts[0].outside += 1
        elif kind == ALLOC:
            if not _replay_alloc(a, event, highest[i], reserve[i], assisted):
                return i
        elif kind == FREE:
            _replay_free(a, event)
        elif kind == EXTFRAG:
            a.counts[0].real_fallbacks += 1
            a.counts[0].real_fragmenting += event.order < pageblock_order
        elif kind == MIGRATED:
            a.counts[0].real_migrated += event.nr
        elif kind == LOST:
            a.counts[0].lost += event.nr
    return len(events)


# Setting up.


@njit
def _own_imported(a: ReplayArrays, kinds: NDArray[np.uint8], first: int, end: int) -> None:
    """Enter what was captured: LRU folios into the file, other pages that are in use into `where`."""
    pages = a.pages
    i_base = a.avcs[a.mapping].i_base
    for pfn in range(first, end):
        page = pages[pfn]
        if page.flags & (PG_buddy | PG_nopage) or (page.refcount == 0 and page.flags & PG_tail == 0):
            continue
        head = compound_head(pages, pfn)
        if kinds[head] not in (USE_ANON, USE_FILE):
            a.where[pfn] = pfn
            continue
        if pfn == head:
            page.mapping = a.mapping
            page.index = pfn
            page.refcount = (1 << page.order) + (page.flags & PG_private != 0)
        a.i_pages[i_base + pfn] = pfn
        fill_page(a.memory, pfn, a.disk[pfn])
        a.nodes[a.zones[page.zone].node].nr_file_pages += 1


class Replay:
    """A machine's memory under replay."""

    def __init__(self, vm: Vm) -> None:
        """Before `adopt` there is nothing to free."""
        mem = vm.mem
        self.vm = vm
        self.counts: Events = np.zeros(1, dtype=counts_dtype)
        self.failed: NDArray[np.int64] = np.zeros(16, dtype=np.int64)
        self.fallbacks: NDArray[np.int64] = np.zeros(2, dtype=np.int64)
        self._where = np.full(mem.nr_pages, NOT_HERE, dtype=np.int64)
        self._file = File(vm, mem.nr_pages)
        self._alloc_factor = np.zeros(mem.pagesets.shape, dtype=np.int64)
        self._zonelists = _zonelists(vm)

    def adopt(self, image: HostImage) -> list[tuple[str, Mm]]:
        """Take over the pages of an imported machine, which has no processes then: Machine.from_image's `owners`."""
        mem = self.vm.mem
        flags = image.flags[: mem.nr_pages]
        kinds = np.empty(mem.nr_pages, dtype=np.uint8)
        classify(mem.pages, flags, image.mapcount[: mem.nr_pages], kinds)
        mem.pages["flags"][: mem.nr_pages] &= np.uint32(~PG_anon & 0xFFFFFFFF)
        import_lru(mem.pages, mem.zones, mem.nodes, flags, kinds)
        _own_imported(self.arrays(), kinds, 0, mem.nr_pages)
        mem.pages["refcount"][image.pinned_pfn] += GUP_PIN_BIAS
        self.settle()
        return []

    def arrays(self) -> ReplayArrays:
        vm, mem = self.vm, self.vm.mem
        return ReplayArrays(
            mem.pages, mem.zones, mem.blocks, mem.nodes, mem.pagesets, vm.vmas, vm.avcs, vm.pt, vm.events, vm.memory,
            vm.i_pages, self._file.disk, self._where, self._zonelists, self._alloc_factor, self.fallbacks, self.failed,
            self.counts, self._file.mapping,
        )  # fmt: skip

    def run(self, events: Events, highest: NDArray[np.uint8], reserve: NDArray[np.uint8], first: int, until_ns: int,
            assisted: bool) -> int:  # fmt: skip
        """replay_events()."""
        done = int(replay_events(self.arrays(), events, highest, reserve, first, until_ns, assisted))
        self.settle()
        return done

    def place(self, event: Events, pfn: int, highest: int, reserve: int) -> None:
        """Finish an allocation that came back from `run`, with the block found for it or, `pfn` < 0, any there is."""
        arrays = self.arrays()
        place_block(arrays, event, pfn if pfn >= 0 else take_anything(arrays, event, highest, reserve))

    def settle(self) -> None:
        """There are no page tables here but the captured ones, whose processes are not."""
        self.vm.foreign_tables = int(self.vm.mem.nodes["nr_page_table_pages"].sum())


def _zonelists(vm: Vm) -> NDArray[np.int64]:
    """For each node and highest zone type the zones to allocate from, -1 behind the last."""
    mem = vm.mem
    lists = np.full((mem.nr_nodes, MAX_NR_ZONES, len(mem.zones) + 1), -1, dtype=np.int64)
    for nid in range(mem.nr_nodes):
        for highest in range(MAX_NR_ZONES):
            fit = [zone for zone in mem.zonelist[nid] if mem.zones["type"][zone] <= highest]
            lists[nid, highest, : len(fit)] = fit
    return lists


def requests(events: Events, reserve_of: Callable[[int], int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """uint8[event] each: the highest zone type and the ALLOC_* bits, `reserve_of(gfp)`, that events ask for."""
    masks, which = np.unique(events["gfp"], return_inverse=True)
    highest = np.array([gfp_zone(int(gfp)) for gfp in masks], dtype=np.uint8)
    reserve = np.array([reserve_of(int(gfp)) for gfp in masks], dtype=np.uint8)
    return highest[which], reserve[which]
