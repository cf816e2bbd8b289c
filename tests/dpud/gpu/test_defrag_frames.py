# SPDX-License-Identifier: GPL-2.0-only
"""Pages that move within a memory: who may move, where to, what stays true; and pages put side by side."""

import errno

import numpy as np
import pytest
from small import KIB, MIB, attempt, small_memory

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.frames import FREE, FramePool
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.address_space.usage import Longs
from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.defrag.blocks import LOOK_PAGES, fits
from dpud.gpu.defrag.module import DefragModule
from dpud.gpu.dirty import DirtyLog
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.memory import HOST, GpuMemory
from dpud.gpu.qos import QosModule
from dpud.gpu.store import HostPool
from dpud.gpu.system import GpuConfig, build


def scattered(nr_bytes: int = 8 * MIB, every: int = 8) -> tuple[GpuMemory, DefragModule, dict[int, bytes]]:
    """A device in use everywhere, in pieces of 64 KiB, an eighth of it in all."""
    memory = small_memory(nr_bytes, pool=HostPool(32 * MIB))
    defrag = DefragModule(interval_s=0)
    defrag.attach(memory)
    vas = [memory.allocate("a", 64 * KIB) for _ in range(nr_bytes >> 16)]
    data = {va: np.random.default_rng(number).bytes(64 * KIB) for number, va in enumerate(vas)}
    for va in vas:
        memory.write("a", va, data[va])
    for number, va in enumerate(vas):
        if number % every:
            memory.free(va)
            del data[va]
    return memory, defrag, data


def check(memory: GpuMemory, data: dict[int, bytes]) -> None:
    for va, kept in data.items():
        assert memory.read("a", va, len(kept)) == kept
    assert violations(memory) == []


@pytest.mark.slow
def test_several_blocks_take_the_least_that_any_way_could() -> None:
    """Each of four blocks is used as much: three are emptied, and nothing moves twice."""
    memory, defrag, data = scattered()
    assert defrag.run() == 3
    assert defrag.relocator.stats["bytes_moved"] == len(data) * 3 // 4 * 64 * KIB
    check(memory, data)


@pytest.mark.slow
def test_addresses_and_translations_follow_at_once() -> None:
    memory, defrag, data = scattered()
    before = {va: memory.translate(va) for va in data}
    defrag.run()
    moved = [va for va in data if memory.translate(va) != before[va]]
    assert len(moved) == len(data) * 3 // 4
    check(memory, data)


@pytest.mark.slow
def test_writes_between_slices_are_not_lost_and_dirty_logs_stay_quiet() -> None:
    memory, defrag, data = scattered()
    defrag.effort.pause_limit_ns = 3000
    log = DirtyLog(16)
    region = memory.space.regions.find(next(iter(data)))
    assert region is not None
    region.dirty_logs.append(log)
    log.take()
    rng = np.random.default_rng(1)
    for number, _ in enumerate(defrag.running(rests=False)):
        va = list(data)[number % len(data)]
        if va == region.va:
            continue
        data[va] = rng.bytes(64 * KIB)
        memory.write("a", va, data[va])
    assert defrag.effort.longest_ns <= 3000
    assert len(log) == 0
    check(memory, data)


@pytest.mark.slow
def test_what_is_in_the_stores_and_backed_stays_so() -> None:
    memory, defrag, data = scattered()
    for va in data:
        memory.sync("a", va, 64 * KIB)
    defrag.run()
    check(memory, data)
    assert memory.residency.events["refused"] == 0
    memory.evict(8 * MIB)
    assert memory.residency.events["evicted_clean"] == len(data) * 16
    check(memory, data)


@pytest.mark.slow
def test_retired_frames_neither_move_nor_merge() -> None:
    memory, defrag, data = scattered()
    frames = memory.locations[0].frames
    for block in range(0, frames.nr_frames, 1024):
        frame = block + int(np.flatnonzero(frames.owner[block : block + 1024] == FREE)[0])
        frames.retire(frame)
    assert defrag.run() == 0
    assert defrag.relocator.stats["pages_moved"] == 0
    defrag.order = 9
    assert defrag.run() > 0
    assert frames.nr_retired == frames.nr_frames // 1024
    check(memory, data)


@pytest.mark.slow
def test_broken_cells_are_made_good_on_the_way() -> None:
    memory, defrag, data = scattered()
    fault = FaultModule(memory)
    for va in data:
        memory.sync("a", va, 64 * KIB)
    fault.inject("bit bits=2 gpu=0 nr=20 seed=3 client=a")
    defrag.run()
    check(memory, data)
    assert fault.recovery.stats["repaired_from_store"] > 0
    assert fault.recovery.stats["lost_pages"] == 0


