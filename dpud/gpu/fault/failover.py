# SPDX-License-Identifier: MIT
"""A device that is lost, or to be emptied: its clients and their pages go elsewhere.

Of a lost device nothing can be read. A page that was there comes from a copy at another location (which becomes its
home), from the stores, or from a checkpoint that it was not written to since (copies.py). If a client has a page with
none of these, then all of the client goes back to its last checkpoint, since its bytes have to fit together; without a
checkpoint those pages are lost. An emptied device can still be read, so nothing is.

Clients go to the spare device if one is named, else to the one with the most free memory, else to host memory.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import Pages
from dpud.gpu.errors import GpuError
from dpud.gpu.fault.copies import Copies
from dpud.gpu.fault.events import EventLog, Xid
from dpud.gpu.fault.placing import Placing
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.location import Location
from dpud.gpu.memory import GpuMemory

_BATCH_BYTES = 1 << 20
_KEPT = 100
log = logging.getLogger("dpud.gpu.fault")


@dataclass(frozen=True)
class Report:
    """What became of one client's pages."""

    time_ns: int
    client: str
    source: str
    target: str
    pages: Counter[str]
    """By where they came from: copy, store, checkpoint, device; lost and rolled_back."""

    def __str__(self) -> str:
        counts = " ".join(f"{name}={nr}" for name, nr in sorted(self.pages.items()))
        return f"{self.time_ns} {self.client} {self.source} -> {self.target} {counts}".rstrip()


class Failover:
    def __init__(self, memory: GpuMemory, placing: Placing, copies: Copies, events: EventLog) -> None:
        self.spare: int | None = None
        """Where clients of other devices go; None: where there is most room."""
        self.reports: deque[Report] = deque(maxlen=_KEPT)
        self.roll_back: Callable[[str], bool] = lambda _client: False
        self.unreadable: Callable[[Region, Pages], Pages] = lambda _region, pages: pages[:0]
        self._memory, self._placing, self._copies, self._events = memory, placing, copies, events

    def target(self, source: Location) -> Location:
        """Who takes over."""
        devices = [each for each in self._memory.locations[: self._memory.nr_devices] if each is not source]
        alive = [each for each in devices if not each.is_lost]
        named = [each for each in alive if each.number == self.spare]
        if named or alive:
            return named[0] if named else max(alive, key=lambda each: each.frames.nr_free)
        return self._memory.locations[self._memory.faults.placement.nearest(source.number)]

    def lose(self, source: Location) -> None:
        """The device is gone: `hardware.lost` says so already."""
        target = self.target(source)
        self._events.add(Xid.OFF_THE_BUS, source.name, f"lost; its clients go to {target.name}")
        self._redirect(source, target)
        found: dict[str, Counter[str]] = {}
        lost: list[tuple[Region, int]] = []
        for region in list(self._memory.space.regions):
            counts = found.setdefault(region.client, Counter())
            self._drop_copies_at(region, source)
            here = np.flatnonzero((region.state == PageState.RESIDENT) & (region.home == source.number))
            lost += [(region, page) for page in here.tolist() if not self._fetch(region, page, target, counts)]
        for region, page in lost:
            self._placing.lose(region, page)
            found[region.client]["lost"] += 1
        source.frames.retire_free()
        self._memory.accounting.tell()
        for client, nr in Counter(region.client for region, _ in lost).items():
            self._go_back(client, nr, source, found[client])
        self._report(source, target, found)

    def drain(self, source: Location) -> None:
        """Everything leaves a device that still answers. What finds no room, or cannot be read, stays."""
        target = self.target(source)
        self._redirect(source, target)
        found: dict[str, Counter[str]] = {}
        for region in list(self._memory.space.regions):
            here = np.flatnonzero((region.state == PageState.RESIDENT) & (region.home == source.number))
            counts = found.setdefault(region.client, Counter())
            for batch in np.array_split(here, -(-len(here) * region.page_bytes // _BATCH_BYTES) or 1):
                counts["device"] += self._migrate(region, batch, target)
        self._report(source, target, found)

    def _migrate(self, region: Region, pages: Pages, target: Location) -> int:
        readable = np.setdiff1d(pages, self.unreadable(region, pages))
        try:
            if len(readable):
                self._memory.faults.migrate(region, readable, target.number, ())
        except GpuError as error:
            log.warning("%d pages of %s stay: %s", len(readable), region.client, error)
            return 0
        return len(readable)

    def _redirect(self, source: Location, target: Location) -> None:
        """Who used the device uses another from now on."""
        for client in self._memory.clients.values():
            if client.device == source.number:
                client.device = target.number
                self._memory.accounting.moved(client, source.number)
        for region in self._memory.space.regions:
            if region.type is RegionType.DEVICE and region.device == source.number:
                region.device = target.number
            region.advice.preferred[region.advice.preferred == source.number] = target.number
            region.advice.accessed_by &= ~np.uint64(1 << source.number)

    def _drop_copies_at(self, region: Region, source: Location) -> None:
        for page in [page for page, where in region.replicas.items() if source.number in where]:
            source.policy.remove(region.first_key + page)
            self._memory.residency.drop_copy(region, page, source)

    def _fetch(self, region: Region, page: int, target: Location, counts: Counter[str]) -> bool:
        """A page whose frame is gone -> whether its bytes are somewhere."""
        if page in region.replicas:
            self._placing.promote(region, page)
            counts["copy"] += 1
            return True
        found = self._copies.find(region, page)
        if found is None:
            return False
        where, row = found
        to_store = bool(region.backed[page]) or not self._moved(region, page, target, row)
        if to_store and not self._put_away(region, page, row):
            return False
        counts["checkpoint" if where == "checkpoint" else "store"] += 1
        return True

    def _moved(self, region: Region, page: int, target: Location, row: Bytes) -> bool:
        try:
            self._placing.move(region, page, target, row)
        except GpuError as error:
            log.warning("a page of %s finds no room on %s: %s", region.client, target.name, error)
            return False
        return True

    def _put_away(self, region: Region, page: int, row: Bytes) -> bool:
        try:
            self._placing.put_away(region, page, row)
        except GpuError as error:
            log.warning("a page of %s finds no room in the stores: %s", region.client, error)
            return False
        return True

    def _go_back(self, client: str, nr_lost: int, source: Location, counts: Counter[str]) -> None:
        """A client some of whose pages are gone."""
        if self.roll_back(client):
            counts["rolled_back"] += counts.pop("lost")
            return
        self._events.add(Xid.CONTAINED, source.name, f"{nr_lost} pages are lost", client)

    def _report(self, source: Location, target: Location, found: dict[str, Counter[str]]) -> None:
        now_ns = self._memory.clock.now_ns()
        for client, pages in found.items():
            if pages:
                self.reports.append(Report(now_ns, client, source.name, target.name, pages))
                log.warning("failover: %s", self.reports[-1])
