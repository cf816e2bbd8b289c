# SPDX-License-Identifier: GPL-2.0-only
"""Counters, and the files that show free memory: /proc/vmstat, buddyinfo, pagetypeinfo (mm/vmstat.c).

Events are one record, `events[0].pgfault`, shared with the hot loops. pgalloc_* and pgfree are kept per zone and added
up when shown. Only counters that something here moves are listed, and of those only what the kernel was configured for;
those of the kernel come in its order and the dpu_* events, this project's own, last.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.kconfig import Kconfig
from kernelsim.mmzone import (
    MIGRATE_CMA,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    Mem,
    migratetype_names,
    node_dtype,
    pageblock_nr_pages,
    pageblock_order,
    zone_dtype,
    zone_names,
)
from kernelsim.page import PG_nopage
from kernelsim.seq_counters import CounterFile, CounterText, Number, Words, number

Events: TypeAlias = Any
"""Record array [1] of `events_dtype`."""

event_names = (
    "pgactivate",
    "pgdeactivate",
    "pgfault",
    "pgmajfault",
    "pgrefill",
    "pgsteal_kswapd",
    "pgsteal_direct",
    "pgscan_kswapd",
    "pgscan_direct",
    "pgscan_file",
    "pgsteal_file",
    "pageoutrun",
    "drop_pagecache",
    "drop_slab",
    "pgmigrate_success",
    "pgmigrate_fail",
    "thp_migration_success",
    "thp_migration_fail",
    "thp_migration_split",
    "compact_migrate_scanned",
    "compact_free_scanned",
    "compact_isolated",
    "compact_stall",
    "compact_fail",
    "compact_success",
    "compact_daemon_wake",
    "compact_daemon_migrate_scanned",
    "compact_daemon_free_scanned",
    "htlb_buddy_alloc_success",
    "htlb_buddy_alloc_fail",
    "cma_alloc_success",
    "cma_alloc_fail",
    "unevictable_pgs_mlocked",
    "unevictable_pgs_munlocked",
    "thp_fault_alloc",
    "thp_fault_fallback",
    "thp_split_page",
    "thp_split_page_failed",
    "thp_deferred_split_page",
    "thp_split_pmd",
    "nr_tlb_remote_flush",
    "nr_tlb_local_flush_all",
    "nr_tlb_local_flush_one",
    "cow_ksm",
    "dpu_compact_regions",
    "dpu_compact_pages_moved",
    "dpu_compact_ptes_updated",
    "dpu_compact_fallback",
    "dpu_compact_fail",
)

allocstall_names = tuple(f"allocstall_{name.lower()}" for name in zone_names)
"""Direct reclaims, by the highest zone that the request could use; shown between pgalloc_* and pgfree."""

events_dtype = np.dtype([(name, np.int64) for name in (*event_names, *allocstall_names)])

_lru_names = ("inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable")
_node_names = (
    "nr_isolated_anon",
    "nr_isolated_file",
    "nr_anon_pages",
    "nr_mapped",
    "nr_file_pages",
    "nr_anon_thps",
    "nr_page_table_pages",
    "nr_hugetlb",
)
_in_thp = {"nr_anon_thps": "nr_anon_transparent_hugepages"}  # kept in pages, shown in huge pages

_OPTION_OF = {
    "numa_": "CONFIG_NUMA",
    "pgmigrate_": "CONFIG_MIGRATION",
    "compact_": "CONFIG_COMPACTION",
    "dpu_compact_": "CONFIG_DPU_COMPACTION",
    "htlb_": "CONFIG_HUGETLB_PAGE",
    "thp_migration_": "CONFIG_MIGRATION",
    "thp_fault_": "CONFIG_TRANSPARENT_HUGEPAGE",
    "thp_split_": "CONFIG_TRANSPARENT_HUGEPAGE",
    "thp_deferred_": "CONFIG_TRANSPARENT_HUGEPAGE",
    "nr_hugetlb": "CONFIG_HUGETLB_PAGE",
    "cow_ksm": "CONFIG_KSM",
}
"""By how a counter's name begins: the option that it is listed with (include/linux/vm_event_item.h, mmzone.h)."""


def unlisted(kconfig: Kconfig) -> tuple[str, ...]:
    """How the names of counters begin that a kernel of this configuration does not have."""
    return tuple(prefix for prefix, option in _OPTION_OF.items() if not kconfig.IS_ENABLED(option))


Item: TypeAlias = tuple[str, Number]
"""A counter's name, and what it is."""


