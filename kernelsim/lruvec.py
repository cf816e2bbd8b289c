# SPDX-License-Identifier: GPL-2.0-only
"""LRU lists: five for each node, and who is on which.

A page with PG_lru is on exactly the list that its flags name (unevictable, else anon or file, active or inactive); the
node's nr_lru counts the pages of each, and its zones' nr_lru where they lie. A large folio is linked by its head and
counts whole. A page taken off for migration has PG_isolated instead, one more reference, and counts as nr_isolated_anon
or nr_isolated_file.

Differences from Linux: no per-CPU add batches (a page is on its list at once) and no memory cgroups. As on Linux, anon
means swap-backed here.
"""

from kernelsim.jit import njit
from kernelsim.list_head import list_add, list_del
from kernelsim.mmzone import (
    LRU_INACTIVE_ANON,
    LRU_INACTIVE_FILE,
    LRU_UNEVICTABLE,
    MIGRATE_TYPES,
    NR_LRU_LISTS,
    NR_PAGE_ORDERS,
    Blocks,
    Nodes,
    Zones,
)
from kernelsim.page import (
    Pages,
    PG_active,
    PG_isolated,
    PG_lru,
    PG_mlocked,
    PG_referenced,
    PG_swapbacked,
    PG_unevictable,
)
from kernelsim.page_alloc import free_pages
from kernelsim.vmstat import Events


@njit
def folio_lru_list(flags: int) -> int:
    """The list a page with these flags belongs on."""
    if flags & PG_unevictable:
        return LRU_UNEVICTABLE
    base = LRU_INACTIVE_ANON if flags & PG_swapbacked else LRU_INACTIVE_FILE
    return base + 1 if flags & PG_active else base


@njit
def lru_head(pages: Pages, zones: Zones, nid: int, lru: int) -> int:
    """Slot of a list's head; LRU heads come before (below) the free lists' heads."""
    return len(pages) - 1 - (len(zones) * NR_PAGE_ORDERS * MIGRATE_TYPES + nid * NR_LRU_LISTS + lru)


@njit
def lruvec_add_folio(pages: Pages, zones: Zones, nodes: Nodes, pfn: int) -> None:
    """Put a page at the front of the list its flags name."""
    nid = zones[pages[pfn].zone].node
    pages[pfn].flags |= PG_lru
    lru = folio_lru_list(pages[pfn].flags)
    list_add(pages, pfn, lru_head(pages, zones, nid, lru))
    nodes[nid].nr_lru[lru] += 1 << pages[pfn].order
    zones[pages[pfn].zone].nr_lru[lru] += 1 << pages[pfn].order


@njit
def lruvec_del_folio(pages: Pages, zones: Zones, nodes: Nodes, pfn: int) -> None:
    nid = zones[pages[pfn].zone].node
    list_del(pages, pfn)
    lru = folio_lru_list(pages[pfn].flags)
    nodes[nid].nr_lru[lru] -= 1 << pages[pfn].order
    zones[pages[pfn].zone].nr_lru[lru] -= 1 << pages[pfn].order
    pages[pfn].flags &= ~PG_lru


@njit
def folio_isolate_lru(pages: Pages, zones: Zones, nodes: Nodes, pfn: int) -> None:
    """Take a page off its list for migration, with a reference of the isolator's own."""
    lruvec_del_folio(pages, zones, nodes, pfn)
    pages[pfn].flags |= PG_isolated
    pages[pfn].refcount += 1
    mod_nr_isolated(pages, zones, nodes, pfn, 1)


@njit
def folio_putback_lru(pages: Pages, zones: Zones, nodes: Nodes, pfn: int) -> None:
    """Undo folio_isolate_lru(), except that the caller deals with a refcount that drops to 0."""
    mod_nr_isolated(pages, zones, nodes, pfn, -1)
    pages[pfn].flags &= ~PG_isolated
    pages[pfn].refcount -= 1
    lruvec_add_folio(pages, zones, nodes, pfn)


@njit
def mod_nr_isolated(pages: Pages, zones: Zones, nodes: Nodes, pfn: int, change: int) -> None:
    """Count a folio that was isolated (1) or is no longer (-1), in pages."""
    nid = zones[pages[pfn].zone].node
    change <<= pages[pfn].order
    if pages[pfn].flags & PG_swapbacked:
        nodes[nid].nr_isolated_anon += change
    else:
        nodes[nid].nr_isolated_file += change


@njit
def folio_mark_accessed(pages: Pages, zones: Zones, nodes: Nodes, events: Events, pfn: int) -> None:
    """Second touch of an inactive page activates it; the first only marks it (mm/swap.c)."""
    from_flags = pages[pfn].flags
    if from_flags & PG_referenced == 0:
        pages[pfn].flags |= PG_referenced
    elif from_flags & PG_lru and from_flags & (PG_active | PG_unevictable) == 0:
        lruvec_del_folio(pages, zones, nodes, pfn)
        pages[pfn].flags = (pages[pfn].flags | PG_active) & ~PG_referenced
        lruvec_add_folio(pages, zones, nodes, pfn)
        events[0].pgactivate += 1


@njit
def put_page(pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pfn: int) -> None:
    """Free a folio whose refcount has dropped to 0; do nothing otherwise. `pfn` is its head."""
    if pages[pfn].refcount == 0:
        order = pages[pfn].order
        if pages[pfn].flags & PG_lru:
            lruvec_del_folio(pages, zones, nodes, pfn)
        if pages[pfn].flags & PG_mlocked:  # an imported page whose VM_LOCKED mapping was not captured
            zones[pages[pfn].zone].nr_mlock -= 1 << order
        free_pages(pages, zones, blocks, pfn, order)
