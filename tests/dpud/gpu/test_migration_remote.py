# SPDX-License-Identifier: GPL-2.0-only
"""From one memory to another: bytes, strategies, what is wrong on the way, who owns what."""

import errno
import math

import numpy as np
import pytest
from migrating import World, together, uniform_writer
from small import KIB, MIB, errno_of

from dpud.gpu.address_space.permissions import READ, Permission
from dpud.gpu.address_space.regions import PageState, RegionType
from dpud.gpu.migration.channel import Channel, Pipe
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.state import State

STRATEGIES = [Strategy.AUTO, Strategy.PRECOPY, Strategy.POSTCOPY, Strategy.HYBRID, Strategy.STOP_AND_COPY]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("compression", ["none", "lz4", "adaptive"])
def test_every_strategy_brings_every_byte(strategy: Strategy, compression: str) -> None:
    world = World()
    before = world.fill("c", 300 * KIB, 70_000)
    world.a.migration.settings.strategy = strategy
    world.a.migration.compression = compression
    progress = world.run(world.start())
    assert progress.state is State.COMPLETED, progress.why
    assert world.b.bytes_of("c") == before
    assert world.a.memory.clients["c"].regions == []
    assert progress.digest == world.b.migration.receiver.history[0].digest
    world.a.check()
    world.b.check()


@pytest.mark.slow
@pytest.mark.parametrize("page", [2 * KIB, 4 * KIB, 64 * KIB])
@pytest.mark.parametrize("kind", list(RegionType))
def test_kinds_pages_and_permissions_come_along(page: int, kind: RegionType) -> None:
    world = World()
    va = world.a.memory.allocate("c", 3 * page, kind, page_size=page, priority=7)
    world.a.memory.write("c", va + page, b"x" * page)
    world.a.memory.protect("c", va, page, READ)
    assert world.run(world.start()).state is State.COMPLETED
    (region,) = world.b.memory.clients["c"].regions
    assert (region.type, region.page_bytes, region.nr_bytes, region.priority) == (kind, page, 3 * page, 7)
    rights = [Permission(int(bits)) for bits in region.permissions["c"]]
    assert rights == [READ, READ | Permission.WRITE, READ | Permission.WRITE]
    assert world.b.memory.read("c", region.va, 3 * page) == bytes(page) + b"x" * page + bytes(page)
    assert errno_of(world.b.memory.write, "c", region.va, b"no") == errno.EACCES


def test_pages_in_pool_and_swap_and_lost_ones() -> None:
    world = World()
    before = world.fill()
    memory, region = world.a.memory, world.a.memory.clients["c"].regions[0]
    memory.evict(MIB)
    assert region.count(PageState.STORED) > 50
    swap = memory.store.swap
    memory.store.demote(100 * KIB)
    torn = next(iter(swap.blobs))
    swap.torn.add(torn)
    assert world.run(world.start()).state is State.COMPLETED
    (there,) = world.b.memory.clients["c"].regions
    page = torn - region.first_key
    lost = there.va + page * 4096
    assert errno_of(world.b.memory.read, "c", lost, 1) == errno.EIO
    world.b.memory.write("c", lost, before[0][page * 4096 : (page + 1) * 4096])
    assert world.b.bytes_of("c") == before
    world.b.check()


def test_the_client_writes_meanwhile_and_nothing_of_it_is_missed() -> None:
    """What is there afterwards is what the client wrote last, page by page."""
    world = World()
    world.fill()
    memory, region = world.a.memory, world.a.memory.clients["c"].regions[0]
    settings = world.a.migration.settings
    settings.strategy, settings.bandwidth_bytes_per_s, settings.downtime_limit_ns = Strategy.PRECOPY, 4 * MIB, 4_000_000
    migration = world.start()
    write = uniform_writer(memory, "c", 300.0, np.random.default_rng(3))
    model = bytearray(memory.read("c", region.va, region.nr_bytes))

    def meanwhile() -> None:
        write()
        if not region.held and not region.released:
            model[:] = memory.read("c", region.va, region.nr_bytes)

    progress = world.run(migration, meanwhile)
    assert progress.state is State.COMPLETED, progress.why
    assert progress.rounds > 1
    assert world.b.bytes_of("c") == [bytes(model)]


