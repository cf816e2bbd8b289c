# SPDX-License-Identifier: MIT
"""Puts pages that are accessed together side by side.

Every access counts for its pages. Counts are halved after each pass, so that they follow what is used now. Pages with
at least half the mean count of their region's accessed pages are hot. Hot pages that follow each other in the address
space but not in memory are moved into one free block, in the order of their addresses: then an access of many pages is
one transfer instead of many. Nothing is moved to make room for that, and no block of the size that is wanted free is
broken up. A region is gone through LOOK_PAGES at a time.

`mean_run` is the figure of merit: pages a run of hot pages that lie side by side in both orders.
"""

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.frames import MAX_ORDER
from dpud.gpu.address_space.regions import PageState, Region
from dpud.gpu.address_space.space import Pages
from dpud.gpu.defrag.relocate import Relocator
from dpud.gpu.location import Location
from kernelsim.operation import Operation, complete

LOOK_PAGES = 4096
"""Of a region, before others have a turn; a multiple of what is joined at once."""
_PASSED_PAGES = LOOK_PAGES // 8
"""As much as to look at so many does it cost to pass over a region that was not accessed."""
Counts = NDArray[np.uint32]


class Locality:
    """Access counts of one GpuMemory's pages, and what follows from them."""

    def __init__(self, relocator: Relocator) -> None:
        self._relocator = relocator
        self._counts: WeakKeyDictionary[Region, Counts] = WeakKeyDictionary()

    def accessed(self, region: Region, first: int, nr_pages: int) -> None:
        """Pages of a region were read or written."""
        counts = self._counts.get(region)
        if counts is None:
            counts = self._counts[region] = np.zeros(region.nr_pages, dtype=np.uint32)
        counts[first : first + nr_pages] += np.uint32(1)

    def age(self) -> None:
        """What was accessed long ago counts less."""
        for counts in self._counts.values():
            counts >>= np.uint32(1)

    def hot(self, region: Region, location: Location) -> Pages:
        """Hot pages of a region that are at home in a location, by address."""
        mean = complete(self._mean(region)) if region in self._counts else 0.0
        return self._hot(region, location, range(region.nr_pages), mean) if mean else np.empty(0, dtype=np.int64)

    def _mean(self, region: Region) -> Operation[float]:
        """Mean count of a region's accessed pages; 0 where none was."""
        total = nr = 0
        for number, window in enumerate(_windows(region)):
            if number:
                yield None
            counts = self._counts[region][window.start : window.stop]
            total, nr = total + int(counts.sum(dtype=np.int64)), nr + int(np.count_nonzero(counts))
        return total / nr if nr else 0.0

    def _hot(self, region: Region, location: Location, window: range, mean: float) -> Pages:
        within = slice(window.start, window.stop)
        here = (region.state[within] == PageState.RESIDENT) & (region.home[within] == location.number)
        found: Pages = window.start + np.flatnonzero(here & (self._counts[region][within] * 2 >= mean))
        return found

    def mean_run(self, location: Location) -> float:
        """Hot pages a run; 0 where none are hot."""
        groups = [group for region in self._counts for group in self._runs(region, self.hot(region, location))]
        return float(np.mean([len(group) for group in groups])) if groups else 0.0

    @staticmethod
    def _runs(region: Region, pages: Pages) -> list[Pages]:
        """Pages, cut where the next one is not behind it in the address space and in memory."""
        if not len(pages):
            return []
        follows = (np.diff(pages) == 1) & (np.diff(region.frame[pages]) == 1 << region.order)
        return np.split(pages, np.flatnonzero(~follows) + 1)

    def rearrange(self, location: Location, below: int) -> Operation[int]:
        """Join runs, as far as free blocks smaller than order `below` last -> pages moved. Yields between slices."""
        nr = looked = 0
        for region in list(self._counts):
            mean = yield from self._mean(region)
            for window in _windows(region) if mean else ():
                looked = -_PASSED_PAGES
                for stretch in self._scattered(region, location, window, mean):
                    moved = self._join(region, stretch, location, below)
                    nr += moved
                    if moved:
                        yield None
                yield None
            looked += _PASSED_PAGES
            if looked >= LOOK_PAGES:
                looked = 0
                yield None
        return nr

    def _scattered(self, region: Region, location: Location, window: range, mean: float) -> list[Pages]:
        """Hot pages that follow each other in addresses but not in memory, as many as one slice and one block take."""
        hot = self._hot(region, location, window, mean)
        hot = hot[~self._relocator.pins.mask(region, hot)]
        per_slice = self._relocator.effort.pages_per_slice(location, region.page_bytes)
        nr = min(per_slice, 1 << max(0, MAX_ORDER - region.order))
        nr = 1 << max(0, nr.bit_length() - 1)
        if nr < 2 or not len(hot):
            return []
        cuts = np.flatnonzero((np.diff(hot) != 1) | (hot[1:] % nr == 0)) + 1
        return [each for each in np.split(hot, cuts) if len(self._runs(region, each)) > 1]

    def _join(self, region: Region, pages: Pages, location: Location, below: int) -> int:
        order = region.order + (len(pages) - 1).bit_length()
        self._relocator.mend(region, pages)
        if location.is_lost or not any(location.frames.free_blocks()[order:below]):
            return 0
        frames = location.frames.carve(order, region.order, region.first_key + pages)
        if not len(frames):
            return 0
        return self._relocator.move_to(region, pages, location, frames)


def _windows(region: Region) -> list[range]:
    """All pages of a region, in parts."""
    return [range(at, min(at + LOOK_PAGES, region.nr_pages)) for at in range(0, region.nr_pages, LOOK_PAGES)]
