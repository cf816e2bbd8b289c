# SPDX-License-Identifier: GPL-2.0-only
"""Locked pages (mm/mlock.c): mapped by a VM_LOCKED VMA, and therefore on the unevictable list.

`mlock_count` counts such mappings of a folio (by PTE or PMD), so that it becomes evictable with the last of them.

A large range is counted slice by slice. Meanwhile its VMA has VM_MLOCKING, and no folio of its is split, which counts
the locks of each page anew from the VMAs' flags.

Difference from Linux: a large folio that a VM_LOCKED VMA maps only in part is locked too.
"""

import numpy as np

from kernelsim.jit import njit
from kernelsim.lruvec import lruvec_add_folio, lruvec_del_folio
from kernelsim.mmzone import Nodes, Zones
from kernelsim.page import Pages, PG_lru, PG_mlocked, PG_unevictable, compound_head
from kernelsim.pgtable import _PAGE_MIGRATION, _PAGE_PRESENT, PageTables, next_leaf, pte_pfn, walk_leaf
from kernelsim.rmap import Vmas
from kernelsim.vmstat import Events


@njit
def mlock_folio(pages: Pages, zones: Zones, nodes: Nodes, events: Events, pfn: int) -> None:
    """One more VM_LOCKED mapping; the first makes the page unevictable."""
    pages[pfn].mlock_count += 1
    if pages[pfn].flags & PG_mlocked == 0:
        on_lru = pages[pfn].flags & PG_lru
        if on_lru:
            lruvec_del_folio(pages, zones, nodes, pfn)
        pages[pfn].flags |= PG_mlocked | PG_unevictable
        if on_lru:
            lruvec_add_folio(pages, zones, nodes, pfn)
        zones[pages[pfn].zone].nr_mlock += 1 << pages[pfn].order
        events[0].unevictable_pgs_mlocked += 1 << pages[pfn].order


@njit
def munlock_folio(pages: Pages, zones: Zones, nodes: Nodes, events: Events, pfn: int) -> None:
    """One VM_LOCKED mapping less; the last makes the page evictable again."""
    pages[pfn].mlock_count -= 1
    if pages[pfn].mlock_count == 0:
        on_lru = pages[pfn].flags & PG_lru
        if on_lru:
            lruvec_del_folio(pages, zones, nodes, pfn)
        pages[pfn].flags &= ~(PG_mlocked | PG_unevictable)
        if on_lru:
            lruvec_add_folio(pages, zones, nodes, pfn)
        zones[pages[pfn].zone].nr_mlock -= 1 << pages[pfn].order
        events[0].unevictable_pgs_munlocked += 1 << pages[pfn].order


@njit
def mlock_pages(
    pages: Pages,
    zones: Zones,
    nodes: Nodes,
    vmas: Vmas,
    pt: PageTables,
    events: Events,
    vma: int,
    vpn: int,
    end: int,
    lock: bool,
) -> None:
    """Account the pages at vpn .. end-1 of a VMA, those on the move included, to or from a change of VM_LOCKED.

    No huge page lies across the ends of the range.
    """
    while vpn < end:
        at = walk_leaf(pt, vmas[vma].root, vpn)
        entry = pt[at] if at >= 0 else np.uint64(0)
        if entry & (_PAGE_PRESENT | _PAGE_MIGRATION):
            head = compound_head(pages, pte_pfn(entry))
            if lock:
                mlock_folio(pages, zones, nodes, events, head)
            else:
                munlock_folio(pages, zones, nodes, events, head)
        vpn = next_leaf(entry, vpn)