def counter_lines(kconfig: Kconfig, items: Iterable[Item], arrays: Sequence[Words]) -> CounterText:
    """`name value` lines."""
    absent = unlisted(kconfig)
    listed = [item for item in items if not item[0].startswith(absent)]
    return CounterText("".join([f"{name} %d\n" for name, _ in listed]), [of for _, of in listed], (), arrays)


def alloc_events() -> Events:
    return np.zeros(1, dtype=events_dtype)


def nr_free_pages_blocks(zones: Any) -> int:
    """Free pages in blocks of a pageblock or more that are not isolated (6.18)."""
    sizes = 1 << np.arange(pageblock_order, NR_PAGE_ORDERS)
    blocks = zones["nr_free"][..., pageblock_order:, :MIGRATE_ISOLATE].sum(axis=-1)
    return int((blocks * sizes).sum())


def word(dtype: Any, field: str, index: int = 0) -> int:
    """Which word of a record a field is, or element `index` of it."""
    return int(dtype.fields[field][1]) // 8 + index


BLOCKS = [
    (word(zone_dtype, "nr_free", order * MIGRATE_TYPES + migratetype), 1 << order)
    for order in range(pageblock_order, NR_PAGE_ORDERS)
    for migratetype in range(MIGRATE_ISOLATE)
]
"""The words that nr_free_pages_blocks() adds up, and the size of such a block."""
_FREE_PAGES = word(zone_dtype, "free_pages")
ZONE_ITEMS = [
    *((f"nr_zone_{name}", word(zone_dtype, "nr_lru", lru)) for lru, name in enumerate(_lru_names)),
    ("nr_mlock", word(zone_dtype, "nr_mlock")),
    ("nr_free_cma", word(zone_dtype, "free_cma")),
    *((name, word(zone_dtype, name)) for name in ("numa_hit", "numa_miss", "numa_foreign")),
    # every process runs on its home node, so local is what was hit there
    ("numa_local", word(zone_dtype, "numa_hit")),
    ("numa_other", word(zone_dtype, "numa_miss")),
]
NODE_ITEMS = [
    *((f"nr_{name}", word(node_dtype, "nr_lru", lru), 0) for lru, name in enumerate(_lru_names)),
    *((_in_thp.get(name, name), word(node_dtype, name), pageblock_order * (name in _in_thp)) for name in _node_names),
]
"""Name, word, and how far it is shifted to be shown."""


def zone_items(zones: Words, rows: Sequence[int]) -> Iterator[Item]:
    """Zone counters of /proc/vmstat, node*/vmstat and /proc/zoneinfo, summed over some zones."""
    yield "nr_free_pages", number([zones.at(row, _FREE_PAGES) for row in rows])
    yield "nr_free_pages_blocks", Number([(zones.at(row, at), size) for row in rows for at, size in BLOCKS])
    for name, at in ZONE_ITEMS:
        yield name, number([zones.at(row, at) for row in rows])


def node_items(nodes: Words, nids: Sequence[int]) -> Iterator[Item]:
    for name, at, shift in NODE_ITEMS:
        yield name, number([nodes.at(nid, at) for nid in nids], shift)


def _event_items(mem: Mem, zones: Words, events: Words) -> Iterator[Item]:
    types = mem.zones["type"].tolist()
    for zone_type, name in enumerate(zone_names):
        rows = [row for row, of in enumerate(types) if of == zone_type]
        yield f"pgalloc_{name.lower()}", number([zones.at(row, word(zone_dtype, "pgalloc")) for row in rows])
    for name in allocstall_names:
        yield name, number([events.at(0, word(events_dtype, name))])
    yield "pgfree", number([zones.at(row, word(zone_dtype, "pgfree")) for row in range(len(types))])
    for name in event_names:
        if mem.has_cma or not name.startswith("cma_"):
            yield name, number([events.at(0, word(events_dtype, name))])


_BUDDYINFO = "%6d " * NR_PAGE_ORDERS + "\n"


def _of_order(zones: Words, row: int, order: int) -> list[int]:
    """Where the lengths of a zone's free lists of one order are."""
    return [zones.at(row, word(zone_dtype, "nr_free", order * MIGRATE_TYPES + kind)) for kind in range(MIGRATE_TYPES)]


def populated(zones: Words, present: Iterable[bool]) -> Iterator[tuple[int, bool]]:
    """The conditions of a text in whose form it matters which zones have pages."""
    for row, is_populated in enumerate(present):
        yield zones.at(row, word(zone_dtype, "present")), is_populated


