# SPDX-License-Identifier: GPL-2.0-only
"""How long others wait where real time passes: by a clock that the test moves on when a page is copied."""

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import numpy as np
import pytest

from dpud.gpu.address_space.frames import find_pages, isolate_frames, rejoin_frames
from dpud.gpu.address_space.pagetable import point_elsewhere
from dpud.gpu.address_space.tlb import tlb_invalidate
from dpud.gpu.clock import PacedClock
from dpud.gpu.defrag.effort import DEFAULT_PAUSE_NS
from dpud.gpu.defrag.module import DefragModule
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.location import Frames
from dpud.gpu.memory import GpuMemory

MIB, US = 1 << 20, 1_000
PIECE = 64 << 10
NR_MOVED = 12 * 16
"""Pages of 4 KiB in three of four blocks."""


class Emptied:
    """A device of 8 MiB that is in use everywhere, an eighth of it. `took_ns`: each page, in turn."""

    def __init__(self, took_ns: Iterator[int]) -> None:
        self.now_ns = self.away_ns = 0
        clock = PacedClock(lambda: self.now_ns, lambda: self.now_ns - self.away_ns)
        self.memory = GpuMemory([SimulatedDevice(DeviceProfile(memory_bytes=8 * MIB), clock)], clock=clock)
        self.defrag = DefragModule()
        self.defrag.attach(self.memory)
        vas = [self.memory.allocate("a", PIECE) for _ in range(8 * MIB // PIECE)]
        self.data = {va: np.random.default_rng(va).bytes(PIECE) for va in vas[::8]}
        for va in vas:
            self.memory.write("a", va, self.data.get(va, bytes(PIECE)))
        for va in set(vas) - set(self.data):
            self.memory.free(va)
        self.now_ns = self.memory.clock.now_ns()
        location = self.memory.locations[0]
        self._takes(took_ns, location.copy_pages, location)

    def _takes(self, took_ns: Iterator[int], copy: Callable[..., None], location: object) -> None:
        def copy_pages(old: Frames, new: Frames, page_bytes: int) -> None:
            copy(old, new, page_bytes)
            self.now_ns = max(self.now_ns, self.memory.clock.now_ns()) + sum(next(took_ns) for _ in old)

        vars(location)["copy_pages"] = copy_pages

    def run(self) -> list[int]:
        """All of it -> how long each slice kept others waiting."""
        pauses = []
        running = self.defrag.running(rests=False)
        for waitable in running:
            if waitable is not None:
                waitable.wait(1)
            pauses.append(self.defrag.effort.turn_ns)
        for va, kept in self.data.items():
            assert self.memory.read("a", va, PIECE) == kept
        return [pause_ns for pause_ns in pauses if pause_ns >= US]  # the others only looked for pages

    @property
    def nr_moved(self) -> int:
        return self.defrag.relocator.stats["pages_moved"]


def test_compiled_loops_are_there_before_the_first_pause() -> None:
    emptied = Emptied(repeat(80 * US))
    running = emptied.defrag.running(rests=False)
    waitable = next(running)
    assert waitable is not None
    assert waitable.wait(1)
    assert emptied.defrag.effort.turn_ns == emptied.nr_moved == 0
    for loop in (isolate_frames, rejoin_frames, find_pages, point_elsewhere, tlb_invalidate):
        assert loop.signatures  # type: ignore[union-attr]


def test_several_pages_move_while_they_end_in_half_the_limit() -> None:
    emptied = Emptied(repeat(80 * US))
    pauses = emptied.run()
    assert emptied.nr_moved == NR_MOVED
    assert [round(pause_ns / (80 * US)) for pause_ns in pauses[:6]] == [3, 3, 3, 3, 3, 1]  # a fourth: 320 of 500 us
    assert max(pauses) <= DEFAULT_PAUSE_NS // 2
    assert emptied.defrag.effort.nr_over_limit == 0


def test_a_page_that_takes_three_times_as_long_is_within_the_limit() -> None:
    """And makes slices shorter for a while."""
    emptied = Emptied(chain(repeat(80 * US, 2), [240 * US], repeat(80 * US)))
    pauses = emptied.run()
    assert max(pauses) <= DEFAULT_PAUSE_NS == 500 * US
    assert [round(pause_ns / (80 * US)) for pause_ns in pauses[:4]] == [5, 2, 2, 2]
    assert max(pauses[-10:]) == pytest.approx(3 * 80 * US, rel=0.1)
    assert emptied.nr_moved == NR_MOVED


@pytest.mark.parametrize("limit_us", [1, 50, 79])
def test_one_page_moves_all_the_same_and_it_is_said_that_the_limit_is_not_kept(limit_us: int) -> None:
    emptied = Emptied(repeat(80 * US))
    emptied.defrag.effort.pause_limit_ns = limit_us * US
    pauses = emptied.run()
    effort = emptied.defrag.effort
    assert (len(pauses), emptied.nr_moved) == (NR_MOVED, NR_MOVED)
    assert effort.nr_over_limit == NR_MOVED
    assert effort.longest_ns == max(pauses) >= 80 * US


def test_a_limit_that_is_kept_is_not_reported() -> None:
    emptied = Emptied(repeat(80 * US))
    emptied.defrag.effort.pause_limit_ns = 100 * US
    assert len(emptied.run()) == NR_MOVED
    assert emptied.defrag.effort.nr_over_limit == 0


def test_what_the_machine_gave_to_others_is_in_the_pause_and_not_in_its_cpu_time() -> None:
    emptied = Emptied(repeat(80 * US))
    running, effort = emptied.defrag.running(rests=False), emptied.defrag.effort
    for _ in range(4):  # the first is for the compiled loops
        next(running)
    copied = vars(emptied.memory.locations[0])["copy_pages"]

    def copy_pages(old: Frames, new: Frames, page_bytes: int) -> None:
        copied(old, new, page_bytes)
        emptied.now_ns += 7_000 * US
        emptied.away_ns += 7_000 * US

    vars(emptied.memory.locations[0])["copy_pages"] = copy_pages
    next(running)
    assert effort.longest_ns == pytest.approx(7_080 * US, rel=0.01)
    assert effort.longest_cpu_ns <= DEFAULT_PAUSE_NS // 2
    assert effort.nr_over_limit == 1
