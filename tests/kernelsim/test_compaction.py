# SPDX-License-Identifier: GPL-2.0-only
"""Who compacts, when it is worth trying, and what comes back: deferral, suitability, capture (kernel-abi 2.1, 2.5 to
2.7)."""

from typing import Any

import numpy as np
import pytest
from board import BLOCK, MOVABLE, RECLAIMABLE, UNMOVABLE, Board
from machines import Lab, advance

from kernelsim import compaction
from kernelsim.compaction_loop import _capture
from kernelsim.operation import complete

NOT_SUITABLE_ZONE, SKIPPED, DEFERRED = 0, 1, 2
CONTINUE, COMPLETE, PARTIAL_SKIPPED, CONTENDED, SUCCESS = 4, 5, 6, 7, 8
SYNC_FULL, SYNC_LIGHT, ASYNC = 0, 1, 2
GFP_KERNEL, GFP_NOFS, GFP_NOIO = 0xCC0, 0xC40, 0xC00


def direct(
    board: Board, order: int, prio: int = SYNC_LIGHT, gfp: int = GFP_KERNEL, wanted: int = MOVABLE
) -> tuple[int, int]:
    """(result, captured pfn or -1)."""
    return complete(board.compaction.try_to_compact_pages(gfp, order, prio, [0], 2, wanted))


def scattered(nr_blocks: int = 10) -> Board:
    """Every second page is free; the others are movable in the lower half, the kernel's in the upper. Two pageblocks
    more, at the end, are the kernel's."""
    board = Board(nr_blocks + 2)
    middle, end = board.pfn(nr_blocks // 2), board.pfn(nr_blocks)
    board.movable(range(board.pfn(0, 1), middle, 2))
    board.free_each(range(board.pfn(0), end, 2))
    return board


# Suitability.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "free", "code"),
    [
        # min 100, low 200, and 2 << order for the copies
        (3, 116, SKIPPED),
        (3, 117, CONTINUE),
        (4, 232, SKIPPED),
        (4, 233, CONTINUE),
        (9, 1224, SKIPPED),
        (9, 1225, CONTINUE),
    ],
)
def test_free_memory_for_the_copies_is_needed(order: int, free: int, code: int) -> None:
    board = Board(8)
    board.free_each(range(board.pfn(0), board.pfn(0) + 2 * free, 2))
    board.watermarks(100, 100)
    assert board.compaction.suitability(0, order, 2) == code


def test_the_reserve_for_others_counts() -> None:
    board = Board(8)
    board.free_each(range(board.pfn(0), board.pfn(0) + 400, 2))
    board.zone["reserve"] = [0, 0, 500, 0]
    board.watermarks(0, 0)
    assert board.compaction.suitability(0, 3, 1) == CONTINUE
    assert board.compaction.suitability(0, 3, 2) == SKIPPED


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "code"), [(249, CONTINUE), (250, NOT_SUITABLE_ZONE), (1000, NOT_SUITABLE_ZONE)])
def test_fragmentation_must_be_the_trouble_not_memory(threshold: int, code: int) -> None:
    """4 free blocks of order 8 for order 9: 1000 - (1000 + 1024 * 1000 // 512) // 4 = 250."""
    board = Board(8)
    for block in range(4):
        board.free(board.pfn(block), 256)
    board.machine.compaction_sysctl.extfrag_threshold = threshold
    assert board.compaction.suitability(0, 9, 2) == code
    assert board.compaction.suitability(0, 3, 2) == CONTINUE  # small orders are not asked


@pytest.mark.slow
def test_a_block_that_is_free_needs_no_work() -> None:
    board = scattered()
    board.free(board.pfn(11), BLOCK)
    before = board.events("compact_migrate_scanned", "compact_free_scanned")
    assert direct(board, 9) == (SUCCESS, -1)
    assert board.events("compact_migrate_scanned", "compact_free_scanned") == before


def test_without_memory_a_request_is_turned_away() -> None:
    board = scattered()
    board.watermarks(100_000)
    assert direct(board, 9) == (SKIPPED, -1)
    assert board.events("compact_migrate_scanned") == [0]


# Deferral.


