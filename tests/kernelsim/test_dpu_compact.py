# SPDX-License-Identifier: GPL-2.0-only
"""DPU compaction against a plain model of where every page must go, with and without a device that fails."""

from collections import deque

import numpy as np
import pytest
from machines import Lab, advance, settle, small_slices

from dpud.dpu.faults import FaultKind
from kernelsim.mmzone import MIGRATE_UNMOVABLE
from kernelsim.page import PG_held
from kernelsim.page_alloc import set_pageblock_migratetype
from kernelsim.pgtable import walk_pte

BUDDY, LRU, TAIL, HEAD = 1 << 10, 1 << 5, 1 << 16, 1 << 15
GUP_PIN = 1024
MOVABLE_BLOCK = 1


def free_frames(lab: Lab) -> set[int]:
    """Every frame of a free block; only the first one carries PG_buddy."""
    pages = lab.mem.pages
    heads = np.flatnonzero(pages["flags"][: lab.mem.nr_pages] & np.uint32(BUDDY))
    return {pfn for head in heads.tolist() for pfn in range(head, head + (1 << int(pages["order"][head])))}


def movable_frames(lab: Lab) -> set[int]:
    """LRU pages that nobody pinned."""
    pages = lab.mem.pages[: lab.mem.nr_pages]
    lru = (pages["flags"] & np.uint32(LRU)) != 0
    return set(np.flatnonzero(lru & (pages["refcount"] < GUP_PIN)).tolist())


def contents(lab: Lab) -> dict[int, int]:
    """First word of every LRU page, by frame."""
    lru = np.flatnonzero(lab.mem.pages["flags"][: lab.mem.nr_pages] & np.uint32(LRU))
    return {pfn: int(lab.vm.memory[pfn, 0]) for pfn in lru.tolist()}


def packed(lab: Lab, order: int) -> dict[int, int]:
    """The model: in each region pages move one by one, in address order, to the lowest frame that is free by then."""
    free, movable, result = free_frames(lab), movable_frames(lab), contents(lab)
    for zone in lab.mem.zones:
        start, end, size = int(zone["start_pfn"]), int(zone["end_pfn"]), 1 << order
        for base in range(start // size * size, end, size):
            targets: deque[int] = deque()
            for pfn in range(max(base, start), min(base + size, end)):
                usable = int(lab.mem.blocks[pfn >> 9]) == MOVABLE_BLOCK
                if pfn in movable and targets:
                    result[targets.popleft()] = result.pop(pfn)
                elif pfn not in free:
                    continue
                if usable:
                    targets.append(pfn)
    return result


def busy_lab(words: str = "stamp", nr_ranks: int | None = 2, nodes: tuple[int, ...] = (32,)) -> Lab:
    """Holes, page tables, file pages, a child, pins, locked pages and huge pages, all mixed."""
    lab = Lab(nodes, words, nr_ranks=nr_ranks)
    lab.sysctl(dpu_compact_min_fragments=1)
    lab.spawn("a", anon="10M", file="1M", holes="40 seed=3")
    lab.sysctl(nr_hugepages=2)
    lab.set("a", fork="child", touch="30 seed=4")
    lab.set("child", holes="30 seed=5", touch="20 seed=6")
    lab.set("a", mlock="30", pin="4 seed=7")
    lab.set("child", holes="20 seed=8")
    lab.assert_at_rest()
    return lab


@pytest.mark.slow
@pytest.mark.parametrize("order", [9, 10, 13, 18])
@pytest.mark.parametrize("enabled", [1, 0], ids=["dpu", "cpu"])
def test_every_page_ends_where_the_model_puts_it(order: int, enabled: int) -> None:
    lab = busy_lab()
    lab.sysctl(dpu_compact_region_order=order, dpu_compact_enabled=enabled)
    expected = packed(lab, order)
    assert expected != contents(lab)
    lab.compact()
    assert contents(lab) == expected
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [(32,), (32, 34)], ids=["one node", "two nodes"])
def test_real_bytes_arrive_whole(nodes: tuple[int, ...]) -> None:
    lab = busy_lab("full", nodes=nodes)
    lab.sysctl(dpu_compact_region_order=12)
    for nid in range(len(nodes)):
        lab.compact(nid)
    assert lab.stats()["pages_moved"] > 500
    lab.assert_at_rest()


