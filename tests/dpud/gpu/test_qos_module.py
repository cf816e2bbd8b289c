# SPDX-License-Identifier: GPL-2.0-only
"""QoS on the data path: who waits, who owes, who is counted; the log, replayed."""

import errno
from itertools import pairwise

import numpy as np
import pytest
from small import KIB, MIB, DictSwap, errno_of, small_memory

from dpud.gpu.address_space.permissions import READ
from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.memory import GpuMemory
from dpud.gpu.qos import QosModule
from dpud.gpu.qos.decisions import DecisionLog, scheduler_of, state_of
from dpud.gpu.qos.replay import replay
from dpud.gpu.qos.scheduler import Scheduler
from dpud.gpu.store import HostPool
from dpud.gpu.traffic import Cause

NS_PER_S = 1_000_000_000


def paced(*device_bytes: int, swap_bytes: int = 0) -> tuple[GpuMemory, QosModule]:
    memory = small_memory(*device_bytes, swap=DictSwap(swap_bytes))
    qos = QosModule(memory.clock)
    qos.attach(memory)
    return memory, qos


def test_an_access_waits_for_its_grant_on_the_path_s_clock() -> None:
    memory, qos = paced(4 * MIB)
    va = memory.allocate("a", 2 * MIB)
    qos.set_client("a", limit=MIB, burst=64 * KIB)
    memory.write("a", va, bytes(2 * MIB))
    assert memory.clock.now_ns() == pytest.approx(1.75 * NS_PER_S, rel=0.01)  # in spans of 256 KiB
    memory.read("a", va, 64 * KIB)
    assert memory.clock.now_ns() == pytest.approx(2 * NS_PER_S, rel=0.1)
    assert violations(memory) == []


def test_who_reads_another_s_memory_pays() -> None:
    memory, qos = paced(4 * MIB)
    va = memory.allocate("owner", MIB)
    memory.write("owner", va, bytes(MIB))
    memory.protect("owner", va, MIB, READ, of="guest")
    qos.set_client("owner", limit=1, burst=1)
    memory.read("guest", va, MIB)
    assert memory.clock.now_ns() < NS_PER_S


def test_nobody_waits_for_the_limit_of_whose_pages_make_room() -> None:
    """`a` needs room that `b`'s pages take; `b` owes what its eviction moved, and waits for it later."""
    memory, qos = paced(MIB, swap_bytes=8 * MIB)
    first = memory.allocate("b", 512 * KIB)
    memory.write("b", first, np.random.default_rng(1).bytes(512 * KIB))
    qos.set_client("b", limit=100 * KIB, burst=4 * KIB)
    second = memory.allocate("a", MIB)
    memory.write("a", second, np.random.default_rng(2).bytes(MIB))
    assert memory.clock.now_ns() < NS_PER_S // 10
    assert qos.nr_bytes["b", Cause.SWAP] == 512 * KIB
    memory.read("b", first, 4 * KIB)
    assert memory.clock.now_ns() == pytest.approx(5.12 * NS_PER_S, rel=0.02)


@pytest.mark.slow
def test_what_moves_on_to_swap_is_owed_and_the_log_says_so() -> None:
    memory = small_memory(MIB, pool=HostPool(MIB), swap=DictSwap(8 * MIB))
    qos = QosModule(memory.clock)
    qos.attach(memory)
    va = memory.allocate("b", 512 * KIB)
    memory.write("b", va, np.random.default_rng(1).bytes(512 * KIB))
    memory.evict(MIB)
    qos.set_client("b", limit=100 * KIB, burst=4 * KIB)
    before_ns = memory.clock.now_ns()
    assert memory.store.demote(MIB) == 128
    assert memory.clock.now_ns() == before_ns
    assert qos.nr_bytes["b", Cause.DEMOTION] == 512 * KIB
    memory.read("b", va, 4 * KIB)
    assert memory.clock.now_ns() - before_ns == pytest.approx(5.12 * NS_PER_S, rel=0.02)
    assert f"owe {before_ns} b demotion {512 * KIB}\n" in qos.decisions.text()
    again = replay(qos.decisions.text())
    assert (again.difference, again.nr_grants) == ("", 1)


@pytest.mark.slow
def test_every_cause_counts_against_the_total() -> None:
    """What the scheduler was told is what moved: granted, and owed."""
    memory, qos = paced(MIB, swap_bytes=8 * MIB)
    qos.set_total(100 * MIB)
    va = memory.allocate("a", 2 * MIB)
    memory.write("a", va, np.random.default_rng(1).bytes(2 * MIB))
    memory.read("a", va, 2 * MIB)
    causes = {cause: nr for (_, cause), nr in qos.nr_bytes.items()}
    assert causes[Cause.ACCESS] == 4 * MIB
    assert causes[Cause.SWAP] > 2 * MIB
    owed = sum(stat.counts["owed_bytes"] for stat in qos.scheduler.stats)
    assert qos.scheduler.granted_bytes.total() == causes[Cause.ACCESS]
    assert owed == causes[Cause.SWAP]
    assert memory.clock.now_ns() >= (sum(causes.values()) - 4 * MIB) * NS_PER_S // (100 * MIB)


def test_without_promises_nothing_is_scheduled() -> None:
    memory, qos = paced(MIB)
    va = memory.allocate("a", 64 * KIB)
    memory.write("a", va, bytes(64 * KIB))
    assert qos.nr_bytes["a", Cause.ACCESS] == 64 * KIB
    assert qos.decisions.text() == ""


