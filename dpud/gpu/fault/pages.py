# SPDX-License-Identifier: MIT
"""Whole pages out of a GpuMemory and into it, for who keeps copies of them: past permissions, charged as checkpoint."""

import errno
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import Pages
from dpud.gpu.errors import GpuError
from dpud.gpu.location import Location
from dpud.gpu.memory import GpuMemory
from dpud.gpu.traffic import Cause

_BATCH_BYTES = 1 << 20
Rows = NDArray[np.uint8]


def load(memory: GpuMemory, region: Region, pages: Pages) -> Rows:
    """Bytes of pages [page, byte], wherever they are; they stay there. Raises GpuError(EIO) where some are lost."""
    memory.residency.examine(region, pages)
    rows: Rows = np.zeros((len(pages), region.page_bytes), dtype=np.uint8)
    state = region.state[pages]
    if (state == PageState.CORRUPT).any():
        raise GpuError(errno.EIO, f"pages of {region.client} are lost")
    if (state == PageState.AWAY).any():
        raise GpuError(errno.EAGAIN, f"pages of {region.client} are still on their way from another daemon")
    for location in memory.locations:
        here = np.flatnonzero((state == PageState.RESIDENT) & (region.home[pages] == location.number))
        if len(here):
            memory.residency.charge(region, Cause.CHECKPOINT, pages[here], location)
            rows[here] = location.load_pages(region.frame[pages[here]], region.page_bytes)
    stored = np.flatnonzero(state == PageState.STORED)
    memory.residency.charge_stored(region, Cause.CHECKPOINT, pages[stored])
    keys = (region.first_key + pages[stored]).tolist()
    if keys and memory.store.peek(keys, [rows[at].data for at in stored.tolist()]):
        raise GpuError(errno.EIO, f"stored pages of {region.client} are corrupt")
    return rows


def put(memory: GpuMemory, region: Region, pages: Pages, rows: Rows) -> None:
    """Make these their bytes, whatever state they are in. Raises GpuError(ENOMEM)."""
    for at, group in _by_place(memory, region, pages):
        per_batch = max(1, min(_BATCH_BYTES, memory.locations[at].frames.nr_bytes // 4) >> region.page_shift)
        for start in range(0, len(group), per_batch):
            _put(memory, region, pages[group[start : start + per_batch]], rows[group[start : start + per_batch]], at)


def _put(memory: GpuMemory, region: Region, pages: Pages, rows: Rows, at: int) -> None:
    keys = set((region.first_key + pages).tolist())
    memory.faults.serve(region, pages, at, True, np.ones(len(pages), dtype=np.bool_), keys)
    homes = region.home[pages]
    for location in memory.locations:
        here = homes == location.number
        if here.any():
            memory.residency.charge(region, Cause.CHECKPOINT, pages[here], location)
            location.store_pages(region.frame[pages[here]], rows[here])
    for page in pages.tolist():
        memory.space.set_dirty(region, page, 1, at)


def _by_place(memory: GpuMemory, region: Region, pages: Pages) -> Iterator[tuple[int, Pages]]:
    """(location, indices): resident pages stay where they are."""
    default = home_of(memory, region).number
    places = np.where(region.state[pages] == PageState.RESIDENT, region.home[pages], default)
    for at in np.unique(places).tolist():
        yield at, np.flatnonzero(places == at)


def home_of(memory: GpuMemory, region: Region) -> Location:
    """Where a page of a region is put that is nowhere."""
    if region.type is RegionType.DEVICE:
        return memory.locations[region.device]
    owner = memory.clients.get(region.client)
    if region.type is not RegionType.MANAGED or owner is None:
        return memory.locations[memory.faults.placement.nearest(region.device)]
    return memory.locations[owner.device]
