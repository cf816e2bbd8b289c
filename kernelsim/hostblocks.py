# SPDX-License-Identifier: GPL-2.0-only
"""Where a real machine's free blocks and pageblock types are, inferred from page flags and per-zone counts.

- Free blocks. kpageflags shows PG_buddy on all pages of a free block, without its borders. But buddies merge
  whenever they can, so a run of free pages has one only decomposition: from its start, always the largest
  aligned block that fits. The one exception: two free pageblocks do not merge if one is HighAtomic or Isolate
  and the other is not (mm/page_alloc.c __free_one_page). Then buddyinfo has order-9 pairs where the run gives
  order 10, and as many are cut.
- Migratetypes. Each zone's totals are met exactly. Evidence is what lies in a block: kernel pages make it
  Unmovable, slab pages alone make it Reclaimable, LRU pages make it Movable. Candidates are taken best
  evidence first, and before all those whose free blocks still fit into what pagetypeinfo counts as free for
  that type, order by order.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit, njit_alloc
from kernelsim.mmzone import (
    MAX_PAGE_ORDER,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    NR_PAGE_ORDERS,
    migratetype_names,
    pageblock_nr_pages,
    pageblock_order,
)
from kernelsim.page import PG_buddy

# What an allocated page says about the type of its pageblock. Reserved and offline pages say nothing: they
# were there before the allocator, or are taken from any block.
USE_MOVABLE, USE_SLAB, USE_KERNEL, USE_UNOWNED, USE_NEUTRAL = range(5)
NR_USES = 5

_PAGES_PER_FREE_BLOCK = 1 << np.arange(NR_PAGE_ORDERS)  # by order
_BLOCKS_PER_FREE_BLOCK = np.maximum(1, _PAGES_PER_FREE_BLOCK >> pageblock_order)


@dataclass(frozen=True)
class HostZone:
    """A populated zone (present > 0). Pages unless said otherwise."""

    node: int
    name: str
    start_pfn: int
    spanned: int
    present: int
    managed: int
    min: int
    low: int
    high: int
    promo: int
    pagesets: tuple["HostPageset", ...]
    """Per-CPU lists when zoneinfo was read, by CPU."""
    nr_free: tuple[int, ...]
    """Free blocks by order, from buddyinfo."""
    nr_blocks: tuple[int, ...]
    """Pageblocks by migratetype, from pagetypeinfo."""
    nr_free_by_type: tuple[tuple[int, ...], ...]
    """[migratetype][order]: free blocks, from pagetypeinfo."""

    @property
    def end_pfn(self) -> int:
        return self.start_pfn + self.spanned

    @property
    def nr_pcp(self) -> int:
        """Pages on per-CPU lists, over all CPUs."""
        return sum(pageset.count for pageset in self.pagesets)

    @property
    def label(self) -> str:
        return f"node {self.node} zone {self.name}"


@dataclass(frozen=True)
class HostPageset:
    """One CPU's page lists of a zone, in pages; before 6.7 high_min and high_max are `high`."""

    count: int
    high: int
    high_min: int
    high_max: int
    batch: int


class FreeBlocks(NamedTuple):
    """Free blocks by ascending pfn: int64[n] heads, uint8[n] orders."""

    pfn: NDArray[np.int64]
    order: NDArray[np.uint8]

    def of(self, zone: HostZone) -> slice:
        first, last = np.searchsorted(self.pfn, [zone.start_pfn, zone.end_pfn])
        return slice(int(first), int(last))

    def per_order(self, zone: HostZone) -> NDArray[np.int64]:
        """int64[order]: how many blocks the zone has."""
        return np.bincount(self.order[self.of(zone)], minlength=NR_PAGE_ORDERS)


def cut_free_blocks(zones: tuple[HostZone, ...], flags: NDArray[np.uint32]) -> FreeBlocks:
    """The runs of PG_buddy pages of each zone, as the blocks that buddies would have merged to."""
    pfns = np.empty(len(flags), dtype=np.int64)  # touched only as far as it is used
    orders = np.empty(len(flags), dtype=np.uint8)
    nr = 0
    for zone in zones:
        nr = _cut_zone(flags, zone.start_pfn, zone.end_pfn, pfns, orders, nr)
    return FreeBlocks(pfns[:nr].copy(), orders[:nr].copy())


