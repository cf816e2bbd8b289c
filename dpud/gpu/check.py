# SPDX-License-Identifier: MIT
"""Every invariant of the data path, looked at from outside: for tests, and for who doubts.

No two addresses own one frame; nobody believes a stale translation; each page's bytes are where its state says.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.pagetable import PTE_PRESENT, PTE_WRITE, frames_of, locations_of
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.memory import GpuMemory
from dpud.gpu.qos.module import QosModule

Longs = NDArray[np.int64]


def violations(memory: GpuMemory) -> list[str]:
    """One line for each thing that is wrong."""
    found = memory.space.check_translations()
    for location in memory.locations:
        found += [f"{location.name}: {problem}" for problem in location.frames.check()]
    found += _ownership(memory)
    for region in memory.space.regions:
        found += _entries(memory, region)
        found += _stored(memory, region)
        found += _migrating(region)
    if isinstance(memory.residency.traffic, QosModule):
        found += [f"qos: {problem}" for problem in memory.residency.traffic.violations()]
    if memory.numa is not None:
        found += [f"numa: {problem}" for problem in memory.numa.violations()]
    return found


def _frames_in_use(memory: GpuMemory, location: int) -> Iterator[tuple[Region, Longs, Longs]]:
    """(region, pages, first frames) of the pages in a location's memory, copies included."""
    for region in memory.space.regions:
        pages = np.flatnonzero((region.state == PageState.RESIDENT) & (region.home == location))
        yield region, pages, region.frame[pages]
        copies = {page: where[location] for page, where in region.replicas.items() if location in where}
        yield region, np.array(list(copies), dtype=np.int64), np.array(list(copies.values()), dtype=np.int64)


def _ownership(memory: GpuMemory) -> Iterator[str]:
    """Each frame in use belongs to the one page that uses it, and the policies know who may go."""
    for place in memory.locations:
        owner, nr_used = place.frames.owner, np.zeros(place.frames.nr_frames, dtype=np.int64)
        nr_may_go = 0
        for region, pages, firsts in _frames_in_use(memory, place.number):
            frames = firsts[:, None] + np.arange(1 << region.order)
            np.add.at(nr_used, frames, 1)
            nr_may_go += len(pages) if region.type is not RegionType.PINNED else 0
            if (firsts % (1 << region.order)).any() or (owner[frames] != region.first_key + pages[:, None]).any():
                yield f"{place.name}: pages of {region.va:#x} do not own their frames"
        if nr_used.max(initial=0) > 1:
            yield f"{place.name}: two pages own one frame"
        if ((nr_used == 0) != (owner < 0)).any():
            yield f"{place.name}: frames are owned by nobody who lives"
        if nr_may_go != len(place.policy):
            yield f"{place.name}: the policy knows {len(place.policy)} pages, {nr_may_go} may go"


def _entries(memory: GpuMemory, region: Region) -> Iterator[str]:
    """Entries point at the page's own frames, and may write only where it is the only copy."""
    resident = region.state == PageState.RESIDENT
    has_copies = np.isin(np.arange(region.nr_pages), list(region.replicas))
    for location in memory.locations:
        entries = memory.space.table.ptes[location.number, region.leaf : region.leaf + region.nr_pages]
        present = entries & PTE_PRESENT != 0
        if (present & ~resident).any():
            yield f"{location.name} reaches pages of {region.va:#x} that are not in memory"
        if (present & (entries & PTE_WRITE != 0) & (region.backed | has_copies)).any():
            yield f"{location.name} may write pages of {region.va:#x} that others have copies of"
        homes, frames = region.home.astype(np.int64), region.frame.copy()
        for page, where in region.replicas.items():
            if location.number in where:
                homes[page], frames[page] = location.number, where[location.number]
        if (present & ((locations_of(entries) != homes) | (frames_of(entries) != frames))).any():
            yield f"{location.name} looks for pages of {region.va:#x} in the wrong frames"


def _stored(memory: GpuMemory, region: Region) -> Iterator[str]:
    """`backed` is what the stores say, and STORED pages are backed."""
    kept = np.array([memory.store.place(region.first_key + page) is not None for page in range(region.nr_pages)])
    if not np.array_equal(kept, region.backed):
        yield f"the stores and region {region.va:#x} disagree about who is kept"
    if (~region.backed & (region.state == PageState.STORED)).any():
        yield f"pages of {region.va:#x} are nowhere"


def _migrating(region: Region) -> Iterator[str]:
    """Who waits for pages from another daemon has somebody who brings them."""
    if (region.state == PageState.AWAY).any() and region.arrival is None:
        yield f"pages of {region.va:#x} are away, and nobody brings them"
    if region.released:
        yield f"region {region.va:#x} was given up, and is still there"
