# SPDX-License-Identifier: MIT
"""A client's regions as what is migrated: the source that has them, and the sink in another memory.

Pages are read where they are, in memory or in the stores, and stay there: a migration does not disturb what is in
memory. A page whose bytes are lost goes over as lost. Pages that were never written do not go over at all.
"""

import errno
from itertools import pairwise

import numpy as np

from dpud.gpu.address_space.permissions import READ, WRITE, Permission
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.clock import ManualClock
from dpud.gpu.dirty import DirtyLog
from dpud.gpu.errors import GpuError
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.memory import MAX_TIMES, GpuMemory
from dpud.gpu.migration.pages import Area, Manifest, Mask, Pages, runs
from dpud.gpu.traffic import Cause
from kernelsim.operation import Operation
from kernelsim.wait import WaitQueue

NS_PER_S = 1_000_000_000


def read_pages(memory: GpuMemory, region: Region, pages: Pages) -> tuple[Bytes, Mask]:
    """(bytes, which are lost), from wherever they are; nothing moves. Raises GpuError of a tier that is silent."""
    memory.residency.examine(region, pages)
    rows = np.zeros((len(pages), region.page_bytes), dtype=np.uint8)
    state = region.state[pages]
    lost: Mask = state == PageState.CORRUPT
    for location in memory.locations:
        here = (state == PageState.RESIDENT) & (region.home[pages] == location.number)
        if here.any():
            memory.residency.charge(region, Cause.MIGRATION, pages[here], location)
            rows[here] = location.load_pages(region.frame[pages[here]], region.page_bytes)
    stored = np.flatnonzero(state == PageState.STORED)
    memory.residency.charge_stored(region, Cause.MIGRATION, pages[stored])
    keys = (region.first_key + pages[stored]).tolist()
    bad = memory.store.peek(keys, [rows[at].data for at in stored.tolist()], patient=True) if keys else []
    lost |= np.isin(region.first_key + pages, bad)
    rows[lost] = 0
    return rows, lost


def admit(memory: GpuMemory, region: Region, nr_pages: int) -> Operation[None]:
    """Wait until QoS lets so many of a region's pages move. A clock of its own lets time pass when they do (charge)."""
    if not isinstance(memory.clock, ManualClock):
        nr_bytes = nr_pages << region.page_shift
        yield from memory.residency.traffic.admission(region.client, nr_bytes, Cause.MIGRATION)


class WriterLog(DirtyLog):
    """Knows what is written to, and can slow the writer down: at most so many pages a second."""

    def __init__(self, region: Region, brake: "Brake") -> None:
        super().__init__(region.nr_pages)
        self._dirty[:] = region.state != PageState.UNTOUCHED
        self._brake = brake

    def mark(self, first: int, nr_pages: int) -> None:
        super().mark(first, nr_pages)
        self._brake.wrote(nr_pages)


class Brake:
    """Auto-converge's. In the library writes sleep on the clock; in the daemon the gate lets the next one wait."""

    def __init__(self, memory: GpuMemory) -> None:
        self._clock = memory.clock
        self.pages_per_s = 0.0
        """0: none."""
        self.next_ns = 0
        """When the next write may be made."""
        self.sleeps = isinstance(memory.clock, ManualClock)
        """Whether it waits here; else whoever writes looks at `next_ns` before."""

    def wrote(self, nr_pages: int) -> None:
        if not self.pages_per_s:
            return
        self.next_ns = max(self.next_ns, self._clock.now_ns()) + int(nr_pages * NS_PER_S / self.pages_per_s)
        if self.sleeps:
            self._clock.sleep_until(self.next_ns)