@njit
def _cut_zone(
    flags: NDArray[np.uint32],
    start_pfn: int,
    end_pfn: int,
    pfns: NDArray[np.int64],
    orders: NDArray[np.uint8],
    nr: int,
) -> int:
    """Append the zone's free blocks behind the first `nr`; returns the new number."""
    pfn = start_pfn
    while pfn < end_pfn:
        if not flags[pfn] & PG_buddy:
            pfn += 1
            continue
        run_end = pfn + 1
        while run_end < end_pfn and flags[run_end] & PG_buddy:
            run_end += 1
        while pfn < run_end:
            order = 0
            while order < MAX_PAGE_ORDER and pfn % (2 << order) == 0 and pfn + (2 << order) <= run_end:
                order += 1
            pfns[nr] = pfn
            orders[nr] = order
            nr += 1
            pfn += 1 << order
    return nr


def unmerge(zones: tuple[HostZone, ...], free: FreeBlocks, notes: list[str]) -> tuple[FreeBlocks, NDArray[np.int64]]:
    """Cut the order-10 blocks in half that cannot have merged. Returns all blocks, and int64[n] the heads of
    those cut."""
    heads = np.concatenate([_refusing(zone, free, notes) for zone in zones])
    at = np.searchsorted(free.pfn, heads)
    order = free.order.copy()
    order[at] = pageblock_order
    pfn = np.insert(free.pfn, at + 1, heads + pageblock_nr_pages)
    return FreeBlocks(pfn, np.insert(order, at + 1, np.uint8(pageblock_order))), heads


def _refusing(zone: HostZone, free: FreeBlocks, notes: list[str]) -> NDArray[np.int64]:
    """As many order-10 blocks as buddyinfo has fewer, if it has twice as many more of order 9 and
    pagetypeinfo shows free order-9 blocks that refuse to merge. Nothing tells which ones: the lowest."""
    found = free.per_order(zone)
    nr = min(
        int(found[MAX_PAGE_ORDER]) - zone.nr_free[MAX_PAGE_ORDER],
        (zone.nr_free[pageblock_order] - int(found[pageblock_order])) // 2,
        sum(zone.nr_free_by_type[apart][pageblock_order] for apart in (MIGRATE_HIGHATOMIC, MIGRATE_ISOLATE)),
    )
    if nr <= 0:
        return np.empty(0, dtype=np.int64)
    notes.append(f"{zone.label}: {nr} free HighAtomic or Isolate pageblocks did not merge; their place is a guess")
    span = free.of(zone)
    mergeable: NDArray[np.int64] = free.pfn[span][free.order[span] == MAX_PAGE_ORDER]
    return mergeable[:nr]


