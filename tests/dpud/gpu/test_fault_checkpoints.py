# SPDX-License-Identifier: GPL-2.0-only
"""Checkpoints: of one moment, whole or not there, incremental; and the way back, also in another program."""

import errno
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small import KIB, MIB, DictSwap, errno_of, small_memory

from dpud.gpu.address_space.regions import PageState, RegionType
from dpud.gpu.check import violations
from dpud.gpu.compression import CompressionSystem
from dpud.gpu.compression.dictionary import Dictionaries
from dpud.gpu.errors import CorruptPage, GpuError, HalfBack
from dpud.gpu.fault import checkpoint_file
from dpud.gpu.fault.interval import PRIOR_MTBF_NS, Interval, daly, young
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.memory import GpuMemory
from dpud.gpu.store import HostPool
from dpud.gpu.traffic import Cause, TrafficCounts

SIZE = 256 * KIB
rng = np.random.default_rng(4)


class Lab:
    """A client on a device of 1 MiB whose checkpoints are in a folder."""

    def __init__(self, folder: Path | None = None, kind: RegionType = RegionType.DEVICE, page: int = 4 * KIB) -> None:
        codec = CompressionSystem(dictionaries=Dictionaries(enabled=False), regret_every=0)
        self.memory: GpuMemory = small_memory(MIB, MIB, pool=HostPool(MIB), swap=DictSwap(8 * MIB))
        self.fault = FaultModule(self.memory, codec, folder)
        self.checkpoints = self.fault.checkpoints
        self.data = bytearray(rng.bytes(SIZE // 2) + bytes(SIZE // 2))
        self.va = self.memory.allocate("a", SIZE, kind, page_size=page)
        self.write(0, bytes(self.data[: SIZE // 2]))

    def write(self, at: int, data: bytes) -> None:
        self.memory.write("a", self.va + at, data)
        self.data[at : at + len(data)] = data

    def read(self) -> bytes:
        return self.memory.read("a", self.va, SIZE)

    def files(self) -> list[Path]:
        return sorted(self.checkpoints.folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", RegionType)
@pytest.mark.parametrize("page", [2 * KIB, 64 * KIB])
def test_back_to_a_full_checkpoint_and_an_increment(kind: RegionType, page: int, tmp_path: Path) -> None:
    lab = Lab(tmp_path, kind, page)
    assert lab.checkpoints.create("a").is_full
    lab.write(70_000, b"one" * 5000)
    record = lab.checkpoints.create("a")
    assert not record.is_full
    assert record.nr_pages == len({at // page for at in range(70_000, 85_000)})
    then = bytes(lab.data)
    for at in (0, 80_000, 200_000):
        lab.memory.write("a", lab.va + at, rng.bytes(9_000))
    done = lab.checkpoints.roll_back("a")
    assert done is not None
    assert done.sequence == 2
    assert lab.read() == then
    assert violations(lab.memory) == []
    again = lab.checkpoints.roll_back("a")
    assert again is not None
    assert again.nr_pages == 0


def test_pages_that_are_stored_are_in_it_and_stay_stored(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.memory.evict(MIB)
    region = lab.memory.space.regions.find(lab.va)
    assert region is not None
    lab.checkpoints.create("a")
    assert region.count(PageState.STORED) == 32
    lab.memory.write("a", lab.va, bytes(SIZE))
    lab.checkpoints.roll_back("a")
    assert lab.read() == lab.data


@pytest.mark.slow
def test_a_checkpoint_is_of_one_moment(tmp_path: Path) -> None:
    """The client goes on writing between the rounds: a counter in the first page, and the same in the last."""
    lab = Lab(tmp_path)
    size = 24 * MIB
    memory = small_memory(32 * MIB)
    fault = FaultModule(memory, None, tmp_path)
    va = memory.allocate("b", size)
    memory.write("b", va, rng.bytes(size))
    creation, nr = fault.checkpoints.creation("b"), 0
    while True:
        try:
            next(creation)
        except StopIteration:
            break
        nr += 1
        for at in (0, size // 2, size - 4096):
            memory.write("b", va + at, nr.to_bytes(8, "little"))
    assert nr >= 6
    then = memory.read("b", va, size)
    memory.write("b", va, bytes(size))
    fault.checkpoints.roll_back("b")
    assert memory.read("b", va, size) == then
    assert lab.read() == lab.data


@pytest.mark.slow
def test_a_checkpoint_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.checkpoints.create("a")
    region = lab.memory.space.regions.find(lab.va)
    assert region is not None
    size = 12 * MIB
    big = small_memory(16 * MIB)
    fault = FaultModule(big, None, tmp_path / "big")
    va = big.allocate("b", size)
    data = rng.bytes(size)
    big.write("b", va, data)
    creation = fault.checkpoints.creation("b")
    next(creation)
    assert errno_of(fault.checkpoints.create, "b") == errno.EBUSY
    creation.close()
    assert list((tmp_path / "big").iterdir()) == []
    assert fault.checkpoints.last("b") is None
    assert all(not each.dirty_logs for each in big.space.regions)
    fault.checkpoints.create("b")
    big.write("b", va, bytes(size))
    fault.checkpoints.roll_back("b")
    assert big.read("b", va, size) == data


@pytest.mark.slow
def test_a_client_that_ends_or_goes_back_meanwhile_has_none(tmp_path: Path) -> None:
    for meanwhile, number in (("end", errno.ENOENT), ("back", errno.EAGAIN)):
        memory = small_memory(16 * MIB)
        fault = FaultModule(memory, None, tmp_path / meanwhile)
        va = memory.allocate("b", 12 * MIB)
        memory.write("b", va, b"first")
        fault.checkpoints.create("b")
        memory.write("b", va, bytes(12 * MIB))
        creation = fault.checkpoints.creation("b")
        next(creation)
        if meanwhile == "end":
            memory.remove_client("b")
        else:
            assert fault.roll_back("b")
        with pytest.raises(GpuError) as caught:
            list(creation)
        assert caught.value.errno == number
        assert len(list((tmp_path / meanwhile).iterdir())) == 1
        assert violations(memory) == []
    assert memory.read("b", va, 5) == b"first"


def test_what_is_lost_cannot_be_in_it(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.fault.inject(f"bit bits=2 va={lab.va:#x}")
    assert errno_of(lab.checkpoints.create, "a") == errno.EIO
    assert lab.files() == []


def test_a_page_that_was_not_written_to_is_made_good_from_it(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.checkpoints.create("a")
    lab.fault.inject(f"bit bits=2 va={lab.va:#x}")
    assert lab.read() == lab.data
    assert lab.fault.stats()["repaired_from_checkpoint"] == 1
    lab.write(4096, b"new")
    lab.fault.inject(f"bit bits=2 va={lab.va + 4096:#x}")
    assert errno_of(lab.read) == errno.EIO


def test_with_the_policy_of_that_name_a_loss_is_a_step_back(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.fault.recovery.policy = lab.fault.recovery.policy.RESTORE
    lab.checkpoints.create("a")
    then = bytes(lab.data)
    lab.memory.clock.sleep_until(lab.memory.clock.now_ns() + 5 * 10**9)
    lab.write(4096, b"new")
    lab.write(50_000, b"newer")
    lab.fault.inject(f"bit bits=2 va={lab.va + 4096:#x}")
    assert lab.read() == then
    stats = lab.fault.stats()
    assert (stats["rollbacks"], stats["lost_pages"]) == (1, 0)
    assert 5 * 10**9 <= stats["lost_work_ns"] < 6 * 10**9
    assert "5.0" in str(lab.fault.events.records[-1])
    assert violations(lab.memory) == []


def test_regions_that_come_and_go(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    gone = lab.memory.allocate("a", SIZE)
    lab.checkpoints.create("a")
    lab.memory.free(gone)
    late = lab.memory.allocate("a", SIZE)
    lab.memory.write("a", late, b"late")
    lab.memory.write("a", lab.va, b"changed")
    lab.checkpoints.roll_back("a")
    assert lab.read() == lab.data
    assert lab.memory.read("a", late, 4) == bytes(4)
    lab.checkpoints.create("a")
    assert violations(lab.memory) == []


@pytest.mark.parametrize("how", ["roll_back", "restore"])
def test_who_gets_back_half_way_reads_no_bytes_of_two_times(tmp_path: Path, how: str) -> None:
    """Pinned memory whose frames another client has taken meanwhile: there is no room for five of its pages."""
    lab = Lab(tmp_path, RegionType.PINNED)
    lab.write(0, rng.bytes(SIZE))
    lab.checkpoints.create("a")
    then, page_bytes = bytes(lab.data), 4 * KIB
    lab.memory.write("a", lab.va, rng.bytes(SIZE))
    region = lab.memory.space.regions.find(lab.va)
    assert region is not None
    for page in range(10, 15):
        lab.fault.placing.lose(region, page)
    other = lab.memory.allocate("b", lab.memory.locations[2].frames.nr_free_bytes, RegionType.PINNED)
    go_back: Callable[[str], object] = lab.fault.roll_back if how == "roll_back" else lab.checkpoints.restore
    with pytest.raises(HalfBack) as caught:
        go_back("a")
    assert (caught.value.errno, caught.value.nr_lost) == (errno.ENOMEM, 5)
    for page in range(SIZE // page_bytes):
        at = page * page_bytes
        if 10 <= page < 15:
            assert errno_of(lab.memory.read, "a", lab.va + at, page_bytes) == errno.EIO
        else:
            assert lab.memory.read("a", lab.va + at, page_bytes) == then[at : at + page_bytes]
    refused = lab.memory.space.faults.records[-1]
    assert (refused.number, refused.page) == (errno.EIO, "CORRUPT")
    lab.memory.free(other)
    assert lab.fault.roll_back("a")
    assert lab.read() == then
    assert violations(lab.memory) == []


def test_a_restore_for_which_there_are_no_regions_leaves_none(tmp_path: Path) -> None:
    lab = Lab(tmp_path, RegionType.PINNED)
    lab.memory.allocate("a", 512 * KIB, RegionType.PINNED)
    lab.checkpoints.create("a")
    other = small_memory(MIB, host_bytes=512 * KIB)
    fault = FaultModule(other, CompressionSystem(dictionaries=Dictionaries(enabled=False)), tmp_path)
    assert errno_of(fault.checkpoints.restore, "a") == errno.ENOMEM
    assert other.client("a").regions == []
    assert other.locations[1].frames.nr_free_bytes == 512 * KIB


def test_traffic_is_charged(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.checkpoints.create("a")
    lab.memory.write("a", lab.va, bytes(8192))
    lab.checkpoints.roll_back("a")
    traffic = lab.memory.residency.traffic
    assert isinstance(traffic, TrafficCounts)
    assert traffic.nr_bytes["a", Cause.CHECKPOINT] == SIZE // 2 + 8192


# Files.


def test_another_program_has_it_back(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.checkpoints.create("a")
    lab.write(1000, rng.bytes(20_000))
    lab.checkpoints.create("a")
    other = small_memory(MIB)
    fault = FaultModule(other, CompressionSystem(dictionaries=Dictionaries(enabled=False)), tmp_path)
    assert fault.checkpoints.restore("a").label.sequence == 2
    (region,) = other.client("a").regions
    assert other.read("a", region.va, SIZE) == lab.data
    other.write("a", region.va, b"on")
    assert fault.checkpoints.create("a").label.parent == 2
    assert violations(other) == []


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:2000] + bytes([data[2000] ^ 8]) + data[2001:],
    "in the label": lambda data: data[:20] + bytes([data[20] ^ 8]) + data[21:],
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"x",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_never_used(tmp_path: Path, damage: str) -> None:
    lab = Lab(tmp_path)
    lab.checkpoints.create("a")
    first = bytes(lab.data)
    lab.write(0, rng.bytes(20_000))
    lab.checkpoints.create("a")
    last = lab.files()[-1]
    last.write_bytes(DAMAGE[damage](last.read_bytes()))
    with pytest.raises(CorruptPage):
        checkpoint_file.read(last)
    lab.write(0, b"after")
    before = lab.read()
    assert lab.checkpoints.roll_back("a") is None
    assert lab.read() == before
    assert lab.checkpoints.restore("a").label.sequence == 1
    assert lab.read() == first
    lab.files()[0].write_bytes(b"")
    assert errno_of(lab.checkpoints.restore, "a") == errno.EIO


@pytest.mark.slow
def test_every_cut_of_a_file_is_found(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.checkpoints.create("a")
    (path,) = lab.files()
    data = path.read_bytes()
    for end in range(0, len(data), 997):
        path.write_bytes(data[:end])
        with pytest.raises(CorruptPage):
            checkpoint_file.read(path)


@pytest.mark.slow
def test_an_increment_to_another_file_is_none(tmp_path: Path) -> None:
    """The full checkpoint was replaced by another whole one."""
    lab = Lab(tmp_path)
    lab.checkpoints.create("a")
    lab.write(0, b"x")
    lab.checkpoints.create("a")
    other = Lab(tmp_path / "other")
    other.checkpoints.create("a")
    lab.files()[0].write_bytes(other.files()[0].read_bytes())
    assert lab.checkpoints.restore("a").label.sequence == 1
    assert lab.read() == other.data


@pytest.mark.slow
def test_old_chains_go(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.checkpoints.max_increments = 1
    for _ in range(9):
        lab.write(0, rng.bytes(10))
        lab.checkpoints.create("a")
    records = lab.checkpoints.records["a"]
    assert [record.is_full for record in records] == [True, False, True]
    assert [path.name for path in lab.files()] == [f"a.{number:06}.ckpt" for number in (7, 8, 9)]


# How often.


def test_daly_s_published_values() -> None:
    """Young: sqrt(2 x 5 min x 24 h) = 2 h. Daly's is never above it by more than the cost, and M where C is 2 M."""
    minute = 60 * 10**9
    assert young(5 * minute, 24 * 60 * minute) == pytest.approx(120 * minute)
    assert daly(5 * minute, 24 * 60 * minute) == pytest.approx(
        120 * minute * (1 + math.sqrt(5 / 2880) / 3 + 5 / 2880 / 9) - 5 * minute
    )
    assert daly(3 * minute, minute) == minute


def test_daly_s_interval_loses_least() -> None:
    """Against the exact expectation for exponential failures (Daly 2006), looked for by brute force."""
    cost, mtbf = 10.0, 2000.0

    def wasted(interval: float) -> float:
        return math.exp(10 / mtbf) * mtbf * (math.exp((interval + cost) / mtbf) - 1) / interval

    best = min(range(20, 2000), key=wasted)
    assert daly(cost, mtbf) == pytest.approx(best, rel=0.02)


def test_the_interval_follows_what_is_seen() -> None:
    interval = Interval(0)
    assert interval.best_ns(0) == 0
    interval.measured(10**9)
    assert interval.mtbf_ns(0) == PRIOR_MTBF_NS
    calm = interval.best_ns(10**9)
    interval.nr_failures = 10_000
    assert interval.best_ns(10**9) == pytest.approx(calm / 100, rel=0.02)
    interval.measured(3 * 10**9)
    assert interval.cost_ns == pytest.approx(1.6 * 10**9)
    interval.fixed_ns = 5
    assert interval.best_ns(0) == 5


def test_checkpoints_are_due_when_the_interval_is_over(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    assert lab.checkpoints.due() == []
    lab.checkpoints.automatic = True
    assert lab.checkpoints.due() == ["a"]
    lab.checkpoints.create("a")
    lab.checkpoints.interval.fixed_ns = 10**9
    assert lab.checkpoints.due() == []
    lab.memory.clock.sleep_until(lab.memory.clock.now_ns() + 10**9)
    assert lab.checkpoints.due() == ["a"]
