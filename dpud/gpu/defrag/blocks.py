# SPDX-License-Identifier: MIT
"""Makes free blocks: picks the one that has least to move away, and moves it away.

Every way to free so many blocks has to move what is in them. So the least used ones are the exact minimum, as long as
smaller free blocks elsewhere take their pages; where they do not, the next ones are tried. What leaves one is put into
none of the others. Blocks that are free as a whole are never broken up for it. (Linux's compaction scans from both ends
instead and empties what it meets: it has no table of who is where.)

Out of the question are blocks with a retired frame, with a pinned page, or with a page as large as the block.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from dpud.gpu.address_space.frames import FREE, RETIRED
from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.defrag.relocate import Relocator
from dpud.gpu.location import Location
from kernelsim.operation import Operation

_MAX_CANDIDATES = 64
"""Of the least used blocks: how many are looked at more closely before it is given up."""


@dataclass(frozen=True)
class Candidate:
    """A block that can be emptied. `keys`: of its pages, large ones first."""

    block: int
    keys: tuple[int, ...]
    nr_frames: int

    @property
    def nr_bytes(self) -> int:
        return self.nr_frames * FRAME_BYTES


class BlockMaker:
    """Of one GpuMemory."""

    def __init__(self, relocator: Relocator) -> None:
        self._relocator = relocator

    def make(self, location: Location, order: int, busy: Collection[int] = (), nr: int = 1) -> Operation[int]:
        """So many more free blocks of an order, as far as that goes -> how many are there.

        Yields between slices, when others may do anything.
        """
        chosen, _ = self.choose(location, order, busy, nr)
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
        """Move some pages out of a block -> whether any moved. Free frames of all blocks are nobody's meanwhile."""
        frames = location.frames
        groups = self._relocator.slices(location, self._sorted(frames.owners(blocks[0], order)))
        if not groups:
            return False
        region, pages = groups[0]
        self._relocator.mend(region, pages)
        with self._set_apart(location, order, blocks):
            needs = Counter({region.order: len(pages)})
            return fits(frames.free_blocks()[:order], needs) and self._relocator.move(region, pages, location) > 0

    @contextmanager
    def _set_apart(self, location: Location, order: int, blocks: Collection[int]) -> Iterator[None]:
        """Blocks that somebody has pages in."""
        used = [block for block in blocks if location.frames.is_used(block, order)]
        for block in used:
            location.frames.isolate(block, order)
        try:
            yield
        finally:
            for block in used:
                location.frames.rejoin(block, order)

    def choose(
        self, location: Location, order: int, busy: Collection[int] = (), nr: int = 1
    ) -> tuple[list[Candidate], Counter[str]]:
        """Up to `nr` blocks to empty, cheapest first, and why others are not among them: reason -> blocks."""
        chosen: list[Candidate] = []
        obstacles: Counter[str] = Counter()
        for candidate in () if location.is_lost else self._candidates(location, order, busy, obstacles):
            if self._have_room(location, order, [*chosen, candidate]):
                chosen.append(candidate)
                if len(chosen) == nr:
                    break
            else:
                obstacles["no smaller free blocks for its pages"] += 1
        return chosen, obstacles

    def _candidates(
        self, location: Location, order: int, busy: Collection[int], obstacles: Counter[str]
    ) -> Iterator[Candidate]:
        frames = location.frames
        owners = frames.owner[: frames.nr_frames >> order << order].reshape(-1, 1 << order)
        retired = (owners == RETIRED).any(axis=1)
        used = (owners != FREE).sum(axis=1)
        full = used == 1 << order
        obstacles["retired frames"] += int(np.count_nonzero(retired))
        obstacles["nothing in it is free"] += int(np.count_nonzero(full & ~retired))
        cheap = np.flatnonzero(~retired & ~full & (used > 0))
        for block in cheap[np.argsort(used[cheap], kind="stable")][:_MAX_CANDIDATES].tolist():
            keys = self._sorted(frames.owners(block << order, order))
            if why := self._obstacle(location, keys, busy):
                obstacles[why] += 1
            else:
                yield Candidate(block << order, tuple(keys), int(used[block]))

    def _obstacle(self, location: Location, keys: list[int], busy: Collection[int]) -> str:
        relocator = self._relocator
        for key in keys:
            region, _ = relocator.find(key)
            if key in relocator.pins:
                pin = relocator.pins.of_page[key][0]
                return f"pinned by {pin.owner} ({pin.reason})"
            if key in busy:
                return "in use by the same access"
            if not relocator.effort.pages_per_slice(location, region.page_bytes):
                return f"a page of {region.page_bytes} bytes takes longer than pause_limit_us"
        return ""

    def _sorted(self, keys: list[int]) -> list[int]:
        """Large pages first: they need large blocks, which small ones would break up."""
        return sorted(keys, key=lambda key: (-self._relocator.find(key)[0].order, key))

    def _have_room(self, location: Location, order: int, candidates: list[Candidate]) -> bool:
        """Whether free blocks elsewhere, smaller than what is to be made, take all of their pages."""
        needs = Counter(self._relocator.find(key)[0].order for each in candidates for key in each.keys)
        with self._set_apart(location, order, [each.block for each in candidates]):
            return fits(location.frames.free_blocks()[:order], needs)


def fits(free_blocks: list[int], needs: Counter[int]) -> bool:
    """Whether pages (order -> how many) fit into free blocks (number by order), split where need be."""
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
