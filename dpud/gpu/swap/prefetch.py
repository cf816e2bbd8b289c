# SPDX-License-Identifier: MIT
"""Which pages to bring in along with one that was missing.

density   NVIDIA's driver's rule for a 2 MiB block (uvm_perf_prefetch.c, open-gpu-kernel-modules 595.45): the pages are
          the leaves of a binary tree; the largest subtree around the missing page of which more than 51 % is in memory,
          that page included, is brought in whole.
stride    the same distance between two faults in a row, seen twice: the next pages at that distance, twice as many each
          time it holds, up to MAX_AHEAD.
majority  Leap (Al Maruf and Chowdhury, ATC'20): the distance that more than half of the last faults had (Boyer and
          Moore's vote), over a window that doubles from HISTORY / 4 until there is one. So it sees a stride through
          faults that do not belong to it. The more of what it brought in is still there, the more it brings in.

Each works region by region (`first_key` names the region) and proposes pages of that region only. Pages that are in
memory already are not proposed.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import cast

BLOCK_PAGES = 512
"""Leaves of a tree: 2 MiB of 4 KiB pages."""
THRESHOLD_PERCENT = 51
MAX_AHEAD = 32
HISTORY = 32
LEAP_WINDOW = 8
_MAX_REGIONS = 1024

Resident = Callable[[int], bool]


class Prefetcher(ABC):
    """One way to guess."""

    @abstractmethod
    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        """Pages of a region to bring in besides `page`, which was missing. `resident(page)`: whether one is there."""


_KINDS: dict[str, Callable[[], Prefetcher]] = {}


def register(name: str) -> Callable[[type[Prefetcher]], type[Prefetcher]]:
    """A prefetcher, by name."""

    def registered(kind: type[Prefetcher]) -> type[Prefetcher]:
        if name in _KINDS:
            raise ValueError(f"there is a prefetcher {name} already")
        _KINDS[name] = kind
        return kind

    return registered


def names() -> tuple[str, ...]:
    return tuple(_KINDS)


def new_prefetcher(name: str) -> Prefetcher:
    """Raises KeyError for a name that is none."""
    return _KINDS[name]()


@register("none")
class NoPrefetch(Prefetcher):
    """Nothing but what was missing."""

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        return ()


@register("density")
class DensityTree(Prefetcher):
    """`block_pages`: a power of two."""

    def __init__(self, block_pages: int = BLOCK_PAGES, threshold_percent: int = THRESHOLD_PERCENT) -> None:
        self.block_pages = block_pages
        self.threshold_percent = threshold_percent

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        first = page - page % self.block_pages
        there = _span(resident, first, min(first + self.block_pages, nr_pages))
        there[page - first] = True
        start, end = _dense_range(there, page - first, self.threshold_percent)
        return [first + leaf for leaf in range(start, end) if not there[leaf]]


def _span(resident: Resident, first: int, end: int) -> bytearray:
    """A byte for each page; at once, where whoever knows can say it so."""
    span = getattr(resident, "span", None)
    if span is not None:
        return cast(bytearray, span(first, end))
    return bytearray(map(resident, range(first, end)))


def _dense_range(there: bytearray, leaf: int, percent: int) -> tuple[int, int]:
    """The largest subtree around a leaf that is dense enough. A tree that is cut off has the leaves it has."""
    best, size = (leaf, leaf + 1), 2
    while size < 2 * len(there):
        start = leaf - leaf % size
        end = min(start + size, len(there))
        if there.count(1, start, end) * 100 > (end - start) * percent:
            best = start, end
        size *= 2
    return best


class _PerRegion:
    """What is remembered of each region, of the ones that faulted last."""

    def __init__(self) -> None:
        self._states: OrderedDict[int, _Stream] = OrderedDict()

    def of(self, first_key: int) -> "_Stream":
        state = self._states.pop(first_key, None) or _Stream()
        self._states[first_key] = state
        if len(self._states) > _MAX_REGIONS:
            self._states.popitem(last=False)
        return state


class _Stream:
    """Faults of one region."""

    def __init__(self) -> None:
        self.last: int | None = None
        self.distance = 0
        self.nr_same = 0
        self.distances: deque[int] = deque(maxlen=HISTORY)
        self.ahead = 0
        self.issued: tuple[int, ...] = ()


@register("stride")
class Stride(Prefetcher):
    """The distance between faults, as pages that were brought in are skipped over."""

    def __init__(self) -> None:
        self._regions = _PerRegion()

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        stream = self._regions.of(first_key)
        expected = stream.issued[-1] + stream.distance if stream.issued else None
        if page == expected:
            stream.ahead = min(2 * stream.ahead, MAX_AHEAD)
        else:
            self._look(stream, page)
        stream.last = page
        if not stream.ahead:
            stream.issued = ()
            return ()
        ahead = (page + stream.distance * n for n in range(1, stream.ahead + 1))
        stream.issued = tuple(number for number in ahead if 0 <= number < nr_pages)
        return [number for number in stream.issued if not resident(number)]

    def _look(self, stream: _Stream, page: int) -> None:
        """Two equal distances in a row begin a run."""
        distance = 0 if stream.last is None else page - stream.last
        stream.nr_same = stream.nr_same + 1 if distance and distance == stream.distance else 0
        stream.distance = distance
        stream.ahead = 2 if stream.nr_same else 0


@register("majority")
class Majority(Prefetcher):
    """Leap's."""

    def __init__(self) -> None:
        self._regions = _PerRegion()

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Resident) -> Sequence[int]:
        stream = self._regions.of(first_key)
        nr_used = sum(resident(number) for number in stream.issued)
        if stream.last is not None:
            stream.distances.append(page - self._reached(stream, page))
        stream.last = page
        distance = trend(list(stream.distances))
        self._set_window(stream, distance, nr_used)
        if not stream.ahead or not distance:
            stream.issued = ()
            return ()
        ahead = [page + distance * n for n in range(1, stream.ahead + 1)]
        stream.distance = distance
        stream.issued = tuple(number for number in ahead if 0 <= number < nr_pages)
        return [number for number in stream.issued if not resident(number)]

    def _reached(self, stream: _Stream, page: int) -> int:
        """Where the last access was: the fault, or what was brought in with it if the next fault is just behind."""
        if stream.issued and page == stream.issued[-1] + stream.distance:
            return stream.issued[-1]
        assert stream.last is not None
        return stream.last

    def _set_window(self, stream: _Stream, distance: int | None, nr_used: int) -> None:
        """Twice as much as what was of use, or half of what it was where little was."""
        if distance is None:
            stream.ahead = 0
        elif not nr_used:
            stream.ahead = max(2, stream.ahead // 2)
        else:
            wanted = 1 << nr_used.bit_length()
            stream.ahead = min(max(wanted, stream.ahead // 2, 2), LEAP_WINDOW)


def trend(distances: Sequence[int]) -> int | None:
    """The distance that more than half of a window's latest had, even while there are fewer; None if there is none."""
    size = HISTORY // 4
    while True:
        window = distances[-size:]
        candidate, votes = 0, 0
        for distance in window:
            if votes == 0:
                candidate = distance
            votes += 1 if distance == candidate else -1
        if 2 * sum(distance == candidate for distance in window) > size:
            return candidate
        if size >= len(distances):
            return None
        size *= 2
