# SPDX-License-Identifier: GPL-2.0-only
"""The picture of `dpud demo fault`: rows and banks of a memory, and what became of errors, as one HTML file."""

from collections.abc import Mapping, Sequence
from html import escape

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
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>A GPU whose memory breaks</title>\n'
        '<body style="font-family: sans-serif; max-width: 960px">\n<h1 style="font-size: 18px">Rows out of use</h1>\n'
        f"<p>Each column is one of {NR_BANKS} banks, each square a row of 2 KiB. {_legend()}</p>\n"
        f"{_grid(total_bytes, retired)}\n<h2 style='font-size: 16px'>What became of errors</h2>\n{_outcomes(stat)}\n"
        f"<h2 style='font-size: 16px'>Events</h2>\n{_events(counters)}\n"
    )


def _legend() -> str:
    words = {"ok": "in use", "uncorrectable": "retired, could not be corrected", "correctable": "retired beforehand"}
    return " ".join(f'<span style="background:{_COLOURS[key]}">&emsp;</span> {text}' for key, text in words.items())


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
    most = max(counts.values()) or 1
    bars = []
    for number, (text, nr) in enumerate(counts.items()):
        y, length = 24 * number, max(1.0, 500 * nr / most) if nr else 0.0
        bars.append(f'<text x="0" y="{y + 16}">{escape(text)}</text>')
        bars.append(f'<rect x="300" y="{y + 4}" width="{length:.1f}" height="16" fill="#0b62a4"/>')
        bars.append(f'<text x="{306 + length:.0f}" y="{y + 16}">{nr:,}</text>')
    return f'<svg viewBox="0 0 900 {24 * len(counts)}" width="900" font-size="13">{"".join(bars)}</svg>'


def _events(counters: Sequence[Sequence[str]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(xid)}</td><td>{escape(name)}</td><td>{escape(where)}</td><td>{escape(nr)}</td></tr>"
        for xid, where, nr, _, name in counters
    )
    return f"<table cellpadding=4><tr><th>XID</th><th></th><th>where</th><th>how many</th></tr>{rows}</table>"