class ClientSource:
    """All regions of one client. `waiters` is woken when they may be used again."""

    def __init__(self, memory: GpuMemory, client: str, waiters: WaitQueue | None = None) -> None:
        """Raises GpuError: ENODATA for a client without memory, EBUSY while its pages are still coming."""
        self.memory, self.client = memory, client
        self.regions = list(memory.clients[client].regions)
        if not self.regions:
            raise GpuError(errno.ENODATA, f"{client} has no memory")
        if any(region.held or region.arrival is not None for region in self.regions):
            raise GpuError(errno.EBUSY, f"{client} is being migrated")
        self.manifest = Manifest(client, [_area(region) for region in self.regions])
        self.brake = Brake(memory)
        self.logs: list[WriterLog] = []
        self._waiters = waiters or WaitQueue()
        self._sent_lost = [np.zeros(region.nr_pages, dtype=np.bool_) for region in self.regions]

    def start(self) -> None:
        self.logs = [WriterLog(region, self.brake) for region in self.regions]
        for region, log in zip(self.regions, self.logs, strict=True):
            region.dirty_logs.append(log)

    def take(self, area: int) -> Pages:
        self.check()
        return self.logs[area].take()

    @property
    def nr_dirty_bytes(self) -> int:
        return sum(len(log) * region.page_bytes for log, region in zip(self.logs, self.regions, strict=True))

    def read(self, area: int, pages: Pages) -> tuple[Bytes, Mask]:
        self.check()
        rows, lost = read_pages(self.memory, self.regions[area], pages)
        self._sent_lost[area][pages] = lost
        return rows, lost

    def admission(self, area: int, nr_pages: int) -> Operation[None]:
        return admit(self.memory, self.regions[area], nr_pages)

    def check(self) -> None:
        """Raises GpuError(ESTALE) where the client has other memory than at first."""
        if self.memory.clients.get(self.client) is None or self.memory.clients[self.client].regions != self.regions:
            raise GpuError(errno.ESTALE, f"{self.client} allocated or freed memory meanwhile")

    def throttle(self, percent: int, pages_per_s: float) -> None:
        self.brake.pages_per_s = pages_per_s

    def freeze(self) -> None:
        self.check()
        for region in self.regions:
            region.held = True
        for region, log, known in zip(self.regions, self.logs, self._sent_lost, strict=True):
            for page in np.flatnonzero((region.state == PageState.CORRUPT) & ~known).tolist():
                log.mark(page, 1)  # lost since it was sent

    def thaw(self) -> None:
        for region in self.regions:
            region.held = False
        self._waiters.wake_up()

    def stop(self) -> None:
        self.brake.pages_per_s = 0.0
        for region, log in zip(self.regions, self.logs, strict=False):
            region.dirty_logs.remove(log)
        self.logs = []

    def release(self) -> None:
        """The memory is freed; the client stays, without any."""
        self.thaw()
        for region in self.regions:
            self.memory.free(region.va, self.client)
        _forget_checkpoints(self.memory, self.client)


def _area(region: Region) -> Area:
    return Area(
        region.nr_bytes,
        region.page_bytes,  # type: ignore[arg-type]
        region.type.value,
        region.name,
        region.priority,
        list(_permission_runs(region)),
    )


def _forget_checkpoints(memory: GpuMemory, client: str) -> None:
    """They are of memory that the client has no more, or did not have yet."""
    if memory.fault is not None:
        memory.fault.forget(client)


def _permission_runs(region: Region) -> list[tuple[int, int, int]]:
    granted = region.permissions.get(region.client)
    if granted is None:
        return []
    edges = [0, *(np.flatnonzero(np.diff(granted)) + 1).tolist(), len(granted)]
    return [(first, end, int(granted[first])) for first, end in pairwise(edges)]


# The other side.


def open_client(memory: GpuMemory, manifest: Manifest) -> Operation["ClientSink"]:
    """Room for a client that comes. Raises GpuError: EEXIST, ENOMEM, EINVAL."""
    name = manifest.client
    if name in memory.clients and memory.clients[name].regions:
        raise GpuError(errno.EEXIST, f"there is a client {name} already")
    names = [area.name for area in manifest.areas if area.name]
    if len(set(names)) < len(names) or not manifest.areas:
        raise GpuError(errno.EINVAL, "no areas, or two of one name")
    if manifest.nr_bytes > MAX_TIMES * sum(location.frames.nr_bytes for location in memory.locations):
        raise GpuError(errno.ENOMEM, f"{manifest.nr_bytes} bytes are out of all proportion to the memory there is")
    was_here = name in memory.clients
    device = max(range(memory.nr_devices), key=lambda number: memory.locations[number].frames.nr_free)
    memory.client(name, None if was_here else device)
    regions: list[Region] = []
    try:
        for area in manifest.areas:
            va = yield from memory.allocation(
                name,
                area.nr_bytes,
                RegionType(area.kind),
                READ | WRITE,
                page_size=area.page_bytes,
                priority=area.priority,
                device=None,
                timeout_ns=0,
            )
            region = memory.space.regions.find(va)
            assert region is not None
            region.held = True
            regions.append(region)
    except BaseException:
        ClientSink(memory, manifest, regions, was_here).abandon()
        raise
    return ClientSink(memory, manifest, regions, was_here)