def deferral(board: Board) -> tuple[int, int, int]:
    return tuple(int(board.zone[f"compact_{name}"]) for name in ("considered", "defer_shift", "order_failed"))


def test_each_failure_doubles_the_attempts_that_are_skipped_up_to_64() -> None:
    board = Board(4)
    board.zone["compact_order_failed"] = 11
    skipped = []
    for _ in range(8):
        board.compaction.defer_compaction(0, 9)
        nr = 0
        while board.compaction.compaction_deferred(0, 9):
            nr += 1
        skipped.append(nr)
    assert skipped == [1, 3, 7, 15, 31, 63, 63, 63]  # the last attempt of 2^shift goes through
    assert deferral(board) == (64, 6, 9)


def test_smaller_orders_than_the_one_that_failed_are_not_deferred() -> None:
    board = Board(4)
    board.zone["compact_order_failed"] = 11
    board.compaction.defer_compaction(0, 9)
    board.compaction.defer_compaction(0, 5)
    assert deferral(board) == (0, 2, 5)
    assert not board.compaction.compaction_deferred(0, 4)
    assert board.compaction.compaction_deferred(0, 5)
    assert deferral(board) == (1, 2, 5)


@pytest.mark.parametrize(("success", "after"), [(True, (0, 0, 10)), (False, (1, 2, 10))])
def test_a_success_raises_the_order_and_an_allocation_ends_the_deferral(
    success: bool, after: tuple[int, int, int]
) -> None:
    board = Board(4)
    for _ in range(2):
        board.compaction.defer_compaction(0, 9)
    board.compaction.compaction_deferred(0, 9)
    board.compaction.compaction_defer_reset(0, 9, success)
    assert deferral(board) == after
    board.compaction.compaction_defer_reset(0, 3, success)
    assert deferral(board) == after


def hopeless(nr_blocks: int = 8) -> Board:
    """Free memory, much of it, in single pages between the kernel's."""
    board = Board(nr_blocks)
    board.free_each(range(board.pfn(0), board.end, 2))
    return board


@pytest.mark.slow
@pytest.mark.parametrize(("prio", "shift"), [(ASYNC, 0), (SYNC_LIGHT, 1), (SYNC_FULL, 1)])
def test_a_run_that_fails_defers_the_next_unless_it_was_async(prio: int, shift: int) -> None:
    board = hopeless()
    result, captured = direct(board, 9, prio)
    assert (result, captured) == (COMPLETE, -1)
    assert deferral(board)[1] == shift


def test_a_deferred_zone_is_left_alone_except_at_full_priority() -> None:
    board = hopeless()
    direct(board, 9)
    scanned = board.events("compact_migrate_scanned")
    assert direct(board, 9) == (DEFERRED, -1)
    assert board.events("compact_migrate_scanned") == scanned
    assert direct(board, 9, SYNC_FULL)[0] == COMPLETE
    assert board.events("compact_migrate_scanned") > scanned


@pytest.mark.slow
def test_after_the_longest_deferral_skip_bits_are_forgotten_if_a_run_went_all_the_way() -> None:
    for flush in (0, 1):
        board = scattered()
        board.mem.skip[:] = 1
        board.zone["compact_blockskip_flush"] = flush
        for _ in range(6):
            board.compaction.defer_compaction(0, 9)
        board.zone["compact_considered"] = 63
        result, _ = direct(board, 9)
        assert (result == SUCCESS) == bool(flush)
        board.assert_sound()


# Direct compaction.


def test_a_request_without_gfp_io_does_not_compact() -> None:
    board = scattered()
    assert direct(board, 9, gfp=GFP_NOIO) == (SKIPPED, -1)
    assert board.events("compact_migrate_scanned") == [0]


@pytest.mark.parametrize(("gfp", "moves"), [(GFP_KERNEL, True), (GFP_NOFS, False)])
def test_a_request_without_gfp_fs_leaves_file_pages(gfp: int, moves: bool) -> None:
    board = Board(8)
    board.cached(range(board.pfn(0), board.pfn(0, 16)))
    board.free_each(range(board.pfn(4), board.end, 2))
    direct(board, 9, gfp=gfp)
    assert {pfn >= board.pfn(4) for pfn in board.lru()} == {moves}
    board.assert_sound()


