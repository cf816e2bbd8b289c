# SPDX-License-Identifier: MIT
"""Every invariant of the data path, looked at from outside: for tests, and for who doubts.

No two addresses own one frame; nobody believes a stale translation; each page's bytes are where its state says.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from dpud.gpu.address_space.frames import FREE
from dpud.gpu.address_space.pagetable import PTE_PRESENT, PTE_WRITE, frames_of, locations_of
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.memory import GpuMemory


def violations(memory: GpuMemory) -> list[str]:
    """One line for each thing that is wrong."""
    found = memory.space.check_translations()
    for location in memory.locations:
        found += [f"{location.name}: {problem}" for problem in location.frames.check()]
    found += _ownership(memory)
    for region in memory.space.regions:
        found += _entries(memory, region)
        found += _stored(memory, region)
    return found


def _frames_in_use(memory: GpuMemory) -> Iterator[tuple[int, int, int, Region]]:
    """(location, first frame, key, region) of every page in memory, copies included."""
    for region in memory.space.regions:
        for page in np.flatnonzero(region.state == PageState.RESIDENT).tolist():
            yield int(region.home[page]), int(region.frame[page]), region.first_key + page, region
        for page, where in region.replicas.items():
            for location, frame in where.items():
                yield location, frame, region.first_key + page, region


def _ownership(memory: GpuMemory) -> Iterator[str]:
    """Each frame in use belongs to the one page that uses it, and the policies know who may go."""
    used: list[Counter[int]] = [Counter() for _ in memory.locations]
    nr_known = Counter[int]()
    for location, first, key, region in _frames_in_use(memory):
        owner = memory.locations[location].frames.owner
        frames = range(first, first + (1 << region.order))
        used[location].update(frames)
        nr_known[location] += region.type is not RegionType.PINNED
        if first % (1 << region.order) or not (owner[frames.start : frames.stop] == key).all():
            yield f"page {key:#x} does not own frames {first}.. of {memory.locations[location].name}"
    for place, frames_used in zip(memory.locations, used, strict=True):
        if any(nr > 1 for nr in frames_used.values()):
            yield f"{place.name}: two pages own one frame"
        if len(frames_used) != int(np.count_nonzero(place.frames.owner != FREE)):
            yield f"{place.name}: frames are owned by nobody who lives"
        if nr_known[place.number] != len(place.policy):
            yield f"{place.name}: the policy knows {len(place.policy)} pages, {nr_known[place.number]} may go"


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
        for page in np.flatnonzero(present).tolist():
            home, frame = int(region.home[page]), int(region.frame[page])
            copy = region.replicas.get(page, {}).get(location.number)
            right = (home, frame) if copy is None else (location.number, copy)
            entry = entries[page : page + 1]
            if (int(locations_of(entry)[0]), int(frames_of(entry)[0])) != right:
                yield f"{location.name} looks for page {page} of {region.va:#x} in the wrong frame"


def _stored(memory: GpuMemory, region: Region) -> Iterator[str]:
    """`backed` is what the stores say, and STORED pages are backed."""
    kept = np.array([memory.store.place(region.first_key + page) is not None for page in range(region.nr_pages)])
    if not np.array_equal(kept, region.backed):
        yield f"the stores and region {region.va:#x} disagree about who is kept"
    if (~region.backed & (region.state == PageState.STORED)).any():
        yield f"pages of {region.va:#x} are nowhere"
