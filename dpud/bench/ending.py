# SPDX-License-Identifier: GPL-2.0-only
"""What ended a real compaction before its scanners met, as far as its captures show, and where ours ended.

A large folio for which there is no free block of its size is split; a dirty one of the page cache cannot be, and ends
the run. It counts as failed with all its pages. Dirty folios come and go: one that was not there yet when `before` was
read cannot be foreseen from it.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dpud.bench.scanners import Reached, reached
from kernelsim.hostblocks import HostZone
from kernelsim.mmzone import pageblock_nr_pages, pageblock_order
from kernelsim.page import PG_anon, PG_buddy, PG_dirty, PG_head, PG_lru, PG_tail

Words: TypeAlias = NDArray[np.uint64]
"""uint64[n]: kpageflags, whose lower bits are numbered as page.py's are."""


def ends(
    zones: tuple[HostZone, ...],
    before: Words,
    after: Words,
    ours_before: NDArray[np.bool_],
    ours_after: NDArray[np.bool_],
) -> Iterator[str]:
    """A line for each zone and run that ended early. `ours_before`, `ours_after`: bool[n], the pages on LRU lists of
    the emulated machine."""
    end = min(len(ours_before), len(before), len(after))
    free = _has(before[:end], PG_buddy)
    fixed = _never_moved(before[:end])
    here, there = _has(before[:end], PG_lru) & ~fixed, _has(after[:end], PG_lru)
    ours_here = ours_before[:end] & ~fixed
    for zone in zones:
        first = zone.start_pfn & -pageblock_nr_pages
        span = slice(first, min(zone.end_pfn, end))
        real = reached(here[span], there[span], free[span], first)
        if real and real.ended_early:
            yield f"{zone.label}: the real run {_how(real)}; {_by_what(before, after, zone, real, here)}"
        ours = reached(ours_here[span], ours_after[span], free[span], first)
        if ours and ours.ended_early:
            yield f"{zone.label}: our run {_how(ours)}"


def _has(words: Words, flags: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = words & np.uint64(flags) == np.uint64(flags)
    return found


def _never_moved(words: Words) -> NDArray[np.bool_]:
    """Pages of folios of a pageblock or more, which both scanners step over."""
    whole = len(words) & -pageblock_nr_pages
    by_block = words[:whole].reshape(-1, pageblock_nr_pages)
    large = _has(by_block[:, 1:], PG_tail).all(axis=1) & (_has(by_block[:, 0], PG_head) | _has(by_block[:, 0], PG_tail))
    return np.concatenate([np.repeat(large, pageblock_nr_pages), np.zeros(len(words) - whole, dtype=np.bool_)])


def _how(at: Reached) -> str:
    return (
        f"ended early: its migrate scanner was about pfn {at.migrate_pfn:#x}, {at.nr_between} pageblocks with movable "
        f"pages short of the free scanner at {at.free_pfn:#x}"
    )


def _by_what(before: Words, after: Words, zone: HostZone, at: Reached, movable: NDArray[np.bool_]) -> str:
    """The dirty large folios that came, between the two captures, to where the migrate scanner stopped."""
    low, high = _around(zone, at.migrate_pfn, movable)
    wanted = _has(after[low:high], PG_lru | PG_head | PG_dirty) & ~_has(after[low:high], PG_anon)
    new = [pfn for pfn in (np.flatnonzero(wanted) + low).tolist() if not _has(before[pfn], PG_head)]
    if not new:
        return "by a folio that neither capture shows: it came and went in between, or was held or locked"
    folios = ", ".join(f"{_nr_pages(after, pfn)} pages at {pfn:#x}" for pfn in new)
    return f"by a dirty folio that was not there yet in `before`, which cannot foresee it ({folios})"


def _nr_pages(words: Words, head: int) -> int:
    tails = _has(words[head + 1 : head + pageblock_nr_pages], PG_tail)
    return 1 + (len(tails) if tails.all() else int(tails.argmin()))


def _around(zone: HostZone, pfn: int, movable: NDArray[np.bool_]) -> tuple[int, int]:
    """From the last pageblock with movable pages below `pfn` to the end of the first one from there on."""
    blocks = np.flatnonzero(movable[zone.start_pfn :]) + zone.start_pfn >> pageblock_order
    at = int(np.searchsorted(blocks, pfn >> pageblock_order))
    low = int(blocks[max(at - 1, 0)]) << pageblock_order
    high = int(blocks[min(at, len(blocks) - 1)]) + 1 << pageblock_order
    return max(low, zone.start_pfn), min(high, zone.end_pfn, len(movable))
