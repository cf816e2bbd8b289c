# SPDX-License-Identifier: MIT
"""Moves pages to other frames of the same memory, while they are in use.

A page is copied within the device, then every entry that points to its old frame follows and keeps its bits; TLBs
forget it. All of that is one slice: nobody has a turn in between, so no write can be lost. The owner is charged
(RELOCATION) before the slice begins, so that waiting for bandwidth is not a pause for others.

A page that ECC would refuse to read is made good first (`mend`), and stays where that leaves it. Recovery may do
anything for that: move pages, empty a device, take a client back. So it is done before any frame is set apart or taken,
and not at all where an access waits for a block (`mends`): it has taken frames already for pages whose state does not
say so yet. What cannot be read stays where it is then.
"""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from dpud.gpu.address_space.regions import PageState, Region
from dpud.gpu.address_space.space import Pages
from dpud.gpu.defrag.effort import Effort
from dpud.gpu.defrag.pins import Pins
from dpud.gpu.errors import UncorrectableError
from dpud.gpu.location import Frames, Location
from dpud.gpu.traffic import Cause

if TYPE_CHECKING:
    from dpud.gpu.memory import GpuMemory

STATS = ("passes", "blocks_made", "blocks_failed", "pages_moved", "bytes_moved", "copies_moved", "pages_unreadable")

_RESIDENT = int(PageState.RESIDENT)
"""To look an enumeration's member up takes longer than to compare with it, and pages move one by one."""


class Relocator:
    """Of one GpuMemory."""

    def __init__(self, memory: "GpuMemory", effort: Effort) -> None:
        self.memory, self.effort = memory, effort
        self.stats: Counter[str] = Counter(dict.fromkeys(STATS, 0))
        self.mends = True
        """Whether pages that cannot be read are made good before they move."""

    @property
    def pins(self) -> Pins:
        return self.memory.residency.pins

    def find(self, key: int) -> tuple[Region, int]:
        return self.memory.space.regions.page_of(key)

    def first_slice(self, location: Location, keys: Pages) -> tuple[Region, Pages]:
        """The first pages, of keys in order, that may be moved at once; none where one page takes too long."""
        region, _ = self.find(int(keys[0]))
        nr = self.effort.pages_per_slice(location, region.page_bytes)
        pages = keys[:nr] - region.first_key
        return region, pages[pages < region.nr_pages]

    def mend(self, region: Region, pages: Pages) -> None:
        """Make good what ECC would refuse to read of pages that are about to move, if that is done here."""
        if self.mends:
            self.memory.residency.examine(region, pages)

    def move(self, region: Region, pages: Pages, location: Location) -> int:
        """Pages to any other free frames of a location -> how many moved, all or as many as the limit of a pause left
        time for; nothing is evicted for them.

        All frames are found before the first page moves, so that no page takes the place of another that has left.
        """
        clock, from_ns = self.memory.clock, self.memory.clock.now_ns()
        here, old = self._movable(region, pages, location)
        frames = self.memory.residency.find_frames(location, region.order, region.first_key + here)
        at = moved = took_ns = 0
        nr = 1
        while nr > 0 and at < len(frames):
            end = min(at + nr, len(frames))
            batch, to = here[at:end], frames[at:end]
            self.memory.residency.charge(region, Cause.RELOCATION, batch, location)
            begin_ns = clock.now_ns()
            got = self._relocate(region, batch, location, old[at:end], to)
            took_ns += clock.now_ns() - begin_ns
            at, moved = at + len(batch), moved + got
            more = self.effort.nr_more(region.page_bytes, took_ns, moved, clock.now_ns()) if got == len(batch) else 0
            nr = min(2 * nr, more)  # one page first, then twice as many
        if at < len(frames):
            location.frames.free(frames[at:], region.order, region.first_key + here[at : len(frames)])
        if moved:
            self.effort.spent(took_ns)
        self.effort.moving_ns = clock.now_ns() - from_ns
        return moved

    def move_to(self, region: Region, pages: Pages, location: Location, frames: Frames) -> int:
        """Pages to frames that are theirs already -> how many moved. Frames of those that did not are given back."""
        here, old = self._movable(region, pages, location)
        lost = ~np.isin(pages, here)
        location.frames.free(frames[lost], region.order, region.first_key + pages[lost])
        self.memory.residency.charge(region, Cause.RELOCATION, here, location)
        begin_ns = self.memory.clock.now_ns()
        moved = self._relocate(region, here, location, old, frames[~lost])
        self.effort.spent(self.memory.clock.now_ns() - begin_ns)
        return moved

    def _movable(self, region: Region, pages: Pages, location: Location) -> tuple[Pages, Frames]:
        """Those that may move, and the frames where they are."""
        if len(bad := self.memory.residency.unreadable(region, pages)):
            pages = np.setdiff1d(pages, bad)
        at = self._frames_at(region, pages, location)
        may_move = (at >= 0) & ~self.pins.mask(region, pages)
        return pages[may_move], at[may_move]

    @staticmethod
    def _frames_at(region: Region, pages: Pages, location: Location) -> Frames:
        """Where pages, or their copies, are in a location's memory; -1 for those that are not."""
        at_home = (region.state[pages] == _RESIDENT) & (region.home[pages] == location.number)
        found: Frames = np.where(at_home, region.frame[pages], -1)
        if region.replicas:
            for index in np.flatnonzero(~at_home).tolist():
                found[index] = region.replicas.get(int(pages[index]), {}).get(location.number, -1)
        return found

    def _relocate(self, region: Region, pages: Pages, location: Location, old: Frames, frames: Frames) -> int:
        if not len(pages):
            return 0
        keys = region.first_key + pages
        try:
            location.copy_pages(old, frames, region.page_bytes)
        except UncorrectableError:
            self.stats["pages_unreadable"] += len(pages)
            location.frames.free(frames, region.order, keys)
            return 0
        self.memory.space.relocate_pages(region, pages, location.number, frames)
        self._note(region, pages, location, frames)
        location.frames.free(old, region.order, keys)
        self.stats["pages_moved"] += len(pages)
        self.stats["bytes_moved"] += len(pages) << region.page_shift
        return len(pages)

    def _note(self, region: Region, pages: Pages, location: Location, frames: Frames) -> None:
        """Where pages, or their copies, are now."""
        if not region.replicas:
            region.frame[pages] = frames
            return
        at_home = region.home[pages] == location.number
        region.frame[pages[at_home]] = frames[at_home]
        for page, frame in zip(pages[~at_home].tolist(), frames[~at_home].tolist(), strict=True):
            region.replicas[page][location.number] = frame
        self.stats["copies_moved"] += int(np.count_nonzero(~at_home))
