# SPDX-License-Identifier: GPL-2.0-only
"""Every trace event of this kernel.

Fields and print formats of compaction, migrate and kmem are those of a 6.18 kernel's `format` files; events that
nothing here could ever fire are left out. `dpu` is this project's own system: what DPU compaction does, region by
region.

Differences from Linux: a page is shown at the address that its struct page would have, not as a hash of it; flag masks
are written as hexadecimal numbers in `format`, not as the C expressions behind them. IDs are far above those that a
real kernel gives out one by one: perf_event_open(2) takes them to the real kernel, which then knows no such event,
where a low ID would count whatever real event has it.
"""

from collections.abc import Mapping

from kernelsim import trace_key
from kernelsim.gfp import format_gfp, gfp_names
from kernelsim.tracepoint import Expr, Flags, Symbolic, TraceEvent

VMEMMAP_START = 0xFFFFEA0000000000
_STRUCT_PAGE_BYTES = 64
_FIRST_ID = 0x8000
NO_PFN = -1

_ZONES = ((0, "DMA"), (1, "DMA32"), (2, "Normal"), (3, "Movable"))
_RESULTS = (
    (1, "skipped"),
    (2, "deferred"),
    (4, "continue"),
    (8, "success"),
    (6, "partial_skipped"),
    (5, "complete"),
    (3, "no_suitable_page"),
    (0, "not_suitable_zone"),
    (7, "contended"),
)
_MODES = ((0, "MIGRATE_ASYNC"), (1, "MIGRATE_SYNC_LIGHT"), (2, "MIGRATE_SYNC"))
_REASONS = (
    (0, "compaction"),
    (1, "memory_failure"),
    (2, "memory_hotplug"),
    (3, "syscall_or_cpuset"),
    (4, "mempolicy_mbind"),
    (5, "numa_misplaced"),
    (6, "contig_range"),
    (7, "longterm_pin"),
    (8, "demotion"),
    (9, "damon"),
)
_PAGEBLOCK_ORDER = 9
_C_PAGEBLOCK_ORDER = (
    "(((unsigned int)((21 - 12))) < ((unsigned int)(10)) ? ((unsigned int)((21 - 12))) : ((unsigned int)(10)))"
)


def page_address(pfn: int) -> int:
    """Where the struct page of a page frame would be; 0 for none."""
    return 0 if pfn == NO_PFN else VMEMMAP_START + pfn * _STRUCT_PAGE_BYTES


_C_PAGE = "(((struct page *)vmemmap_base) + (REC->pfn))"
_page = Expr(_C_PAGE, page_address, ("pfn",))
_page_or_null = Expr(f"REC->pfn != -1UL ? {_C_PAGE} : ((void *)0)", page_address, ("pfn",))
_pfn_or_0 = Expr("REC->pfn != -1UL ? REC->pfn : 0", lambda pfn: max(pfn, 0), ("pfn",))
_sync = Expr('REC->sync ? "sync" : "async"', lambda sync: "sync" if sync else "async", ("sync",))
_limit = Expr("1UL << REC->defer_shift", lambda shift: 1 << shift, ("defer_shift",))
_zone = Symbolic("idx", _ZONES)


# compaction

_ZONE_SPAN = "unsigned long zone_start; unsigned long migrate_pfn; unsigned long free_pfn; unsigned long zone_end"
_ZONE_SPAN_ARGS = ("zone_start", "migrate_pfn", "free_pfn", "zone_end")
_RANGE = "unsigned long start_pfn; unsigned long end_pfn; unsigned long nr_scanned; unsigned long nr_taken"


def _isolate(name: str, key: int) -> TraceEvent:
    fmt = "range=(0x%lx ~ 0x%lx) nr_scanned=%lu nr_taken=%lu"
    return TraceEvent("compaction", name, _RANGE, fmt, "start_pfn", "end_pfn", "nr_scanned", "nr_taken", key=key)


def _suitable(name: str, key: int = 0) -> TraceEvent:
    fields, fmt = "int nid; enum zone_type idx; int order; int ret", "node=%d zone=%-8s order=%d ret=%s"
    return TraceEvent("compaction", name, fields, fmt, "nid", _zone, "order", Symbolic("ret", _RESULTS), key=key)


