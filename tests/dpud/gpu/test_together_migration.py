# SPDX-License-Identifier: GPL-2.0-only
"""Migration together with what else goes on: broken memory, limits, checkpoints, swap, defragmentation."""

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from migrating import Side, World, together
from small import KIB, MIB, attempt, small_memory

from dpud.gpu.address_space.regions import PageState, RegionType
from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock, PacedClock
from dpud.gpu.compression.pool import CompressedPool
from dpud.gpu.defrag.module import DefragModule
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.recovery import Policy
from dpud.gpu.memory import GpuMemory
from dpud.gpu.migration import MigrationModule
from dpud.gpu.migration.client_pages import read_pages
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.receiver import Phase
from dpud.gpu.migration.state import State
from dpud.gpu.qos import QosModule
from dpud.gpu.store import Place
from dpud.gpu.system import GpuConfig, build
from kernelsim.operation import Operation

SIZE = 300 * KIB
NS_PER_MS = 1_000_000


def at_step(number: int, act: Callable[[], object]) -> Callable[[], None]:
    """Act once, in the turn of that number."""
    turns = iter(range(1_000_000))

    def step() -> None:
        if next(turns) == number:
            act()

    return step


# Between two devices, one of which is lost.


class Three:
    """A client on the first of three devices, with a checkpoint or without."""

    def __init__(self, folder: Path, checkpoint: bool) -> None:
        self.side = Side("x", ManualClock(), MIB, MIB, MIB)
        self.memory, self.module = self.side.memory, self.side.migration
        self.fault = FaultModule(self.memory, None, folder)
        self.fault.failover.spare = 2
        self.va = self.memory.allocate("c", SIZE)
        self.data = np.random.default_rng(3).bytes(SIZE)
        self.memory.write("c", self.va, self.data)
        if checkpoint:
            self.fault.checkpoints.create("c")

    def migrate(self, strategy: Strategy, lost: int, when: int) -> State:
        self.module.settings.strategy = strategy
        migration = self.module.start("client=c device=1")
        lose = at_step(when, lambda: self.fault.lose(self.memory.locations[lost]))
        together(migration.run(), _for_ever(lose))
        self.side.check()
        return migration.progress.state

    def pages(self) -> list[bytes | None]:
        """Each page's bytes; None for one that is lost."""
        found: list[bytes | None] = []
        for at in range(0, SIZE, 4 * KIB):
            number = attempt(lambda at=at: found.append(self.memory.read("c", self.va + at, 4 * KIB, 3)))
            if number:
                assert number == errno.EIO
                found.append(None)
        return found


def _for_ever(step: Callable[[], object]) -> Operation[None]:
    while True:
        step()
        yield None


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 1, 3, 5])
@pytest.mark.parametrize("strategy", [Strategy.PRECOPY, Strategy.POSTCOPY, Strategy.STOP_AND_COPY])
def test_the_old_device_is_lost(strategy: Strategy, when: int, tmp_path: Path) -> None:
    """The checkpoint is as the client is, so no byte is lost, wherever the client ends up."""
    three = Three(tmp_path, checkpoint=True)
    state = three.migrate(strategy, 0, when)
    assert b"".join(page or b"" for page in three.pages()) == three.data
    device = three.memory.clients["c"].device
    assert (state, device) in ((State.FAILED, 2), (State.COMPLETED, 1), (State.COMPLETED, 2))


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 1, 3, 5])
@pytest.mark.parametrize("strategy", [Strategy.PRECOPY, Strategy.POSTCOPY, Strategy.STOP_AND_COPY])
def test_the_new_device_is_lost(strategy: Strategy, when: int, tmp_path: Path) -> None:
    """Without a checkpoint: before the switch nothing is lost; after it, what had come over and is nowhere else."""
    three = Three(tmp_path, checkpoint=False)
    state = three.migrate(strategy, 1, when)
    pages, expected = three.pages(), [three.data[at : at + 4 * KIB] for at in range(0, SIZE, 4 * KIB)]
    assert all(page is None or page == right for page, right in zip(pages, expected, strict=True))
    if state is State.FAILED:
        assert pages == expected
        assert three.memory.clients["c"].device == 0
    assert three.memory.clients["c"].device != 1 or not three.memory.locations[1].is_lost


# Between two daemons.