def test_a_second_run_finds_nothing_to_move() -> None:
    lab = busy_lab()
    lab.compact()
    moved = lab.stats()["pages_moved"] + lab.stats()["cpu_pages_moved"]
    lab.compact()
    assert lab.stats()["pages_moved"] + lab.stats()["cpu_pages_moved"] == moved


def test_pinned_pages_stay_and_are_counted_locked_ones_move() -> None:
    lab = Lab((32,))
    process = lab.spawn("a", anon="12M", holes="50 seed=1", mlock="100", pin="10 seed=2")
    pinned = {int(pfn): int(lab.vm.memory[pfn, 0]) for pfn in process.mm.pinned}
    lab.sysctl(dpu_compact_region_order=13)
    lab.compact()
    assert {pfn: int(lab.vm.memory[pfn, 0]) for pfn in pinned} == pinned
    assert 0 < lab.stats()["skipped_pinned"] <= len(pinned)
    assert lab.stats()["pages_moved"] > 1000
    assert int(lab.mem.zones["nr_mlock"].sum()) == process.mm.rss_pages
    lab.assert_at_rest()


@pytest.mark.slow
def test_only_movable_pageblocks_are_filled() -> None:
    """Movable pages leave other pageblocks but never enter them."""
    lab = busy_lab()
    foreign = set(np.flatnonzero(lab.mem.blocks != MOVABLE_BLOCK).tolist())
    before = {pfn for pfn in contents(lab) if pfn >> 9 in foreign}
    assert foreign
    lab.sysctl(dpu_compact_region_order=18)
    lab.compact()
    assert {pfn for pfn in contents(lab) if pfn >> 9 in foreign} <= before


@pytest.mark.slow
def test_larger_regions_free_whole_pageblocks() -> None:
    """Packing 2 MiB regions makes no free 2 MiB block of a mixed one; packing the zone does."""

    def large_blocks(order: int) -> int:
        lab = Lab((64,))
        lab.spawn("a", anon="48M", holes="50 seed=1")
        lab.sysctl(dpu_compact_region_order=order)
        lab.compact()
        nine, ten = lab.mem.zones["nr_free"].sum(axis=(0, 2))[9:]
        return int(nine + 2 * ten)

    assert large_blocks(18) >= large_blocks(9) + 8


@pytest.mark.slow
@pytest.mark.parametrize(("least", "batches"), [(1, True), (1024, False)])
def test_a_region_with_few_fragments_goes_to_the_cpu(least: int, batches: bool) -> None:
    lab = Lab((32,))
    lab.spawn("a", anon="8M", holes="50 seed=1")
    lab.sysctl(dpu_compact_min_fragments=least)
    lab.compact()
    stats = lab.stats()
    assert (stats["pages_moved"] > 0) is batches
    assert (stats["too_few_fragments"] > 0) is not batches
    assert stats["too_few_fragments"] == stats["fallbacks"]
    lab.assert_at_rest()


def test_without_a_device_linuxs_own_compaction_does_it() -> None:
    lab = Lab((32,), nr_ranks=None)
    lab.spawn("a", anon="8M", holes="50 seed=1")
    lab.compact()
    assert lab.vmstat()["compact_migrate_scanned"] > 0
    assert lab.vmstat()["pgmigrate_success"] > 100
    assert lab.stats()["regions"] == 0


def test_counters_agree_with_each_other() -> None:
    lab = busy_lab()
    before = lab.vmstat()
    lab.compact()
    stats, after = lab.stats(), lab.vmstat()
    assert stats["pages_moved"] == after["dpu_compact_pages_moved"]
    assert stats["ptes_updated"] == after["dpu_compact_ptes_updated"]
    assert stats["regions"] == after["dpu_compact_regions"]
    assert stats["fallbacks"] == after["dpu_compact_fallback"]
    moved = after["pgmigrate_success"] - before["pgmigrate_success"]
    assert moved == stats["pages_moved"] + stats["cpu_pages_moved"]
    assert after["compact_isolated"] == moved  # no batch failed, so all that was isolated moved
    assert stats["device_ns"] > 0
    assert stats["regions_in_flight"] == 0


