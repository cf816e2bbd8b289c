# SPDX-License-Identifier: GPL-2.0-only
"""The picture of `dpud demo defrag`: a device's memory at some moments, as one HTML file."""

from collections.abc import Sequence
from html import escape

_COLUMNS = 64
_CELL = 11
_COLOURS = {".": "#eef2ee", "P": "#b91c1c", "X": "#404040"}
_LEGEND = {".": "free", "5": "in use, by how much", "P": "pinned"}


def page(moments: Sequence[tuple[str, int, str]]) -> str:
    """(title, bytes a character, characters) of the file `map`, in order of time."""
    parts = "\n".join(
        f"<h2 style='font-size: 16px'>{escape(title)}</h2>\n{_grid(cells, size)}" for title, size, cells in moments
    )
    legend = " ".join(
        f'<span style="background:{_colour(cell)}">&emsp;</span> {text}' for cell, text in _LEGEND.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>A GPU is put in order</title>\n'
        f'<body style="font-family: sans-serif; max-width: 960px">\n<h1 style="font-size: 18px">A GPU is put in order'
        f"</h1>\n<p>{legend}. Lines below are where blocks of 2 MiB begin.</p>\n{parts}\n"
    )


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