class Broken(World):
    """Both sides have faults."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.faults = [FaultModule(side.memory, None, folder / name) for name, side in (("a", self.a), ("b", self.b))]

    @property
    def left(self) -> FaultModule:
        return self.faults[0]

    @property
    def right(self) -> FaultModule:
        return self.faults[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Strategy.PRECOPY, Strategy.HYBRID])
def test_the_source_s_device_is_lost_and_its_pages_come_from_a_checkpoint(strategy: Strategy, tmp_path: Path) -> None:
    world = Broken(tmp_path)
    before = world.fill()
    world.left.checkpoints.create("c")
    world.a.migration.settings.strategy = strategy
    device = world.a.memory.locations[0]
    progress = world.run(world.start(), at_step(3, lambda: world.left.lose(device)))
    assert progress.state is State.COMPLETED, progress.why
    assert world.b.bytes_of("c") == before
    world.a.check()
    world.b.check()


def test_what_the_source_loses_is_lost_over_there_too_and_nothing_else(tmp_path: Path) -> None:
    world = Broken(tmp_path)
    (data,) = world.fill()
    page = world.a.memory.clients["c"].regions[0].va + 16 * KIB

    def break_it() -> None:
        world.left.inject(f"bit bits=2 va={page:#x}")
        assert attempt(world.a.memory.read, "c", page, 1) == errno.EIO

    progress = world.run(world.start(), at_step(4, break_it))
    assert progress.state is State.COMPLETED, progress.why
    (region,) = world.b.memory.clients["c"].regions
    assert np.flatnonzero(region.state == PageState.CORRUPT).tolist() == [4]
    assert world.b.memory.read("c", region.va, 16 * KIB) == data[: 16 * KIB]
    assert world.b.memory.read("c", region.va + 20 * KIB, SIZE - 20 * KIB) == data[20 * KIB :]
    assert progress.digest == world.b.migration.receiver.history[0].digest


@pytest.mark.slow
@pytest.mark.parametrize("phase", [Phase.RECEIVING, Phase.PREPARED])
@pytest.mark.parametrize("how", ["device", "bit"])
def test_what_breaks_over_there_before_the_switch_stops_it(how: str, phase: Phase, tmp_path: Path) -> None:
    """Bytes that were there, and hashed, are gone again: the source has to notice, for it has them."""
    world = Broken(tmp_path)
    before = world.fill()
    world.a.migration.settings.bandwidth_bytes_per_s = MIB
    came, done = world.b.memory.locations[0], list[Phase]()

    def break_it() -> None:
        for session in world.b.migration.receiver.sessions.values():
            if session.phase is phase and session.progress.moved_pages > 30 and not done:
                done.append(session.phase)
                world.right.inject("device" if how == "device" else "bit bits=2 nr=3")

    progress = world.run(world.start(), break_it)
    assert done
    assert progress.state is State.FAILED
    assert world.a.bytes_of("c") == before
    assert not world.b.has("c")
    world.a.check()
    world.b.check()
    world.right.reset(came)
    assert world.run(world.start()).state is State.COMPLETED
    assert world.b.bytes_of("c") == before


def test_who_is_held_does_not_go_back(tmp_path: Path) -> None:
    """Half of it is over there already: a step back here would mix two times."""
    world = Broken(tmp_path)
    world.fill()
    world.left.checkpoints.create("c")
    (region,) = world.a.memory.clients["c"].regions
    world.a.memory.write("c", region.va, b"newer" * 1000)
    world.left.recovery.policy = Policy.RESTORE
    (newer,) = world.a.bytes_of("c")
    world.a.migration.settings.strategy = Strategy.STOP_AND_COPY
    tried = []

    def try_it() -> None:
        if region.held and not region.released and len(tried) < 3:
            tried.append(world.left.roll_back("c"))

    assert world.run(world.start(), try_it).state is State.COMPLETED
    assert tried == [False] * 3
    assert world.b.bytes_of("c") == [newer]
    assert world.left.checkpoints.last("c") is None  # its memory is elsewhere


def test_a_step_back_in_mid_migration_goes_over_whole(tmp_path: Path) -> None:
    """What was not there at the checkpoint reads as zeros again, on the other side too."""
    world = Broken(tmp_path)
    va = world.a.memory.allocate("c", SIZE)
    world.a.memory.write("c", va, b"then" * 1000)
    world.left.checkpoints.create("c")
    world.a.memory.write("c", va, np.random.default_rng(2).bytes(SIZE))
    world.a.migration.settings.strategy = Strategy.PRECOPY
    world.a.migration.settings.bandwidth_bytes_per_s = MIB
    back = at_step(8, lambda: world.left.roll_back("c"))
    assert world.run(world.start(), back).state is State.COMPLETED
    assert world.left.stats()["rollbacks"] == 1
    assert world.b.bytes_of("c") == [b"then" * 1000 + bytes(SIZE - 4000)]


# Limits.


class Paced:
    """A daemon's clock that the test moves, and a client of 12 MiB that may move 10 MB/s."""

    limit, size = 10_000_000, 12 * MIB

    def __init__(self, folder: Path | None = None) -> None:
        self.real_ns = 0
        clock = PacedClock(lambda: self.real_ns)
        self.memory = small_memory(16 * MIB, 16 * MIB, clock=clock)
        MigrationModule().attach(self.memory)
        self.fault = FaultModule(self.memory, None, folder)
        self.va = self.memory.allocate("c", self.size)
        self.memory.write("c", self.va, np.random.default_rng(1).bytes(self.size))
        self.qos = QosModule(clock)
        self.qos.attach(self.memory)
        self.qos.set_client("c", limit=self.limit, burst=64 * KIB)

    def took_ms(self, operation: Operation[object]) -> float:
        """A millisecond passes wherever it waits."""
        begin_ns = self.real_ns
        while (step := next(operation, StopIteration)) is not StopIteration:
            self.real_ns += NS_PER_MS if step is not None else 0
        return (self.real_ns - begin_ns) / NS_PER_MS

    def expected_ms(self, at_once: int) -> float:
        """The last piece goes as soon as the one before it is paid for."""
        return 1000 * (self.size - at_once) / self.limit


