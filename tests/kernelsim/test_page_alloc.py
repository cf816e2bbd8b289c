# SPDX-License-Identifier: GPL-2.0-only
"""The buddy allocator against a model made of plain sets of page numbers."""

import errno

import numpy as np
import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kernelsim import debug_vm
from kernelsim import page_alloc as buddy
from kernelsim.machine import MachineConfig, NodeConfig, boot_mem
from kernelsim.mm_types import Vm
from kernelsim.mmzone import Mem
from kernelsim.page import PG_held

UNMOVABLE, MOVABLE, RECLAIMABLE = range(3)
MIB = 1 << 20


def small_mem(*sizes_mib: int) -> Mem:
    return boot_mem(MachineConfig(nodes=tuple(NodeConfig(size * MIB) for size in sizes_mib)))


def alloc(mem: Mem, order: int, migratetype: int = MOVABLE, nid: int = 0) -> int:
    return int(buddy.get_page_from_freelist(mem.pages, mem.zones, mem.blocks, mem.zonelist[nid], order, migratetype))


def free(mem: Mem, pfn: int, order: int) -> None:
    buddy.free_pages(mem.pages, mem.zones, mem.blocks, pfn, order)


def nr_free(mem: Mem) -> list[list[int]]:
    """Free blocks by zone and order, whatever their type."""
    return [[int(nr) for nr in zone.sum(axis=1)] for zone in mem.zones["nr_free"]]


def nr_free_pages(mem: Mem) -> int:
    return sum(nr << order for zone in nr_free(mem) for order, nr in enumerate(zone))


class Allocator(RuleBasedStateMachine):
    """Any sequence of allocations, frees and holds: no page twice, none lost, all merged again in the end."""

    @initialize(sizes=st.sampled_from([(32,), (32, 34)]))
    def boot(self, sizes: tuple[int, ...]) -> None:
        self.mem = small_mem(*sizes)
        self.vm = Vm(self.mem, 1, 1)
        self.vm.compaction_mutex.locked = True  # this test holds frames
        self.at_boot = nr_free(self.mem)
        self.taken: list[tuple[int, int]] = []
        self.pages_taken: set[int] = set()
        self.held: set[int] = set()

    @rule(order=st.integers(0, 10), kind=st.sampled_from([UNMOVABLE, MOVABLE, RECLAIMABLE]), data=st.data())
    def take(self, order: int, kind: int, data: st.DataObject) -> None:
        nid = data.draw(st.integers(0, self.mem.nr_nodes - 1))
        pfn = alloc(self.mem, order, kind, nid)
        if pfn < 0:
            assert pfn == -errno.ENOMEM
            return
        block = set(range(pfn, pfn + (1 << order)))
        assert pfn % (1 << order) == 0
        assert not block & self.pages_taken
        assert not block & self.held
        assert len({int(self.mem.pages["zone"][page]) for page in block}) == 1
        self.pages_taken |= block
        self.taken.append((pfn, order))

    @rule(nr=st.integers(1, 200), order=st.integers(0, 3))
    def take_many(self, nr: int, order: int) -> None:
        for _ in range(nr):
            pfn = alloc(self.mem, order)
            if pfn < 0:
                return
            assert not self.pages_taken & set(range(pfn, pfn + (1 << order)))
            self.pages_taken |= set(range(pfn, pfn + (1 << order)))
            self.taken.append((pfn, order))

    @precondition(lambda self: self.taken)
    @rule(seed=st.integers(0, 99), share=st.sampled_from([0.01, 0.5, 1.0]))
    def give_back(self, seed: int, share: float) -> None:
        rng = np.random.default_rng(seed)
        gone = [block for block in self.taken if rng.random() < share]
        for pfn, order in gone:
            free(self.mem, pfn, order)
            self.pages_taken -= set(range(pfn, pfn + (1 << order)))
        self.taken = [block for block in self.taken if block not in set(gone)]

    @rule(start=st.integers(1, 8000), length=st.integers(1, 2000))
    def hold(self, start: int, length: int) -> None:
        """All that is free in a range."""
        zone = int(self.mem.pages["zone"][start])
        end = min(start + length, int(self.mem.zones["end_pfn"][zone]))
        pfn = start
        while pfn < end:
            head = buddy.find_buddy_head(self.mem.pages, pfn)
            if head < 0:
                assert pfn in self.pages_taken | self.held or self.mem.pages["refcount"][pfn]
                pfn += 1
                continue
            stop = min(head + (1 << int(self.mem.pages["order"][head])), end)
            nr = buddy.hold_free_block(self.mem.pages, self.mem.zones, self.mem.blocks, head, pfn, stop)
            assert nr == stop - pfn
            self.held |= set(range(pfn, stop))
            pfn = stop

    @precondition(lambda self: self.held)
    @rule(all_of_them=st.booleans())
    def release(self, all_of_them: bool) -> None:
        zone = int(self.mem.pages["zone"][min(self.held)])
        start, end = (int(self.mem.zones[edge][zone]) for edge in ("start_pfn", "end_pfn"))
        middle = start if all_of_them else sorted(self.held)[len(self.held) // 2]
        buddy.release_held(self.mem.pages, self.mem.zones, self.mem.blocks, max(middle, start), end)
        self.held -= set(range(max(middle, start), end))

    @invariant()
    def books_balance(self) -> None:
        assert debug_vm.check(self.vm) == []
        assert nr_free_pages(self.mem) == int(self.mem.zones["free_pages"].sum())
        assert {int(pfn) for pfn in np.flatnonzero(self.mem.pages["flags"] & np.uint32(PG_held))} == self.held
        managed = int(self.mem.zones["managed"].sum())
        assert nr_free_pages(self.mem) + len(self.held) + len(self.pages_taken) == managed

    def teardown(self) -> None:
        if not hasattr(self, "mem"):
            return
        for pfn, order in self.taken:
            free(self.mem, pfn, order)
        for zone in self.mem.zones:
            start, end = int(zone["start_pfn"]), int(zone["end_pfn"])
            buddy.release_held(self.mem.pages, self.mem.zones, self.mem.blocks, start, end)
        assert nr_free(self.mem) == self.at_boot


class TestAllocator(Allocator.TestCase):
    settings = settings(max_examples=examples(15), stateful_step_count=20, deadline=None)


@pytest.mark.slow
class TestAllocatorAtLength(Allocator.TestCase):
    settings = settings(max_examples=examples(80), stateful_step_count=50, deadline=None)


def test_memory_at_boot_is_cut_into_the_largest_blocks() -> None:
    """64 MiB: zone DMA is pages 1..4095, so 1+2+4+..+512 up to the first 4 MiB boundary; DMA32 ends with the
    memory map of 16384 * 64 bytes = 256 pages."""
    mem = small_mem(64)
    assert nr_free(mem) == [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 11],
    ]


