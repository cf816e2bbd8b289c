# SPDX-License-Identifier: GPL-2.0-only
"""The benchmark of swap: its peers and its arithmetic, on small sizes."""

from pathlib import Path

import pytest

from dpud.bench.gpu.readahead import LinuxReadahead, PublishedDensityRule
from dpud.bench.gpu.swap import mmap_faults, policy_line, replay, tier_faults
from dpud.bench.gpu.traces import TRACES
from dpud.gpu.swap.prefetch import DensityTree


@pytest.mark.slow
def test_a_row_holds_ours_against_libcachesims() -> None:
    pytest.importorskip("libcachesim")
    line = policy_line("zipf", TRACES["zipf"](5000, 1000), 100, "10 %")
    assert line.verdict == "met"
    _, _, lru, peer, s3fifo, other, fewest, gap = line.cells()
    assert (lru, s3fifo) == (peer, other)
    assert int(fewest.replace(",", "")) < int(s3fifo.replace(",", "")) < int(lru.replace(",", ""))
    assert gap.endswith("%")


def test_readahead_doubles_its_window_as_linux_does() -> None:
    """A file read in sequence: 4 pages, then at the mark 8, 16, 32, 32 more; one fault in all."""
    there: set[int] = set()
    readahead, windows, faults = LinuxReadahead(), [], []
    for page in range(200):
        if page in there:
            pages = readahead.on_access(10_000, page, there.__contains__)
        else:
            faults.append(page)
            pages = readahead.on_fault(0, 10_000, page, there.__contains__)
        there.update([page, *pages])
        if pages:
            windows.append(len(pages))
    assert faults == [0]
    assert windows[:5] == [3, 8, 16, 32, 32]


def test_readahead_reads_one_page_where_access_is_random() -> None:
    readahead = LinuxReadahead()
    assert [list(readahead.on_fault(0, 1000, page, {0}.__contains__)) for page in (500, 20, 300, 7)] == [[]] * 4


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.slow
def test_our_density_tree_is_the_published_rule(name: str) -> None:
    trace = TRACES[name](3000, 2048)
    ours, theirs = (replay(make(), trace, 700) for make in (DensityTree, PublishedDensityRule))
    assert (ours.nr_issued, ours.nr_used, ours.nr_missed) == (theirs.nr_issued, theirs.nr_used, theirs.nr_missed)


@pytest.mark.slow
def test_faults_take_time_everywhere(tmp_path: Path) -> None:
    samples, modelled_ns = tier_faults("hdd", tmp_path, 5)
    assert modelled_ns == 8_500_000 + 4_166_667 + 52_512
    assert min(samples) > 4_000_000
    assert min(mmap_faults(tmp_path, 20)) > 0
