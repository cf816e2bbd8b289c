# SPDX-License-Identifier: GPL-2.0-only
"""Pageblocks as SVG: a square for one, or for as many as make a zone fit.

Colour says what is in use, its strength how much of the square is; so a print without colour still shows what is free.
"""

from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from dpud.pageblocks import FREE, KERNEL, LOCKED, MOVABLE, cells

COLUMNS, FEW_COLUMNS, MAX_ROWS, SIDE = 64, 32, 48, 10
COLOURS = {"movable": "#1f8a5f", "mixed": "#d99a12", "fixed": "#bf3b30", "locked": "#7d45a8"}
"""Mixed: some of what is used is the kernel's and stays; fixed: half of it or more."""
_FREE, _NO_MEMORY = "#e9edf1", "#ffffff"
_STEPS = (0.0, 0.3, 0.5, 0.75, 1.0)


def blocks_per_square(nr_blocks: int) -> int:
    return max(-(-nr_blocks // (COLUMNS * MAX_ROWS)), 1)


def svg(pages: NDArray[np.int32], label: str) -> str:
    """A zone's map; `pages` is int32[pageblock, kind]."""
    shares = cells(pages, blocks_per_square(len(pages)))
    nr_squares = len(shares)
    columns = FEW_COLUMNS if nr_squares <= FEW_COLUMNS * MAX_ROWS // 2 else COLUMNS
    rows = -(-nr_squares // columns)
    size = f"{columns * SIDE} {rows * SIDE}"
    body = "".join(_row(shares[at : at + columns], row) for row, at in enumerate(range(0, nr_squares, columns)))
    return f'<svg class="map" viewBox="0 0 {size}" role="img" aria-label="{label}">{body}</svg>'


def _row(shares: NDArray[np.float64], row: int) -> str:
    """Neighbours that look alike are one path element."""
    looks, column = [], 0
    for (colour, strength), group in groupby(_look(share) for share in shares):
        nr = len(list(group))
        squares = "".join(f"M{(column + at) * SIDE} {row * SIDE}h9v9h-9z" for at in range(nr))
        opacity = "" if strength == 1 else f' fill-opacity="{strength}"'
        under = f'<path d="{squares}" fill="{_FREE}"/>' if opacity else ""
        looks.append(f'{under}<path d="{squares}" fill="{colour}"{opacity}/>')
        column += nr
    return "".join(looks)


def _look(share: NDArray[np.float64]) -> tuple[str, float]:
    """(colour, strength)"""
    if np.isnan(share[FREE]):
        return _NO_MEMORY, 1
    used = 1 - share[FREE]
    if used <= 0:
        return _FREE, 1
    strength = _STEPS[max(int(used * (len(_STEPS) - 1) + 0.5), 1)]
    return COLOURS[kind_of(share)], strength


def kind_of(share: NDArray[np.float64]) -> str:
    """Which of COLOURS pages are, some of which are in use."""
    if share[LOCKED] >= max(share[KERNEL], share[MOVABLE]):
        return "locked"
    used = 1 - share[FREE]
    return "fixed" if share[KERNEL] >= used / 2 else "mixed" if share[KERNEL] > 0 else "movable"


def legend() -> str:
    names = {
        "movable": "movable",
        "mixed": "some of it fixed (the kernel's)",
        "fixed": "half or more fixed",
        "locked": "mlocked",
    }
    keys = [f'<span class="key" style="background:{COLOURS[name]}"></span>{text}' for name, text in names.items()]
    return " ".join([f'<span class="key" style="background:{_FREE}"></span>free', *keys])
