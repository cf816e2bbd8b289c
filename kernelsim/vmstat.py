# SPDX-License-Identifier: GPL-2.0-only
"""Event counters: what happened since boot, by the kernel's names and in /proc/vmstat's order.

One record, `events[0].pgfault`, shared with the hot loops. pgalloc_* and pgfree are kept per zone (mmzone.py) and
added up when shown. The dpu_* events are this project's own and come last.
"""

from typing import Any, TypeAlias

import numpy as np

Events: TypeAlias = Any
"""Record array [1] of `events_dtype`."""

event_names = (
    "pgactivate",
    "pgfault",
    "pgmajfault",
    "pgmigrate_success",
    "pgmigrate_fail",
    "compact_isolated",
    "htlb_buddy_alloc_success",
    "htlb_buddy_alloc_fail",
    "unevictable_pgs_mlocked",
    "unevictable_pgs_munlocked",
    "nr_tlb_remote_flush",
    "nr_tlb_local_flush_all",
    "nr_tlb_local_flush_one",
    "dpu_compact_regions",
    "dpu_compact_pages_moved",
    "dpu_compact_ptes_updated",
    "dpu_compact_fallback",
    "dpu_compact_fail",
)

events_dtype = np.dtype([(name, np.int64) for name in event_names])


def alloc_events() -> Events:
    return np.zeros(1, dtype=events_dtype)
