# SPDX-License-Identifier: GPL-2.0-only
"""The picture of `dpud demo numa`: pages of a buffer by node, step by step, as one HTML file."""

from collections.abc import Mapping, Sequence
from html import escape

from dpud.demo.document import Part, bars, document, key, wide

_COLOURS = ("#0b62a4", "#15803d", "#c2410c", "#7e22ce", "#525252", "#b45309", "#0e7490", "#be185d")


def page(steps: Sequence[tuple[str, Mapping[str, int]]], decisions: Sequence[str]) -> str:
    """`steps`: what was done, and pages by node after it; `decisions`: lines of the file of that name."""
    nodes = sorted({node for _, pages in steps for node in pages})
    colours = {node: _COLOURS[at % len(_COLOURS)] for at, node in enumerate(nodes)}
    legend = " ".join(key(colour, node) for node, colour in colours.items())
    picture = bars([(name, _shares(pages, colours), "") for name, pages in steps])
    log = wide(f"<pre>{escape(chr(10).join(decisions))}</pre>")
    return document("Pages by NUMA node", f"<p>{legend}</p>\n{picture}\n<h2>The last decisions</h2>\n{log}")


def _shares(pages: Mapping[str, int], colours: Mapping[str, str]) -> list[Part]:
    """Of all pages."""
    total = sum(pages.values()) or 1
    return [
        (pages.get(node, 0) / total, colour, f"{node}: {pages.get(node, 0)} pages") for node, colour in colours.items()
    ]
