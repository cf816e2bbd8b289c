# SPDX-License-Identifier: GPL-2.0-only
"""Compaction by the CPU over the same regions, to the same places, as the DPU's: the `cpu` and `cpu-batched` engines.

`cpu` works as Linux compacts: pages are isolated and unmapped in clusters of COMPACT_CLUSTER_MAX, the TLBs are flushed
once for each mm and cluster, then the cluster is copied and remapped page by page. `cpu-batched` takes the DPU's way
(a whole region unmapped and flushed once), with copy_fragments() in place of the device.

Within a cluster a page may go to the frame that an earlier page of the cluster leaves, because the cluster is copied
in address order, and each page's identity has left its frame before the next is copied.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, copy_page
from kernelsim.dpu_compact_scan import Fragments
from kernelsim.jit import njit
from kernelsim.lruvec import folio_isolate_lru
from kernelsim.migrate import MOVABLE, flush_touched, folio_migrate, is_target, putback_or_free, why_not_movable
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import Blocks, Nodes, Zones
from kernelsim.page import Pages, PG_buddy, PG_held
from kernelsim.page_alloc import hold_free_block
from kernelsim.pgtable import PageTables
from kernelsim.rmap import Avcs, Vmas, remove_migration_ptes, try_to_migrate
from kernelsim.timer import Clock
from kernelsim.tlb import Tlbs
from kernelsim.vmstat import Events

COMPACT_CLUSTER_MAX = 32
"""Pages that are migrated together, as in mm/compaction.c (SWAP_CLUSTER_MAX)."""

CPU_SLICE_PAGES = 1 << 11

Cluster = NDArray[np.int64]
"""int64[COMPACT_CLUSTER_MAX, 2]: old and new pfn of each page that is unmapped."""


def new_cluster() -> Cluster:
    return np.zeros((COMPACT_CLUSTER_MAX, 2), dtype=np.int64)


@njit
def _next_target(
    pages: Pages, blocks: Blocks, cluster: Cluster, nr: int, passed: int, target: int, end: int
) -> tuple[int, int]:
    """The first frame from `target` on that may be filled, or `end`; and the cluster's first page that is not below it.

    That is a held frame, or one that a page of the cluster leaves.
    """
    while target < end:
        while passed < nr and cluster[passed, 0] < target:
            passed += 1
        leaves = passed < nr and cluster[passed, 0] == target
        if (leaves or pages[target].flags & PG_held) and is_target(pages, blocks, target):
            break
        target += 1
    return target, passed


@njit
def _add_to_cluster(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    touched: NDArray[np.uint8],
    cluster: Cluster,
    nr: int,
    old: int,
    new: int,
) -> int:
    """Isolate and unmap one page; returns the new size of the cluster."""
    folio_isolate_lru(pages, zones, nodes, old)
    try_to_migrate(pages, zones, nodes, vmas, avcs, pt, touched, old)
    cluster[nr, 0] = old
    cluster[nr, 1] = new
    return nr + 1


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
    cluster: Cluster,
    nr: int,
) -> int:
    """Flush, copy and remap `nr` unmapped pages; returns the number of PTEs. The old frames are then held."""
    flush_touched(tlbs, events, touched)
    nr_ptes = 0
    for i in range(nr):
        old = cluster[i, 0]
        new = cluster[i, 1]
        copy_page(memory, new, old)
        folio_migrate(pages, zones, nodes, avcs, i_pages, old, new)
        nr_ptes += remove_migration_ptes(pages, zones, nodes, vmas, avcs, pt, old, new)
        putback_or_free(pages, zones, blocks, nodes, new)
        events[0].pgmigrate_success += 1
    return nr_ptes


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
    cluster: Cluster,
    pfn: int,
    end: int,
    target: int,
    nr_targets: int,
    budget: int,
) -> tuple[int, int, int, int, int]:
    """Pack movable pages downwards in address order, cluster by cluster.

    Goes on from `pfn` with `nr_targets` held frames from `target` upwards, until `end` or until `budget` pages have
    moved. Returns (pfn, target, nr_targets) to go on with, and the pages and PTEs of this call; the caller releases
    the held frames at the end.
    """
    nr_moved = 0
    nr_ptes = 0
    nr = 0
    passed = 0
    while pfn < end and nr_moved + nr < budget:
        if pages[pfn].flags & PG_buddy:
            step = 1 << pages[pfn].order
            if is_target(pages, blocks, pfn):
                nr_targets += hold_free_block(pages, zones, blocks, pfn, pfn, min(end, pfn + step))
            pfn += step
            continue
        if nr_targets > 0 and why_not_movable(pages, pfn) == MOVABLE:
            target, passed = _next_target(pages, blocks, cluster, nr, passed, target, pfn)
            if target == pfn:  # their pageblocks were claimed for another type between two calls
                nr_targets = 0
                continue
            nr = _add_to_cluster(pages, zones, nodes, vmas, avcs, pt, touched, cluster, nr, pfn, target)
            target += 1
            nr_targets += is_target(pages, blocks, pfn) - 1
        pfn += 1
        if nr == len(cluster):
            nr_ptes += _migrate_cluster(
                pages, zones, blocks, nodes, vmas, avcs, pt, tlbs, events, memory, i_pages, touched, cluster, nr
            )  # fmt: skip
            nr_moved += nr
            nr = 0
            passed = 0
    nr_ptes += _migrate_cluster(
        pages, zones, blocks, nodes, vmas, avcs, pt, tlbs, events, memory, i_pages, touched, cluster, nr
    )  # fmt: skip
    nr_moved += nr
    return pfn, target, nr_targets, nr_moved, nr_ptes


@njit
def copy_fragments(memory: Memory, fragments: Fragments, first: int, last: int) -> None:
    """Copy the pages of fragments first .. last-1 to their new frames, in order."""
    for i in range(first, last):
        copy_page(memory, fragments[i].new_pfn, fragments[i].old_pfn)


@dataclass
class CpuWork:
    """What the CPU path did in a region."""

    nr_pages: int = 0
    nr_ptes: int = 0
    nr_flushes: int = 0
    nr_clusters: int = 0
    """Full ones; the rest of the pages of a slice are a smaller one, whose sizes are in `rests`."""
    rests: tuple[int, ...] = ()
    wall_ns: int = 0


class CpuPath:
    """The `cpu` engine."""

    def __init__(self, vm: Vm, clock: Clock) -> None:
        self._vm = vm
        self._clock = clock
        self._cluster = new_cluster()

    def compact(self, first: int, last: int, work: CpuWork) -> LongOp:
        """Pack the pages of first .. last-1, and keep `work` up to date. Frames that stay free are left held."""
        pfn, target, nr_targets = first, first, 0
        while pfn < last:
            pfn, target, nr_targets = self._slice(work, pfn, last, target, nr_targets)
            yield None

    def _slice(self, work: CpuWork, pfn: int, end: int, target: int, nr_targets: int) -> tuple[int, int, int]:
        vm, mem = self._vm, self._vm.mem
        begin_ns, nr_flushes = self._clock.wall_ns(), int(vm.events["nr_tlb_local_flush_all"][0])
        pfn, target, nr_targets, nr_moved, nr_ptes = compact_range(
            mem.pages, mem.zones, mem.blocks, mem.nodes, vm.vmas, vm.avcs, vm.pt, vm.tlbs, vm.events, vm.memory,
            vm.i_pages, vm.touched(), self._cluster, pfn, end, target, nr_targets, CPU_SLICE_PAGES,
        )  # fmt: skip
        vm.events["compact_isolated"] += nr_moved
        work.nr_pages += nr_moved
        work.nr_ptes += nr_ptes
        work.nr_flushes += int(vm.events["nr_tlb_local_flush_all"][0]) - nr_flushes
        full, rest = divmod(nr_moved, COMPACT_CLUSTER_MAX)
        work.nr_clusters += full
        work.rests += (rest,) if rest else ()
        work.wall_ns += self._clock.wall_ns() - begin_ns
        return pfn, target, nr_targets
