# SPDX-License-Identifier: GPL-2.0-only
"""What a benchmark found: figures with what they are held against, as a table on the terminal and in Markdown."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rich.table import Table

HEADINGS = ("Figure", "Ours", "Target or peer", "Ratio", "Verdict")
_RIGHT = ("Ours", "Ratio", "Published", "Real", "Error")
"""Headings of columns of numbers; those that begin with a digit are too."""


class Row(Protocol):
    """A line of a report's table."""

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or anything else; what the row's last cell is coloured by."""
        ...

    def cells(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Line:
    """A row of ready texts."""

    texts: tuple[str, ...]
    verdict: str = ""

    def cells(self) -> tuple[str, ...]:
        return self.texts


@dataclass(frozen=True)
class Figure:
    """One measured value, in `unit`, and the limit it has to keep, if there is one.

    `limit` is in the same unit and `limit_name` says where it comes from; `more` means that ours has to be above it.
    """

    what: str
    ours: float
    unit: str
    limit: float | None = None
    limit_name: str = "target"
    more: bool = False

    @property
    def ratio(self) -> float | None:
        return self.ours / self.limit if self.limit else None

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or nothing where there is no limit."""
        if self.limit is None:
            return ""
        met = self.ours > self.limit if self.more else self.ours <= self.limit
        return "met" if met else "missed"

    def cells(self) -> tuple[str, ...]:
        """The row of a table, one text for each of HEADINGS."""
        limit = "" if self.limit is None else f"{quantity(self.limit, self.unit)} ({self.limit_name})"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return self.what, quantity(self.ours, self.unit), limit, ratio, self.verdict


@dataclass
class Report:
    """One benchmark's outcome: `how` says what was measured, `notes` what the reader must know about this run.

    `parts` are further tables, each a report of its own, that follow.
    """

    name: str
    title: str
    how: str
    figures: Sequence[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    headings: tuple[str, ...] = HEADINGS
    parts: list["Report"] = field(default_factory=list)

    @property
    def _is_right(self) -> list[bool]:
        return [heading in _RIGHT or heading[:1].isdigit() for heading in self.headings]

    def table(self) -> Table:
        table = Table(title=f"{self.name}: {self.title}", title_justify="left")
        for heading, right in zip(self.headings, self._is_right, strict=True):
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for figure in self.figures:
            style = {"met": "green", "missed": "red"}.get(figure.verdict, "")
            *cells, last = figure.cells()
            table.add_row(*cells, f"[{style}]{last}[/]" if style else last)
        return table

    def markdown(self) -> str:
        rule = tuple("---:" if right else "---" for right in self._is_right)
        rows = [self.headings, rule, *(figure.cells() for figure in self.figures)]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows) if self.figures else "Nothing was measured."
        notes = "".join(f"\n- {note}" for note in self.notes)
        text = f"## {self.name}: {self.title}\n\n{self.how}\n\n{table}\n{notes}\n"
        return "\n".join([text, *(part.markdown() for part in self.parts)])


def quantity(value: float, unit: str) -> str:
    """`116,822 ns`, `0.43 s`: whole numbers from 100 on, else three digits."""
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def percentile(samples: Iterable[float], percent: float) -> float:
    """The smallest sample that is not below `percent` percent of them (nearest rank). ValueError if there are none."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples")
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def document(conditions: str, reports: Iterable[Report]) -> str:
    """The page that `dpud bench --write` makes."""
    head = f"# Benchmarks\n\nMade by `dpud bench --write docs/benchmarks.md`; do not edit.\n\n{conditions}\n"
    return "\n".join([head, *(report.markdown() for report in reports)])
