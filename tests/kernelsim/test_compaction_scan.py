# SPDX-License-Identifier: GPL-2.0-only
"""The migrate scanner: which pages it takes, what it counts, which pageblocks it leaves out (kernel-abi 2.2)."""

from typing import Any

import pytest
from board import (
    ASYNC,
    BLOCK,
    HEAD,
    HUGE,
    MOVABLE,
    PIN,
    RECLAIMABLE,
    SLAB,
    SYNC,
    SYNC_LIGHT,
    UNEVICTABLE,
    UNMOVABLE,
    WRITEBACK,
    Board,
)
from machines import Lab

from kernelsim.compact_control import vm_arrays
from kernelsim.compaction_scan import (
    fast_find_migrateblock,
    isolate_migratepages,
    isolate_migratepages_block,
    may_isolate,
    putback_movable_pages,
)

DIRECT = {"direct_compaction": 1}


def isolate(board: Board, cc: Any, start: int, end: int) -> list[int]:
    """The pages that one call takes, in the order they were taken."""
    v = board.arrays()
    before = int(cc["nr_src"][0])
    nr = isolate_migratepages_block(v, cc, start, end)
    taken = v.src[before : int(cc["nr_src"][0])].tolist()
    assert sum(1 << int(board.mem.pages["order"][pfn]) for pfn in taken) == nr
    return taken


def scanned(cc: Any) -> int:
    return int(cc["total_migrate_scanned"][0])


def put_back(board: Board, cc: Any) -> None:
    putback_movable_pages(board.arrays(), cc)
    board.assert_sound()


@pytest.mark.slow
def test_a_cluster_is_32_pages_then_the_rest_of_the_block() -> None:
    board = Board(2)
    start, end = board.pfn(0), board.pfn(1)
    board.movable(range(start, start + 100))
    cc = board.control()
    assert isolate(board, cc, start, end) == list(range(start, start + 32))
    assert scanned(cc) == 32
    assert int(cc["migrate_pfn"][0]) == start + 32
    put_back(board, cc)
    cc["finish_pageblock"] = 1
    assert isolate(board, cc, start, end) == list(range(start, start + 100))
    assert int(cc["migrate_pfn"][0]) == end
    assert board.events("compact_isolated") == [132]
    assert int(board.mem.nodes["nr_isolated_anon"][0]) == 100
    put_back(board, cc)


def test_a_free_block_costs_all_of_its_pages() -> None:
    """A live run: range 512, nr_scanned 1024 where a block of order 10 begins."""
    board = Board(2)
    board.free(board.pfn(0), 2 * BLOCK)
    cc = board.control()
    assert isolate(board, cc, board.pfn(0), board.pfn(1)) == []
    assert scanned(cc) == 1024
    assert int(cc["migrate_pfn"][0]) == board.pfn(1)


def test_every_page_and_every_free_page_costs_one() -> None:
    board = Board(2)
    board.free(board.pfn(0, 8), 8)
    board.movable(range(board.pfn(0, 16), board.pfn(0, 20)))
    cc = board.control()
    assert len(isolate(board, cc, board.pfn(0), board.pfn(1))) == 4
    assert scanned(cc) == BLOCK
    put_back(board, cc)


@pytest.mark.slow
@pytest.mark.parametrize("order", [3, 8])
@pytest.mark.parametrize("wanted", [-1, 3, 4, 9])
def test_compound_pages_as_large_as_the_wanted_order_are_stepped_over_whole(order: int, wanted: int) -> None:
    """By hand only those of a pageblock or more; a kernel's compound page is looked at page by page."""
    board = Board(2)
    board.compound(board.pfn(0), order, SLAB | HEAD)
    board.movable([board.pfn(0, 1 << order)])
    cc = board.control(wanted, SYNC_LIGHT)
    taken = isolate(board, cc, board.pfn(0), board.pfn(1))
    assert taken == [board.pfn(0, 1 << order)]
    assert scanned(cc) == BLOCK
    put_back(board, cc)


