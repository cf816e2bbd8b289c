# SPDX-License-Identifier: MIT
"""GpuMemory: the data path. Clients allocate, read, write and free; everything else is what it takes to do that.

Theory of operation
    Locations are devices 0..n-1 and from n on the host, or its nodes (numa/); HOST is the one nearest to the client.
    Each has a memory, a page table and a TLB. How an access goes from page to page is in access.py.

    Collaborators are passed in: a codec and a pool (compression/), swap, a replacement policy, a prefetcher (swap/), an
    admission (overcommit/). Each may be left out; without pool and swap nothing can be evicted.

Differs from hardware: a page has one home; several locations may reach it.
"""

import errno
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.access import AccessPath
from dpud.gpu.accounting import Accounting, Admission, PressureStall, Stalls
from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.permissions import READ, WRITE, Permission
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import DEFAULT_BYTES, AddressSpace
from dpud.gpu.blob import PageCodec
from dpud.gpu.client import Client
from dpud.gpu.clock import Clock, ManualClock
from dpud.gpu.defrag.pins import Pin, pin_range
from dpud.gpu.errors import GpuError
from dpud.gpu.faults import FaultService, Prefetcher, ThrashGuard
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.interface import Device
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.location import HOST as HOST
from dpud.gpu.location import Location, make_locations
from dpud.gpu.moves import OwnersMoves
from dpud.gpu.policy import Lru, NewPolicy
from dpud.gpu.residency import Residency
from dpud.gpu.store import BackingStore, Pool, Swap
from kernelsim.operation import Operation, complete

DEFAULT_PAGE_BYTES = 4096
MAX_TIMES = 64
"""How much more than all memory there may be promised. Pages that were never written take none, but their tables do."""
EXCHANGE_BYTES = 1 << 20
"""An access is done in spans of at most this, whose pages have to be in memory at once."""

HOST_PROFILE = DeviceProfile("host", 1 << 30, 25_600_000_000, 100, 25_600_000_000, 100)
"""Host memory: one channel of DDR4-3200 (3200 MT/s x 8 bytes, JEDEC JESD79-4); its latency is uncalibrated."""


class GpuMemory(AccessPath):
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
        self.space.limit_bytes = MAX_TIMES * sum(location.frames.nr_bytes for location in self.locations)
        self.store = BackingStore(codec, pool, swap)
        self.residency = Residency(self.space, self.locations, self.store)
        self.faults = FaultService(self.residency, self.nr_devices, prefetcher, thrash_guard)
        self.store.mover = OwnersMoves(self.residency, self.faults)
        self.clients = {}
        smallest = min(location.frames.nr_bytes for location in self.locations)
        self.span_bytes = min(EXCHANGE_BYTES, smallest // 4)
        parts = self.space, self.locations, self.store, self.clients
        self.accounting = Accounting(*parts, admission, self.span_bytes)
        self.stalls = Stalls(self.space, pressure)
        if admission is not None:
            self.residency.follow(admission.reclaim_order)
        self.watcher = None
        self.migration: Any = None  # the modules of these names, where there are such
        self.fault: Any = None
        self.defrag = None
        self.numa: Any = None
        self.on_short = lambda: None
        self.on_client = lambda: None

    # Clients: `client` makes one.

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

        Raises GpuError: EINVAL, ENOMEM, ETIMEDOUT, ENODEV (its device is lost).
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
        if device is not None and not 0 <= device < self.nr_devices:
            raise GpuError(errno.EINVAL, f"no device {device}")
        if self.locations[where].is_lost or (type is RegionType.DEVICE and where >= self.nr_devices):
            raise GpuError(errno.ENODEV, f"{client} is at {self.locations[where].name}: no device is left to it")
        grant = yield from self.accounting.request(client, type, size, priority, timeout_ns, where)
        where = owner.device if self.locations[where].is_lost else where  # it fell off the bus meanwhile
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
        hosts = self.locations[self.nr_devices :]
        if region.type is RegionType.PINNED and region.nr_bytes > sum(host.frames.nr_bytes for host in hosts):
            raise GpuError(errno.ENOMEM, f"{region.nr_bytes} bytes are more than the host has")

    def _free(self, client: Client, region: Region) -> None:
        self.residency.forget(region)
        self.space.release(region)
        client.regions.remove(region)
        self.accounting.release(region.grant)
        if self.defrag is not None:
            self.defrag.tick()

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
