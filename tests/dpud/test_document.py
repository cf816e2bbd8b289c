# SPDX-License-Identifier: GPL-2.0-only
"""Pages that the demos' pictures are in: what is said is said, and bars are as long as what they stand for."""

import re
from html.parser import HTMLParser

import pytest

from dpud.demo.document import bars, document, key


class Balanced(HTMLParser):
    """Fails where an element ends that is not the innermost."""

    VOID = {"meta"}
    OPTIONAL = {"html"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    rows = bars([("a", [(30.0, "#111", "x"), (10.0, "#222", "y")], "40"), ("b", [(10.0, "#111", "x")], "10")])
    assert re.findall(r'x="([\d.]+)" width="([\d.]+)"', rows) == [
        ("0.0", "750.0"),
        ("750.0", "250.0"),
        ("0.0", "250.0"),
    ]
    assert re.findall(r'class="number">(\d+)<', rows) == ["40", "10"]


@pytest.mark.parametrize("rows", [[], [("nothing", [(0.0, "#111", "x")], "0"), ("no part", [], "0")]])
def test_nothing_has_no_length(rows: list[tuple[str, list[tuple[float, str, str]], str]]) -> None:
    assert set(re.findall(r' width="([\d.]+)"', bars(rows))) <= {"0.0"}


def test_what_is_not_html_is_escaped_and_elements_end() -> None:
    page = document("a < b & c", f"{key('#fff', '<free>')} {bars([('<i>', [(1.0, '#111', '<x>')], '1')])}")
    parser = Balanced()
    parser.feed(page)
    assert set(parser.open) <= Balanced.OPTIONAL
    assert "<h1>a &lt; b &amp; c</h1>" in page
    assert "<free>" not in page
    assert 'name="viewport"' in page
