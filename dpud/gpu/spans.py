# SPDX-License-Identifier: MIT
"""How an access of many pages is cut: which pages it covers, which lie in one memory, which bytes belong to which."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.pagetable import PTE_PRESENT, location_of, locations_of
from dpud.gpu.address_space.regions import Region


def whole_pages(region: Region, nr_pages: int, offset: int, nr_bytes: int) -> NDArray[np.bool_]:
    """Pages of a span that a write covers from end to end."""
    starts = np.arange(nr_pages) << region.page_shift
    covered: NDArray[np.bool_] = (starts >= offset) & (starts + region.page_bytes <= offset + nr_bytes)
    return covered


def stretches(entries: NDArray[np.uint64]) -> Iterator[tuple[int | None, int, int]]:
    """(location, first, end) of entries that lie side by side in one memory; None for pages without a frame."""
    if len(entries) == 1:  # most accesses
        yield location_of(int(entries[0])), 0, 1
        return
    places = np.where(entries & PTE_PRESENT != 0, locations_of(entries), -1)
    breaks = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), len(places)]
    for start, end in pairwise(breaks):
        place = int(places[start])
        yield None if place < 0 else place, start, end


def piece_of(region: Region, start: int, end: int, offset: int, nr_bytes: int) -> tuple[int, slice]:
    """(offset in page `start`, bytes of the access) of pages [start, end) of a span."""
    begin = max(0, (start << region.page_shift) - offset)
    return (offset if start == 0 else 0), slice(begin, min(nr_bytes, (end << region.page_shift) - offset))
