# SPDX-License-Identifier: MIT
"""Who is in memory: frames are taken, pages are evicted to make room, and come back.

Theory of operation
    A frame is taken from the location's free blocks. Where there is none, pages are evicted in the policy's order until
    there are enough frames; where the free frames then lie too scattered for a large page, the least used block of that
    size is emptied (as NVIDIA's driver evicts a whole 2 MiB root chunk). Pages that the current access needs (`busy`)
    and pinned ones are never chosen.

    Eviction copies a page's bytes into the stores *before* it unmaps and frees it. If the stores have no room, the page
    stays, and it is the one who asked for a frame that gets ENOMEM. A page whose bytes the stores have already
    (`backed`) is unmapped and freed without a copy.

    An access that has to wait for eviction evicts `cluster_bytes`, so that the next few need not: what is written
    together costs half as much. Those pages leave earlier than they would one by one. With `cluster_bytes` 0 a page's
    turn comes only when its frame is needed, and what leaves is what the policy alone would have chosen.

    `background` keeps free memory between watermarks, so that accesses rarely wait: below `low` it evicts until `high`.

Invariants
    - All of a page's bytes are in exactly one of: its frame, the stores (or both, while `backed`).
"""

import errno
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import AddressSpace, Pages
from dpud.gpu.defrag.pins import Pins
from dpud.gpu.errors import GpuError
from dpud.gpu.holdings import Holdings
from dpud.gpu.keepers import Busy, Defragmenter
from dpud.gpu.location import Frames, Location
from dpud.gpu.performance import performance
from dpud.gpu.policy import ClientPolicies
from dpud.gpu.store import BackingStore, Place
from dpud.gpu.traffic import Cause

_BATCH_FRAMES = (4 << 20) // FRAME_BYTES
CLUSTER_BYTES = 128 << 10
"""SWAP_CLUSTER_MAX pages of 4 KiB (include/linux/swap.h)."""

_ANY_PRIORITY = 1 << 30

_MAX_REFUSALS = 8
"""Pages in a row that find no room in the stores before eviction gives up: another may compress better. Also: blocks
that are tried before none can be emptied."""

ReclaimOrder = Callable[[int, int, Mapping[str, int]], Sequence[tuple[str, int]]]
"""overcommit.Admission.reclaim_order: (bytes needed, for which priority, what each client has there) -> (client, bytes
to take) in order."""

log = logging.getLogger("dpud.gpu.address_space")


@dataclass
class Watermarks:
    """Free memory that `background` keeps in each location, in percent of it."""

    low: int = 10
    high: int = 15