class ClientSink:
    """Regions of a client that nobody can use yet."""

    def __init__(self, memory: GpuMemory, manifest: Manifest, regions: list[Region], was_here: bool) -> None:
        self.memory, self.manifest, self.regions = memory, manifest, regions
        self._was_here = was_here

    def write(self, area: int, pages: Pages, rows: Bytes, lost: Mask) -> None:
        """Raises GpuError(ENOMEM)."""
        region = self.regions[area]
        if region.released:
            return  # in post-copy its client, who runs here, has freed it
        if region.arrival is not None:  # in post-copy: not what was put there meanwhile
            still = region.state[pages] == PageState.AWAY
            pages, rows, lost = pages[still], rows[still], lost[still]
        away = pages[region.state[pages] == PageState.AWAY]
        region.state[away] = PageState.UNTOUCHED
        _lose(self.memory, region, pages[lost])
        kept = ~lost & ((region.state[pages] != PageState.UNTOUCHED) | rows.any(axis=1))
        pages, rows = pages[kept], rows[kept]
        step = max(1, self.memory.span_bytes // region.page_bytes)
        for start in range(0, len(pages), step):
            _install(self.memory, region, pages[start : start + step], rows[start : start + step])

    def read(self, area: int, pages: Pages) -> tuple[Bytes, Mask]:
        return read_pages(self.memory, self.regions[area], pages)

    def admission(self, area: int, nr_pages: int) -> Operation[None]:
        return admit(self.memory, self.regions[area], nr_pages)

    def lost(self, area: int) -> Mask:
        region = self.regions[area]
        self.memory.residency.examine(region, np.arange(region.nr_pages))
        found: Mask = region.state == PageState.CORRUPT
        return found

    def expect(self, area: int, missing: Mask) -> None:
        region, pages = self.regions[area], np.flatnonzero(missing)
        _lose(self.memory, region, pages)
        region.state[pages] = PageState.AWAY

    def own(self) -> None:
        _forget_checkpoints(self.memory, self.manifest.client)
        for area, region in zip(self.manifest.areas, self.regions, strict=True):
            region.name = area.name
            self.memory.space.protect(region, region.client, 0, region.nr_pages, Permission.NONE)
            for first, end, bits in area.permissions:
                self.memory.space.protect(region, region.client, first, end, Permission(bits))
            region.held = False

    def settle(self, area: int, pages: Pages) -> None:
        """Pages that do not come any more."""
        self.regions[area].state[pages] = PageState.UNTOUCHED

    def abandon(self) -> None:
        client = self.manifest.client
        for region in self.regions:
            region.held, region.arrival = False, None
            self.memory.free(region.va, client)
        if not self._was_here and client in self.memory.clients:
            self.memory.remove_client(client)


def _place(memory: GpuMemory, region: Region) -> int:
    """From where its pages are written."""
    if region.type is RegionType.DEVICE:
        return region.device
    return memory.clients[region.client].device if region.type is RegionType.MANAGED else memory.nr_devices


def _install(memory: GpuMemory, region: Region, pages: Pages, rows: Bytes) -> None:
    """Overwrite pages. Raises GpuError(ENOMEM)."""
    at = _place(memory, region)
    memory.accounting.charge(region, pages, at)
    busy = set((region.first_key + pages).tolist())
    memory.faults.serve(region, pages, at, True, np.ones(len(pages), dtype=np.bool_), busy)
    for location in memory.locations:
        here = region.home[pages] == location.number
        if here.any():
            memory.residency.charge(region, Cause.MIGRATION, pages[here], location)
            location.store_pages(region.frame[pages[here]], rows[here])
    for first, nr in runs(pages):
        memory.space.set_dirty(region, first, nr, at)


def _lose(memory: GpuMemory, region: Region, pages: Pages) -> None:
    """Pages have no bytes any more: CORRUPT."""
    if not len(pages):
        return
    memory.residency.discard(region, pages)
    region.state[pages] = PageState.CORRUPT
