# SPDX-License-Identifier: MIT
"""Serving faults: an access met pages that its location cannot reach, or may not write to yet.

In this order, so that whatever can fail does so before anything is lost:
    1. CORRUPT pages are refused, unless the access overwrites all of them;
    2. STORED pages come in, unless they are to be overwritten whole, and perhaps some more (prefetch);
    3. pages that are elsewhere come closer: migrate, copy (read-mostly), or are reached over the link;
    4. pages without bytes of their own (never written, or to be overwritten whole) get frames;
    5. pages to be written become this location's alone: copies go, the stores forget what they had.

Where a page of managed memory is put: at its preferred location, else where it is used. DEVICE memory is put on its
device, HOST and PINNED in host memory, where the placement says (placement.py).
"""

import errno
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import Pages
from dpud.gpu.errors import GpuError
from dpud.gpu.keepers import Busy
from dpud.gpu.location import Frames, Location
from dpud.gpu.placement import Balancer, OneHost, Placement
from dpud.gpu.residency import Residency
from dpud.gpu.traffic import Cause

Mask = NDArray[np.bool_]


class CorruptAccess(GpuError):
    """An access met a page whose bytes are lost; `page` is its number."""

    def __init__(self, page: int) -> None:
        super().__init__(errno.EIO, "its stored bytes were found to be corrupt")
        self.page = page


class Prefetcher(Protocol):
    """swap.Prefetcher, as far as the data path goes."""

    def on_fault(
        self, first_key: int, nr_pages: int, page: int, resident: Callable[[int], bool], /
    ) -> Sequence[int]: ...


class ThrashGuard(Protocol):
    """swap.ThrashGuard, as far as the data path goes."""

    def fault(self, key: int, now_ns: int, /) -> str:
        """ "ok", "throttle" or "pin"."""
        ...


class Watcher(Protocol):
    """swap.SwapWatch: who is told what is accessed, missing and brought in unasked, by key."""

    def accessed(self, at: int, keys: Collection[int], /) -> None: ...
    def missed(self, keys: Collection[int], /) -> None: ...
    def prefetched(self, keys: Collection[int], /) -> None: ...


PREFETCH_BYTES = 2 << 20
"""Brought in unasked with one access, at most: the driver's block. Whoever caused it waits for all of it."""

THROTTLE_NS = 500_000
PIN_NS = 300 * THROTTLE_NS
"""How long a thrashing page's user waits, and how long a page that goes on thrashing stays. NVIDIA's driver has the
same: a lapse of 500 us, and pinning for 300 lapses (uvm_perf_thrashing.c, open-gpu-kernel-modules 595.45)."""


class ResidentPages:
    """Which pages of a region are in memory: one, or a range of them at once."""

    def __init__(self, region: Region) -> None:
        self._state = region.state

    def __call__(self, page: int) -> bool:
        return bool(self._state[page] == PageState.RESIDENT)

    def span(self, first: int, end: int) -> bytearray:
        """A byte for each page, 1 where it is there."""
        return bytearray((self._state[first:end] == PageState.RESIDENT).tobytes())


