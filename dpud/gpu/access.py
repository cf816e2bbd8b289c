# SPDX-License-Identifier: MIT
"""AccessPath: how bytes are read and written at an address. GpuMemory (memory.py) adds who has which addresses.

Theory of operation
    An access comes from a location (the client's device, unless it says otherwise) and goes page by page: permission,
    translation, a fault where that leads nowhere (faults.py), then the bytes, from wherever they are.

    An access of many pages is done in spans of at most 1 MiB, or a quarter of the smallest memory: only one span's
    pages have to be in memory at once, so an access may be larger than the device. An access that fails has done the
    spans before the one that failed.

Differs from hardware: `read` and `write` move bytes between memory and the caller, so their time is the link's even
where the caller stands for a kernel on the device.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.accounting import Accounting, Stalls
from dpud.gpu.address_space.pagetable import PTE_PRESENT, PTE_WRITE, frames_of, location_of, locations_of
from dpud.gpu.address_space.permissions import READ, WRITE, Permission
from dpud.gpu.address_space.regions import PageState, Region
from dpud.gpu.address_space.space import AddressSpace, Pages
from dpud.gpu.client import Client
from dpud.gpu.clock import Clock
from dpud.gpu.errors import GpuError
from dpud.gpu.faults import CorruptAccess, FaultService, Watcher
from dpud.gpu.location import HOST, Location
from dpud.gpu.residency import Residency
from dpud.gpu.spans import piece_of, stretches, whole_pages
from dpud.gpu.traffic import Cause
from dpud.gpu.window import Window

_MAX_FAULTS = 16


class AccessPath:
    """Reads and writes. Whoever derives from it makes the parts."""

    clock: Clock
    nr_devices: int
    locations: Sequence[Location]
    space: AddressSpace
    residency: Residency
    faults: FaultService
    accounting: Accounting
    stalls: Stalls
    clients: dict[str, Client]
    span_bytes: int
    watcher: Watcher | None
    defrag: Any
    on_short: Callable[[], None]
    """Called when an access left a location below its low watermark: for whoever runs `background`."""
    on_client: Callable[[], None]
    """Called when there is a new client."""

    def client(self, name: str, device: int | None = None) -> Client:
        """The client of that name, made where there is none. Raises GpuError(EINVAL) for a device that is not there."""
        if device is not None and not 0 <= device < self.nr_devices:
            raise GpuError(errno.EINVAL, f"no device {device}")
        if name not in self.clients:
            self.clients[name] = Client(name, device or 0)
            self.on_client()
        client = self.clients[name]
        if device is not None:
            client.device = device
        return client

    def read(self, client: str, va: int, nr_bytes: int, at: int | None = None) -> bytes:
        """Bytes at an address. Raises GpuError: EFAULT, EACCES, EIO (lost), ENOMEM (no room to bring them in)."""
        at, region = self._checked(client, va, nr_bytes, READ, at)
        out = np.empty(nr_bytes, dtype=np.uint8)
        with self.stalls.access(client):
            for first, nr_pages, offset, span in self._spans(region, va, nr_bytes):
                entries = self._reach(client, region, first, nr_pages, at, None)
                self._load(client, region, entries, offset, out[span], at)
        return out.tobytes()

    def write(self, client: str, va: int, data: bytes | bytearray | memoryview, at: int | None = None) -> None:
        """Put bytes at an address. Raises as `read` does; `nr_done` of the error says how many are there."""
        at, region = self._checked(client, va, len(data), WRITE, at)
        source = np.frombuffer(data, dtype=np.uint8)
        with self.stalls.access(client):
            for first, nr_pages, offset, span in self._spans(region, va, len(data)):
                whole = whole_pages(region, nr_pages, offset, span.stop - span.start)
                try:
                    entries = self._reach(client, region, first, nr_pages, at, whole)
                except GpuError as error:
                    error.nr_done = span.start
                    raise
                self._store(client, region, entries, offset, source[span], at)
                self.space.set_dirty(region, first, nr_pages, at)

    def access(self, client: str, va: int, permissions: Permission, at: int | None = None) -> Window:
        """From `va` to the end of its region, once the first page is there. Raises as `read` and `write` do."""
        at, region = self._checked(client, va, 1, permissions, at)
        first, _ = self.space.page_range(region, va, 1)
        whole = np.zeros(1, dtype=np.bool_) if permissions & WRITE else None
        with self.stalls.access(client):
            self._reach(client, region, first, 1, at, whole)
        return Window(self, client, va, region.va + region.nr_bytes - va, at)

    def sync(self, client: str, va: int, nr_bytes: int) -> int:
        """Have the stores hold what the pages hold now, as msync(2) -> pages written. The pages stay in memory.

        Raises GpuError: EFAULT, EACCES, ENOSPC.
        """
        _, region = self._checked(client, va, nr_bytes, READ, None)
        first, end = self.space.page_range(region, va, nr_bytes)
        return self.faults.write_back(region, np.arange(first, end))

    def _checked(self, client: str, va: int, nr_bytes: int, wanted: Permission, at: int | None) -> tuple[int, Region]:
        """Location and region of an access that is allowed."""
        caller = self.client(client)
        caller.active_ns = self.clock.now_ns()
        at = caller.device if at is None else at
        if not -1 <= at < len(self.locations) or nr_bytes < 0:
            raise GpuError(errno.EINVAL, f"{nr_bytes} bytes from location {at}")
        at = self.faults.placement.nearest(caller.device) if at == HOST else at
        if self.locations[at].is_lost:
            raise GpuError(errno.ENODEV, f"{self.locations[at].name} is lost")
        region = self.space.check_access(client, va, nr_bytes, wanted, at)
        if region.held:
            raise GpuError(errno.EBUSY, f"{region.client} is being handed over")
        return at, region

    def _spans(self, region: Region, va: int, nr_bytes: int) -> Iterator[tuple[int, int, int, slice]]:
        """(first page, pages, offset in the first, bytes of the access) piece by piece."""
        shift, per_span = region.page_shift, max(1, self.span_bytes >> region.page_shift)
        done = 0
        while done < nr_bytes:
            first, offset = divmod(va + done - region.va, 1 << shift)
            nr = min(nr_bytes - done, (per_span << shift) - offset)
            yield first, -(-(offset + nr) >> shift), offset, slice(done, done + nr)
            done += nr

    def _reach(
        self, client: str, region: Region, first: int, nr_pages: int, at: int, whole: NDArray[np.bool_] | None
    ) -> NDArray[np.uint64]:
        """Entries of pages, once they can be read, or written (`whole` says which of them are overwritten whole)."""
        if region.arrival is not None:
            region.arrival.bring(first, nr_pages, whole)
        pages: Pages = np.arange(first, first + nr_pages)
        if self.faults.balancer is not None:
            self.faults.balancer.tick()
        for attempt in range(_MAX_FAULTS):
            self.residency.examine(region, pages)  # again after each fault: what came in may lie in broken cells
            entries = self.space.entries(region, first, nr_pages, at)
            lacking = self._lacking(region, pages, entries, whole is not None)
            if not attempt:
                self._touch(region, first, entries)
            if not lacking.any():
                break
            self._fault(client, region, first, at, whole, lacking)
        else:
            raise GpuError(errno.EIO, f"no frame holds what is put into pages of {region.va:#x}")
        if self.watcher is not None:
            self.watcher.accessed(at, range(region.first_key + first, region.first_key + first + nr_pages))
        return entries

    @staticmethod
    def _lacking(region: Region, pages: Pages, entries: NDArray[np.uint64], write: bool) -> NDArray[np.bool_]:
        """Pages that cannot be reached as they have to be. Those never written are read as they are."""
        needed = PTE_PRESENT | PTE_WRITE if write else PTE_PRESENT
        lacking: NDArray[np.bool_] = entries & needed != needed
        return lacking if write else lacking & (region.state[pages] != PageState.UNTOUCHED)

    def _fault(
        self,
        client: str,
        region: Region,
        first: int,
        at: int,
        whole: NDArray[np.bool_] | None,
        lacking: NDArray[np.bool_],
    ) -> None:
        pages: Pages = first + np.flatnonzero(lacking)
        overwritten = np.zeros(len(pages), dtype=np.bool_) if whole is None else whole[lacking]
        wanted = READ if whole is None else WRITE
        key = region.first_key + first
        stall = self.stalls.begin(client, self.residency.is_short, region.state[pages])
        try:
            if whole is not None:
                self.accounting.charge(region, pages, at)
            self.faults.serve(region, pages, at, whole is not None, overwritten, range(key, key + len(lacking)))
        except GpuError as error:
            if error.errno == errno.ENOMEM and self.residency.mend():
                return  # once more: what was in the way may not be any longer
            page = error.page if isinstance(error, CorruptAccess) else int(pages[0])
            va = region.va + (page << region.page_shift)
            self.space.refuse(client, va, wanted, at, error.errno or errno.EIO, str(error.strerror))
        finally:
            self.stalls.end(stall)
        if self.residency.is_short:
            self.on_short()

    def _touch(self, region: Region, first: int, entries: NDArray[np.uint64]) -> None:
        """Tell the policies which of the pages were there; those that were not are inserted by the fault."""
        if len(entries) == 1:  # most accesses
            if (place := location_of(int(entries[0]))) is not None:
                self.locations[place].policy.of(region.client).access(region.first_key + first)
            return
        present = np.flatnonzero(entries & PTE_PRESENT)
        if self.defrag is not None:
            self.defrag.accessed(region, first, len(entries))
        for location in np.unique(locations_of(entries[present])).tolist():
            access = self.locations[location].policy.of(region.client).access
            here = present[locations_of(entries[present]) == location]
            for key in (region.first_key + first + here).tolist():
                access(key)

    def _load(
        self, client: str, region: Region, entries: NDArray[np.uint64], offset: int, out: NDArray[np.uint8], at: int
    ) -> None:
        for place, start, end in stretches(entries):
            piece = piece_of(region, start, end, offset, len(out))
            if place is None:
                out[piece[1]] = 0
            else:
                frames = frames_of(entries[start:end])
                nr_bytes = piece[1].stop - piece[1].start
                self.residency.traffic.charge(client, Cause.ACCESS, nr_bytes, place)
                self.locations[place].load(frames, region.page_bytes, piece[0], out[piece[1]], at)

    def _store(
        self, client: str, region: Region, entries: NDArray[np.uint64], offset: int, data: NDArray[np.uint8], at: int
    ) -> None:
        for place, start, end in stretches(entries):
            assert place is not None, "a page without a frame"
            skip, part = piece_of(region, start, end, offset, len(data))
            self.residency.traffic.charge(client, Cause.ACCESS, part.stop - part.start, place)
            self.locations[place].store(frames_of(entries[start:end]), region.page_bytes, skip, data[part], at)
