# SPDX-License-Identifier: GPL-2.0-only
"""A heap whose blocks move under their users, against plain byte arrays."""

import errno

import numpy as np
import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from small import KIB, MIB, attempt, errno_of, small_memory

from dpud.gpu.check import violations
from dpud.gpu.defrag.effort import Effort
from dpud.gpu.defrag.heap import Block, rounded
from dpud.gpu.defrag.suballocator import Suballocator
from dpud.gpu.errors import GpuError
from dpud.gpu.memory import GpuMemory
from dpud.gpu.store import HostPool
from dpud.gpu.traffic import Cause, TrafficCounts
from kernelsim.operation import Operation

FRACTIONS = st.floats(0, 1, exclude_max=True)


def heap_of(nr_bytes: int, page_size: int = 4096, effort: Effort | None = None) -> Suballocator:
    memory = small_memory(8 * MIB, pool=HostPool(8 * MIB))
    return Suballocator(memory, "train", nr_bytes, page_size=page_size, effort=effort)


def filled(heap: Suballocator, nr_bytes: int, seed: int) -> tuple[Block, bytes]:
    block, data = heap.alloc(nr_bytes), np.random.default_rng(seed).bytes(nr_bytes)
    heap.write(block, 0, data)
    return block, data


def moved_bytes(memory: GpuMemory) -> int:
    counts = memory.residency.traffic
    assert isinstance(counts, TrafficCounts)
    return counts.nr_bytes["train", Cause.RELOCATION]


class Users(RuleBasedStateMachine):
    """Blocks that are written and read while they move, one slice at a time."""

    def __init__(self) -> None:
        super().__init__()
        effort = Effort()
        effort.pause_limit_ns = 12_000
        self.heap = heap_of(160 * KIB, 2048, effort)
        self.models: dict[Block, bytearray] = {}
        self.moving: Operation[object] | None = None
        self.rng = np.random.default_rng(3)

    def pick(self, which: float) -> Block:
        return list(self.models)[int(which * len(self.models))]

    @rule(size=st.one_of(st.integers(1, 3000), st.integers(1, 50 * KIB)))
    def alloc(self, size: int) -> None:
        heap = self.heap.heap
        fits = heap.live_bytes + rounded(size) <= heap.nr_bytes
        if self.moving is not None:
            return
        if not fits or any(block.pins for block in self.models):
            if attempt(self.heap.alloc, size) == 0:
                self.heap.free(next(block for block in self.heap.heap if block not in self.models))
            return
        block = self.heap.alloc(size)
        data = self.rng.bytes(size)
        self.heap.write(block, 0, data)
        self.models[block] = bytearray(data)

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS)
    def free(self, which: float) -> None:
        block = self.pick(which)
        if block.pins:
            assert errno_of(self.heap.free, block) == errno.EBUSY
            return
        self.heap.free(block)
        del self.models[block]
        assert errno_of(self.heap.read, block, 0, 1) == errno.EFAULT

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS, where=FRACTIONS, length=FRACTIONS)
    def write(self, which: float, where: float, length: float) -> None:
        block = self.pick(which)
        start = int(where * block.nr_bytes)
        data = self.rng.bytes(1 + int(length * (block.nr_bytes - start - 1)))
        self.heap.write(block, start, data)
        self.models[block][start : start + len(data)] = data

    @rule(threshold=st.floats(0, 0.5))
    def begin(self, threshold: float) -> None:
        if self.moving is None:
            self.moving = self.heap.defragment(threshold)

    @precondition(lambda self: self.moving is not None)
    @rule(nr=st.integers(1, 12))
    def go_on(self, nr: int) -> None:
        assert self.moving is not None
        for _ in range(nr):
            if next(self.moving, self) is self:
                self.moving = None
                return

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS)
    def pin(self, which: float) -> None:
        block = self.pick(which)
        va = self.heap.pin(block, "dma", "test")
        assert self.heap.memory.read("train", va, block.nr_bytes) == self.models[block]

    @precondition(lambda self: any(block.pins for block in self.models))
    @rule()
    def unpin(self) -> None:
        for block in self.models:
            while block.pins:
                self.heap.unpin(block, "dma")

    @rule(nr_bytes=st.integers(1, 200 * KIB))
    def evict(self, nr_bytes: int) -> None:
        self.heap.memory.evict(nr_bytes)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.heap.heap.check() == []
        assert violations(self.heap.memory) == []
        for block, data in self.models.items():
            assert self.heap.read(block, 0, len(data)) == data
        assert self.heap.effort.longest_ns <= self.heap.effort.pause_limit_ns


TestUsers = Users.TestCase
TestUsers.settings = settings(max_examples=examples(20), stateful_step_count=30, deadline=None)


@pytest.mark.slow
def test_an_allocation_that_finds_no_hole_gets_one() -> None:
    heap = heap_of(MIB)
    blocks = [filled(heap, 64 * KIB, seed) for seed in range(16)]
    for block, _ in blocks[::2]:
        heap.free(block)
    assert heap.heap.largest_hole == 64 * KIB
    block, data = filled(heap, 512 * KIB, 99)
    assert heap.read(block, 0, len(data)) == data
    assert all(heap.read(other, 0, len(kept)) == kept for other, kept in blocks[1::2])
    assert violations(heap.memory) == []


def test_whole_pages_are_remapped_without_moving_a_byte() -> None:
    heap = heap_of(MIB)
    blocks = [filled(heap, 64 * KIB, seed) for seed in range(16)]
    for block, _ in blocks[::2]:
        heap.free(block)
    before = heap.memory.locations[0].frames.nr_free_bytes
    heap.alloc(128 * KIB)
    assert heap.mover.nr_remapped_bytes == 64 * KIB
    assert heap.mover.nr_copied_bytes == moved_bytes(heap.memory) == 0
    assert heap.memory.locations[0].frames.nr_free_bytes == before + 64 * KIB  # what was there before takes no frames
    assert all(heap.read(other, 0, len(kept)) == kept for other, kept in blocks[1::2])


def test_what_is_not_whole_pages_is_copied_and_charged() -> None:
    heap = heap_of(64 * KIB)
    blocks = [filled(heap, 3000, seed) for seed in range(20)]
    for block, _ in blocks[::2]:
        heap.free(block)
    heap.alloc(20 * KIB)
    assert heap.mover.nr_remapped_bytes == 0
    assert 0 < heap.mover.nr_copied_bytes <= moved_bytes(heap.memory) <= 2 * heap.mover.nr_copied_bytes
    assert all(heap.read(other, 0, len(kept)) == kept for other, kept in blocks[1::2])


def test_enomem_says_who_is_in_the_way() -> None:
    heap = heap_of(256 * KIB)
    blocks = [heap.alloc(64 * KIB) for _ in range(4)]
    heap.free(blocks[0])
    heap.free(blocks[2])
    heap.pin(blocks[1], "nic", "RDMA")
    heap.pin(blocks[3], "nic", "RDMA")
    wanted = r"largest hole 65536, in the way: 65536 at 0x10000 \(pinned by nic: RDMA\), 65536 at .*; no move helps$"
    with pytest.raises(GpuError, match=wanted) as caught:
        heap.alloc(100 * KIB)
    assert caught.value.errno == errno.ENOMEM
    assert str(caught.value).endswith(heap.last_failure)
    with pytest.raises(GpuError, match="too little is free"):
        heap.alloc(200 * KIB)
    heap.unpin(blocks[3], "nic")
    heap.unpin(blocks[1], "nic")
    assert heap.alloc(128 * KIB).is_live
    assert errno_of(heap.unpin, blocks[1], "nic") == errno.EINVAL
