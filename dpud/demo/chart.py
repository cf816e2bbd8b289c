# SPDX-License-Identifier: GPL-2.0-only
"""A chart as one HTML page that needs nothing else: dots for what was measured, lines for what was expected."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dpud.demo.document import document, key, wide

Points = Sequence[tuple[float, float]]

COLOURS = ("#1b6ca8", "#2e8b57", "#c77c11", "#b3312c")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 720, 420, 60, 20, 50, 30


@dataclass(frozen=True)
class Curve:
    """One series: y is a share, 0 to 1."""

    name: str
    measured: Points
    expected: Points


def page(title: str, x_name: str, curves: Sequence[Curve]) -> str:
    """The page."""
    largest = max([x for curve in curves for x, _ in [*curve.measured, *curve.expected]] or [1]) or 1
    parts = [_axes(x_name, largest)]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(curves))]
    parts += [_series(curve, colour, largest) for curve, colour in zip(curves, colours, strict=True)]
    body = "\n".join(parts)
    keys = " ".join(key(colour, curve.name) for curve, colour in zip(curves, colours, strict=True))
    return document(
        title,
        f"<p>{keys}</p>\n" + wide(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}">\n{body}\n</svg>') + "\n"
        "<p>Dots: measured. Lines: expected.</p>",
    )


def _x(x: float, largest: float) -> float:
    return _LEFT + x / largest * (_WIDTH - _LEFT - _RIGHT)


def _y(y: float) -> float:
    return _HEIGHT - _BOTTOM - y * (_HEIGHT - _BOTTOM - _TOP)


def _axes(x_name: str, largest: float) -> str:
    lines = [f'<text x="{_LEFT}" y="{_HEIGHT - 10}" font-size="13">{escape(x_name)}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = _y(share)
        lines.append(f'<line x1="{_LEFT}" x2="{_x(largest, largest)}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4}" font-size="12" text-anchor="end">{share:.0%}</text>')
    for x in range(int(largest) + 1):
        at = f'x="{_x(x, largest)}" y="{_HEIGHT - _BOTTOM + 18}"'
        lines.append(f'<text {at} font-size="12" text-anchor="middle">{x}</text>')
    return "\n".join(lines)


def _series(curve: Curve, colour: str, largest: float) -> str:
    path = " ".join(f"{_x(x, largest):.1f},{_y(y):.1f}" for x, y in curve.expected)
    dots = "".join(f'<circle cx="{_x(x, largest):.1f}" cy="{_y(y):.1f}" r="4"/>' for x, y in curve.measured)
    return f'<g fill="{colour}" stroke="none"><polyline points="{path}" fill="none" stroke="{colour}"/>{dots}</g>'