@pytest.mark.slow
def test_a_client_s_limit_holds_for_its_migration() -> None:
    """It waits while it moves: nothing is owed behind it, but for its last piece, which the client waits for."""
    paced = Paced()
    migration = paced.memory.migration.start("client=c device=1")
    assert paced.took_ms(migration.run()) == pytest.approx(paced.expected_ms(MIB), rel=0.1)
    assert migration.progress.state is State.COMPLETED
    assert paced.qos.scheduler.counts["owed"] == 0
    assert paced.took_ms(paced.qos.admission("c", 4 * KIB)) <= 1000 * 1.1 * MIB / paced.limit


@pytest.mark.slow
def test_and_for_its_checkpoints(tmp_path: Path) -> None:
    paced = Paced(tmp_path)
    took_ms = paced.took_ms(paced.fault.checkpoints.creation("c"))
    assert took_ms == pytest.approx(paced.expected_ms(4 * MIB), rel=0.1)
    assert paced.qos.scheduler.counts["owed"] == 0
    assert violations(paced.memory) == []


# Pages in the pool and in swap.


class Built(Side):
    """With the pool, the tiers, and all else that a daemon has."""

    def __init__(self, name: str, clock: ManualClock, folder: Path) -> None:
        config = GpuConfig(
            device_bytes=MIB,
            host_bytes=4 * MIB,
            pool_bytes=512 * KIB,
            tiers={"memory": 8 * MIB},
            checkpoint_folder=folder,
        )
        self.memory: GpuMemory = build(config, clock)
        self.migration = self.memory.migration
        ids = iter(range(1, 1000))
        self.migration._new_id = lambda: f"{name}{next(ids)}"


