# SPDX-License-Identifier: GPL-2.0-only
"""The HTML file that a demo's picture is in: it needs nothing else, and is read on a telephone as on a desk.

Pictures are SVG with a `viewBox`: they are as wide as they were drawn, or as the window where that is less. Those with
letters in them shrink to MIN_REM and no further, and scroll by themselves from there on, as wide tables do. Bars are
rows of a table, so their words stay as large as all others.
"""

from collections.abc import Sequence
from html import escape

MIN_REM = 44

_STYLE = f"""\
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; \
margin: 1.5rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1.1rem; margin: 1.5rem 0 .5rem }}
svg {{ max-width: 100%; height: auto; display: block; font-family: inherit }}
.wide {{ overflow-x: auto }} .wide > svg {{ min-width: {MIN_REM}rem }} pre {{ font-size: 13px }}
table {{ border-collapse: collapse }} th, td {{ padding: .2rem .8rem .2rem 0; text-align: left }}
.number {{ text-align: right; font-variant-numeric: tabular-nums }}
.bars {{ width: 100% }} .bars td:nth-child(2) {{ width: 60% }} .bars svg {{ width: 100%; height: 1.1rem }}
.key {{ white-space: nowrap; margin-right: 1rem }}
.key i {{ display: inline-block; width: .9em; height: .9em; margin-right: .35em; border: 1px solid #0003 }}"""


def document(title: str, body: str) -> str:
    """One page, with its title above the body, which is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n<h1>{escape(title)}</h1>\n{body}\n"
    )


def key(colour: str, text: str) -> str:
    """What a colour means, for a legend."""
    return f'<span class="key"><i style="background:{colour}"></i>{escape(text)}</span>'


def wide(html: str) -> str:
    """What may be wider than the window."""
    return f'<div class="wide">{html}</div>'


Part = tuple[float, str, str]
"""(length, colour, what it is)."""


def bars(rows: Sequence[tuple[str, Sequence[Part], str]]) -> str:
    """(name, parts side by side, number) of each row; the longest row takes all of the width."""
    longest = max((sum(length for length, _, _ in parts) for _, parts, _ in rows), default=0) or 1
    return f'<table class="bars">\n{"".join(_bar(*row, longest) for row in rows)}</table>'


def _bar(name: str, parts: Sequence[Part], number: str, longest: float) -> str:
    at, rects = 0.0, []
    for length, colour, what in parts:
        width = 1000 * length / longest
        rects.append(
            f'<rect x="{at:.1f}" width="{width:.1f}" height="10" fill="{colour}"><title>{escape(what)}</title></rect>'
        )
        at += width
    picture = f'<svg viewBox="0 0 1000 10" preserveAspectRatio="none">{"".join(rects)}</svg>'
    return f'<tr><td>{escape(name)}</td><td>{picture}</td><td class="number">{escape(number)}</td></tr>\n'
