# SPDX-License-Identifier: GPL-2.0-only
"""QoS: what two real processes get, beside Linux's own limiters; and, in simulated time, that promises are kept.

What is simulated is exact and the same on every machine; only the first table depends on how busy this one is.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from time import process_time_ns

import numpy as np

from dpud.bench import host
from dpud.bench.gpu import qos_peers
from dpud.bench.gpu.qos_load import NS_PER_S, Fifo, Grant, Load, Simulation, excess, jain, rate_of, shortfall
from dpud.bench.report import Figure, Line, Report, percentile
from dpud.gpu.qos.scheduler import Scheduler

MB, KIB, MIB = 1_000_000, 1 << 10, 1 << 20
RATES_MBPS = (10, 50, 200, 1000)
SECONDS = 6.0
ERROR_TARGET_PERCENT = 1.0
_DISK_MBPS = 200
"""blkio.throttle is only measured up to what disks can do."""
_NR_MIXES = 40
_MIX_NS = NS_PER_S // 20
_TOTAL = 1000 * MB


def run() -> Report:
    report = Report(
        "gpu qos",
        "two copying processes that share a rate",
        f"Error of what both got together in {SECONDS:.0f} s, in percent; bursts are 50 ms. dpud: each asks its "
        "client's qos_charge for a batch of 5 ms, then copies it. tbf: two TCP streams over veth, Ethernet headers "
        "added; blkio.throttle: two writers with O_DIRECT; own buckets: each process has one, and sleeps for what is "
        "missing.",
        headings=("MB/s", "1. dpud", "2. tc tbf", "3. blkio.throttle", "4. own buckets", "Verdict"),
    )
    with host.daemon() as mount:
        report.figures = [_rates(lambda rate, s: qos_peers.dpud(mount, rate, s), mbps) for mbps in RATES_MBPS]
    report.notes.append(f"met: dpud's error is at most {ERROR_TARGET_PERCENT:.0f} %; -: there is no such peer here")
    report.parts = [promises(), latency()]
    return report


def _rates(ours: Callable[[int, float], list[float]], mbps: int) -> Line:
    rate = mbps * MB
    found = [ours(rate, SECONDS), qos_peers.tbf(rate, SECONDS)]
    found += [qos_peers.blkio(rate, SECONDS) if mbps <= _DISK_MBPS else None, qos_peers.naive(rate, SECONDS)]
    errors = [None if rates is None else 100 * (sum(rates) / rate - 1) for rates in found]
    verdict = "met" if errors[0] is not None and abs(errors[0]) <= ERROR_TARGET_PERCENT else "missed"
    return Line((str(mbps), *("-" if each is None else f"{each:+.2f} %" for each in errors), verdict), verdict)


# Promises, in simulated time.


def promises() -> Report:
    """Random mixes of clients under every policy."""
    results = list(_mixes())
    even = Simulation(_scheduler("fair"), [Load(str(n), 64 * KIB, outstanding=4) for n in range(8)])
    begin_ns = process_time_ns()
    grants = even.run(NS_PER_S // 4)
    cost_us = (process_time_ns() - begin_ns) / len(grants) / 1000
    rates = [rate_of(grants, str(number), 0, NS_PER_S // 4) for number in range(8)]
    report = Report(
        "gpu qos",
        "promises kept",
        f"{_NR_MIXES} random mixes of 2 to 4 clients with reservations (90 % of the total at most), limits, shares, "
        "levels and request sizes, in simulated time. A limit may be exceeded by its burst or one request, a "
        "reservation missed by two of the largest requests and two of its own.",
    )
    report.figures = [
        Figure("limits exceeded beyond the burst, in any window", sum(over for over, _ in results), "clients", 0),
        Figure("reservations not kept, in any window", sum(under for _, under in results), "clients", 0),
        Figure("Jain's index of 8 equal clients", jain(rates), "", 0.999, more=True),
        Figure("CPU of a grant, 8 clients, the simulation included", cost_us, "us"),
    ]
    return report


def _scheduler(policy: str) -> Scheduler:
    made = Scheduler()
    made.set_total(_TOTAL, MIB, 0)
    made.set_policy(policy, 0)
    return made


def _mixes() -> Iterator[tuple[int, int]]:
    """(limits exceeded, reservations not kept) in each."""
    for seed in range(_NR_MIXES):
        rng = np.random.default_rng([7, seed])
        made = _scheduler(("fair", "priority", "adaptive")[seed % 3])
        made.set_level(0, 0, 0, 1_000_000, 0)
        loads = [_client(made, str(number), rng) for number in range(int(rng.integers(2, 5)))]
        yield _judged(made, loads, Simulation(made, loads, seed).run(_MIX_NS))


def _client(made: Scheduler, name: str, rng: np.random.Generator) -> Load:
    left = _TOTAL * 9 // 10 - made.reserved
    reservation = int(rng.integers(1, left // 2)) if rng.random() < 0.6 else 0
    limit = int(rng.integers(max(reservation, 50 * MB), 2 * _TOTAL)) if rng.random() < 0.5 else 0
    share, level = int(rng.integers(1, 1000)), int(rng.integers(5))
    made.set_client(name, 0, reservation=reservation, limit=limit, burst=MIB, share=share, level=level)
    return Load(name, int(rng.integers(16 * KIB, 512 * KIB)), outstanding=2)


def _judged(made: Scheduler, loads: list[Load], grants: list[Grant]) -> tuple[int, int]:
    over = under = 0
    largest = max(load.request_bytes for load in loads)
    for load in loads:
        own = [each for each in grants if each.client == load.client]
        promise = made.promise(load.client)
        over += bool(promise["limit"]) and excess(own, promise["limit"]) > MIB + 1
        allowed = 2 * largest + 2 * load.request_bytes
        under += bool(promise["reservation"]) and shortfall(own, promise["reservation"], _MIX_NS) > allowed
    return over, under


# Waiting, in simulated time.

TARGET_US = 4000
_SERVICE = Load("service", 64 * KIB, rate=100 * MB, level=0)
_BATCH = Load("batch", MIB, outstanding=16, level=4)


def latency() -> Report:
    """Level 0 beside best-effort clients that want everything."""
    fifo = p99_us(Simulation(Fifo(_TOTAL), [_SERVICE, _BATCH]).run(2 * NS_PER_S))
    first = _scheduler("priority")
    priority = p99_us(Simulation(first, [_SERVICE, _BATCH]).run(2 * NS_PER_S))
    grants, caps = controlled()
    report = Report(
        "gpu qos",
        "how long priority 0 waits",
        "p99 from request to grant of a service that asks for 100 MB/s of 1000 in 64 KiB, at random, beside a client "
        "that always has 16 requests of 1 MiB. Adaptive: a service that asks for half of 100 MB/s, beside four greedy "
        "clients that begin at 1 s, with a target of 4 ms.",
    )
    last = max([when_ns for when_ns, cap in caps if when_ns < 5 * NS_PER_S and cap], default=0)
    report.figures = [
        Figure("p99, policy priority", priority, "us", fifo, "FIFO"),
        Figure("p99, adaptive, from 2 s after the greedy ones began", p99_us(grants, 3 * NS_PER_S), "us", TARGET_US),
        Figure("adaptive: settled after", (last - NS_PER_S) / NS_PER_S, "s", 2.0),
        Figure("adaptive: changes of direction in 10 s", turns(caps), "", 3),
    ]
    return report


def p99_us(grants: list[Grant], begin_ns: int = 0) -> float:
    waits = (each.granted_ns - each.submit_ns for each in grants if each.client == "service")
    late = (each.submit_ns >= begin_ns for each in grants if each.client == "service")
    return percentile((wait / 1000 for wait, counts in zip(waits, late, strict=True) if counts), 99)


def controlled() -> tuple[list[Grant], list[tuple[int, int]]]:
    """Grants, and the cap whenever it changed: (ns, bytes/s)."""
    made = Scheduler()
    made.set_total(100 * MB, MIB, 0)
    made.set_policy("adaptive", 0)
    made.set_level(0, 0, 0, TARGET_US * 1000, 0)
    loads = [Load("service", 32 * KIB, rate=50 * MB, level=0)]
    loads += [Load(f"batch{number}", 32 * KIB, outstanding=4, begin_ns=NS_PER_S) for number in range(4)]
    caps = [(0, 0)]

    def watch(now_ns: int) -> None:
        if (cap := made.levels[0].guard.cap.rate) != caps[-1][1]:
            caps.append((now_ns, cap))

    return Simulation(made, loads, seed=4, on_time=watch).run(11 * NS_PER_S), caps


def turns(caps: list[tuple[int, int]]) -> int:
    """How often a rising cap fell, or a falling one rose."""
    rises = [after > before for (_, before), (_, after) in pairwise(caps[1:])]
    return sum(one != other for one, other in pairwise(rises))
