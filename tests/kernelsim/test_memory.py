# SPDX-License-Identifier: GPL-2.0-only
"""Faults, copy-on-write, files, page tables and TLBs, one mechanism at a time."""

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import Lab, settle

from kernelsim import content, pgtable, tlb
from kernelsim.filemap import File
from kernelsim.gup import pin_pages
from kernelsim.mmap import MMAP_BASE_VPN, Mm, Vma
from kernelsim.operation import complete
from kernelsim.rmap import vma_address
from kernelsim.vmstat import alloc_events

PRESENT, RW, ACCESSED, DIRTY = 1, 2, 1 << 5, 1 << 6
LRU, ACTIVE, REFERENCED, ANON, SWAPBACKED = 1 << 5, 1 << 6, 1 << 2, 1 << 12, 1 << 14


class Space:
    """One process with one anonymous mapping, at the level of its mm."""

    def __init__(self, nr_pages: int = 64, nodes: tuple[int, ...] = (32,), overcommit: int = 0) -> None:
        self.lab = Lab(nodes)
        self.lab.sysctl(overcommit_memory=overcommit)
        self.vm, self.mem = self.lab.vm, self.lab.mem
        self.process = self.lab.spawn("a")
        self.mm: Mm = self.process.mm
        self.vma: Vma = self.mm.mmap(nr_pages)

    def write(self, *indexes: int, vma: Vma | None = None) -> None:
        vma = vma or self.vma
        complete(vma.mm.write(vma, vma.start + np.array(indexes, dtype=np.int64)))

    def pte(self, index: int, vma: Vma | None = None) -> int:
        vma = vma or self.vma
        ptep = pgtable.walk_pte(self.vm.pt, vma.mm.root, vma.start + index)
        return int(self.vm.pt[ptep]) if ptep >= 0 else 0

    def page(self, index: int, vma: Vma | None = None) -> np.void:
        return self.mem.pages[self.pte(index, vma) >> 12]

    def wrong(self, vma: Vma | None = None) -> int:
        vma = vma or self.vma
        return complete(vma.mm.count_wrong(vma))

    def fork(self) -> Vma:
        """The child's copy of the mapping."""
        self.lab.set("a", fork="child")
        (vma,) = self.lab.machine.processes["child"].mm.vma
        return vma


# Anonymous memory.


def test_the_first_write_maps_a_page() -> None:
    space = Space()
    space.write(5)
    assert space.pte(4) == space.pte(6) == 0
    assert space.pte(5) & 0xFFF == PRESENT | RW | 1 << 2 | ACCESSED | DIRTY
    page = space.page(5)
    assert (page["refcount"], page["mapcount"], page["index"]) == (1, 1, 5)
    assert page["flags"] & (LRU | ANON | SWAPBACKED) == LRU | ANON | SWAPBACKED
    assert space.mm.rss_pages == 1


def test_reading_what_was_never_written_maps_nothing() -> None:
    space = Space()
    assert space.wrong() == 0
    assert space.mm.rss_pages == 0


def test_a_new_page_does_not_show_what_was_there_before() -> None:
    """It holds what its new owner wrote, all of it."""
    space = Space()
    space.write(*range(64))
    complete(space.mm.madvise_dontneed(space.vma, space.vma.vpns()))
    space.write(3)
    assert space.wrong() == 0
    space.lab.assert_at_rest()


def test_a_second_touch_activates() -> None:
    """mark_page_accessed(): the first sets referenced, the second moves it to the active list."""
    space = Space()
    space.write(0)
    assert space.page(0)["flags"] & (REFERENCED | ACTIVE) == REFERENCED
    space.vm.tlbs["mm"] = 0
    space.write(0)
    assert space.page(0)["flags"] & (REFERENCED | ACTIVE) == ACTIVE
    assert space.lab.vmstat()["pgactivate"] == 1


