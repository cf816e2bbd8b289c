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
from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.migration.channel import Channel, Pipe
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.state import State
from dpud.gpu.migration.wire import Kind

STRATEGIES = [Strategy.AUTO, Strategy.PRECOPY, Strategy.POSTCOPY, Strategy.HYBRID, Strategy.STOP_AND_COPY]


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


# What is wrong on the way.


def frames_of_one(strategy: Strategy) -> int:
    """How many frames go each way in all."""
    world, nr = World(), [0]
    world.fill("c", 40 * KIB)
    world.a.migration.settings.strategy = strategy
    world.new_pipes = lambda: counted(nr, lambda _nr: False)
    world.run(world.start())
    return nr[0]


def counted(nr: list[int], lost) -> tuple[Channel, Channel]:  # type: ignore[no-untyped-def]
    """A connection that is cut before frame n of both directions together, where lost(n) says so."""
    ends = Pipe.pair()

    def send(end: Pipe):  # type: ignore[no-untyped-def]
        plain = end.send

        def counting(kind: Kind, payload: bytes = b"") -> None:
            if lost(nr[0]):
                for each in ends:
                    each.close()
            nr[0] += 1
            plain(kind, payload)

        return counting

    for end in ends:
        end.send = send(end)  # type: ignore[method-assign]
    return ends


@pytest.mark.parametrize("strategy", [Strategy.PRECOPY, Strategy.HYBRID])
def test_a_connection_lost_before_any_frame_leaves_one_owner(strategy: Strategy) -> None:
    for cut in range(frames_of_one(strategy)):
        world, nr = World(), [0]
        before = world.fill("c", 40 * KIB)
        world.a.migration.settings.strategy = strategy
        world.new_pipes = lambda nr=nr, cut=cut: counted(nr, lambda at: at == cut)  # type: ignore[misc]
        progress = world.run(world.start())
        owners = [side for side in (world.a, world.b) if side.has("c")]
        assert len(owners) == 1, (cut, progress)
        assert owners[0].bytes_of("c") == before
        assert (owners[0] is world.b) == (progress.state is State.COMPLETED)
        if owners[0] is world.a:
            assert not world.b.memory.clients.get("c") or world.b.migration.receiver.sessions
            assert world.run(world.start()).state is State.COMPLETED, "it can be begun anew"
            assert world.b.bytes_of("c") == before
        world.a.check()
        world.b.check()


def test_a_target_that_has_lost_everything_gives_it_back() -> None:
    """Killed after it became the owner, before it could say so."""
    world = World()
    before = world.fill("c", 40 * KIB)
    pipes: list[tuple[Pipe, Pipe]] = []

    def new_pipes() -> tuple[Channel, Channel]:
        pipes.append(Pipe.pair())
        return pipes[-1]

    world.new_pipes = new_pipes
    receiver = world.b.migration.receiver

    def before_step(step: str) -> None:
        if step == "owned":
            pipes[0][0].close()
            receiver.sessions.clear()  # what a process has that was killed

    receiver.before_step = before_step
    progress = world.run(world.start())
    assert progress.state is State.FAILED
    assert "lost the pages" in progress.why
    assert world.a.bytes_of("c") == before


def in_doubt() -> World:
    """Everything is prepared; the source's connection is cut before it hands over, and it never comes back."""
    world = World()
    world.fill("c", 40 * KIB)
    pipes: list[tuple[Pipe, Pipe]] = []

    def new_pipes() -> tuple[Channel, Channel]:
        pipes.append(Pipe.pair())
        return pipes[-1]

    world.new_pipes = new_pipes
    world.b.migration.receiver.before_step = lambda step: pipes[0][0].close() if step == "prepared" else None
    world.run(world.start())
    (session,) = world.b.migration.receiver.sessions.values()
    assert not world.b.has("c")
    assert errno_of(world.b.migration.decide, session.id) == errno.EINVAL
    assert errno_of(world.b.migration.decide, "nothing own") == errno.ENOENT
    return world


def test_what_is_in_doubt_is_taken_over_by_hand() -> None:
    world = in_doubt()
    (id,) = world.b.migration.receiver.sessions
    expected = world.a.bytes_of("c")
    world.b.migration.decide(f"{id} own")
    assert world.b.bytes_of("c") == expected
    assert errno_of(world.b.migration.decide, f"{id} drop") == errno.EBUSY


def test_what_is_in_doubt_is_dropped_by_hand() -> None:
    world = in_doubt()
    (id,) = world.b.migration.receiver.sessions
    world.b.migration.decide(f"{id} drop")
    assert world.b.memory.clients == {}
    world.b.check()


def test_a_mistake_of_ours_ends_it_and_holds_nobody() -> None:
    world = World()
    before = world.fill("c", 40 * KIB)
    world.b.migration.receiver.before_step = lambda step: 1 // 0 if step == "prepare" else None  # type: ignore[arg-type]
    progress = world.run(world.start())
    assert progress.state is State.FAILED
    assert world.a.bytes_of("c") == before
    assert world.b.memory.clients == {}
    world.b.migration.receiver.before_step = lambda step: None
    migration = world.start()
    migration.target.prepare = lambda missing: 1 // 0  # type: ignore[assignment, method-assign, return-value]
    progress = world.run(migration)
    assert (progress.state, progress.why) == (State.FAILED, "ZeroDivisionError: integer division or modulo by zero")
    assert world.a.bytes_of("c") == before