@pytest.mark.slow
def test_hugetlb_pages_are_stepped_over_whole_whatever_is_wanted() -> None:
    board = Board(3)
    board.compound(board.pfn(0), 9, HUGE)
    board.mem.nodes["nr_hugetlb"][0] = BLOCK
    cc = board.control(10, SYNC_LIGHT)
    assert isolate(board, cc, board.pfn(0), board.pfn(1)) == []
    assert scanned(cc) == BLOCK
    board.movable(range(board.pfn(1), board.pfn(1, 4)))
    board.free(board.pfn(2), BLOCK)
    by_hand = board.control()
    assert isolate_migratepages(board.arrays(), by_hand) == 4
    assert scanned(by_hand) == BLOCK  # the block that is one huge page is not even entered
    put_back(board, by_hand)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "refcount", "settings", "taken"),
    [
        (0, 1, {}, True),
        (0, 1 + PIN, {}, False),
        (0, 2, {}, False),
        (UNEVICTABLE, 1, {}, True),
        (UNEVICTABLE, 1, {"unevictable_allowed": 0}, False),
        (WRITEBACK, 1, {"mode": SYNC}, True),
        (WRITEBACK, 1, {"mode": SYNC_LIGHT}, False),
        (WRITEBACK, 1, {"mode": ASYNC}, False),
        (0, 1, {"may_enter_fs": 0}, True),
    ],
)
def test_which_anonymous_pages_are_taken(flags: int, refcount: int, settings: dict[str, int], taken: bool) -> None:
    board = Board(2)
    board.movable([board.pfn(0, 5)], flags, refcount)
    cc = board.control(-1, settings.pop("mode", SYNC), **settings)
    assert isolate(board, cc, board.pfn(0), board.pfn(1)) == [board.pfn(0, 5)] * taken
    if taken:
        put_back(board, cc)


def test_file_pages_need_gfp_fs_and_their_pins_do_not_show_yet() -> None:
    lab = Lab((32,), nr_ranks=None)
    lab.spawn("a", file="64K", anon="64K")
    vm, pages = lab.vm, lab.mem.pages
    file = lab.machine.processes["a"].files[0]
    cached = int(vm.i_pages[file.i_base])
    v = vm_arrays(vm, lab.machine.compaction._src, lab.machine.compaction._dst)
    with_fs = lab.machine.compaction._control(0, -1, SYNC)
    without_fs = lab.machine.compaction._control(0, -1, SYNC, may_enter_fs=0)
    assert may_isolate(v, with_fs, cached)
    assert not may_isolate(v, without_fs, cached)
    pages["refcount"][cached] += PIN
    assert may_isolate(v, with_fs, cached)


# Skip bits and cached positions.