def test_what_is_sent_again_is_sent_as_a_difference() -> None:
    world = World()
    world.fill()
    region = world.a.memory.clients["c"].regions[0]
    settings = world.a.migration.settings
    settings.strategy, settings.bandwidth_bytes_per_s, settings.downtime_limit_ns = Strategy.PRECOPY, 4 * MIB, 4_000_000
    migration = world.start()
    write = uniform_writer(world.a.memory, "c", 300.0, np.random.default_rng(3))
    world.run(migration, write)
    encoder = migration.target.encoder  # type: ignore[attr-defined]
    again = migration.progress.moved_pages - region.nr_pages * 3 // 4
    assert again >= encoder.nr_delta > 8  # the others were zeros before
    assert migration.progress.moved_bytes < region.nr_bytes * 3 // 4 + 40 * region.nr_pages + 200 * again


@pytest.mark.slow
def test_a_writer_that_is_too_fast_makes_auto_switch_first() -> None:
    world = World()
    world.fill()
    settings = world.a.migration.settings
    settings.bandwidth_bytes_per_s, settings.downtime_limit_ns = MIB, 10_000_000
    migration = world.start()
    write = uniform_writer(world.a.memory, "c", 2000.0, np.random.default_rng(3))
    progress = world.run(migration, write)
    assert progress.state is State.COMPLETED, progress.why
    assert progress.strategy is Strategy.HYBRID
    assert "pre-copy would end with" in progress.why
    assert progress.downtime_ns <= 10_000_000


@pytest.mark.slow
def test_auto_converge_slows_the_writer_until_it_fits() -> None:
    world = World()
    world.fill()
    settings = world.a.migration.settings
    settings.strategy, settings.bandwidth_bytes_per_s, settings.downtime_limit_ns = Strategy.PRECOPY, MIB, 30_000_000
    world.a.migration.compression, world.a.migration.cache_bytes = "none", 0
    migration = world.start()
    brake = migration.source.brake  # type: ignore[attr-defined]
    progress = world.run(migration, uniform_writer(world.a.memory, "c", 400.0, np.random.default_rng(3), brake))
    assert progress.state is State.COMPLETED
    assert progress.throttle_percent >= 20
    assert progress.rounds < settings.max_rounds
    assert progress.downtime_ns < 40_000_000


WIRE_BYTES = 4096 + 28
"""Of a page of 4 KiB that is not compressed: encoding.py's record and the page."""


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9, 1.1])
def test_it_takes_what_the_recurrence_says(ratio: float) -> None:
    """Total time, pages and bytes within 2 percent; the recurrence is typed in anew here. (`dpud bench gpu migration`
    has more pages, and holds the downtime to 2 percent too.)"""
    nr_pages, sending, max_rounds = 2048, 2000.0, 6
    world = World(source_bytes=16 * MIB, target_bytes=16 * MIB)
    world.a.memory.write("c", world.a.memory.allocate("c", nr_pages * 4096), world.rng.bytes(nr_pages * 4096))
    module, settings = world.a.migration, world.a.migration.settings
    module.compression, module.cache_bytes = "none", 0
    settings.strategy, settings.auto_converge, settings.max_rounds = Strategy.PRECOPY, False, max_rounds
    settings.bandwidth_bytes_per_s = int(sending * WIRE_BYTES)
    settings.downtime_limit_ns = int(0.25 * nr_pages / sending * 1e9)
    migration = world.start()
    progress = world.run(migration, uniform_writer(world.a.memory, "c", ratio * sending, np.random.default_rng(11)))
    pages, total, done = float(nr_pages), float(nr_pages), 0
    while done == 0 or (pages > 0.25 * nr_pages and done < max_rounds):
        pages = nr_pages * (1 - math.exp(-ratio * pages / nr_pages))
        total, done = total + pages, done + 1
    assert progress.state is State.COMPLETED
    assert progress.rounds == done
    assert (progress.end_ns - progress.begin_ns) / 1e9 == pytest.approx(total / sending, rel=0.02)
    assert progress.moved_pages == pytest.approx(total, rel=0.02)
    assert progress.moved_bytes == pytest.approx(total * WIRE_BYTES, rel=0.02)
    assert progress.downtime_ns / 1e9 == pytest.approx(pages / sending, rel=0.04)  # 3 sigma of so few pages


