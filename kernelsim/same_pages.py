# SPDX-License-Identifier: GPL-2.0-only
"""Contents that many pages have: what real programs have by loading the same libraries and data, and KSM finds.

Every write of a process brings a content that no other page has (content.py), so nothing would ever be the same. Here a
process stores one of a few contents instead, which are the same in every process.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import Memory, fill_page, new_stamps
from kernelsim.jit import njit
from kernelsim.pgtable import PageTables, leaf_pfn, walk_leaf
from kernelsim.rmap import Vmas

MAX_KINDS = 1 << 20
_FIRST_SEQUENCE = 1 << 62
"""Of the contents of this module: no write's sequence number gets there, so that they are nobody else's."""


def choose_kinds(nr: int, kinds: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    """uint64[nr]: the stamps of `nr` pages, each of one of `kinds` contents at random."""
    return new_stamps(kinds, _FIRST_SEQUENCE)[rng.integers(kinds, size=nr)]


@njit
def store_stamps(
    memory: Memory,
    vmas: Vmas,
    pt: PageTables,
    wrote: NDArray[np.uint64],
    vma: int,
    vpns: NDArray[np.int64],
    stamps: NDArray[np.uint64],
) -> None:
    """Another store of the CPU to virtual pages that it has just written: the content with this stamp."""
    for i in range(len(vpns)):
        pfn = leaf_pfn(pt[walk_leaf(pt, vmas[vma].root, vpns[i])], vpns[i])
        wrote[vpns[i] - vmas[vma].start] = stamps[i]
        fill_page(memory, pfn, stamps[i])
