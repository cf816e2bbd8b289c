# SPDX-License-Identifier: MIT
"""Bytes of a region to other places in it: by remapping whole pages where only page tables need to change, else copied.

Remapping gives the frame of one page to another page of the region; the first one then is as if never written. The
target's old bytes must be dead, and the two ranges apart. It is counted apart, and charged to nobody: no byte moves.

Copying is within the device. Ranges that overlap go through a staging range of the region in pieces.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.address_space.regions import PageState, Region
from dpud.gpu.address_space.space import Pages
from dpud.gpu.defrag.effort import Effort
from dpud.gpu.defrag.heap import ALIGNMENT
from dpud.gpu.traffic import Cause

if TYPE_CHECKING:
    from dpud.gpu.memory import GpuMemory


class RegionMover:
    """Of one region of device memory. `staging`: first byte of a part of it that nobody else uses, and its size."""

    def __init__(self, memory: "GpuMemory", region: Region, staging: tuple[int, int], effort: Effort) -> None:
        self.memory, self.region, self.staging, self.effort = memory, region, staging, effort
        self.location = memory.locations[region.device]
        self.nr_copied_bytes = self.nr_remapped_bytes = 0

    @property
    def slice_bytes(self) -> int:
        """How much may be copied at once: also in pieces of a page, and through the staging range."""
        per_piece = self.effort.pages_by_profile(self.location, self.region.page_bytes) // 4 - 2
        nr_bytes = min(per_piece * self.region.page_bytes, self.effort.bytes_per_slice(self.location) // 2)
        return self.effort.halved(nr_bytes // ALIGNMENT) * ALIGNMENT

    # Copying.

    def copy(self, source: int, target: int, nr_bytes: int) -> None:
        """At once. Raises GpuError: ENOMEM, EIO, and nothing has changed at the target but what was dead there."""
        first, size = self.staging
        apart = abs(source - target) >= nr_bytes
        assert apart or nr_bytes <= size, "more than the staging range holds"
        steps = [(source, target)] if apart else [(source, first), (first, target)]
        self._bring_in(sorted({page for pair in steps for start in pair for page in self._pages(start, nr_bytes)}))
        self.memory.residency.traffic.charge(
            self.region.client, Cause.RELOCATION, len(steps) * nr_bytes, self.location.number
        )
        begin_ns = self.memory.clock.now_ns()
        for at, to in steps:
            for piece in self._pieces(at, to, nr_bytes):
                self.location.copy(*piece)
            self.location.wait()
        pages = self._pages(target, nr_bytes)
        self.memory.space.set_dirty(self.region, pages.start, len(pages), self.location.number)
        self.effort.spent(self.memory.clock.now_ns() - begin_ns)
        self.nr_copied_bytes += nr_bytes

    def _pages(self, start: int, nr_bytes: int) -> range:
        return range(*self.memory.space.page_range(self.region, self.region.va + start, nr_bytes))

    def _bring_in(self, numbers: list[int]) -> None:
        region, pages = self.region, np.array(numbers)
        self.memory.residency.examine(region, pages)
        keys = set((region.first_key + pages).tolist())
        self.memory.faults.serve(region, pages, region.device, True, np.zeros(len(pages), dtype=np.bool_), keys)

    def _pieces(self, source: int, target: int, nr_bytes: int) -> Iterator[tuple[int, int, int]]:
        """(byte in memory, byte in memory, bytes) where neither side crosses a page."""
        size, done = self.region.page_bytes, 0
        while done < nr_bytes:
            nr = min(nr_bytes - done, size - (source + done) % size, size - (target + done) % size)
            yield self._phys(source + done), self._phys(target + done), nr
            done += nr

    def _phys(self, start: int) -> int:
        page, offset = divmod(start, self.region.page_bytes)
        return int(self.region.frame[page]) * FRAME_BYTES + offset

    # Remapping.

    def remap(self, source: int, target: int, nr_pages: int) -> bool:
        """Frames of pages from `source` on go to those from `target` on -> False: a pin or a migration forbids it."""
        region, begin_ns = self.region, self.memory.clock.now_ns()
        old, new = np.arange(source, source + nr_pages), np.arange(target, target + nr_pages)
        assert abs(source - target) >= nr_pages, "ranges that overlap"
        pins = self.memory.residency.pins
        both = np.concatenate((old, new))
        if pins.mask(region, both).any() or (region.state[both] == PageState.AWAY).any():
            return False
        stored = old[region.state[old] == PageState.STORED]
        if len(stored):
            self._bring_in(stored.tolist())
        self.memory.residency.examine(region, old)
        self.memory.residency.discard(region, new)
        self._hand_over(old, new)
        self.effort.spent(self.memory.clock.now_ns() - begin_ns)
        self.nr_remapped_bytes += nr_pages * region.page_bytes
        return True

    def _leave(self, pages: Pages) -> None:
        """Nobody reaches pages any more, and they cannot be evicted."""
        self.memory.space.unmap_pages(self.region, pages)
        for key in (self.region.first_key + pages).tolist():
            self.location.policy.remove(key)

    def _hand_over(self, old: Pages, new: Pages) -> None:
        region = self.region
        resident = region.state[old] == PageState.RESIDENT
        corrupt = new[region.state[old] == PageState.CORRUPT]
        old, new = old[resident], new[resident]
        self._leave(old)
        for page in old[region.backed[old]].tolist():
            self.memory.residency.store.drop(region.first_key + page)
        frames = region.frame[old]
        self.location.frames.reown(frames, region.order, region.first_key + new)
        region.state[old], region.backed[old] = PageState.UNTOUCHED, False
        self.memory.residency.settle(region, new, self.location, frames)
        region.state[corrupt] = PageState.CORRUPT
        for log in region.dirty_logs:
            log.mark_pages(np.concatenate((old, new)))
