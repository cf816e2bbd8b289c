# SPDX-License-Identifier: MIT
"""Pages out of frames that are not to be used any more, and those frames out of use.

A page leaves its frames in one of three ways: its bytes, which the caller has, go into other frames (`move`) or into
the stores (`put_away`), or they are lost (`lose`). In each, the frames that are broken are retired on the way.
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dpud.gpu import traffic
from dpud.gpu.address_space.frames import FREE, RETIRED
from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.errors import GpuError
from dpud.gpu.fault.cells import Cells
from dpud.gpu.fault.events import EventLog, Xid
from dpud.gpu.fault.rows import Cause, Rows
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.location import Frames, Location
from dpud.gpu.memory import GpuMemory

Broken = Mapping[int, Cause]
"""Frames to retire, and why."""
NONE: Broken = {}


@dataclass(frozen=True)
class RetiredPage:
    """A frame that went out of use. As in nvmlDeviceGetRetiredPages_v2: address, cause, time."""

    address: int
    cause: Cause
    time_ns: int


class Placing:
    """`cells` and `rows` are by location."""

    def __init__(self, memory: GpuMemory, cells: list[Cells], rows: list[Rows], events: EventLog) -> None:
        self._memory, self._cells, self._rows, self._events = memory, cells, rows, events
        self.retired: list[dict[int, RetiredPage]] = [{} for _ in memory.locations]
        """By location: frame -> when and why."""

    # Frames.

    def retire(self, location: Location, frame: int, cause: Cause) -> None:
        """Take a free frame out of use; a spare row is to take its place at the next reset, if there is one."""
        location.frames.retire(frame)
        now_ns = self._memory.clock.now_ns()
        self.retired[location.number][frame] = RetiredPage(frame * FRAME_BYTES, cause, now_ns)
        rows = self._rows[location.number]
        where = f"page {frame:#x} is retired, bank {rows.bank(frame)}"
        if rows.reserve(frame, cause):
            self._events.add(Xid.REMAP, location.name, f"{where}: its row is remapped at the next reset")
        else:
            self._events.add(Xid.REMAP_FAILURE, location.name, f"{where}: no spare row is left")

    def revive(self, location: Location, frame: int) -> None:
        """A retired frame may be used again."""
        del self.retired[location.number][frame]
        location.frames.unretire(frame)

    def is_retired(self, location: Location, frame: int) -> bool:
        return bool(location.frames.owner[frame] == RETIRED)

    def is_free(self, location: Location, frame: int) -> bool:
        return bool(location.frames.owner[frame] == FREE)

    def are_fit(self, location: Location, firsts: Frames, order: int) -> bool:
        """Whether none of the frames of blocks may have errors."""
        cells = self._cells[location.number]
        if cells.is_quiet or not len(firsts):
            return True
        return not cells.is_suspect[firsts[:, None] + np.arange(1 << order)].any()

    def screen(self, location: Location, firsts: Frames, order: int) -> None:
        """Test free frames that may have errors: those with stuck cells are retired, the rest is written anew."""
        cells = self._cells[location.number]
        frames = (firsts[:, None] + np.arange(1 << order)).ravel()
        for frame in frames[cells.is_suspect[frames]].tolist():
            location.zero_pages(np.array([frame]), FRAME_BYTES)
            if cells.has_stuck(frame):
                self.retire(location, frame, Cause.UNCORRECTABLE)

    @staticmethod
    def frames_of(region: Region, first: int) -> range:
        """All frames of a page that begins there."""
        return range(first, first + (1 << region.order))

    # Pages.

    def move(self, region: Region, page: int, to: Location, row: Bytes, broken: Broken = NONE) -> None:
        """A resident page into other frames, of the same or another location. Raises GpuError(ENOMEM)."""
        pages, residency = np.array([page]), self._memory.residency
        frames = residency.take_frames(region, pages, to, ())
        backed = bool(region.backed[page])
        self._leave(region, page, broken)
        residency.charge(region, traffic.Cause.RELOCATION, pages, to)
        to.store_pages(frames, row[None])
        residency.settle(region, pages, to, frames)
        region.backed[page] = backed

    def put_away(self, region: Region, page: int, row: Bytes, broken: Broken = NONE) -> None:
        """A resident page into the stores. Raises GpuError(ENOSPC), and it is where it was."""
        if region.type is RegionType.PINNED:
            raise GpuError(errno.ENOSPC, "pinned memory stays in memory")
        if not region.backed[page]:
            home = self._memory.locations[int(region.home[page])]
            self._memory.residency.charge(region, traffic.Cause.SWAP, np.array([page]), home)
            self._memory.store.put([region.first_key + page], [row.data], region.client, home.number)
        self._leave(region, page, broken)
        region.state[page] = PageState.STORED
        region.backed[page] = True

    def lose(self, region: Region, page: int, broken: Broken = NONE) -> None:
        """The bytes of a page are gone."""
        self._memory.store.drop(region.first_key + page)
        if region.state[page] == PageState.RESIDENT:
            self._leave(region, page, broken)
        region.state[page] = PageState.CORRUPT
        region.backed[page] = False
        self._memory.residency.events["corrupt"] += 1

    def promote(self, region: Region, page: int) -> None:
        """A copy at another location takes the page's place, which is lost."""
        pages, old = np.array([page]), self._memory.locations[int(region.home[page])]
        number, frame = next(iter(region.replicas[page].items()))
        del region.replicas[page][number]
        if not region.replicas[page]:
            del region.replicas[page]
        self._memory.space.unmap_pages(region, pages)
        old.policy.remove(region.first_key + page)
        self._memory.residency.give_frames(region, pages, old, region.frame[pages])
        region.home[page], region.frame[page] = number, frame

    def rewrite(self, region: Region, page: int, row: Bytes) -> None:
        """A resident page's bytes into the frames where it is."""
        pages, location = np.array([page]), self._memory.locations[int(region.home[page])]
        self._memory.residency.charge(region, traffic.Cause.RELOCATION, pages, location)
        location.store_pages(region.frame[pages], row[None])

    def _leave(self, region: Region, page: int, broken: Broken) -> None:
        """A page is in no frame any more."""
        location, pages = self._memory.locations[int(region.home[page])], np.array([page])
        residency = self._memory.residency
        residency.drop_copies(region, pages)
        self._memory.space.unmap_pages(region, pages)
        location.policy.remove(region.first_key + page)
        residency.give_frames(region, pages, location, region.frame[pages])
        for frame, cause in broken.items():
            self.retire(location, frame, cause)
