# SPDX-License-Identifier: GPL-2.0-only
"""When kcompactd wakes up, what it does then, and when it looks again: on a clock that stands unless told."""

from collections.abc import Iterator

import pytest
from machines import VM, Lab, advance

from kernelsim.mm_types import LongOp

MS = 1_000_000
HALF_SECOND = 500 * MS


def fragmented(nr_ranks: int | None = 1, reader: str = "0") -> Lab:
    """64 MiB, every free page of it in a piece below 2 MiB: a score of nearly 100. `reader`: so much page cache."""
    lab = Lab((64,), nr_ranks=nr_ranks)
    lab.spawn("reader", file=reader)
    lab.spawn("a", anon="56M" if reader == "0" else "46M", holes="50 seed=1")
    lab.alloc(lab.allocator("drain", order="9", gfp="GFP_TRANSHUGE_LIGHT", count="100"))
    at(lab, 0)  # the process woke kswapd, and the timers are set
    return lab


def at(lab: Lab, ns: int) -> None:
    """Let the timers run at a time."""
    clock = lab.machine.clock
    clock.advance(ns - clock.now_ns())  # type: ignore[attr-defined]
    lab.machine.step(ns)
    lab.machine.peek()


def score(lab: Lab) -> int:
    return lab.machine.compaction.fragmentation_score_node(0)


def daemon(lab: Lab) -> tuple[int, int]:
    counted = lab.vmstat()
    return counted["compact_daemon_wake"], counted["compact_daemon_migrate_scanned"]


# On its own initiative.


@pytest.mark.slow
@pytest.mark.parametrize("nr_ranks", [None, 1])
def test_an_idle_fragmented_node_is_compacted_after_half_a_second(nr_ranks: int | None) -> None:
    lab = fragmented(nr_ranks=nr_ranks)
    assert score(lab) > 90
    assert lab.machine.peek() == HALF_SECOND
    at(lab, HALF_SECOND - 1)
    assert score(lab) > 90
    at(lab, HALF_SECOND)
    assert score(lab) <= 80 or lab.vmstat()["compact_daemon_migrate_scanned"] > 0
    assert score(lab) < 90
    assert daemon(lab)[0] == 0  # proactive runs are no wake-ups
    assert (lab.stats()["pages_moved"] > 0) == (nr_ranks == 1)
    lab.assert_at_rest()


def test_a_node_below_the_mark_is_left_alone() -> None:
    lab = Lab((64,))
    lab.spawn("a", anon="8M", holes="50 seed=1")
    assert score(lab) <= 90
    moved = lab.vmstat()["pgmigrate_success"]
    for number in range(1, 5):
        assert lab.machine.peek() == number * HALF_SECOND
        at(lab, number * HALF_SECOND)
    assert lab.vmstat()["pgmigrate_success"] == moved


def test_without_a_gain_the_next_look_is_32_seconds_later() -> None:
    lab = fragmented(nr_ranks=None)
    lab.set("a", pin="100")
    at(lab, HALF_SECOND)
    assert lab.machine.peek() == HALF_SECOND + (HALF_SECOND << 6)


def test_proactiveness_0_turns_it_off_and_a_write_looks_at_once() -> None:
    lab = fragmented(nr_ranks=None)
    lab.sysctl(compaction_proactiveness=0)
    assert lab.machine.peek() is None
    at(lab, 60 * HALF_SECOND)
    assert daemon(lab) == (0, 0)
    lab.sysctl(compaction_proactiveness=20)
    assert lab.machine.peek() == 60 * HALF_SECOND
    at(lab, 60 * HALF_SECOND)
    assert daemon(lab)[1] > 0


def test_kswapd_at_work_keeps_it_quiet() -> None:
    lab = fragmented(nr_ranks=None)
    lab.machine.kswapds[0].running = True
    at(lab, HALF_SECOND)
    assert daemon(lab) == (0, 0)
    lab.machine.kswapds[0].running = False
    at(lab, 2 * HALF_SECOND)
    assert daemon(lab)[1] > 0


# Woken up.


