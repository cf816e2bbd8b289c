# SPDX-License-Identifier: GPL-2.0-only
"""Isolating pageblocks: what changes, who refuses, and that everything is put back."""

import errno

import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import Lab

from kernelsim import page_alloc as buddy
from kernelsim import page_isolation
from kernelsim.mmzone import Mem
from kernelsim.page_isolation import (
    RangeBusy,
    has_unmovable_pages,
    start_isolate_page_range,
    undo_isolate_page_range,
)

UNMOVABLE, MOVABLE, RECLAIMABLE, HIGHATOMIC, CMA, ISOLATE = range(6)
BLOCK = 512


def isolating_lab() -> Lab:
    """These tests are who isolates: they hold what such an operation holds."""
    lab = Lab((64,))
    lab.vm.compaction_mutex.locked = True
    return lab


def alloc(mem: Mem, order: int, migratetype: int = MOVABLE) -> int:
    return int(buddy.get_page_from_freelist(mem.pages, mem.zones, mem.blocks, mem.zonelist[0], order, migratetype))


def layout(mem: Mem) -> tuple[list[int], list[tuple[int, int]], list[int], list[list[int]]]:
    """Types, free blocks, free pages and list lengths: all that an isolation touches."""
    heads = np.flatnonzero(mem.pages["flags"][: mem.nr_pages] & np.uint32(1 << 10)).tolist()
    free = [(pfn, int(mem.pages["order"][pfn])) for pfn in heads]
    return mem.blocks.tolist(), free, mem.zones["free_pages"].tolist(), mem.zones["nr_free"].sum(axis=0).tolist()


def free_blocks(mem: Mem, zone: int, migratetype: int) -> list[int]:
    return [int(nr) for nr in mem.zones["nr_free"][zone, :, migratetype]]


def test_isolated_pages_are_not_free_memory_but_stay_on_the_lists() -> None:
    lab = isolating_lab()
    before = int(lab.mem.zones["free_pages"][1])
    start_isolate_page_range(lab.mem, 0x2000, 0x2400)
    assert int(lab.mem.zones["free_pages"][1]) == before - 1024
    assert free_blocks(lab.mem, 1, ISOLATE) == [0] * 9 + [2, 0]  # one pageblock after the other
    assert sum(nr << order for order, nr in enumerate(lab.mem.zones["nr_free"][1].sum(axis=1).tolist())) == before
    assert lab.vmstat()["nr_free_pages"] == int(lab.mem.zones["free_pages"].sum())
    (row,) = [line for line in lab.read("/proc/pagetypeinfo").splitlines() if "DMA32" in line and "Isolate" in line]
    assert row.split()[-11:] == ["0"] * 9 + ["2", "0"]
    assert lab.machine.check() == []


def test_a_block_that_straddles_the_range_is_cut_and_merged_again() -> None:
    """Pages 0x2000..0x23ff are one free block of order 10; only its second pageblock is isolated."""
    lab = isolating_lab()
    before = layout(lab.mem)
    assert int(lab.mem.pages["order"][0x2000]) == 10
    isolated = start_isolate_page_range(lab.mem, 0x2200, 0x2201)
    assert (isolated.start, isolated.end, isolated.types.tolist()) == (0x2200, 0x2400, [MOVABLE])
    assert [int(lab.mem.pages["order"][pfn]) for pfn in (0x2000, 0x2200)] == [9, 9]
    assert free_blocks(lab.mem, 1, ISOLATE)[9] == 1
    assert lab.mem.blocks[0x2000 >> 9] == MOVABLE
    assert lab.machine.check() == []
    undo_isolate_page_range(lab.mem, isolated)
    assert layout(lab.mem) == before
    assert lab.machine.check() == []


def test_nothing_is_allocated_from_isolated_blocks_and_what_is_freed_stays() -> None:
    lab = Lab((32,))
    mem = lab.mem
    taken = [alloc(mem, 0) for _ in range(100)]
    block = taken[-1] >> 9
    for pfn in taken:  # movable, as far as the isolation can tell
        mem.pages["flags"][pfn] |= 1 << 5
    start, end = block * BLOCK, max(taken) + 1  # behind it is the memory map
    isolated = start_isolate_page_range(mem, start, end)
    more = []
    while (pfn := alloc(mem, 0)) >= 0:
        more.append(pfn)
    assert not [pfn for pfn in more if pfn >> 9 == block]
    for pfn in (pfn for pfn in taken if pfn >> 9 == block):
        buddy.free_pages(mem.pages, mem.zones, mem.blocks, pfn, 0)
    assert page_isolation.test_pages_isolated(mem.pages, mem.blocks, start, end) == end
    assert alloc(mem, 0) == -errno.ENOMEM
    undo_isolate_page_range(mem, isolated)
    rest = []
    while (pfn := alloc(mem, 0)) >= 0:
        rest.append(pfn)
    assert [pfn for pfn in rest if pfn >> 9 == block]