def test_into_a_memory_that_is_smaller_than_the_client() -> None:
    """What there is no room for goes behind the device, as if the client had written it there."""
    world = World(target_bytes=128 * KIB)
    before = world.fill()
    assert world.run(world.start()).state is State.COMPLETED
    assert world.b.memory.clients["c"].regions[0].count(PageState.STORED) > 20
    assert world.b.bytes_of("c") == before
    world.b.check()


def test_memory_that_is_freed_over_there_in_post_copy() -> None:
    world = World()
    world.fill("c", 100 * KIB, 100 * KIB)
    before = world.a.bytes_of("c")
    world.a.migration.settings.strategy = Strategy.POSTCOPY
    world.a.migration.settings.bandwidth_bytes_per_s = MIB

    def meanwhile() -> None:
        if world.b.has("c") and len(world.b.memory.clients["c"].regions) == 2:
            world.b.memory.free(world.b.memory.clients["c"].regions[1].va, "c")

    assert world.run(world.start(), meanwhile).state is State.COMPLETED
    assert world.b.bytes_of("c") == before[:1]
    world.b.check()


def test_there_is_no_room() -> None:
    world = World(target_bytes=64 * KIB)
    world.b.memory.store.pool = world.b.memory.store.swap = None
    before = world.fill()
    progress = world.run(world.start())
    assert progress.state is State.FAILED
    assert world.a.bytes_of("c") == before
    assert world.b.memory.clients == {}
    assert world.b.memory.locations[0].frames.nr_free == world.b.memory.locations[0].frames.nr_frames
    world.b.check()


def test_a_client_of_that_name_is_there() -> None:
    world = World()
    world.fill()
    world.b.memory.allocate("c", 4096)
    progress = world.run(world.start())
    assert (progress.state, progress.why) == (State.FAILED, "refused: there is a client c already")
    assert len(world.b.memory.clients["c"].regions) == 1


def test_memory_that_is_freed_meanwhile_ends_it() -> None:
    world = World()
    world.fill("c", 100 * KIB, 100 * KIB)
    world.a.migration.settings.bandwidth_bytes_per_s = MIB
    migration = world.start()
    gone = []

    def meanwhile() -> None:
        if migration.progress.moved_pages > 10 and not gone:
            gone.append(world.a.memory.clients["c"].regions[1].va)
            world.a.memory.free(gone[0], "c")

    progress = world.run(migration, meanwhile)
    assert progress.state is State.FAILED
    assert "allocated or freed" in progress.why
    assert world.b.memory.clients == {}
    assert len(world.a.bytes_of("c")) == 1


def test_cancel_stays() -> None:
    world = World()
    before = world.fill()
    world.a.migration.settings.bandwidth_bytes_per_s = MIB
    migration = world.start()

    def meanwhile() -> None:
        if migration.progress.moved_pages > 10 and migration.progress.state is State.ACTIVE:
            world.a.migration.cancel()

    assert world.run(migration, meanwhile).state is State.CANCELLED
    assert world.a.bytes_of("c") == before
    assert world.b.memory.clients == {}
    assert errno_of(world.a.migration.cancel) == errno.ESRCH
    assert world.run(world.start()).state is State.COMPLETED


def test_while_it_is_handed_over_nobody_uses_it() -> None:
    world = World()
    world.fill()
    world.a.migration.settings.strategy = Strategy.STOP_AND_COPY
    world.a.migration.settings.bandwidth_bytes_per_s = MIB
    va = world.a.memory.clients["c"].regions[0].va
    refused = []

    def meanwhile() -> None:
        try:
            world.a.memory.read("c", va, 1)
        except GpuError as error:
            refused.append(error.errno)

    world.run(world.start(), meanwhile)
    assert refused.count(errno.EBUSY) > 3
    assert set(refused) <= {errno.EBUSY, errno.EFAULT}


def test_it_comes_back_again() -> None:
    """a to b to a, over the same names."""
    world = World()
    before = world.fill()
    assert world.run(world.start()).state is State.COMPLETED
    world.a, world.b = world.b, world.a
    assert world.run(world.start()).state is State.COMPLETED
    assert world.b.bytes_of("c") == before


def test_what_start_takes() -> None:
    world = World()
    start = world.a.migration.start
    world.a.memory.client("empty")
    world.fill()
    wrong = {
        "": errno.EINVAL,
        "client=c": errno.EINVAL,
        "client=c device=0 to=unix:/x": errno.EINVAL,
        "client=c device=0": errno.EINVAL,
        "client=c device=9": errno.EINVAL,
        "client=c device=x": errno.EINVAL,
        "client=c to=pigeon:": errno.EINVAL,
        "client=c to=unix:relative": errno.EINVAL,
        "client=c to=tcp:host:99999": errno.EINVAL,
        "client=c client=c device=1": errno.EINVAL,
        "client=nobody to=unix:/x": errno.ENOENT,
        "client=empty to=unix:/x": errno.ENODATA,
    }
    assert {text: errno_of(start, text) for text in wrong} == wrong
    start("client=c to=unix:/x")
    assert errno_of(start, "client=c to=unix:/x") == errno.EBUSY
    assert isinstance(world.clock, ManualClock)