class Residency(Holdings):
    """Who is in memory, of all locations."""

    def __init__(self, space: AddressSpace, locations: Sequence[Location], store: BackingStore) -> None:
        super().__init__(space, locations, store)
        self.watermarks = Watermarks()
        self._reclaiming: set[int] = set()
        self._held: dict[int, int] = {}  # key -> until when, in ns
        self.cluster_bytes = CLUSTER_BYTES
        self.reclaim_order: ReclaimOrder | None = None
        """Whose pages go first; without it, the policy's order decides alone."""
        self.demote: Callable[[Location, int], int] = lambda _location, _nr_frames: 0
        """Move cold pages of a host node to a slower one, rather than into the stores -> frames freed (numa/)."""
        self.pins = Pins()
        """Pages that stay in their frames."""
        self.defragmenter: Defragmenter | None = None
        """Who puts free frames together before somebody is evicted for that."""

    def follow(self, order: ReclaimOrder) -> None:
        """Somebody says whose pages go first: each client has a list of its own. Before there are any pages."""
        self.reclaim_order = order
        for location in self.locations:
            assert not len(location.policy), "pages are on lists already"
            location.policy = ClientPolicies(location.policy.new_policy, self._client_of)

    def _client_of(self, key: int) -> str:
        return self.space.regions.page_of(key)[0].client

    # Frames.

    def take_frames(self, region: Region, pages: Pages, location: Location, busy: Busy) -> Frames:
        """A frame for each page. Raises GpuError(ENOMEM), and has taken none."""
        keys = region.first_key + pages
        if region.type is not RegionType.PINNED:
            policy = location.policy.of(region.client)
            for key in keys.tolist():
                policy.miss(key)
        taken = self.find_frames(location, region.order, keys)
        if len(taken) < len(keys):
            busy = {*busy, *keys.tolist()}
        while (nr := len(taken)) < len(keys):
            self._make_room(region, len(keys) - nr, location, busy)
            taken = np.concatenate((taken, self.find_frames(location, region.order, keys[nr:])))
            if len(taken) == nr:
                self.give_frames(region, pages[:nr], location, taken)
                why = f"{location.name} is full and nothing on it can be evicted"
                if self.defragmenter is not None:
                    why += f"; {self.defragmenter.explain(location, region.order, len(keys), busy)}"
                raise GpuError(errno.ENOMEM, why)
        return taken

    def hold(self, keys: Collection[int], until_ns: int) -> None:
        """Do not evict these pages for a while (they thrash), unless nothing else can be."""
        self._held.update(dict.fromkeys(keys, until_ns))

    def _is_held(self, key: int) -> bool:
        if key in self.pins:
            return True
        until_ns = self._held.get(key)
        if until_ns is not None and until_ns <= self.space.clock.now_ns():
            del self._held[key]
            until_ns = None
        return until_ns is not None

    def _make_room(self, region: Region, nr_blocks: int, location: Location, busy: Busy) -> None:
        """Evict for so many blocks; where that does not give even one, empty one."""
        order = region.order
        lacking = (nr_blocks << order) - location.frames.nr_free_for(order)
        if lacking > 0:
            wanted = max(lacking, min(self.cluster_bytes // FRAME_BYTES, location.frames.nr_frames >> 4))
            freed = self._evict_in_order(location, wanted, busy, region.priority)
            if freed < lacking and self._held:
                self._held.clear()
                freed += self._evict_in_order(location, lacking - freed, busy, region.priority)
            if freed < lacking:  # from higher priorities no more than it takes
                freed += self._evict_in_order(location, lacking - freed, busy, _ANY_PRIORITY)
            freed += self.evict(location, lacking - freed, busy)
            if freed < lacking:
                self._evict_clean(location, lacking - freed, busy)
        if location.frames.nr_free_for(order) >= 1 << order and not any(location.frames.free_blocks()[order:]):
            self._put_together(order, location, busy)

    def _evict_in_order(self, location: Location, nr_frames: int, busy: Busy, priority: int) -> int:
        """Evict from clients as admission says -> frames freed.

        A page that is held for a while is no reason to take one of a higher priority; one that stays for good is.
        """
        before = location.frames.nr_free
        if self.reclaim_order is None:
            return self.evict(location, nr_frames, busy)
        resident = self._resident_bytes(location)
        for asked in (nr_frames, location.frames.nr_frames):
            for client, nr_bytes in self.reclaim_order(asked * FRAME_BYTES, priority, resident):
                lacking = nr_frames - (location.frames.nr_free - before)
                if lacking <= 0:
                    break
                self.evict(location, min(lacking, -(-nr_bytes // FRAME_BYTES)), busy, client)
            if self._held:
                break
        return location.frames.nr_free - before

    def _resident_bytes(self, location: Location) -> dict[str, int]:
        """What each client has in a location's memory."""
        found: dict[str, int] = {}
        for region in self.space.regions:
            nr_bytes = region.nr_resident(location.number) << region.page_shift
            found[region.client] = found.get(region.client, 0) + nr_bytes
        return found

    def _put_together(self, order: int, location: Location, busy: Busy) -> None:
        """There is enough free memory, but nowhere in one piece: pages move within the memory, else out of it."""
        if self.defragmenter is None or not self.defragmenter.make_block(location, order, busy):
            self._empty_a_block(order, location, busy)

    def _empty_a_block(self, order: int, location: Location, busy: Busy) -> None:
        for block in location.frames.blocks_by_use(order)[:_MAX_REFUSALS]:
            keys = location.frames.owners(block, order)
            if all(self._may_go(key, busy) for key in keys) and self._empty(location, keys):
                self.events["blocks_emptied"] += 1
                return

    def _may_go(self, key: int, busy: Busy) -> bool:
        if key in busy or self._is_held(key):
            return False
        return self.space.regions.page_of(key)[0].type is not RegionType.PINNED

    def _empty(self, location: Location, keys: list[int]) -> bool:
        for key in keys:
            location.policy.remove(key)
        kept = self._evict_keys(location, keys)
        for key in kept:
            location.policy.insert(key)
        return not kept

    # Out.

    def evict(self, location: Location, nr_frames: int, busy: Busy = (), client: str | None = None) -> int:
        """Take pages, or a client's, out of a location's memory until so many frames are free that were not -> how many
        were."""
        before, skipped, nr_refused = location.frames.nr_free, list[int](), 0
        begin_ns = self.space.clock.now_ns()
        while (freed := location.frames.nr_free - before) < nr_frames and nr_refused < _MAX_REFUSALS:
            keys = self._pick(location, min(nr_frames - freed, _BATCH_FRAMES), busy, skipped, client)
            if not keys:
                break
            kept = self._evict_keys(location, keys)
            skipped += kept
            nr_refused = nr_refused + len(kept) if len(kept) == len(keys) else 0
        for key in skipped:
            location.policy.insert(key)
        freed = location.frames.nr_free - before
        performance(log, f"evict {location.name}", freed * FRAME_BYTES, begin_ns, self.space.clock.now_ns())
        return freed

    def _evict_clean(self, location: Location, nr_frames: int, busy: Busy) -> None:
        """The stores are full: pages of which they have a copy leave, whoever's turn it is."""
        for region in self.space.regions:
            here = region.backed & (region.state == PageState.RESIDENT) & (region.home == location.number)
            clean = (key for key in (region.first_key + np.flatnonzero(here)).tolist() if self._may_go(key, busy))
            keys = list(islice(clean, -(-nr_frames >> region.order)))
            for key in keys:
                location.policy.remove(key)
            before = location.frames.nr_free
            self._evict_keys(location, keys)
            nr_frames -= location.frames.nr_free - before
            if nr_frames <= 0:
                return

    def evict_pages(self, region: Region, pages: Pages) -> int:
        """Take these pages out of memory, copies too, where they are there and may go -> how many left."""
        nr = 0
        for location in self.locations:
            here = pages[(region.state[pages] == PageState.RESIDENT) & (region.home[pages] == location.number)]
            keys = [key for key in (region.first_key + here).tolist() if self._may_go(key, ())]
            for start in range(0, len(keys), max(1, _BATCH_FRAMES >> region.order)):
                batch = keys[start : start + max(1, _BATCH_FRAMES >> region.order)]
                nr += len(batch)
                for key in batch:
                    location.policy.remove(key)
                for key in self._evict_keys(location, batch):
                    location.policy.insert(key)
                    nr -= 1
        return nr

    def background(self, budget_bytes: int) -> int:
        """Bring free memory up to the high watermark where it is below the low one -> bytes evicted."""
        evicted = 0
        for location in self.locations:
            frames = location.frames
            if frames.nr_free * 100 < frames.nr_usable * self.watermarks.low:
                self._reclaiming.add(location.number)
            lacking = frames.nr_usable * self.watermarks.high // 100 - frames.nr_free
            if lacking <= 0 or location.number not in self._reclaiming:
                self._reclaiming.discard(location.number)
                continue
            wanted = min(lacking, (budget_bytes - evicted) // FRAME_BYTES)
            nr = self.demote(location, wanted)
            nr += self._evict_in_order(location, wanted - nr, (), _ANY_PRIORITY)
            if nr == 0 and evicted < budget_bytes:
                self._reclaiming.discard(location.number)  # nothing more can go
            evicted += nr * FRAME_BYTES
        return evicted

    @property
    def is_short(self) -> bool:
        """Whether `background` has something to do."""
        low = self.watermarks.low
        return any(place.frames.nr_free * 100 < place.frames.nr_usable * low for place in self.locations)

    def _pick(
        self, location: Location, nr_frames: int, busy: Busy, skipped: list[int], client: str | None
    ) -> list[int]:
        keys: list[int] = []
        nr = 0
        while nr < nr_frames and (key := location.policy.victim(client)) is not None:
            if key in busy or self._is_held(key):
                skipped.append(key)
                continue
            keys.append(key)
            nr += 1 << self.space.regions.page_of(key)[0].order
        return keys

    def _evict_keys(self, location: Location, keys: Sequence[int]) -> list[int]:
        """Evict pages that the policy has given out -> those for whom the stores had no room."""
        by_region: dict[Region, list[int]] = {}
        for key in keys:
            region, page = self.space.regions.page_of(key)
            if region.home[page] != location.number:
                self.drop_copy(region, page, location)
            else:
                by_region.setdefault(region, []).append(page)
        kept = []
        for region, numbers in by_region.items():
            pages = np.array(numbers, dtype=np.int64)
            bad = self.unreadable(region, pages[~region.backed[pages]])
            kept += (region.first_key + bad).tolist()
            for page in self._evict_pages(region, np.setdiff1d(pages, bad), location).tolist():
                kept.append(region.first_key + page)
        self.events["refused"] += len(kept)
        return kept

    def _evict_pages(self, region: Region, pages: Pages, location: Location) -> Pages:
        """Evict pages of one region -> those that stay."""
        backed = region.backed[pages]
        kept = self._save(region, pages[~backed], location)
        gone = np.setdiff1d(pages, kept, assume_unique=True)
        self.events["evicted"] += len(gone)
        self.events["evicted_clean"] += int(np.count_nonzero(backed))
        self.drop_copies(region, gone)
        self.space.unmap_pages(region, gone)
        self.give_frames(region, gone, location, region.frame[gone])
        region.state[gone] = PageState.STORED
        region.backed[gone] = True
        return kept

    def _save(self, region: Region, pages: Pages, location: Location) -> Pages:
        """Put pages into the stores -> those that found no room. All at once, else one by one."""
        if not len(pages):
            return pages
        self.charge(region, Cause.SWAP, pages, location)
        rows = location.load_pages(region.frame[pages], region.page_bytes)
        keys = (region.first_key + pages).tolist()
        if self._put(keys, [row.data for row in rows], region.client, location):
            return pages[:0]
        if len(keys) == 1:
            return pages
        refused: list[int] = []
        for index, (key, row) in enumerate(zip(keys, rows, strict=True)):
            if len(refused) == _MAX_REFUSALS:
                return pages[[*refused, *range(index, len(keys))]]
            if not self._put([key], [row.data], region.client, location):
                refused.append(index)
        return pages[refused]

    def _put(self, keys: Sequence[int], pages: Sequence[memoryview], client: str, location: Location) -> bool:
        try:
            self.store.put(keys, pages, client, location.number)
        except GpuError as error:
            if error.errno != errno.ENOSPC:
                log.error("a store failed: %s", error)
            return False
        return True

    # In.

    def bring_in(self, region: Region, pages: Pages, location: Location, busy: Busy) -> Pages:
        """STORED pages into a location's memory -> those that turned out to be corrupt.

        Raises GpuError(ENOMEM), or what a tier raises, and nothing has changed.
        """
        begin_ns = self.space.clock.now_ns()
        frames = self.take_frames(region, pages, location, busy)
        self.charge(region, Cause.SWAP, pages, location)
        rows = np.empty((len(pages), region.page_bytes), dtype=np.uint8)
        keys = (region.first_key + pages).tolist()
        try:
            bad = set(self.store.fetch(keys, [row.data for row in rows], location.number))
        except GpuError:
            self.give_frames(region, pages, location, frames)
            raise
        lost = pages[:0]
        if bad:
            good = np.array([key not in bad for key in keys], dtype=np.bool_)
            lost = pages[~good]
            self.give_frames(region, lost, location, frames[~good])
            self._mark_corrupt(region, lost)
            pages, frames, rows, keys = pages[good], frames[good], rows[good], [key for key in keys if key not in bad]
        location.store_pages(frames, rows)
        self.settle(region, pages, location, frames)
        region.backed[pages] = [self.store.place(key) is Place.SWAP for key in keys]
        nr_bytes = len(pages) << region.page_shift
        performance(log, f"bring in {location.name}", nr_bytes, begin_ns, self.space.clock.now_ns())
        return lost

    def _mark_corrupt(self, region: Region, pages: Pages) -> None:
        region.state[pages] = PageState.CORRUPT
        region.backed[pages] = False
        self.events["corrupt"] += len(pages)
        for page in pages.tolist():
            log.error("page %#x at %#x is corrupt", region.first_key + page, region.va + (page << region.page_shift))

    # Gone.

    def forget(self, region: Region) -> None:
        """A region is freed: frames and stored bytes go."""
        self.pins.forget(region)
        self.discard(region, np.arange(region.nr_pages))
        for key in self._held.keys() & range(region.first_key, region.first_key + region.nr_pages):
            del self._held[key]
