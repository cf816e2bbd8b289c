# SPDX-License-Identifier: GPL-2.0-only
"""How far a compaction got, told from which pages are movable before and after it.

The migrate scanner vacates pageblocks from the bottom of the zone, the free scanner fills them from the top. Processes
that came and went meanwhile blur both, so each position is the one that fits most pages: as many as possible were
vacated below it and stayed above it, or were filled above it and left free below it. A run that ended before the
scanners met leaves pageblocks between the two with movable pages in them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernelsim.mmzone import pageblock_nr_pages, pageblock_order

MARGIN = 0.02
"""Of the pageblocks with movable pages, so many may seem to lie between scanners that met."""


@dataclass(frozen=True)
class Reached:
    """Where the scanners of one zone were in the end: pfns, and the pageblocks with movable pages, in between and in
    all."""

    migrate_pfn: int
    free_pfn: int
    nr_between: int
    nr_blocks: int

    @property
    def ended_early(self) -> bool:
        return self.nr_between > MARGIN * self.nr_blocks


def reached(
    before: NDArray[np.bool_], after: NDArray[np.bool_], free: NDArray[np.bool_], start_pfn: int
) -> Reached | None:
    """`before`, `after`: bool[n], which pages of a zone that begins at `start_pfn` (a pageblock's) are movable; `free`:
    bool[n], which were on the buddy lists before. None if nothing moved."""
    vacated, stayed = _by_block(before & ~after), _by_block(before & after)
    filled, left = _by_block(free & after), _by_block(free & ~after)
    left[left == pageblock_nr_pages] = 0  # free as a whole: no place to move to
    if not filled.any() or not vacated.any():
        return None
    gone = _best_prefix(vacated - stayed)
    kept = len(filled) - _best_prefix((filled - left)[::-1])
    movable = _by_block(before) > 0
    at = [start_pfn + (block << pageblock_order) for block in (gone, kept)]
    return Reached(at[0], at[1], int(movable[gone : max(kept, gone)].sum()), int(movable.sum()))


def _by_block(pages: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many of each pageblock; the zone's end may be cut."""
    whole = np.zeros(-(-len(pages) // pageblock_nr_pages) * pageblock_nr_pages, dtype=np.bool_)
    whole[: len(pages)] = pages
    nr: NDArray[np.int64] = whole.reshape(-1, pageblock_nr_pages).sum(axis=1)
    return nr


def _best_prefix(gain: NDArray[np.int64]) -> int:
    """How many leading entries have the greatest sum; the fewest of equals."""
    return int(np.concatenate([[0], np.cumsum(gain)]).argmax())