def cached(board: Board) -> list[int]:
    """[async, sync] in pageblocks."""
    return [(int(pfn) - board.pfn(0)) // BLOCK for pfn in board.zone["compact_cached_migrate_pfn"]]


def test_a_block_that_gave_nothing_is_skipped_from_then_on() -> None:
    """The cached positions move on; by one pageblock more, as Linux rounds the end of the block up again."""
    board = Board(8)
    cc = board.control(9, SYNC_LIGHT)
    assert isolate_migratepages(board.arrays(), cc) == 0
    assert (board.skipped(), cached(board), scanned(cc)) == ([0], [2, 2], BLOCK)
    again = board.control(9, SYNC_LIGHT)
    again["migrate_pfn"] = board.pfn(0)
    assert isolate_migratepages(board.arrays(), again) == 0
    assert (board.skipped(), scanned(again)) == ([0, 1], BLOCK)


def test_an_async_run_moves_only_its_own_position() -> None:
    board = Board(8)
    cc = board.control(9, ASYNC)
    isolate_migratepages(board.arrays(), cc)
    assert cached(board) == [2, 0]


def test_by_hand_skip_bits_are_ignored_and_only_empty_blocks_get_one() -> None:
    board = Board(8)
    board.movable([board.pfn(0)])
    board.mem.skip[:] = 1
    cc = board.control()
    assert isolate(board, cc, board.pfn(0), board.pfn(1)) == [board.pfn(0)]
    put_back(board, cc)
    board.mem.skip[:] = 0
    cc = board.control()
    isolate(board, cc, board.pfn(0), board.pfn(1))
    assert board.skipped() == []
    put_back(board, cc)
    isolate(board, cc, board.pfn(1), board.pfn(2))
    assert board.skipped() == [1]


def test_the_first_page_taken_sets_the_skip_bit() -> None:
    """So that a second compaction does not start on the same pageblock; this one goes on in it all the same."""
    board = Board(4)
    board.movable(range(board.pfn(0), board.pfn(0, 64)))
    cc = board.control(9, SYNC_LIGHT)
    assert len(isolate(board, cc, board.pfn(0), board.pfn(1))) == 32
    assert board.skipped() == [0]
    put_back(board, cc)
    assert len(isolate(board, cc, board.pfn(0, 32), board.pfn(1))) == 32
    put_back(board, cc)
    assert isolate(board, cc, board.pfn(0), board.pfn(1)) == []  # begun anew at the front: the bit counts
    cc["finish_pageblock"] = 1
    assert len(isolate(board, cc, board.pfn(0), board.pfn(1))) == 64
    put_back(board, cc)


def test_a_fully_scanned_block_moves_the_cached_position_only_if_empty_or_finished() -> None:
    board = Board(8)
    board.movable([board.pfn(0)])
    cc = board.control(9, SYNC_LIGHT)
    isolate(board, cc, board.pfn(0), board.pfn(1))
    assert cached(board) == [0, 0]
    put_back(board, cc)
    cc["finish_pageblock"] = 1
    isolate(board, cc, board.pfn(0), board.pfn(1))
    assert cached(board) == [2, 2]
    put_back(board, cc)


# Async direct compaction.


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [UNMOVABLE, MOVABLE, RECLAIMABLE])
@pytest.mark.parametrize("kind", [UNMOVABLE, MOVABLE, RECLAIMABLE])
def test_async_direct_compaction_stays_within_the_type_of_the_request(kind: int, wanted: int) -> None:
    board = Board(4)
    board.kind(0, kind)
    board.movable(range(board.pfn(0), board.pfn(0, 8)))
    cc = board.control(3, ASYNC, migratetype=wanted, direct_compaction=1)
    assert isolate_migratepages(board.arrays(), cc) == (8 if kind == wanted else 0)
    put_back(board, cc)
    light = board.control(3, SYNC_LIGHT, migratetype=wanted, direct_compaction=1)
    light["ignore_skip_hint"] = 1
    light["migrate_pfn"] = board.pfn(0)
    assert isolate_migratepages(board.arrays(), light) == 8
    put_back(board, light)


def test_async_direct_compaction_gives_a_chunk_up_at_the_first_page_that_must_stay() -> None:
    """Order 3: pages 0 to 5 movable, 6 the kernel's, 7 movable: nothing of 0 to 7; of 8 to 15 all eight."""
    board = Board(4)
    board.movable([*range(board.pfn(0), board.pfn(0, 6)), *range(board.pfn(0, 7), board.pfn(0, 30))])
    cc = board.control(3, ASYNC, migratetype=MOVABLE, direct_compaction=1)
    assert isolate(board, cc, board.pfn(0), board.pfn(1)) == list(range(board.pfn(0, 8), board.pfn(0, 16)))
    assert scanned(cc) == 7 + 8
    assert int(cc["migrate_pfn"][0]) == board.pfn(0, 16)
    assert board.events("compact_isolated") == [8]  # what was put back at once does not count
    put_back(board, cc)


def test_sync_compaction_takes_what_it_can_of_every_chunk() -> None:
    board = Board(4)
    board.movable([*range(board.pfn(0), board.pfn(0, 6)), *range(board.pfn(0, 7), board.pfn(0, 30))])
    cc = board.control(3, SYNC_LIGHT, migratetype=MOVABLE, direct_compaction=1)
    assert len(isolate(board, cc, board.pfn(0), board.pfn(1))) == 29
    put_back(board, cc)


# The scanner does not pass the free scanner.