@pytest.mark.slow
@pytest.mark.parametrize("prio", [SYNC_LIGHT, SYNC_FULL])
def test_the_block_that_was_emptied_is_captured(prio: int) -> None:
    """It is the request's: allocated, off the free lists, and nothing is left over."""
    board = scattered()
    free = int(board.zone["free_pages"])
    result, captured = direct(board, 9, prio)
    assert (result, captured % BLOCK) == (SUCCESS, 0)
    assert captured >= board.pfn(0)
    pages = board.mem.pages[captured : captured + BLOCK]
    assert (pages["flags"] == 0).all()
    assert pages["refcount"].tolist() == [1] + [0] * 511
    assert int(board.zone["free_pages"]) == free - BLOCK
    assert int(board.zone["pgalloc"]) == BLOCK
    assert deferral(board)[2] == 10
    board.assert_sound()


def test_a_large_block_gives_only_what_was_wanted() -> None:
    """Order 9 is wanted and the last page to go completes a block of order 10."""
    board = Board(10)
    board.free(board.pfn(0), 2 * BLOCK)
    board.free(board.pfn(8, 8), 504)
    cc = board.control(9, 1, direct_compaction=1, migratetype=MOVABLE, capture_wanted=1, ignore_skip_hint=1)
    pages = board.mem.pages
    assert board.free_blocks()[board.pfn(0)] == 10
    _capture(board.arrays(), cc, board.pfn(1, 7))
    assert int(cc["captured"][0]) == board.pfn(1)
    assert board.free_blocks()[board.pfn(0)] == 9
    assert int(pages["refcount"][board.pfn(1)]) == 1
    board.assert_sound()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "kind", "wanted", "caught"),
    [
        (5, MOVABLE, MOVABLE, True),
        (5, MOVABLE, UNMOVABLE, False),  # would mix types within the pageblock
        (5, UNMOVABLE, MOVABLE, True),
        (5, RECLAIMABLE, UNMOVABLE, True),
        (9, MOVABLE, UNMOVABLE, True),
    ],
)
def test_small_blocks_of_movable_pageblocks_are_captured_for_movable_requests_only(
    order: int, kind: int, wanted: int, caught: bool
) -> None:
    board = Board(10)
    board.kind(1, kind)
    board.movable(range(board.pfn(1), board.pfn(1, 1 << order)))
    board.free_each(range(board.pfn(4), board.end, 2))
    result, captured = direct(board, order, SYNC_LIGHT, wanted=wanted)
    assert result == SUCCESS
    assert captured == (board.pfn(1) if caught else -1)
    board.assert_sound()


@pytest.mark.slow
def test_an_interrupted_request_keeps_nothing() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(compaction, "SLICE_PAGES", 0)
    over, slices = False, 0
    while not over:
        board = scattered()
        free = int(board.zone["free_pages"])
        run = board.compaction.try_to_compact_pages(GFP_KERNEL, 5, SYNC_LIGHT, [0], 2, UNMOVABLE)
        slices += 1
        for _ in range(slices):
            over, _ = advance(run)
            assert board.machine.check() == []
        run.close()
        assert int(board.zone["free_pages"]) == free
        board.assert_sound()
    patch.undo()
    assert slices > 2


def test_targets_given_back_by_an_interrupted_request_are_not_captured() -> None:
    """Targets from an Unmovable pageblock, at full priority: too small to be stolen, large enough to be caught."""
    patch = pytest.MonkeyPatch()
    patch.setattr(compaction, "SLICE_PAGES", 0)
    board = Board(10)
    board.kind(4, UNMOVABLE)
    board.movable(range(board.pfn(1), board.pfn(1, 6), 2))
    board.free(board.pfn(4, 64), 8)
    fields = {"ignore_skip_hint": 1, "ignore_block_suitable": 1, "direct_compaction": 1, "capture_wanted": 1}
    cc = board.control(2, 1, migratetype=MOVABLE, **fields)
    run = board.compaction._compact_zone(cc)
    while int(board.zone["held_pages"]) == 0:
        assert not advance(run)[0]
    assert int(board.zone["held_pages"]) == 5
    run.close()
    patch.undo()
    assert int(cc["captured"][0]) == -1
    assert int(board.zone["free_pages"]) == 8
    board.assert_sound()


