# SPDX-License-Identifier: GPL-2.0-only
"""The picture of `dpud demo fault`: rows and banks of a memory, and what became of errors, as one HTML file."""

from collections.abc import Mapping, Sequence
from html import escape

from dpud.demo.document import bars, document, key, wide

NR_BANKS, ROW_BYTES = 128, 2048
_CELL = 7
_COLOURS = {"ok": "#d4e6d4", "uncorrectable": "#b91c1c", "correctable": "#d97706"}
_OUTCOMES = {
    "corrected": "words corrected on the way",
    "repaired_from_store": "pages made good from the stores",
    "repaired_from_copy": "pages made good from another GPU's copy",
    "repaired_from_checkpoint": "pages made good from a checkpoint",
    "lost_pages": "pages lost, and known to be",
}


def page(
    total_bytes: int,
    retired: Sequence[tuple[int, str]],
    counters: Sequence[Sequence[str]],
    stat: Mapping[str, str],
) -> str:
    """`retired`: (address, cause); `counters` and `stat`: lines of the files of that name."""
    return document(
        "A GPU whose memory breaks",
        f"<h2>Rows out of use</h2>\n<p>Each column is one of {NR_BANKS} banks, each square a row of 2 KiB.</p>\n"
        f"<p>{_legend()}</p>\n{_grid(total_bytes, retired)}\n<h2>What became of errors</h2>\n{_outcomes(stat)}\n"
        f"<h2>Events</h2>\n{_events(counters)}",
    )


def _legend() -> str:
    words = {"ok": "in use", "uncorrectable": "retired, could not be corrected", "correctable": "retired beforehand"}
    return " ".join(key(_COLOURS[what], text) for what, text in words.items())


def _grid(total_bytes: int, retired: Sequence[tuple[int, str]]) -> str:
    nr_rows = -(-total_bytes // ROW_BYTES // NR_BANKS)
    width, height = NR_BANKS * _CELL, nr_rows * _CELL
    squares = "".join(_square(address // ROW_BYTES, cause) for address, cause in retired)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}"><rect width="{width}" height="{height}" '
        f'fill="{_COLOURS["ok"]}"/>{squares}</svg>'
    )


def _square(row: int, cause: str) -> str:
    at_row, bank = divmod(row, NR_BANKS)
    where = f'x="{bank * _CELL}" y="{at_row * _CELL}" width="{_CELL - 1}" height="{_CELL - 1}"'
    return f'<rect {where} fill="{_COLOURS[cause]}"/>'


def _outcomes(stat: Mapping[str, str]) -> str:
    counts = {text: int(stat[name]) for name, text in _OUTCOMES.items()}
    return bars([(text, [(nr, "#0b62a4", text)], f"{nr:,}") for text, nr in counts.items()])


def _events(counters: Sequence[Sequence[str]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(xid)}</td><td>{escape(name)}</td><td>{escape(where)}</td>"
        f'<td class="number">{escape(nr)}</td></tr>'
        for xid, where, nr, _, name in counters
    )
    head = '<tr><th>XID</th><th></th><th>where</th><th class="number">how many</th></tr>'
    return wide(f"<table>{head}{rows}</table>")