# The device fails.


FAULTS = {
    FaultKind.DPU_FAULT: "dpu is in fault",
    FaultKind.TIMEOUT: "result timeout",
    FaultKind.PARTIAL: "internal error",
    FaultKind.CORRUPT: "corrupted memory",
    FaultKind.RANK_LOST: "driver error",
}


@pytest.mark.parametrize("move", [0, 1, 50])
@pytest.mark.parametrize("kind", FAULTS, ids=str)
@pytest.mark.parametrize("words", ["stamp", "full"])
@pytest.mark.slow
def test_a_fault_in_mid_batch_loses_nothing(kind: FaultKind, move: int, words: str) -> None:
    """What retired is kept, the rest is put back, the CPU goes on from there to the same layout."""
    lab = Lab((32,), words)
    lab.spawn("a", anon="8M", file="1M", holes="50 seed=1", fork="child")
    lab.sysctl(dpu_compact_region_order=13)
    expected = packed(lab, 13)
    lab.arm(kind, move, bit=12345)
    lab.compact()
    assert contents(lab) == expected
    lab.assert_at_rest()
    stats = lab.stats()
    assert (stats["failures"], stats["fallbacks"]) == (1, 1)
    assert lab.vmstat()["dpu_compact_fail"] == 1
    assert stats["pages_moved"] == move
    assert stats["pages_moved"] + stats["cpu_pages_moved"] == lab.vmstat()["pgmigrate_success"]
    (line,) = [line for line in lab.machine.printk.lines() if "failed" in line]
    assert f", {move} of {stats['cpu_pages_moved'] + move} pages moved" in line


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS, ids=str)
def test_a_fault_is_told_in_the_words_of_the_sdk(kind: FaultKind) -> None:
    lab = Lab((32,))
    lab.spawn("a", anon="8M", holes="50 seed=1")
    lab.sysctl(dpu_compact_region_order=13)
    lab.arm(kind, 7)
    lab.compact()
    (line,) = [line for line in lab.machine.printk.lines() if "failed" in line]
    assert line.startswith("DPU compaction failed: ")
    assert FAULTS[kind] in line.lower()


@pytest.mark.slow
def test_after_a_fault_the_device_is_used_again() -> None:
    lab = Lab((64,))
    lab.spawn("a", anon="40M", holes="50 seed=1")
    lab.arm(FaultKind.DPU_FAULT, 5)
    lab.compact()
    assert lab.stats()["failures"] == 1
    assert lab.stats()["regions"] > 5
    lab.assert_at_rest()


@pytest.mark.slow
def test_a_lost_rank_leaves_the_work_to_the_cpu() -> None:
    lab = Lab((64,))
    lab.spawn("a", anon="40M", holes="50 seed=1")
    expected = packed(lab, 9)
    lab.arm(FaultKind.RANK_LOST, 5)
    lab.compact()
    assert contents(lab) == expected
    assert lab.stats()["cpu_pages_moved"] > 1000
    assert any(line.endswith("using the CPU") for line in lab.machine.printk.lines())
    lab.assert_at_rest()
    lab.revive()
    lab.set("a", holes="60 seed=2")
    regions = lab.stats()["regions"]
    lab.compact()
    assert lab.stats()["regions"] > regions
    lab.assert_at_rest()


