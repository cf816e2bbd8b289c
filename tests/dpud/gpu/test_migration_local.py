# SPDX-License-Identifier: GPL-2.0-only
"""From one device to another of the same memory: addresses stay, bytes stay, and the client goes on."""

import errno
import math
from collections.abc import Callable

import numpy as np
import pytest
from migrating import Side, together, uniform_writer
from small import KIB, MIB, DictSwap, errno_of

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.regions import PageState, RegionType
from dpud.gpu.clock import ManualClock
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.location import Frames
from dpud.gpu.migration.client_pages import Brake
from dpud.gpu.migration.converge import Strategy, dirty_rate, predict
from dpud.gpu.migration.device_target import LocalSource
from dpud.gpu.migration.state import Progress, State
from dpud.gpu.store import HostPool

STRATEGIES = [Strategy.AUTO, Strategy.PRECOPY, Strategy.POSTCOPY, Strategy.HYBRID, Strategy.STOP_AND_COPY]


class Two:
    """A memory of two devices, and a client on the first."""

    def __init__(self, *device_bytes: int, size: int = 300 * KIB, kind: RegionType = RegionType.DEVICE) -> None:
        self.side = Side("x", ManualClock(), *(device_bytes or (MIB, MIB)))
        self.memory, self.module = self.side.memory, self.side.migration
        self.rng = np.random.default_rng(5)
        self.va = self.memory.allocate("c", size, kind)
        self.memory.write("c", self.va, self.rng.bytes(size))
        self.region = self.memory.clients["c"].regions[0]

    def run(self, meanwhile: Callable[[], object] = lambda: None, text: str = "client=c device=1") -> Progress:
        migration = self.module.start(text)

        def again():  # type: ignore[no-untyped-def]
            while True:
                meanwhile()
                yield None

        together(migration.run(), again())
        self.side.check()
        return migration.progress

    def run_beside_a_writer(self, pages_per_s: float) -> Progress:
        """That hits all pages of the client alike."""
        return self.run(uniform_writer(self.memory, "c", pages_per_s, np.random.default_rng(11)))

    def pages_at(self, location: int) -> int:
        return self.region.nr_resident(location)


def test_a_device_that_reached_pages_over_the_link_goes_by_its_copies_once_it_has_them() -> None:
    two = Two(size=64 * KIB)
    two.memory.read("c", two.va, 64 * KIB, at=1)
    two.module.settings.strategy = Strategy.PRECOPY
    migration = two.module.start("client=c device=1").run()
    while not two.region.replicas:
        next(migration)
    two.side.check()
    copied = next(iter(two.region.replicas))
    own = 1 << 40 | two.region.replicas[copied][1] * 4096  # location << 40 | byte
    assert two.memory.read("c", two.va + copied * two.region.page_bytes, 1, at=1)
    assert two.memory.translate(two.va + copied * two.region.page_bytes, 1) == own
    migration.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", list(RegionType))
@pytest.mark.slow
def test_every_strategy_moves_the_pages_that_live_on_devices(strategy: Strategy, kind: RegionType) -> None:
    two = Two(kind=kind)
    before = two.side.bytes_of("c")
    two.module.settings.strategy = strategy
    progress = two.run(two.side.check)
    assert progress.state is State.COMPLETED, progress.why
    assert two.memory.clients["c"].device == 1
    assert two.side.bytes_of("c") == before
    assert two.pages_at(0) == 0
    assert two.pages_at(1) == (75 if kind in (RegionType.DEVICE, RegionType.MANAGED) else 0)
    free = two.memory.locations[0].frames
    assert free.nr_free == free.nr_frames


def test_pages_behind_the_devices_stay_there_and_come_in_on_the_new_one() -> None:
    two = Two()
    before = two.side.bytes_of("c")
    two.memory.evict(100 * KIB)
    stored = two.region.count(PageState.STORED)
    assert two.run().state is State.COMPLETED
    assert two.region.count(PageState.STORED) == stored > 20
    assert two.side.bytes_of("c") == before
    assert two.pages_at(1) == two.region.nr_pages