def test_no_block_at_or_above_the_free_scanner_is_entered() -> None:
    board = Board(4)
    board.movable([board.pfn(2), board.pfn(3)])
    cc = board.control()
    cc["free_pfn"] = board.pfn(2)
    assert isolate_migratepages(board.arrays(), cc) == 0  # block 0
    assert isolate_migratepages(board.arrays(), cc) == 0  # block 1
    assert isolate_migratepages(board.arrays(), cc) == 0
    assert (scanned(cc), int(cc["migrate_pfn"][0])) == (2 * BLOCK, board.pfn(2))


# The fast search.


def with_free_page(nr_blocks: int, block: int) -> Board:
    """A free page in a Movable block; all blocks have something to move."""
    board = Board(nr_blocks)
    for number in range(nr_blocks):
        board.movable(range(board.pfn(number), board.pfn(number, 16)))
    board.free(board.pfn(block, 64), 8)
    return board


def found(board: Board, cc: Any) -> int:
    """Block where the scanner is sent."""
    return (int(fast_find_migrateblock(board.arrays(), cc)) - board.pfn(0)) // BLOCK


@pytest.mark.slow
@pytest.mark.parametrize(("block", "goes_to"), [(3, 3), (15, 15), (16, 0), (30, 0)])
def test_at_the_start_a_partly_free_block_in_the_lower_half_is_found(block: int, goes_to: int) -> None:
    """The scanners are at blocks 0 and 32."""
    board = with_free_page(33, block)
    assert found(board, board.control(9, SYNC_LIGHT, migratetype=MOVABLE, direct_compaction=1)) == goes_to


@pytest.mark.slow
@pytest.mark.parametrize(("block", "goes_to"), [(2, 2), (4, 4), (5, 1), (6, 1)])
def test_later_only_the_next_eighth_is_looked_at(block: int, goes_to: int) -> None:
    """The scanners are at blocks 1 and 33."""
    board = with_free_page(34, block)
    cc = board.control(9, SYNC_LIGHT)
    cc["migrate_pfn"] = board.pfn(1)
    assert found(board, cc) == goes_to


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "fields", "searches"),
    [
        (9, {"direct_compaction": 1, "migratetype": MOVABLE}, True),
        (4, {"direct_compaction": 1, "migratetype": MOVABLE}, True),
        (9, {"kcompactd": 1, "migratetype": UNMOVABLE}, True),
        (9, {"direct_compaction": 1, "migratetype": UNMOVABLE}, False),
        (3, {"direct_compaction": 1, "migratetype": MOVABLE}, False),
        (9, {"ignore_skip_hint": 1, "migratetype": MOVABLE}, False),
        (9, {"finish_pageblock": 1, "migratetype": MOVABLE}, False),
    ],
)
def test_who_searches(order: int, fields: dict[str, int], searches: bool) -> None:
    board = with_free_page(32, 3)
    assert found(board, board.control(order, SYNC_LIGHT, **fields)) == (3 if searches else 0)


def test_not_from_the_middle_of_a_block_nor_into_a_skipped_one() -> None:
    board = with_free_page(32, 3)
    cc = board.control(9, SYNC_LIGHT)
    cc["migrate_pfn"] = board.pfn(1, 32)
    assert fast_find_migrateblock(board.arrays(), cc) == board.pfn(1, 32)
    board.mem.skip[board.pfn(3) // BLOCK] = 1
    assert found(board, board.control(9, SYNC_LIGHT)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("failures", "depth"), [(0, 33), (1, 17), (4, 3), (9, 1)])
def test_the_search_is_shallower_after_each_failure(failures: int, depth: int) -> None:
    """(32 >> failures) + 1 entries; what it has seen goes to the end of the list."""
    board = Board(64)
    for block in range(40, 62):
        for offset in (0, 64, 128):
            board.free(board.pfn(block, offset), 8)
    cc = board.control(4, SYNC_LIGHT)
    cc["fast_search_fail"] = failures
    assert found(board, cc) == 0
    assert scanned(cc) == min(depth, 66) + 1  # the entry at which it gives up counts as well
    assert int(cc["fast_search_fail"][0]) == failures + 1