@pytest.mark.slow
def test_a_checkpoint_of_compressed_and_swapped_pages_in_mid_migration(tmp_path: Path) -> None:
    world = World(target_bytes=4 * MIB)
    world.a = Built("a", world.clock, tmp_path)
    memory, size, rng = world.a.memory, 3 * MIB, np.random.default_rng(9)
    va = memory.allocate("c", size)
    memory.write("c", va, b"".join(rng.bytes(16 * KIB) + bytes(range(256)) * 64 for _ in range(size // (32 * KIB))))
    (region,) = memory.clients["c"].regions
    places = {memory.store.place(region.first_key + page) for page in range(region.nr_pages)}
    assert places == {None, Place.POOL, Place.SWAP}
    assert isinstance(memory.store.pool, CompressedPool)
    then: list[bytes] = []
    nr_stored: list[int] = []

    def meanwhile() -> None:
        if not region.held and not region.released:
            memory.write("c", va + int(rng.integers(size - 64)), rng.bytes(64))

    def checkpoint() -> None:
        nr_stored.append(region.count(PageState.STORED))
        memory.fault.checkpoints.create("c")
        nr_stored.append(region.count(PageState.STORED))
        then.append(memory.read("c", va, size))

    shadow: list[bytes] = []
    migration = world.start()

    def both() -> None:
        meanwhile()
        if not then and migration.progress.moved_pages > 300 and not region.held:
            checkpoint()
        if region.held and not shadow:
            shadow.extend(row.tobytes() for row in _all_bytes(memory))

    world.a.migration.settings.strategy = Strategy.PRECOPY
    progress = world.run(migration, both)
    assert progress.state is State.COMPLETED, progress.why
    assert nr_stored[0] == nr_stored[1] > 400
    assert world.b.bytes_of("c") == shadow
    other = small_memory(4 * MIB)
    restored = FaultModule(other, None, tmp_path)
    restored.checkpoints._codec = memory.fault.checkpoints._codec
    restored.checkpoints.restore("c")
    (again,) = other.clients["c"].regions
    assert other.read("c", again.va, size) == then[0]
    world.b.check()


def _all_bytes(memory: GpuMemory) -> list[np.ndarray]:  # type: ignore[type-arg]
    """Of the client, past whoever holds it."""
    return [read_pages(memory, region, np.arange(region.nr_pages))[0] for region in memory.clients["c"].regions]


# Defragmentation.


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Strategy.POSTCOPY, Strategy.HYBRID])
def test_frames_are_put_together_over_there_while_pages_come(strategy: Strategy) -> None:
    """In post-copy the client runs there already, and writes; its neighbour's pages lie scattered."""
    world = World(target_bytes=MIB)
    defrag = DefragModule(interval_s=0)
    defrag.attach(world.b.memory)
    neighbour = world.b.memory
    vas = [neighbour.allocate("n", 4 * KIB) for _ in range(120)]
    data = [np.random.default_rng(nr).bytes(4 * KIB) for nr in range(120)]
    for va, page in zip(vas, data, strict=True):
        neighbour.write("n", va, page)
    for va in vas[::2]:
        neighbour.free(va)
    (before,) = world.fill()
    shadow, written = bytearray(before), 0
    world.a.migration.settings.strategy = strategy

    def meanwhile() -> None:
        nonlocal written
        defrag.order = 4
        defrag.run(0.0)
        there = neighbour.clients.get("c")
        if there is not None and there.regions and not there.regions[0].held and written < 20:
            at, new = written * 8 * KIB, bytes([written]) * 4 * KIB
            neighbour.write("c", there.regions[0].va + at, new)  # all of a page: it need not have come
            shadow[at : at + len(new)] = new
            written += 1

    progress = world.run(world.start(), meanwhile)
    assert progress.state is State.COMPLETED, progress.why
    assert written > 3
    assert defrag.relocator.stats["pages_moved"] > 20
    assert world.b.bytes_of("c") == [bytes(shadow)]
    assert [neighbour.read("n", va, 4 * KIB) for va in vas[1::2]] == data[1::2]
    world.b.check()


@pytest.mark.slow
def test_managed_memory_under_swap_pressure_and_defragmentation_between_devices() -> None:
    """The target is as good as full, so copies are taken back, blocks are moved, and pages go to swap meanwhile."""
    side = Side("x", ManualClock(), MIB, 512 * KIB)
    memory, rng = side.memory, np.random.default_rng(7)
    DefragModule(interval_s=0).attach(memory)
    full = memory.allocate("n", 480 * KIB, device=1)
    noise = rng.bytes(480 * KIB)
    memory.write("n", full, noise)
    va = memory.allocate("c", 700 * KIB, RegionType.MANAGED)
    shadow = bytearray(rng.bytes(700 * KIB))
    memory.write("c", va, bytes(shadow))
    (region,) = memory.clients["c"].regions

    def meanwhile() -> None:
        if region.held:
            return
        at, new = int(rng.integers(699 * KIB)), rng.bytes(600)
        memory.write("c", va + at, new)
        shadow[at : at + 600] = new
        memory.defrag.order = int(rng.integers(2, 6))
        memory.defrag.run(0.0)
        assert memory.read("n", full, 4 * KIB) == noise[: 4 * KIB]

    side.migration.settings.strategy = Strategy.PRECOPY
    side.migration.settings.bandwidth_bytes_per_s = 200 * MIB
    migration = side.migration.start("client=c device=1")
    together(migration.run(), _for_ever(meanwhile))
    assert migration.progress.state is State.COMPLETED, migration.progress.why
    assert memory.residency.events["evicted"] + memory.residency.events["evicted_copies"] > 50
    assert memory.read("c", va, len(shadow)) == shadow
    assert memory.read("n", full, len(noise)) == noise
    side.check()