class VmstatFiles(Kobject):
    """Files of /proc that count pages."""

    buddyinfo = Attr(Text(), doc="Free blocks of each zone by order.", kept="memory")
    pagetypeinfo = Attr(
        Text(), mode=0o400, doc="Free blocks by zone, migratetype and order; pageblocks by migratetype.", kept="memory"
    )
    vmstat = Attr(Text(), doc="Page counters and event counters, one `name value` a line.", kept="memory")

    def __init__(self, mem: Mem, events: Events, kconfig: Kconfig) -> None:
        self.mem = mem
        self.events = events
        self.kconfig = kconfig
        self._buddyinfo_now, self._vmstat_now = (
            CounterFile(self._describe_buddyinfo),
            CounterFile(self._describe_vmstat),
        )

    @buddyinfo.counters
    def _buddyinfo(self) -> CounterText:
        return self._buddyinfo_now.now()

    def _describe_buddyinfo(self) -> CounterText:
        words, present = Words(self.mem.zones), (self.mem.zones["present"] > 0).tolist()
        rows = [row for row, is_populated in enumerate(present) if is_populated]
        return CounterText(
            "".join([f"{self._zone(row)} {_BUDDYINFO}" for row in rows]),
            [number(_of_order(words, row, order)) for row in rows for order in range(NR_PAGE_ORDERS)],
            populated(words, present),
            (words,),
        )

    @pagetypeinfo.show
    def _pagetypeinfo(self) -> str:
        head = f"Page block order: {pageblock_order}\nPages per block:  {pageblock_nr_pages}\n\n"
        return head + "".join(self._pagetypes(nid) for nid in range(self.mem.nr_nodes))

    @vmstat.counters
    def _vmstat(self) -> CounterText:
        return self._vmstat_now.now()

    def _describe_vmstat(self) -> CounterText:
        mem = self.mem
        arrays = zones, nodes, events = Words(mem.zones), Words(mem.nodes), Words(self.events)
        items = [
            *zone_items(zones, range(len(mem.zones))),
            *node_items(nodes, range(mem.nr_nodes)),
            *_event_items(mem, zones, events),
        ]
        return counter_lines(self.kconfig, items, arrays)

    def _populated(self, nid: int | None = None) -> Iterator[tuple[int, Any]]:
        for zone, record in enumerate(self.mem.zones):
            if record["present"] and nid in (None, record["node"]):
                yield zone, record

    def _migratetypes(self) -> list[int]:
        """Those that the kernel was built with."""
        return [migratetype for migratetype in range(MIGRATE_TYPES) if self.mem.has_cma or migratetype != MIGRATE_CMA]

    def _zone(self, zone: int) -> str:
        return f"Node {self.mem.zones['node'][zone]}, zone {self.mem.zone_name(zone):>8s}"

    def _pagetypes(self, nid: int) -> str:
        orders = "".join(f"{order:6d} " for order in range(NR_PAGE_ORDERS))
        lines = [f"{'Free pages count per migrate type at order ':<43s} {orders}"]
        for zone, record in self._populated(nid):
            name = self.mem.zone_name(zone)
            for migratetype in self._migratetypes():
                type_name = migratetype_names[migratetype]
                counts = "".join(_capped(nr) for nr in record["nr_free"][:, migratetype])
                lines.append(f"Node {nid:4d}, zone {name:>8s}, type {type_name:>12s} {counts}")
        names = "".join(f"{migratetype_names[migratetype]:>12s} " for migratetype in self._migratetypes())
        lines += ["", f"{'Number of blocks type ':<23s}{names}"]
        for zone, _ in self._populated(nid):
            lines.append(f"{self._zone(zone)} " + "".join(f"{nr:12d} " for nr in self._blocks(zone)))
        return "\n".join(lines) + "\n"

    def _blocks(self, zone: int) -> list[int]:
        """Pageblocks of each type whose first page is in the zone and exists."""
        start, end = (int(self.mem.zones[edge][zone]) for edge in ("start_pfn", "end_pfn"))
        first = np.arange(start & -pageblock_nr_pages, end, pageblock_nr_pages)
        first = np.maximum(first, start)
        exists = self.mem.pages["flags"][first] & np.uint32(PG_nopage) == 0
        types = self.mem.blocks[first[exists] >> pageblock_order]
        nr_blocks = np.bincount(types, minlength=MIGRATE_TYPES)
        return [int(nr_blocks[migratetype]) for migratetype in self._migratetypes()]


def _capped(nr: int) -> str:
    """A free list's length as pagetypeinfo counts it: no further than 100000."""
    return f"{'>' if nr > 100000 else ''}{min(nr, 100000):6d} "
