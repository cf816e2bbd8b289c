# SPDX-License-Identifier: GPL-2.0-only
"""compact_zone(): where pages end up, what fails, when a run is over (kernel-abi 2.1, 2.4, 3)."""

from typing import Any

import numpy as np
import pytest
from board import ASYNC, BLOCK, MOVABLE, PIN, RECLAIMABLE, SYNC, SYNC_LIGHT, UNMOVABLE, Board
from machines import advance

from kernelsim import compaction
from kernelsim.compaction_loop import compact_finished

CONTINUE, COMPLETE, PARTIAL_SKIPPED, CONTENDED, SUCCESS = 4, 5, 6, 7, 8
NO_SUITABLE_PAGE = 3


def half_full(nr_blocks: int, seed: int = 1) -> Board:
    """A random half of every block is movable, the rest free."""
    board = Board(nr_blocks)
    rng = np.random.default_rng(seed)
    pfns = np.arange(board.pfn(0), board.end)
    used = rng.random(len(pfns)) < 0.5
    board.movable(pfns[used].tolist())
    board.free_each(pfns[~used].tolist())
    return board


def block_of(board: Board, pfn: int) -> int:
    return (pfn - board.pfn(0)) // BLOCK


# By hand.


@pytest.mark.slow
def test_movable_pages_go_up_until_the_scanners_meet() -> None:
    """Half of the memory is in use, so they meet in the middle: free below, full above."""
    board = half_full(16)
    nr = len(board.lru())
    assert board.run(board.control()) == COMPLETE
    assert all(pfn >= put for put, pfn in board.where().items())
    assert {block_of(board, pfn) for pfn in board.lru()} <= set(range(7, 16))
    assert all(block_of(board, pfn) <= 9 for pfn in board.free_blocks())
    assert sum(order == 10 for order in board.free_blocks().values()) >= 3
    assert len(board.lru()) == nr
    board.assert_sound()


def test_the_last_page_taken_gets_the_first_target() -> None:
    """Isolated pages are a stack; a large target is used from its lowest page on."""
    board = Board(4)
    board.movable(range(board.pfn(0), board.pfn(0, 32)))
    board.free(board.pfn(3, 64), 64)
    assert board.run(board.control()) == COMPLETE
    assert board.where() == {board.pfn(0, offset): board.pfn(3, 64 + 31 - offset) for offset in range(32)}
    assert board.free_blocks() == {board.pfn(0): 5, board.pfn(3, 96): 5}
    board.assert_sound()


def test_the_counters_of_a_run() -> None:
    board = Board(4)
    board.movable(range(board.pfn(0), board.pfn(0, 40)))
    board.free(board.pfn(3, 64), 64)
    board.run(board.control())
    success, fail, isolated = board.events("pgmigrate_success", "pgmigrate_fail", "compact_isolated")
    assert (success, fail) == (40, 0)
    assert isolated == 40 + 64
    # block 0 once, then blocks 1 and 2, which have nothing; block 3 page by page up to its free block
    assert board.events("compact_migrate_scanned", "compact_free_scanned") == [3 * BLOCK, 64 + 64]
    assert board.events("compact_stall", "compact_fail", "compact_success", "compact_daemon_wake") == [0, 0, 0, 0]
    assert board.events("compact_daemon_migrate_scanned", "compact_daemon_free_scanned") == [0, 0]


def test_file_pages_in_use_are_tried_and_fail() -> None:
    """Their pins do not show to the scanner; they stay, and count as failures, once each."""
    board = Board(4)
    board.cached([board.pfn(0, offset) for offset in range(20)])
    held = [board.pfn(0, offset) for offset in range(20, 25)]
    board.cached(held, 1 + PIN)
    board.movable([board.pfn(0, 30)], refcount=1 + PIN)
    board.free(board.pfn(3), 256)
    assert board.run(board.control()) == COMPLETE
    assert board.events("pgmigrate_success", "pgmigrate_fail") == [20, 5]
    assert [pfn for pfn in board.lru() if block_of(board, pfn) == 0] == [*held, board.pfn(0, 30)]
    board.assert_sound()


