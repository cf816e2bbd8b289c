# SPDX-License-Identifier: GPL-2.0-only
"""CONFIG_DEBUG_VM: every invariant of the emulated kernel, checked from the outside.

`check(vm)` derives each count and each link a second time from the lowest level (free lists, LRU lists, page tables,
page cache, TLBs) and compares it with what the rest of the kernel believes. It changes nothing. It may be called at any
point where an operation yields, also with batches in flight. Free memory has a module of its own, debug_free.py.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, page_holds
from kernelsim.debug_free import Report, check_free_memory, count
from kernelsim.jit import njit, njit_alloc
from kernelsim.lruvec import folio_lru_list, lru_head
from kernelsim.mm_types import Vm
from kernelsim.mmzone import (
    MIGRATE_CMA,
    MIGRATE_ISOLATE,
    NR_LRU_LISTS,
    Mem,
    Zones,
    pageblock_order,
)
from kernelsim.page import (
    GUP_PIN_BIAS,
    Pages,
    PG_anon,
    PG_head,
    PG_huge,
    PG_isolated,
    PG_ksm,
    PG_lru,
    PG_mlocked,
    PG_nopage,
    PG_partially_mapped,
    PG_private,
    PG_swapbacked,
    PG_table,
    PG_tail,
    PG_thp,
    compound_head,
)
from kernelsim.pgtable import (
    _PAGE_MIGRATION,
    _PAGE_PRESENT,
    _PAGE_PSE,
    _PAGE_RW,
    HPAGE_PMD_NR,
    PTRS_PER_PT,
    PageTables,
    leaf_pfn,
    pte_pfn,
    walk_leaf,
)
from kernelsim.rmap import VM_SHARED, Avcs, Vmas, first_chain, next_chain, vma_address
from kernelsim.tlb import TLB_ENTRIES, Tlbs

_ZERO = np.uint64(0)
_MOVABLE_KINDS = PG_lru | PG_isolated | PG_huge
MAPCOUNT, ENTIRE, HERE = range(3)  # columns of `maps`: entries that map the folio, PMD entries among them, of this page


@njit
def _walk_lru_lists(
    pages: Pages, zones: Zones, nr_nodes: int, nr_lru: NDArray[np.int64], nr_lru_pages: NDArray[np.int64]
) -> int:
    """Count each zone's pages on each LRU list; returns the first page that is on a wrong one, or -1."""
    for nid in range(nr_nodes):
        for lru in range(NR_LRU_LISTS):
            head = lru_head(pages, zones, nid, lru)
            pfn = pages[head].next
            before = head
            while pfn != head:
                flags = pages[pfn].flags
                right = flags & PG_lru and flags & PG_isolated == 0 and folio_lru_list(flags) == lru
                if not right or zones[pages[pfn].zone].node != nid or pages[pfn].prev != before:
                    return int(pfn)
                nr_lru[pages[pfn].zone, lru] += 1 << pages[pfn].order
                nr_lru_pages[0] += 1
                before = pfn
                pfn = pages[pfn].next
    return -1


@njit
def _leads_to(vmas: Vmas, avcs: Avcs, mapping: int, index: int, mm: int, vpn: int) -> bool:
    """A page of this rmap object may be mapped at this virtual page."""
    avc = avcs[mapping].next
    while avc != 0:
        vma = avcs[avc].vma
        if vmas[vma].mm == mm and vma_address(vmas, vma, index) == vpn:
            return True
        avc = avcs[avc].next
    return False


@njit
def _maps_back(vmas: Vmas, avcs: Avcs, pages: Pages, mm: int, vpn: int, pfn: int) -> bool:
    """The page's rmap object leads to this virtual page."""
    head = compound_head(pages, pfn)
    mapping, index, place = first_chain(pages, avcs, head)
    while mapping != 0:
        if _leads_to(vmas, avcs, mapping, index + pfn - head, mm, vpn):
            return True
        mapping, index, place = next_chain(avcs, place)
    return False


@njit
def _count_leaf(
    pages: Pages,
    vmas: Vmas,
    avcs: Avcs,
    mm: int,
    entry: np.uint64,
    here: int,
    maps: NDArray[np.int32],
    writable: NDArray[np.uint8],
    nr: NDArray[np.int64],
) -> bool:
    """Count one leaf entry, PTE or PMD, of a page table; False if it is wrong."""
    nr_pages = HPAGE_PMD_NR if entry & _PAGE_PSE else 1
    first = pte_pfn(entry)
    head = compound_head(pages, first)
    nr[1 if pages[head].flags & PG_anon else 2] += nr_pages
    if nr_pages > 1 and (first != head or 1 << pages[head].order != nr_pages):
        return False
    if entry & _PAGE_MIGRATION:
        return bool(pages[head].flags & PG_isolated)
    maps[head, MAPCOUNT] += 1
    maps[head, ENTIRE] += nr_pages > 1
    for pfn in range(first, first + nr_pages):
        maps[pfn, HERE] += 1
        writable[pfn] |= entry & _PAGE_RW != _ZERO
    return _maps_back(vmas, avcs, pages, mm, here, first)


