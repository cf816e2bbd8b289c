# SPDX-License-Identifier: MIT
"""How scattered free memory is, in the four ways that people measure it.

unusable_index    share of free memory that is in blocks too small for an order, in thousandths
extfrag_index     whether an allocation of an order fails for lack of memory (near 0) or for fragmentation (near 1000);
                  -1000 where it would not fail
scattered         1 - largest hole / free memory
slack_bytes       reserved - allocated: what is free in parts of memory that something is in

The first two are those of /sys/kernel/debug/extfrag: unusable_free_index() and __fragmentation_index() in mm/vmstat.c,
Linux 6.18.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dpud.gpu.address_space.frames import FREE, MAX_ORDER, RETIRED, FramePool
from dpud.gpu.address_space.pagetable import FRAME_BYTES

_THOUSAND = 1000


def unusable_index(free_blocks: Sequence[int], order: int) -> int:
    """In thousandths, rounded down. `free_blocks`: number of free blocks of each order."""
    nr_free = sum(nr << at for at, nr in enumerate(free_blocks))
    if not nr_free:
        return _THOUSAND
    usable = sum(nr << (at - order) for at, nr in enumerate(free_blocks) if at >= order)
    return (nr_free - (usable << order)) * _THOUSAND // nr_free


def extfrag_index(free_blocks: Sequence[int], order: int) -> int:
    """In thousandths, as the kernel rounds it."""
    if not sum(free_blocks):
        return 0
    if any(free_blocks[order:]):
        return -_THOUSAND
    nr_free = sum(nr << at for at, nr in enumerate(free_blocks))
    return _THOUSAND - (_THOUSAND + nr_free * _THOUSAND // (1 << order)) // sum(free_blocks)


def scattered(holes: Iterable[int]) -> float:
    """0 where all that is free is one hole, or nothing is free; towards 1 the more it is scattered."""
    sizes = list(holes)
    return 1 - max(sizes) / sum(sizes) if any(sizes) else 0.0


@dataclass(frozen=True)
class Fragmentation:
    """All four, of one location."""

    unusable_index: int
    extfrag_index: int
    scattered: float
    slack_bytes: int
    largest_hole_bytes: int


def of_frames(frames: FramePool, order: int) -> Fragmentation:
    """Of a location's frames, for blocks of an order. A hole is a run of free frames, however aligned."""
    blocks, holes = frames.free_blocks(), runs(frames.owner == FREE)
    return Fragmentation(
        unusable_index(blocks, order),
        extfrag_index(blocks, order),
        scattered(holes),
        slack(frames),
        max(holes, default=0) * FRAME_BYTES,
    )


def runs(mask: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> list[int]:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [int(nr) for nr in edges[1::2] - edges[::2]]


def slack(frames: FramePool) -> int:
    """Free bytes in blocks of the largest order that have a page in them."""
    whole = frames.owner[: frames.nr_frames >> MAX_ORDER << MAX_ORDER].reshape(-1, 1 << MAX_ORDER)
    has_page = ((whole != FREE) & (whole != RETIRED)).any(axis=1)
    return int(np.count_nonzero(whole[has_page] == FREE)) * FRAME_BYTES
