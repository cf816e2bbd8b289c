# SPDX-License-Identifier: GPL-2.0-only
"""One `echo 1 > compact_dpu` against one `echo 1 > /proc/sys/vm/compact_memory` on this machine.

Both compact the same pattern: 4 GiB written by one process, of which a random half was given back. Ours goes through
a mounted daemon with real bytes. Odd rounds have a second process read buddyinfo without pause all the while.
"""

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from dpud.bench import host
from dpud.bench.real_memory import COMPACT_MEMORY, counter
from dpud.bench.report import Figure, Report, percentile
from dpud.physmem import PhysMem
from kernelsim.jit import njit
from kernelsim.page import PAGE_SIZE

SIZE = 4 << 30
WARM_UP_SIZE = 64 << 20
PERCENT, SEED = 50, 7
REGION_ORDER = 18
NR_ROUNDS = 6
READ_TARGET_MS = 20
_COPY_PAGES = 1 << 18
_WORDS = PAGE_SIZE // 8

MM = "sys/kernel/config/kernelsim/mm"
NODE0 = "sys/devices/system/node/node0"
STATS = "sys/kernel/debug/dpu_compact/stats"


@dataclass(frozen=True)
class Round:
    """One compaction: pages moved, wall time of the write, latencies in ns of the reads during it."""

    nr_moved: int
    wall_ns: int
    read_ns: tuple[int, ...] = ()

    @property
    def ns_per_page(self) -> float:
        return self.wall_ns / self.nr_moved


def overlapping(samples: "array[int]", begin: int, end: int) -> tuple[int, ...]:
    """Durations of those (begin, end) pairs of `samples` that touch the time from `begin` to `end`."""
    pairs = zip(samples[::2], samples[1::2], strict=True)
    return tuple(last - first for first, last in pairs if last >= begin and first <= end)


def our_round(mount: Path, size: int, probed: bool) -> Round:
    """Fragment and compact node 0 with a process of `size` bytes, through files."""
    process = mount / MM / "bench"
    process.mkdir()
    (process / "anon").write_text(str(size))
    (process / "holes").write_text(f"{PERCENT} seed={SEED}")
    (mount / "proc/sys/vm/dpu_compact_region_order").write_text(str(REGION_ORDER))
    stats = mount / STATS
    nr_before = counter(stats.read_text(), "pages_moved")
    with prober(mount / "proc/buddyinfo", probed) as samples:
        begin = perf_counter_ns()
        (mount / NODE0 / "compact_dpu").write_text("1")
        end = perf_counter_ns()
    nr_moved = counter(stats.read_text(), "pages_moved") - nr_before
    process.rmdir()
    return Round(nr_moved, end - begin, overlapping(samples, begin, end))


@contextmanager
def prober(path: Path, wanted: bool) -> Iterator["array[int]"]:
    """Collects samples (see prober.py) while the block runs; they are there after it."""
    samples = array("q")
    if not wanted:
        yield samples
        return
    with host.started(host.module("prober", str(path))) as prober:
        assert prober.stdout is not None
        assert prober.stdout.read(1) == b"."
        yield samples
        prober.terminate()
        samples.frombytes(prober.stdout.read())


def real_round() -> Round:
    """The kernel's own; needs root and the memory."""
    with host.started(host.module("real_memory", str(SIZE), str(PERCENT), str(SEED))) as peer:
        assert peer.stdout is not None
        nr_moved, wall_ns, _ = map(int, peer.stdout.read().split())
    return Round(nr_moved, wall_ns)


def no_peer() -> str | None:
    """Why this machine's kernel cannot be measured, or None if it can."""
    if not os.access(COMPACT_MEMORY, os.W_OK):
        return f"no peer: {COMPACT_MEMORY} cannot be written (run as root)"
    available = counter(Path("/proc/meminfo").read_text().replace(" kB", "").replace(":", ""), "MemAvailable")
    if available << 10 < SIZE * 5 // 4:
        return f"no peer: {available >> 10} MiB of memory are available, {SIZE * 5 // 4 >> 20} are needed"
    return None


@njit
def _copy_pages(src: NDArray[np.uint64], dst: NDArray[np.uint64]) -> None:
    for page in range(src.shape[0]):
        for word in range(src.shape[1]):
            dst[page, word] = src[page, word]


def copy_ns_per_page() -> float:
    """What it takes to copy a page from cold memory to cold memory in a plain loop, best of three GiB."""
    memory = PhysMem().alloc(2 * _COPY_PAGES, _WORDS)
    memory[:] = 1
    _copy_pages(memory[:1], memory[1:2])
    spent = []
    for _ in range(3):
        begin = perf_counter_ns()
        _copy_pages(memory[:_COPY_PAGES], memory[_COPY_PAGES:])
        spent.append(perf_counter_ns() - begin)
    return min(spent) / _COPY_PAGES


def run() -> Report:
    report = Report(
        "node",
        "4 GiB with a random half freed, one write to compact_dpu",
        f"Through a mounted daemon, real bytes, region order {REGION_ORDER}. Medians of {NR_ROUNDS // 2} rounds each, "
        "a fresh daemon for every round that compacted 64 MiB before, alternating with the peer: the same pattern in "
        "this machine's memory, one write to its compact_memory, pages counted by pgmigrate_success.",
    )
    missing = no_peer()
    ours, theirs = [], []
    for number in range(NR_ROUNDS):
        if missing is None:
            theirs.append(real_round())
        with host.daemon() as mount:
            our_round(mount, WARM_UP_SIZE, probed=False)
            ours.append(our_round(mount, SIZE, probed=number % 2 == 1))
    report.figures = _figures(ours, theirs, copy_ns_per_page())
    report.notes += [f"{who}: {_rounds(rounds)}" for who, rounds in (("ours", ours), ("peer", theirs)) if rounds]
    if missing:
        report.notes.append(missing)
    return report


def _rounds(rounds: list[Round]) -> str:
    return ", ".join(f"{each.nr_moved} pages at {each.ns_per_page:.0f} ns" for each in rounds)


def _figures(ours: list[Round], theirs: list[Round], copy_ns: float) -> list[Figure]:
    quiet = median(each.ns_per_page for each in ours[::2])
    reads = [ns / 1e6 for each in ours for ns in each.read_ns]
    limit, name = (None, "")
    if theirs:
        linux = median(each.ns_per_page for each in theirs)
        limit, name = linux / 4, f"a quarter of Linux's {linux:,.0f} ns"
    return [
        Figure("wall time per moved page", quiet, "ns", limit, name),
        Figure("the same, buddyinfo read without pause", median(each.ns_per_page for each in ours[1::2]), "ns"),
        Figure("plain copy of a cold page, one thread", copy_ns, "ns"),
        Figure("buddyinfo during it, median", median(reads), "ms"),
        Figure("buddyinfo during it, 99th percentile", percentile(reads, 99), "ms", READ_TARGET_MS),
        Figure(f"buddyinfo during it, longest of {len(reads)}", max(reads), "ms"),
    ]
