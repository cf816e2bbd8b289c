# SPDX-License-Identifier: GPL-2.0-only
"""What happened when: lines over seconds and phases, as one HTML file with an SVG in it, which needs nothing else."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle

from dpud.demo.document import document, key, wide

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 960, 420, 60, 50, 140, 40
_COLOURS = ("#0b62a4", "#c2410c", "#15803d", "#7e22ce", "#525252")


def page(title: str, lines: Mapping[str, Points], phases: Sequence[tuple[float, str]], unit: str) -> str:
    """`lines` by name, x in seconds; a phase begins at its x and lasts until the next. ValueError without points."""
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("nothing to draw")
    plot = _Plot(max(x for x, _ in points) or 1.0, max(y for _, y in points) or 1.0)
    body = [*plot.phases(phases), *plot.axes(unit), *plot.lines(lines)]
    picture = "\n".join(body)
    keys = " ".join(key(colour, name) for name, colour in zip(lines, cycle(_COLOURS), strict=False))
    return document(
        title,
        f"<p>{keys}</p>\n"
        + wide(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" font-size="13">\n{picture}\n</svg>'),
    )


def step_of(largest: float) -> float:
    """1, 2 or 5 times a power of ten, of which at most five make `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / 5))
    return next(power * times for times in (1, 2, 5, 10) if power * times * 5 >= largest)


class _Plot:
    """The drawing area, for x from 0 to `to_x` and y from 0 to the first mark from `to_y` on."""

    def __init__(self, to_x: float, to_y: float) -> None:
        self._step_x, self._step_y = step_of(to_x), step_of(to_y)
        self._to_x, self._to_y = to_x, self._step_y * math.ceil(to_y / self._step_y)

    def _x(self, x: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * x / self._to_x, 1)

    def _y(self, y: float) -> float:
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * y / self._to_y, 1)

    def phases(self, phases: Sequence[tuple[float, str]]) -> list[str]:
        found = []
        for number, (begin, name) in enumerate(phases):
            left, down = self._x(begin), _TOP - 8 - 14 * (number % 2)
            found.append(f'<path d="M{left} {down}V{_HEIGHT - _BOTTOM}" stroke="#a3a3a3" stroke-dasharray="4 3"/>')
            found.append(f'<text x="{left + 4}" y="{down}" fill="#404040">{escape(name)}</text>')
        return found

    def axes(self, unit: str) -> list[str]:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        found = [f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#000"/>']
        found.append(f'<text x="8" y="{_TOP - 16}">{escape(unit)}</text>')
        for part in range(round(self._to_y / self._step_y) + 1):
            y = self._step_y * part
            found.append(f'<text x="{_LEFT - 6}" y="{self._y(y) + 4}" text-anchor="end">{y:g}</text>')
        for part in range(int(self._to_x / self._step_x) + 1):
            x = self._step_x * part
            found.append(f'<text x="{self._x(x)}" y="{bottom + 18}" text-anchor="middle">{x:g} s</text>')
        return found

    def lines(self, lines: Mapping[str, Points]) -> list[str]:
        found = []
        for line, colour in zip(lines.values(), cycle(_COLOURS), strict=False):
            path = " ".join(f"{self._x(x)},{self._y(y)}" for x, y in line)
            found.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        return found
