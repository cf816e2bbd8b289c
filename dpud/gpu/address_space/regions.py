# SPDX-License-Identifier: MIT
"""Regions: what was allocated, page by page.

A page's identity outside the address space is its *key*: unique for the life of the page and never used again, so that
a store that still holds an old page's bytes cannot be mistaken for a new one's.

Where a page is:
    UNTOUCHED  never written: reads as zeros and takes no memory
    RESIDENT   in a frame of location `home`; other locations may have copies (read-mostly), or reach it over the link
    STORED     in the compressed pool or a swap tier
    CORRUPT    its stored bytes were found to be wrong; EIO until all of it is written anew
    AWAY       still in another daemon, from where it is on its way (post-copy, see migration/)

`backed` says that the stores have the page's bytes as they are now, so that taking it out of memory costs nothing. It
holds for every STORED page, and for a RESIDENT one until it is written to.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.advice import PageAdvice
from dpud.gpu.address_space.pagetable import CHUNK_BYTES, FRAME_SHIFT
from dpud.gpu.address_space.permissions import Permission
from dpud.gpu.dirty import DirtyLog
from dpud.gpu.enums import plain_members


@plain_members
class RegionType(Enum):
    """Where a region's pages may be."""

    HOST = "host"
    """In host memory; devices reach it over the link."""
    DEVICE = "device"
    """On one device, or in the stores behind it."""
    MANAGED = "managed"
    """Where it is used: pages move to whoever touches them."""
    PINNED = "pinned"
    """In host memory, and never taken out of it."""


@plain_members
class PageState(IntEnum):
    UNTOUCHED = 0
    RESIDENT = 1
    STORED = 2
    CORRUPT = 3
    AWAY = 4


class Arrival(Protocol):
    """Who brings a region's pages from where they are still."""

    def bring(self, first: int, nr_pages: int, whole: NDArray[np.bool_] | None, /) -> None:
        """Have them here before they are used; `whole`: which of them are overwritten. Raises GpuError."""
        ...


@dataclass(eq=False)
class Region:
    """One allocation."""

    va: int
    nr_bytes: int
    page_shift: int
    type: RegionType
    client: str
    """Who owns it."""
    device: int
    """Location of a DEVICE region's frames."""
    first_key: int
    leaf: int
    """Index of its first entry in the page tables."""
    priority: int = 0
    grant: Any = None
    """What admission gave for it."""
    permissions: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    """For each client that has any: of each page."""
    replicas: dict[int, dict[int, int]] = field(default_factory=dict)
    """Of pages with copies: location -> frame, `home` left out."""
    dirty_logs: list[DirtyLog] = field(default_factory=list)
    """Whoever wants to know which pages are written to."""
    name: str = ""
    """What its owner calls it."""
    held: bool = False
    """Nobody may use it: it is being handed over."""
    released: bool = False
    """It is no more."""
    arrival: Arrival | None = None
    """While its pages are still coming from elsewhere."""

    def __post_init__(self) -> None:
        self.nr_pages = -(-self.nr_bytes >> self.page_shift)
        self.state: NDArray[np.uint8] = np.zeros(self.nr_pages, dtype=np.uint8)
        self.home: NDArray[np.int8] = np.zeros(self.nr_pages, dtype=np.int8)
        self.frame: NDArray[np.int64] = np.zeros(self.nr_pages, dtype=np.int64)
        self.backed: NDArray[np.bool_] = np.zeros(self.nr_pages, dtype=np.bool_)
        self.advice = PageAdvice(self.nr_pages)

    @property
    def page_bytes(self) -> int:
        return 1 << self.page_shift

    @property
    def order(self) -> int:
        """Of its pages' frames."""
        return self.page_shift - FRAME_SHIFT

    @property
    def end(self) -> int:
        """First address behind its last page."""
        return self.va + (self.nr_pages << self.page_shift)

    @property
    def nr_chunks(self) -> int:
        return -(-(self.nr_pages << self.page_shift) // CHUNK_BYTES)

    def vas(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Addresses of pages."""
        return self.va + (pages << self.page_shift)

    def allowed(self, client: str, first: int, end: int, wanted: Permission) -> bool:
        """Whether a client may do something with all of pages [first, end)."""
        granted, bits = self.permissions.get(client), int(wanted)
        if granted is None:
            return False
        if end - first == 1:
            return int(granted[first]) & bits == bits
        return bool((granted[first:end] & bits == bits).all())

    def count(self, state: PageState) -> int:
        """Pages in a state."""
        return int(np.count_nonzero(self.state == state))

    def nr_resident(self, location: int) -> int:
        """Pages whose home is in a location's memory, copies not counted."""
        return int(np.count_nonzero((self.state == PageState.RESIDENT) & (self.home == location)))


class Regions:
    """All regions, by address and by key. Both orders are kept sorted; no two overlap."""

    def __init__(self) -> None:
        self._vas: list[int] = []
        self._by_va: list[Region] = []
        self._keys: list[int] = []
        self._by_key: list[Region] = []

    def __iter__(self) -> Iterator[Region]:
        return iter(self._by_va)

    def __len__(self) -> int:
        return len(self._by_va)

    def add(self, region: Region) -> None:
        at = bisect_right(self._vas, region.va)
        self._vas.insert(at, region.va)
        self._by_va.insert(at, region)
        self._keys.append(region.first_key)  # keys only grow
        self._by_key.append(region)

    def remove(self, region: Region) -> None:
        at = self._by_va.index(region)
        del self._vas[at], self._by_va[at]
        at = self._by_key.index(region)
        del self._keys[at], self._by_key[at]

    def find(self, va: int) -> Region | None:
        """The region that has an address."""
        at = bisect_right(self._vas, va) - 1
        return self._by_va[at] if at >= 0 and va < self._by_va[at].end else None

    def of_key(self, key: int) -> Region | None:
        """The region of a page, if it lives."""
        at = bisect_right(self._keys, key) - 1
        region = self._by_key[at] if at >= 0 else None
        return region if region is not None and key - region.first_key < region.nr_pages else None

    def page_of(self, key: int) -> tuple[Region, int]:
        """Region and page number of a key of a page that lives."""
        region = self._by_key[bisect_right(self._keys, key) - 1]
        assert 0 <= key - region.first_key < region.nr_pages, "a page that is gone"
        return region, key - region.first_key