@pytest.mark.slow
def test_copies_move_too() -> None:
    memory = small_memory(4 * MIB, 4 * MIB, host_bytes=4 * MIB)
    defrag = DefragModule(interval_s=0)
    defrag.attach(memory)
    vas = [memory.allocate("a", 64 * KIB, RegionType.MANAGED, device=0) for _ in range(40)]
    for number, va in enumerate(vas):
        memory.write("a", va, bytes([number]) * (64 * KIB), HOST)
        memory.advise("a", va, 64 * KIB, Advice.SET_READ_MOSTLY)
        memory.read("a", va, 64 * KIB, 1)
    for va in vas[1::2]:
        memory.free(va)
    defrag.order = 9
    assert defrag.run() > 0
    assert defrag.relocator.stats["copies_moved"] > 0
    for number, va in enumerate(vas):
        if number % 2 == 0:
            assert (
                memory.read("a", va, 64 * KIB, 1)
                == memory.read("a", va, 64 * KIB, HOST)
                == bytes([number]) * (64 * KIB)
            )
    assert violations(memory) == []


@pytest.mark.slow
def test_a_large_page_is_given_room_without_evicting_anybody() -> None:
    memory, defrag, data = scattered()
    memory.write("b", memory.allocate("b", 4 * MIB, page_size=2 * MIB), bytes(4 * MIB))
    assert memory.residency.events["evicted"] == 0
    assert defrag.relocator.stats["blocks_made"] == 2
    check(memory, data)


def test_pinned_managed_pages_are_reached_where_they_are() -> None:
    memory = small_memory(4 * MIB, 4 * MIB)
    va = memory.allocate("a", 64 * KIB, RegionType.MANAGED)
    memory.write("a", va, bytes(64 * KIB), 0)
    pin = memory.pin(va, 4096, "nic", "test")
    memory.write("a", va, b"x" * (64 * KIB), 1)
    assert (memory.translate(va, 1) >> 40, memory.translate(va + 4096, 1) >> 40) == (0, 1)
    assert memory.prefetch("a", va, 64 * KIB, 1) == 0
    memory.unpin(pin)
    assert attempt(memory.unpin, pin) == errno.EINVAL
    assert memory.prefetch("a", va, 64 * KIB, 1) == 1
    assert memory.read("a", va, 64 * KIB) == b"x" * (64 * KIB)
    assert violations(memory) == []


def test_pinned_memory_does_not_migrate() -> None:
    memory = build(GpuConfig(2, 8 * MIB, 8 * MIB))
    va = memory.allocate("a", 64 * KIB)
    memory.write("a", va, b"z" * (64 * KIB))
    pin = memory.pin(va, 4096, "nic")
    assert attempt(memory.migration.start, "client=a device=1") == errno.EBUSY
    memory.unpin(pin)
    memory.migration.migrate("client=a device=1")
    assert memory.read("a", va, 64 * KIB) == b"z" * (64 * KIB)
    assert violations(memory) == []


@pytest.mark.slow
def test_a_pin_brings_its_pages_in_or_pins_none() -> None:
    memory = small_memory(2 * MIB, pool=HostPool(16 * MIB))
    va = memory.allocate("a", 4 * MIB)
    memory.write("a", va, b"y" * (4 * MIB))
    assert attempt(memory.pin, va, 4 * MIB, "nic") == errno.ENOMEM
    assert len(memory.residency.pins) == 0
    pin = memory.pin(va, MIB, "nic")
    assert memory.read("a", va, 4 * MIB) == b"y" * (4 * MIB)
    assert len(pin.pages) == 256
    memory.free(va)
    assert len(memory.residency.pins) == 0
    assert violations(memory) == []


@pytest.mark.slow
def test_a_limited_client_waits_before_the_pause_not_in_it() -> None:
    memory, defrag, data = scattered()
    qos = QosModule(memory.clock)
    qos.attach(memory)
    qos.set_client("a", limit=MIB, burst=64 * KIB)
    begin_ns = memory.clock.now_ns()
    defrag.run()
    moved = defrag.relocator.stats["bytes_moved"]
    assert memory.clock.now_ns() - begin_ns >= (moved - 128 * KIB) * 1_000_000_000 // MIB
    assert defrag.effort.longest_ns <= defrag.effort.pause_limit_ns
    qos.set_client("a", limit=0)
    check(memory, data)


@pytest.mark.slow
def test_cpu_percent_is_of_the_time() -> None:
    memory, defrag, _ = scattered()
    assert isinstance(memory.clock, ManualClock)
    defrag.effort.cpu_percent = 20
    begin_ns = memory.clock.now_ns()
    for _ in defrag.running():
        pass
    spent = defrag.effort.total_ns / (memory.clock.now_ns() - begin_ns)
    assert spent == pytest.approx(0.2, rel=0.02)


