# SPDX-License-Identifier: MIT
"""Advice about managed memory: who will use a page, and how. Per page, so that it may be given for any range.

read-mostly         a read from elsewhere makes a copy there instead of moving the page; a write drops all copies
preferred location  where the page is put when it comes into memory; others reach it over the link, it does not move
accessed-by         that location is always given a mapping, so that it never faults, and never makes the page move

The words and their meaning are cudaMemAdvise's (CUDA C++ Programming Guide, "Data usage hints").
"""

from enum import Enum

import numpy as np
from numpy.typing import NDArray

NOWHERE = -1


class Advice(Enum):
    """What is said; the last three take a location."""

    SET_READ_MOSTLY = "read-mostly"
    UNSET_READ_MOSTLY = "no-read-mostly"
    UNSET_PREFERRED_LOCATION = "no-preferred-location"
    SET_PREFERRED_LOCATION = "preferred-location"
    SET_ACCESSED_BY = "accessed-by"
    UNSET_ACCESSED_BY = "no-accessed-by"

    @property
    def takes_location(self) -> bool:
        return self in (Advice.SET_PREFERRED_LOCATION, Advice.SET_ACCESSED_BY, Advice.UNSET_ACCESSED_BY)


class PageAdvice:
    """What was said about each page of a region."""

    def __init__(self, nr_pages: int) -> None:
        self.read_mostly: NDArray[np.bool_] = np.zeros(nr_pages, dtype=np.bool_)
        self.preferred: NDArray[np.int8] = np.full(nr_pages, NOWHERE, dtype=np.int8)
        self.accessed_by: NDArray[np.uint64] = np.zeros(nr_pages, dtype=np.uint64)
        """One bit a location."""

    def give(self, first: int, end: int, advice: Advice, location: int) -> None:
        """Note it for pages [first, end)."""
        bit = np.uint64(1 << max(location, 0))
        match advice:
            case Advice.SET_READ_MOSTLY | Advice.UNSET_READ_MOSTLY:
                self.read_mostly[first:end] = advice is Advice.SET_READ_MOSTLY
            case Advice.SET_PREFERRED_LOCATION:
                self.preferred[first:end] = location
            case Advice.UNSET_PREFERRED_LOCATION:
                self.preferred[first:end] = NOWHERE
            case Advice.SET_ACCESSED_BY:
                self.accessed_by[first:end] |= bit
            case Advice.UNSET_ACCESSED_BY:
                self.accessed_by[first:end] &= ~bit