@njit
def _nr_deposited(pages: Pages, table: int) -> int:
    """Spare tables of a PMD table; -1 if one is not a table."""
    nr = 0
    spare = pages[table].index
    while spare:
        if pages[spare].flags != PG_table or pages[spare].refcount != 1:
            return -1
        nr += 1
        spare = pages[spare].index
    return nr


@njit
def _walk_tables(
    pages: Pages,
    vmas: Vmas,
    avcs: Avcs,
    pt: PageTables,
    mm: int,
    table: int,
    level: int,
    vpn: int,
    maps: NDArray[np.int32],
    writable: NDArray[np.uint8],
    nr: NDArray[np.int64],
) -> int:
    """Count mappings by page under one table, and tables, anonymous and file pages in `nr`; first bad vpn or -1."""
    nr[0] += 1
    if pages[table].flags != PG_table or pages[table].refcount != 1:
        return vpn
    nr_huge = 0
    for i in range(PTRS_PER_PT):
        entry = pt[table * PTRS_PER_PT + i]
        here = vpn + (i << (9 * level))
        if entry == _ZERO:
            continue
        if level == 0 or entry & _PAGE_PSE:
            nr_huge += level
            if level > 1 or not _count_leaf(pages, vmas, avcs, mm, entry, here, maps, writable, nr):
                return here
            continue
        bad = _walk_tables(pages, vmas, avcs, pt, mm, pte_pfn(entry), level - 1, here, maps, writable, nr)
        if bad >= 0:
            return bad
    nr[0] += nr_huge
    return vpn if _nr_deposited(pages, table) != nr_huge else -1


@njit
def _stale_tlb_entry(tlbs: Tlbs, mms_root: NDArray[np.int64], pt: PageTables) -> tuple[int, int]:
    """(cpu, vpn) of a translation that the page tables do not back, or (-1, -1)."""
    for cpu in range(tlbs.shape[0]):
        for slot in range(TLB_ENTRIES):
            entry = tlbs[cpu, slot]
            if entry.mm == 0:
                continue
            ptep = walk_leaf(pt, mms_root[entry.mm], entry.vpn) if mms_root[entry.mm] else -1
            good = ptep >= 0 and pt[ptep] & _PAGE_PRESENT and leaf_pfn(pt[ptep], entry.vpn) == entry.pfn
            if not good or (entry.write and pt[ptep] & _PAGE_RW == _ZERO):
                return cpu, int(entry.vpn)
    return -1, -1


@njit
def _bad_refcount(pages: Pages, nr_pages: int, maps: NDArray[np.int32]) -> int:
    """First page whose counts do not add up, or -1: mappings, page cache, isolation, one for who has neither, pins."""
    for pfn in range(nr_pages):
        page = pages[pfn]
        flags = page.flags
        if page.mapcount != maps[pfn, MAPCOUNT] or (flags & PG_tail and page.refcount != 0):
            return pfn
        if flags & (PG_lru | PG_isolated) == 0:
            continue
        if flags & PG_head and pages[pfn + 1].mapping != maps[pfn, ENTIRE]:
            return pfn
        of_cache = 1 << page.order if flags & PG_anon == 0 and page.mapping != 0 else 0
        expected = page.mapcount + (flags & PG_isolated != 0) + (flags & PG_private != 0) + (page.mapping == 0)
        extra = page.refcount - expected - of_cache
        dropped = of_cache > 0 and extra == -of_cache and flags & PG_isolated != 0
        if (extra % GUP_PIN_BIAS != 0 or extra < 0) and not dropped:
            return pfn
        if (page.mlock_count > 0) != (flags & PG_mlocked != 0):
            return pfn
    return -1


@njit
def _bad_folio(pages: Pages, nr_pages: int) -> int:
    """First page that is a head without all its tails, or a tail that does not name its head, or -1."""
    pfn = 0
    while pfn < nr_pages:
        flags = pages[pfn].flags
        nr = 1 << pages[pfn].order if flags & PG_head else 1
        if flags & PG_tail or (nr > 1 and pfn & (nr - 1)):
            return pfn
        kind = flags & (PG_huge | PG_thp)
        for tail in range(pfn + 1, pfn + nr):
            other = pages[tail].flags & ~PG_partially_mapped if tail == pfn + 1 else pages[tail].flags
            if other & (PG_tail | PG_head | PG_huge | PG_thp | PG_lru) != PG_tail | kind or pages[tail].index != pfn:
                return tail
        pfn += nr
    return -1


