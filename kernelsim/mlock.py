# SPDX-License-Identifier: GPL-2.0-only
"""Locked pages (mm/mlock.c): mapped by a VM_LOCKED VMA, and therefore on the unevictable list.

`mlock_count` counts such mappings of a page, so that the page becomes evictable with the last of them.
"""

from kernelsim.jit import njit
from kernelsim.lruvec import lruvec_add_folio, lruvec_del_folio
from kernelsim.mmzone import Nodes, Zones
from kernelsim.page import Pages, PG_lru, PG_mlocked, PG_unevictable
from kernelsim.pgtable import _PAGE_PRESENT, PageTables, pte_pfn, walk_pte
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
        zones[pages[pfn].zone].nr_mlock += 1
        events[0].unevictable_pgs_mlocked += 1


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
        zones[pages[pfn].zone].nr_mlock -= 1
        events[0].unevictable_pgs_munlocked += 1


@njit
def mlock_pages(
    pages: Pages, zones: Zones, nodes: Nodes, vmas: Vmas, pt: PageTables, events: Events, vma: int, lock: bool
) -> None:
    """Account a VMA's present pages to, or from, a change of VM_LOCKED."""
    for vpn in range(vmas[vma].start, vmas[vma].end):
        ptep = walk_pte(pt, vmas[vma].root, vpn)
        if ptep >= 0 and pt[ptep] & _PAGE_PRESENT:
            if lock:
                mlock_folio(pages, zones, nodes, events, pte_pfn(pt[ptep]))
            else:
                munlock_folio(pages, zones, nodes, events, pte_pfn(pt[ptep]))
