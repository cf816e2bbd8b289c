# SPDX-License-Identifier: GPL-2.0-only
"""Compaction by the CPU over the same regions, to the same places, as the DPU's: the `cpu` and `cpu-batched` engines.

`cpu` works as Linux compacts: pages are isolated and unmapped in clusters of COMPACT_CLUSTER_MAX, the TLBs are flushed
once for each mm and cluster, then the cluster is copied and remapped page by page. `cpu-batched` takes the DPU's way
(a whole region unmapped and flushed once), with copy_fragments() in place of the device.

Within a cluster a page may go to the frame that an earlier page of the cluster leaves, because the cluster is copied
in address order, and each page's identity has left its frame before the next is copied. A cluster ends with the folio
that fills it: a large one moves whole, and may make it larger than COMPACT_CLUSTER_MAX.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, folio_copy
from kernelsim.dpu_compact_scan import (
    Cursors,
    Fragments,
    dpu_compact_add_fragment,
    fragment_dtype,
    new_cursors,
    place_of,
)
from kernelsim.dpu_compact_stats import NO_FOLIO
from kernelsim.huge_memory import split_folio
from kernelsim.jit import njit
from kernelsim.lruvec import folio_isolate_lru
from kernelsim.migrate import (
    MOVABLE,
    count_migrated,
    flush_touched,
    folio_migrate,
    is_target,
    putback_or_free,
    why_not_movable,
)
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import Blocks, Nodes, Zones
from kernelsim.page import Pages, PG_buddy, PG_partially_mapped
from kernelsim.page_alloc import find_buddy_head, hold_free_block
from kernelsim.pgtable import PageTables
from kernelsim.rmap import Avcs, Vmas, remove_migration_ptes, try_to_migrate
from kernelsim.timer import Clock
from kernelsim.tlb import Tlbs
from kernelsim.vmstat import Events

COMPACT_CLUSTER_MAX = 32
"""Pages that are migrated together, as in mm/compaction.c (SWAP_CLUSTER_MAX)."""

CPU_SLICE_PAGES = 1 << 11


def new_cluster() -> Fragments:
    """Folios that are unmapped: at most one a page, and at least one page each."""
    return np.zeros(COMPACT_CLUSTER_MAX, dtype=fragment_dtype)


@njit
def _migrate_cluster(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    memory: Memory,
    i_pages: NDArray[np.int64],
    touched: NDArray[np.uint8],
    cluster: Fragments,
    nr: int,
) -> int:
    """Flush, copy and remap `nr` unmapped folios; returns the number of PTEs. The old frames are then held."""
    flush_touched(tlbs, events, touched)
    nr_ptes = 0
    for i in range(nr):
        old = cluster[i].old_pfn
        new = cluster[i].new_pfn
        folio_copy(memory, new, old, 1 << cluster[i].order)
        folio_migrate(pages, zones, nodes, avcs, i_pages, old, new)
        nr_ptes += remove_migration_ptes(pages, zones, nodes, vmas, avcs, pt, old, new)
        count_migrated(pages, events, new, True)
        putback_or_free(pages, zones, blocks, nodes, new)
    return nr_ptes


@njit
def _fill_cluster(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    events: Events,
    touched: NDArray[np.uint8],
    cluster: Fragments,
    cursors: Cursors,
    pfn: int,
    end: int,
) -> tuple[int, int, int]:
    """Isolate and unmap folios from `pfn` on, up to COMPACT_CLUSTER_MAX pages; (pfn reached, folios, pages)."""
    nr = 0
    nr_pages = 0
    head = -1
    while pfn < end and nr_pages < COMPACT_CLUSTER_MAX:
        if head < 0 and pages[pfn].flags & PG_buddy:
            head = pfn
        if head >= 0:
            stop = head + (1 << pages[head].order)
            if is_target(pages, blocks, pfn):
                hold_free_block(pages, zones, blocks, head, pfn, min(end, stop))
            pfn = stop
            head = -1
            continue
        size = 1 << pages[pfn].order
        if why_not_movable(pages, pfn) == MOVABLE and pfn + size <= end:
            order = pages[pfn].order
            new = place_of(pages, blocks, cluster, nr, cursors, pfn, order)
            if new >= 0:
                folio_isolate_lru(pages, zones, nodes, pfn)
                try_to_migrate(pages, zones, nodes, vmas, avcs, pt, touched, pfn)
                vacates = 1 if is_target(pages, blocks, pfn) else 0
                nr = dpu_compact_add_fragment(cluster, nr, pfn, new, order, 0, -1, 0, vacates)
                nr_pages += size
            elif order > 0 and pages[pfn + 1].flags & PG_partially_mapped:
                if split_folio(pages, zones, blocks, nodes, vmas, avcs, pt, events, pfn) == 0:
                    events[0].thp_migration_split += order == 9
                    head = find_buddy_head(pages, pfn)
                    continue
        pfn += size
    return pfn, nr, nr_pages


@njit
def compact_range(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    memory: Memory,
    i_pages: NDArray[np.int64],
    touched: NDArray[np.uint8],
    cluster: Fragments,
    cursors: Cursors,
    shapes: NDArray[np.uint8],
    pfn: int,
    end: int,
    budget: int,
) -> tuple[int, int, int, int]:
    """Pack movable folios downwards in address order, cluster by cluster.

    Goes on from `pfn`, with places given as `cursors` tell, until `end` or until `budget` pages have moved. `shapes`
    uint8[clusters, COMPACT_CLUSTER_MAX], all NO_FOLIO, takes the orders of each cluster's folios. Returns pfn to go on
    with, and the pages, PTEs and clusters of this call; the caller releases the held frames at the end.
    """
    nr_clusters = 0
    nr_moved = 0
    nr_ptes = 0
    while pfn < end and nr_moved < budget:
        cursors[:, 1] = 0  # the cluster is empty again
        pfn, nr, nr_pages = _fill_cluster(
            pages, zones, blocks, nodes, vmas, avcs, pt, events, touched, cluster, cursors, pfn, end
        )  # fmt: skip
        nr_ptes += _migrate_cluster(
            pages, zones, blocks, nodes, vmas, avcs, pt, tlbs, events, memory, i_pages, touched, cluster, nr
        )  # fmt: skip
        nr_moved += nr_pages
        for i in range(nr):
            shapes[nr_clusters, i] = cluster[i].order
        nr_clusters += nr > 0
        for order in range(len(cursors) if nr > 0 else 0):
            cursors[order, 0] = max(cursors[order, 0], cluster[nr - 1].new_pfn + (1 << cluster[nr - 1].order))
    return pfn, nr_moved, nr_ptes, nr_clusters


@njit
def copy_fragments(memory: Memory, fragments: Fragments, first: int, last: int) -> None:
    """Copy the pages of fragments first .. last-1 to their new frames, in order."""
    for i in range(first, last):
        folio_copy(memory, fragments[i].new_pfn, fragments[i].old_pfn, 1 << fragments[i].order)


@dataclass
class CpuWork:
    """What the CPU path did in a region."""

    nr_pages: int = 0
    nr_thps: int = 0
    nr_split: int = 0
    nr_ptes: int = 0
    nr_flushes: int = 0
    clusters: Counter[bytes] = field(default_factory=Counter)
    """How many clusters there were of folios of these orders, in this sequence, filled up with NO_FOLIO."""
    wall_ns: int = 0

    @property
    def nr_folios(self) -> int:
        return sum((COMPACT_CLUSTER_MAX - shape.count(NO_FOLIO)) * nr for shape, nr in self.clusters.items())


def pages_in_cluster(orders: NDArray[np.uint8]) -> int:
    """Base pages of a cluster of folios of these orders."""
    return int((1 << orders[orders != NO_FOLIO].astype(np.int64)).sum())


class CpuPath:
    """The `cpu` engine."""

    def __init__(self, vm: Vm, clock: Clock) -> None:
        self._vm = vm
        self._clock = clock
        self._cluster = new_cluster()

    def compact(self, first: int, last: int, work: CpuWork) -> LongOp:
        """Pack the pages of first .. last-1, and keep `work` up to date. Frames that stay free are left held."""
        pfn, cursors = first, new_cursors(first)
        while pfn < last:
            pfn = self._slice(work, cursors, pfn, last)
            yield None

    def _slice(self, work: CpuWork, cursors: Cursors, pfn: int, end: int) -> int:
        vm, mem = self._vm, self._vm.mem
        nr_thps, nr_split = (int(vm.events[name][0]) for name in ("thp_migration_success", "thp_migration_split"))
        begin_ns, nr_flushes = self._clock.wall_ns(), int(vm.events["nr_tlb_local_flush_all"][0])
        # each but the last has COMPACT_CLUSTER_MAX pages at least
        shapes = np.full((CPU_SLICE_PAGES // COMPACT_CLUSTER_MAX + 2, COMPACT_CLUSTER_MAX), NO_FOLIO, dtype=np.uint8)
        pfn, nr_moved, nr_ptes, nr_clusters = compact_range(
            mem.pages, mem.zones, mem.blocks, mem.nodes, vm.vmas, vm.avcs, vm.pt, vm.tlbs, vm.events, vm.memory,
            vm.i_pages, vm.touched(), self._cluster, cursors, shapes, pfn, end, CPU_SLICE_PAGES,
        )  # fmt: skip
        vm.events["compact_isolated"] += nr_moved
        work.nr_pages += nr_moved
        work.nr_thps += int(vm.events["thp_migration_success"][0]) - nr_thps
        work.nr_split += int(vm.events["thp_migration_split"][0]) - nr_split
        work.nr_ptes += nr_ptes
        work.nr_flushes += int(vm.events["nr_tlb_local_flush_all"][0]) - nr_flushes
        work.clusters.update(map(bytes, shapes[:nr_clusters]))
        work.wall_ns += self._clock.wall_ns() - begin_ns
        return int(pfn)
