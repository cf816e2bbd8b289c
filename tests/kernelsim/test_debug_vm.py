# SPDX-License-Identifier: GPL-2.0-only
"""One thing is broken, and the check says so: for every invariant there is a fault that only it can find."""

from collections.abc import Callable

import captures
import numpy as np
import pytest
from board import Board
from machines import Lab

from dpud.proctext import parse_zones
from kernelsim import page_alloc
from kernelsim.compaction_free import isolate_freepages
from kernelsim.filemap import File
from kernelsim.hostimage import build_host_image
from kernelsim.lruvec import folio_isolate_lru
from kernelsim.machine import Machine
from kernelsim.mm_configfs import Process
from kernelsim.page_isolation import start_isolate_page_range
from kernelsim.pcp import free_frozen_pages
from kernelsim.pgtable import walk_pmd, walk_pte

LRU, ACTIVE, BUDDY, UNEVICTABLE, RW, PRESENT = 1 << 5, 1 << 6, 1 << 10, 1 << 18, 1 << 1, 1


class Victim:
    """A machine with one of everything, and names for the things to break."""

    def __init__(self) -> None:
        self.lab = Lab((32,))
        self.process: Process = self.lab.spawn("a", anon="4M", file="256K", holes="50 seed=1")
        self.lab.set("a", fork="child", mlock="10", touch="40 seed=2", pin="5 seed=3")
        self.lab.sysctl(nr_hugepages=1)
        self.lab.assert_at_rest()
        self.vm, self.mem = self.lab.vm, self.lab.mem
        self.pages = self.mem.pages
        self.mm = self.process.mm.id
        self.file: File = self.process.files[0]
        self.shared_ptep, self.shared = self._find(lambda pfn: self.pages["mapcount"][pfn] == 2)
        self.ptep, self.own = self._find(lambda pfn: self.pages["mapcount"][pfn] == 1)
        self.cached = int(self.vm.i_pages[self.file.i_base])
        self.free = int(np.flatnonzero(self.pages["flags"][: self.mem.nr_pages] & np.uint32(BUDDY))[0])
        self.table = self.process.mm.root

    def _find(self, wanted: Callable[[int], bool]) -> tuple[int, int]:
        """(ptep, pfn) of the process's first evictable anonymous page that is wanted."""
        for vma in self.process.anon_vmas:
            for vpn in vma.vpns().tolist():
                ptep = int(walk_pte(self.vm.pt, self.process.mm.root, vpn))
                pte = int(self.vm.pt[ptep]) if ptep >= 0 else 0
                if pte & PRESENT and not self.pages["flags"][pte >> 12] & UNEVICTABLE and wanted(pte >> 12):
                    return ptep, pte >> 12
        raise AssertionError("no such page")

    def tlb_entry(self) -> tuple[int, int]:
        cpu, slot = np.argwhere(self.vm.tlbs["mm"] > 0)[0]
        return int(cpu), int(slot)


def add(record: np.ndarray, field: str, key: object, amount: int = 1) -> None:
    record[field][key] += amount


