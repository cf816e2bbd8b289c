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
from dpud.gpu.migration.client_pages import ClientSource, move_grants
from dpud.gpu.migration.pages import Mask, Pages, batches, new_digest
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

    @property
    def _target(self) -> Location:
        return self.memory.locations[self._to]

    def setup(self) -> Operation[None]:
        """Raises GpuError(ENOMEM) for what does not fit into the device, and where nothing could make room for it."""
        nr_bytes = 0
        for region in self._source.regions:
            if region.type is RegionType.DEVICE and region.page_bytes > self._target.frames.nr_bytes:
                raise GpuError(errno.ENOMEM, f"pages of {region.page_bytes} bytes do not fit into {self.name}")
            nr_bytes += len(self._left_behind(region, np.arange(region.nr_pages))) * region.page_bytes
        free = self._target.frames.nr_free_bytes
        if nr_bytes > free and not self.memory.store.exists:
            raise GpuError(errno.ENOMEM, f"{nr_bytes} bytes do not fit into the {free} that {self.name} has free")
        yield None

    def _left_behind(self, region: Region, pages: Pages) -> Pages:
        """Of them, those that are still on the old device."""
        if region.type not in MOVED:
            return pages[:0]
        left: Mask = (region.state[pages] == PageState.RESIDENT) & (region.home[pages] == self._from)
        return pages[left]

    def send(self, area: int, pages: Pages) -> Operation[int]:
        region = self._source.regions[area]
        self._source.check()
        self.memory.residency.examine(region, pages)
        pages = self._left_behind(region, pages)
        nr_bytes = 0
        step = max(1, self.memory.span_bytes // region.page_bytes)
        for start in range(0, len(pages), step):
            try:
                nr_bytes += self._bring(region, pages[start : start + step])
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

    def prepare(self, missing: list[Mask] | None) -> Operation[str]:
        """The pages here, and their copies there, by digest."""
        here, there = new_digest(), new_digest()
        for region in self._source.regions:
            self.memory.residency.examine(region, np.arange(region.nr_pages))
            pages = self._left_behind(region, np.arange(region.nr_pages))
            pages = pages[self._copied(region, pages)] if len(pages) else pages
            for batch in batches(pages, region.page_bytes):
                frames = np.array([region.replicas[page][self._to] for page in batch.tolist()], dtype=np.int64)
                old = self.memory.locations[self._from]
                here.update(old.load_pages(region.frame[batch], region.page_bytes).data)
                there.update(self._target.load_pages(frames, region.page_bytes).data)
                yield None
        if here.digest() != there.digest():
            raise GpuError(errno.EIO, f"the digest is {here.hexdigest()} here, {there.hexdigest()} on {self.name}")
        return str(here.hexdigest())

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
        move_grants(self.memory, self._source.regions, self._source.client, self._to)
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
