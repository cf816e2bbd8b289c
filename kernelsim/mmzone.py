# SPDX-License-Identifier: GPL-2.0-only
"""Zones, nodes and pageblocks: where page frames belong, and the counters kept for them.

A zone is a record in an array, numbered node by node in address order; a node is its nid. Every pageblock (2^9 pages)
has one migratetype; a free block sits on the list of its pageblock's type. Counters are exact: there are no per-CPU
deltas and no per-CPU page lists, so /proc files never lag behind.

Invariants (checked by debug_vm): nr_free counts the blocks on each list; free_pages is their sum in pages, but for
isolated ones, which nobody can have (account_freepages), and free_cma the part of it that lies in CMA pageblocks; node
LRU counters equal what the lists hold.

MIGRATE_CMA is numbered as in a kernel with CONFIG_CMA. A machine without a CMA area (`Mem.has_cma`) has no such
pageblock and shows no such column: it stands for a kernel built without.

Watermarks follow mm/page_alloc.c __setup_per_zone_wmarks(): min is the zone's share of min_free_kbytes by managed
pages; the gap between min, low, high and promo is max(min/4, managed * watermark_scale_factor / 10000).
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.page import PAGE_SIZE, AllocWords, Pages, PG_nopage, alloc_mem_map, zeroed_words

MAX_PAGE_ORDER = 10
NR_PAGE_ORDERS = MAX_PAGE_ORDER + 1
pageblock_order = 9
pageblock_nr_pages = 1 << pageblock_order

MIGRATE_UNMOVABLE = 0
MIGRATE_MOVABLE = 1
MIGRATE_RECLAIMABLE = 2
MIGRATE_HIGHATOMIC = 3
MIGRATE_CMA = 4
MIGRATE_ISOLATE = 5
MIGRATE_TYPES = 6
migratetype_names = ("Unmovable", "Movable", "Reclaimable", "HighAtomic", "CMA", "Isolate")

ZONE_DMA, ZONE_DMA32, ZONE_NORMAL, ZONE_MOVABLE = range(4)
zone_names = ("DMA", "DMA32", "Normal", "Movable")
MAX_NR_ZONES = len(zone_names)
MAX_DMA_PFN = (16 << 20) // PAGE_SIZE
MAX_DMA32_PFN = (4 << 30) // PAGE_SIZE
lowmem_reserve_ratio = (256, 256, 32, 0)

LRU_INACTIVE_ANON, LRU_ACTIVE_ANON, LRU_INACTIVE_FILE, LRU_ACTIVE_FILE, LRU_UNEVICTABLE = range(5)
NR_LRU_LISTS = 5

WMARK_MIN, WMARK_LOW, WMARK_HIGH, WMARK_PROMO = range(4)

Zones: TypeAlias = Any
"""Record array of `zone_dtype`, [zone]."""
Nodes: TypeAlias = Any
"""Record array of `node_dtype`, [nid]."""
Blocks: TypeAlias = NDArray[np.uint8]
"""uint8[pageblock]: migratetype of each pageblock."""
Pagesets: TypeAlias = Any
"""Record array of `pageset_dtype`, [zone, cpu]."""

zone_dtype = np.dtype(
    [
        ("start_pfn", np.int64),
        ("end_pfn", np.int64),
        ("present", np.int64),
        ("managed", np.int64),
        ("node", np.int64),
        ("type", np.int64),
        ("nr_free", np.int64, (NR_PAGE_ORDERS, MIGRATE_TYPES)),
        ("free_pages", np.int64),
        ("free_cma", np.int64),  # the part of free_pages in CMA pageblocks
        ("cma_pages", np.int64),  # in CMA areas, free or not
        ("nr_isolate_pageblock", np.int64),
        ("held_pages", np.int64),  # free, but kept as destinations by batches in flight
        ("nr_lru", np.int64, (NR_LRU_LISTS,)),  # the part of the node's LRU lists that lies here
        ("nr_mlock", np.int64),
        ("watermark", np.int64, (4,)),
        ("reserve", np.int64, (MAX_NR_ZONES,)),  # lowmem_reserve, by the highest zone a request may use
        ("pgalloc", np.int64),
        ("pgfree", np.int64),
        ("numa_hit", np.int64),  # taken here as intended
        ("numa_miss", np.int64),  # taken here although another node was preferred
        ("numa_foreign", np.int64),  # preferred here, taken elsewhere
        ("compact_cached_free_pfn", np.int64),  # where the scanners of compaction left off
        ("compact_cached_migrate_pfn", np.int64, (2,)),  # async, sync
        ("compact_init_migrate_pfn", np.int64),  # first and last pageblock with something in it
        ("compact_init_free_pfn", np.int64),
        ("compact_considered", np.int64),  # deferral: attempts since the last failure, log2 of how many to skip
        ("compact_defer_shift", np.int64),
        ("compact_order_failed", np.int64),
        ("compact_blockskip_flush", np.int64),
    ]
)

node_dtype = np.dtype(
    [
        ("nr_lru", np.int64, (NR_LRU_LISTS,)),
        ("nr_isolated_anon", np.int64),
        ("nr_isolated_file", np.int64),
        ("nr_anon_pages", np.int64),
        ("nr_mapped", np.int64),
        ("nr_file_pages", np.int64),
        ("nr_anon_thps", np.int64),  # base pages of anonymous folios that a PMD maps
        ("nr_page_table_pages", np.int64),
        ("nr_hugetlb", np.int64),
        ("nr_slab", np.int64),  # of an imported machine; never changes
    ]
)

NR_PCP_TYPES = 3
"""Migratetypes with per-CPU lists of their own: Unmovable, Movable, Reclaimable."""
NR_PCP_LISTS = NR_PCP_TYPES * 4 + 2
"""Of a zone and CPU: one for each such type and each order up to PAGE_ALLOC_COSTLY_ORDER, and two for blocks of a
pageblock's size, Movable and other."""

