# SPDX-License-Identifier: GPL-2.0-only
"""The benchmark of QoS: its arithmetic, its FIFO, its worker; what it measures decides nothing here."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpud.bench.gpu import qos, qos_peers
from dpud.bench.gpu.qos_load import NS_PER_S, Fifo, Grant, Load, Simulation, excess, jain, rate_of, shortfall

MB = 1_000_000
WORKER = Path(qos_peers.__file__).with_name("qos_worker.py")


def grants(*at_ms: float, nr_bytes: int = MB) -> list[Grant]:
    return [Grant("a", nr_bytes, 0, round(ms * 1e6)) for ms in at_ms]


def test_excess_is_what_a_bucket_would_have_to_hold() -> None:
    assert excess(grants(0, 1000, 2000), MB) == MB
    assert excess(grants(0, 0, 1000), MB) == 2 * MB
    assert excess(grants(0, 500, 5000, 5250), MB) == 1.75 * MB
    assert excess([], MB) == 0


def test_shortfall_is_what_was_missing_at_worst() -> None:
    assert shortfall(grants(1000, 2000), MB, 3 * NS_PER_S) == MB
    assert shortfall(grants(0, 3000), MB, 3 * NS_PER_S) == 3 * MB
    assert shortfall(grants(0, 0, 0, 0, 2000), MB, 2 * NS_PER_S) == 2 * MB  # what came before is no excuse later


def test_jain() -> None:
    """Jain, Chiu, Hawe: k of n users served equally give k/n."""
    assert jain([5.0] * 4) == 1
    assert jain([1.0, 1.0, 0.0, 0.0]) == pytest.approx(0.5)


def test_fifo_makes_everybody_wait_for_those_before() -> None:
    loads = [Load(name, size, outstanding=1, end_ns=0) for name, size in (("first", 10 * MB), ("second", MB))]
    found = Simulation(Fifo(10 * MB), loads).run(3 * NS_PER_S)
    assert [(each.client, each.granted_ns) for each in found] == [("first", 0), ("second", NS_PER_S)]
    assert rate_of(found, "first", 0, NS_PER_S) == 10 * MB


def test_open_loads_come_at_their_rate() -> None:
    found = Simulation(Fifo(1000 * MB), [Load("a", 10_000, rate=10 * MB)]).run(2 * NS_PER_S)
    assert rate_of(found, "a", 0, 2 * NS_PER_S) == pytest.approx(10 * MB, rel=0.05)


def test_changes_of_direction() -> None:
    assert qos.turns([(0, 0), (1, 50), (2, 40), (3, 45), (4, 46)]) == 1
    assert qos.turns([(0, 0), (1, 50), (2, 60), (3, 40), (4, 60)]) == 2


def test_batches_are_whole_blocks() -> None:
    assert [qos_peers.batch_of(mbps * MB) for mbps in (1, 200, 10_000)] == [65536, 499_712, 4 << 20]


@pytest.mark.slow
def test_the_worker_copies_at_the_rate_that_it_is_let() -> None:
    """A naive bucket of 1 MB/s: no more than that, whatever the machine does."""
    command = [sys.executable, "-P", str(WORKER), "naive", "0.5", "65536", "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert 0 < float(done.stdout) < 1.2e6


@pytest.mark.mount
@pytest.mark.slow
def test_two_processes_get_no_more_than_their_total() -> None:
    from dpud.bench import host

    with host.daemon() as mount:
        rates = qos_peers.dpud(mount, 20 * MB, 1.5)
    assert 0 < sum(rates) < 22 * MB