def _defer(name: str) -> TraceEvent:
    return TraceEvent(
        "compaction",
        name,
        "int nid; enum zone_type idx; int order; unsigned int considered; unsigned int defer_shift; int order_failed",
        "node=%d zone=%-8s order=%d order_failed=%d consider=%u limit=%lu",
        *("nid", _zone, "order", "order_failed", "considered", _limit),
    )


def _kcompactd(name: str) -> TraceEvent:
    fields, fmt = "int nid; int order; enum zone_type highest_zoneidx", "nid=%d order=%d classzone_idx=%-8s"
    return TraceEvent("compaction", name, fields, fmt, "nid", "order", Symbolic("highest_zoneidx", _ZONES))


mm_compaction_isolate_migratepages = _isolate(
    "mm_compaction_isolate_migratepages", trace_key.MM_COMPACTION_ISOLATE_MIGRATEPAGES
)
mm_compaction_isolate_freepages = _isolate("mm_compaction_isolate_freepages", trace_key.MM_COMPACTION_ISOLATE_FREEPAGES)
mm_compaction_fast_isolate_freepages = _isolate(
    "mm_compaction_fast_isolate_freepages", trace_key.MM_COMPACTION_FAST_ISOLATE_FREEPAGES
)
mm_compaction_migratepages = TraceEvent(
    "compaction",
    "mm_compaction_migratepages",
    "unsigned long nr_migrated; unsigned long nr_failed",
    "nr_migrated=%lu nr_failed=%lu",
    *("nr_migrated", "nr_failed"),
    key=trace_key.MM_COMPACTION_MIGRATEPAGES,
)
mm_compaction_begin = TraceEvent(
    "compaction",
    "mm_compaction_begin",
    f"{_ZONE_SPAN}; bool sync",
    "zone_start=0x%lx migrate_pfn=0x%lx free_pfn=0x%lx zone_end=0x%lx, mode=%s",
    *(*_ZONE_SPAN_ARGS, _sync),
)
mm_compaction_end = TraceEvent(
    "compaction",
    "mm_compaction_end",
    f"{_ZONE_SPAN}; bool sync; int status",
    "zone_start=0x%lx migrate_pfn=0x%lx free_pfn=0x%lx zone_end=0x%lx, mode=%s status=%s",
    *(*_ZONE_SPAN_ARGS, _sync, Symbolic("status", _RESULTS)),
)
mm_compaction_try_to_compact_pages = TraceEvent(
    "compaction",
    "mm_compaction_try_to_compact_pages",
    "int order; unsigned long gfp_mask; int prio",
    "order=%d gfp_mask=%s priority=%d",
    *("order", Flags("gfp_mask", gfp_names, format_gfp), "prio"),
)
mm_compaction_finished = _suitable("mm_compaction_finished", trace_key.MM_COMPACTION_FINISHED)
mm_compaction_suitable = _suitable("mm_compaction_suitable")
mm_compaction_deferred = _defer("mm_compaction_deferred")
mm_compaction_defer_compaction = _defer("mm_compaction_defer_compaction")
mm_compaction_defer_reset = _defer("mm_compaction_defer_reset")
mm_compaction_kcompactd_sleep = TraceEvent("compaction", "mm_compaction_kcompactd_sleep", "int nid", "nid=%d", "nid")
mm_compaction_wakeup_kcompactd = _kcompactd("mm_compaction_wakeup_kcompactd")
mm_compaction_kcompactd_wake = _kcompactd("mm_compaction_kcompactd_wake")


# migrate

_mode, _reason = Symbolic("mode", _MODES), Symbolic("reason", _REASONS)
_PTE = ("unsigned long addr; unsigned long pte; int order", "addr=%lx, pte=%lx order=%d", "addr", "pte", "order")

mm_migrate_pages = TraceEvent(
    "migrate",
    "mm_migrate_pages",
    "unsigned long succeeded; unsigned long failed; unsigned long thp_succeeded; unsigned long thp_failed; "
    "unsigned long thp_split; unsigned long large_folio_split; enum migrate_mode mode; int reason",
    "nr_succeeded=%lu nr_failed=%lu nr_thp_succeeded=%lu nr_thp_failed=%lu nr_thp_split=%lu nr_split=%lu "
    "mode=%s reason=%s",
    *("succeeded", "failed", "thp_succeeded", "thp_failed", "thp_split", "large_folio_split", _mode, _reason),
    key=trace_key.MM_MIGRATE_PAGES,
)
mm_migrate_pages_start = TraceEvent(
    "migrate",
    "mm_migrate_pages_start",
    "enum migrate_mode mode; int reason",
    "mode=%s reason=%s",
    *(_mode, _reason),
    key=trace_key.MM_MIGRATE_PAGES_START,
)
set_migration_pte = TraceEvent("migrate", "set_migration_pte", *_PTE, key=trace_key.SET_MIGRATION_PTE)
remove_migration_pte = TraceEvent("migrate", "remove_migration_pte", *_PTE, key=trace_key.REMOVE_MIGRATION_PTE)