def test_queued_requests_run_in_the_scheduler_s_order() -> None:
    memory, qos = paced(4 * MIB)
    va = memory.allocate("owner", MIB)
    memory.write("owner", va, bytes(MIB))
    qos.set_total(MIB, burst=64 * KIB)
    qos.set_policy("priority")
    done = []
    for name, level in (("batch", 4), ("web", 1), ("urgent", 0)):

        def work(name: str = name) -> None:
            memory.read("owner", va, 64 * KIB)
            done.append((name, memory.clock.now_ns()))

        qos.submit(name, level, 64 * KIB, work)
    assert qos.run() == 3
    assert [name for name, _ in done] == ["urgent", "web", "batch"]
    assert done[2][1] - done[1][1] == pytest.approx(NS_PER_S / 16, rel=0.01)
    assert {name: qos.nr_bytes[name, Cause.ACCESS] for name, _ in done} == dict.fromkeys(
        ("urgent", "web", "batch"), 64 * KIB
    )
    assert errno_of(qos.submit, "a", 5, 1, lambda: None) == errno.EINVAL


def test_with_another_memory_promises_stay_and_debts_go() -> None:
    first, qos = paced(MIB)
    qos.set_client("a", limit=MIB, burst=4 * KIB)
    va = first.allocate("a", MIB)
    first.write("a", va, bytes(MIB))
    second = small_memory(MIB)
    qos.attach(second)
    va = second.allocate("a", 4 * KIB)
    second.write("a", va, bytes(4 * KIB))
    assert second.clock.now_ns() < NS_PER_S // 10
    assert qos.scheduler.promise("a")["limit"] == MIB


# The decision log.


def busy(log: DecisionLog, seed: int) -> Scheduler:
    """A scheduler that had everything happen to it."""
    rng = np.random.default_rng(seed)
    made, now_ns, requests = Scheduler(log), 0, []
    made.set_total(100 * MIB, MIB, 0)
    made.set_policy("adaptive", 0)
    made.set_level(0, 0, 0, 1_000_000, 0)
    for step in range(3000):
        now_ns += int(rng.integers(0, 2_000_000))
        name = f"client {rng.integers(4)}"
        action = rng.integers(40)
        if action == 0:
            made.set_client(name, now_ns, limit=int(rng.integers(0, 3)) * 20 * MIB, share=int(rng.integers(1, 500)))
        elif action == 1:
            made.set_policy(("fair", "priority", "adaptive")[step % 3], now_ns)
        elif action == 2:
            made.owe(name, Cause.SWAP, int(rng.integers(1, MIB)), now_ns)
        elif action == 3:
            made.forget(name, now_ns)
        elif action == 4:
            made.set_client(name, now_ns, reservation=int(rng.integers(0, 20 * MIB)), limit=0)
        elif action == 5 and (alive := [request for request in requests if not request.is_over]):
            made.cancel(alive[0], now_ns)
            requests.remove(alive[0])
        elif action < 23:
            size, level = int(rng.integers(1, 256 * KIB)), int(rng.integers(5))
            requests.append(made.submit(name, Cause.ACCESS, size, now_ns, level))
        else:
            while made.grant(now_ns) is not None:
                pass
    return made


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_log_replays_to_the_same_decisions(seed: int) -> None:
    log = DecisionLog()
    made = busy(log, seed)
    again = replay(log.text())
    assert again.difference == ""
    assert again.nr_grants == sum(made.counts[name] for name in ("by_constraint", "by_weight")) > 500


@pytest.mark.slow
def test_a_log_that_has_forgotten_its_beginning_replays_too() -> None:
    log = DecisionLog(half_lines=200)
    busy(log, 5)
    text = log.text()
    assert text.count("\nstate ") == 1
    assert text.startswith("state ")
    assert len(text.splitlines()) < 420 < log.nr_records
    assert replay(text).difference == ""


def test_a_cleared_log_begins_with_a_state() -> None:
    log = DecisionLog()
    made = Scheduler(log)
    made.submit("a", Cause.ACCESS, 1, 0)
    log.clear()
    assert made.grant(0) is not None
    made.submit("a", Cause.ACCESS, 1, 0)
    assert made.grant(0) is not None
    assert replay(log.text()).nr_grants == 1


def test_work_of_a_client_that_is_gone_is_not_done() -> None:
    memory, qos = paced(MIB)
    done: list[str] = []
    qos.set_total(MIB)
    memory.client("a")
    for name in "ab":
        qos.submit(name, 0, 4 * KIB, lambda name=name: done.append(name))
    memory.remove_client("a")
    assert qos.run() == 1
    assert done == ["b"]


@pytest.mark.slow
def test_a_log_that_was_tampered_with_does_not() -> None:
    log = DecisionLog()
    busy(log, 1)
    lines = log.text().splitlines()
    grants = [number for number, line in enumerate(lines) if line.startswith("grant ")]
    at = next(a for a, b in pairwise(grants) if b == a + 1)
    lines[at], lines[at + 1] = lines[at + 1], lines[at]
    assert f"line {at + 1}: at " in replay("\n".join(lines)).difference
    with pytest.raises(ValueError, match="no record"):
        replay("grant 0 0 W")
    with pytest.raises(ValueError, match="line 2 is no record"):
        replay(lines[0] + "\nsubmit 0 a")


@pytest.mark.slow
def test_a_state_has_all_that_decisions_depend_on() -> None:
    made = busy(DecisionLog(), 2)
    again = scheduler_of(state_of(made))
    assert state_of(again) == state_of(made)
    clock = ManualClock(1 << 40)
    for _ in range(20):
        one, other = made.grant(clock.now_ns()), again.grant(clock.now_ns())
        assert (one and one.number) == (other and other.number)
        clock.advance(10_000_000)
