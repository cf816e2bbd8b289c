# SPDX-License-Identifier: GPL-2.0-only
"""The scheduler beside mClock as its paper has it, on simpy (mclock_paper.py)."""

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from mclock_paper import Paper, Vm

from dpud.bench.gpu.qos_load import NS_PER_S, Grant
from dpud.gpu.qos.scheduler import Scheduler
from dpud.gpu.traffic import Cause

SIZE = 1 << 20
CAPACITY = 1000
"""Requests/s; a request is SIZE bytes."""
END_S = 0.5
MANY = round(CAPACITY * END_S) + 1
INFINITE = float("inf")


def ours(vms: list[Vm]) -> list[Grant]:
    """The same clients on the scheduler: buckets that let one request through at a time, as the paper's server does."""
    scheduler = Scheduler()
    scheduler.set_total(CAPACITY * SIZE, SIZE, 0)
    coming = []
    for number, vm in enumerate(vms):
        limit = 0 if vm.limit == INFINITE else round(vm.limit * SIZE)
        promise = {"reservation": round(vm.reservation * SIZE), "limit": limit, "burst": 2 * SIZE}
        scheduler.set_client(str(number), 0, share=round(vm.weight), **promise)
        coming += [(round(when * NS_PER_S), str(number), nr) for when, nr in vm.arrivals]
    coming.sort(key=lambda each: each[0])
    grants, now_ns = [], 0
    while now_ns < END_S * NS_PER_S:
        while coming and coming[0][0] <= now_ns:
            _, name, nr = coming.pop(0)
            for _ in range(nr):
                scheduler.submit(name, Cause.ACCESS, SIZE, now_ns)
        request = scheduler.grant(now_ns)
        if request is not None:
            grants.append(Grant(request.client, request.nr_bytes, request.submit_ns, now_ns))
            continue
        times = [at for at in (scheduler.next_ns(now_ns), coming[0][0] if coming else None) if at is not None]
        now_ns = min(times, default=1 << 62)
    return grants


def served(events: list[tuple[float, int]], nr_vms: int) -> list[list[int]]:
    """[sample][VM]: requests begun by then; a sample every 50 ms."""
    return [
        [sum(1 for when, which in events if which == vm and when < end / 20) for vm in range(nr_vms)]
        for end in range(1, round(END_S * 20) + 1)
    ]


def difference(vms: list[Vm]) -> int:
    """The most requests by which any VM is ahead or behind at any time."""
    mine = [(each.granted_ns / NS_PER_S, int(each.client)) for each in ours(vms)]
    paper = Paper(CAPACITY, vms).run(END_S)
    samples = zip(served(mine, len(vms)), served(paper, len(vms)), strict=True)
    return max(abs(a - b) for one, other in samples for a, b in zip(one, other, strict=True))


def backlogged(reservation: float = 0, limit: float = INFINITE, weight: float = 100, begin: float = 0.0) -> Vm:
    return Vm(reservation, limit, weight, [(begin, MANY)])


@pytest.mark.slow
def test_the_paper_s_own_example() -> None:
    """Figure 3's shape: shares 1:2:3, a limit, a reservation; capacity that suffices for all reservations."""
    vms = [backlogged(250, weight=100), backlogged(limit=300, weight=200), backlogged(weight=300)]
    assert difference(vms) <= 2
    total = [sum(1 for each in ours(vms) if each.client == str(number)) for number in range(3)]
    assert total == pytest.approx([125, 150, 225], rel=0.01)


def test_clients_that_come_later_do_not_catch_up() -> None:
    vms = [backlogged(weight=100), backlogged(weight=100, begin=0.25), backlogged(weight=200, begin=0.125)]
    assert difference(vms) <= 2


@settings(max_examples=examples(15), deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 10), st.booleans(), st.integers(1, 5)), min_size=2, max_size=4)
)
@pytest.mark.slow
def test_random_promises_to_clients_that_always_want_more(promises: list[tuple[int, int, bool, int]]) -> None:
    """Reservations of up to 90 percent together, limits of at least the reservation, weights 1:5."""
    scale = 100 * len(promises)
    vms = [
        backlogged(CAPACITY * 30 * reserved / scale, 450 + 50 * most if is_limited else INFINITE, 100 * weight)
        for reserved, most, is_limited, weight in promises
    ]
    assert difference(vms) <= 3


@settings(max_examples=examples(15), deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 10)), min_size=2, max_size=4), st.integers(0, 300))
@pytest.mark.slow
def test_random_beginnings(clients: list[tuple[int, int]], reserved: int) -> None:
    vms = [backlogged(weight=100 * weight, begin=begin / 25) for weight, begin in clients]
    vms.append(backlogged(reservation=reserved, weight=100))
    assert difference(vms) <= 3