# kmem

mm_page_alloc = TraceEvent(
    "kmem",
    "mm_page_alloc",
    "unsigned long pfn; unsigned int order; unsigned long gfp_flags; int migratetype",
    "page=%p pfn=0x%lx order=%d migratetype=%d gfp_flags=%s",
    *(_page_or_null, _pfn_or_0, "order", "migratetype", Flags("gfp_flags", gfp_names, format_gfp)),
    key=trace_key.MM_PAGE_ALLOC,
)
mm_page_free = TraceEvent(
    "kmem",
    "mm_page_free",
    "unsigned long pfn; unsigned int order",
    "page=%p pfn=0x%lx order=%d",
    *(_page, "pfn", "order"),
    key=trace_key.MM_PAGE_FREE,
)
mm_page_alloc_zone_locked = TraceEvent(
    "kmem",
    "mm_page_alloc_zone_locked",
    "unsigned long pfn; unsigned int order; int migratetype; int percpu_refill",
    "page=%p pfn=0x%lx order=%u migratetype=%d percpu_refill=%d",
    *(_page_or_null, _pfn_or_0, "order", "migratetype", "percpu_refill"),
    key=trace_key.MM_PAGE_ALLOC_ZONE_LOCKED,
)
mm_page_pcpu_drain = TraceEvent(
    "kmem",
    "mm_page_pcpu_drain",
    "unsigned long pfn; unsigned int order; int migratetype",
    "page=%p pfn=0x%lx order=%d migratetype=%d",
    *(_page, "pfn", "order", "migratetype"),
    key=trace_key.MM_PAGE_PCPU_DRAIN,
)
mm_page_alloc_extfrag = TraceEvent(
    "kmem",
    "mm_page_alloc_extfrag",
    "unsigned long pfn; int alloc_order; int fallback_order; int alloc_migratetype; int fallback_migratetype; "
    "int change_ownership",
    "page=%p pfn=0x%lx alloc_order=%d fallback_order=%d pageblock_order=%d alloc_migratetype=%d "
    "fallback_migratetype=%d fragmenting=%d change_ownership=%d",
    *(_page, "pfn", "alloc_order", "fallback_order"),
    Expr(_C_PAGEBLOCK_ORDER, lambda: _PAGEBLOCK_ORDER, ()),
    *("alloc_migratetype", "fallback_migratetype"),
    Expr(f"REC->fallback_order < {_C_PAGEBLOCK_ORDER}", lambda order: order < _PAGEBLOCK_ORDER, ("fallback_order",)),
    "change_ownership",
    key=trace_key.MM_PAGE_ALLOC_EXTFRAG,
)


# dpu

_ENGINE = "__data_loc char[] engine"

