# SPDX-License-Identifier: GPL-2.0-only
"""Swap: what is written is read again, goes where it should, and is not said to be kept where it is not."""

import errno
from collections.abc import Iterator

import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from small import attempt, errno_of
from swapping import BLOCK, blob_of, items, small_space

from dpud.gpu.blob import Blob
from dpud.gpu.clock import ManualClock
from dpud.gpu.swap import SwapSpace, Tier, new_tier
from dpud.gpu.swap.budget import DAY_NS
from dpud.gpu.swap.profile import SSD, TierProfile
from dpud.gpu.swap.tier import kinds, register

SIZES = (8, 500, 2000, BLOCK, 3 * BLOCK)


@pytest.fixture
def space() -> Iterator[SwapSpace]:
    space = small_space(("memory", 16), ("nvme", 32), ("ssd", 64))
    yield space
    assert space.violations() == []
    space.close()


def where(space: SwapSpace, *keys: int) -> list[str]:
    tiers = [space.tier_of(key) for key in keys]
    return [tier.name if tier is not None else "-" for tier in tiers]


def test_what_is_written_is_read_again(space: SwapSpace) -> None:
    written = [(number, blob_of(number, size)) for number, size in enumerate(SIZES)]
    space.write(written)
    assert [space.read(key) for key, _ in written] == [blob for _, blob in written]


def test_small_pages_share_blocks(space: SwapSpace) -> None:
    """32 pages of 500 bytes with a header each are 4.5 blocks, not 32."""
    space.write(items(0, 32, 500))
    assert space.used_bytes == 5 * BLOCK


def test_old_pages_sink_and_new_ones_are_on_the_fastest_tier(space: SwapSpace) -> None:
    for key in range(40):
        space.write([(key, blob_of(key, 4000))])
    assert where(space, 39, 38, 37) == ["memory"] * 3
    assert where(space, 0, 1, 2) != ["memory"] * 3
    assert all(space.read(key) == blob_of(key, 4000) for key in range(40))


def test_what_was_read_sinks_later() -> None:
    space = small_space(("memory", 4), ("ssd", 64))
    space.write(items(0, 4, 4000))
    for _ in range(3):
        space.read(0)
    for key in range(10, 13):
        space.write([(key, blob_of(key, 4000))])
    assert where(space, 0) == ["memory"]
    assert where(space, 1) == ["ssd"]


def test_full_says_so_and_keeps_what_it_had(space: SwapSpace) -> None:
    space.write(items(0, 60))
    before = {key: where(space, key) for key in range(60)}
    assert errno_of(space.write, items(100, 100)) == errno.ENOSPC
    assert {key: where(space, key) for key in range(60)} == before
    assert 100 not in space
    assert space.events["refused"] == 100


def test_a_rewritten_page_takes_its_room_once(space: SwapSpace) -> None:
    for seed in range(30):
        space.write([(7, blob_of(seed))])
    assert space.used_bytes == 2 * BLOCK
    assert space.read(7) == blob_of(29)


def test_dropped_is_gone(space: SwapSpace) -> None:
    space.write(items(0, 3))
    space.drop(1)
    assert 1 not in space
    with pytest.raises(KeyError):
        space.drop(1)
    space.drop(0)
    space.drop(2)
    assert space.used_bytes == 0


def test_background_demotes_between_watermarks() -> None:
    space = small_space(("memory", 100), ("ssd", 400))
    space.write(items(0, 95, 4000))
    assert space.background(1 << 30) > 0
    memory = space.tiers[0]
    assert memory.free_bytes >= memory.size_bytes * space.marks.high // 100
    assert where(space, 94) == ["memory"]
    assert where(space, 0) == ["ssd"]
    assert space.background(1 << 30) == 0


def test_background_raises_what_is_read_often() -> None:
    space = small_space(("memory", 8), ("ssd", 64))
    space.write(items(0, 20, 4000))
    slow = next(key for key in range(20) if where(space, key) == ["ssd"])
    for key in range(20):
        if where(space, key) == ["memory"]:
            space.drop(key)
    space.read(slow)
    space.read(slow)
    space.background(1 << 30)
    assert where(space, slow) == ["memory"]
    assert space.read(slow) == blob_of(slow, 4000)


def test_a_budget_is_kept_and_refilled_each_day() -> None:
    clock = ManualClock()
    space = small_space(("nvme", 32), ("ssd", 64), clock=clock)
    budget = space.tiers[0].budget
    budget.set_daily(4 * BLOCK)
    for key in range(10):
        space.write([(key, blob_of(key, 4000))])
    assert where(space, *range(10)) == ["nvme"] * 4 + ["ssd"] * 6
    assert budget.nr_written_bytes == 4 * BLOCK
    clock.advance(DAY_NS)
    space.write([(11, blob_of(11, 4000))])
    assert where(space, 11) == ["nvme"]


def test_a_budget_without_refill_counts_down_only_while_enabled() -> None:
    space = small_space(("nvme", 32))
    budget = space.tiers[0].budget
    budget.limit_blocks = 1
    space.write(items(0, 3, 4000))
    budget.enabled = True
    space.write(items(10, 1, 4000))
    assert errno_of(space.write, items(20, 1, 4000)) == errno.ENOSPC


def test_time_is_the_profiles() -> None:
    """A page of one block from each tier: its latency and 4096 bytes at its bandwidth (profile.py's data sheets)."""
    expected = {"memory": 100 + 160, "nvme": 45_455 + 586, "ssd": 76_923 + 7315, "hdd": 8_500_000 + 4_166_667 + 26_257}
    for name, ns in expected.items():
        clock = ManualClock()
        space = small_space((name, 64), clock=clock)
        space.write([(1, blob_of(1, 4000))])
        clock.advance(1_000_000_000)
        space.write([(2, blob_of(2, 4000))])
        clock.advance(1_000_000_000)
        before = clock.now_ns()
        space.read(1)
        assert clock.now_ns() - before == ns
        space.close()


