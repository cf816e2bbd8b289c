# SPDX-License-Identifier: GPL-2.0-only
import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud.dpu.move import PAGE_SIZE, count_pages, count_waves, page_sum


def waves_by_definition(src: list[int], dst: list[int], nr_dpus: int) -> tuple[int, int]:
    waves: list[list[int]] = []
    for s, d in zip(src, dst, strict=True):
        if not waves or d in waves[-1]:
            waves.append([])
        waves[-1].append(s)
    return len(waves), sum(-(-len(wave) // nr_dpus) for wave in waves)


def addrs(pfns: list[int]) -> np.ndarray:
    return np.array(pfns, np.uint64) * np.uint64(PAGE_SIZE)


@pytest.mark.parametrize(
    ("src", "dst", "nr_dpus", "expected"),
    [
        ([10, 11, 12, 13], [0, 1, 2, 3], 2, (1, 2)),
        ([1, 2, 3, 4], [0, 1, 2, 3], 64, (4, 4)),  # each lands on the one before
        ([2, 4, 6, 8], [0, 1, 2, 3], 64, (2, 2)),
        ([2, 3, 10, 11], [0, 1, 2, 3], 64, (2, 2)),  # what an earlier wave vacated does not cut a later one
        ([], [], 64, (0, 0)),
    ],
)
def test_waves(src: list[int], dst: list[int], nr_dpus: int, expected: tuple[int, int]) -> None:
    assert count_waves(addrs(src), addrs(dst), len(src), nr_dpus) == expected


@settings(max_examples=examples(60), deadline=None)
@given(st.sets(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 8), st.data())
def test_waves_match_their_definition(pages: set[int], nr_dpus: int, data: st.DataObject) -> None:
    src = sorted(pages)
    dst = sorted(data.draw(st.sets(st.integers(0, 60), min_size=len(src), max_size=len(src))))
    moves = [(s, d) for s, d in zip(src, dst, strict=True) if d < s]
    src, dst = [s for s, _ in moves], [d for _, d in moves]
    nr_moves = data.draw(st.integers(0, len(moves)))
    expected = waves_by_definition(src[:nr_moves], dst[:nr_moves], nr_dpus)
    assert count_waves(addrs(src), addrs(dst), nr_moves, nr_dpus) == expected


def test_a_large_move_waits_for_all_the_sources_it_lands_on() -> None:
    """Four pages to 8..11, where pages 9 and 11 were: a second wave; and its pages count for the rounds."""
    src = np.array([9 << 12, 11 << 12, 16 << 12 | 2], np.uint64)
    assert count_waves(src, addrs([0, 1, 8]), 3, 4) == (2, 2)
    assert count_waves(src, addrs([0, 1, 4]), 3, 4) == (1, 2)
    assert count_waves(src, addrs([0, 1, 4]), 3, 64) == (1, 1)
    assert (count_pages(src, 2), count_pages(src, 3)) == (2, 6)


def test_page_sum_wraps_and_sees_every_bit() -> None:
    page = np.full(512, 2**64 - 1, np.uint64)
    whole = page_sum(page)
    assert whole == -512
    for bit in range(64):
        page[bit * 8] ^= np.uint64(1 << bit)
        assert page_sum(page) != whole
        page[bit * 8] ^= np.uint64(1 << bit)
