# SPDX-License-Identifier: GPL-2.0-only
"""The free scanner: where targets come from, how far it looks, what it leaves behind (kernel-abi 2.3)."""

from typing import Any

import pytest
from board import ASYNC, BLOCK, HELD, MOVABLE, SYNC, SYNC_LIGHT, UNMOVABLE, Board

from kernelsim.compaction_free import freepages_list, isolate_freepages
from kernelsim.compaction_loop import release_free_list


def targets(board: Board) -> dict[int, int]:
    """Order of each target by its first page, list by list."""
    pages, found = board.mem.pages, {}
    for order in range(11):
        head = freepages_list(board.arrays(), 0, order)
        pfn = int(pages["next"][head])
        while pfn != head:
            assert (pages["flags"][pfn : pfn + (1 << order)] == HELD).all()
            found[pfn] = order
            pfn = int(pages["next"][pfn])
    return found


def look(board: Board, cc: Any, wanted: int = 1) -> dict[int, int]:
    """Look for targets for so many pages."""
    cc["nr_migratepages"] = wanted
    isolate_freepages(board.arrays(), cc)
    found = targets(board)
    assert int(cc["nr_freepages"][0]) == sum(1 << order for order in found.values())
    return found


def release(board: Board, cc: Any) -> None:
    release_free_list(board.arrays(), cc)
    assert targets(board) == {}
    assert int(board.zone["held_pages"]) == 0
    board.assert_sound()


def scanned(cc: Any) -> int:
    return int(cc["total_free_scanned"][0])


def place(board: Board, cc: Any) -> float:
    """Where the scanner is, in blocks."""
    return (int(cc["free_pfn"][0]) - board.pfn(0)) / BLOCK


# The scan.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "by_block"), [(SYNC, [512, 256, 128, 64, 32, 16, 16]), (ASYNC, [16, 16, 16, 16, 16, 16, 16])]
)
def test_the_stride_doubles_after_each_empty_block(mode: int, by_block: list[int]) -> None:
    """A live run's nr_scanned: 512, 256, 128, 64, 32, 16, 16."""
    for nr in range(1, len(by_block) + 1):
        board = Board(nr + 1)
        cc = board.control(-1, mode)
        assert look(board, cc) == {}
        assert scanned(cc) == sum(by_block[:nr])
        assert place(board, cc) == 0  # the block of the migrate scanner is out of bounds


def test_the_stride_is_one_again_after_a_hit() -> None:
    board = Board(6)
    board.free_each([board.pfn(4, 2), board.pfn(3, 1)])  # block 5 is empty, block 4 is seen with a stride of 2
    cc = board.control()
    assert look(board, cc, 8) == {board.pfn(4, 2): 0, board.pfn(3, 1): 0}
    assert scanned(cc) == 512 + 256 + 512 + 512 + 256  # 1, 2, hit, 1, hit, 1, 2
    release(board, cc)


def test_a_large_stride_misses_what_lies_between() -> None:
    board = Board(4)
    board.free_each([board.pfn(2, 1)])
    cc = board.control()
    assert look(board, cc) == {}
    release(board, cc)


def test_it_stops_when_it_has_enough_and_goes_on_from_there() -> None:
    board = Board(4)
    for offset in (0, 16, 32, 48):
        board.free(board.pfn(3, offset), 8)
    cc = board.control()
    assert look(board, cc, 10) == {board.pfn(3): 3, board.pfn(3, 16): 3}
    assert (scanned(cc), int(cc["free_pfn"][0])) == (24, board.pfn(3, 24))
    assert board.events("compact_isolated") == [16]
    release(board, cc)