@njit
def _shared_and_writable(pages: Pages, maps: NDArray[np.int32], writable: NDArray[np.uint8]) -> int:
    """First anonymous page that somebody may write although others map it too, or KSM may have them, or -1."""
    for pfn in range(len(writable)):
        flags = pages[compound_head(pages, pfn)].flags
        if writable[pfn] and flags & PG_anon and (maps[pfn, HERE] > 1 or flags & PG_ksm):
            return pfn
    return -1


@njit
def _bad_cache_slot(
    pages: Pages,
    memory: Memory,
    i_pages: NDArray[np.int64],
    disk: NDArray[np.uint64],
    mapping: int,
    base: int,
) -> int:
    """First index of a file whose cached page does not name this file and place or holds other content, or -1."""
    for index in range(len(disk)):
        pfn = i_pages[base + index]
        if pfn < 0:
            continue
        head = compound_head(pages, pfn)
        place = pages[head].index + pfn - head
        wrong = pages[head].mapping != mapping or place != index or pages[head].flags & PG_anon
        if wrong or (pages[head].flags & PG_isolated == 0 and not page_holds(memory, pfn, disk[index])):
            return index
    return -1


@njit
def bad_content(memory: Memory, pt: PageTables, root: int, start: int, wrote: NDArray[np.uint64]) -> int:
    """Pages of a VMA that do not hold what its process wrote, by the page tables alone; pages in flight aside."""
    bad = 0
    for i in range(len(wrote)):
        ptep = walk_leaf(pt, root, start + i)
        pte = pt[ptep] if ptep >= 0 else _ZERO
        if pte == _ZERO:
            bad += wrote[i] != _ZERO
        elif pte & _PAGE_PRESENT and not page_holds(memory, leaf_pfn(pte, start + i), wrote[i]):
            bad += 1
    return bad


def check(vm: Vm) -> list[str]:
    """Every violated invariant, one line each; an empty list if all is well."""
    report = Report()
    mem = vm.mem
    check_free_memory(vm, report)
    _check_lru(mem, report)
    maps = _check_tables(vm, report)
    report.none("counts of page", _bad_refcount(mem.pages, mem.nr_pages, maps))
    report.none("compound page", _bad_folio(mem.pages, mem.nr_pages))
    cpu, vpn = _stale_tlb_entry(vm.tlbs, np.ascontiguousarray(vm.mms["root"]), vm.pt)
    report.none(f"stale TLB entry on CPU {cpu} for page", vpn)
    _check_node_counters(mem, report)
    _check_cma(vm, report)
    _check_content(vm, report)
    promised = sum(vma.nr_pages for vma in vm.vma_objects if vma.accounted)
    report.equal("vm_committed_as", vm.overcommit.vm_committed_as, promised)
    if vm.direct_blocks is not None:
        report.faults += vm.direct_blocks.violations()
    if vm.ksm is not None:
        report.faults += vm.ksm.violations()
    return report.faults


def _check_lru(mem: Mem, report: Report) -> None:
    nr_lru = np.zeros((len(mem.zones), NR_LRU_LISTS), dtype=np.int64)
    heads = np.zeros(1, dtype=np.int64)
    report.none("LRU list: page", _walk_lru_lists(mem.pages, mem.zones, mem.nr_nodes, nr_lru, heads))
    report.equal("nr_lru of zones", mem.zones["nr_lru"].tolist(), nr_lru.tolist())
    by_node = [nr_lru[mem.zones["node"] == nid].sum(axis=0).tolist() for nid in range(mem.nr_nodes)]
    report.equal("nr_lru", mem.nodes["nr_lru"].tolist(), by_node)
    report.equal("pages with PG_lru", int(heads[0]), count(mem.pages["flags"][: mem.nr_pages], PG_lru))


def _check_tables(vm: Vm, report: Report) -> NDArray[np.int32]:
    """Walk all page tables; returns int32[nr_pages, 3]: the mappings of each folio, by PMD entries, of each page."""
    mem = vm.mem
    maps = np.zeros((mem.nr_pages, 3), dtype=np.int32)
    writable = np.zeros(mem.nr_pages, dtype=np.uint8)
    nr_tables = 0
    for mm in sorted(vm.mms_in_use):
        nr = np.zeros(3, dtype=np.int64)
        root = int(vm.mms["root"][mm])
        bad = _walk_tables(mem.pages, vm.vmas, vm.avcs, vm.pt, mm, root, 3, 0, maps, writable, nr)
        report.none(f"mm {mm}: bad PTE or table for virtual page", bad)
        report.equal(f"mm {mm} rss_anon", int(vm.mms["rss_anon"][mm]), int(nr[1]))
        report.equal(f"mm {mm} rss_file", int(vm.mms["rss_file"][mm]), int(nr[2]))
        nr_tables += int(nr[0])
    report.equal("page-table pages", int(mem.nodes["nr_page_table_pages"].sum()) - vm.foreign_tables, nr_tables)
    report.none("shared page is writable:", _shared_and_writable(mem.pages, maps, writable))
    return maps


