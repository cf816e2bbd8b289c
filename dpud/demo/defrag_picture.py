# SPDX-License-Identifier: GPL-2.0-only
"""The picture of `dpud demo defrag`: a device's memory at some moments, as one HTML file."""

from collections.abc import Sequence
from html import escape

from dpud.demo.document import document, key

_COLUMNS = 64
_CELL = 11
_COLOURS = {".": "#eef2ee", "P": "#b91c1c", "X": "#404040"}
_LEGEND = {".": "free", "5": "in use, by how much", "P": "pinned"}


def page(moments: Sequence[tuple[str, int, str]]) -> str:
    """(title, bytes a character, characters) of the file `map`, in order of time."""
    parts = "\n".join(f"<h2>{escape(title)}</h2>\n{_grid(cells, size)}" for title, size, cells in moments)
    legend = " ".join(key(_colour(cell), text) for cell, text in _LEGEND.items())
    return document("A GPU is put in order", f"<p>{legend} Black lines are where blocks of 2 MiB begin.</p>\n{parts}")


def _grid(cells: str, size: int) -> str:
    nr_rows = -(-len(cells) // _COLUMNS)
    width, height = _COLUMNS * _CELL, nr_rows * _CELL
    squares = "".join(
        f'<rect x="{at % _COLUMNS * _CELL}" y="{at // _COLUMNS * _CELL}" width="{_CELL - 1}" height="{_CELL - 1}" '
        f'fill="{_colour(cell)}"/>'
        for at, cell in enumerate(cells)
    )
    per_block = max(1, (2 << 20) // size)
    marks = "".join(
        f'<path d="M{at % _COLUMNS * _CELL} {at // _COLUMNS * _CELL}v{_CELL}" stroke="#000"/>'
        for at in range(0, len(cells), per_block)
    )
    return f'<svg viewBox="0 0 {width} {height}" width="{width}">{squares}{marks}</svg>'


def _colour(cell: str) -> str:
    if cell in _COLOURS:
        return _COLOURS[cell]
    return f"hsl(205, 70%, {82 - 5 * int(cell)}%)"
