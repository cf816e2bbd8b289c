# SPDX-License-Identifier: MIT
"""Holdings: which pages have which frames, of all locations. Who has to leave for whom is residency.py's.

Invariants
    - A page that a policy knows is RESIDENT there (or has a copy there), is not pinned, and each such page is known.
    - No frame is given to a page that is known to be broken.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import AddressSpace, Pages
from dpud.gpu.keepers import Examiner
from dpud.gpu.location import Frames, Location
from dpud.gpu.store import BackingStore
from dpud.gpu.traffic import Cause, Traffic, TrafficCounts


class Holdings:
    """Frames that pages have, and take, and give back."""

    def __init__(self, space: AddressSpace, locations: Sequence[Location], store: BackingStore) -> None:
        self.space, self.locations, self.store = space, locations, store
        self._in_the_way: set[int] = set()  # keys of pages that could not be read
        self.traffic: Traffic = TrafficCounts()
        self.examiner: Examiner | None = None
        """Who makes good what ECC finds, where faults are reckoned with."""
        self.events: Counter[str] = Counter(
            dict.fromkeys(("evicted", "evicted_clean", "evicted_copies", "refused", "corrupt", "blocks_emptied"), 0)
        )

    # What is broken.

    def examine(self, region: Region, pages: Pages) -> int:
        """Make good what ECC would refuse to read of these pages -> how many are elsewhere now, or CORRUPT.

        For who is about to read them and has not looked yet where they are. A read that meets such a page without
        raises UncorrectableError.
        """
        return 0 if self.examiner is None else self.examiner.examine(region, pages)

    def unreadable(self, region: Region, pages: Pages) -> Pages:
        """Those that ECC would refuse to read; for who must not have them made good now. They stay where they are, and
        `mend` knows of them."""
        if self.examiner is None:
            return pages[:0]
        bad = self.examiner.unreadable(region, pages)
        self._in_the_way.update((region.first_key + bad).tolist())
        return bad

    def mend(self) -> int:
        """Make good pages that could not leave because they could not be read -> how many are elsewhere, or CORRUPT.

        For who found no room, and has no frames in its hands.
        """
        keys, self._in_the_way, nr = self._in_the_way, set(), 0
        for key in sorted(keys):
            region = self.space.regions.of_key(key)
            nr += 0 if region is None else self.examine(region, np.array([key - region.first_key]))
        return nr

    # Frames.

    def find_frames(self, location: Location, order: int, keys: Pages) -> Frames:
        """Free blocks for as many pages as there are, none of them known to be broken; nothing is evicted for it."""
        while True:
            taken = location.frames.alloc(order, keys)
            if self.examiner is None or self.examiner.are_fit(location, taken, order):
                return taken
            location.frames.free(taken, order, keys[: len(taken)])
            self.examiner.screen(location, taken, order)

    def give_frames(self, region: Region, pages: Pages, location: Location, frames: Frames) -> None:
        """Give frames back."""
        location.frames.free(frames, region.order, region.first_key + pages)

    def settle(self, region: Region, pages: Pages, location: Location, frames: Frames) -> None:
        """Pages are in these frames from now on; nobody reaches them yet."""
        region.state[pages] = PageState.RESIDENT
        region.home[pages] = location.number
        region.frame[pages] = frames
        region.backed[pages] = False
        if region.type is not RegionType.PINNED:
            policy = location.policy.of(region.client)
            for key in (region.first_key + pages).tolist():
                policy.insert(key)

    def discard(self, region: Region, pages: Pages) -> None:
        """Throw the bytes of pages away, wherever they are: UNTOUCHED from now on, as if never written.

        Who looks for changes has to see that too: to a migration, or a checkpoint, it is a write of zeros.
        """
        for log in region.dirty_logs:
            log.mark_pages(pages)
        resident = pages[region.state[pages] == PageState.RESIDENT]
        self.drop_copies(region, resident)
        self.space.unmap_pages(region, resident)
        for location in self.locations:
            here = resident[region.home[resident] == location.number]
            for key in (region.first_key + here).tolist():
                location.policy.remove(key)
            self.give_frames(region, here, location, region.frame[here])
        for page in pages[region.backed[pages]].tolist():
            self.store.drop(region.first_key + page)
        region.state[pages] = PageState.UNTOUCHED
        region.backed[pages] = False

    # What moves.

    def charge(self, region: Region, cause: Cause, pages: Pages, location: Location) -> None:
        """All bytes of these pages are about to move; the region's owner is who it is for."""
        if len(pages):
            self.traffic.charge(region.client, cause, len(pages) << region.page_shift, location.number)

    def charge_stored(self, region: Region, cause: Cause, pages: Pages) -> None:
        """The same for pages that are read where the stores have them: by way of the memory that they had been in."""
        for number in np.unique(region.home[pages]).tolist():
            self.charge(region, cause, pages[region.home[pages] == number], self.locations[number])

    # Copies of read-mostly pages.

    def drop_copies(self, region: Region, pages: Pages) -> int:
        """Drop all copies of pages but the one at home -> how many pages had any."""
        nr = 0
        for page in pages.tolist() if region.replicas else ():
            for number in list(region.replicas.get(page, ())):
                self.locations[number].policy.remove(region.first_key + page)
                self.drop_copy(region, page, self.locations[number])
                nr += 1
        return nr

    def drop_copy(self, region: Region, page: int, location: Location) -> None:
        """Drop the copy that a location has; its policy does not know it any more."""
        frame = region.replicas[page].pop(location.number)
        if not region.replicas[page]:
            del region.replicas[page]
        pages = np.array([page])
        self.space.unmap_pages(region, pages, [location.number])
        self.give_frames(region, pages, location, np.array([frame]))
        self.events["evicted_copies"] += 1