def test_zones_are_tried_in_the_order_of_the_list() -> None:
    """Zones behind a success are not touched."""
    lab = Lab((32, 34), nr_ranks=None)
    zones = lab.mem.zones
    lab.spawn("a", anon="24M", holes="60 seed=1")
    free = zones["free_pages"].tolist()
    zonelist = lab.mem.zonelist[0].tolist()
    assert len(zonelist) == 3
    result, captured = complete(
        lab.machine.compaction.try_to_compact_pages(GFP_KERNEL, 9, SYNC_LIGHT, zonelist, 1, MOVABLE)
    )
    assert result == SUCCESS
    first = zonelist[0]
    free[first] -= BLOCK
    assert int(zones["start_pfn"][first]) <= captured < int(zones["end_pfn"][first])
    assert zones["free_pages"].tolist() == free


# kcompactd.


def kcompactd(board: Board, order: int) -> int:
    return complete(board.compaction.compact_zone_for_kcompactd(0, order, 2))


def test_kcompactd_makes_a_block_and_counts_its_scans_twice() -> None:
    board = scattered()
    assert kcompactd(board, 9) == SUCCESS
    assert max(board.free_blocks().values()) >= 9
    migrate, free = board.events("compact_migrate_scanned", "compact_free_scanned")
    assert migrate > 0
    assert board.events("compact_daemon_migrate_scanned", "compact_daemon_free_scanned") == [migrate, free]
    assert board.events("compact_stall", "compact_success", "compact_fail", "compact_daemon_wake") == [0] * 4
    board.assert_sound()


@pytest.mark.slow
@pytest.mark.parametrize("defrag_mode", [0, 1])
def test_in_defrag_mode_kcompactd_goes_on_until_the_high_watermark_is_free_in_blocks(defrag_mode: int) -> None:
    board = scattered(16)
    board.free(board.pfn(17), BLOCK)
    board.watermarks(400, 350)  # high: 1100
    board.machine.compaction_sysctl.defrag_mode = defrag_mode
    assert kcompactd(board, 9) == SUCCESS
    in_blocks = sum(1 << order for order in board.free_blocks().values() if order >= 9)
    assert (in_blocks == BLOCK) == (not defrag_mode)
    assert (in_blocks - 511 > 1100) == bool(defrag_mode)
    board.assert_sound()


def test_proactive_compaction_stops_at_the_low_mark() -> None:
    board = scattered(16)
    sysctl = board.machine.compaction_sysctl
    score = board.compaction.fragmentation_score_node
    assert score(0) == 99  # 100 of the zone, by present / (node's present + 1)
    sysctl.compaction_proactiveness = 60
    complete(board.compaction.proactive_compact_node(0))
    zone_score = compaction.extfrag.fragmentation_score_zone(board.mem.zones, 0)
    assert 30 < zone_score <= 40
    assert board.events("compact_daemon_migrate_scanned") == board.events("compact_migrate_scanned")
    assert board.events("compact_daemon_wake") == [0]
    board.assert_sound()


@pytest.mark.slow
@pytest.mark.parametrize(("proactiveness", "low", "high"), [(20, 80, 90), (0, 100, 100), (100, 5, 15), (97, 5, 15)])
def test_marks(proactiveness: int, low: int, high: int) -> None:
    board = Board(4)
    board.machine.compaction_sysctl.compaction_proactiveness = proactiveness
    assert board.compaction.fragmentation_score_wmark(True) == low
    assert board.compaction.fragmentation_score_wmark(False) == high


# Forgetting what was learnt.


