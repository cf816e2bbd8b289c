# SPDX-License-Identifier: MIT
"""How much of each block is in use, of blocks of all orders, kept while frames are taken and given back.

Theory of operation
    A binary tree in one array: the frames are its leaves, which are not stored, and node i has the sum of nodes 2i and
    2i + 1. As many roots as there are blocks of MAX_ORDER stand side by side, so the block of order k that frame f is
    in has index (len(tree) + f) >> k. A frame that a page has counts 1, a free one 0, a retired one RETIRED_WEIGHT, so
    that nobody takes a block with one for nearly free.

    Who looks for blocks to empty reads one number a block instead of all of its frames. (Linux has no such table: its
    compaction looks at all frames that the scanners pass.)

Invariant
    Every node is what `count` makes of the owners.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit

MAX_ORDER = 10
RETIRED_WEIGHT = 1 << MAX_ORDER + 1
"""More than a block has frames. All frames of a block together stay within 32 bits."""

Tree: TypeAlias = NDArray[np.int32]
Longs: TypeAlias = NDArray[np.int64]


def new_tree(nr_frames: int) -> Tree:
    """Nothing is in use."""
    return np.zeros(-(-nr_frames >> MAX_ORDER) << MAX_ORDER, dtype=np.int32)


def blocks_of(tree: Tree, order: int, nr_frames: int) -> Tree:
    """Use of each whole block of an order, 1 to MAX_ORDER: a view."""
    first = len(tree) >> order
    return tree[first : first + (nr_frames >> order)]


def count(tree: Tree, weights: Tree) -> None:
    """All of it anew, from what each frame counts."""
    sums = np.zeros(len(tree), dtype=np.int32)
    sums[: len(weights)] = weights
    for order in range(1, MAX_ORDER + 1):
        sums = sums.reshape(-1, 2).sum(axis=1, dtype=np.int32)
        tree[len(tree) >> order : 2 * len(tree) >> order] = sums


@njit
def add_use(tree: Tree, frame: int, order: int, weight: int) -> None:
    """Each of the 2^order frames from `frame` on counts so much more."""
    leaf = len(tree) + frame
    for level in range(1, order):
        first = leaf >> level
        for node in range(first, first + (1 << (order - level))):
            tree[node] += weight << level
    for level in range(max(1, order), MAX_ORDER + 1):
        tree[leaf >> level] += weight << order


@njit
def least_used(used: Tree, full: int, starts: Longs, out: Longs) -> int:
    """Blocks that are used, but not all of them, the least used first, as many as `out` takes -> how many.

    starts      full + 2 zeros
    """
    for block in range(len(used)):
        if 0 < used[block] < full:
            starts[used[block] + 1] += 1
    for use in range(1, full + 1):
        starts[use] += starts[use - 1]
    for block in range(len(used)):
        if 0 < used[block] < full:
            at = starts[used[block]]
            starts[used[block]] += 1
            if at < len(out):
                out[at] = block
    return int(min(starts[full], len(out)))
