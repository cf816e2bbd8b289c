# SPDX-License-Identifier: MIT
"""Makes free blocks: picks the one that has least to move away, and moves it away.

Every way to free so many blocks has to move what is in them. So the least used ones are the exact minimum, as long as
smaller free blocks elsewhere take their pages; where they do not, the next ones are tried. What leaves one is put into
none of the others. Blocks that are free as a whole are never broken up for it. (Linux's compaction scans from both ends
instead and empties what it meets: it has no table of who is where.)

Out of the question are blocks with a retired frame, with a pinned page, or with a page as large as the block.

How much is in use of a block is known without looking (address_space/usage.py). Of those that seem best each page is
looked at, LOOK_PAGES of them before others have a turn. What was found may be wrong by then: that a block can be
emptied shows when it is.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.address_space.usage import MAX_ORDER, RETIRED_WEIGHT
from dpud.gpu.defrag.relocate import Relocator
from dpud.gpu.location import Location
from kernelsim.operation import Operation, complete

LOOK_PAGES = 256
"""Pages that are looked at in a row, and those of one block more."""
_OVERHEAD_PAGES = 48
"""To begin with a block costs as much as to look at so many of its pages."""
_MAX_CANDIDATES = 64
"""Of the least used blocks: how many are looked at more closely before it is given up."""


@dataclass(frozen=True)
class Candidate:
    """A block that can be emptied."""

    block: int
    nr_pages: int
    needs: Mapping[int, int]
    """Its pages by their order."""
    free: Sequence[int]
    """Free blocks in it by order: its pages cannot go there."""

    @property
    def nr_bytes(self) -> int:
        return sum(nr << order for order, nr in self.needs.items()) * FRAME_BYTES


class Room:
    """For the pages of blocks that are to be made free: in smaller free blocks that are in none of them."""

    def __init__(self, order: int) -> None:
        self._order = order
        self._needs: Counter[int] = Counter()
        self._inside = [0] * (MAX_ORDER + 1)

    def takes(self, candidate: Candidate, free_blocks: Sequence[int]) -> bool:
        """Whether it takes one more; then it has. `free_blocks`: of all memory, by order."""
        needs = self._needs + Counter(candidate.needs)
        inside = [sum(both) for both in zip(self._inside, candidate.free, strict=True)]
        outside = [max(0, nr - within) for nr, within in zip(free_blocks, inside, strict=True)]
        if not fits(outside[: self._order], needs):
            return False
        self._needs, self._inside = needs, inside
        return True


class BlockMaker:
    """Of one GpuMemory."""

    def __init__(self, relocator: Relocator) -> None:
        self._relocator = relocator

    def make(self, location: Location, order: int, busy: Collection[int] = (), nr: int = 1) -> Operation[int]:
        """So many more free blocks of an order, as far as that goes -> how many are there.

        Yields between slices, when others may do anything.
        """
        chosen = yield from self._choosing(location, order, busy, nr, Counter())
        made = 0
        while chosen:
            made += yield from self._empty(location, order, [candidate.block for candidate in chosen])
            del chosen[0]
        return made

    def _empty(self, location: Location, order: int, blocks: list[int]) -> Operation[int]:
        """The first of these blocks; nothing is put into the others, whose turn will come."""
        stats, frames = self._relocator.stats, location.frames
        before = stats["bytes_moved"]
        for _ in range(2 << order):  # each slice moves a page at least, unless somebody is in the way
            if not self._empty_a_slice(location, order, blocks):
                break
            yield None
        if not frames.is_free(blocks[0], order):
            stats["blocks_failed"] += 1
            return 0
        stats["blocks_made"] += 1
        stats["gained_bytes"] += (1 << order) * FRAME_BYTES
        stats["gained_for_bytes"] += stats["bytes_moved"] - before
        return 1

    def _empty_a_slice(self, location: Location, order: int, blocks: list[int]) -> bool:
        """Move some pages out of a block -> whether any moved. Free frames of all blocks are nobody's meanwhile.

        Large pages first: they need large blocks, which small ones would break up.
        """
        frames = location.frames
        keys, orders = frames.pages(blocks[0], order)
        if not len(keys):
            return False
        region, pages = self._relocator.first_slice(location, np.sort(keys[orders == orders.max()]))
        if not len(pages):
            return False
        self._relocator.mend(region, pages)
        with self._set_apart(location, order, blocks):
            needs = {region.order: len(pages)}
            return fits(frames.free_blocks()[:order], needs) and self._relocator.move(region, pages, location) > 0

    @contextmanager
    def _set_apart(self, location: Location, order: int, blocks: Collection[int]) -> Iterator[None]:
        """Blocks that somebody has pages in."""
        use = location.frames.use(order)
        used = [block for block in blocks if use[block >> order]]
        location.frames.isolate(used, order)
        try:
            yield
        finally:
            location.frames.rejoin(used, order)

    def choose(
        self, location: Location, order: int, busy: Collection[int] = (), nr: int = 1
    ) -> tuple[list[Candidate], Counter[str]]:
        """Up to `nr` blocks to empty, cheapest first, and why others are not among them: reason -> blocks."""
        use = location.frames.use(order)
        obstacles = Counter({"retired frames": int(np.count_nonzero(use >= RETIRED_WEIGHT))})
        obstacles["nothing in it is free"] = int(np.count_nonzero(use == 1 << order))
        return complete(self._choosing(location, order, busy, nr, obstacles)), obstacles

    def _choosing(
        self, location: Location, order: int, busy: Collection[int], nr: int, obstacles: Counter[str]
    ) -> Operation[list[Candidate]]:
        chosen, room, looked = list[Candidate](), Room(order), 0
        for block in [] if location.is_lost else location.frames.least_used(order, _MAX_CANDIDATES):
            if looked >= LOOK_PAGES:
                looked = 0
                yield None
            keys, orders = location.frames.pages(block, order)
            looked += _OVERHEAD_PAGES + len(keys)
            if not len(keys):  # somebody freed them meanwhile
                continue
            if why := self._obstacle(location, keys, int(orders.max()), busy):
                obstacles[why] += 1
                continue
            needs = {at: each for at, each in enumerate(np.bincount(orders).tolist()) if each}
            candidate = Candidate(block, len(keys), needs, location.frames.free_within(block, order))
            if not room.takes(candidate, location.frames.free_blocks()):
                obstacles["no smaller free blocks for its pages"] += 1
                continue
            chosen.append(candidate)
            if len(chosen) == nr:
                break
        if looked:
            yield None
        return chosen

    def _obstacle(self, location: Location, keys: NDArray[np.int64], largest: int, busy: Collection[int]) -> str:
        """Why pages cannot go, the largest of them of some order; empty if they can."""
        pins = self._relocator.pins
        wanted = set(keys.tolist()) if pins.of_page or busy else set()
        if pinned := wanted & pins.of_page.keys():
            pin = pins.of_page[min(pinned)][0]
            return f"pinned by {pin.owner} ({pin.reason})"
        if not wanted.isdisjoint(busy):
            return "in use by the same access"
        page_bytes = FRAME_BYTES << largest
        if not self._relocator.effort.pages_per_slice(location, page_bytes):
            return f"a page of {page_bytes} bytes takes longer than pause_limit_us"
        return ""


def fits(free_blocks: Sequence[int], needs: Mapping[int, int]) -> bool:
    """Whether pages (order -> how many) fit into free blocks (number by order), split where need be.

    Large ones first fill blocks without a rest, so it is enough that for each order the larger blocks have the frames.
    """
    return all(
        sum(nr << at for at, nr in enumerate(free_blocks) if at >= order)
        >= sum(nr << at for at, nr in needs.items() if at >= order)
        for order in needs
    )
