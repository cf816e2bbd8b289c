# SPDX-License-Identifier: GPL-2.0-only
"""KSM's loops: looking at virtual pages one after the other, and making one page of two (mm/ksm.c).

`rmap_item_dtype` is what ksmd remembers of a virtual page: NONE before it met one there, then in which tree that is, if
in any. `checksum` is that of the last look. A page is merged only where nothing but its mappings holds it: no pin, no
isolation.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory
from kernelsim.huge_memory import split_folio
from kernelsim.jit import njit, u64
from kernelsim.lruvec import put_page
from kernelsim.memory import zap_pte
from kernelsim.mlock import mlock_folio
from kernelsim.mmzone import Blocks, Nodes, Zones
from kernelsim.page import Pages, PG_anon, PG_dirty, PG_isolated, PG_ksm, PG_lru, compound_head
from kernelsim.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_MIGRATION,
    _PAGE_PRESENT,
    _PAGE_RW,
    _PAGE_USER,
    HPAGE_PMD_NR,
    PageTables,
    leaf_pfn,
    mk_pte,
    pte_pfn,
    walk_leaf,
)
from kernelsim.rmap import VM_LOCKED, VM_MLOCKING, Avcs, Mms, Vmas, add_rmap
from kernelsim.tlb import Tlbs, flush_tlb_page
from kernelsim.vmstat import Events

RmapItems: TypeAlias = Any
"""Record array of `rmap_item_dtype`, by the page's place in its VMA."""

rmap_item_dtype = np.dtype(
    [
        ("checksum", np.uint64),
        ("node", np.int32),  # STABLE: number of its stable node
        ("state", np.uint8),
        ("age", np.uint8),  # looks at it, as far as 255
        ("remaining_skips", np.uint8),
        ("unused", np.uint8),
    ]
)
NONE, VOLATILE, UNSTABLE, STABLE = range(4)
MAX_LOOK_PAGES = 1 << 16  # virtual pages that one slice may pass over
_MAX_AGE = 255
_ZERO = np.uint64(0)


@njit
def calc_checksum(memory: Memory, pfn: int) -> Any:
    """FNV-1a's step on the words of a page."""
    checksum = np.uint64(0xCBF29CE484222325)
    for i in range(memory.shape[1]):
        checksum = (checksum ^ memory[pfn, i]) * np.uint64(0x100000001B3)
    return checksum


@njit
def pages_identical(memory: Memory, pfn: int, other: int) -> bool:
    wrong = _ZERO
    for i in range(memory.shape[1]):
        wrong |= memory[pfn, i] ^ memory[other, i]
    return bool(wrong == _ZERO)


@njit
def mapped_page(pages: Pages, vmas: Vmas, pt: PageTables, vma: int, vpn: int) -> int:
    """The page present at a virtual page, or -1."""
    at = walk_leaf(pt, vmas[vma].root, vpn)
    if at < 0 or pt[at] & _PAGE_PRESENT == _ZERO:
        return -1
    return leaf_pfn(pt[at], vpn)


@njit
def is_on_lru(pages: Pages, pfn: int) -> bool:
    """Nobody is about to move the page, or the folio that it is of."""
    return bool(pages[compound_head(pages, pfn)].flags & (PG_lru | PG_isolated) == PG_lru)


@njit
def end_item(items: RmapItems, i: int) -> None:
    """There is no page any more; the next will be met as one never seen."""
    items[i].state = NONE
    items[i].checksum = 0
    items[i].age = 0
    items[i].remaining_skips = 0


@njit
def _skip_age(age: int) -> int:
    """After how many more passes to look again at a page that was looked at so often without being merged."""
    if age <= 3:
        return 1
    if age <= 5:
        return 2
    return 4 if age <= 8 else 8


@njit
def _should_skip(items: RmapItems, i: int) -> bool:
    """smart_scan: what was not merged is looked at less and less (should_skip_rmap_item)."""
    age = int(items[i].age)
    if age < _MAX_AGE:
        items[i].age = age + 1
    if age < 3:
        return False
    if items[i].remaining_skips == 0:
        items[i].remaining_skips = _skip_age(age)
        return False
    items[i].remaining_skips -= 1
    return True


@njit
def _look_at(pages: Pages, memory: Memory, items: RmapItems, i: int, pfn: int, smart: bool) -> tuple[bool, bool]:
    """Look at one anonymous page -> (it was skipped, it may be merged). Its item leaves the unstable tree."""
    head = compound_head(pages, pfn)
    if items[i].state == NONE:
        items[i].state = VOLATILE
    if pages[head].flags & PG_ksm:
        return False, bool(items[i].state != STABLE or items[i].node != pages[head].mapping)
    if items[i].state == UNSTABLE:
        items[i].state = VOLATILE
    if smart and _should_skip(items, i):
        return True, False
    checksum = calc_checksum(memory, pfn)
    changed = items[i].checksum != checksum
    items[i].checksum = checksum
    return False, not changed


