# SPDX-License-Identifier: GPL-2.0-only
"""What is brought in besides what was missing, how well that is counted, and what thrashes."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MIB, small_memory

from dpud.gpu.clock import ManualClock
from dpud.gpu.residency import Residency
from dpud.gpu.swap.accuracy import PrefetchAccuracy
from dpud.gpu.swap.gate import Gate
from dpud.gpu.swap.module import SwapModule
from dpud.gpu.swap.prefetch import DensityTree, Majority, Prefetcher, Stride, names, new_prefetcher, trend
from dpud.gpu.swap.thrash import ThrashGuard

NR_PAGES = 2048
US = 1000


def run(prefetcher: Prefetcher, trace: Sequence[int], nr_pages: int = NR_PAGES) -> tuple[list[int], PrefetchAccuracy]:
    """Accesses in a memory that never evicts -> pages that somebody had to wait for, and the counts."""
    there: set[int] = set()
    missed, accuracy = [], PrefetchAccuracy()
    for page in trace:
        accuracy.accessed([page])
        if page in there:
            continue
        missed.append(page)
        accuracy.missed([page])
        wanted = prefetcher.on_fault(0, nr_pages, page, there.__contains__)
        assert page not in wanted
        assert not there.intersection(wanted)
        assert all(0 <= each < nr_pages for each in wanted)
        accuracy.prefetched(wanted)
        there.update([page, *wanted])
    return missed, accuracy


def largest_dense(there: set[int], page: int, size: int, nr_pages: int) -> set[int]:
    """The published rule, said another way: of all aligned ranges of 2, 4, ... around the page, the largest that is
    more than 51 % there with it."""
    best = {page}
    while size > 1:
        start = page // size * size
        leaves = set(range(start, min(start + size, nr_pages)))
        if len(leaves & (there | {page})) / len(leaves) > 0.51:
            best = leaves
            break
        size //= 2
    return best - there - {page}


@pytest.mark.slow
@given(st.sets(st.integers(0, 99)), st.integers(0, 99))
@settings(max_examples=examples(100), deadline=None)
def test_the_density_tree_keeps_the_51_percent_rule(there: set[int], page: int) -> None:
    there.discard(page)
    found = DensityTree(block_pages=64).on_fault(0, 100, page, there.__contains__)
    assert set(found) == {each for each in largest_dense(there, page, 64, 100) if each // 64 == page // 64}


def test_a_dense_block_comes_in_whole() -> None:
    """By hand: 0, 1, 2 (3/4), 4 (5/8), 8, 16, 32 (33/64 are 51.6 %); but 65/128 are 50.8 %, so 64 and 65; 131/256 is
    the first that suffices, so 128, 129, 130; and 262/512, so 256, 257, 258 (and 259), 260 (to 263), 264."""
    missed, accuracy = run(DensityTree(), range(512))
    assert missed == [0, 1, 2, 4, 8, 16, 32, 64, 65, 128, 129, 130, 256, 257, 258, 260, 264]
    assert accuracy.accuracy == 1
    assert accuracy.coverage == pytest.approx(495 / 512)


@pytest.mark.parametrize("name", ["stride", "majority"])
@pytest.mark.parametrize("stride", [1, 7, -3])
def test_strides_are_seen(name: str, stride: int) -> None:
    trace = range(0, NR_PAGES, stride) if stride > 0 else range(NR_PAGES - 1, -1, stride)
    missed, accuracy = run(new_prefetcher(name), trace)
    assert accuracy.accuracy > 0.9
    assert accuracy.coverage > (0.8 if name == "majority" else 0.9)
    assert len(missed) < len(trace) / 4


def test_a_majority_is_seen_through_noise() -> None:
    """Every fourth access is somewhere else: the stride detector gives up, Leap's vote does not."""
    trace = [page for step in range(300) for page in ([5 * step] if step % 4 else [5 * step, (step * 389) % 2000])]
    _, by_vote = run(Majority(), trace)
    _, by_stride = run(Stride(), trace)
    assert by_vote.coverage > by_stride.coverage
    assert by_vote.coverage > 0.3


@pytest.mark.parametrize("name", names())
def test_nothing_is_guessed_where_there_is_nothing_to_see(name: str) -> None:
    """Faults at distances that never repeat, each in a block of its own or far apart."""
    trace = [(n * n * 31) % NR_PAGES for n in range(40)]
    _, accuracy = run(new_prefetcher(name), trace)
    assert accuracy.nr_issued <= 4


def test_a_trend_is_more_than_half() -> None:
    """The majority may be in the last quarter of the history only, or in all of it; three faults are no window."""
    assert trend([]) is None
    assert trend([1, 2] * 16) is None
    assert trend([9] * 24 + [3] * 8) == 3
    assert trend([3] * 20 + [1, 2, 4, 5, 6, 7, 8, 9, 1, 2, 4, 5]) == 3
    assert trend([3, 3, 1]) is None
    assert trend([3, 1, 3, 3, 3, 3]) == 3


