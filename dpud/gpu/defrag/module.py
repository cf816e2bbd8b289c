# SPDX-License-Identifier: MIT
"""Defragmentation as one part of a GpuMemory: when, how much, and what came of it.

    defrag = DefragModule(threshold=0.3, interval_s=60)
    defrag.attach(memory)
    defrag.run()

When
    Every `interval_s` each location is looked at. Where more than `threshold` of its free memory is in blocks smaller
    than `order` (unusable_index), blocks are made until it is not, or none can be made. `run` does so at once, whatever
    the threshold. An access that needs a large block and finds only small ones has one made before anybody is evicted.

How much
    Slices and rests as effort.py has them. An access that waits for a block does not rest.

Library mode has no background: allocating and freeing look whether the interval is over. With a PacedClock somebody
runs `background`.
"""

import errno
import math
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dpud.gpu.address_space.frames import MAX_ORDER
from dpud.gpu.address_space.regions import Region
from dpud.gpu.clock import PacedClock
from dpud.gpu.defrag.blocks import BlockMaker
from dpud.gpu.defrag.effort import Effort
from dpud.gpu.defrag.explain import explain
from dpud.gpu.defrag.locality import Locality
from dpud.gpu.defrag.loops import Loops
from dpud.gpu.defrag.metrics import Fragmentation, of_frames
from dpud.gpu.defrag.pins import Pins
from dpud.gpu.defrag.relocate import Relocator
from dpud.gpu.errors import GpuError
from dpud.gpu.location import Location
from kernelsim.operation import Operation, complete

if TYPE_CHECKING:
    from dpud.gpu.memory import GpuMemory

DEFAULT_THRESHOLD = 0.3
DEFAULT_INTERVAL_S = 60
NR_FAILURES_KEPT = 16
MAX_AT_ONCE = 32
"""Blocks that are chosen together, so that what leaves one does not go into another."""
TICK_NS = 5_000_000
"""What a request may wait for a pass of which it is not the reason, where there is no background."""
MIN_LOOK_NS, MAX_LOOK_NS = 1_000_000_000, 10_000_000_000
"""How long the background sleeps at least and at most: so late does it see that `interval` was changed."""
_NS = 1_000_000_000