def test_tables_are_made_on_the_way_and_freed_at_exit() -> None:
    space = Space(nr_pages=3 * 512)
    assert space.lab.vmstat()["nr_page_table_pages"] == 1
    space.write(0)
    assert space.lab.vmstat()["nr_page_table_pages"] == 4
    space.write(511, 512, 1024)
    assert space.lab.vmstat()["nr_page_table_pages"] == 6
    settle([space.lab.end("a")])
    assert space.lab.vmstat()["nr_page_table_pages"] == 0


def test_mappings_do_not_overlap() -> None:
    space = Space()
    assert space.vma.start == MMAP_BASE_VPN
    with pytest.raises(OSError, match="in use"):
        space.mm.mmap(1, start=space.vma.end - 1)
    assert space.mm.mmap(1, start=space.vma.end).start == space.vma.end
    with pytest.raises(OSError, match="no pages"):
        space.mm.mmap(0)
    with pytest.raises(OSError, match="exhausted"):
        space.mm.mmap(1 << 36)


def test_splitting_a_mapping_keeps_every_page_in_place() -> None:
    space = Space()
    space.write(*range(64))
    before = [space.pte(i) for i in range(64)]
    upper = space.mm.split(space.vma, space.vma.start + 20)
    assert (space.vma.nr_pages, upper.nr_pages) == (20, 44)
    assert [space.pte(i) for i in range(20)] + [space.pte(i, upper) for i in range(44)] == before
    space.write(0, vma=upper)
    assert space.wrong() == space.wrong(upper) == 0
    space.lab.compact()
    space.lab.assert_at_rest()


def test_out_of_memory_stops_without_harm() -> None:
    space = Space(nr_pages=10_000, overcommit=1)
    with pytest.raises(OSError, match="page fault") as caught:
        space.write(*range(10_000))
    assert caught.value.errno == errno.ENOMEM
    assert 7000 < space.mm.rss_pages < 8192
    space.lab.assert_at_rest()


# fork and copy-on-write.


def test_fork_shares_pages_read_only() -> None:
    space = Space()
    space.write(0, 1)
    child = space.fork()
    assert space.pte(0) >> 12 == space.pte(0, child) >> 12
    assert not space.pte(0) & RW
    assert not space.pte(0, child) & RW
    assert (space.page(0)["refcount"], space.page(0)["mapcount"]) == (2, 2)
    space.lab.assert_at_rest()


def test_a_write_after_fork_copies_for_the_writer_only() -> None:
    space = Space()
    space.write(0, 1)
    child = space.fork()
    shared = space.pte(0) >> 12
    space.write(0, vma=child)
    assert space.pte(0) >> 12 == shared
    assert space.pte(0, child) >> 12 != shared
    assert space.page(0)["mapcount"] == 1
    assert space.pte(0, child) & RW
    assert space.wrong() == space.wrong(child) == 0
    space.lab.assert_at_rest()


def test_the_last_owner_reuses_the_page() -> None:
    space = Space()
    space.write(0)
    child = space.fork()
    shared = space.pte(0) >> 12
    space.write(0, vma=child)
    space.write(0)
    assert space.pte(0) >> 12 == shared
    assert space.pte(0) & RW
    space.lab.assert_at_rest()


def test_a_stale_translation_of_the_parent_is_flushed_at_fork() -> None:
    """The parent's TLB let it write before; afterwards a write must fault, or the child would see it."""
    space = Space()
    space.write(0)
    child = space.fork()
    space.write(0)
    assert space.wrong(child) == 0
    assert space.pte(0) >> 12 != space.pte(0, child) >> 12


def test_grandchildren_share_too_and_compaction_finds_all_mappings() -> None:
    space = Space(nr_pages=2000)
    space.write(*range(2000))
    lab = space.lab
    lab.set("a", fork="b")
    lab.set("b", fork="c")
    lab.set("c", fork="d")
    assert space.page(7)["mapcount"] == 4
    lab.set("a", holes="50 seed=1")
    lab.set("c", touch="30 seed=2")
    lab.sysctl(dpu_compact_region_order=13)
    lab.compact()
    assert lab.stats()["ptes_updated"] > 1.5 * lab.stats()["pages_moved"] > 0
    lab.assert_at_rest()