FAULTS: dict[str, tuple[str, Callable[[Victim], object]]] = {
    # pages
    "mapcount": ("counts of page", lambda v: add(v.pages, "mapcount", v.own)),
    "refcount too high": ("counts of page", lambda v: add(v.pages, "refcount", v.own)),
    "refcount too low": ("counts of page", lambda v: add(v.pages, "refcount", v.own, -1)),
    "cached page's refcount": ("counts of page", lambda v: add(v.pages, "refcount", v.cached, -1)),
    "mlock_count": ("counts of page", lambda v: add(v.pages, "mlock_count", v.own)),
    "mapping": ("bad PTE or table", lambda v: add(v.pages, "mapping", v.own)),
    "index": ("bad PTE or table", lambda v: add(v.pages, "index", v.own)),
    "zone": ("pages of another zone", lambda v: v.pages["zone"].__setitem__(v.own, 1 - v.pages["zone"][v.own])),
    # LRU lists
    "lru link": ("LRU list: page", lambda v: v.pages["prev"].__setitem__(v.own, v.shared)),
    "lru link skips one": (
        "nr_lru",
        lambda v: v.pages["next"].__setitem__(v.pages["prev"][v.own], v.pages["next"][v.own]),
    ),
    "lru flag lost": ("LRU list: page", lambda v: flip_flag(v, v.own, LRU)),
    "lru flag without a list": ("pages with PG_lru", lambda v: flip_flag(v, v.table, LRU)),
    "active flag": ("LRU list: page", lambda v: flip_flag(v, v.own, ACTIVE)),
    "unevictable flag": ("LRU list: page", lambda v: flip_flag(v, v.own, UNEVICTABLE)),
    "nr_lru": ("nr_lru", lambda v: add(v.mem.nodes, "nr_lru", (0, 1))),
    "promises": ("vm_committed_as", lambda v: v.vm.overcommit.vm_unacct_memory(1)),
    "nr_lru of a zone": ("nr_lru of zones", lambda v: add(v.mem.zones, "nr_lru", (0, 1))),
    # free lists
    "free page's order": ("free list: page", lambda v: add(v.pages, "order", v.free)),
    "free page's refcount": ("free list: page", lambda v: add(v.pages, "refcount", v.free)),
    "free list link": ("free list: page", lambda v: v.pages["prev"].__setitem__(v.free, v.own)),
    "free page off its list": (
        "buddy heads",
        lambda v: (
            v.pages["next"].__setitem__(v.pages["prev"][v.free], v.pages["next"][v.free]),
            v.pages["prev"].__setitem__(v.pages["next"][v.free], v.pages["prev"][v.free]),
        ),
    ),
    "pageblock type": ("free list: page", lambda v: v.mem.blocks.__setitem__(v.free >> 9, 2)),
    "nr_free": ("nr_free", lambda v: add(v.mem.zones, "nr_free", (1, 3, 1))),
    "free_pages": ("free_pages", lambda v: add(v.mem.zones, "free_pages", 0)),
    "held_pages": ("held_pages", lambda v: add(v.mem.zones, "held_pages", 0)),
    "used page inside a free block": ("free list: page", lambda v: use_page_of_free_block(v)),
    # page tables
    "pte names another page": (
        "bad PTE or table",
        lambda v: v.vm.pt.__setitem__(v.ptep, (v.vm.pt[v.ptep] & 0xFFF) | np.uint64(v.cached << 12)),
    ),
    "shared page is writable": ("shared page is writable", lambda v: add_bits(v, v.shared_ptep, RW)),
    "pte lost": ("rss_anon", lambda v: v.vm.pt.__setitem__(v.ptep, 0)),
    "migration entry for a page at rest": ("bad PTE or table", lambda v: add_bits(v, v.ptep, (1 << 10) - PRESENT)),
    "table frame's flag": ("bad PTE or table", lambda v: v.pages["flags"].__setitem__(v.table, 0)),
    "rss_anon": ("rss_anon", lambda v: add(v.vm.mms, "rss_anon", v.mm)),
    "rss_file": ("rss_file", lambda v: add(v.vm.mms, "rss_file", v.mm)),
    # reverse mapping
    "vma range": ("bad PTE or table", lambda v: add(v.vm.vmas, "start", v.process.anon_vmas[0].id)),
    "rmap chain cut": ("bad PTE or table", lambda v: v.vm.avcs["next"].__setitem__(v.pages["mapping"][v.own], 0)),
    # TLBs
    "tlb names another page": ("stale TLB entry", lambda v: add(v.vm.tlbs, "pfn", v.tlb_entry())),
    "tlb grants a write": ("stale TLB entry", lambda v: grant_write(v)),
    "tlb entry of an mm that is gone": ("stale TLB entry", lambda v: v.vm.tlbs["mm"].__setitem__(v.tlb_entry(), 60)),
    # node and zone counters
    **{
        name: (name, lambda v, name=name: add(v.mem.nodes, name, 0))
        for name in (
            "nr_anon_pages",
            "nr_mapped",
            "nr_file_pages",
            "nr_isolated_anon",
            "nr_isolated_file",
            "nr_hugetlb",
        )
    },
    "nr_page_table_pages": ("page-table pages", lambda v: add(v.mem.nodes, "nr_page_table_pages", 0)),
    "nr_mlock": ("nr_mlock", lambda v: add(v.mem.zones, "nr_mlock", 0)),
    # contents
    "a bit of a page": ("wrong content", lambda v: flip(v, v.own)),
    "what the process knows": ("wrong content", lambda v: forget(v)),
    "a bit of a cached page": ("page cache at index 0x0", lambda v: flip(v, v.cached)),
    "page cache slot": ("page cache at index 0x0", lambda v: v.vm.i_pages.__setitem__(v.file.i_base, v.own)),
    "page cache slot lost": ("nr_file_pages", lambda v: v.vm.i_pages.__setitem__(v.file.i_base, -1)),
}