def _check_node_counters(mem: Mem, report: Report) -> None:
    pages = mem.pages[: mem.nr_pages]
    node = mem.zones["node"][pages["zone"]]
    flags, mapped = pages["flags"], pages["mapcount"] > 0
    size = 1 << pages["order"].astype(np.int64)
    present = flags & np.uint32(PG_nopage) == 0
    anon = flags & np.uint32(PG_anon) != 0
    isolated = flags & np.uint32(PG_isolated) != 0
    backed = flags & np.uint32(PG_swapbacked) != 0
    huge = flags & np.uint32(PG_huge) != 0
    size[huge] = 1  # PG_huge is on the tails too
    whole = np.flatnonzero(anon & (flags & np.uint32(PG_head) != 0))
    whole = whole[pages["mapping"][whole + 1] > 0]
    thps = np.zeros(len(pages), dtype=bool)
    thps[whole] = True
    for nid, record in enumerate(mem.nodes):
        here = present & (node == nid)
        for name, found in (
            ("nr_anon_pages", mapped & anon),
            ("nr_mapped", mapped & ~anon),
            ("nr_isolated_anon", isolated & backed),
            ("nr_isolated_file", isolated & ~backed),
            ("nr_hugetlb", huge),
            ("nr_anon_thps", thps),
        ):
            report.equal(f"node {nid} {name}", int(record[name]), int(size[found & here].sum()))


def _check_cma(vm: Vm, report: Report) -> None:
    """Who holds which page of the CMA areas, and what else is in them."""
    mem = vm.mem
    total = np.zeros(len(mem.zones), dtype=np.int64)
    direct = [pfn for pfn, _ in vm.direct_blocks.blocks()] if vm.direct_blocks is not None else []
    for area in vm.cma_areas:
        pages = mem.pages[area.base : area.base + area.nr_pages]
        total[int(pages["zone"][0])] += area.nr_pages
        types = mem.blocks[area.base >> pageblock_order : (area.base + area.nr_pages) >> pageblock_order]
        foreign = np.flatnonzero((types != MIGRATE_CMA) & (types != MIGRATE_ISOLATE))
        report.equal(f"{area.name} pageblocks of another type", 0, len(foreign))
        kernels = (pages["refcount"] > 0) & (pages["flags"] & np.uint32(_MOVABLE_KINDS) == 0)
        held = area.bits != 0
        # who asked the page allocator for movable blocks and then does not let them move
        held[[pfn - area.base for pfn in direct if area.base <= pfn < area.base + area.nr_pages]] = True
        if area.being_emptied:
            first, last = (pfn - area.base for pfn in area.being_emptied)
            held[first:last] = kernels[first:last]
        wrong = np.flatnonzero(kernels != held)
        report.none(f"{area.name} disagrees about page", int(wrong[0]) + area.base if len(wrong) else -1)
    report.equal("cma_pages", mem.zones["cma_pages"].tolist(), total.tolist())


def _check_content(vm: Vm, report: Report) -> None:
    cached = 0
    for file in vm.files:
        slots = vm.i_pages[file.i_base : file.i_base + file.nr_pages]
        cached += int(np.count_nonzero(slots >= 0))
        bad = _bad_cache_slot(vm.mem.pages, vm.memory, vm.i_pages, file.disk, file.mapping, file.i_base)
        report.none(f"file {file.mapping}: page cache at index", bad)
    report.equal("nr_file_pages", int(vm.mem.nodes["nr_file_pages"].sum()), cached)
    for vma in vm.vma_objects:
        if not vm.vmas["flags"][vma.id] & VM_SHARED:
            nr = bad_content(vm.memory, vm.pt, vma.mm.root, vma.start, vma.wrote)
            report.equal(f"mm {vma.mm.id} pages with wrong content from {vma.start:#x}", 0, nr)
    if vm.kernel_stamps is not None:
        report.none("kernel page overwritten", vm.kernel_stamps.first_bad(vm.memory))


@njit_alloc
def content_digest(pages: Pages, memory: Memory, nr_pages: int) -> NDArray[np.uint64]:
    """uint64[1]: the words of all pages in use, folded in order (FNV-1a's step on words)."""
    digest = np.full(1, 0xCBF29CE484222325, dtype=np.uint64)
    for pfn in range(nr_pages):
        head = compound_head(pages, pfn)
        if pages[head].mapcount > 0 or pages[head].flags & PG_lru:
            for i in range(memory.shape[1]):
                digest[0] = (digest[0] ^ memory[pfn, i]) * np.uint64(0x100000001B3)
    return digest
