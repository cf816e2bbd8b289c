# SPDX-License-Identifier: GPL-2.0-only
"""A lost device: what of its pages is elsewhere is used, the rest is a step back or a loss, and everybody is told."""

import errno
from pathlib import Path

import numpy as np
import pytest
from small import KIB, MIB, DictSwap, errno_of, small_memory

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.regions import PageState, RegionType
from dpud.gpu.check import violations
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.recovery import Policy
from dpud.gpu.memory import HOST, GpuMemory

SIZE = 64 * KIB
DATA = np.random.default_rng(1).bytes(SIZE)


def lab(*device_bytes: int, folder: Path | None = None, swap: int = 8 * MIB) -> tuple[GpuMemory, FaultModule]:
    memory = small_memory(*device_bytes, swap=DictSwap(swap))
    return memory, FaultModule(memory, None, folder)


def test_what_is_nowhere_else_is_lost_and_said() -> None:
    memory, fault = lab(MIB, MIB)
    va = memory.allocate("a", SIZE)
    memory.write("a", va, DATA)
    other = memory.allocate("b", SIZE, device=1)
    memory.write("b", other, DATA)
    fault.inject("device")
    assert errno_of(memory.read, "a", va, 1) == errno.EIO
    assert memory.read("b", other, SIZE) == DATA
    assert [int(event.xid) for event in fault.events.records] == [79, 94]
    assert str(fault.failover.reports[0]).endswith("a device0 -> device1 lost=16")
    assert violations(memory) == []
    memory.write("a", va, DATA)
    assert memory.read("a", va, SIZE) == DATA
    assert memory.state_of(next(iter(memory.space.regions)))["on_device1"] == 16


def test_each_page_comes_from_where_it_is(tmp_path: Path) -> None:
    memory, fault = lab(MIB, MIB, folder=tmp_path)
    va = memory.allocate("a", SIZE, RegionType.MANAGED)
    memory.write("a", va, DATA)
    memory.advise("a", va, 16 * KIB, Advice.SET_READ_MOSTLY)
    memory.read("a", va, 16 * KIB, 1)
    fault.checkpoints.create("a")
    memory.sync("a", va + 32 * KIB, 16 * KIB)
    fault.inject("device")
    (report,) = fault.failover.reports
    assert report.pages == {"copy": 4, "store": 4, "checkpoint": 8}
    assert memory.read("a", va, SIZE) == DATA
    assert violations(memory) == []


def test_a_client_goes_back_as_a_whole(tmp_path: Path) -> None:
    """One page was written to since: its bytes have to fit to those of the others, which were not."""
    memory, fault = lab(MIB, MIB, folder=tmp_path)
    regions = [memory.allocate("a", SIZE, kind) for kind in (RegionType.DEVICE, RegionType.HOST)]
    for va in regions:
        memory.write("a", va, DATA)
    fault.checkpoints.create("a")
    for va in regions:
        memory.write("a", va + 5000, b"newer")
    fault.inject("device")
    assert [memory.read("a", va, SIZE) for va in regions] == [DATA, DATA]
    stats = fault.stats()
    assert (stats["rollbacks"], stats["rolled_back_pages"], stats["lost_pages"]) == (1, 2, 0)


@pytest.mark.parametrize(("spare", "expected"), [(None, 2), (1, 1), (2, 2)])
def test_who_takes_over(spare: int | None, expected: int) -> None:
    memory, fault = lab(MIB, MIB, 2 * MIB)
    fault.failover.spare = spare
    memory.allocate("a", SIZE)
    fault.inject("device")
    assert memory.client("a").device == expected


def test_a_spare_that_is_lost_takes_nothing_over() -> None:
    memory, fault = lab(MIB, MIB, MIB)
    fault.failover.spare = 1
    fault.inject("device gpu=1")
    memory.allocate("a", SIZE)
    fault.inject("device")
    assert memory.client("a").device == 2


def test_the_last_device() -> None:
    """Its clients use host memory; no new device memory is to be had until the device is back."""
    memory, fault = lab(MIB)
    va = memory.allocate("a", SIZE)
    memory.write("a", va, DATA)
    memory.sync("a", va, SIZE)
    fault.inject("device")
    assert memory.read("a", va, SIZE) == DATA
    assert memory.state_of(next(iter(memory.space.regions)))["on_host"] == 16
    assert errno_of(memory.allocate, "a", SIZE) == errno.ENODEV
    other = memory.allocate("a", SIZE, RegionType.MANAGED)
    memory.write("a", other, DATA)
    assert memory.read("a", other, SIZE) == DATA
    assert errno_of(fault.inject, "device") == errno.ENODEV
    fault.reset(memory.locations[0])
    new = memory.allocate("b", SIZE)
    memory.write("b", new, DATA)
    assert memory.read("b", new, SIZE) == DATA
    assert violations(memory) == []


def test_nobody_works_on_a_lost_device() -> None:
    memory, fault = lab(MIB, MIB)
    va = memory.allocate("a", SIZE, RegionType.MANAGED)
    memory.write("a", va, DATA, HOST)
    fault.inject("device")
    assert errno_of(memory.read, "a", va, 1, 0) == errno.ENODEV
    assert errno_of(memory.allocate, "b", SIZE, device=0) == errno.ENODEV
    assert memory.read("a", va, SIZE) == DATA


@pytest.mark.slow
def test_a_small_spare_keeps_what_fits_and_stores_the_rest(tmp_path: Path) -> None:
    memory, fault = lab(2 * MIB, 256 * KIB, folder=tmp_path)
    data = np.random.default_rng(2).bytes(MIB)
    va = memory.allocate("a", MIB)
    memory.write("a", va, data)
    fault.checkpoints.create("a")
    fault.inject("device")
    assert memory.read("a", va, MIB) == data
    assert violations(memory) == []


def test_the_policy_failover_empties_the_device_after_one_error() -> None:
    memory, fault = lab(MIB, MIB)
    fault.recovery.policy = Policy.FAILOVER
    va = memory.allocate("a", SIZE)
    memory.write("a", va, DATA)
    memory.sync("a", va, 4 * KIB)
    fault.inject(f"bit bits=2 va={va:#x}")
    assert memory.read("a", va, SIZE) == DATA
    region = memory.space.regions.find(va)
    assert region is not None
    assert region.nr_resident(1) == 16
    assert memory.client("a").device == 1
    assert violations(memory) == []


def test_draining_leaves_what_cannot_be_read() -> None:
    memory, fault = lab(MIB, MIB)
    va = memory.allocate("a", SIZE)
    memory.write("a", va, DATA)
    fault.inject(f"bit bits=2 va={va:#x}")
    fault.drain(memory.locations[0])
    region = memory.space.regions.find(va)
    assert region is not None
    assert (region.nr_resident(0), region.nr_resident(1)) == (1, 15)
    assert memory.read("a", va + 4096, SIZE - 4096) == DATA[4096:]
    assert errno_of(memory.read, "a", va, 1) == errno.EIO
    assert region.count(PageState.CORRUPT) == 1
    assert violations(memory) == []