FOLIO_FAULTS: dict[str, tuple[str, Callable[[Lab, int], object]]] = {
    "tail names another head": ("compound page", lambda lab, head: add(lab.mem.pages, "index", head + 9)),
    "tail without its flag": ("compound page", lambda lab, head: lab.mem.pages["flags"].__setitem__(head + 9, 0)),
    "tail's refcount": ("counts of page", lambda lab, head: add(lab.mem.pages, "refcount", head + 9)),
    "order": ("compound page", lambda lab, head: lab.mem.pages["order"].__setitem__(head, 8)),
    "mapcount": ("counts of page", lambda lab, head: add(lab.mem.pages, "mapcount", head)),
    "entire mapcount": ("counts of page", lambda lab, head: add(lab.mem.pages, "mapping", head + 1)),
    "nr_anon_thps": ("nr_anon_thps", lambda lab, head: add(lab.mem.nodes, "nr_anon_thps", 0)),
    "spare table lost": ("bad PTE or table", lambda lab, head: lose_spare_table(lab)),
    "writable and shared": ("shared page is writable", lambda lab, head: add_to_pmd(lab, RW)),
    "PMD names another folio": ("bad PTE or table", lambda lab, head: add_to_pmd(lab, 512 << 12)),
}


def pmd_of(lab: Lab) -> int:
    process = lab.machine.processes["a"]
    return int(walk_pmd(lab.vm.pt, process.mm.root, process.anon_vmas[0].start))


def add_to_pmd(lab: Lab, bits: int) -> None:
    lab.vm.pt[pmd_of(lab)] += np.uint64(bits)


def lose_spare_table(lab: Lab) -> None:
    table = pmd_of(lab) // 512
    lab.mem.pages["index"][table] = lab.mem.pages["index"][lab.mem.pages["index"][table]]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FOLIO_FAULTS)
def test_a_fault_of_a_huge_page_is_found(fault: str) -> None:
    said, plant = FOLIO_FAULTS[fault]
    lab = Lab((32,))
    lab.spawn("a", thp="1", anon="4M", fork="b")
    lab.assert_at_rest()
    plant(lab, int(lab.vm.pt[pmd_of(lab)]) >> 12)
    found = lab.machine.check()
    assert any(said in line for line in found), found


def flip_flag(victim: Victim, pfn: int, flag: int) -> None:
    victim.pages["flags"][pfn] ^= np.uint32(flag)


def use_page_of_free_block(victim: Victim) -> None:
    orders = victim.pages["order"][: victim.mem.nr_pages]
    free = victim.pages["flags"][: victim.mem.nr_pages] & np.uint32(BUDDY) != 0
    head = int(np.flatnonzero(free & (orders > 0))[0])
    victim.pages["flags"][head + 1] = 8


def add_bits(victim: Victim, ptep: int, bits: int) -> None:
    victim.vm.pt[ptep] += np.uint64(bits)


def grant_write(victim: Victim) -> None:
    entry = victim.vm.tlbs[0, 0]
    entry["mm"], entry["pfn"], entry["write"] = victim.mm, victim.shared, 1
    for vma in victim.process.anon_vmas:
        for vpn in vma.vpns().tolist():
            if int(walk_pte(victim.vm.pt, victim.table, vpn)) == victim.shared_ptep:
                entry["vpn"] = vpn


def flip(victim: Victim, pfn: int) -> None:
    victim.vm.memory[pfn, 0] ^= np.uint64(1 << 40)


def forget(victim: Victim) -> None:
    vma = victim.process.anon_vmas[0]
    vma.wrote[np.flatnonzero(vma.wrote)[0]] += np.uint64(1)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_a_planted_fault_is_found(fault: str) -> None:
    said, plant = FAULTS[fault]
    victim = Victim()
    plant(victim)
    found = victim.lab.machine.check()
    assert any(said in line for line in found), found


def test_the_last_word_of_a_page_counts() -> None:
    lab = Lab((32,), "full")
    process = lab.spawn("a", anon="64K")
    pte = int(lab.vm.pt[walk_pte(lab.vm.pt, process.mm.root, process.anon_vmas[0].start)])
    lab.vm.memory[pte >> 12, 511] ^= np.uint64(1)
    (line,) = lab.machine.check()
    assert "wrong content" in line
    assert lab.verify("a") == "1"


def held_board() -> Board:
    """A compaction between two rounds, with targets in hand."""
    board = Board(4)
    board.movable([board.pfn(0)])
    board.free(board.pfn(3, 64), 8)
    board.free(board.pfn(2, 64), 8)
    board.vm.compaction_mutex.locked = True
    cc = board.control()
    cc["nr_migratepages"] = 12
    isolate_freepages(board.arrays(), cc)
    assert int(cc["nr_freepages"][0]) == 16
    board.assert_sound()
    return board


def unlink(board: Board, pfn: int) -> None:
    pages = board.mem.pages
    pages["next"][pages["prev"][pfn]], pages["prev"][pages["next"][pfn]] = pages["next"][pfn], pages["prev"][pfn]


