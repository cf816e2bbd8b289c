# SPDX-License-Identifier: GPL-2.0-only
"""From one memory to another, and what is wrong on the way: there is always one owner, and nothing is half done."""

import errno

import pytest
from migrating import World
from small import KIB, MIB, errno_of

from dpud.gpu.address_space.regions import PageState
from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.migration.channel import Channel, Pipe
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.state import State
from dpud.gpu.migration.wire import Kind


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


@pytest.mark.slow
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
