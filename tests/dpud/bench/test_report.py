# SPDX-License-Identifier: GPL-2.0-only
import io

import pytest
from rich.console import Console

from dpud.bench.report import Figure, Report, document, percentile, quantity


def test_figure_less_is_better_up_to_the_limit():
    assert Figure("t", 100, "ns", 100).verdict == "met"
    assert Figure("t", 101, "ns", 100).verdict == "missed"
    assert Figure("t", 50, "ns", 200).ratio == 0.25


def test_figure_more_is_better_must_exceed_the_peer():
    assert Figure("t", 100, "/s", 100, more=True).verdict == "missed"
    assert Figure("t", 101, "/s", 100, more=True).verdict == "met"


def test_figure_without_limit_has_no_verdict():
    figure = Figure("t", 1.5, "s")
    assert figure.cells() == ("t", "1.5 s", "", "", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(116822.4, "116,822 ns"), (100, "100 ns"), (99.96, "100 ns"), (60.66, "60.7 ns"), (0.6489, "0.649 ns")],
)
def test_quantity(value, text):
    assert quantity(value, "ns") == text


def test_percentile_is_nearest_rank():
    samples = [15, 20, 35, 40, 50]
    assert [percentile(samples, p) for p in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert percentile(range(100, 0, -1), 99) == 99
    assert percentile([7], 0) == 7


def test_percentile_of_nothing():
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def report():
    figures = [Figure("speed", 3.0, "s", 2.0, "half the peer"), Figure("other", 1234, "ns")]
    return Report("name", "a title", "How.", figures, ["load average 0.10, not pinned"])


def test_markdown_has_a_row_for_every_figure():
    lines = report().markdown().splitlines()
    assert lines[0] == "## name: a title"
    assert "| speed | 3 s | 2 s (half the peer) | 1.50 | missed |" in lines
    assert "| other | 1,234 ns |  |  |  |" in lines
    assert lines[-1] == "- load average 0.10, not pinned"


def test_markdown_of_nothing_has_no_table():
    text = Report("name", "a title", "how", notes=["why"]).markdown()
    assert "|" not in text
    assert "Nothing was measured." in text


def test_table_shows_the_same():
    console = Console(file=io.StringIO(), width=120)
    console.print(report().table())
    text = console.file.getvalue()
    for word in ("name: a title", "speed", "2 s (half the peer)", "1.50", "missed", "1,234 ns"):
        assert word in text


def test_document_names_its_command_and_holds_all_reports():
    text = document("2 CPUs.", [report(), report()])
    assert text.startswith("# Benchmarks\n")
    assert "dpud bench --write docs/benchmarks.md" in text
    assert "\n2 CPUs.\n" in text
    assert text.count("## name: a title") == 2