def test_pages_that_lie_together_are_read_together() -> None:
    """A disk seeks once for them; flash waits for all latencies at once."""
    for name, limit_ns in (("hdd", 15_000_000), ("ssd", 700_000)):
        clock = ManualClock()
        space = small_space((name, 100), clock=clock)
        space.write(items(0, 64))
        clock.advance(1_000_000_000)
        before = clock.now_ns()
        assert space.read_many(range(64)) == [blob_of(key) for key in range(64)]
        assert clock.now_ns() - before < limit_ns
        assert space.tiers[0].nr_reads == 1
        space.drop(20)
        space.read_many([*range(20), *range(21, 64)])
        assert space.tiers[0].nr_reads == 3
        space.close()


def test_a_disk_does_not_seek_for_what_comes_next() -> None:
    clock = ManualClock()
    space = small_space(("hdd", 100), clock=clock)
    space.write(items(0, 64))
    clock.advance(1_000_000_000)
    before = clock.now_ns()
    for key in range(64):
        space.read(key)
    assert clock.now_ns() - before < 18_000_000
    space.close()


@pytest.mark.slow
def test_a_slow_tier_holds_up_whoever_writes_too_much() -> None:
    """16 MiB at 156 MB/s are 107 ms, and 4 MiB (27 ms) of them may be queued."""
    clock = ManualClock()
    space = small_space(("hdd", 8000), clock=clock)
    space.write(items(0, 4, 4 << 20))
    assert 80_000_000 < clock.now_ns() < 120_000_000


def test_a_new_tier_is_one_class() -> None:
    @register("optane")
    class Optane(Tier):
        profile = TierProfile("p5800x", 7_200_000_000, 4_800_000_000, 10_000, 10_000)

    assert kinds()[:4] == ("memory", "nvme", "ssd", "hdd")
    assert "optane" in kinds()
    clock = ManualClock()
    space = SwapSpace([new_tier("optane", 64 * BLOCK, clock)], clock)
    space.write(items(0, 3))
    assert space.read(2) == blob_of(2)
    with pytest.raises(ValueError, match="already"):
        register("optane")(Optane)


def test_wear_is_what_was_written() -> None:
    space = small_space(("ssd", 64))
    for _ in range(10):
        space.write(items(0, 1, 4000))
    budget = space.tiers[0].budget
    assert budget.nr_written_bytes == 10 * BLOCK
    assert budget.wear_percent == pytest.approx(100 * 10 * BLOCK / SSD.endurance_bytes)


def test_a_tier_that_is_none() -> None:
    clock = ManualClock()
    assert errno_of(new_tier, "tape", 1 << 20, clock) == errno.EINVAL
    assert errno_of(new_tier, "ssd", BLOCK, clock) == errno.EINVAL


def test_what_is_wrong_with_the_index_is_found(space: SwapSpace) -> None:
    """A block that nobody has, a slot that reaches into its neighbour, a page in no order."""
    space.write(items(0, 4))
    slots, tier = dict(space.slots()), space.tiers[0]
    tier.map.use(range(9, 10))
    assert any("block 9" in each for each in space.violations())
    tier.map.release(range(9, 10))
    slots[0].nr_bytes += 64
    assert any("own byte" in each for each in space.violations())
    slots[0].nr_bytes -= 64
    del space._orders[tier][2]
    assert any("in order" in each for each in space.violations())
    space._orders[tier][2] = None


class SwapMachine(RuleBasedStateMachine):
    """Against a dictionary, whatever is done in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.space = small_space(("memory", 6), ("nvme", 12), ("hdd", 20))
        self.model: dict[int, Blob] = {}
        self.seed = 0

    def teardown(self) -> None:
        self.space.close()

    @rule(keys=st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True), size=st.sampled_from(SIZES))
    def write(self, keys: list[int], size: int) -> None:
        self.seed += 100
        batch = [(key, blob_of(self.seed + key, size)) for key in keys]
        failed = attempt(self.space.write, batch)
        assert failed in (0, errno.ENOSPC)
        if not failed:
            self.model.update(batch)

    @precondition(lambda self: self.model)
    @rule(pick=st.integers(0, 1000))
    def drop(self, pick: int) -> None:
        key = sorted(self.model)[pick % len(self.model)]
        self.space.drop(key)
        del self.model[key]

    @precondition(lambda self: self.model)
    @rule(pick=st.integers(0, 1000), nr=st.integers(1, 3))
    def read(self, pick: int, nr: int) -> None:
        key = sorted(self.model)[pick % len(self.model)]
        for _ in range(nr):
            assert self.space.read(key) == self.model[key]

    @rule(budget=st.integers(0, 40000))
    def background(self, budget: int) -> None:
        self.space.background(budget)

    @rule(name=st.sampled_from(["memory", "nvme", "hdd"]), nr_bytes=st.integers(0, 40000))
    def demote(self, name: str, nr_bytes: int) -> None:
        self.space.demote(name, nr_bytes)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.space.violations() == []
        assert {key for key, _ in self.space.slots()} == set(self.model)
        for key, blob in self.model.items():
            slot = dict(self.space.slots())[key]
            assert slot.tier.read([(key, slot)], 0)[0] == [blob]


TestSwapMachine = SwapMachine.TestCase
TestSwapMachine.settings = settings(max_examples=examples(15), stateful_step_count=25, deadline=None)
