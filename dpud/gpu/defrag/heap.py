# SPDX-License-Identifier: MIT
"""Where the blocks of a suballocator are: byte ranges of one heap, and the holes between them. No bytes here.

Theory of operation
    Sizes are rounded up to ALIGNMENT, as RMM's pools round to 256. A block goes into the smallest hole that takes it
    (best fit, the lowest of equals); a freed one joins its neighbours at once. A block that is being moved has two
    extents, where it was and where it will be, or one that covers both where they touch.

Invariants
    - Extents do not overlap; holes are exactly what is between them, so no two holes touch.
    - live_bytes is the sum of the sizes of blocks, each counted once.
"""

import errno
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from dpud.gpu.errors import GpuError

ALIGNMENT = 256


def rounded(nr_bytes: int) -> int:
    """What a block of so many bytes takes."""
    return -(-nr_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False)
class Block:
    """A handle: `start` may change whenever nobody has pinned the block."""

    start: int
    nr_bytes: int
    size: int
    pins: list[tuple[str, str]] = field(default_factory=list)
    """(owner, reason) of those that know its address."""
    target: int | None = None
    """Where it is being moved to: the first `nr_moved` bytes are there already."""
    nr_moved: int = 0
    is_live: bool = True

    @property
    def is_movable(self) -> bool:
        return not self.pins and self.target is None


class Heap:
    """[0, nr_bytes), some of it taken."""

    def __init__(self, nr_bytes: int, page_bytes: int = ALIGNMENT) -> None:
        """Blocks of two pages or more begin with a page where their hole allows it: such pages can be remapped."""
        self.nr_bytes = nr_bytes // ALIGNMENT * ALIGNMENT
        self.page_bytes = page_bytes
        self.live_bytes = 0
        self._starts: list[int] = []
        self._extents: dict[int, tuple[int, Block]] = {}  # start -> (end, block)
        self._holes: list[tuple[int, int]] = []  # (size, start), sorted
        if self.nr_bytes:
            self._holes.append((self.nr_bytes, 0))

    # What there is.

    def __iter__(self) -> Iterator[Block]:
        """Blocks by address; one that is being moved may come twice."""
        return (self._extents[start][1] for start in self._starts)

    def extents(self) -> list[tuple[int, int, Block]]:
        """(start, end, block) by address."""
        return [(start, *self._extents[start]) for start in self._starts]

    @property
    def free_bytes(self) -> int:
        return sum(size for size, _ in self._holes)

    @property
    def holes(self) -> list[int]:
        """Their sizes, smallest first."""
        return [size for size, _ in self._holes]

    @property
    def largest_hole(self) -> int:
        return self._holes[-1][0] if self._holes else 0

    @property
    def reserved_bytes(self) -> int:
        """Up to the end of the last block."""
        return self._extents[self._starts[-1]][0] if self._starts else 0

    # Taking and giving.

    def alloc(self, nr_bytes: int) -> Block | None:
        """None where no hole is large enough. Raises GpuError(EINVAL) for less than a byte."""
        if nr_bytes < 1:
            raise GpuError(errno.EINVAL, f"an allocation of {nr_bytes} bytes")
        size = rounded(nr_bytes)
        at = bisect_left(self._holes, (size, 0))
        if at == len(self._holes):
            return None
        block = Block(self.placed(*self._holes[at], size), nr_bytes, size)
        self._take(block.start, block.start + size, block)
        self.live_bytes += size
        return block

    def placed(self, hole_size: int, hole_start: int, size: int, phase: int = 0) -> int:
        """Where in a hole to put a block of this size, whose pages begin `phase` bytes behind a page's start."""
        skip = (phase - hole_start) % self.page_bytes
        return hole_start + skip if size >= 2 * self.page_bytes and skip + size <= hole_size else hole_start

    def free(self, block: Block) -> None:
        """Raises GpuError(EINVAL) for one that is free already."""
        if not block.is_live:
            raise GpuError(errno.EINVAL, "freed twice")
        block.is_live = False
        self.live_bytes -= block.size
        if block.target is not None:
            self._give_extents_of(block)
        else:
            self._give(block.start)

    # Moving.

    def begin_move(self, block: Block, target: int) -> bool:
        """Set the target aside -> whether nobody else is there."""
        assert block.is_movable, "pinned, or on its way"
        assert block.is_live, "free"
        start, end = min(block.start, target), max(block.start, target) + block.size
        touches = abs(target - block.start) <= block.size
        need = (start, end) if touches else (target, target + block.size)
        if touches:
            self._give(block.start)
        if not self._is_free(*need):
            if touches:
                self._take(block.start, block.start + block.size, block)
            return False
        self._take(*need, block)
        block.target, block.nr_moved = target, 0
        return True

    def end_move(self, block: Block) -> None:
        """All of it is at the target."""
        assert block.target is not None
        if not block.is_live:
            return
        self._give_extents_of(block)
        block.start, block.target, block.nr_moved = block.target, None, 0
        self._take(block.start, block.start + block.size, block)

    def _give_extents_of(self, block: Block) -> None:
        assert block.target is not None
        for start in {block.start, block.target, min(block.start, block.target)}:
            if start in self._extents and self._extents[start][1] is block:
                self._give(start)

    # Extents and holes.

    def _is_free(self, start: int, end: int) -> bool:
        at = bisect_left(self._starts, start)
        if at and self._extents[self._starts[at - 1]][0] > start:
            return False
        return end <= self.nr_bytes and start >= 0 and (at == len(self._starts) or self._starts[at] >= end)

    def _around(self, start: int, end: int) -> tuple[int, int]:
        """The free range around one without an extent."""
        at = bisect_left(self._starts, start)
        low = self._extents[self._starts[at - 1]][0] if at else 0
        high = self._starts[at] if at < len(self._starts) else self.nr_bytes
        assert low <= start <= end <= high, "taken"
        return low, high

    def _take(self, start: int, end: int, block: Block) -> None:
        low, high = self._around(start, end)
        self._remove_hole(low, high)
        self._add_hole(low, start)
        self._add_hole(end, high)
        insort(self._starts, start)
        self._extents[start] = end, block

    def _give(self, start: int) -> None:
        end, _ = self._extents.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        low, high = self._around(start, end)
        self._remove_hole(low, start)
        self._remove_hole(end, high)
        self._add_hole(low, high)

    def _add_hole(self, start: int, end: int) -> None:
        if end > start:
            insort(self._holes, (end - start, start))

    def _remove_hole(self, start: int, end: int) -> None:
        if end > start:
            del self._holes[bisect_left(self._holes, (end - start, start))]

    def check(self) -> list[str]:
        """What is wrong, if anything."""
        wrong, at, holes = [], 0, []
        for start, end, block in self.extents():
            if start < at:
                wrong.append(f"two blocks at {start}")
            if start > at:
                holes.append((start - at, at))
            if not block.is_live or not (start <= block.start < end or block.target == start):
                wrong.append(f"the block at {start} is not there")
            at = end
        if at < self.nr_bytes:
            holes.append((self.nr_bytes - at, at))
        if sorted(holes) != self._holes:
            wrong.append("holes are not what is between blocks")
        if self.live_bytes != sum(block.size for block in set(self)):
            wrong.append(f"{self.live_bytes} bytes counted live")
        return wrong