class FaultService:
    """Makes pages reachable."""

    def __init__(
        self,
        residency: Residency,
        host: int,
        prefetcher: Prefetcher | None = None,
        thrash_guard: ThrashGuard | None = None,
    ) -> None:
        self.residency = residency
        self.space = residency.space
        self.locations = residency.locations
        self.placement: Placement = OneHost(host)
        self.balancer: Balancer | None = None
        self.prefetcher = prefetcher
        self.thrash_guard = thrash_guard
        self.watcher: Watcher | None = None

    def serve(self, region: Region, pages: Pages, at: int, write: bool, whole: Mask, busy: Busy) -> None:
        """Let location `at` read, or write, these pages; `whole`: those that will be overwritten from end to end.

        Reading never written pages leaves them alone. Raises GpuError: ENOMEM, EIO.
        """
        state = region.state[pages]
        if len(pages) == 1 and not write:  # most faults
            self._serve_read(region, pages, at, int(state[0]), busy)
            return
        overwritten = whole & write
        self._refuse_corrupt(pages[(state == PageState.CORRUPT) & ~overwritten])
        self._bring_in(region, pages[(state == PageState.STORED) & ~overwritten], at, busy)
        self._come_closer(region, pages[state == PageState.RESIDENT], at, write, busy)
        if write:
            fresh = (state != PageState.RESIDENT) & (overwritten | (state == PageState.UNTOUCHED))
            self._populate(region, pages[fresh], at, overwritten[fresh], busy)
            self._make_writable(region, pages, at)

    def _serve_read(self, region: Region, page: Pages, at: int, state: int, busy: Busy) -> None:
        if state == PageState.STORED:
            self._bring_in(region, page, at, busy)
        elif state == PageState.RESIDENT:
            self._come_closer(region, page, at, False, busy)
        elif state == PageState.CORRUPT:
            self._refuse_corrupt(page)

    def populate(self, region: Region) -> None:
        """Give every page of a region a zeroed frame. Raises GpuError(ENOMEM), and has given none."""
        pages = np.arange(region.nr_pages)
        self._populate(region, pages, region.device, np.zeros(len(pages), dtype=np.bool_), ())

    def write_back(self, region: Region, pages: Pages) -> int:
        """Put what the stores do not have of resident pages there, and keep the pages -> how many.

        Raises GpuError: ENOSPC; EIO where a page could not be read any more, when the others are there.
        """
        lost = self._newly_lost(region, pages)
        dirty = pages[(region.state[pages] == PageState.RESIDENT) & ~region.backed[pages]]
        for location in self.locations:
            here = dirty[region.home[dirty] == location.number]
            if len(here):
                self.residency.charge(region, Cause.SWAP, here, location)
                rows = location.load_pages(region.frame[here], region.page_bytes)
                keys, data = (region.first_key + here).tolist(), [row.data for row in rows]
                self.residency.store.put(keys, data, region.client, location.number)
                region.backed[here] = True
                self.space.write_protect(region, here)
        self._refuse_corrupt(lost)
        return len(dirty)

    def _newly_lost(self, region: Region, pages: Pages) -> Pages:
        """Pages that turn out to be lost now that somebody wants to read them."""
        known = region.state[pages] == PageState.CORRUPT
        self.residency.examine(region, pages)
        lost: Pages = pages[(region.state[pages] == PageState.CORRUPT) & ~known]
        return lost

    def follow_advice(self, region: Region, pages: Pages, advice: Advice, location: int) -> None:
        """What advice changes at once; the rest shows at the next fault."""
        resident = pages[region.state[pages] == PageState.RESIDENT]
        if advice is Advice.UNSET_READ_MOSTLY:
            self.residency.drop_copies(region, resident)
        elif advice is Advice.SET_ACCESSED_BY:
            self._map_at(region, resident, location)

    def prefetch_to(self, region: Region, pages: Pages, to: int) -> int:
        """Bring pages to a location before they are used there -> how many came. Raises GpuError."""
        self.residency.examine(region, pages)
        nr, per_batch = 0, max(1, self.locations[to].frames.nr_frames >> region.order >> 2)
        for start in range(0, len(pages), per_batch):
            batch = pages[start : start + per_batch]
            busy = set((region.first_key + batch).tolist())
            away = batch[(region.state[batch] == PageState.RESIDENT) & (region.home[batch] != to)]
            away = away[~self.residency.pins.mask(region, away)]
            stored = batch[region.state[batch] == PageState.STORED]
            self.migrate(region, away, to, busy)
            self._refuse_corrupt(self.residency.bring_in(region, stored, self.locations[to], busy))
            self._map(region, np.concatenate((away, stored)), to)
            nr += len(away) + len(stored)
        return nr

    # 1, 2

    def _refuse_corrupt(self, pages: Pages) -> None:
        if len(pages):
            raise CorruptAccess(int(pages[0]))

    def _bring_in(self, region: Region, pages: Pages, at: int, busy: Busy) -> None:
        bad: list[int] = []
        self._guard(region, pages)
        if self.watcher is not None and len(pages):
            self.watcher.missed((region.first_key + pages).tolist())
        for location, group in self._by_target(region, pages, at):
            bad += self.residency.bring_in(region, group, location, busy).tolist()
            good = group[region.state[group] == PageState.RESIDENT]
            self._map(region, good, at)
            self.space.faults.serve("from_store", len(good))
        if len(pages) and self.prefetcher is not None:
            self._prefetch(region, pages, at, busy)
        self._refuse_corrupt(np.array(bad, dtype=np.int64))

    def _guard(self, region: Region, pages: Pages) -> None:
        """Slow down who thrashes, and keep what goes on thrashing."""
        if self.thrash_guard is None:
            return
        clock = self.space.clock
        now_ns = clock.now_ns()
        verdicts = {key: self.thrash_guard.fault(key, now_ns) for key in (region.first_key + pages).tolist()}
        self.residency.hold([key for key, verdict in verdicts.items() if verdict == "pin"], now_ns + PIN_NS)
        if "throttle" in verdicts.values():
            clock.sleep_until(now_ns + THROTTLE_NS)

    def _prefetch(self, region: Region, pages: Pages, at: int, busy: Busy) -> None:
        """More pages of the region, as long as free memory lasts: nothing is evicted for them."""
        assert self.prefetcher is not None
        wanted: set[int] = set()
        resident = ResidentPages(region)
        for page in pages.tolist():
            wanted.update(self.prefetcher.on_fault(region.first_key, region.nr_pages, page, resident))
        nearest = sorted(wanted, key=lambda page: abs(page - int(pages[0])))[: PREFETCH_BYTES >> region.page_shift]
        found = np.array(sorted(page for page in nearest if region.state[page] == PageState.STORED), dtype=np.int64)
        for location, group in self._by_target(region, found, at):
            reserve = location.frames.nr_frames * self.residency.watermarks.low // 100
            room = max(0, location.frames.nr_free - reserve) >> region.order
            try:
                self.residency.bring_in(region, group[:room], location, busy)
            except GpuError:
                return  # nobody asked for them; whoever does gets the error
            good = group[:room][region.state[group[:room]] == PageState.RESIDENT]
            self._map(region, good, at)
            self.space.faults.serve("prefetched", len(good))
            if self.watcher is not None:
                self.watcher.prefetched((region.first_key + good).tolist())

    # 3

    def _come_closer(self, region: Region, pages: Pages, at: int, write: bool, busy: Busy) -> None:
        """Pages that are in some memory: those at `at` or reached from there already are left alone."""
        if not len(pages):
            return
        reached = self.space.table.ptes[at, region.leaf + pages] != 0
        pages = pages[~reached]
        if self.balancer is not None:
            self.balancer.reached(region, pages, at, lambda some, to: self._try(self.migrate, region, some, to, busy))
        elsewhere = region.home[pages] != at
        if region.type is RegionType.MANAGED and elsewhere.any():
            stay = self._stays(region, pages, at)
            copied = region.advice.read_mostly[pages] & elsewhere & (not write)
            self._try(self.copy, region, pages[copied], at, busy)
            self._try(self.migrate, region, pages[elsewhere & ~copied & ~stay], at, busy)
        remote = int(np.count_nonzero(region.home[pages] != at)) - sum(
            at in region.replicas.get(p, ()) for p in pages.tolist()
        )
        self.space.faults.serve("mapped_remote", max(remote, 0))
        self._map(region, pages, at)

    def _stays(self, region: Region, pages: Pages, at: int) -> Mask:
        """Pages that advice, or somebody's pin, keeps where they are."""
        advice, bit = region.advice, np.uint64(1 << at)
        stays: Mask = (advice.preferred[pages] == region.home[pages]) | (advice.accessed_by[pages] & bit != 0)
        stays |= self.residency.pins.mask(region, pages)
        return stays if self.balancer is None else stays | self.balancer.holds(region, pages, at)

    def _try(self, bring: Callable[..., None], region: Region, pages: Pages, at: int, busy: Busy) -> None:
        """Bring pages closer; where there is no room, they are reached over the link."""
        try:
            if len(pages):
                bring(region, pages, at, busy)
        except GpuError as error:
            if error.errno != errno.ENOMEM:
                raise

    def migrate(self, region: Region, pages: Pages, to: int, busy: Busy) -> None:
        """Move resident pages to another location. Raises GpuError(ENOMEM), and nothing has changed."""
        target = self.locations[to]
        self.residency.drop_copies(region, pages)
        frames = self.residency.take_frames(region, pages, target, busy)
        homes = region.home[pages]
        for source in self.locations:
            here = homes == source.number
            if here.any():
                self._move(region, pages[here], source, target, frames[here])
        self.space.faults.serve("migrated", len(pages))

    def _move(self, region: Region, pages: Pages, source: Location, target: Location, frames: Frames) -> None:
        backed = region.backed[pages]
        self.residency.charge(region, Cause.MIGRATION, pages, target)
        rows = source.load_pages(region.frame[pages], region.page_bytes, target.number)
        target.store_pages(frames, rows)
        self.space.unmap_pages(region, pages)
        for key in (region.first_key + pages).tolist():
            source.policy.remove(key)
        self.residency.give_frames(region, pages, source, region.frame[pages])
        self.residency.settle(region, pages, target, frames)
        region.backed[pages] = backed

    def copy(self, region: Region, pages: Pages, at: int, busy: Busy) -> None:
        """Have copies of resident pages at another location. Raises GpuError(ENOMEM), and there are none."""
        target = self.locations[at]
        frames = self.residency.take_frames(region, pages, target, busy)
        for source in self.locations:
            here = region.home[pages] == source.number
            if here.any():
                self.residency.charge(region, Cause.MIGRATION, pages[here], target)
                target.store_pages(frames[here], source.load_pages(region.frame[pages[here]], region.page_bytes, at))
        for page, frame in zip(pages.tolist(), frames.tolist(), strict=True):
            region.replicas.setdefault(page, {})[at] = frame
            target.policy.insert(region.first_key + page)
        self.space.unmap_pages(region, pages, [at])  # where it had reached the pages over the link
        self.space.write_protect(region, pages)
        self.space.faults.serve("replicated", len(pages))

    # 4, 5

    def _populate(self, region: Region, pages: Pages, at: int, overwritten: Mask, busy: Busy) -> None:
        """New frames; first all of them, then what cannot fail."""
        taken: list[tuple[Location, Pages, Frames]] = []
        try:
            for location, group in self._by_target(region, pages, at):
                taken.append((location, group, self.residency.take_frames(region, group, location, busy)))
        except GpuError:
            for location, group, frames in taken:
                self.residency.give_frames(region, group, location, frames)
            raise
        for location, group, frames in taken:
            self._settle_fresh(region, group, location, frames, overwritten[np.isin(pages, group)])
            self._map(region, group, at)

    def _settle_fresh(
        self, region: Region, pages: Pages, location: Location, frames: Frames, overwritten: Mask
    ) -> None:
        for page in pages[region.backed[pages]].tolist():
            self.residency.store.drop(region.first_key + page)
        location.zero_pages(frames[~overwritten], region.page_bytes)
        was_stored = int(np.count_nonzero(region.state[pages] == PageState.STORED))
        self.space.faults.serve("overwritten", was_stored)
        self.space.faults.serve("zero_fill", len(pages) - was_stored)
        self.residency.settle(region, pages, location, frames)

    def _make_writable(self, region: Region, pages: Pages, at: int) -> None:
        backed = pages[region.backed[pages]]
        for page in backed.tolist():
            self.residency.store.drop(region.first_key + page)
        region.backed[backed] = False
        self.space.faults.serve("write_protect", len(backed))
        self.space.faults.serve("collapsed", self.residency.drop_copies(region, pages))
        self._map(region, pages, at)

    # Mapping.

    def _by_target(self, region: Region, pages: Pages, at: int) -> list[tuple[Location, Pages]]:
        """Pages by the location where they are to be put."""
        if region.type is RegionType.DEVICE:
            return [(self.locations[region.device], pages)] if len(pages) else []
        if region.type is not RegionType.MANAGED:
            targets = self.placement.place(region, pages, at)
        else:
            preferred = region.advice.preferred[pages]
            targets = np.where(preferred >= 0, preferred, at)
        return [(self.locations[number], pages[targets == number]) for number in np.unique(targets).tolist()]

    def _map(self, region: Region, pages: Pages, at: int) -> None:
        """Enter resident pages into the table of `at`, and of those that advice says will use them."""
        self._map_at(region, pages, at)
        accessed_by = region.advice.accessed_by[pages]
        for number in range(len(self.locations)) if accessed_by.any() else ():
            if number != at:
                self._map_at(region, pages[accessed_by & np.uint64(1 << number) != 0], number)

    def _map_at(self, region: Region, pages: Pages, at: int) -> None:
        """Through the location's own copies where it has some; to write only where there is no other copy."""
        shared = region.backed[pages]
        if region.replicas:
            copied = np.array([at in region.replicas.get(page, ()) for page in pages.tolist()], dtype=np.bool_)
            for page in pages[copied].tolist():
                frame = np.array([region.replicas[page][at]])
                self.space.map_pages(region, np.array([page]), at, at, frame, write=False)
            pages, shared = pages[~copied], shared[~copied]
            shared = shared | np.isin(pages, list(region.replicas))
        if len(pages) == 1:  # most faults
            home, write = int(region.home[pages[0]]), not shared[0]
            self.space.map_pages(region, pages, at, home, region.frame[pages], write=write)
            return
        homes = region.home[pages]
        for number in range(len(self.locations)):
            for write in (False, True):
                group = pages[(homes == number) & (shared != write)]
                if len(group):
                    self.space.map_pages(region, group, at, number, region.frame[group], write=write)