def test_out_of_targets_the_run_ends_contended_and_one_page_counts_as_failed() -> None:
    """Of 256 free pages 32 may be held: a cluster of 32 moves, then 32 of the other 68 of the block."""
    board = Board(8)
    board.movable(range(board.pfn(0), board.pfn(0, 100)))
    for offset in range(0, 512, 16):
        board.free(board.pfn(7, offset), 8)
    board.watermarks(222)
    assert board.run(board.control()) == CONTENDED
    assert board.events("pgmigrate_success", "pgmigrate_fail") == [64, 1]
    assert len([pfn for pfn in board.lru() if block_of(board, pfn) == 0]) == 36
    board.assert_sound()


def test_a_run_without_any_free_page_moves_nothing() -> None:
    board = Board(4)
    board.movable(range(board.pfn(0), board.pfn(2)))
    board.run(board.control())
    assert board.events("pgmigrate_success") == [0]
    assert all(put == pfn for put, pfn in board.where().items())
    board.assert_sound()


@pytest.mark.slow
@pytest.mark.parametrize("nr_blocks", [1, 2, 3])
def test_a_zone_of_few_blocks(nr_blocks: int) -> None:
    """In a single pageblock the scanners have met before they begin."""
    board = half_full(nr_blocks)
    assert board.run(board.control()) == COMPLETE
    assert (board.events("pgmigrate_success") == [0]) == (nr_blocks == 1)
    board.assert_sound()


# Whole pageblocks or clusters.


def moves(board: Board, cc: Any, slices: int = 1) -> list[int]:
    """Pages moved in each of the first rounds of isolation and migration."""
    patch = pytest.MonkeyPatch()
    patch.setattr(compaction, "SLICE_PAGES", 0)
    run, counts = board.compaction._compact_zone(cc), [0]
    for _ in range(slices):
        advance(run)
        counts.append(board.events("pgmigrate_success")[0])
        assert board.machine.check() == []
    run.close()
    patch.undo()
    return np.diff(counts).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "rounds"),
    [
        (-1, [32, 480, 32, 480]),
        (9, [32, 480]),
        (3, [32, 32, 32, 32]),
    ],
)
def test_a_block_met_twice_is_done_as_a_whole(order: int, rounds: list[int]) -> None:
    """So that it can be captured; for less than a pageblock a cluster is always enough."""
    board = Board(10)
    board.movable(range(board.pfn(1), board.pfn(3)))
    board.free_each(range(board.pfn(5), board.end, 2))
    board.zone["compact_cached_migrate_pfn"] = board.pfn(1)
    cc = board.control(order, SYNC_LIGHT, ignore_skip_hint=1)
    before = 1 if order == -1 else 0  # a run by hand begins with block 0, which has nothing
    assert moves(board, cc, len(rounds) + before)[before:] == rounds


@pytest.mark.slow
def test_after_a_failure_the_rest_of_the_block_is_done_at_once_and_skipped_later() -> None:
    """Unless SYNC, or skip bits do not count."""
    for mode, ignore, first in ((SYNC_LIGHT, 0, 199), (SYNC_LIGHT, 1, 31), (SYNC, 0, 31)):
        board = Board(8)
        board.cached([board.pfn(1)], 1 + PIN)
        board.movable(range(board.pfn(1, 1), board.pfn(1, 200)))
        board.free(board.pfn(7, 8), 504)
        board.zone["compact_cached_migrate_pfn"] = board.pfn(1)
        assert moves(board, board.control(9, mode, ignore_skip_hint=ignore)) == [first]
        assert (1 in board.skipped()) == (ignore == 0)
        board.assert_sound()


# Over.


