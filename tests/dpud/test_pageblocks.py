# SPDX-License-Identifier: GPL-2.0-only
"""Kinds of pages by kpageflags' bits, shares of cells, and a sweep in parts."""

from pathlib import Path

import numpy as np
import pytest

from dpud.pageblocks import PAGES_PER_BLOCK, Sweep, cells, kinds_of
from dpud.report_map import kind_of, svg
from dpud.top_screen import NO_MEMORY, SHADES, blocks_per_cell, cell, short

# include/uapi/linux/kernel-page-flags.h
LRU, BUDDY, HUGE, UNEVICTABLE, NOPAGE, SLAB = (1 << bit for bit in (5, 10, 17, 18, 20, 7))


def block(*parts: tuple[int, int]) -> np.ndarray:
    """(flags, number of pages), the rest free."""
    flags = np.full(PAGES_PER_BLOCK, BUDDY, np.uint64)
    at = 0
    for value, nr in parts:
        flags[at : at + nr] = value
        at += nr
    return flags


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        (BUDDY, [512, 0, 0, 0]),
        (LRU, [0, 512, 0, 0]),
        (HUGE, [0, 512, 0, 0]),
        (LRU | UNEVICTABLE, [0, 0, 512, 0]),
        (SLAB, [0, 0, 0, 512]),
        (0, [0, 0, 0, 512]),
        (NOPAGE, [0, 0, 0, 0]),
    ],
)
def test_each_page_is_of_one_kind(flags: int, kinds: list[int]) -> None:
    assert kinds_of(block((flags, 512))).tolist() == [kinds]


def test_blocks_are_counted_by_themselves() -> None:
    flags = np.concatenate([block((LRU, 100), (SLAB, 12)), block()])
    assert kinds_of(flags).tolist() == [[400, 100, 0, 12], [512, 0, 0, 0]]


def test_a_cell_is_the_share_of_what_memory_its_blocks_have() -> None:
    pages = kinds_of(
        np.concatenate([block((LRU, 512)), block((NOPAGE, 512)), block((NOPAGE, 512)), block((SLAB, 256))])
    )
    assert cells(pages, 2).tolist() == [[0, 1, 0, 0], [0.5, 0, 0, 0.5]]
    assert np.isnan(cells(pages, 1)[1]).all()
    assert len(cells(pages, 3)) == 2


def test_a_sweep_reads_parts_and_comes_round(tmp_path: Path) -> None:
    file = tmp_path / "kpageflags"
    np.concatenate([block(), *(block((LRU, nr)) for nr in (1, 2, 3, 4, 5))])[:-256].tofile(file)
    sweep = Sweep(file, 1, 6, budget_bytes=2 * 4096)
    seen = []
    for _ in range(3):
        sweep.read()
        seen.append(sweep.pages[:, 1].tolist())
    assert seen == [[1, 2, -1, -1, -1], [1, 2, 3, 4, -1], [1, 2, 3, 4, 5]]
    assert sweep.pages[-1].tolist() == [251, 5, 0, 0]  # what lies beyond the end of memory is none
    np.concatenate([block((LRU, 9))] * 6).tofile(file)
    sweep.read()
    assert sweep.pages[:, 1].tolist() == [9, 9, 3, 4, 5]


def test_a_character_says_how_much_is_used_and_its_colour_by_whom() -> None:
    shown = [
        cell(np.array(share, float)) for share in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 0, 0.5], [0.9, 0.05, 0, 0.05])
    ]
    assert shown == [(SHADES[0], ""), (SHADES[-1], "green"), (SHADES[-1], "red"), (SHADES[1], "red")]
    assert cell(np.array([0, 0.6, 0, 0.4])) == (SHADES[-1], "yellow")
    assert cell(np.array([0, 0.4, 0.6, 0])) == (SHADES[-1], "magenta")
    assert cell(np.full(4, np.nan))[0] == NO_MEMORY
    assert kind_of(np.array([0.5, 0, 0.5, 0])) == "locked"


def test_zones_fit_the_rows_with_as_few_blocks_a_character_as_can_be() -> None:
    assert blocks_per_cell([10, 100], per_row=50, rows=3) == 1
    assert blocks_per_cell([10, 101], per_row=50, rows=3) == 2
    assert blocks_per_cell([1 << 19], per_row=100, rows=10) == 525
    assert blocks_per_cell([1, 1, 1], per_row=50, rows=1) == 1, "each zone has a row, however few there are"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (9999, "9999"), (10_000, "10k"), (999_400, "999k"), (999_999, "1M"), (5e6, "5M")]
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text


def test_the_picture_has_a_square_for_each_block() -> None:
    pages = kinds_of(np.concatenate([block((LRU, 512)), block(), block((NOPAGE, 512))]))
    assert svg(pages, "zone").count("h9v9h-9z") == 3
