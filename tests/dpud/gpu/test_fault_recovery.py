# SPDX-License-Identifier: GPL-2.0-only
"""Pages that ECC cannot correct: made good from where there is a copy, else lost and known to be; by policy."""

import errno
from collections import Counter
from typing import Any

import numpy as np
import pytest
from small import KIB, MIB, DictSwap, attempt, errno_of, small_memory

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.permissions import READ
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.check import violations
from dpud.gpu.errors import UncorrectableError
from dpud.gpu.fault.errorcount import Action
from dpud.gpu.fault.events import Xid
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.recovery import Policy
from dpud.gpu.fault.rows import Cause, Limits, Rows
from dpud.gpu.memory import HOST, GpuMemory
from dpud.gpu.store import HostPool

SIZE = 64 * KIB


class Lab:
    """A client with a buffer of noise on a device of 1 MiB, and what can break."""

    def __init__(self, kind: RegionType = RegionType.DEVICE, page: int = 4 * KIB, **collaborators: Any) -> None:
        collaborators.setdefault("swap", DictSwap(8 * MIB))
        self.memory: GpuMemory = small_memory(MIB, MIB, **collaborators)
        self.fault = FaultModule(self.memory)
        self.data = np.random.default_rng(1).bytes(SIZE)
        self.va = self.memory.allocate("a", SIZE, kind, page_size=page)
        self.memory.write("a", self.va, self.data)

    @property
    def region(self) -> Region:
        region = self.memory.space.regions.find(self.va)
        assert region is not None
        return region

    def sync(self) -> None:
        """Let the stores have a copy."""
        self.memory.sync("a", self.va, SIZE)

    def double(self, offset: int = 0, stuck: str = "") -> None:
        """Two bits of a word, at an offset of the buffer; stuck at what they are not."""
        word = int.from_bytes(self.data[offset & -8 : (offset & -8) + 8], "little")
        for bit in (3, 40):
            values = f" stuck={1 - (word >> bit & 1)}" if stuck else ""
            self.fault.inject(f"bit va={self.va + offset:#x} bit={bit}{values}")

    def read(self, at: int | None = None) -> bytes:
        return self.memory.read("a", self.va, SIZE, at)

    def count(self, xid: Xid) -> int:
        return sum(nr for (each, _), nr in self.fault.events.counts.items() if each is xid)

    @property
    def stats(self) -> Counter[str]:
        return Counter(self.fault.stats())

    def check(self) -> None:
        assert violations(self.memory) == []


@pytest.mark.parametrize("page", [2 * KIB, 4 * KIB, 64 * KIB])
def test_a_flip_is_corrected_on_the_way_and_counted(page: int) -> None:
    lab = Lab(page=page)
    lab.fault.inject(f"bit va={lab.va + 5000:#x}")
    assert lab.read() == lab.data
    assert lab.read() == lab.data
    assert lab.stats["corrected"] == 1
    assert lab.fault.events.nr_events == 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", Policy)
def test_without_a_copy_the_bytes_are_lost_and_known_to_be(policy: Policy) -> None:
    lab = Lab()
    lab.fault.recovery.policy = policy
    lab.double(9 * 4 * KIB)
    assert errno_of(lab.read) == errno.EIO
    assert errno_of(lab.read) == errno.EIO
    assert lab.memory.read("a", lab.va, 9 * 4 * KIB) == lab.data[: 9 * 4 * KIB]
    assert (lab.count(Xid.DBE), lab.count(Xid.CONTAINED)) == (1, 1)
    lab.check()
    lab.memory.write("a", lab.va, lab.data)
    assert lab.read() == lab.data


@pytest.mark.slow
@pytest.mark.parametrize("stuck", ["", "stuck"])
@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.RETRY])
def test_a_copy_in_the_stores_makes_it_good(policy: Policy, stuck: str) -> None:
    lab = Lab()
    lab.fault.recovery.policy = policy
    lab.sync()
    lab.double(4 * KIB, stuck)
    assert lab.read() == lab.data
    assert lab.read() == lab.data
    assert (lab.stats["uncorrectable"], lab.stats["repaired_from_store"]) == (1, 1)
    assert lab.count(Xid.CONTAINED) == 0
    lab.check()


def test_retry_is_enough_for_what_happened_once_and_no_more() -> None:
    lab = Lab()
    lab.fault.recovery.policy = Policy.RETRY
    lab.sync()
    lab.double()
    assert lab.read() == lab.data
    assert lab.stats["retried"] == 1
    lab.double(0, "stuck")
    assert errno_of(lab.read) == errno.EIO
    assert lab.stats["retried"] == 4
    lab.check()


def test_remap_keeps_the_frame_and_uses_a_spare_row() -> None:
    lab = Lab()
    lab.fault.recovery.policy = Policy.REMAP
    lab.sync()
    before = lab.region.frame.copy()
    lab.double(0, "stuck")
    assert lab.read() == lab.data
    assert (lab.region.frame == before).all()
    assert lab.memory.locations[0].frames.nr_retired == 0
    assert lab.fault.rows[0].remapped["uncorrectable"] == 1
    assert lab.count(Xid.REMAP) == 1