def test_skip_bits_of_blocks_with_something_to_move_or_to_fill_are_cleared() -> None:
    """After a run to the end, when kswapd goes to sleep; the positions are cached where there is work."""
    board = Board(12)
    board.movable(range(board.pfn(2), board.pfn(2, 512), 8))
    board.free_each(range(board.pfn(9), board.pfn(9, 512), 8))
    board.mem.skip[:] = 1
    board.compaction.reset_isolation_suitable(0)
    assert len(board.skipped()) == 12  # no run has gone all the way
    board.zone["compact_blockskip_flush"] = 1
    board.compaction.reset_isolation_suitable(0)
    assert board.skipped() == [0, 1, 3, 4, 5, 6, 7, 8, 10, 11]
    assert int(board.zone["compact_blockskip_flush"]) == 0
    assert board.zone["compact_cached_migrate_pfn"].tolist() == [board.pfn(2)] * 2
    assert int(board.zone["compact_cached_free_pfn"]) == board.pfn(9)


# Several zones and nodes.


def fragmented_nodes(words: str = "stamp") -> Lab:
    lab = Lab((32, 34), words, nr_ranks=None)
    for node in (0, 1):
        lab.spawn(f"p{node}", node=str(node), anon="16M", holes="50 seed=3")
        lab.set(f"p{node}", fork=f"child{node}")
        lab.set(f"child{node}", touch="20 seed=4")
    lab.assert_at_rest()
    return lab


def free_by_order(lab: Lab) -> Any:
    return lab.mem.zones["nr_free"].sum(axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["stamp", "full"])
def test_a_node_is_compacted_zone_by_zone_and_the_other_left_alone(words: str) -> None:
    lab = fragmented_nodes(words)
    before, free = free_by_order(lab), lab.mem.zones["free_pages"].tolist()
    lab.write("/sys/devices/system/node/node1/compact", "x")
    after = free_by_order(lab)
    on_node_1 = lab.mem.zones["node"] == 1
    assert (after[~on_node_1] == before[~on_node_1]).all()
    assert (after[on_node_1, 10] > before[on_node_1, 10]).any()
    lab.write("/proc/sys/vm/compact_memory", "1")
    assert (free_by_order(lab)[~on_node_1, 9:].sum(axis=0) > before[~on_node_1, 9:].sum(axis=0)).any()
    assert lab.mem.zones["free_pages"].tolist() == free  # no page changes its zone
    lab.assert_at_rest()


@pytest.mark.slow
def test_all_mappings_follow() -> None:
    """Where the targets run out as the scanners meet, one page for each zone counts as failed."""
    lab = fragmented_nodes()
    before = lab.vmstat()
    lab.write("/proc/sys/vm/compact_memory", "1")
    grown = {name: value - before[name] for name, value in lab.vmstat().items()}
    assert grown["pgmigrate_success"] > 1000
    assert grown["pgmigrate_fail"] <= len(lab.mem.zones)
    assert grown["compact_isolated"] >= 2 * grown["pgmigrate_success"]
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [0, 1])
def test_locked_pages_stay_where_they_may_not_be_moved(allowed: int) -> None:
    lab = Lab((32,), nr_ranks=None)
    lab.sysctl(compact_unevictable_allowed=allowed)
    lab.spawn("a", anon="16M", holes="50 seed=3", mlock="100")
    unevictable = lab.mem.pages["flags"][: lab.mem.nr_pages] & np.uint32(1 << 18) != 0
    assert unevictable.sum() > 1500
    lab.write("/proc/sys/vm/compact_memory", "1")
    assert (lab.vmstat()["pgmigrate_success"] > 0) == bool(allowed)
    now = lab.mem.pages["flags"][: lab.mem.nr_pages] & np.uint32(1 << 18) != 0
    assert (now == unevictable).all() == (not allowed)
    lab.assert_at_rest()


def test_pinned_pages_stay_and_are_not_even_tried() -> None:
    lab = Lab((32,), nr_ranks=None)
    lab.spawn("a", anon="16M", holes="50 seed=3", pin="100")
    lab.write("/proc/sys/vm/compact_memory", "1")
    vmstat = lab.vmstat()
    assert (vmstat["pgmigrate_success"], vmstat["pgmigrate_fail"]) == (0, 0)
    lab.set("a", pin="0")
    lab.write("/proc/sys/vm/compact_memory", "1")
    assert lab.vmstat()["pgmigrate_success"] > 500
    lab.assert_at_rest()
