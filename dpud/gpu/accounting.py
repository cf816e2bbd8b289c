# SPDX-License-Identifier: MIT
"""What the data path tells admission, and asks it: overcommit/ knows promises, this knows pages.

Only DEVICE and MANAGED memory is admitted. HOST and PINNED memory is bounded by the host's, and takes room in the
stores that admission then no longer has. Use is told whenever a decision depends on it, so no promise rests on old
numbers.
"""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import AddressSpace, Pages
from dpud.gpu.client import Client
from dpud.gpu.errors import GpuError
from dpud.gpu.location import Location
from dpud.gpu.store import BackingStore
from kernelsim.operation import Operation

ADMITTED = (RegionType.DEVICE, RegionType.MANAGED)
UNLIMITED = 1 << 62
MAX_PRIORITY = 100
_RECORD_SHARE = 2048, 2048 + 64
"""What of swap's room is pages, where it is least: the smallest page and the header of its record (swap/slots.py)."""
_WHOLE_BLOCKS = 7, 8
"""And what of it can be written in batches: each ends at the end of a block, and holes between records are no use."""


class Admission(Protocol):
    """overcommit.Admission, as far as the data path goes."""

    def connect(self, supply: Any, /) -> None: ...
    def request(
        self, client: str, nr_bytes: int, priority: int, timeout_ns: int = 0, location: int = 0
    ) -> Operation[Any]: ...
    def release(self, grant: Any, /) -> None: ...
    def forget(self, client: str, /) -> None: ...
    def usage(
        self, client: str, nr_resident: int, nr_touched: int, now_ns: int, nr_stored: int = 0, active_ns: int = 0
    ) -> None: ...
    def pump(self) -> None: ...
    def has_room(self, client: str, nr_bytes: int, location: int = 0) -> bool: ...
    def reclaim_order(
        self, need_bytes: int, for_priority: int, resident: Mapping[str, int], /
    ) -> Sequence[tuple[str, int]]: ...
    def moved(self, client: str, source: int, target: int, /) -> None: ...
    def compressibility(self, ratio: float, /) -> None: ...


class PressureStall(Protocol):
    """overcommit.PressureStall of one client: the time that it waits for memory, and the time that it works."""

    def begin(self, now_ns: int, /) -> None: ...
    def end(self, now_ns: int, /) -> None: ...
    def run(self, now_ns: int, /) -> None: ...
    def rest(self, now_ns: int, /) -> None: ...