pageset_dtype = np.dtype(
    [
        (name, np.int64)
        for name in ("count", "high", "high_min", "high_max", "batch", "free_count", "prev_free_high_order")
    ]
)


class Mem:
    """All of physical memory's bookkeeping, as the compiled loops take it.

    `pages` record[nr_pages + list heads], `zones` record[nr_zones], `nodes` record[nr_nodes], `blocks`
    uint8[nr_pageblocks], `skip` uint8[nr_pageblocks] (PG_migrate_skip), `pagesets` record[nr_zones, nr_cpus] (pcp.py;
    no columns on a machine without per-CPU lists), `zonelist` int32[nr_nodes, nr_zones]: for each node the zones to
    allocate from, nearest node first and highest zone first.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int, int, int]],
        distance: NDArray[np.int64],
        nr_pagesets: int = 0,
        flags: int = PG_nopage,
        alloc_words: AllocWords = zeroed_words,
    ) -> None:
        """`spans`: (nid, zone type, start_pfn, end_pfn) of each zone, ascending; their pages start out with `flags`.

        `nr_pagesets`: CPUs with page lists of their own, 0 for none.
        """
        nr_nodes = len(distance)
        self.zones: Zones = np.zeros(len(spans), dtype=zone_dtype)
        self.nodes: Nodes = np.zeros(nr_nodes, dtype=node_dtype)
        self.distance = distance
        for zone, (nid, zone_type, start, end) in zip(self.zones, spans, strict=True):
            zone["node"], zone["type"], zone["start_pfn"], zone["end_pfn"] = nid, zone_type, start, end
        self.nr_pages = int(self.zones["end_pfn"].max())
        nr_lists = len(spans) * NR_PAGE_ORDERS * (MIGRATE_TYPES + 1) + nr_nodes * NR_LRU_LISTS
        nr_lists += len(spans) * nr_pagesets * NR_PCP_LISTS
        edges = [(start, end) for _, _, start, end in spans]
        self.pages: Pages = alloc_mem_map(self.nr_pages, nr_lists, edges, flags, alloc_words)
        self.blocks: Blocks = np.full(-(-self.nr_pages // pageblock_nr_pages), MIGRATE_MOVABLE, dtype=np.uint8)
        self.skip: Blocks = np.zeros_like(self.blocks)
        self.pagesets: Pagesets = np.zeros((len(spans), nr_pagesets), dtype=pageset_dtype)
        self.zonelist = self._build_zonelists()
        self.cma_ranges: list[tuple[int, int, int]] = []
        """(nid, first pfn, pages) of each CMA area that boot set aside (cma.py)."""

    def _build_zonelists(self) -> NDArray[np.int32]:
        lists = []
        for nid in range(len(self.nodes)):
            near = sorted(range(len(self.nodes)), key=lambda other: (self.distance[nid][other], other))
            lists.append([zone for other in near for zone in reversed(self.zones_of(other))])
        return np.array(lists, dtype=np.int32)

    def zones_of(self, nid: int) -> list[int]:
        """Zone numbers of one node, lowest zone first."""
        return [int(zone) for zone in np.flatnonzero(self.zones["node"] == nid)]

    def zone_name(self, zone: int) -> str:
        return zone_names[int(self.zones["type"][zone])]

    @property
    def has_cma(self) -> bool:
        """A kernel with CONFIG_CMA."""
        return bool(self.cma_ranges)

    @property
    def nr_nodes(self) -> int:
        return len(self.nodes)

    def setup_watermarks(
        self,
        min_free_kbytes: int | None = None,
        watermark_scale_factor: int = 10,
        reserve_ratio: Sequence[int] = lowmem_reserve_ratio,
    ) -> int:
        """Compute all zones' watermarks and lowmem reserves from `managed`; returns the min_free_kbytes used."""
        zones = self.zones
        lowmem = int(zones["managed"][zones["type"] != ZONE_MOVABLE].sum())
        if min_free_kbytes is None:
            min_free_kbytes = default_min_free_kbytes(lowmem * (PAGE_SIZE // 1024))
        for zone in zones:
            managed = int(zone["managed"])
            share = (min_free_kbytes >> 2) * managed // max(lowmem, 1)
            low = min(max(managed // 1024, 32), 128) if zone["type"] == ZONE_MOVABLE else share
            gap = max(share >> 2, managed * watermark_scale_factor // 10000)
            zone["watermark"] = [low, low + gap, low + 2 * gap, low + 3 * gap]
            self._setup_lowmem_reserve(zone, reserve_ratio[int(zone["type"])])
        return min_free_kbytes

    def _setup_lowmem_reserve(self, zone: Any, ratio: int) -> None:
        """What a zone keeps back from requests that could be met higher up in the same node."""
        same_node = self.zones["node"] == zone["node"]
        for above in range(int(zone["type"]) + 1, MAX_NR_ZONES):
            between = same_node & (self.zones["type"] > zone["type"]) & (self.zones["type"] <= above)
            higher = int(self.zones["managed"][between].sum())
            zone["reserve"][above] = higher // ratio if ratio and zone["managed"] else 0


def blocks_of_type(mem: Mem, zone: int, migratetype: int) -> NDArray[np.int64]:
    """Pageblocks of one type with pages in a zone."""
    start, end = (int(mem.zones[edge][zone]) for edge in ("start_pfn", "end_pfn"))
    first, last = start >> pageblock_order, -(-end // pageblock_nr_pages)
    return np.flatnonzero(mem.blocks[first:last] == migratetype) + first


def default_min_free_kbytes(lowmem_kbytes: int) -> int:
    """int_sqrt(lowmem * 16) between 128 and 262144 (mm/page_alloc.c calculate_min_free_kbytes)."""
    return min(max(math.isqrt(lowmem_kbytes * 16), 128), 262144)