def test_types_come_back_each_to_its_own_block() -> None:
    lab = Lab((64,))
    mem = lab.mem
    used = [alloc(mem, 9) for _ in range(5)]  # so that no two blocks merge and take one type
    assert len({pfn >> 9 for pfn in used}) == 5
    start, end = min(used), max(used) + BLOCK
    mem.pages["flags"][used] |= 1 << 5 | 1 << 15  # movable, as far as the isolation can tell
    mem.pages["order"][used] = 9
    types = [UNMOVABLE, RECLAIMABLE, HIGHATOMIC, MOVABLE, UNMOVABLE]
    for pfn, migratetype in zip(used, types, strict=True):
        mem.blocks[pfn >> 9] = migratetype
    isolated = start_isolate_page_range(mem, start, end)
    assert set(mem.blocks[start >> 9 : end >> 9].tolist()) == {ISOLATE}
    assert int(mem.zones["nr_isolate_pageblock"].sum()) == (end - start) >> 9
    undo_isolate_page_range(mem, isolated)
    assert [int(mem.blocks[pfn >> 9]) for pfn in used] == types
    assert int(mem.zones["nr_isolate_pageblock"].sum()) == 0
    mem.pages["flags"][used] = 0
    assert lab.machine.check() == []


def test_a_page_that_cannot_move_refuses_and_the_log_names_it() -> None:
    lab = Lab((64,))
    pfn = alloc(lab.mem, 0, UNMOVABLE)
    before = layout(lab.mem)
    base = pfn // BLOCK * BLOCK
    with pytest.raises(RangeBusy) as refusal:
        start_isolate_page_range(lab.mem, base - BLOCK, base + BLOCK, report_to=lab.machine.printk)
    assert refusal.value.errno == errno.EBUSY
    assert refusal.value.pfn == pfn
    assert layout(lab.mem) == before
    log = lab.machine.printk.lines()[-2:]
    assert log[0].startswith("page: refcount:1 mapcount:0 mapping:0000000000000000 index:0x0 pfn:")
    assert log[0].endswith(f"pfn:{pfn:#x}")
    assert log[1] == "page dumped because: unmovable page"


def test_reserved_pages_and_page_tables_refuse_pinned_and_huge_ones_do_not() -> None:
    lab = Lab((64,))
    lab.spawn("a", anon="1M", pin="100")
    lab.sysctl(nr_hugepages=1)
    pages = lab.mem.pages
    flags = pages["flags"][: lab.mem.nr_pages]
    table = int(np.flatnonzero(flags & np.uint32(1 << 26))[0])
    reserved = int(np.flatnonzero(flags & np.uint32(1 << 27))[0])
    lru = int(np.flatnonzero(flags & np.uint32(1 << 5))[0])
    huge = int(np.flatnonzero(flags & np.uint32(1 << 17))[0])
    assert has_unmovable_pages(pages, table, table + 1) == table
    assert has_unmovable_pages(pages, reserved, reserved + 1) == reserved
    assert has_unmovable_pages(pages, lru, lru + 1) == -1
    assert has_unmovable_pages(pages, huge + 3, huge + 500) == -1


def test_an_isolated_range_and_a_foreign_cma_area_refuse() -> None:
    lab = Lab((64,), cma=8)
    (area,) = lab.vm.cma_areas
    isolated = start_isolate_page_range(lab.mem, 0x2000, 0x2400)
    with pytest.raises(RangeBusy):
        start_isolate_page_range(lab.mem, 0x2200, 0x2600)
    with pytest.raises(RangeBusy):
        start_isolate_page_range(lab.mem, area.base, area.base + 1)
    own = start_isolate_page_range(lab.mem, area.base, area.base + 1, cma=True)
    assert lab.vmstat()["nr_free_cma"] == 2048 - BLOCK
    for each in (own, isolated):
        undo_isolate_page_range(lab.mem, each)
    assert lab.vmstat()["nr_free_cma"] == 2048
    assert lab.machine.check() == []


@settings(max_examples=examples(40), deadline=None)
@given(
    seed=st.integers(0, 99),
    holes=st.integers(0, 100),
    ranges=st.lists(st.tuples(st.integers(0x1000, 0x3E00), st.integers(1, 3000)), min_size=1, max_size=4),
)
@pytest.mark.slow
def test_isolation_and_its_end_change_nothing(seed: int, holes: int, ranges: list[tuple[int, int]]) -> None:
    lab = LAB
    lab.set("a", anon="20M", holes=f"{holes} seed={seed}")
    before = layout(lab.mem)
    held = []
    for start, length in ranges:
        try:
            held.append(start_isolate_page_range(lab.mem, start, min(start + length, 0x3F00)))
        except RangeBusy:
            continue
        assert lab.machine.check() == []
    for isolated in held:
        undo_isolate_page_range(lab.mem, isolated)
        assert lab.machine.check() == []
    assert layout(lab.mem) == before


LAB = isolating_lab()
LAB.spawn("a")
