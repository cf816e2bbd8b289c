# SPDX-License-Identifier: GPL-2.0-only
"""The demo's picture of what happened when: well-formed, whole, and within its bounds."""

import re
from xml.etree import ElementTree

import pytest

from dpud.demo.timeline import page, step_of

LINES = {"a<b": [(0.0, 0.0), (10.0, 100.0)], "c": [(0.0, 50.0), (5.0, 25.0)]}


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])


def test_every_line_is_drawn_where_it_belongs() -> None:
    root = svg(page("Bandwidth & more", LINES, [(0.0, "begin"), (5.0, "<later>")], "MB/s"))
    lines = [line.get("points", "") for line in root.iter("polyline")]
    first, second = ([tuple(map(float, point.split(","))) for point in line.split()] for line in lines)
    (left, bottom), (right, top) = first
    assert left < right
    assert top < bottom
    assert second[0][1] == pytest.approx((bottom + top) / 2, abs=0.2)
    assert second[1][0] == pytest.approx((left + right) / 2, abs=0.2)
    texts = [text.text for text in root.iter("text")]
    assert {"<later>", "MB/s", "10 s"} <= set(texts)


def test_the_names_of_lines_are_above_the_picture_where_a_narrow_window_shows_them() -> None:
    text = page("Bandwidth", LINES, [], "MB/s")
    keys = re.findall(r'background:(#\w+)"></i>([^<]*)</span>', text[: text.index("<svg")])
    strokes = [line.get("stroke") for line in svg(text).iter("polyline")]
    assert keys == list(zip(strokes, ["a&lt;b", "c"], strict=True))


@pytest.mark.parametrize(("largest", "step"), [(100, 20), (101, 50), (0.9, 0.2), (5, 1), (1e9, 2e8)])
def test_marks_are_round_numbers(largest: float, step: float) -> None:
    assert step_of(largest) == pytest.approx(step)


def test_nothing_leaves_the_picture() -> None:
    text = page("t", {"a": [(0.0, 1e9), (3.0, 5.0)]}, [], "x")
    points = re.findall(r"([\d.-]+),([\d.-]+)", re.search(r'points="([^"]*)"', text)[1])  # type: ignore[index]
    assert all(0 <= float(x) <= 960 and 0 <= float(y) <= 420 for x, y in points)


def test_without_points_there_is_no_chart() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        page("t", {"a": []}, [], "x")