class DefragModule:
    """A Defragmenter."""

    def __init__(self, threshold: float = DEFAULT_THRESHOLD, interval_s: int = DEFAULT_INTERVAL_S) -> None:
        """Raises GpuError(EINVAL) for a threshold that is no share, or an interval below 0 (which is: never)."""
        if not 0 <= threshold <= 1 or interval_s < 0:
            raise GpuError(errno.EINVAL, f"threshold {threshold}, interval {interval_s} s")
        self.threshold, self.interval_s = threshold, interval_s
        self.order = MAX_ORDER
        self.effort = Effort()
        self.rearranges = True
        """Whether a pass also puts hot pages side by side."""
        self.failures: deque[tuple[int, str]] = deque(maxlen=NR_FAILURES_KEPT)
        """(ns, explanation) of requests for which there was no memory."""
        self._memory: GpuMemory | None = None
        self._last_ns = 0
        self._at_work = False
        self._pass: Operation[int] | None = None

    @property
    def memory(self) -> "GpuMemory":
        assert self._memory is not None, "not attached"
        return self._memory

    @property
    def pins(self) -> Pins:
        return self.memory.residency.pins

    def attach(self, memory: "GpuMemory") -> None:
        """Have a GpuMemory ask this module."""
        self._memory = memory
        self.relocator = Relocator(memory, self.effort)
        self.maker = BlockMaker(self.relocator)
        self.locality = Locality(self.relocator)
        self._last_ns = memory.clock.now_ns()
        memory.defrag = memory.residency.defragmenter = self

    def detach(self) -> None:
        """Pins stay, for they are others'."""
        self.memory.defrag = self.memory.residency.defragmenter = None

    # What the path asks.

    def accessed(self, region: Region, first: int, nr_pages: int) -> None:
        self.locality.accessed(region, first, nr_pages)

    def make_block(self, location: Location, order: int, busy: Collection[int]) -> bool:
        """A free block for who waits for it -> whether there is one now."""
        if self._at_work:
            return False
        self.relocator.mends = False
        try:
            with self._working():
                return complete(self.maker.make(location, order, busy)) > 0
        finally:
            self.relocator.mends = True

    def explain(self, location: Location, order: int, nr_blocks: int, busy: Collection[int]) -> str:
        """Why there is no block, in one line; it is kept."""
        text = explain(location, order, nr_blocks, self.relocator, self.maker, busy)
        self.failures.append((self.memory.clock.now_ns(), f"{location.name}: {text}"))
        return text

    def tick(self) -> None:
        """Something was allocated or freed: without a background, this is when the interval is looked at.

        A pass that is due goes on from one such request to the next, TICK_NS in each: none of them waits for all of it.
        """
        if isinstance(self.memory.clock, PacedClock) or self._at_work:
            return
        if self._pass is None and self.is_due:
            self._pass = self.running(self.threshold, rests=False)
        end_ns = self.memory.clock.now_ns() + TICK_NS
        while self._pass is not None:
            try:
                next(self._pass)
            except StopIteration:
                self._pass = None
            if self.memory.clock.now_ns() > end_ns:
                break

    # Passes.

    @property
    def is_due(self) -> bool:
        return 0 < self.interval_s * _NS <= self.memory.clock.now_ns() - self._last_ns

    def run(self, threshold: float = 0.0) -> int:
        """A pass over all locations, now and without a rest -> blocks made."""
        return complete(self.running(threshold, rests=False))

    def running(self, threshold: float = 0.0, *, rests: bool = True) -> Operation[int]:
        """`run` as an operation, which yields between slices: what it waits for, or None."""
        if isinstance(self.memory.clock, PacedClock):
            yield Loops(DefragModule)
        self._last_ns, nr = self.memory.clock.now_ns(), 0
        self.relocator.stats["passes"] += 1
        for location in self.memory.locations:
            while lacking := self._nr_lacking(location, threshold):
                made = yield from self._slowly(self.maker.make(location, self.order, nr=lacking), rests)
                nr += made
                if not made:
                    break
            if self.rearranges:
                yield from self._slowly(self.locality.rearrange(location, self.order), rests)
        self.locality.age()
        return nr

    def _nr_lacking(self, location: Location, threshold: float) -> int:
        """Blocks to make until no more than `threshold` of free memory is in smaller ones; at most MAX_AT_ONCE."""
        blocks, nr_free = location.frames.free_blocks(), location.frames.nr_free
        usable = sum(nr << order for order, nr in enumerate(blocks) if order >= self.order)
        lacking = math.ceil(nr_free * (1 - threshold)) - usable
        return min(MAX_AT_ONCE, max(0, -(-lacking >> self.order)))

    def _slowly(self, operation: Operation[int], rests: bool) -> Operation[int]:
        """With a rest behind each slice."""
        while True:
            before_ns = self.effort.total_ns
            try:
                with self._working(), self._turn():
                    next(operation)
            except StopIteration as stop:
                return int(stop.value)
            if rests and isinstance(self.memory.clock, PacedClock):
                yield self.memory.clock.until(self.memory.clock.now_ns() + self.effort.rest_ns(self.effort.turn_ns))
            elif rests:
                rest_ns = self.effort.rest_ns(self.effort.total_ns - before_ns)
                self.memory.clock.sleep_until(self.memory.clock.now_ns() + rest_ns)
            yield None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Where real time passes, others wait for what is done here, choosing what to move included."""
        clock = self.memory.clock
        if not isinstance(clock, PacedClock):
            yield
            return
        self.effort.begin_turn(clock.now_ns(), clock.cpu_ns())
        try:
            yield
        finally:
            self.effort.end_turn(clock.now_ns(), clock.cpu_ns())

    @contextmanager
    def _working(self) -> Iterator[None]:
        """What relocation itself does to memory starts no other relocation."""
        before, self._at_work = self._at_work, True
        try:
            yield
        finally:
            self._at_work = before

    def background(self, clock: PacedClock) -> Operation[None]:
        """What runs as long as there is a daemon, by its clock."""
        is_idle = True
        while True:
            now_ns = clock.now_ns()
            left_ns = self._last_ns + self.interval_s * _NS - now_ns if self.interval_s else MAX_LOOK_NS
            wake_ns = now_ns + min(MAX_LOOK_NS, max(MIN_LOOK_NS, left_ns))
            yield clock.until(wake_ns, is_idle=is_idle)
            is_idle = not self.interval_s
            if self.is_due:
                yield from self.running(self.threshold)

    # What is shown.

    def fragmentation(self, location: Location) -> Fragmentation:
        return of_frames(location.frames, self.order)

    @property
    def cost(self) -> float:
        """Bytes moved for each byte of a contiguous block gained; 0 before any was."""
        gained = self.relocator.stats["gained_bytes"]
        return self.relocator.stats["gained_for_bytes"] / gained if gained else 0.0