# Post-copy.


def test_a_page_that_somebody_waits_for_comes_first() -> None:
    world = World()
    before = world.fill()
    settings = world.a.migration.settings
    settings.strategy, settings.bandwidth_bytes_per_s = Strategy.POSTCOPY, MIB
    migration = world.start()
    seen: dict[str, object] = {}
    receiver = world.b.migration.receiver

    def reader():  # type: ignore[no-untyped-def]
        while not world.b.has("c"):
            yield None
        region = world.b.memory.clients["c"].regions[0]
        assert errno_of(world.b.memory.read, "c", region.va + 40 * 4096, 10) == errno.EAGAIN
        yield from world.b.migration.pass_gate(region, 40 * 4096, 10, False)
        seen["data"] = world.b.memory.read("c", region.va + 40 * 4096, 10)
        seen["missing"] = receiver.sessions[migration.progress.id].nr_missing

    together(migration.run(), world.serve(), reader())
    assert migration.progress.state is State.COMPLETED
    assert seen["data"] == before[0][40 * 4096 : 40 * 4096 + 10]
    assert isinstance(seen["missing"], int)
    assert seen["missing"] > 10
    assert world.b.migration.blocktime()["nr"] == 1
    assert world.b.migration.blocktime()["max"] > 0
    assert migration.progress.postcopy_requests >= 1
    assert world.b.bytes_of("c") == before


def test_a_page_that_is_overwritten_need_not_come() -> None:
    world = World()
    before = bytearray(world.fill()[0])
    world.a.migration.settings.strategy = Strategy.POSTCOPY
    world.a.migration.settings.bandwidth_bytes_per_s = MIB
    migration = world.start()
    wrote = []

    def meanwhile() -> None:
        if not wrote and world.b.has("c"):
            region = world.b.memory.clients["c"].regions[0]
            world.b.memory.write("c", region.va + 50 * 4096, b"n" * 8192)
            wrote.append(True)

    world.run(migration, meanwhile)
    assert wrote
    before[50 * 4096 : 52 * 4096] = b"n" * 8192
    assert world.b.bytes_of("c") == [bytes(before)]
    world.b.check()


def test_post_copy_goes_on_after_the_connection_was_lost() -> None:
    world = World()
    before = world.fill()
    world.a.migration.settings.strategy = Strategy.POSTCOPY
    pipes = []

    def new_pipes() -> tuple[Channel, Channel]:
        pipes.append(Pipe.pair())
        return pipes[-1]

    world.new_pipes = new_pipes
    migration = world.start()
    states = set()

    def meanwhile() -> None:
        states.add((migration.progress.state, *(each.state for each in world.b.migration.receiver.history)))
        session = world.b.migration.receiver.sessions.get(migration.progress.id)
        if session is not None and 0 < session.nr_missing < 40 and len(pipes) == 1:
            pipes[0][0].close()

    progress = world.run(migration, meanwhile)
    assert progress.state is State.COMPLETED, progress.why
    assert len(pipes) == 2
    assert State.POSTCOPY_PAUSED in {state for _, state in progress.history}
    assert world.b.bytes_of("c") == before