def test_a_pinned_page_stays_with_the_parent() -> None:
    """Fork copies it at once for the child (page_needs_cow_for_dma), so the DMA target stays the parent's."""
    space = Space()
    space.write(0, 1)
    complete(space.mm.pin(space.vma, space.vma.vpns()[:1]))
    pinned = space.pte(0) >> 12
    child = space.fork()
    assert space.pte(0, child) >> 12 != pinned
    assert space.pte(1, child) >> 12 == space.pte(1) >> 12
    space.write(0)
    assert space.pte(0) >> 12 == pinned
    space.lab.assert_at_rest()


def test_pinning_a_shared_page_keeps_it_the_pinners() -> None:
    space = Space()
    space.write(0)
    space.fork()
    complete(space.mm.pin(space.vma, space.vma.vpns()[:1]))
    pinned = int(space.mm.pinned[0])
    space.write(0)
    assert space.pte(0) >> 12 == pinned


def test_fork_out_of_memory_leaves_no_child() -> None:
    lab = Lab((32,))
    lab.spawn("a", anon="4M", pin="100")
    lab.spawn("b", anon="25M")
    with pytest.raises(OSError, match="fork") as caught:
        lab.set("a", fork="child")
    assert caught.value.errno == errno.ENOMEM
    assert len(lab.vm.mms_in_use) == 2
    lab.assert_at_rest()


# Files.


def test_a_file_page_has_a_reference_from_the_cache() -> None:
    space = Space()
    file = File(space.vm, 8)
    vma = space.mm.mmap(8, file)
    space.process.files.append(file)
    space.lab.machine.share(file)
    space.write(2, vma=vma)
    page = space.page(2, vma)
    assert (page["refcount"], page["mapcount"], page["index"]) == (2, 1, 2)
    assert page["flags"] & (ANON | LRU) == LRU
    complete(space.mm.munmap(vma))
    pfn = int(space.vm.i_pages[file.i_base + 2])
    assert (space.mem.pages["refcount"][pfn], space.mem.pages["mapcount"][pfn]) == (1, 0)
    complete(file.evict())
    space.process.files.clear()
    assert space.lab.vmstat()["nr_file_pages"] == 0
    assert space.lab.machine.check() == []


def test_a_write_to_a_file_is_seen_by_all_who_map_it() -> None:
    lab = Lab((32,))
    lab.spawn("a", file="1M", fork="b")
    lab.set("b", touch="100")
    assert lab.verify("a") == "ok"
    assert lab.vmstat()["nr_file_pages"] == lab.vmstat()["nr_mapped"] == 256
    settle([lab.end("a")])
    assert lab.verify("b") == "ok"
    assert lab.vmstat()["nr_file_pages"] == 256
    settle([lab.end("b")])
    assert lab.vmstat()["nr_file_pages"] == 0


def test_pages_read_in_hold_what_the_file_holds() -> None:
    space = Space()
    file = File(space.vm, 32)
    vma = space.mm.mmap(32, file)
    assert complete(space.mm.count_wrong(vma)) == 0
    assert space.lab.vmstat()["pgmajfault"] == 32
    complete(space.mm.madvise_dontneed(vma, vma.vpns()))
    assert complete(space.mm.count_wrong(vma)) == 0
    assert space.lab.vmstat()["pgmajfault"] == 32


# TLBs.


