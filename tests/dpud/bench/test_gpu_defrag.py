# SPDX-License-Identifier: GPL-2.0-only
"""The benchmark of defragmentation: its loads, its peers, its exact search, on small sizes."""

import pytest

from dpud.bench.gpu.defrag import small_case
from dpud.bench.gpu.defrag_load import KIB, MIB, Event, peak_bytes, random_mix, read_log, serving, training, write_log
from dpud.bench.gpu.defrag_peers import BestFit, Buddy, FirstFit, Moving, replay
from dpud.bench.gpu.min_moves import least_moved

LOG = """Thread,Time,Action,Pointer,Size,Stream
140202946934592,16:05:59:420423,allocate,0x7f1d3c000000,1000,0x0
140202946934592,16:05:59:420577,allocate failure,0x0,4096,0x0
140202946934592,16:05:59:420577,allocate,0x7f1d3c000400,4096,0x1
140202946934592,16:05:59:421222,free,0x7f1d3c000000,1000,0x0
"""


def test_an_rmm_log_is_read() -> None:
    """As rmm's logging_resource_adaptor writes it, with an action that is none of ours."""
    assert read_log(LOG.splitlines()) == [Event(True, 0, 1000), Event(True, 2, 4096), Event(False, 0, 1000)]
    assert peak_bytes(read_log(LOG.splitlines())) == 1024 + 4096
    with pytest.raises(ValueError, match="no RMM log"):
        read_log(["a,b", "1,2"])


@pytest.mark.slow
@pytest.mark.parametrize("made", [training, serving])
def test_what_is_written_is_read_again(made: object) -> None:
    events = list(made(3))  # type: ignore[operator]
    again = read_log(write_log(events).splitlines())
    assert [(e.is_alloc, e.nr_bytes) for e in again] == [(e.is_alloc, e.nr_bytes) for e in events]
    names = {one.name: other.name for one, other in zip(events, again, strict=True)}
    assert [names[e.name] for e in events] == [e.name for e in again]


def test_the_mix_is_that_of_the_notes() -> None:
    """20,000 events, about 10,239 of them requests, 85 % full; made smaller here."""
    events = random_mix(0, 4000, 16 * MIB, 256 * KIB)
    nr = sum(event.is_alloc for event in events)
    assert 2000 < nr < 2600
    assert 0.85 * 16 * MIB <= peak_bytes(events) < 0.9 * 16 * MIB


@pytest.mark.slow
def test_nothing_fails_that_could_be_had_but_with_those_that_move_nothing() -> None:
    """At the edge: as much memory as is live at the peak."""
    events = random_mix(0, 3000, 16 * MIB, MIB)
    capacity = peak_bytes(events)
    ours = Moving(capacity)
    assert (found := replay(events, ours, capacity)).owed == found.failures == 0
    assert 0 < ours.moved_bytes < found.asked_bytes
    assert ours.heap.check() == []
    for peer in (BestFit(capacity), FirstFit(capacity), Buddy(capacity)):
        assert replay(events, peer, capacity).owed > 0


def test_buddy_gives_powers_of_two_and_merges() -> None:
    buddy = Buddy(64 * KIB)
    held = [buddy.take(5000) for _ in range(8)]
    assert None not in held
    assert buddy.take(1) is None
    for page in held:
        assert page is not None
        buddy.give(page)
    assert buddy.holes == [64 * KIB]


def test_the_exact_search_on_cases_done_by_hand() -> None:
    assert least_moved((0, 4), (2, 2), (False, False), 8, 4) == 2
    assert least_moved((0, 4), (2, 2), (True, True), 8, 4) is None
    assert least_moved((1, 4), (1, 1), (False, False), 6, 4) == 1
    assert least_moved((10, 3, 5), (1, 2, 5), (False, False, False), 12, 4) == 3


@pytest.mark.slow
def test_small_cases_are_within_twice_the_least() -> None:
    pairs = [pair for seed in range(120) if (pair := small_case(seed)) is not None]
    assert len(pairs) > 10
    for ours, exact in pairs:
        assert (ours is None) == (exact is None)
        assert ours is None or exact is None or ours <= 2 * exact