@pytest.mark.slow
def test_a_request_that_may_not_compact_leaves_it_to_the_thread() -> None:
    """GFP_ATOMIC fails now; kswapd makes room, kcompactd makes blocks of it, and the next request gets one."""
    lab = fragmented(nr_ranks=None, reader="8M")
    lab.sysctl(compaction_proactiveness=0)
    path = lab.allocator("x", order="9", gfp="GFP_ATOMIC|__GFP_NOWARN")
    for _ in range(10):  # at first every page of the file counts as used
        assert lab.alloc(path)["allocated"] == 0
        at(lab, 0)
        if daemon(lab)[0]:
            break
    assert lab.machine.peek() is None
    assert lab.vmstat()["pgsteal_kswapd"] > 0
    assert daemon(lab)[0] == 1
    assert daemon(lab)[1] > 0
    assert lab.alloc(path)["allocated"] == 1
    lab.assert_at_rest()


@pytest.mark.slow
def test_the_dpu_is_asked_first() -> None:
    lab = fragmented()
    lab.sysctl(compaction_proactiveness=0)
    lab.machine.kcompactds[0].wakeup_kcompactd(9, 3)
    at(lab, 0)
    assert daemon(lab) == (1, 0)
    assert lab.stats()["pages_moved"] > 0
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize(("order", "woken"), [(0, False), (4, False), (9, True)])
def test_wakeup_needs_an_order_and_a_suitable_zone(order: int, woken: bool) -> None:
    """Order 4: blocks of 64 KiB abound, so the fragmentation index speaks against it."""
    lab = Lab((64,), nr_ranks=None)
    lab.spawn("a", anon="56M", holes="50 runs")
    lab.alloc(lab.allocator("drain", order="9", gfp="GFP_TRANSHUGE_LIGHT", count="100"))
    lab.sysctl(compaction_proactiveness=0)
    lab.machine.kcompactds[0].wakeup_kcompactd(order, 3)
    suitable = any(lab.machine.compaction.compaction_suitable(zone, order, 3) for zone in range(2)) and order > 0
    assert (lab.machine.peek() is not None) == suitable
    if order in (0, 9):
        assert suitable == woken


def test_a_wakeup_during_a_round_is_not_lost() -> None:
    lab = fragmented(nr_ranks=None)
    lab.sysctl(compaction_proactiveness=0)
    rounds: list[LongOp] = []
    lab.machine.kthreads.spawn = lambda operation, _name: rounds.append(operation)
    kcompactd = lab.machine.kcompactds[0]
    kcompactd.wakeup_kcompactd(9, 3)
    at(lab, 0)
    kcompactd.wakeup_kcompactd(9, 3)
    assert lab.machine.peek() is None  # it is running
    run_to_end(rounds[0])
    assert lab.machine.peek() == 0


def test_an_interrupted_round_leaves_all_in_order() -> None:
    lab = fragmented()
    rounds: list[LongOp] = []
    lab.machine.kthreads.spawn = lambda operation, _name: rounds.append(operation)
    at(lab, 0)
    at(lab, HALF_SECOND)
    advance(rounds[0])
    rounds[0].close()
    assert not lab.machine.kcompactds[0].running
    lab.assert_at_rest()


def run_to_end(operation: LongOp) -> None:
    steps: Iterator[bool] = (advance(operation)[0] for _ in range(100_000))
    assert any(steps)


@pytest.mark.slow
def test_files_can_be_read_during_a_round() -> None:
    """The thread and a person with compact_memory take turns; reading does not wait for either."""
    lab = fragmented()
    rounds: list[LongOp] = []
    lab.machine.kthreads.spawn = lambda operation, _name: rounds.append(operation)
    at(lab, 0)
    at(lab, HALF_SECOND)
    by_hand = lab.start(f"{VM}/compact_memory", "1")
    running: list[LongOp] = [rounds[0], by_hand]  # type: ignore[list-item]
    while running:
        running = [operation for operation in running if not advance(operation)[0]]
        assert lab.read("/proc/buddyinfo")
        assert lab.machine.check() == []
    lab.assert_at_rest()