# The request is interrupted.


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize(("order", "enabled"), [(9, 1), (13, 1), (13, 0)])
@pytest.mark.slow
def test_an_interrupted_compaction_leaves_nothing_behind(order: int, enabled: int, patience: int) -> None:
    """Whichever yield it is closed at."""
    patch = small_slices(600)
    try:
        for nr in range(200):
            lab = Lab((32,), patience=patience)
            lab.sysctl(dpu_compact_region_order=order, dpu_compact_enabled=enabled)
            lab.spawn("a", anon="8M", holes="50 seed=1")
            operation = lab.start_compact()
            if any(advance(operation)[0] for _ in range(nr + 1)):
                return
            operation.close()
            lab.assert_at_rest()
    finally:
        patch.undo()
    pytest.fail("the compaction did not end")


@pytest.mark.slow
def test_two_compactions_run_one_after_the_other() -> None:
    patch = small_slices(300)
    try:
        lab = Lab((32, 34), patience=1)
        lab.spawn("a", anon="40M", holes="50 seed=1")
        settle([lab.start_compact(0), lab.start_compact(1), lab.start_compact(0)])
        assert lab.stats()["pages_moved"] > 2000
        lab.assert_at_rest()
    finally:
        patch.undo()


def test_who_needs_a_page_in_flight_waits_for_it() -> None:
    """A write to a page that is being moved goes to its new place."""
    patch = small_slices(4096)
    try:
        lab = Lab((32,), patience=10)
        lab.spawn("a", anon="8M", holes="50 seed=1")
        compaction, touch = lab.start_compact(), lab.start_set("a", "touch", "100")
        while not lab.vm.in_flight:
            assert not advance(compaction)[0]
        assert not advance(touch)[0]
        assert lab.vm.in_flight
        assert settle([compaction, touch]) == [1, 3]
        lab.assert_at_rest()
    finally:
        patch.undo()


@pytest.mark.slow
def test_memory_held_by_a_batch_is_waited_for() -> None:
    """No ENOMEM because of frames that a compaction keeps for a moment: by batch or by CPU."""
    for enabled in (1, 0):
        lab = Lab((32,), patience=5)
        lab.sysctl(dpu_compact_region_order=13, dpu_compact_enabled=enabled)
        lab.spawn("a", anon="28M", holes="60 seed=1")
        lab.spawn("b")
        compaction, fill = lab.start_compact(), lab.start_set("b", "anon", "14M")
        assert not advance(compaction)[0]
        assert all(not isinstance(outcome, OSError) for outcome in settle([fill, compaction]))
        lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("nr_slices", [1, 4, 20])
def test_pageblocks_claimed_between_slices_are_filled_no_more(nr_slices: int) -> None:
    """An unmovable allocation may turn a pageblock whose frames the CPU path holds."""
    patch = small_slices(37)
    try:
        lab = Lab((32,))
        lab.sysctl(dpu_compact_enabled=0, dpu_compact_region_order=13)
        lab.spawn("a", anon="20M", holes="70 seed=1")
        compaction = lab.start_compact()
        assert not any(advance(compaction)[0] for _ in range(1 + nr_slices))  # the first one surveys
        mem = lab.mem
        held = np.flatnonzero(mem.pages["flags"][: mem.nr_pages] & np.uint32(PG_held))
        assert len(held)
        for block in np.unique(held >> 9).tolist():
            zone = int(mem.pages["zone"][held[0]])
            set_pageblock_migratetype(mem.pages, mem.zones, mem.blocks, zone, block, MIGRATE_UNMOVABLE)
        assert settle([compaction]) == [1]
        lab.assert_at_rest()
    finally:
        patch.undo()


def test_page_tables_are_where_the_fragments_say() -> None:
    """A page of one mapping is restored through its remembered PTE; walk the tables to see that it was right."""
    lab = Lab((32,))
    process = lab.spawn("a", anon="4M", holes="50 seed=1")
    (vma,) = process.anon_vmas
    wrote = {vpn: int(stamp) for vpn, stamp in zip(vma.vpns().tolist(), vma.wrote, strict=True) if stamp}
    lab.compact()
    for vpn, stamp in wrote.items():
        pte = int(lab.vm.pt[walk_pte(lab.vm.pt, process.mm.root, vpn)])
        assert pte & 1
        assert int(lab.vm.memory[pte >> 12, 0]) == stamp
