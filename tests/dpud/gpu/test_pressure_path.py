# SPDX-License-Identifier: GPL-2.0-only
"""Pressure of clients that work, wait and do nothing, against timelines worked out by hand.

The link moves 64 KiB a second and has no latency. So a read of 64 KiB that are in memory runs for one second. One of
64 KiB that were evicted waits a second for them to come in, and runs for another.
"""

import errno
import re

import numpy as np
import pytest
from small import KIB, MIB, DictSwap, errno_of

from dpud.gpu.address_space.permissions import READ_WRITE
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.clock import ManualClock
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.overcommit import Admission
from kernelsim.operation import Operation

S = 1_000_000_000
DATA = np.random.default_rng(5).bytes(64 * KIB)


class Slow:
    """A device of 1 MiB with swap behind it, where bytes take their time."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.admission = Admission(MIB, self.clock)
        self.swap = DictSwap(MIB)
        profile = DeviceProfile("slow", MIB, 64 * KIB, 0, 64 * KIB, 0)
        self.memory = GpuMemory(
            [SimulatedDevice(profile, self.clock)],
            host=SimulatedDevice(profile, self.clock, 1),
            clock=self.clock,
            swap=self.swap,
            admission=self.admission,
            pressure=self.admission.pressure,
        )

    def have(self, client: str) -> int:
        """64 KiB that are on the device."""
        va = self.memory.allocate(client, 64 * KIB)
        self.memory.write(client, va, DATA)
        return va

    def evict(self, va: int) -> None:
        region = self.memory.space.regions.find(va)
        assert region is not None
        self.memory.residency.evict_pages(region, np.arange(region.nr_pages))

    def read(self, client: str, va: int) -> float:
        """Seconds that it took."""
        before = self.clock.now_ns()
        assert self.memory.read(client, va, 64 * KIB) == DATA
        return (self.clock.now_ns() - before) / S

    def ask(self, client: str, timeout_s: int) -> Operation[int]:
        """A request for more than there is, which waits."""
        request = self.memory.allocation(
            client,
            4 * MIB,
            RegionType.DEVICE,
            READ_WRITE,
            page_size=4096,
            priority=0,
            device=None,
            timeout_ns=timeout_s * S,
        )
        next(request)
        return request

    def seconds(self, client: str) -> tuple[float, float]:
        """(some, full), ever."""
        text = self.admission.pressure(client).text(self.clock.now_ns())
        some, full = (int(total) / 1e6 for total in re.findall(r"total=(\d+)", text))
        return some, full


@pytest.fixture
def slow() -> Slow:
    return Slow()


def test_work_is_no_pressure(slow: Slow) -> None:
    va = slow.have("ann")
    assert slow.read("ann", va) == 1
    slow.clock.advance(3 * S)
    assert slow.seconds("ann") == (0, 0)


def test_one_access_that_waits_is_all_there_is(slow: Slow) -> None:
    va = slow.have("ann")
    slow.evict(va)
    assert slow.read("ann", va) == 2
    assert slow.seconds("ann") == (1, 1)


def test_full_is_less_where_accesses_run_beside_a_request_that_waits(slow: Slow) -> None:
    """
    s    0        1             3             4         5            10
    ask  waits .......................................................
    read runs     -             waits         runs      -
    some |===========================================================|
    full          |===========================|         |============|
    """
    here, away = slow.have("ann"), slow.have("ann")
    slow.evict(away)
    request = slow.ask("ann", 10)
    assert slow.read("ann", here) == 1
    assert slow.seconds("ann") == (1, 0)
    slow.clock.advance(2 * S)
    assert slow.seconds("ann") == (3, 2)
    assert slow.read("ann", away) == 2
    assert slow.seconds("ann") == (5, 3)
    slow.clock.advance(5 * S)
    assert errno_of(next, request) == errno.ETIMEDOUT
    assert slow.seconds("ann") == (10, 8)
    slow.clock.advance(S)
    assert slow.seconds("ann") == (10, 8)


def test_it_is_each_clients_own(slow: Slow) -> None:
    """What bob does while ann waits makes her wait no less."""
    va = slow.have("bob")
    request = slow.ask("ann", 3)
    slow.read("bob", va)
    slow.read("bob", va)
    slow.clock.advance(S)
    assert errno_of(next, request) == errno.ETIMEDOUT
    assert slow.seconds("ann") == (3, 3)
    assert slow.seconds("bob") == (0, 0)


def test_a_refused_access_no_longer_runs(slow: Slow) -> None:
    va = slow.have("ann")
    slow.evict(va)
    slow.swap.torn.update(slow.swap.blobs)
    request = slow.ask("ann", 4)
    assert errno_of(slow.memory.read, "ann", va, 1) == errno.EIO
    began = slow.clock.now_ns()
    some, full = slow.seconds("ann")
    slow.clock.advance(S)
    assert slow.seconds("ann") == (some + 1, full + 1)
    assert slow.clock.now_ns() == began + S
    request.close()