def test_allocating_splits_and_freeing_merges() -> None:
    mem = small_mem(64)
    before = nr_free(mem)
    pfn = alloc(mem, 0)
    split = nr_free(mem)[1]
    assert [after - was for after, was in zip(split, before[1], strict=True)] == [1, 1, 1, 1, 1, 1, 1, 1, -1, 0, 0]
    assert mem.pages["refcount"][pfn] == 1
    free(mem, pfn, 0)
    assert nr_free(mem) == before


def test_no_merging_across_a_zone_boundary() -> None:
    """Pages 4095 and 4096 belong to DMA and DMA32; their free blocks stay apart whatever the order."""
    mem = small_mem(64)
    pages, blocks = mem.pages, mem.blocks
    heads = [pfn for pfn in range(mem.nr_pages) if pages["flags"][pfn] & (1 << 10)]
    spans = [(pfn, pfn + (1 << int(pages["order"][pfn]))) for pfn in heads]
    assert all(not start < 4096 < end for start, end in spans)
    assert len(blocks) == 32


@pytest.mark.slow
def test_min_watermark_and_lowmem_reserve_are_kept() -> None:
    mem = small_mem(64)
    while alloc(mem, 0) >= 0:
        pass
    dma, dma32 = mem.zones
    assert int(dma32["free_pages"]) == int(dma32["watermark"][0])
    assert int(dma["free_pages"]) == int(dma["watermark"][0]) + int(dma["reserve"][1])
    assert alloc(mem, 0) == -errno.ENOMEM


def test_the_nearest_node_comes_first_and_a_miss_is_counted() -> None:
    mem = small_mem(32, 32)
    pfn = alloc(mem, 0, nid=1)
    assert mem.zones["node"][mem.pages["zone"][pfn]] == 1
    while mem.zones["node"][mem.pages["zone"][alloc(mem, 6, nid=1)]] == 1:
        pass
    assert int(mem.zones["numa_miss"].sum()) == 1
    assert int(mem.zones["numa_foreign"][mem.zones["node"] == 1].sum()) == 1
    assert int(mem.zones["numa_hit"][mem.zones["node"] == 1].sum()) > 1


def test_stealing_claims_a_pageblock_that_is_free_and_keeps_types_together() -> None:
    """Unmovable pages fill one pageblock before they take another."""
    mem = small_mem(64)
    first = alloc(mem, 0, UNMOVABLE)
    more = [alloc(mem, 0, UNMOVABLE) for _ in range(500)]
    assert {pfn >> 9 for pfn in more} == {first >> 9}
    assert mem.blocks[first >> 9] == UNMOVABLE
    movable = {alloc(mem, 0) >> 9 for _ in range(600)}
    assert first >> 9 not in movable


def test_a_busy_pageblock_is_not_claimed() -> None:
    """With only single movable pages left everywhere, an unmovable page takes one and leaves the block its type."""
    mem = small_mem(32)
    pfns = []
    while (pfn := alloc(mem, 0)) >= 0:
        pfns.append(pfn)
    for pfn in pfns:
        mem.pages["flags"][pfn] = 1 << 5  # as if on the LRU: movable
    for pfn in pfns[::3]:
        free(mem, pfn, 0)
    before = mem.blocks.copy()
    assert alloc(mem, 0, UNMOVABLE) >= 0
    assert (mem.blocks == before).all()


@pytest.mark.parametrize("order", range(11))
def test_every_order_can_be_had_and_is_aligned(order: int) -> None:
    mem = small_mem(64)
    pfn = alloc(mem, order)
    assert pfn % (1 << order) == 0
    assert int(mem.zones["pgalloc"].sum()) == 1 << order
    free(mem, pfn, order)
    assert int(mem.zones["pgfree"].sum()) == 1 << order


def test_a_run_that_is_freed_is_cut_where_types_must_not_mix() -> None:
    """Two pageblocks of one order-10 block, one of a type that keeps to itself: each stays what it is."""
    mem = small_mem(64)
    pfn = alloc(mem, 10)
    mem.blocks[(pfn >> 9) + 1] = 4  # CMA
    buddy.free_range(mem.pages, mem.zones, mem.blocks, pfn, pfn + 1024)
    assert [int(mem.pages["order"][at]) for at in (pfn, pfn + 512)] == [9, 9]
    assert mem.blocks[pfn >> 9 :][:2].tolist() == [MOVABLE, 4]