@pytest.mark.slow
def test_writes_during_it_are_not_lost_under_pressure_on_the_target() -> None:
    """Another client fills the new device meanwhile: copies are taken away, and made again."""
    two = Two(MIB, 384 * KIB)
    two.memory.client("other", 1)
    other = two.memory.allocate("other", 300 * KIB, device=1)
    model = bytearray(two.side.bytes_of("c")[0])
    two.module.settings.bandwidth_bytes_per_s = 2 * MIB
    rng = np.random.default_rng(8)

    def meanwhile() -> None:
        two.memory.write("other", other + int(rng.integers(0, 75)) * 4096, rng.bytes(4096))
        if not two.region.held:
            at = int(rng.integers(0, len(model) - 100))
            data = rng.bytes(100)
            two.memory.write("c", two.va + at, data)
            model[at : at + 100] = data
        two.side.check()

    progress = two.run(meanwhile)
    assert progress.state is State.COMPLETED, progress.why
    assert two.side.bytes_of("c") == [bytes(model)]


def test_read_mostly_copies_are_no_trouble() -> None:
    two = Two(kind=RegionType.MANAGED)
    two.memory.advise("c", two.va, 100 * KIB, Advice.SET_READ_MOSTLY)
    before = two.side.bytes_of("c")
    for at in (1, 2):
        two.memory.read("c", two.va, 100 * KIB, at)
    assert two.run().state is State.COMPLETED
    assert two.side.bytes_of("c") == before
    two.side.check()


def test_no_room_on_the_target_leaves_everything_as_it_was() -> None:
    two = Two(MIB, 128 * KIB)
    two.memory.store.pool = two.memory.store.swap = None
    before = two.side.bytes_of("c")
    progress = two.run()
    assert progress.state is State.FAILED
    assert "do not fit" in progress.why
    assert (two.pages_at(0), two.pages_at(1)) == (75, 0)
    assert two.side.bytes_of("c") == before
    assert not two.region.replicas
    assert two.memory.clients["c"].device == 0


def test_a_copy_that_is_not_the_same_stops_it() -> None:
    """A bit is wrong as it comes over."""
    two = Two()
    before = two.side.bytes_of("c")
    target, hit = two.memory.locations[1], list[int]()
    store_pages = target.store_pages

    def flip(frames: Frames, data: Bytes, at: int | None = None) -> None:
        store_pages(frames, data, at)
        if not hit:
            hit.append(int(frames[0]))
            target.hardware.memory[hit[0] * 2048 + 5] ^= 4  # type: ignore[attr-defined]

    target.store_pages = flip  # type: ignore[method-assign]
    progress = two.run()
    assert hit
    assert progress.state is State.FAILED
    assert "digest" in progress.why
    assert two.side.bytes_of("c") == before


def test_post_copy_brings_what_is_used_first_and_counts_how_long_it_took() -> None:
    two = Two()
    before = two.side.bytes_of("c")
    two.module.settings.strategy = Strategy.POSTCOPY
    two.module.settings.bandwidth_bytes_per_s = MIB
    seen = []

    def meanwhile() -> None:
        if two.memory.clients["c"].device == 1 and not seen:
            assert two.pages_at(0) > 60
            seen.append(two.memory.read("c", two.va + 70 * 4096, 8192))
            assert two.region.home[[70, 71]].tolist() == [1, 1]

    progress = two.run(meanwhile)
    assert progress.state is State.COMPLETED
    assert seen == [before[0][70 * 4096 : 72 * 4096]]
    waits = two.module.blocktime()
    assert waits["nr"] == 1
    assert waits["max"] > 0
    assert progress.downtime_ns < 10_000
    assert two.region.arrival is None