def test_a_translation_is_found_until_it_is_flushed() -> None:
    tlbs, events = tlb.alloc_tlbs(2), alloc_events()
    tlb.tlb_fill(tlbs, 1, 7, 100, 55, False)
    assert tlb.tlb_lookup(tlbs, 1, 7, 100, False) == 55
    assert tlb.tlb_lookup(tlbs, 1, 7, 100, True) == -1  # no permission to write: walk again
    assert tlb.tlb_lookup(tlbs, 0, 7, 100, False) == -1
    assert tlb.tlb_lookup(tlbs, 1, 8, 100, False) == -1
    tlb.flush_tlb_page(tlbs, events, 7, 100 + tlb.TLB_ENTRIES)  # the same slot, another page
    assert tlb.tlb_lookup(tlbs, 1, 7, 100, False) == 55
    tlb.flush_tlb_page(tlbs, events, 7, 100)
    assert tlb.tlb_lookup(tlbs, 1, 7, 100, False) == -1
    tlb.tlb_fill(tlbs, 0, 7, 5, 1, True)
    tlb.tlb_fill(tlbs, 0, 8, 6, 2, True)
    tlb.flush_tlb_mm(tlbs, events, 7)
    assert tlb.tlb_lookup(tlbs, 0, 7, 5, True) == -1
    assert tlb.tlb_lookup(tlbs, 0, 8, 6, True) == 2
    assert events["nr_tlb_remote_flush"][0] == 3


@pytest.mark.parametrize(("nr_pages", "whole"), [(33, 0), (34, 1)])
def test_more_than_33_pages_flush_the_whole_mm(nr_pages: int, whole: int) -> None:
    space = Space()
    space.write(*range(64))
    before = space.lab.vmstat()
    complete(space.mm.madvise_dontneed(space.vma, space.vma.vpns()[:nr_pages]))
    after = space.lab.vmstat()
    assert after["nr_tlb_local_flush_all"] - before["nr_tlb_local_flush_all"] == whole
    assert after["nr_tlb_local_flush_one"] - before["nr_tlb_local_flush_one"] == (0 if whole else 33)
    assert space.lab.machine.check() == []


# Small parts.


@given(st.integers(0, 2**40 - 1), st.integers(0, 0xFFF))
def test_a_pte_gives_back_what_was_put_in(pfn: int, bits: int) -> None:
    pte = pgtable.mk_pte(pfn, np.uint64(bits))
    assert pgtable.pte_pfn(pte) == pfn
    assert int(pte) & 0xFFF == bits


def test_virtual_page_of_an_index() -> None:
    space = Space(nr_pages=10)
    rows, number = space.vm.vmas, space.vma.id
    rows["pgoff"][number] = 100
    start = space.vma.start
    assert [vma_address(rows, number, index) for index in (99, 100, 109, 110)] == [-1, start, start + 9, -1]


def test_pinning_is_all_or_nothing_while_a_page_is_on_the_move() -> None:
    space = Space()
    space.write(0, 1)
    ptep = pgtable.walk_pte(space.vm.pt, space.mm.root, space.vma.start + 1)
    space.vm.pt[ptep] ^= np.uint64(PRESENT | 1 << 10)
    pinned = np.zeros(2, dtype=np.int64)
    vpns = space.vma.vpns()[:2]
    assert pin_pages(space.vm.vmas, space.vm.pt, space.mem.pages, space.vma.id, vpns, pinned) == -errno.EAGAIN
    assert space.page(0)["refcount"] == 1


@settings(deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 511), st.integers(0, 63))
def test_one_flipped_bit_anywhere_is_noticed(sequence: int, word: int, bit: int) -> None:
    memory = np.zeros((1, 512), dtype=np.uint64)
    stamp = np.uint64(content.stamp_of(sequence))
    content.fill_page(memory, 0, stamp)
    assert content.page_holds(memory, 0, stamp)
    memory[0, word] ^= np.uint64(1 << bit)
    assert not content.page_holds(memory, 0, stamp)


def test_stamps_differ_and_words_of_a_page_differ() -> None:
    assert content.stamp_of(0) == 0
    assert len({int(content.stamp_of(number)) for number in range(10_000)}) == 10_000
    memory = np.zeros((2, 512), dtype=np.uint64)
    for page in (0, 1):
        content.fill_page(memory, page, np.uint64(content.stamp_of(page + 1)))
    assert len(np.unique(memory)) == 1024