def test_a_block_used_up_with_its_last_page_is_left_for_the_one_below() -> None:
    board = Board(4)
    board.free(board.pfn(3, 504), 8)
    cc = board.control()
    look(board, cc, 8)
    assert place(board, cc) == 2
    assert board.skipped() == [3]
    release(board, cc)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "first_free_order", "order", "taken"),
    [
        (MOVABLE, None, -1, True),
        (UNMOVABLE, None, -1, False),
        (MOVABLE, 8, -1, True),
        (MOVABLE, 9, -1, False),
        (MOVABLE, 2, 3, True),
        (MOVABLE, 3, 3, False),
        (MOVABLE, 4, 3, False),
    ],
)
def test_which_blocks_take_pages(kind: int, first_free_order: int | None, order: int, taken: bool) -> None:
    """Movable ones, unless they begin with a free block that is what the run is for."""
    board = Board(4)
    if first_free_order is None:
        board.free(board.pfn(2, 64), 1)
    else:
        board.free(board.pfn(2), 1 << first_free_order)
    board.kind(2, kind)
    cc = board.control(order, ASYNC, ignore_skip_hint=1)
    cc["search_order"] = 0
    board.zone["compact_init_free_pfn"] = board.end
    cc["free_pfn"] = board.pfn(2)
    assert bool(scan_only(board, cc)) == taken
    release(board, cc)


def scan_only(board: Board, cc: Any) -> dict[int, int]:
    """Without the fast search, which runs for an order only."""
    counts = board.zone["nr_free"][:, MOVABLE].copy()
    board.zone["nr_free"][:, MOVABLE] = 0  # as far as the search can tell
    found = look(board, cc)
    board.zone["nr_free"][:, MOVABLE] += counts
    return found