HELD_FAULTS: dict[str, tuple[str, Callable[[Board, int], object]]] = {
    "lost from its list": ("held pages on freepages lists", lambda b, pfn: unlink(b, pfn)),
    "list link": ("freepages list: page", lambda b, pfn: b.mem.pages["prev"].__setitem__(pfn, pfn)),
    "order": ("freepages list: page", lambda b, pfn: b.mem.pages["order"].__setitem__(pfn, 2)),
    "in use": ("freepages list: page", lambda b, pfn: b.mem.pages["refcount"].__setitem__(pfn, 1)),
    "not held": ("freepages list: page", lambda b, pfn: b.mem.pages["flags"].__setitem__(pfn + 3, 0)),
    "held by nobody": (
        "held pages without a compaction",
        lambda b, pfn: setattr(b.vm.compaction_mutex, "locked", False),
    ),
    "page left isolated": (
        "isolated pages between rounds",
        lambda b, pfn: folio_isolate_lru(b.mem.pages, b.mem.zones, b.mem.nodes, b.pfn(0)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", HELD_FAULTS)
def test_a_planted_fault_in_what_a_compaction_holds_is_found(fault: str) -> None:
    said, plant = HELD_FAULTS[fault]
    board = held_board()
    plant(board, board.pfn(3, 64))
    found = board.machine.check()
    assert any(said in line for line in found), found


def test_a_page_left_isolated_by_nobody_is_found() -> None:
    board = Board(2)
    board.movable([board.pfn(0)])
    folio_isolate_lru(board.mem.pages, board.mem.zones, board.mem.nodes, board.pfn(0))
    assert board.machine.check() == ["isolated pages without a compaction: kernel says 1, found 0"]


def test_a_pageblock_left_isolated_by_nobody_is_found() -> None:
    board = Board(4)
    board.free(board.pfn(2), 512)
    board.vm.compaction_mutex.locked = True
    start_isolate_page_range(board.mem, board.pfn(2), board.pfn(3))
    board.assert_sound()
    board.vm.compaction_mutex.locked = False
    assert board.machine.check() == ["isolated pageblocks without a range being emptied: kernel says 1, found 0"]


def pcp_board() -> Board:
    """Three pages on a CPU's list."""
    board = Board(2, (0, 50, 50, 50, 8, 0))
    mem = board.mem
    for pfn in range(board.pfn(0), board.pfn(0, 3)):
        page_alloc.clear_page(mem.pages, pfn)
        free_frozen_pages(mem.pages, mem.zones, mem.blocks, mem.nodes, mem.pagesets, 0, pfn, 0)
    board.assert_sound()
    return board


PCP_FAULTS: dict[str, tuple[str, Callable[[Board, int], object]]] = {
    "count": ("zone Normal CPU 0 count", lambda b, pfn: add(b.mem.pagesets, "count", (0, 0))),
    "lost from its list": ("zone Normal CPU 0 count", lambda b, pfn: unlink(b, pfn)),
    "list link": ("per-CPU list: page", lambda b, pfn: b.mem.pages["prev"].__setitem__(pfn, pfn)),
    "flags": ("per-CPU list: page", lambda b, pfn: b.mem.pages["flags"].__setitem__(pfn, LRU)),
    "in use": ("per-CPU list: page", lambda b, pfn: b.mem.pages["refcount"].__setitem__(pfn, 1)),
    "free twice": (
        "per-CPU list: page",
        lambda b, pfn: (unlink(b, pfn), b.free(pfn), b.mem.pages["next"].__setitem__(pfn + 1, pfn)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PCP_FAULTS)
def test_a_planted_fault_in_a_per_cpu_list_is_found(fault: str) -> None:
    said, plant = PCP_FAULTS[fault]
    board = pcp_board()
    plant(board, board.pfn(0, 1))
    found = board.machine.check()
    assert any(said in line for line in found), found


def imported() -> Machine:
    built = captures.machine(nr_blocks=40)
    zones = parse_zones(built.zoneinfo(), built.buddyinfo(), built.pagetypeinfo())
    return Machine.from_image(build_host_image(zones, built.flags, built.counts))


@pytest.mark.slow
def test_an_overwritten_kernel_page_is_found() -> None:
    machine = imported()
    assert machine.check() == []
    slab = int(np.flatnonzero(machine.mem.pages["flags"][: machine.mem.nr_pages] & np.uint32(1 << 7))[0])
    machine.vm.memory[slab, 0] += np.uint64(1)
    assert machine.check() == [f"kernel page overwritten {slab:#x}"]


def test_the_check_changes_nothing() -> None:
    victim = Victim()
    before = victim.lab.machine.state_hash()
    victim.lab.machine.check()
    assert victim.lab.machine.state_hash() == before
