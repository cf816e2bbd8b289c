# SPDX-License-Identifier: MIT
"""GpuMemory: the data path. Clients allocate, read, write and free; everything else is what it takes to do that.

Theory of operation
    Locations are devices 0..n-1 and from n on the host, or its nodes (numa/); HOST is the one nearest to the client.
    Each has a memory, a page table and a TLB. An access comes from a location (the client's device, unless it says
    otherwise) and goes page by page: permission, translation, a fault where that leads nowhere (faults.py), then the
    bytes, from wherever they are.

    An access of many pages is done in spans of at most 1 MiB, or a quarter of the smallest memory: only one span's
    pages have to be in memory at once, so an access may be larger than the device. An access that fails has done the
    spans before the one that failed.

    Collaborators are passed in: a codec and a pool (compression/), swap, a replacement policy, a prefetcher (swap/), an
    admission (overcommit/). Each may be left out; without pool and swap nothing can be evicted.

Differs from hardware: `read` and `write` move bytes between memory and the caller, so their time is the link's even
where the caller stands for a kernel on the device. A page has one home; several locations may reach it.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.accounting import Accounting, Admission, PressureStall, Stalls
from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.pagetable import PTE_PRESENT, PTE_WRITE, frames_of, location_of, locations_of
from dpud.gpu.address_space.permissions import READ, WRITE, Permission
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import DEFAULT_BYTES, AddressSpace, Pages
from dpud.gpu.blob import PageCodec
from dpud.gpu.client import Client
from dpud.gpu.clock import Clock, ManualClock
from dpud.gpu.defrag.pins import Pin, pin_range
from dpud.gpu.errors import GpuError
from dpud.gpu.faults import CorruptAccess, FaultService, Prefetcher, ThrashGuard, Watcher
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.interface import Device
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.location import Location, make_locations
from dpud.gpu.policy import Lru, NewPolicy
from dpud.gpu.residency import Residency
from dpud.gpu.spans import piece_of, stretches, whole_pages
from dpud.gpu.store import BackingStore, Pool, Swap
from dpud.gpu.traffic import Cause
from dpud.gpu.window import Window
from kernelsim.operation import Operation, complete

HOST = -1
DEFAULT_PAGE_BYTES = 4096
EXCHANGE_BYTES = 1 << 20
"""An access is done in spans of at most this, whose pages have to be in memory at once."""
_MAX_FAULTS = 16

HOST_PROFILE = DeviceProfile("host", 1 << 30, 25_600_000_000, 100, 25_600_000_000, 100)
"""Host memory: one channel of DDR4-3200 (3200 MT/s x 8 bytes, JEDEC JESD79-4); its latency is uncalibrated."""


class GpuMemory:
    """Memory of clients on devices and the host."""

    def __init__(
        self,
        devices: Sequence[Device] | None = None,
        *,
        host: Device | Sequence[Device] | None = None,
        clock: Clock | None = None,
        codec: PageCodec | None = None,
        pool: Pool | None = None,
        swap: Swap | None = None,
        new_policy: NewPolicy = Lru,
        prefetcher: Prefetcher | None = None,
        thrash_guard: ThrashGuard | None = None,
        admission: Admission | None = None,
        pressure: Callable[[str], PressureStall] | None = None,
        space_bytes: int = DEFAULT_BYTES,
    ) -> None:
        self.clock = clock or ManualClock()
        hardware = [SimulatedDevice(clock=self.clock)] if devices is None else list(devices)
        self.nr_devices = len(hardware)
        host = host or SimulatedDevice(HOST_PROFILE, self.clock, self.nr_devices)
        self.locations = make_locations(hardware, [host] if isinstance(host, Device) else host, new_policy)
        self.space = AddressSpace([location.name for location in self.locations], self.clock, space_bytes)
        self.store = BackingStore(codec, pool, swap)
        self.residency = Residency(self.space, self.locations, self.store)
        self.faults = FaultService(self.residency, self.nr_devices, prefetcher, thrash_guard)
        self.clients: dict[str, Client] = {}
        smallest = min(location.frames.nr_bytes for location in self.locations)
        self.span_bytes = min(EXCHANGE_BYTES, smallest // 4)
        parts = self.space, self.locations, self.store, self.clients
        self.accounting = Accounting(*parts, admission, self.span_bytes)
        self.stalls = Stalls(self.space, pressure)
        if admission is not None:
            self.residency.follow(admission.reclaim_order)
        self.watcher: Watcher | None = None
        self.migration: Any = None  # the modules of these names, where there are such
        self.fault: Any = None
        self.defrag: Any = None
        self.numa: Any = None
        self.on_short: Callable[[], None] = lambda: None
        """Called when an access left a location below its low watermark: for whoever runs `background`."""
        self.on_client: Callable[[], None] = lambda: None
        """Called when there is a new client."""

    # Clients.

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

    def remove_client(self, name: str) -> None:
        """The client ends: what it had is freed, what it was allowed elsewhere is gone."""
        client = self.clients.pop(name)
        for region in list(client.regions):
            self._free(client, region)
        for region in self.space.regions:
            region.permissions.pop(name, None)
        self.accounting.forget(name)
        self.residency.traffic.forget(name)
        if self.fault is not None:
            self.fault.forget(name)
        for location in self.locations:
            location.policy.forget(name)

    # Allocation.

    def allocate(
        self,
        client: str,
        size: int,
        type: RegionType = RegionType.DEVICE,
        permissions: Permission = READ | WRITE,
        *,
        page_size: int = DEFAULT_PAGE_BYTES,
        priority: int = 0,
        device: int | None = None,
        timeout_ns: int = 0,
    ) -> int:
        """`size` bytes that read as zeros -> their address.

        page_size   2048, 4096, 65536 or 2097152
        device      where DEVICE memory is to be; else the client's
        priority    for admission; larger is more important
        timeout_ns  how long admission may make it wait

        Raises GpuError: EINVAL, ENOMEM, ETIMEDOUT.
        """
        return complete(
            self.allocation(
                client,
                size,
                type,
                permissions,
                page_size=page_size,
                priority=priority,
                device=device,
                timeout_ns=timeout_ns,
            )
        )

    def allocation(
        self,
        client: str,
        size: int,
        type: RegionType,
        permissions: Permission,
        *,
        page_size: int,
        priority: int,
        device: int | None,
        timeout_ns: int,
    ) -> Operation[int]:
        """`allocate` as an operation, which yields while admission lets it wait."""
        owner = self.client(client)
        where = owner.device if device is None else device
        if not 0 <= where < self.nr_devices:
            raise GpuError(errno.EINVAL, f"no device {where}")
        if self.locations[where].is_lost:
            raise GpuError(errno.ENODEV, f"{self.locations[where].name} is lost")
        grant = yield from self.accounting.request(client, type, size, priority, timeout_ns, where)
        try:
            region = self._new_region(client, size, type, page_size, where)
        except GpuError:
            self.accounting.release(grant)
            raise
        region.grant, region.priority = grant, priority if grant is None else grant.priority
        self.space.protect(region, client, 0, region.nr_pages, permissions)
        owner.regions.append(region)
        if self.defrag is not None:
            self.defrag.tick()
        return region.va

    def free(self, va: int, client: str | None = None) -> None:
        """Free what `allocate` gave. Raises GpuError(EFAULT); GpuError(EACCES) where it is another client's."""
        region = self._at(va)
        owner = self.clients[region.client]
        self.space.owned(owner.name if client is None else client, va)
        self._free(owner, region)

    def _new_region(self, client: str, size: int, type: RegionType, page_size: int, device: int) -> Region:
        region = self.space.reserve(client, size, type, page_size, device)
        try:
            self._check_fits(region)
            if type is RegionType.PINNED:
                self.faults.populate(region)
        except GpuError:
            self.space.release(region)
            raise
        return region

    def _check_fits(self, region: Region) -> None:
        """A page has to fit into every memory it may come to."""
        places = {RegionType.DEVICE: [self.locations[region.device]], RegionType.MANAGED: self.locations}
        for location in places.get(region.type, self.locations[self.nr_devices :]):
            if region.page_bytes > location.frames.nr_bytes:
                raise GpuError(errno.EINVAL, f"pages of {region.page_bytes} bytes do not fit into {location.name}")

    def _free(self, client: Client, region: Region) -> None:
        self.residency.forget(region)
        self.space.release(region)
        client.regions.remove(region)
        self.accounting.release(region.grant)
        if self.defrag is not None:
            self.defrag.tick()

    # Access.

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

    # Changing regions.

    def protect(self, client: str, va: int, nr_bytes: int, permissions: Permission, *, of: str | None = None) -> None:
        """The owner sets permissions for a range of whole pages, its own or another client's (`of`).

        Raises GpuError: EINVAL for a `va` within a page, EFAULT, EACCES.
        """
        region, first, end = self._range_of_owner(client, va, nr_bytes)
        self.space.protect(region, of or client, first, end, permissions)

    def advise(self, client: str, va: int, nr_bytes: int, advice: Advice, location: int | None = None) -> None:
        """Say how a range of managed memory will be used. Raises GpuError: EINVAL, EFAULT, EACCES."""
        region, first, end = self._range_of_owner(client, va, nr_bytes)
        if region.type is not RegionType.MANAGED:
            raise GpuError(errno.EINVAL, "advice is for managed memory")
        if advice.takes_location != (location is not None):
            raise GpuError(errno.EINVAL, f"{advice.value} with location {location}")
        where = 0 if location is None else self._location(location).number
        region.advice.give(first, end, advice, where)
        self.faults.follow_advice(region, np.arange(first, end), advice, where)

    def prefetch(self, client: str, va: int, nr_bytes: int, location: int) -> int:
        """Move a range of managed memory to a location, as cudaMemPrefetchAsync -> pages moved or brought in."""
        region, first, end = self._range_of_owner(client, va, nr_bytes)
        if region.type is not RegionType.MANAGED:
            raise GpuError(errno.EINVAL, "only managed memory moves")
        return self.faults.prefetch_to(region, np.arange(first, end), self._location(location).number)

    def pin(self, va: int, nr_bytes: int, owner: str, reason: str = "") -> Pin:
        """Bring pages in and keep them in their frames (defrag/pins.py). Raises GpuError: EFAULT, ENOMEM, EIO."""
        return pin_range(self, va, nr_bytes, owner, reason)

    def unpin(self, pin: Pin) -> None:
        """Raises GpuError(EINVAL) for one that is gone."""
        self.residency.pins.remove(pin)

    def _range_of_owner(self, client: str, va: int, nr_bytes: int) -> tuple[Region, int, int]:
        region = self._at(va)
        if region.client != client:
            raise GpuError(errno.EACCES, f"the region at {region.va:#x} is {region.client}'s")
        if (va - region.va) % region.page_bytes or nr_bytes < 0:
            raise GpuError(errno.EINVAL, f"{va:#x} is not where a page begins")
        if va + nr_bytes > region.end:
            raise GpuError(errno.EFAULT, f"the region ends at {region.end:#x}")
        return region, *self.space.page_range(region, va, nr_bytes)

    def _at(self, va: int) -> Region:
        region = self.space.regions.find(va)
        if region is None:
            raise GpuError(errno.EFAULT, f"nothing is mapped at {va:#x}")
        return region

    def _location(self, number: int) -> Location:
        if not -1 <= number < len(self.locations):
            raise GpuError(errno.EINVAL, f"no location {number}")
        return self.locations[self.nr_devices if number == HOST else number]

    # Translation and pressure.

    def translate(self, va: int, at: int = 0) -> int:
        """Physical address, location << 40 | byte, as `at` reaches it. Raises GpuError(EFAULT)."""
        return self.space.translate(va, at)

    def translator(self, at: int = 0) -> Callable[[int], int]:
        """`translate` of one location, for who asks often."""
        return self.space.translations[at].translate

    def translate_bulk(self, vas: NDArray[np.int64], at: int = 0) -> NDArray[np.int64]:
        """The same for many; NOT_RESIDENT (-1) or NOT_MAPPED (-2) where there is none."""
        return self.space.translate_bulk(vas, at)

    def evict(self, nr_bytes: int, location: int = 0) -> int:
        """Take pages out of a location's memory, the policy's first ones first -> bytes that became free."""
        place = self._location(location)
        unit = place.frames.nr_bytes // place.frames.nr_frames
        return self.residency.evict(place, -(-nr_bytes // unit)) * unit

    def background(self, budget_bytes: int) -> int:
        """What a kernel's kswapd does: evict up to `budget_bytes` where free memory is below its low watermark; then,
        if that is less, make room in the pool and in fast tiers -> bytes moved."""
        evicted = self.residency.background(budget_bytes)
        return evicted + self.store.background(budget_bytes - evicted)

    def sample(self) -> None:
        """Tell admission what each client has in memory, what of it was accessed since the last time, and how well
        pages compress."""
        self.accounting.tell(touched=True)

    def state_of(self, region: Region) -> dict[str, int]:
        """Pages by state; `resident` also by location."""
        found = {state.name.lower(): region.count(state) for state in PageState}
        return found | {f"on_{place.name}": region.nr_resident(place.number) for place in self.locations}