def test_full_priority_takes_other_blocks_too_and_large_ones_become_movable() -> None:
    """A free block of half a pageblock or more turns its pageblock Movable."""
    board = Board(4)
    for block, order in ((3, 7), (2, 8)):
        board.kind(block, UNMOVABLE)
        board.free(board.pfn(block, 256), 1 << order)
    cc = board.control(-1, SYNC, ignore_block_suitable=1)
    assert look(board, cc, 400) == {board.pfn(3, 256): 7, board.pfn(2, 256): 8}
    blocks = board.mem.blocks
    assert (int(blocks[board.pfn(3) // BLOCK]), int(blocks[board.pfn(2) // BLOCK])) == (UNMOVABLE, MOVABLE)
    release(board, cc)


def test_it_stops_where_the_watermark_would_be_hurt() -> None:
    """Free pages must be above min + 2^order: of 64 in blocks of 8, with min 30, half are taken."""
    board = Board(4)
    for offset in range(0, 128, 16):
        board.free(board.pfn(3, offset), 8)
    board.watermarks(30)
    cc = board.control()
    assert len(look(board, cc, 400)) == 4
    assert int(board.zone["free_pages"]) == 32
    assert int(cc["free_pfn"][0]) == board.pfn(3, 64)
    assert board.skipped() == []
    release(board, cc)


# Skip bits and the cached position.


def cached(board: Board) -> int:
    return (int(board.zone["compact_cached_free_pfn"]) - board.pfn(0)) // BLOCK


def test_blocks_seen_to_their_end_are_skipped_later() -> None:
    board = Board(6)
    board.free_each([board.pfn(3, 64)])
    cc = board.control(-1, ASYNC, ignore_skip_hint=0)
    look(board, cc)
    assert board.skipped() == [4, 5]
    assert cached(board) == 3
    release(board, cc)
    again = board.control(-1, ASYNC, ignore_skip_hint=0)
    look(board, again)
    assert scanned(again) == 3  # block 3 at a stride of 32: pages 0, 32, 64
    release(board, again)


def test_by_hand_skip_bits_are_set_but_not_honoured() -> None:
    board = Board(6)
    board.mem.skip[:] = 1
    cc = board.control(-1, ASYNC)
    look(board, cc)
    assert scanned(cc) == 5 * 16


def test_what_is_left_goes_back_and_raises_the_cached_position() -> None:
    board = Board(6)
    board.free(board.pfn(4, 256), 256)
    board.zone["compact_cached_free_pfn"] = board.pfn(1)
    before = board.free_blocks()
    cc = board.control()
    look(board, cc)
    assert board.free_blocks() == {}
    release(board, cc)
    assert board.free_blocks() == before
    assert cached(board) == 4


# The fast search: between blocks 0 and 32, so that the upper quarter begins at block 24, the upper half at 16.


def fast(order: int = 9, mode: int = SYNC_LIGHT, **fields: int) -> tuple[Board, Any]:
    board = Board(33)
    return board, board.control(order, mode, **fields)


def test_it_prefers_the_upper_quarter() -> None:
    board, cc = fast()
    for block in (20, 25, 10):
        board.free(board.pfn(block, 64), 8)
    assert look(board, cc) == {board.pfn(25, 64): 3}
    assert place(board, cc) == 32
    release(board, cc)


def test_it_takes_the_highest_of_the_upper_half_otherwise() -> None:
    board, cc = fast()
    for block in (18, 20, 17, 10):
        board.free(board.pfn(block, 64), 8)
    assert look(board, cc) == {board.pfn(20, 64): 3}
    release(board, cc)


@pytest.mark.parametrize(("direct", "goes_on_at"), [(0, 32), (1, 16)])
def test_below_the_upper_half_the_scan_must_find_it(direct: int, goes_on_at: int) -> None:
    """A direct compaction begins it at the middle."""
    board, cc = fast(direct_compaction=direct)
    board.free(board.pfn(10, 64), 8)
    assert look(board, cc) == {board.pfn(10, 64): 3}
    seen = [block for block in board.skipped() if block > 10]
    assert seen == list(range(11, goes_on_at + 1))
    assert int(cc["fast_search_fail"][0]) == 1
    release(board, cc)


@pytest.mark.slow
def test_orders_are_searched_downwards_from_the_last_hit() -> None:
    for search_order, order in ((9, 8), (8, 8), (5, 4), (4, 4), (3, 0), (0, 0)):
        board, cc = fast()
        board.free(board.pfn(30, 256), 256)
        board.free(board.pfn(29, 64), 16)
        board.free(board.pfn(28, 64), 1)
        cc["search_order"] = search_order
        assert list(look(board, cc).values()) == [order]
        assert int(cc["search_order"][0]) == order
        release(board, cc)


def test_it_wraps_round_to_the_large_orders() -> None:
    board, cc = fast()
    board.free(board.pfn(30, 256), 256)
    cc["search_order"] = 2
    assert list(look(board, cc).values()) == [8]
    release(board, cc)


def test_the_search_is_not_deep_but_goes_on_where_it_stopped() -> None:
    """Not at the start of a scan: 16 entries from the tail of the list, which then come last."""
    board, cc = fast(4)
    board.zone["compact_init_free_pfn"] = board.end
    board.zone["compact_cached_free_pfn"] = board.end
    for entry in range(16):
        board.free(board.pfn(2, 16 * entry), 8)
    board.free(board.pfn(30), 8)
    cc["free_pfn"] = board.pfn(32)
    cc["nr_migratepages"] = 1
    board.mem.skip[:] = 1  # so that the scan finds nothing itself
    assert look(board, cc) == {}
    cc["free_pfn"] = board.pfn(32)
    assert look(board, cc) == {board.pfn(30): 3}
    release(board, cc)


def test_the_rest_of_the_targets_come_from_the_same_block() -> None:
    board, cc = fast()
    for offset in range(0, 512, 16):
        board.free(board.pfn(30, offset), 8)
    assert len(look(board, cc, 32)) == 4
    release(board, cc)
    assert len(look(board, cc, 400)) == 32
    assert board.skipped() == [30]
    release(board, cc)


def test_async_direct_compaction_takes_only_what_it_found() -> None:
    board, cc = fast(9, ASYNC, direct_compaction=1)
    for offset in range(0, 512, 16):
        board.free(board.pfn(30, offset), 8)
    look(board, cc, 400)
    assert int(cc["nr_freepages"][0]) == 8
    release(board, cc)


def test_a_watermark_ends_the_search() -> None:
    board, cc = fast()
    board.free(board.pfn(30, 64), 8)
    board.watermarks(4)
    assert look(board, cc) == {}
    release(board, cc)


def test_by_hand_there_is_no_fast_search() -> None:
    board, cc = fast(-1, SYNC)
    board.free(board.pfn(31, 64), 8)
    look(board, cc)
    assert scanned(cc) == 512 + 32 + 8  # block 32, then at a stride of 2 up to the free block
    release(board, cc)