@pytest.mark.slow
def test_prefetching_stops_where_it_does_not_pay_and_begins_again() -> None:
    """Eight accesses in a dense block each, of 64 pages there and none of the rest ever used; then a sequence."""
    accuracy = PrefetchAccuracy()
    gate = Gate(DensityTree(block_pages=64), accuracy)
    there: set[int] = set()

    def touch(page: int) -> bool:
        accuracy.accessed([page])
        if page in there:
            return False
        accuracy.missed([page])
        wanted = gate.on_fault(0, 1 << 20, page, there.__contains__)
        accuracy.prefetched(wanted)
        there.update([page, *wanted])
        return True

    for block in range(200):
        for page in (0, 1, 2, 4, 8, 16, 32):
            touch(64 * block + page)
    assert accuracy.nr_issued < 200 * 57 / 3
    assert gate.nr_skipped > 300
    begin = 64 * 300
    missed = [page for page in range(begin, begin + 20_000) if touch(page)]
    assert len(missed) < 6000


def test_what_was_brought_in_for_nothing_is_counted() -> None:
    accuracy = PrefetchAccuracy()
    accuracy.missed([1])
    accuracy.prefetched([2, 3, 4, 5])
    accuracy.accessed([2, 2])
    accuracy.missed([3])  # it left before it was used
    assert (accuracy.nr_issued, accuracy.nr_used, accuracy.nr_wasted) == (4, 1, 1)
    assert accuracy.accuracy == 0.25
    assert accuracy.coverage == pytest.approx(1 / 3)


def test_three_faults_within_lapses_are_thrashing() -> None:
    guard = ThrashGuard()
    assert [guard.fault(1, now * 100 * US) for now in range(4)] == ["ok", "ok", "throttle", "throttle"]
    assert guard.fault(2, 0) == "ok"


def test_slow_faults_are_not() -> None:
    guard = ThrashGuard()
    assert {guard.fault(1, now * 501 * US) for now in range(100)} == {"ok"}


def test_ten_throttles_and_it_is_pinned_and_after_four_resets_left_alone() -> None:
    guard = ThrashGuard()
    verdicts = [guard.fault(1, now * US) for now in range(200)]
    first = ["ok"] * 2 + ["throttle"] * 10 + ["pin"]
    assert verdicts[:26] == first * 2
    assert verdicts.count("pin") == 5
    assert set(verdicts[5 * len(first) :]) == {"ok"}
    assert (guard.nr_throttles, guard.nr_pins) == (50, 5)


def test_after_an_epoch_counting_begins_anew() -> None:
    guard = ThrashGuard()
    for now in range(12):
        guard.fault(1, now * US)
    assert guard.fault(1, 1_000_000 * US) == "ok"


def test_a_guard_that_is_off_says_nothing() -> None:
    guard = ThrashGuard()
    guard.enabled = False
    assert {guard.fault(1, now) for now in range(50)} == {"ok"}


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.5, 4])
def test_random_accesses_are_not_slowed_down(share: float) -> None:
    """Through the path, with free memory to prefetch into: hardly more pages come in than without prefetching."""
    came = {}
    for prefetch in ("none", "density"):
        memory, served = reading(prefetch, share, np.random.default_rng(3).integers(0, int(share * 256), 1200).tolist())
        came[prefetch] = served["from_store"] + served["prefetched"]
        assert memory.events["evicted"] > 256
    assert came["density"] <= 1.1 * came["none"]


@pytest.mark.slow
def test_a_sequence_is_prefetched_through_the_path() -> None:
    _, served = reading("density", 4, list(range(1024)))
    assert served["prefetched"] > 4 * served["from_store"]


def reading(prefetch: str, share: float, pages: list[int]) -> tuple[Residency, Mapping[str, int]]:
    """Single reads in a region of `share` times the device, of 256 pages, with background eviction."""
    swap = SwapModule.with_tiers({"memory": 16 * MIB}, ManualClock())
    memory = small_memory(MIB, clock=swap.space.clock, swap=swap.space)
    swap.attach(memory)
    swap.set_prefetch(prefetch)
    swap.guard.enabled = False
    memory.residency.watermarks.low, memory.residency.watermarks.high = 10, 50
    va = memory.allocate("ann", int(share * MIB))
    memory.write("ann", va, bytes(int(share * MIB)))
    memory.space.faults.served.clear()
    for page in pages:
        memory.background(MIB)
        memory.read("ann", va + page * 4096, 1)
    return memory.residency, memory.space.faults.served