def infer_block_types(
    zones: tuple[HostZone, ...],
    populated: NDArray[np.bool_],
    use: NDArray[np.int32],
    free: FreeBlocks,
    cut: NDArray[np.int64],
    notes: list[str],
) -> NDArray[np.uint8]:
    """uint8[nr_pageblocks]: a migratetype for each pageblock. `populated` bool[nr_pageblocks], `use`
    int32[nr_pageblocks, NR_USES], `free` and `cut` as `unmerge` returns them."""
    types = np.full(len(use), MIGRATE_MOVABLE, dtype=np.uint8)
    nr_free = np.zeros((len(use), NR_PAGE_ORDERS), dtype=np.int32)
    _count_free_by_block(free.pfn, free.order, nr_free)
    first = 0
    for zone in zones:
        first = max(first, zone.start_pfn >> pageblock_order)  # a block on a border is the lower zone's
        blocks = slice(first, -(-zone.end_pfn // pageblock_nr_pages))
        first = blocks.stop
        halves = np.intersect1d((cut >> pageblock_order) - blocks.start, np.arange(blocks.stop - blocks.start))
        _infer_zone(zone, use[blocks], nr_free[blocks], populated[blocks], halves, types[blocks])
        nr_blocks = np.bincount(types[blocks][populated[blocks]], minlength=len(migratetype_names)).tolist()
        if tuple(nr_blocks) != zone.nr_blocks:
            notes.append(f"{zone.label}: pageblocks by type {nr_blocks}, pagetypeinfo has {list(zone.nr_blocks)}")
    return types


@njit
def _count_free_by_block(
    free_pfn: NDArray[np.int64], free_order: NDArray[np.uint8], nr_free: NDArray[np.int32]
) -> None:
    """Fill nr_free[block, order]; a free block of two pageblocks counts in both."""
    for i in range(len(free_pfn)):
        block = free_pfn[i] >> pageblock_order
        for half in range(max(1, 1 << free_order[i] >> pageblock_order)):
            nr_free[block + half, free_order[i]] += 1


def _infer_zone(
    zone: HostZone,
    use: NDArray[np.int32],
    nr_free: NDArray[np.int32],
    populated: NDArray[np.bool_],
    halves: NDArray[np.int64],
    types: NDArray[np.uint8],
) -> None:
    """Fill `types` for the pageblocks of one zone; all arrays run over its blocks. `halves`: the lower halves
    of blocks that did not merge; their partners are not of the type that refuses."""
    budget = np.array(zone.nr_free_by_type, dtype=np.int64) * _BLOCKS_PER_FREE_BLOCK
    free_pages = nr_free @ (_PAGES_PER_FREE_BLOCK // _BLOCKS_PER_FREE_BLOCK)
    taken = ~populated

    def take(migratetype: int, rank: NDArray[np.int64], nr_sure: int, wanted: NDArray[np.int64], nr: int) -> None:
        types[_pick(rank, nr_sure, nr_free, wanted, nr, taken)] = migratetype

    taken[halves + 1] = True
    rank = np.concatenate((halves, np.argsort(-free_pages, kind="stable")))
    for apart in (MIGRATE_ISOLATE, MIGRATE_HIGHATOMIC):
        take(apart, rank, len(rank), budget[apart], zone.nr_blocks[apart])
    taken[halves + 1] = ~populated[halves + 1]

    movable, slab, kernel, unowned, _ = use.T
    score = slab + kernel - movable
    wanted = budget[MIGRATE_UNMOVABLE] + budget[MIGRATE_RECLAIMABLE]
    nr = zone.nr_blocks[MIGRATE_UNMOVABLE] + zone.nr_blocks[MIGRATE_RECLAIMABLE]
    take(MIGRATE_UNMOVABLE, np.lexsort((-unowned, -score)), int((score >= 0).sum()), wanted, nr)

    rank = np.flatnonzero(types == MIGRATE_UNMOVABLE)
    foreign = (kernel + movable)[rank]
    rank = rank[np.lexsort((-free_pages[rank], slab[rank] == 0, foreign))]
    taken[rank] = False
    nr = zone.nr_blocks[MIGRATE_RECLAIMABLE]
    take(MIGRATE_RECLAIMABLE, rank, int((foreign == 0).sum()), budget[MIGRATE_RECLAIMABLE], nr)


@njit_alloc
def _pick(
    rank: NDArray[np.int64],
    nr_sure: int,
    nr_free: NDArray[np.int32],
    budget: NDArray[np.int64],
    nr: int,
    taken: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Up to `nr` blocks in order of `rank`: first, among the leading `nr_sure`, those whose free blocks fit
    into what is left of `budget`; then any that are not wholly free. Marks them taken and lowers the
    budget."""
    chosen = np.empty(nr, dtype=np.int64)
    found = 0
    for must_fit in (True, False):
        for block in rank[:nr_sure] if must_fit else rank:
            if found == nr:
                return chosen
            if taken[block]:
                continue
            if must_fit:
                if (nr_free[block] > budget).any():
                    continue
            elif nr_free[block, pageblock_order:].any():
                continue
            taken[block] = True
            budget -= nr_free[block]
            chosen[found] = block
            found += 1
    return chosen[:found]