dpu_compact_begin = TraceEvent(
    "dpu",
    "dpu_compact_begin",
    f"int nid; enum zone_type idx; int region_order; {_ENGINE}",
    "node=%d zone=%-8s region_order=%d engine=%s",
    *("nid", _zone, "region_order", "engine"),
)
dpu_compact_end = TraceEvent(
    "dpu",
    "dpu_compact_end",
    "int nid; enum zone_type idx; unsigned long nr_moved; long huge_pages_gained",
    "node=%d zone=%-8s nr_moved=%lu huge_pages_gained=%ld",
    *("nid", _zone, "nr_moved", "huge_pages_gained"),
)
dpu_compact_region = TraceEvent(
    "dpu",
    "dpu_compact_region",
    f"unsigned long base_pfn; unsigned long end_pfn; unsigned long nr_movable; bool batch; {_ENGINE}",
    "range=(0x%lx ~ 0x%lx) nr_movable=%lu path=%s engine=%s",
    *("base_pfn", "end_pfn", "nr_movable"),
    Expr('REC->batch ? "batch" : "cpu"', lambda batch: "batch" if batch else "cpu", ("batch",)),
    "engine",
)
dpu_compact_isolated = TraceEvent(
    "dpu",
    "dpu_compact_isolated",
    "unsigned long base_pfn; unsigned long nr_fragments; unsigned long nr_pages; unsigned long nr_flushes",
    "base_pfn=0x%lx nr_fragments=%lu nr_pages=%lu nr_flushes=%lu",
    *("base_pfn", "nr_fragments", "nr_pages", "nr_flushes"),
)
dpu_batch_submit = TraceEvent(
    "dpu",
    "dpu_batch_submit",
    "unsigned long base_addr; unsigned long nr_fragments; unsigned long nr_skip_runs; int nr_in_flight",
    "base=0x%lx nr_fragments=%lu nr_skip_runs=%lu in_flight=%d",
    *("base_addr", "nr_fragments", "nr_skip_runs", "nr_in_flight"),
)
dpu_batch_complete = TraceEvent(
    "dpu",
    "dpu_batch_complete",
    "unsigned long base_addr; unsigned long nr_retired; unsigned long nr_fragments; unsigned long device_ns; "
    "unsigned long wall_ns; __data_loc char[] error",
    "base=0x%lx nr_retired=%lu nr_fragments=%lu device_ns=%lu wall_ns=%lu error=%s",
    *("base_addr", "nr_retired", "nr_fragments", "device_ns", "wall_ns", "error"),
)
dpu_compact_updated = TraceEvent(
    "dpu",
    "dpu_compact_updated",
    "unsigned long base_pfn; unsigned long nr_moved; unsigned long nr_ptes; unsigned long update_ns",
    "base_pfn=0x%lx nr_moved=%lu nr_ptes=%lu update_ns=%lu",
    *("base_pfn", "nr_moved", "nr_ptes", "update_ns"),
)
dpu_compact_fallback = TraceEvent(
    "dpu",
    "dpu_compact_fallback",
    "unsigned long base_pfn; unsigned long end_pfn; unsigned long nr_pages",
    "range=(0x%lx ~ 0x%lx) nr_pages=%lu",
    *("base_pfn", "end_pfn", "nr_pages"),
)


# ftrace's own records; they cannot be switched

function = TraceEvent(
    "ftrace",
    "function",
    "unsigned long ip; unsigned long parent_ip; unsigned long[] args",
    " %ps <-- %ps",
    Expr("(void *)REC->ip", str, ("ip",)),
    Expr("(void *)REC->parent_ip", str, ("parent_ip",)),
    number=1,
)
print_ = TraceEvent(
    "ftrace",
    "print",
    "unsigned long ip; char[] buf",
    "%ps: %s",
    Expr("(void *)REC->ip", str, ("ip",)),
    "buf",
    number=5,
)
funcgraph_exit = TraceEvent(
    "ftrace",
    "funcgraph_exit",
    "unsigned long func; unsigned int depth; unsigned int overrun; unsigned long long calltime; "
    "unsigned long long rettime",
    "<-- %ps (%u) (start: %llx  end: %llx) over: %u",
    Expr("(void *)REC->func", str, ("func",)),
    *("depth", "calltime", "rettime", "depth"),
    number=10,
)
funcgraph_entry = TraceEvent(
    "ftrace",
    "funcgraph_entry",
    "unsigned long func; unsigned int depth; unsigned long[] args",
    "--> %ps (%u)",
    Expr("(void *)REC->func", str, ("func",)),
    "depth",
    number=11,
)

FTRACE_EVENTS = (function, print_, funcgraph_entry, funcgraph_exit)
EVENTS: tuple[TraceEvent, ...] = tuple(
    event for event in list(globals().values()) if isinstance(event, TraceEvent) and event.system != "ftrace"
)
"""Those that can be switched, in the order in which they stand here."""
for _number, _event in enumerate(EVENTS, _FIRST_ID):
    _event.id = _number

BY_KEY: Mapping[int, TraceEvent] = {event.key: event for event in EVENTS if event.key}
SYSTEMS: Mapping[str, tuple[TraceEvent, ...]] = {
    system: tuple(event for event in EVENTS if event.system == system)
    for system in dict.fromkeys(event.system for event in EVENTS)
}