@pytest.mark.slow
def test_pages_used_together_come_side_by_side() -> None:
    """Two regions written in turn, page by page: each lies in every other frame. One is used, and becomes one run."""
    memory = small_memory(8 * MIB)
    defrag = DefragModule(interval_s=0)
    defrag.attach(memory)
    memory.allocate("a", 4096)
    one, other = (memory.allocate("a", 256 * KIB) for _ in range(2))
    for page in range(64):
        for va in (one, other):
            memory.write("a", va + page * 4096, bytes([page]) * 4096)
    for _ in range(5):
        memory.read("a", one, 256 * KIB)
    device = memory.locations[0]
    before = device.hardware.download.nr_transfers  # type: ignore[attr-defined]
    memory.read("a", one, 256 * KIB)
    transfers = device.hardware.download.nr_transfers - before  # type: ignore[attr-defined]
    assert transfers == 64
    defrag.run()
    before = device.hardware.download.nr_transfers  # type: ignore[attr-defined]
    data = memory.read("a", one, 256 * KIB)
    assert device.hardware.download.nr_transfers - before <= 4  # type: ignore[attr-defined]
    assert defrag.locality.mean_run(device) >= 16
    assert data == b"".join(bytes([page]) * 4096 for page in range(64))
    assert violations(memory) == []


def test_no_turn_looks_at_more_than_so_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of 32 MiB in use, everywhere: to choose among 16 blocks of 256 pages takes several turns."""
    memory, defrag, data = scattered(32 * MIB, every=2)
    looked, pages = 0, FramePool.pages

    def counted(pool: FramePool, block: int, order: int) -> tuple[Longs, Longs]:
        nonlocal looked
        found = pages(pool, block, order)
        looked += len(found[0])
        return found

    monkeypatch.setattr(FramePool, "pages", counted)
    turns = []
    for _ in defrag.running(rests=False):
        turns.append((looked, defrag.relocator.stats["pages_moved"]))
        looked = 0
    assert max(nr for nr, _ in turns) < LOOK_PAGES + 256
    assert [moved for _, moved in turns[:4]] == [0] * 4
    assert defrag.relocator.stats["blocks_made"] == 8
    check(memory, data)


def test_use_of_blocks_is_known_at_any_order() -> None:
    """Against the owners of all frames, while pages of all sizes come and go and frames break."""
    pool, rng, held = FramePool(6 * MIB + 34 * KIB), np.random.default_rng(5), dict[int, tuple[int, int]]()
    for key in range(1500):
        order = int(rng.choice([0, 1, 5, 9]))
        if rng.random() < 0.55 and len(found := pool.alloc(order, np.array([key]))):
            held[key] = int(found[0]), order
        elif held:
            gone = int(rng.choice(list(held)))
            frame, order = held.pop(gone)
            pool.free(np.array([frame]), order, np.array([gone]))
        if key % 100 == 0 and len(free := np.flatnonzero(pool.owner == FREE)):
            pool.retire(int(rng.choice(free)))
    for order in range(1, 11):
        owners = pool.owner[: pool.nr_frames >> order << order].reshape(-1, 1 << order)
        usable = ((owners == FREE) | (owners >= 0)).all(axis=1) & (owners == FREE).any(axis=1)
        used = np.where(usable, (owners >= 0).sum(axis=1), 0)
        wanted = [int(block) << order for block in np.argsort(used, kind="stable") if used[block]]
        assert pool.least_used(order, 2000) == wanted
        assert pool.least_used(order, 3) == wanted[:3]
    assert pool.check() == []
    pool.retire_free()
    assert pool.check() == []


def one_by_one(free_blocks: list[int], needs: dict[int, int]) -> bool:
    """Large pages first, each into the smallest block that takes it."""
    free = list(free_blocks)
    for order, nr in sorted(needs.items(), reverse=True):
        for _ in range(nr):
            at = next((k for k in range(order, len(free)) if free[k]), None)
            if at is None:
                return False
            free[at] -= 1
            for half in range(order, at):
                free[half] += 1
    return True


def test_whether_pages_fit_is_what_putting_them_there_finds() -> None:
    rng, outcomes = np.random.default_rng(6), list[bool]()
    for _ in range(500):
        free = rng.integers(0, 3, 6).tolist()
        needs = {order: int(rng.integers(0, 4)) for order in (0, 1, 3, 5)}
        outcomes.append(fits(free, needs))
        assert outcomes[-1] == one_by_one(free, needs)
    assert 50 < sum(outcomes) < 450


def test_isolated_frames_are_found_by_nobody_and_rejoin_merged() -> None:
    pool = FramePool(4 * MIB)
    held = pool.alloc(0, np.array([1]))
    block = int(held[0]) >> 10 << 10
    pool.isolate([block], 10)
    assert pool.nr_free == 1024
    assert pool.check() == ["frames are set apart, and nobody is at work"]
    taken = pool.alloc(9, np.array([2, 3, 4]))
    assert sorted(frame >> 9 << 9 for frame in taken.tolist()) == [1024 - block, 1536 - block]
    pool.free(taken, 9, np.array([2, 3]))
    pool.rejoin([block], 10)
    pool.free(held, 0, np.array([1]))
    assert pool.free_blocks()[10] == 2
    assert pool.check() == []
