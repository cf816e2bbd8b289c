# SPDX-License-Identifier: MIT
"""The target that is another device of the same memory. Addresses stay; what changes is where the pages are.

Theory of operation
    A page that was brought over is a copy, as read-mostly pages have them: the next write to the page drops it, as a
    write drops any copy, so what is there is always right, and memory pressure on the target may take it back. At the
    switch a copy becomes the page itself. Pages in the compressed pool or in swap are behind all devices alike: they
    stay, and come in on the new device. Pages of host and pinned memory stay too.

    In post-copy the pages are still on the old device when the client runs on the new one: the first access brings
    one over, before all others, and the time it waits is counted.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.errors import GpuError
from dpud.gpu.location import Location
from dpud.gpu.memory import GpuMemory
from dpud.gpu.migration.client_pages import ClientSource
from dpud.gpu.migration.hashes import PageHashes
from dpud.gpu.migration.pages import Mask, Pages, batches
from dpud.gpu.swap.latency import Latencies
from kernelsim.operation import Operation

MOVED = (RegionType.DEVICE, RegionType.MANAGED)


class LocalSource(ClientSource):
    """What stays in the memory that it is in."""

    def release(self) -> None:
        """Nothing is freed."""


class DeviceTarget:
    """An engine.Target."""

    def __init__(self, source: LocalSource, device: int) -> None:
        """Raises GpuError(EINVAL) for a device that is not there, or is the client's already."""
        self.memory: GpuMemory = source.memory
        self._source, self._to = source, device
        self._from = self.memory.clients[source.client].device
        if not 0 <= device < self.memory.nr_devices or device == self._from:
            raise GpuError(errno.EINVAL, f"{source.client} cannot go to device {device}")
        self.name = f"device{device}"
        self.waits = Latencies()
        self._switched = False
        areas = source.manifest.areas
        self._here, self._there = PageHashes(areas), PageHashes(areas)
        self._compared = [np.full(area.nr_pages, -1, dtype=np.int64) for area in areas]
        """By page: the frame on the target that was compared with the page, or -1."""

    @property
    def _target(self) -> Location:
        return self.memory.locations[self._to]

    def setup(self) -> Operation[None]:
        """Raises GpuError(ENOMEM) for what does not fit into the device, and where nothing could make room for it."""
        self._check()
        nr_bytes = 0
        for region in self._source.regions:
            if region.type is RegionType.DEVICE and region.page_bytes > self._target.frames.nr_bytes:
                raise GpuError(errno.ENOMEM, f"pages of {region.page_bytes} bytes do not fit into {self.name}")
            nr_bytes += len(self._left_behind(region, np.arange(region.nr_pages))) * region.page_bytes
        free = self._target.frames.nr_free_bytes
        if nr_bytes > free and not self.memory.store.exists:
            raise GpuError(errno.ENOMEM, f"{nr_bytes} bytes do not fit into the {free} that {self.name} has free")
        yield None

    def _check(self) -> None:
        """Before the switch. Raises GpuError: ESTALE; ENODEV where a device was lost: recovery has moved the client."""
        self._source.check()
        if self._switched:
            return
        for location in (self.memory.locations[self._from], self._target):
            if location.is_lost:
                raise GpuError(errno.ENODEV, f"{location.name} was lost")
        if self.memory.clients[self._source.client].device != self._from:
            raise GpuError(errno.ESTALE, f"{self._source.client} went to another device meanwhile")

    def _left_behind(self, region: Region, pages: Pages) -> Pages:
        """Of them, those that are still on the old device."""
        if region.type not in MOVED:
            return pages[:0]
        left: Mask = (region.state[pages] == PageState.RESIDENT) & (region.home[pages] == self._from)
        return pages[left]

    def send(self, area: int, pages: Pages) -> Operation[int]:
        region = self._source.regions[area]
        self.memory.residency.examine(region, pages)
        self._check()
        self._compared[area][pages] = -1
        pages = self._left_behind(region, pages)
        nr_bytes = 0
        for batch in batches(pages, region.page_bytes, self.memory.span_bytes):
            self._check()
            batch = self._left_behind(region, batch)  # what is broken may have been made good elsewhere
            try:
                nr_bytes += self._bring(region, batch)
                self._compare(area, batch)
            except GpuError as error:
                if not self._switched or error.errno != errno.ENOMEM:
                    raise
                break  # after the switch, what finds no room is used over the link
        yield None
        return nr_bytes

    def _bring(self, region: Region, pages: Pages) -> int:
        busy = set((region.first_key + pages).tolist())
        if self._switched:
            self.memory.faults.migrate(region, pages, self._to, busy)
        else:
            pages = pages[~self._copied(region, pages)]
            self.memory.faults.copy(region, pages, self._to, busy)
        return len(pages) * region.page_bytes

    def _copied(self, region: Region, pages: Pages) -> Mask:
        replicas = region.replicas
        return np.array([self._to in replicas.get(page, ()) for page in pages.tolist()], dtype=np.bool_)

    def end_round(self) -> Operation[None]:
        self.memory.locations[self._to].hardware.sync()
        yield None

    def _copies(self, area: int, pages: Pages) -> tuple[Pages, NDArray[np.int64]]:
        """(those that are still here and have a copy there, the copies' frames)."""
        region = self._source.regions[area]
        pages = self._left_behind(region, pages)
        pages = pages[self._copied(region, pages)] if len(pages) else pages
        return pages, np.array([region.replicas[page][self._to] for page in pages.tolist()], dtype=np.int64)

    def _compare(self, area: int, pages: Pages) -> None:
        """Hash pages here and their copies there, but those that were since they came."""
        if self._switched:
            return
        region, old = self._source.regions[area], self.memory.locations[self._from]
        self.memory.residency.examine(region, pages)
        pages, frames = self._copies(area, pages)
        fresh = self._compared[area][pages] != frames
        pages, frames = pages[fresh], frames[fresh]
        if not len(pages):
            return
        whole = np.zeros(len(pages), dtype=np.bool_)
        self._here.put(area, pages, old.load_pages(region.frame[pages], region.page_bytes), whole)
        self._there.put(area, pages, self._target.load_pages(frames, region.page_bytes), whole)
        self._compared[area][pages] = frames

    def prepare(self, missing: list[Mask] | None) -> Operation[str]:
        """The pages here, and their copies there, by digest. Most were compared when they came."""
        left_out = []
        for area, region in enumerate(self._source.regions):
            every = np.arange(region.nr_pages)
            self.memory.residency.examine(region, every)
            if missing is not None:
                self._compared[area][missing[area]] = -1
            for batch in batches(self._copies(area, every)[0], region.page_bytes):
                self._compare(area, batch)
                yield None
            left_out.append(~np.isin(every, self._copies(area, every)[0]))
        self._check()
        here, there = self._here.digest(left_out), self._there.digest(left_out)
        if here != there:
            raise GpuError(errno.EIO, f"the digest is {here.hex()} here, {there.hex()} on {self.name}")
        return here.hex()

    def commit(self) -> Operation[None]:
        """In one piece: nobody ever sees half of it."""
        self._switched = True
        for region in self._source.regions:
            pages = self._left_behind(region, np.arange(region.nr_pages))
            if len(pages):
                self._adopt(region, pages[self._copied(region, pages)])
            if region.type is RegionType.DEVICE:
                region.device = self._to
            if len(self._left_behind(region, pages)):
                region.arrival = LocalArrival(self, region)
        client = self.memory.client(self._source.client, self._to)
        self.memory.accounting.moved(client, self._from)
        self.memory.accounting.tell()
        self._source.thaw()
        yield None

    def _adopt(self, region: Region, pages: Pages) -> None:
        """A copy becomes the page itself, and what was the page is given back."""
        memory, old = self.memory, self.memory.locations[self._from]
        frames = np.array([region.replicas[page].pop(self._to) for page in pages.tolist()], dtype=np.int64)
        for page in pages.tolist():
            if not region.replicas[page]:
                del region.replicas[page]
        memory.residency.drop_copies(region, pages)
        memory.space.unmap_pages(region, pages)
        for key in (region.first_key + pages).tolist():
            old.policy.remove(key)
        memory.residency.give_frames(region, pages, old, region.frame[pages])
        region.home[pages], region.frame[pages] = self._to, frames

    def resume(self) -> Operation[str]:
        """There is no connection that could be lost."""
        yield None
        return "owner"

    def missing(self) -> list[Mask]:
        masks = []
        for region in self._source.regions:
            mask = np.zeros(region.nr_pages, dtype=np.bool_)
            if self._switched and not region.released:
                mask[self._left_behind(region, np.arange(region.nr_pages))] = True
            masks.append(mask)
        return masks

    def wanted(self) -> tuple[int, Pages] | None:
        """Whoever wants a page brings it over himself."""
        return None

    def finish(self) -> Operation[None]:
        for region in self._source.regions:
            region.arrival = None
        yield None

    def abort(self, why: str) -> None:
        """The copies go."""
        if self._switched:
            return
        for region in self._source.regions:
            for page in [] if region.released else list(region.replicas):
                if self._to in region.replicas[page]:
                    self.memory.residency.drop_copies(region, np.array([page]))

    def first_access(self, region: Region, pages: Pages) -> None:
        """Somebody cannot wait for pages: they come now. Without room they are used over the link."""
        self.memory.residency.examine(region, pages)
        pages = self._left_behind(region, pages)
        if not len(pages):
            return
        begin_ns = self.memory.clock.now_ns()
        try:
            self._bring(region, pages)
        except GpuError as error:
            if error.errno != errno.ENOMEM:
                raise
        self.waits.add(self.memory.clock.now_ns() - begin_ns)


class LocalArrival:
    """A regions.Arrival between devices."""

    def __init__(self, target: DeviceTarget, region: Region) -> None:
        self._target, self._region = target, region

    def bring(self, first: int, nr_pages: int, whole: NDArray[np.bool_] | None) -> None:
        self._target.first_access(self._region, np.arange(first, first + nr_pages))
