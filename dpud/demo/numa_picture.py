# SPDX-License-Identifier: GPL-2.0-only
"""The picture of `dpud demo numa`: pages of a buffer by node, step by step, as one HTML file with an SVG in it."""

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _BAR, _GAP, _LEFT = 760, 26, 14, 240
_COLOURS = ("#0b62a4", "#15803d", "#c2410c", "#7e22ce", "#525252", "#b45309", "#0e7490", "#be185d")


def page(steps: Sequence[tuple[str, Mapping[str, int]]], decisions: Sequence[str]) -> str:
    """`steps`: what was done, and pages by node after it; `decisions`: lines of the file of that name."""
    nodes = sorted({node for _, pages in steps for node in pages})
    height = (_BAR + _GAP) * (len(steps) + 1)
    bars = "".join(_bar(number, name, pages, nodes) for number, (name, pages) in enumerate(steps, 1))
    legend = "".join(
        f'<text x="{_LEFT + 90 * at}" y="18" fill="{_COLOURS[at % len(_COLOURS)]}">{escape(node)}</text>'
        for at, node in enumerate(nodes)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Pages by NUMA node</title>\n'
        '<body style="font-family: sans-serif">\n<h1 style="font-size: 18px">Pages by NUMA node</h1>\n'
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" font-size="13">{legend}{bars}</svg>\n'
        f'<h2 style="font-size: 16px">The last decisions</h2>\n<pre>{escape(chr(10).join(decisions))}</pre>\n'
    )


def _bar(number: int, name: str, pages: Mapping[str, int], nodes: Sequence[str]) -> str:
    y, x, total = (_BAR + _GAP) * number, float(_LEFT), sum(pages.values()) or 1
    parts = [f'<text x="0" y="{y + 18}">{escape(name)}</text>']
    for at, node in enumerate(nodes):
        width = (_WIDTH - _LEFT) * pages.get(node, 0) / total
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[at % len(_COLOURS)]}">'
            f"<title>{escape(node)}: {pages.get(node, 0)} pages</title></rect>"
        )
        x += width
    return "".join(parts)