class Accounting:
    """Also what admission sees of memory: overcommit.supply.Supply."""

    def __init__(
        self,
        space: AddressSpace,
        locations: Sequence[Location],
        store: BackingStore,
        clients: Mapping[str, Client],
        admission: Admission | None,
        kept_bytes: int,
    ) -> None:
        self._space, self._locations, self._store, self._clients = space, locations, store, clients
        self.admission = admission
        self._kept_bytes = kept_bytes
        self._clean_bytes: dict[int, int] = {}  # by location; only while somebody asks, since it changes all the time
        if admission is not None:
            admission.connect(self)

    def free_bytes(self, location: int) -> int:
        """Free memory of one location, and what is free once pages leave of which the stores have a copy."""
        return self._locations[location].frames.nr_free_bytes + self._clean_bytes.get(location, 0)

    def swap_bytes(self) -> int:
        """Raw bytes that swap can still take, less what exchanging pages may take. So it may be negative.

        An access needs room for a span: else pages could not come back from full stores into full memory. And pages
        that come back take more room than they leave behind, if they compress and those that go do not. So what
        compression saved counts only beyond what fits into all memories: as much as that may come back at once.
        """
        if not self._store.exists:
            return 0
        nr_free = 0 if self._store.swap is None else self._store.swap.nr_free_bytes
        exchanged = min(self._store.saved_bytes, self._memory_bytes())
        nr_pages = nr_free * _WHOLE_BLOCKS[0] // _WHOLE_BLOCKS[1] // _RECORD_SHARE[1]
        return nr_pages * _RECORD_SHARE[0] - self._kept_bytes - exchanged

    def _memory_bytes(self) -> int:
        """Of all devices, as far as it is whole, and what is used of the host's."""
        return sum(
            each.frames.nr_usable * FRAME_BYTES - (each.frames.nr_free_bytes if each.is_host else 0)
            for each in self._locations
        )

    def broken_bytes(self) -> int:
        """Device memory that is out of use: retired pages; of a lost device, all of it."""
        return sum(each.frames.nr_retired * FRAME_BYTES for each in self._locations if not each.is_host)

    def pool_bytes(self, nr_new_bytes: int = 0) -> int:
        """Bytes that the pool can still take, if not one of them compresses; with keys for so many bytes more."""
        pool = self._store.pool
        if pool is None:
            return 0
        if not pool.limit_bytes:
            return UNLIMITED
        nr_keys = sum(region.nr_pages for region in self._space.regions) + nr_new_bytes // _RECORD_SHARE[0]
        return pool.raw_room(nr_keys)

    def request(
        self, client: str, kind: RegionType, nr_bytes: int, priority: int, timeout_ns: int, location: int
    ) -> Operation[Any]:
        """A grant, or None where none is needed. Raises GpuError: ENOMEM, ETIMEDOUT."""
        if self.admission is None or kind not in ADMITTED:
            return None
        self.tell()
        try:
            return (yield from self.admission.request(client, nr_bytes, priority, timeout_ns, location))
        finally:
            self._clean_bytes.clear()

    def release(self, grant: Any) -> None:
        """A region is gone, or was never made."""
        if grant is not None and self.admission is not None:
            self.tell()
            self.admission.release(grant)

    def moved(self, client: Client, source: int) -> None:
        """What was promised to a client on a location is promised on its device, which is another one now."""
        if self.admission is not None:
            self.admission.moved(client.name, source, client.device)

    def forget(self, client: str) -> None:
        """A client is gone."""
        if self.admission is not None:
            self.admission.forget(client)

    def charge(self, region: Region, pages: Pages, at: int) -> None:
        """Pages of which some may be written for the first time. Raises GpuError(ENOMEM) where others go before."""
        if self.admission is None or region.type not in ADMITTED:
            return
        nr_bytes = int(np.count_nonzero(region.state[pages] == PageState.UNTOUCHED)) << region.page_shift
        if not nr_bytes:
            return
        location = region.device if region.type is RegionType.DEVICE else at
        if not self.admission.has_room(region.client, nr_bytes, location):
            self.tell()
            has_room = self.admission.has_room(region.client, nr_bytes, location)
            self._clean_bytes.clear()
            if not has_room:
                raise GpuError(errno.ENOMEM, f"{region.client} would take what is kept for others")

    def tell(self, *, touched: bool = False) -> None:
        """What each client uses; with `touched`, also what it accessed since the last time that was asked for."""
        if self.admission is None:
            return
        now_ns = self._space.clock.now_ns()
        for client in list(self._clients.values()):
            admitted = [region for region in client.regions if region.type in ADMITTED]
            resident = sum(region.count(PageState.RESIDENT) << region.page_shift for region in admitted)
            stored = sum(region.count(PageState.STORED) << region.page_shift for region in admitted)
            nr_touched = self._touched(client) if touched else -1
            self.admission.usage(client.name, resident, nr_touched, now_ns, stored, client.active_ns)
        self._clean_bytes = self._count_clean()
        pool = self._store.pool
        if pool is not None and pool.stored_bytes:  # an empty pool says nothing, though it takes some memory
            self.admission.compressibility(pool.stored_bytes / pool.used_bytes)
        self.admission.pump()

    def _count_clean(self) -> dict[int, int]:
        """Bytes of evictable pages that are in a memory and in the stores, by location."""
        found: dict[int, int] = {}
        for region in self._space.regions:
            clean = region.home[region.backed & (region.state == PageState.RESIDENT)]
            for location, nr in zip(*np.unique(clean, return_counts=True), strict=True):
                found[int(location)] = found.get(int(location), 0) + (int(nr) << region.page_shift)
        return found

    def _touched(self, client: Client) -> int:
        nr_bytes = 0
        for region in client.regions:
            nr_bytes += int(np.count_nonzero(self._space.accessed(region))) << region.page_shift
            self._space.clear_accessed(region)
        return nr_bytes


class Stalls:
    """Time that clients wait for memory, and that their accesses run, if anybody wants to know.

    An access runs from its beginning to its end, but for its faults that more memory would have spared: in those it
    waits. Other tasks of a client that wait are its requests to admission, which tells for itself. One access is on the
    path at a time; those behind it neither run nor wait for memory.
    """

    def __init__(self, space: AddressSpace, pressure: Callable[[str], PressureStall] | None) -> None:
        self._space = space
        self._pressure = pressure
        self._running: PressureStall | None = None

    @contextmanager
    def access(self, client: str) -> Iterator[None]:
        """An access of a client, from beginning to end."""
        if self._pressure is None:
            yield
            return
        self._running = self._pressure(client)
        self._running.run(self._space.clock.now_ns())
        try:
            yield
        finally:
            self._running.rest(self._space.clock.now_ns())
            self._running = None

    def begin(self, client: str, is_short: bool, states: Any) -> PressureStall | None:
        """Begin to count a fault that more memory would have spared: its page was evicted, or one has to be."""
        if self._pressure is None or not (is_short or (states == PageState.STORED).any()):
            return None
        stall, now_ns = self._pressure(client), self._space.clock.now_ns()
        if self._running is not None:
            self._running.rest(now_ns)
        stall.begin(now_ns)
        return stall

    def end(self, stall: PressureStall | None) -> None:
        if stall is None:
            return
        now_ns = self._space.clock.now_ns()
        stall.end(now_ns)
        if self._running is not None:
            self._running.run(now_ns)
