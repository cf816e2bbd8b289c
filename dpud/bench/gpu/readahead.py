# SPDX-License-Identifier: GPL-2.0-only
"""Peers of prefetching: NVIDIA's 51 % rule written from its description, and Linux's readahead of files.

Linux (page_cache_sync_ra and page_cache_async_ra, mm/readahead.c, 6.18) with its default of 128 KiB: a fault at the
beginning or right behind the last one opens a window of 4 pages, whose second page is marked; a hit on the mark opens
the next window, twice as large, up to 32 pages, and marks its first page. Anything else reads the one page. Left out:
the search in the page cache for what lies before a fault, which finds streams that interleave.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

Resident = Callable[[int], bool]

MAX_WINDOW = 32
FIRST_WINDOW = 4


class Guess(Protocol):
    """What both kinds of peers and ours have in common."""

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident, /) -> Sequence[int]: ...


class PublishedDensityRule:
    """Of the aligned ranges of 2, 4, ... 512 pages around a fault, the largest that is more than 51 % there with it."""

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        for shift in range(9, 0, -1):
            start = page >> shift << shift
            pages = range(start, min(start + (1 << shift), nr_pages))
            missing = [each for each in pages if each != page and not resident(each)]
            if (len(pages) - len(missing)) / len(pages) > 0.51:
                return missing
        return ()


class LinuxReadahead:
    """One file's state (struct file_ra_state)."""

    def __init__(self) -> None:
        self._start = self._size = 0
        self._mark = -1
        self._previous = -1

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        sequential = page in (0, self._previous + 1, self._start + self._size)
        self._previous = page
        if not sequential:
            return ()
        self._start, self._size, self._mark = page, FIRST_WINDOW, page + 1
        return self._window(page + 1, nr_pages, resident)

    def on_access(self, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        """A hit; on the mark it reads on."""
        self._previous = page
        if page != self._mark:
            return ()
        self._start += self._size
        self._size = min(2 * self._size, MAX_WINDOW)
        self._mark = self._start
        return self._window(self._start, nr_pages, resident)

    def _window(self, first: int, nr_pages: int, resident: Resident) -> list[int]:
        return [page for page in range(first, min(self._start + self._size, nr_pages)) if not resident(page)]
