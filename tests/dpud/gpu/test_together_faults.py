# SPDX-License-Identifier: GPL-2.0-only
"""Memory that breaks while frames are put together: recovery and defragmentation move the same pages."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from small import KIB, MIB, DictSwap, small_memory

from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.defrag.module import DefragModule
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.recovery import Policy
from dpud.gpu.location import Location
from dpud.gpu.memory import GpuMemory
from kernelsim.operation import Operation

LARGE = 64 * KIB


class Scattered:
    """A device of 1 MiB with one free block of 64 KiB, as much again in pieces, and two large pages in swap."""

    def __init__(self, folder: Path | None = None) -> None:
        self.memory: GpuMemory = small_memory(MIB, swap=DictSwap(8 * MIB), clock=ManualClock())
        self.device = self.memory.locations[0]
        self.fault = FaultModule(self.memory, None, folder)
        self.defrag = DefragModule(interval_s=0)
        self.defrag.attach(self.memory)
        rng = np.random.default_rng(12)
        self.large = rng.bytes(2 * LARGE)
        self.va = self.memory.allocate("c", 2 * LARGE, page_size=LARGE)
        self.memory.write("c", self.va, self.large)
        self.memory.evict(2 * LARGE)
        self.small = {self.memory.allocate("s", 4 * KIB): rng.bytes(4 * KIB) for _ in range(256)}
        for va, data in self.small.items():
            self.memory.write("s", va, data)
        by_frame = sorted(self.small, key=lambda va: self.memory.translate(va))
        self.in_halves = [by_frame[16], by_frame[32], by_frame[48]]
        """A page of each block that is half free."""
        gone = [va for at, va in enumerate(by_frame) if at < 16 or (at % 2 and at < 64)]
        for va in gone:
            self.memory.free(va)
            del self.small[va]

    def before_a_block_is_made(self, act: "Act") -> None:
        make = self.defrag.maker.make

        def making(location: Location, order: int, busy: Collection[int] = (), nr: int = 1) -> Operation[int]:
            act()
            return make(location, order, busy, nr)

        self.defrag.maker.make = making  # type: ignore[method-assign]

    def check(self) -> None:
        assert self.memory.read("c", self.va, 2 * LARGE) == self.large
        assert all(self.memory.read("s", va, 4 * KIB) == data for va, data in self.small.items())
        assert violations(self.memory) == []


class Act:
    """Once."""

    def __init__(self, lab: Scattered) -> None:
        self.lab, self.nr = lab, 0

    def __call__(self) -> None:
        self.nr += 1
        if self.nr == 1:
            self.once()

    def once(self) -> None:
        raise NotImplementedError


class FramesAreDue(Act):
    """Some frames of the block that the first page has just got have had their fiftieth corrected error."""

    def once(self) -> None:
        self.lab.fault.recovery.due.update((0, frame) for frame in range(8))


class PagesBreak(Act):
    """Small pages, of which some are nowhere else, so that their client goes back to its checkpoint."""

    def once(self) -> None:
        self.lab.fault.recovery.policy = Policy.RESTORE
        for va in self.lab.in_halves:
            self.lab.fault.inject(f"bit bits=2 va={va:#x}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FramesAreDue, PagesBreak])
def test_recovery_lets_frames_alone_that_somebody_is_taking(kind: type[Act], tmp_path: Path) -> None:
    """Two large pages come in: the first has its frames, and for the second a block is made. What is broken waits."""
    lab = Scattered(tmp_path)
    lab.fault.checkpoints.create("s")
    lab.memory.write("s", lab.in_halves[0], lab.small[lab.in_halves[0]])
    act = kind(lab)
    lab.before_a_block_is_made(act)
    assert lab.memory.read("c", lab.va, 2 * LARGE) == lab.large
    assert act.nr
    lab.check()
    stats = lab.fault.stats()
    assert stats["rollbacks"] if kind is PagesBreak else stats["offlined"]
    assert stats["lost_pages"] == 0


@pytest.mark.slow
def test_a_pass_in_the_background_makes_good_what_it_moves(tmp_path: Path) -> None:
    lab = Scattered(tmp_path)
    lab.fault.checkpoints.create("s")
    lab.fault.recovery.policy = Policy.RETRY  # into the same frame, so that the block can be whole again
    lab.fault.inject(f"bit bits=2 va={lab.in_halves[0]:#x}")
    lab.defrag.order = 5
    assert lab.defrag.run() == 1
    assert lab.fault.stats()["repaired_from_checkpoint"] == 1
    lab.check()


def test_what_is_in_the_way_of_an_access_is_made_good_after_it_found_no_room(tmp_path: Path) -> None:
    """Nothing can leave, and in each block that is half free a page cannot be read."""
    lab = Scattered(tmp_path)
    lab.memory.free(lab.va)
    lab.memory.store.swap = None
    first = lab.memory.allocate("c", LARGE, page_size=LARGE)
    lab.memory.write("c", first, lab.large[:LARGE])
    lab.fault.checkpoints.create("s")
    lab.fault.recovery.policy = Policy.RETRY
    for va in lab.in_halves:
        lab.fault.inject(f"bit bits=2 va={va:#x}")
    lab.va = lab.memory.allocate("c", LARGE, page_size=LARGE)
    lab.memory.write("c", lab.va, lab.large[LARGE:])
    assert lab.memory.read("c", first, LARGE) + lab.memory.read("c", lab.va, LARGE) == lab.large
    assert lab.fault.stats()["repaired_from_checkpoint"] == 3
    assert violations(lab.memory) == []