def test_migrate_retires_the_frame_until_the_reset() -> None:
    lab = Lab()
    lab.sync()
    frame = int(lab.region.frame[3])
    lab.double(3 * 4 * KIB, "stuck")
    assert lab.read() == lab.data
    frames = lab.memory.locations[0].frames
    assert int(lab.region.frame[3]) != frame
    assert frames.nr_retired == 1
    assert lab.fault.recovery_action(lab.memory.locations[0]) == "reset"
    lab.check()
    assert lab.fault.reset(lab.memory.locations[0]) == 1
    assert frames.nr_retired == 0
    assert lab.fault.recovery_action(lab.memory.locations[0]) == "none"
    assert not lab.fault.cells[0].has_stuck(frame)
    lab.check()


def test_a_bank_without_spares_is_xid_64_and_its_frames_stay_away() -> None:
    lab = Lab()
    lab.fault.limits.per_bank = 0
    lab.sync()
    lab.double()
    assert lab.read() == lab.data
    assert (lab.count(Xid.REMAP), lab.count(Xid.REMAP_FAILURE)) == (0, 1)
    assert lab.fault.reset(lab.memory.locations[0]) == 0
    assert lab.memory.locations[0].frames.nr_retired == 1
    assert lab.fault.recovery_action(lab.memory.locations[0]) == "drain"


@pytest.mark.slow
def test_rows_beyond_the_limits_find_no_spare() -> None:
    """8 rows of a bank, 512 in all: NVIDIA's limits."""
    rows = Rows(1 << 20, Limits())
    cause = Cause.UNCORRECTABLE
    assert [rows.reserve(rows.nr_banks * each, cause) for each in range(9)] == [True] * 8 + [False]
    assert sum(rows.reserve(row, cause) for row in range(1, 1 << 16) if rows.bank(row)) == 504
    assert rows.histogram() == {"max": 0, "high": 4, "partial": 123, "low": 0, "none": 1}  # with 5, 4 and 0 left


def test_a_read_mostly_copy_makes_it_good_and_a_bad_copy_is_dropped() -> None:
    lab = Lab(RegionType.MANAGED)
    lab.memory.advise("a", lab.va, SIZE, Advice.SET_READ_MOSTLY)
    assert lab.read(1) == lab.data
    lab.double(0)
    assert lab.read(0) == lab.data
    assert lab.stats["repaired_from_copy"] == 1
    lab.check()
    assert lab.read(1) == lab.data
    copy = lab.region.replicas[2][1]
    for bit in (1, 2):
        lab.fault.inject(f"bit gpu=1 address={copy * 2048} bit={bit}")
    assert lab.read(1) == lab.data
    assert lab.memory.locations[1].frames.owner[copy] == -2
    lab.check()


def test_a_page_that_several_may_use_is_an_uncontained_loss() -> None:
    lab = Lab()
    lab.memory.protect("a", lab.va, SIZE, READ, of="b")
    lab.double()
    assert errno_of(lab.read) == errno.EIO
    assert (lab.count(Xid.CONTAINED), lab.count(Xid.UNCONTAINED)) == (0, 1)


def test_the_last_good_copy_is_used_before_a_write_drops_it() -> None:
    """The stores forget a page that is written to; the write is of other bytes than those that are broken."""
    lab = Lab()
    lab.sync()
    lab.double(0)
    lab.memory.write("a", lab.va + 100, b"new")
    assert lab.read() == lab.data[:100] + b"new" + lab.data[103:]
    lab.check()


def test_what_cannot_be_read_is_not_evicted_and_what_is_stored_need_not_be() -> None:
    lab = Lab()
    lab.double(0)
    lab.memory.evict(MIB)
    assert lab.region.count(PageState.STORED) == 15
    assert lab.region.state[0] == PageState.RESIDENT
    lab.check()
    assert errno_of(lab.read) == errno.EIO


def test_a_reader_that_does_not_ask_gets_an_error_and_no_byte() -> None:
    lab = Lab()
    lab.double(0)
    location = lab.memory.locations[0]
    with pytest.raises(UncorrectableError):
        location.load_pages(lab.region.frame[:4], 4 * KIB)


def test_prefetch_and_sync_and_migration_make_good_what_they_move() -> None:
    lab = Lab(RegionType.MANAGED)
    lab.sync()
    lab.double(0)
    lab.memory.prefetch("a", lab.va, SIZE, 1)
    assert lab.read(1) == lab.data
    lab.memory.write("a", lab.va + 4 * KIB, lab.data[4 * KIB : 8 * KIB], 1)
    lab.double(4 * KIB)  # no copy any more
    assert errno_of(lab.memory.sync, "a", lab.va, SIZE) == errno.EIO
    lab.check()


def test_pinned_memory_moves_to_another_frame() -> None:
    lab = Lab(RegionType.PINNED)
    lab.memory.sync("a", lab.va, SIZE)
    lab.double(0, "stuck")
    assert lab.read() == lab.data
    assert lab.memory.locations[HOST].frames.nr_retired == 1
    lab.check()


