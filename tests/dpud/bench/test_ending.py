# SPDX-License-Identifier: GPL-2.0-only
"""What is told about the end of a real compaction: made-up zones in which pages moved up to a known place."""

import numpy as np
import pytest

from dpud.bench.ending import ends
from dpud.bench.scanners import reached
from kernelsim.hostblocks import HostZone

BLOCK = 512
DIRTY, LRU, BUDDY, ANON, HEAD, TAIL = (1 << bit for bit in (4, 5, 10, 12, 15, 16))
FIRST = 4 * BLOCK
NR_BLOCKS = 40
ZONE = HostZone(0, "Normal", FIRST, NR_BLOCKS * BLOCK, 0, 0, 0, 0, 0, 0, (), (), (), ())


def compacted(until: int, down_to: int) -> tuple[np.ndarray, np.ndarray]:
    """kpageflags before and after: every other page in use; blocks below `until` vacated, from `down_to` on filled."""
    before = np.full(FIRST + NR_BLOCKS * BLOCK, BUDDY, dtype=np.uint64)
    before[::2] = LRU | ANON
    after = before.copy()
    after[FIRST : FIRST + until * BLOCK] = BUDDY
    after[FIRST + down_to * BLOCK :] = LRU | ANON
    return before, after


def lru(words: np.ndarray) -> np.ndarray:
    return words & np.uint64(LRU) != 0


@pytest.mark.parametrize(("until", "down_to", "early"), [(20, 20, False), (19, 21, True), (5, 37, True)])
def test_the_scanners_are_found_where_they_stopped(until: int, down_to: int, early: bool) -> None:
    before, after = compacted(until, down_to)
    span = slice(FIRST, None)
    at = reached(lru(before)[span], lru(after)[span], before[span] == BUDDY, FIRST)
    assert at is not None
    assert (at.migrate_pfn, at.free_pfn) == (FIRST + until * BLOCK, FIRST + down_to * BLOCK)
    assert (at.nr_between, at.ended_early) == (down_to - until, early)


def test_processes_that_come_and_go_do_not_move_them() -> None:
    before, after = compacted(10, 30)
    rng = np.random.default_rng(1)
    noise = rng.choice(len(after), len(after) // 10, replace=False)
    after[noise] = BUDDY
    after[rng.choice(len(after), len(after) // 20, replace=False)] = LRU
    at = reached(lru(before), lru(after), before == BUDDY, 0)
    assert at is not None
    assert (at.migrate_pfn, at.free_pfn) == (FIRST + 10 * BLOCK, FIRST + 30 * BLOCK)


def test_nothing_moved_is_nowhere() -> None:
    before, _ = compacted(0, NR_BLOCKS)
    assert reached(lru(before), lru(before), before == BUDDY, 0) is None


def test_a_folio_that_came_after_the_capture_is_named() -> None:
    before, after = compacted(10, 30)
    met = compacted(20, 20)
    at = FIRST + 10 * BLOCK + 64
    after[at : at + 4] = [LRU | HEAD | DIRTY, *[LRU | TAIL | DIRTY] * 3]
    (line,) = ends((ZONE,), before, after, lru(before), lru(met[1]))
    assert f"4 pages at {at:#x}" in line
    assert "real run ended early" in line
    assert "20 pageblocks with movable pages short" in line


@pytest.mark.parametrize("there", ["before too", "clean", "elsewhere"])
def test_other_folios_are_not_blamed(there: str) -> None:
    before, after = compacted(10, 30)
    at = FIRST + (25 if there == "elsewhere" else 10) * BLOCK
    after[at : at + 2] = [LRU | HEAD | DIRTY, LRU | TAIL | DIRTY]
    if there == "before too":
        before[at : at + 2] = after[at : at + 2]
    if there == "clean":
        after[at : at + 2] = [LRU | HEAD, LRU | TAIL]
    (line,) = ends((ZONE,), before, after, lru(before), lru(before))
    assert "neither capture shows" in line


def test_our_own_early_end_is_told_and_huge_pages_are_no_work_left() -> None:
    before, after = compacted(20, 20)
    _, ours = compacted(10, 30)
    (line,) = ends((ZONE,), before, after, lru(before), lru(ours))
    assert "our run ended early" in line
    for words in (before, after, ours):
        between = words[FIRST + 10 * BLOCK : FIRST + 30 * BLOCK].reshape(-1, BLOCK)
        between[:] = LRU | TAIL
        between[:, 0] = LRU | HEAD
    assert list(ends((ZONE,), before, after, lru(before), lru(ours))) == []