def finished(board: Board, cc: Any) -> int:
    return int(compact_finished(board.arrays(), cc))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "kind", "wanted", "over"),
    [
        (3, MOVABLE, MOVABLE, True),
        (3, UNMOVABLE, MOVABLE, False),  # too small to steal for a movable page
        (3, RECLAIMABLE, MOVABLE, False),
        (4, UNMOVABLE, MOVABLE, True),
        (3, MOVABLE, UNMOVABLE, True),
        (3, MOVABLE, RECLAIMABLE, True),
        (3, RECLAIMABLE, UNMOVABLE, True),
        (2, MOVABLE, MOVABLE, False),  # smaller than wanted
        (9, UNMOVABLE, MOVABLE, True),
    ],
)
def test_a_request_is_met_by_a_block_it_may_have(order: int, kind: int, wanted: int, over: bool) -> None:
    board = Board(6)
    board.kind(4, kind)
    board.free(board.pfn(4), 1 << order)
    cc = board.control(3, SYNC_LIGHT, migratetype=wanted)
    assert finished(board, cc) == (SUCCESS if over else NO_SUITABLE_PAGE)


def test_a_pageblock_is_always_brought_to_its_end_first() -> None:
    board = Board(6)
    board.free(board.pfn(4), 8)
    cc = board.control(3, SYNC_LIGHT, migratetype=MOVABLE)
    cc["migrate_pfn"] = board.pfn(1, 32)
    assert finished(board, cc) == CONTINUE
    cc["migrate_pfn"] = board.pfn(2)
    assert finished(board, cc) == SUCCESS


def test_by_hand_a_free_block_is_no_reason_to_stop() -> None:
    board = Board(6)
    board.free(board.pfn(4), BLOCK)
    assert finished(board, board.control()) == CONTINUE