@njit
def scan_pages(
    pages: Pages,
    vmas: Vmas,
    pt: PageTables,
    memory: Memory,
    items: RmapItems,
    vma: int,
    vpn: int,
    end: int,
    smart: bool,
    found: NDArray[np.int64],
) -> tuple[int, int, int, int]:
    """Look at the pages of a VMA, at most len(found) of them (scan_get_next_rmap_item, cmp_and_merge_page).

    `found` gets the virtual pages that may be merged, and ~vpn of those whose item is to leave the stable tree: written
    to since, or gone. Returns (vpn reached, pages looked at, pages skipped, how many were found).
    """
    start = vmas[vma].start
    nr = 0
    nr_skipped = 0
    nr_found = 0
    end = min(end, vpn + MAX_LOOK_PAGES)
    while vpn < end and nr < len(found) and nr_found < len(found):
        at = walk_leaf(pt, vmas[vma].root, vpn)
        if at < 0:
            vpn = min((vpn | (HPAGE_PMD_NR - 1)) + 1, end)
            continue
        i = vpn - start
        was_stable = items[i].state == STABLE
        if pt[at] & _PAGE_PRESENT:
            pfn = leaf_pfn(pt[at], vpn)
            skipped, may_merge = _look_at(pages, memory, items, i, pfn, smart)
            nr += not skipped
            nr_skipped += skipped
            if may_merge:
                found[nr_found] = vpn
                nr_found += 1
            elif was_stable and pages[compound_head(pages, pfn)].flags & PG_ksm == 0:
                found[nr_found] = ~vpn
                nr_found += 1
        elif pt[at] & _PAGE_MIGRATION == _ZERO:
            if was_stable:
                found[nr_found] = ~vpn
                nr_found += 1
            else:
                end_item(items, i)
        vpn += 1
    return vpn, nr, nr_skipped, nr_found


@njit
def _write_protect_page(
    pages: Pages, vmas: Vmas, pt: PageTables, tlbs: Tlbs, events: Events, vma: int, vpn: int, at: int
) -> bool:
    """Let nobody write to a single page by this PTE; False if somebody holds it beyond its mappings."""
    pfn = pte_pfn(pt[at])
    if pages[pfn].refcount != pages[pfn].mapcount:
        return False
    if pt[at] & (_PAGE_RW | _PAGE_DIRTY):
        pages[pfn].flags |= PG_dirty if pt[at] & _PAGE_DIRTY else 0
        pt[at] &= ~(_PAGE_RW | _PAGE_DIRTY)
        flush_tlb_page(tlbs, events, vmas[vma].mm, vpn)
    return True


@njit
def _replace_page(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    mms: Mms,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    vma: int,
    vpn: int,
    at: int,
    kpfn: int,
) -> None:
    """Map the KSM page in place of what a PTE maps; what nobody maps any more is freed."""
    old = zap_pte(pages, zones, nodes, vmas, mms, pt, events, vma, at)
    put_page(pages, zones, blocks, nodes, old)
    flush_tlb_page(tlbs, events, vmas[vma].mm, vpn)
    pt[at] = mk_pte(kpfn, _PAGE_PRESENT | _PAGE_USER | _PAGE_ACCESSED)
    add_rmap(pages, zones, nodes, kpfn)
    mms[vmas[vma].mm].rss_anon += 1
    if vmas[vma].flags & VM_LOCKED:
        mlock_folio(pages, zones, nodes, events, kpfn)


@njit
def try_to_merge_one_page(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    vmas: Vmas,
    avcs: Avcs,
    mms: Mms,
    pt: PageTables,
    tlbs: Tlbs,
    events: Events,
    memory: Memory,
    vma: int,
    vpn: int,
    kpfn: int,
) -> bool:
    """Replace the page present at a virtual page by `kpfn`, if it is the same; -1: have it ready to become a KSM page.

    A large folio is split first. False: somebody holds the page, or it is not the same.
    """
    at = walk_leaf(pt, vmas[vma].root, vpn)
    if at < 0 or pt[at] & _PAGE_PRESENT == _ZERO or vmas[vma].flags & VM_MLOCKING:
        return False
    head = compound_head(pages, leaf_pfn(pt[at], vpn))
    if not is_on_lru(pages, head) or pages[head].flags & PG_anon == 0:
        return False
    if pages[head].order > 0:
        if split_folio(pages, zones, blocks, nodes, vmas, avcs, pt, events, head):
            return False
        at = walk_leaf(pt, vmas[vma].root, vpn)
    if not _write_protect_page(pages, vmas, pt, tlbs, events, vma, vpn, at):
        return False
    if kpfn < 0:
        pages[pte_pfn(pt[at])].flags |= PG_dirty
    elif pages_identical(memory, pte_pfn(pt[at]), kpfn):
        _replace_page(pages, zones, blocks, nodes, vmas, mms, pt, tlbs, events, vma, vpn, at, kpfn)
    else:
        return False
    return True


@njit
def ksm_pages_of(
    pages: Pages, vmas: Vmas, pt: PageTables, vma: int, vpn: int, end: int, found: NDArray[np.int64]
) -> tuple[int, int]:
    """Find the virtual pages that map KSM pages, those on the move too -> (vpn reached, how many)."""
    nr = 0
    end = min(end, vpn + MAX_LOOK_PAGES)
    while vpn < end and nr < len(found):
        at = walk_leaf(pt, vmas[vma].root, vpn)
        if at < 0:
            vpn = min((vpn | (HPAGE_PMD_NR - 1)) + 1, end)
            continue
        entry = u64(pt[at])
        if entry & (_PAGE_PRESENT | _PAGE_MIGRATION) and pages[pte_pfn(entry)].flags & PG_ksm:
            found[nr] = vpn
            nr += 1
        vpn += 1
    return vpn, nr
