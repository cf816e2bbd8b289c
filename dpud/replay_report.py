# SPDX-License-Identifier: GPL-2.0-only
"""What `dpud replay` prints, and what it writes with --json: the course of fragmentation, and the end beside the real
machine's."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table

from dpud.proctext import ZoneKey
from dpud.replay import Outcome, Sample, fragmentation

_MIB_PAGES = 256
_UNITS = (
    "free: in blocks on the buddy lists, as /proc/buddyinfo counts them; pages on per-CPU lists are not among them.",
    "2 MiB blocks: how many could be cut from the free blocks. unusable: the part of free memory that is in smaller "
    "ones (debugfs extfrag/unusable_index, order 9, over all zones).",
    "fallbacks: allocations that had to take a block of another migratetype: ours, and the trace's "
    "mm_page_alloc_extfrag events.",
)


def report(outcome: Outcome) -> Group:
    """All of it, for a terminal."""
    parts: list[Any] = [_course(outcome), *_UNITS]
    if outcome.real_after is not None:
        parts += ["", _ending(outcome), *_about_the_ending(outcome)]
    parts += ["", *_lines(outcome)]
    return Group(*parts)


# The course.


def _course(outcome: Outcome) -> Table:
    how = {None: "no compaction", "traditional": "the kernel's compaction", "dpu": "DPU compaction"}
    title = f"{outcome.options.trace}: {outcome.notes.nr_events:,} events, {how[outcome.options.compaction]}"
    table = Table(title=title, title_justify="left")
    headings = ("time s", "allocs", "frees", "free MiB", "2 MiB blocks", "unusable", "fallbacks ours", "real")
    for heading in headings:
        table.add_column(heading, justify="right")
    for sample in outcome.samples:
        table.add_row(*_cells(sample))
    return table


def _cells(sample: Sample) -> tuple[str, ...]:
    return (
        f"{sample.time_ns / 1e9:.3f}",
        f"{sample.allocs:,}",
        f"{sample.frees:,}",
        f"{sample.free_pages / _MIB_PAGES:,.1f}",
        f"{sample.huge_blocks:,}",
        f"{sample.unusable / 10:.1f} %",
        f"{sample.fallbacks:,}",
        f"{sample.real_fallbacks:,}",
    )


# The end.


def _ending(outcome: Outcome) -> Table:
    table = Table(title="At the end", title_justify="left")
    table.add_column("figure")
    for heading in ("real before", "real after", "ours after", "ours to real"):
        table.add_column(heading, justify="right")
    for what, before, real, ours in ending(outcome):
        table.add_row(what, "" if before is None else f"{before:,}", f"{real:,}", f"{ours:,}", _relative(real, ours))
    return table


def ending(outcome: Outcome) -> Iterator[tuple[str, int | None, int, int]]:
    """(figure, real one before, real one after, ours); before is None where it is not known."""
    assert outcome.real_after is not None
    states = outcome.real_before, outcome.real_after, outcome.nr_free
    sums = [fragmentation(_by_order(state)) for state in states]
    for index, what in enumerate(("free pages", "2 MiB blocks", "unusable, per mille")):
        before, real, ours = (figures[index] for figures in sums)
        yield what, before if outcome.real_before else None, real, ours
    yield "pages on per-CPU lists", None, outcome.real_pcp, outcome.nr_pcp
    for key in sorted(outcome.nr_free):
        rows = [state.get(key) for state in states]
        for order in range(len(outcome.nr_free[key])):
            before_nr, real_nr, our_nr = (0 if row is None else row[order] for row in rows)
            if not before_nr == real_nr == our_nr:
                what = f"node {key[0]} {key[1]}: free blocks of order {order}"
                yield what, None if rows[0] is None else before_nr, real_nr, our_nr


def _by_order(state: dict[ZoneKey, tuple[int, ...]]) -> list[int]:
    return [sum(column) for column in zip(*state.values(), strict=True)]


def _relative(real: int, ours: int) -> str:
    if real == ours:
        return "equal"
    return f"{100 * (ours / real - 1):+.1f} %" if real else f"{ours:+,}"


def _about_the_ending(outcome: Outcome) -> Iterator[str]:
    yield (
        "real before, real after: /proc/buddyinfo of the captures. Small orders are served from per-CPU lists, which "
        "a capture shows only as counts: there the two may differ without either being more fragmented. Orders that "
        "did not change are left out."
    )
    if outcome.options.compaction is not None:
        yield "ours includes compaction that the real machine did not do."


# Counts.


def _lines(outcome: Outcome) -> Iterator[str]:
    """Everything else that was counted, where there is something to say."""
    counts = outcome.counts
    seconds = outcome.samples[-1].time_ns / 1e9
    yield (
        f"{outcome.notes.nr_events:,} events of {seconds:.3f} s, replayed in {outcome.wall_s:.1f} s: "
        f"{counts['allocs']:,} allocations ({counts['alloc_pages']:,} pages), {counts['frees']:,} frees "
        f"({counts['free_pages']:,} pages)."
    )
    yield from _fallback_lines(outcome)
    for name, text in _COUNTED.items():
        if counts[name]:
            yield text.format(counts[name])
    if counts["failed"]:
        orders = ", ".join(f"order {order}: {nr:,}" for order, nr in enumerate(outcome.failed) if nr)
        yield f"{counts['failed']:,} requests that the real kernel served found no block here ({orders})."
    if outcome.notes.unknown_gfp:
        yield f"GFP flags that are not known here and were passed over: {', '.join(sorted(outcome.notes.unknown_gfp))}."
    if outcome.notes.nr_late:
        yield (
            f"{outcome.notes.nr_late:,} events stand behind later ones, so pages seem to be freed before they were "
            "allocated: put the lines in order of time (files of single CPUs cannot just be joined)."
        )
    if outcome.notes.is_cut:
        yield "The trace's last line is cut off; it was left out."
    yield from _compaction_lines(outcome)


_COUNTED = {
    "free_unplaced": "{:,} pages were freed that had found no room here.",
    "free_unknown": "{:,} pages were freed that are free here: taken by what the trace does not tell (compaction's "
    "targets, lost events), or between capture and trace.",
    "unseen_free": "{:,} pages were allocated that looked in use here: they lay on per-CPU lists, which a capture does "
    "not show, or their free was lost. They count as freed first.",
    "outside": "{:,} events are about pages that the captured machine does not have: is it the same machine?",
    "real_failed": "{:,} requests failed on the real machine; they were not tried here.",
    "real_migrated": "{:,} pages were moved by the real machine's own compaction; where to, the trace does not tell.",
    "lost": "{:,} events (or more) were lost by the tracer: what they were about is wrong here from then on.",
}


def _fallback_lines(outcome: Outcome) -> Iterator[str]:
    ours, real = outcome.fallbacks, (outcome.counts["real_fallbacks"], outcome.counts["real_fragmenting"])
    yield (
        f"fallbacks: ours {ours[0]:,}, real {real[0]:,}; of them smaller than a pageblock, which fragments one: "
        f"ours {ours[1]:,}, real {real[1]:,}."
    )


def _compaction_lines(outcome: Outcome) -> Iterator[str]:
    if outcome.options.compaction is None:
        return
    done = outcome.compaction.get
    yield (
        f"compaction: {done('pgmigrate_success', 0):,} pages moved, {done('pgmigrate_fail', 0):,} not; kcompactd woken "
        f"{done('compact_daemon_wake', 0):,} times; {done('compact_stall', 0):,} requests compacted for themselves, "
        f"{done('compact_success', 0):,} of them got their block."
    )
    if outcome.options.compaction == "dpu":
        yield (
            f"DPU: {done('dpu_pages_moved', 0):,} pages in {done('dpu_regions', 0):,} regions, "
            f"{done('dpu_modelled_ns', 0) / 1e6:,.1f} ms of modelled time; the CPU moved "
            f"{done('dpu_cpu_pages_moved', 0):,} pages of batches too small for it."
        )


def as_json(outcome: Outcome) -> str:
    """The same figures for programs; times in nanoseconds, memory in pages."""
    real = None if outcome.real_after is None else _named(outcome.real_after)
    figures = {
        "trace": str(outcome.options.trace),
        "compaction": outcome.options.compaction,
        "nr_events": outcome.notes.nr_events,
        "nr_lines": outcome.notes.nr_lines,
        "is_cut": outcome.notes.is_cut,
        "nr_late": outcome.notes.nr_late,
        "wall_s": outcome.wall_s,
        "samples": [dataclasses.asdict(sample) for sample in outcome.samples],
        "counts": outcome.counts,
        "fallbacks": outcome.fallbacks[0],
        "fragmenting": outcome.fallbacks[1],
        "failed_by_order": outcome.failed,
        "nr_free": _named(outcome.nr_free),
        "nr_pcp": outcome.nr_pcp,
        "real_nr_free_before": _named(outcome.real_before),
        "real_nr_free_after": real,
        "real_nr_pcp": None if real is None else outcome.real_pcp,
        "compaction_counters": outcome.compaction,
    }
    return json.dumps(figures, indent=1) + "\n"


def _named(state: dict[ZoneKey, tuple[int, ...]]) -> dict[str, list[int]]:
    return {f"{nid} {name}": list(row) for (nid, name), row in state.items()}