@pytest.mark.slow
@pytest.mark.parametrize(("direct", "whole_zone"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_scanners_that_met_start_anew_at_the_ends(direct: int, whole_zone: int) -> None:
    """In the same pageblock is close enough. Only a direct compaction asks for skip bits to be cleared."""
    board = Board(6)
    board.zone["compact_cached_migrate_pfn"] = board.pfn(3)
    board.zone["compact_cached_free_pfn"] = board.pfn(4)
    cc = board.control(9, SYNC_LIGHT, direct_compaction=direct)
    cc["whole_zone"] = whole_zone
    cc["free_pfn"], cc["migrate_pfn"] = board.pfn(3, 256), board.pfn(3, 16)
    assert finished(board, cc) == (COMPLETE if whole_zone else PARTIAL_SKIPPED)
    assert board.zone["compact_cached_migrate_pfn"].tolist() == [board.pfn(0)] * 2
    assert int(board.zone["compact_cached_free_pfn"]) == board.pfn(5)
    assert int(board.zone["compact_blockskip_flush"]) == direct


def test_a_block_apart_they_have_not_met() -> None:
    board = Board(6)
    cc = board.control()
    cc["free_pfn"], cc["migrate_pfn"] = board.pfn(3), board.pfn(2, 511)
    assert finished(board, cc) == CONTINUE


def test_proactive_compaction_goes_down_to_its_score() -> None:
    """Free: 512 pages in one block of order 9 and 512 single ones: score 50."""
    board = Board(8)
    board.free(board.pfn(7), BLOCK)
    for block in (5, 6):
        board.free_each(range(board.pfn(block), board.pfn(block, 512), 2))
    for mark, result in ((50, SUCCESS), (49, CONTINUE)):
        assert finished(board, board.control(-1, SYNC_LIGHT, proactive_mark=mark)) == result


def test_in_defrag_mode_enough_must_be_free_in_whole_blocks() -> None:
    """More than the mark and the reserve, in blocks of order 9 and 10 alone."""
    board = Board(8)
    board.free(board.pfn(4), 2 * BLOCK)
    board.free(board.pfn(7), 256)
    board.zone["reserve"][3] = 20
    for mark, result in ((1002, SUCCESS), (1003, CONTINUE)):
        cc = board.control(1, SYNC_LIGHT, kcompactd=1, blocks_mark=mark, highest_type=3)
        assert finished(board, cc) == result  # 1024 - 1 > mark + 20


# Positions of earlier runs.


def test_a_run_for_an_order_goes_on_where_the_last_one_left_off() -> None:
    board = Board(8)
    board.zone["compact_cached_migrate_pfn"] = [board.pfn(2), board.pfn(1)]
    board.zone["compact_cached_free_pfn"] = board.pfn(6)
    for mode, at in ((ASYNC, 2), (SYNC_LIGHT, 1), (SYNC, 1)):
        cc = board.control(9, mode)
        assert (int(cc["migrate_pfn"][0]), int(cc["free_pfn"][0])) == (board.pfn(at), board.pfn(6))
        assert int(cc["whole_zone"][0]) == 0
    by_hand = board.control()
    assert (int(by_hand["migrate_pfn"][0]), int(by_hand["free_pfn"][0])) == (board.pfn(0), board.pfn(7))


def test_positions_outside_the_zone_are_put_right() -> None:
    board = Board(8)
    board.zone["compact_cached_migrate_pfn"] = board.end
    board.zone["compact_cached_free_pfn"] = board.pfn(0) - BLOCK
    cc = board.control(9, SYNC_LIGHT)
    assert (int(cc["migrate_pfn"][0]), int(cc["free_pfn"][0])) == (board.pfn(0), board.pfn(7))
    assert int(cc["whole_zone"][0]) == 1


def test_what_an_async_run_passed_a_sync_run_need_not_look_at_until_something_is_isolated() -> None:
    board = Board(12)
    board.movable([board.pfn(5)])
    board.free_each([board.pfn(11, 64)])
    seen = []
    run = board.control(9, ASYNC, direct_compaction=1, migratetype=MOVABLE)
    for _ in moves(board, run, 4):
        seen = board.zone["compact_cached_migrate_pfn"].tolist()
    assert seen[0] == seen[1] > board.pfn(0)


@pytest.mark.slow
def test_a_run_to_the_end_from_the_middle_has_skipped_a_part() -> None:
    board = half_full(12)
    board.zone["compact_cached_migrate_pfn"] = board.pfn(3)
    assert board.run(board.control(10, SYNC_LIGHT, kcompactd=1)) in (PARTIAL_SKIPPED, SUCCESS)
    board = Board(12)
    board.zone["compact_cached_migrate_pfn"] = board.pfn(3)
    assert board.run(board.control(10, SYNC_LIGHT, kcompactd=1)) == PARTIAL_SKIPPED
    board = Board(12)
    assert board.run(board.control(10, SYNC_LIGHT, kcompactd=1)) == COMPLETE


# Per-CPU lists.


@pytest.mark.slow
@pytest.mark.parametrize(("order", "merged"), [(-1, False), (5, True), (9, False)])
def test_what_a_request_freed_leaves_the_per_cpu_list_with_its_chunk(order: int, merged: bool) -> None:
    """A run by hand lets it rest there, and one for a pageblock does until it is through with the pageblock."""
    board = Board(8, (0, 400, 400, 400, 8, 0))
    board.movable(range(board.pfn(1), board.pfn(1, 64)))
    board.free_each(range(board.pfn(7), board.end, 2))
    board.zone["compact_cached_migrate_pfn"] = board.pfn(1)
    cc = board.control(order, SYNC_LIGHT, ignore_skip_hint=1)
    moves(board, cc, 2 if order == -1 else 1)
    assert (board.free_blocks().get(board.pfn(1)) == 5) == merged
    assert int(board.mem.pagesets["count"][0, 0]) > 0 or merged
    board.assert_sound()


def test_after_the_pageblock_a_request_for_one_sees_it_whole() -> None:
    board = Board(8, (0, 4000, 4000, 4000, 8, 0))
    board.movable(range(board.pfn(1), board.pfn(2)))
    for block in (5, 6, 7):
        board.free(board.pfn(block, 8), 504)
    board.zone["compact_cached_migrate_pfn"] = board.pfn(1)
    assert board.run(board.control(9, SYNC_LIGHT, kcompactd=1)) == SUCCESS
    assert board.free_blocks()[board.pfn(1)] == 9
    board.assert_sound()