def test_cancel_drops_the_copies() -> None:
    two = Two()
    two.module.settings.bandwidth_bytes_per_s = MIB

    def meanwhile() -> None:
        if two.region.replicas:
            two.module.cancel()

    assert two.run(meanwhile).state is State.CANCELLED
    assert (two.pages_at(0), two.pages_at(1)) == (75, 0)
    assert not two.region.replicas
    assert not two.region.dirty_logs


def test_there_and_back() -> None:
    two = Two()
    before = two.side.bytes_of("c")
    assert two.run().state is State.COMPLETED
    assert two.run(text="client=c device=0").state is State.COMPLETED
    assert two.pages_at(0) == 75
    assert two.side.bytes_of("c") == before
    assert errno_of(two.module.start, "client=c device=0") == errno.EINVAL


def test_pages_too_large_for_the_target() -> None:
    side = Side("x", ManualClock(), MIB, 32 * KIB, pool=HostPool(MIB), swap=DictSwap(MIB))
    side.memory.write("c", side.memory.allocate("c", 64 * KIB, page_size=64 * KIB), b"x")
    progress = side.migration.migrate("client=c device=1")
    assert progress.state is State.FAILED
    assert "do not fit" in progress.why


# The arithmetic. Typed in anew here, from the recurrence, not from converge.py.


def by_hand(nr_all: int, ratio: float, first: float, stop: Callable[[int, float], bool]) -> tuple[int, float, float]:
    """(rounds, pages sent in all, pages of the last)."""
    pages, total, done = first, first, 1
    while True:
        pages = nr_all * (1 - math.exp(-ratio * pages / nr_all))
        total += pages
        if stop(done, pages):
            return done, total, pages
        done += 1


@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9, 1.1])
def test_the_prediction_is_the_recurrence(ratio: float) -> None:
    ahead = predict(1000, ratio * 500, 500, 0.05, 30)
    done, total, last = by_hand(1000, ratio, 1000, lambda done, pages: pages <= 25 or done >= 30)
    assert ahead.rounds == done
    assert (ahead.total_s, ahead.downtime_s) == pytest.approx((total / 500, last / 500))
    assert ahead.converges == (last <= 25)


def test_the_rate_is_found_again_from_what_it_dirties() -> None:
    rng = np.random.default_rng(1)
    nr_dirty = len(np.unique(rng.integers(0, 10_000, 3 * 700)))
    assert dirty_rate(10_000, nr_dirty, 3.0) == pytest.approx(700, rel=0.02)
    assert dirty_rate(10, 0, 1.0) == 0
    assert dirty_rate(10, 10, 1.0) > 100


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9, 1.1])
def test_between_devices_it_takes_less_than_the_recurrence_says(ratio: float) -> None:
    """What is written before its turn comes is not copied twice: a copy that nobody has dropped is still right."""
    two = Two(16 * MIB, 16 * MIB, size=512 * 4096)
    settings = two.module.settings
    settings.strategy, settings.auto_converge, settings.max_rounds = Strategy.PRECOPY, False, 8
    settings.bandwidth_bytes_per_s, settings.downtime_limit_ns = 500 * 4096, 200_000_000
    begin = two.memory.clock.now_ns()
    progress = two.run_beside_a_writer(ratio * 500)
    _, total, _ = by_hand(512, ratio, 512, lambda done, pages: pages <= 100 or done >= 8)
    assert progress.state is State.COMPLETED
    assert (progress.end_ns - begin) / 1e9 < 1.02 * total / 500


def test_the_brake_lets_so_many_pages_a_second_through() -> None:
    two = Two()
    source = LocalSource(two.memory, "c")
    source.start()
    source.throttle(50, 100.0)
    begin = two.memory.clock.now_ns()
    for page in range(20):
        two.memory.write("c", two.va + page * 4096, b"x")
    assert (two.memory.clock.now_ns() - begin) / 1e9 == pytest.approx(0.2, rel=0.01)
    assert isinstance(source.brake, Brake)
    source.stop()