@pytest.mark.slow
def test_broken_rows_under_pressure_lose_nothing_that_is_stored() -> None:
    """Three times the device, all of it synced, and rows that break: pages come in, into cells that may be broken."""
    lab = Lab(swap=DictSwap(16 * MIB), pool=HostPool(MIB))
    data = np.random.default_rng(2).bytes(3 * MIB)
    va = lab.memory.allocate("b", 3 * MIB)
    lab.memory.write("b", va, data)
    lab.memory.sync("b", va, 3 * MIB)
    for seed in range(20):
        lab.fault.inject(f"row seed={seed}")
        lab.fault.inject(f"bit stuck=1 bits=3 nr=3 seed={seed}")
        found = attempt(lab.memory.read, "b", va, 3 * MIB)
        assert found in (0, errno.EIO)
        lab.check()
    assert lab.stats["retired_frames"] >= 20


# Too many corrected errors.


@pytest.mark.slow
def test_fifty_corrected_errors_in_a_day_put_a_page_out_of_use() -> None:
    lab = Lab()
    frame = int(lab.region.frame[0])
    wrong = 1 - (lab.data[0] & 1)
    lab.fault.inject(f"bit va={lab.va:#x} bit=0 stuck={wrong}")
    for _ in range(50):
        assert lab.memory.read("a", lab.va, 8) == lab.data[:8]
    assert lab.memory.locations[0].frames.owner[frame] >= 0
    assert lab.read() == lab.data
    assert lab.memory.locations[0].frames.owner[frame] == -2
    assert (lab.count(Xid.HIGH_SBE_RATE), lab.stats["offlined"]) == (1, 1)
    assert next(iter(lab.fault.placing.retired[0].values())).cause == "correctable"
    lab.check()


@pytest.mark.slow
def test_errors_of_different_days_are_not_too_many() -> None:
    lab = Lab()
    lab.fault.inject(f"bit va={lab.va:#x} bit=0 stuck={1 - (lab.data[0] & 1)}")
    for _ in range(120):
        lab.memory.clock.sleep_until(lab.memory.clock.now_ns() + 1800 * 10**9)  # 48 in 24 hours
        lab.memory.read("a", lab.va, 8)
    assert lab.count(Xid.HIGH_SBE_RATE) == 0


@pytest.mark.slow
@pytest.mark.parametrize("action", Action)
def test_actions(action: Action) -> None:
    lab = Lab()
    lab.sync()
    lab.fault.rule.action, lab.fault.rule.threshold = action, 2
    lab.fault.inject(f"bit va={lab.va:#x} bit=0 stuck={1 - (lab.data[0] & 1)}")
    for _ in range(4):
        assert lab.read() == lab.data
    retired = lab.memory.locations[0].frames.nr_retired
    assert retired == (0 if action in (Action.OFF, Action.ACCOUNT) else 1)
    assert bool(lab.count(Xid.HIGH_SBE_RATE)) == (action is not Action.OFF)
    lab.check()


# Scrubbing.


def test_the_scrubber_finds_what_nobody_reads() -> None:
    lab = Lab()
    lab.sync()
    lab.fault.inject(f"bit va={lab.va:#x} bit=1")
    lab.double(4 * KIB)
    free = int(np.flatnonzero(lab.memory.locations[0].frames.owner < 0)[-1])
    for value in (0, 1):
        lab.fault.inject(f"bit address={free * 2048} bit={value} stuck={value}")
    lab.fault.scrubber.scrub(lab.fault.scrubber.total_bytes)
    assert all(not cells.is_suspect[frame] for cells in lab.fault.cells for frame in lab.region.frame.tolist())
    assert (lab.stats["corrected"], lab.stats["repaired_from_store"]) == (1, 1)
    assert lab.memory.locations[0].frames.owner[free] == -2
    assert lab.stats["scrub_rounds"] == 1
    assert lab.read() == lab.data
    lab.check()


def test_scrubbing_keeps_single_flips_from_becoming_double_ones() -> None:
    outcomes = []
    for scrubbed in (False, True):
        lab = Lab()
        for bit in (5, 6):
            lab.fault.inject(f"bit va={lab.va:#x} bit={bit}")
            if scrubbed:
                lab.fault.scrubber.scrub(lab.fault.scrubber.total_bytes)
        outcomes.append(attempt(lab.read))
    assert outcomes == [errno.EIO, 0]


def test_a_page_that_leaves_while_another_is_made_good() -> None:
    """The device is full: room for the first page's new frame is made by evicting the second, which is bad as well."""
    memory = small_memory(256 * KIB, swap=DictSwap(8 * MIB))
    fault = FaultModule(memory)
    va = memory.allocate("a", 256 * KIB)
    data = np.random.default_rng(1).bytes(256 * KIB)
    memory.write("a", va, data)
    memory.sync("a", va, 256 * KIB)
    for page in (0, 1, 2):
        fault.inject(f"bit bits=2 va={va + page * 4 * KIB:#x}")
    assert memory.read("a", va, 64 * KIB) == data[: 64 * KIB]
    assert violations(memory) == []
    assert memory.read("a", va, 256 * KIB) == data
