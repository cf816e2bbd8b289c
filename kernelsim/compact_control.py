# SPDX-License-Identifier: GPL-2.0-only
"""struct compact_control: one compaction run of one zone, as the compiled loops take it (mm/internal.h)."""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory
from kernelsim.mm_types import Vm
from kernelsim.mmzone import Blocks, Nodes, Pagesets, Zones, pageblock_nr_pages
from kernelsim.page import Pages
from kernelsim.pgtable import PageTables
from kernelsim.rmap import Avcs, Vmas
from kernelsim.tlb import Tlbs
from kernelsim.vmstat import Events

(
    COMPACT_NOT_SUITABLE_ZONE,
    COMPACT_SKIPPED,
    COMPACT_DEFERRED,
    COMPACT_NO_SUITABLE_PAGE,
    COMPACT_CONTINUE,
    COMPACT_COMPLETE,
    COMPACT_PARTIAL_SKIPPED,
    COMPACT_CONTENDED,
    COMPACT_SUCCESS,
) = range(9)

MIGRATE_ASYNC, MIGRATE_SYNC_LIGHT, MIGRATE_SYNC = range(3)

COMPACT_CLUSTER_MAX = 32
MAX_MIGRATE_PAGES = 2 * pageblock_nr_pages
"""Room for what is isolated at once: at most the rest of one pageblock on top of a cluster."""

CompactControl: TypeAlias = Any
"""Record array [1] of `compact_control_dtype`."""

_FIELDS = (
    "zone",
    "order",  # -1: asked for by hand or proactive, compact everything
    "migratetype",  # of the request
    "mode",
    "highest_type",
    "may_enter_fs",  # __GFP_FS: pages with a mapping may be moved
    "unevictable_allowed",
    "whole_zone",
    "ignore_skip_hint",
    "ignore_block_suitable",
    "direct_compaction",
    "kcompactd",
    "proactive_mark",  # stop at this fragmentation score; -1 for no
    "blocks_mark",  # defrag_mode: stop when so many pages are free in whole pageblocks; -1 for no
    "cpu",  # where its pages are freed
    # state
    "migrate_pfn",
    "free_pfn",
    "fast_start_pfn",
    "fast_search_fail",
    "search_order",
    "nr_src",  # folios in src
    "nr_migratepages",
    "nr_freepages",
    "finish_pageblock",
    "update_cached",
    "last_migrated_pfn",
    "total_migrate_scanned",
    "total_free_scanned",
    "nr_succeeded",
    "nr_failed",
    "capture_wanted",
    "captured",  # the page caught for the request, or -1
)
compact_control_dtype = np.dtype([(name, np.int64) for name in _FIELDS])


class VmArrays(NamedTuple):
    """Everything that moving pages touches, in one argument."""

    pages: Pages
    zones: Zones
    blocks: Blocks
    skip: Blocks
    nodes: Nodes
    pagesets: Pagesets
    vmas: Vmas
    avcs: Avcs
    pt: PageTables
    tlbs: Tlbs
    events: Events
    memory: Memory
    i_pages: NDArray[np.int64]
    touched: NDArray[np.uint8]
    src: NDArray[np.int64]
    """int64[MAX_MIGRATE_PAGES]: isolated folios, the last isolated last; nr_migratepages counts their pages."""
    dst: NDArray[np.int64]
    """int64[MAX_MIGRATE_PAGES]: scratch of migrate_pages()."""


def vm_arrays(vm: Vm, src: NDArray[np.int64], dst: NDArray[np.int64]) -> VmArrays:
    """The arrays as they are now; tables may be replaced by larger ones whenever other work runs."""
    mem = vm.mem
    return VmArrays(
        mem.pages,
        mem.zones,
        mem.blocks,
        mem.skip,
        mem.nodes,
        mem.pagesets,
        vm.vmas,
        vm.avcs,
        vm.pt,
        vm.tlbs,
        vm.events,
        vm.memory,
        vm.i_pages,
        vm.touched(),
        src,
        dst,
    )
