# SPDX-License-Identifier: GPL-2.0-only
"""Traditional compaction and the DPU's, each through a mounted daemon, beside this machine's own kernel.

All three start from the same pattern: 4 GiB written by one process, of which a random half was given back. Free huge
pages are blocks of order 9, a block of order 10 counting twice, as /proc/buddyinfo shows them before and after.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter_ns

from dpud.bench import host
from dpud.bench.node import MM, NODE0, PERCENT, REGION_ORDER, SEED, SIZE, WARM_UP_SIZE, no_peer
from dpud.bench.real_memory import counter, huge_pages
from dpud.bench.report import Figure, Report

NR_ROUNDS = 3
TRIGGERS: dict[str, Callable[[Path], Path]] = {
    "traditional": lambda mount: mount / "proc/sys/vm/compact_memory",
    "DPU": lambda mount: mount / NODE0 / "compact_dpu",
}


@dataclass(frozen=True)
class Outcome:
    """One compaction: pages migrated, wall time of the write, free huge pages gained."""

    nr_moved: int
    wall_ns: int
    nr_huge: int

    @property
    def ns_per_page(self) -> float:
        return self.wall_ns / self.nr_moved

    @property
    def pages_per_huge(self) -> float:
        """Pages moved for each huge page gained; infinite if none was."""
        return self.nr_moved / self.nr_huge if self.nr_huge > 0 else float("inf")


Outcomes = dict[str, list[Outcome]]


def our_compaction(mount: Path, trigger: Path, size: int) -> Outcome:
    """Fragment with a process of `size` bytes, then write 1 to `trigger`."""
    process = mount / MM / "bench"
    process.mkdir()
    (process / "anon").write_text(str(size))
    (process / "holes").write_text(f"{PERCENT} seed={SEED}")
    (mount / "proc/sys/vm/dpu_compact_region_order").write_text(str(REGION_ORDER))
    nr_moved, nr_huge = _look(mount)
    begin = perf_counter_ns()
    trigger.write_text("1")
    wall_ns = perf_counter_ns() - begin
    moved_after, huge_after = _look(mount)
    process.rmdir()
    return Outcome(moved_after - nr_moved, wall_ns, huge_after - nr_huge)


def _look(mount: Path) -> tuple[int, int]:
    vmstat, buddyinfo = (mount / f"proc/{name}" for name in ("vmstat", "buddyinfo"))
    return counter(vmstat.read_text(), "pgmigrate_success"), huge_pages(buddyinfo.read_text())


def real_compaction() -> Outcome:
    """The kernel's own; needs root and the memory."""
    with host.started(host.module("real_memory", str(SIZE), str(PERCENT), str(SEED))) as peer:
        assert peer.stdout is not None
        return Outcome(*map(int, peer.stdout.read().split()))


def run() -> Report:
    report = Report(
        "compaction",
        "4 GiB with a random half freed: traditional compaction and the DPU's",
        f"Through mounted daemons, real bytes, DPU region order {REGION_ORDER}. Medians of {NR_ROUNDS} rounds each, a "
        "fresh daemon for every round that compacted 64 MiB before, alternating with the peer: the same pattern in "
        "this machine's memory, one write to its compact_memory, pages counted by pgmigrate_success.",
    )
    missing = no_peer()
    ours: Outcomes = {name: [] for name in TRIGGERS}
    theirs: list[Outcome] = []
    for _ in range(NR_ROUNDS):
        if missing is None:
            theirs.append(real_compaction())
        for name, trigger in TRIGGERS.items():
            with host.daemon() as mount:
                our_compaction(mount, trigger(mount), WARM_UP_SIZE)
                ours[name].append(our_compaction(mount, trigger(mount), SIZE))
    report.figures = figures(ours, theirs)
    report.notes += [f"{who}: {_rounds(rounds)}" for who, rounds in ours.items()]
    report.notes += [f"peer: {_rounds(theirs)}"] if theirs else []
    if missing:
        report.notes.append(missing)
    elif not any(outcome.nr_huge > 0 for outcome in theirs):
        report.notes.append(
            "The peer's buddyinfo gained no huge page, because what it freed stayed on per-CPU lists. Its time for one "
            "is therefore taken as that of as many pages as the same algorithm moves here for one."
        )
    return report


def figures(ours: Outcomes, theirs: list[Outcome]) -> list[Figure]:
    """What came out, beside the peer where there was one."""
    traditional, dpu = ours["traditional"], ours["DPU"]
    limit = _median(theirs, "ns_per_page") if theirs else None
    half = us_per_huge(theirs, _median(traditional, "pages_per_huge")) / 2 if theirs else None
    return [
        Figure(
            "traditional: wall time per moved page", _median(traditional, "ns_per_page"), "ns", limit, "the kernel's"
        ),
        Figure("traditional: pages moved per huge page gained", _median(traditional, "pages_per_huge"), "pages"),
        Figure("DPU: wall time per moved page", _median(dpu, "ns_per_page"), "ns"),
        Figure("DPU: pages moved per huge page gained", _median(dpu, "pages_per_huge"), "pages"),
        Figure("DPU: wall time per huge page gained", us_per_huge(dpu), "us", half, "half the kernel's"),
    ]


def us_per_huge(outcomes: list[Outcome], pages_per_huge: float | None = None) -> float:
    """Wall time of a huge page; where none was gained, that of moving `pages_per_huge` pages."""
    gained = [outcome for outcome in outcomes if outcome.nr_huge > 0]
    if gained or pages_per_huge is None:
        return float(median(outcome.ns_per_page * outcome.pages_per_huge for outcome in gained or outcomes)) / 1e3
    return _median(outcomes, "ns_per_page") * pages_per_huge / 1e3


def _median(outcomes: list[Outcome], name: str) -> float:
    return float(median(getattr(outcome, name) for outcome in outcomes))


def _rounds(rounds: list[Outcome]) -> str:
    return ", ".join(
        f"{each.nr_moved} pages at {each.ns_per_page:.0f} ns, {each.nr_huge:+d} huge pages" for each in rounds
    )
