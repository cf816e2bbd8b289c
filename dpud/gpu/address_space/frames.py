# SPDX-License-Identifier: MIT
"""Frames of one location: a binary buddy allocator over 2 KiB frames, and who owns each.

Theory of operation
    A page of 2^order frames is an aligned block (2 KiB: order 0, 4 KiB: 1, 64 KiB: 5, 2 MiB: 10). Free blocks of an
    order form a doubly linked list through `next` and `prev`, and `blocks` has how many; `order_of` of a free block's
    first frame is its order, and -1 everywhere else. `owner` is the key of the page that has a frame, in each of its
    frames, or FREE; RETIRED are frames that nobody gets any more (fault/), until they are given back; ISOLATED are free
    ones that defrag/ has set apart, so that what leaves a block does not come back into it. How much of each block is
    in use is kept in a tree (usage.py).

Invariants
    - A frame is in exactly one free block, owned by exactly one page, or retired. (The page's own entry points back;
      the address space's checks compare both.)
    - No two free buddies of one order exist side by side.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.pagetable import FRAME_BYTES, FRAME_SHIFT
from dpud.gpu.address_space.usage import MAX_ORDER as MAX_ORDER
from dpud.gpu.address_space.usage import (
    RETIRED_WEIGHT,
    Longs,
    Tree,
    add_use,
    blocks_of,
    count,
    least_used,
    new_tree,
)
from kernelsim.jit import njit

FREE, RETIRED, ISOLATED = -1, -2, -3

Orders: TypeAlias = NDArray[np.int8]


@njit
def _push(heads: Longs, blocks: Longs, nexts: Longs, prevs: Longs, order_of: Orders, frame: int, order: int) -> None:
    order_of[frame] = order
    head = heads[order]
    nexts[frame], prevs[frame] = head, -1
    if head >= 0:
        prevs[head] = frame
    heads[order] = frame
    blocks[order] += 1


@njit
def _unlink(heads: Longs, blocks: Longs, nexts: Longs, prevs: Longs, order_of: Orders, frame: int) -> None:
    order = order_of[frame]
    if prevs[frame] >= 0:
        nexts[prevs[frame]] = nexts[frame]
    else:
        heads[order] = nexts[frame]
    if nexts[frame] >= 0:
        prevs[nexts[frame]] = prevs[frame]
    order_of[frame] = -1
    blocks[order] -= 1


@njit
def alloc_frame(heads: Longs, blocks: Longs, nexts: Longs, prevs: Longs, order_of: Orders, order: int) -> int:
    """First frame of a block, split off a larger one where need be; -1 if there is none."""
    at = order
    while at <= MAX_ORDER and heads[at] < 0:
        at += 1
    if at > MAX_ORDER:
        return -1
    frame = heads[at]
    _unlink(heads, blocks, nexts, prevs, order_of, frame)
    while at > order:
        at -= 1
        _push(heads, blocks, nexts, prevs, order_of, frame + (1 << at), at)
    return int(frame)


@njit
def free_frame(
    heads: Longs, blocks: Longs, nexts: Longs, prevs: Longs, order_of: Orders, frame: int, order: int
) -> None:
    """Give a block back and merge it with its buddies."""
    while order < MAX_ORDER:
        buddy = frame ^ (1 << order)
        if buddy + (1 << order) > len(order_of) or order_of[buddy] != order:
            break
        _unlink(heads, blocks, nexts, prevs, order_of, buddy)
        frame &= ~(1 << order)
        order += 1
    _push(heads, blocks, nexts, prevs, order_of, frame, order)


@njit
def free_frames(
    heads: Longs,
    blocks: Longs,
    nexts: Longs,
    prevs: Longs,
    order_of: Orders,
    owner: Longs,
    used: Tree,
    frames: Longs,
    keys: Longs,
    order: int,
) -> int:
    """free_frame() for the blocks of many pages -> how many of them were not the page's own, and were left alone."""
    nr_wrong = 0
    for i in range(len(frames)):
        first, end = frames[i], frames[i] + (1 << order)
        if owner[first] != keys[i] or owner[end - 1] != keys[i]:
            nr_wrong += 1
            continue
        owner[first:end] = FREE
        add_use(used, first, order, -1)
        free_frame(heads, blocks, nexts, prevs, order_of, first, order)
    return nr_wrong


@njit
def alloc_frames(
    heads: Longs,
    blocks: Longs,
    nexts: Longs,
    prevs: Longs,
    order_of: Orders,
    owner: Longs,
    used: Tree,
    out: Longs,
    keys: Longs,
    order: int,
) -> int:
    """alloc_frame() for many pages -> how many got one before there were no more."""
    for i in range(len(keys)):
        frame = alloc_frame(heads, blocks, nexts, prevs, order_of, order)
        if frame < 0:
            return i
        out[i] = frame
        owner[frame : frame + (1 << order)] = keys[i]
        add_use(used, frame, order, 1)
    return len(keys)


@njit
def isolate_frames(
    heads: Longs, blocks: Longs, nexts: Longs, prevs: Longs, order_of: Orders, owner: Longs, apart: Longs, size: int
) -> int:
    """Take the free blocks within blocks of `size` frames off the lists -> how many frames.

    `nexts` of the first frame of each has its order until `rejoin_frames`.
    """
    nr = 0
    for first in apart:
        at = first
        while at < first + size:
            order = order_of[at]
            if order < 0:
                at += 1
                continue
            _unlink(heads, blocks, nexts, prevs, order_of, at)
            owner[at : at + (1 << order)] = ISOLATED
            nexts[at] = order
            nr += 1 << order
            at += 1 << order
    return nr


@njit
def rejoin_frames(
    heads: Longs, blocks: Longs, nexts: Longs, prevs: Longs, order_of: Orders, owner: Longs, apart: Longs, size: int
) -> int:
    """The inverse."""
    nr = 0
    for first in apart:
        at = first
        while at < first + size:
            if owner[at] != ISOLATED:
                at += 1
                continue
            order = nexts[at]
            owner[at : at + (1 << order)] = FREE
            free_frame(heads, blocks, nexts, prevs, order_of, at, order)
            nr += 1 << order
            at += 1 << order
    return nr


@njit
def find_pages(owner: Longs, first: int, end: int, keys: Longs, orders: Longs) -> int:
    """Keys and orders of the pages in a range of frames, by address -> how many."""
    nr, at = 0, first
    while at < end:
        begin = at
        while at < end and owner[at] == owner[begin]:
            at += 1
        if owner[begin] >= 0:
            keys[nr], orders[nr] = owner[begin], 0
            while 2 << orders[nr] <= at - begin:
                orders[nr] += 1
            nr += 1
    return nr


@njit
def count_free_within(order_of: Orders, first: int, end: int, counts: Longs) -> None:
    """counts[order]: free blocks that begin in a range of frames."""
    for frame in range(first, end):
        if order_of[frame] >= 0:
            counts[order_of[frame]] += 1


class FramePool:
    """The frames of one location's memory."""

    def __init__(self, nr_bytes: int) -> None:
        self.nr_frames = nr_bytes >> FRAME_SHIFT
        self.nr_free = 0
        self.nr_retired = 0
        self.owner: Longs = np.full(self.nr_frames, FREE, dtype=np.int64)
        self._heads: Longs = np.full(MAX_ORDER + 1, -1, dtype=np.int64)
        self._nexts: Longs = np.zeros(self.nr_frames, dtype=np.int64)
        self._prevs: Longs = np.zeros(self.nr_frames, dtype=np.int64)
        self._order_of: Orders = np.full(self.nr_frames, -1, dtype=np.int8)
        self._blocks: Longs = np.zeros(MAX_ORDER + 1, dtype=np.int64)
        self._lists = (self._heads, self._blocks, self._nexts, self._prevs, self._order_of)
        self._used = new_tree(self.nr_frames)
        for frame in range(0, self.nr_frames >> MAX_ORDER << MAX_ORDER, 1 << MAX_ORDER):
            _push(*self._lists, frame, MAX_ORDER)
            self.nr_free += 1 << MAX_ORDER
        for order, at in _tail(self.nr_frames):
            _push(*self._lists, at, order)
            self.nr_free += 1 << order

    @property
    def nr_bytes(self) -> int:
        return self.nr_frames * FRAME_BYTES

    @property
    def nr_free_bytes(self) -> int:
        return self.nr_free * FRAME_BYTES

    def alloc(self, order: int, keys: Longs) -> Longs:
        """First frames of a block for each page, in turn, as far as there are blocks."""
        out = np.empty(len(keys), dtype=np.int64)
        nr = alloc_frames(*self._lists, self.owner, self._used, out, keys, order)
        self.nr_free -= nr << order
        return out[:nr]

    def free(self, frames: Longs, order: int, keys: Longs) -> None:
        """Pages give their blocks back."""
        nr_wrong = free_frames(*self._lists, self.owner, self._used, frames, keys, order)
        assert nr_wrong == 0, "frames of another page"
        self.nr_free += len(frames) << order

    @property
    def nr_usable(self) -> int:
        """Frames that are not retired."""
        return self.nr_frames - self.nr_retired

    def nr_free_for(self, order: int) -> int:
        """Free frames that are, or could become, part of a whole block of an order: no frame of it is retired."""
        if not self.nr_retired:
            return self.nr_free
        owners = self.owner[: self.nr_frames >> order << order].reshape(-1, 1 << order)
        whole = ~(owners == RETIRED).any(axis=1)
        return int(np.count_nonzero(owners[whole] == FREE))

    def retire(self, frame: int) -> None:
        """Let nobody have a free frame any more."""
        assert self.owner[frame] == FREE, "a frame in use"
        order = next(k for k in range(MAX_ORDER + 1) if self._order_of[frame >> k << k] == k)
        block = frame >> order << order
        _unlink(*self._lists, block)
        while order:
            order -= 1
            half = 1 << order
            upper = block + half
            _push(*self._lists, block if frame >= upper else upper, order)
            block = upper if frame >= upper else block
        self.owner[frame] = RETIRED
        add_use(self._used, frame, 0, RETIRED_WEIGHT)
        self.nr_free -= 1
        self.nr_retired += 1

    def retire_free(self) -> None:
        """Retire all free frames."""
        self.owner[self.owner == FREE] = RETIRED
        self._heads[:] = -1
        self._blocks[:] = 0
        self._order_of[:] = -1
        count(self._used, self._weights())
        self.nr_retired += self.nr_free
        self.nr_free = 0

    def unretire(self, frame: int) -> None:
        """It may be used again."""
        assert self.owner[frame] == RETIRED, "a frame that is not retired"
        self.owner[frame] = FREE
        add_use(self._used, frame, 0, -RETIRED_WEIGHT)
        free_frame(*self._lists, frame, 0)
        self.nr_free += 1
        self.nr_retired -= 1

    # For who defragments.

    def isolate(self, blocks: Sequence[int], order: int) -> None:
        """Let `alloc` find no free frame of these blocks, none of which is free as a whole."""
        self.nr_free -= int(isolate_frames(*self._lists, self.owner, np.array(blocks, dtype=np.int64), 1 << order))

    def rejoin(self, blocks: Sequence[int], order: int) -> None:
        """The inverse: they are free as any others."""
        self.nr_free += int(rejoin_frames(*self._lists, self.owner, np.array(blocks, dtype=np.int64), 1 << order))

    def is_free(self, block: int, order: int) -> bool:
        """Whether all of a block is."""
        return bool((self.owner[block : block + (1 << order)] == FREE).all())

    def is_used(self, block: int, order: int) -> bool:
        """Whether a page has any of a block's frames."""
        return bool((self.owner[block : block + (1 << order)] >= 0).any())

    def use(self, order: int) -> Tree:
        """Frames in use of each whole block of an order from 1 on; RETIRED_WEIGHT for each that is retired."""
        return blocks_of(self._used, order, self.nr_frames)

    def least_used(self, order: int, nr: int) -> list[int]:
        """First frames of up to so many blocks, the least used first, that are neither free nor full nor retired."""
        out: Longs = np.empty(nr, dtype=np.int64)
        found = least_used(self.use(order), 1 << order, np.zeros((1 << order) + 2, dtype=np.int64), out)
        return (out[:found] << order).tolist()  # type: ignore[no-any-return]

    def pages(self, block: int, order: int) -> tuple[Longs, Longs]:
        """Keys and orders of the pages in a block, by address."""
        keys, orders = np.empty(1 << order, dtype=np.int64), np.empty(1 << order, dtype=np.int64)
        nr = find_pages(self.owner, block, block + (1 << order), keys, orders)
        return keys[:nr], orders[:nr]

    def free_within(self, block: int, order: int) -> list[int]:
        """Number of free blocks of each order that are in a block."""
        counts: Longs = np.zeros(MAX_ORDER + 1, dtype=np.int64)
        count_free_within(self._order_of, block, block + (1 << order), counts)
        return counts.tolist()  # type: ignore[no-any-return]

    def carve(self, big: int, order: int, keys: Longs) -> Longs:
        """Blocks of an order for pages, side by side, cut from one free block of order `big`; none if there is none."""
        assert len(keys) << order <= 1 << big, "more than it holds"
        first = int(alloc_frame(*self._lists, big))
        if first < 0:
            return np.empty(0, dtype=np.int64)
        end = first + (len(keys) << order)
        self.owner[first:end] = np.repeat(keys, 1 << order)
        for frame in range(first, end, 1 << order):
            add_use(self._used, frame, order, 1)
        for frame in range(end, first + (1 << big)):
            free_frame(*self._lists, frame, 0)
        self.nr_free -= len(keys) << order
        return np.arange(first, end, 1 << order)

    def reown(self, frames: Longs, order: int, keys: Longs) -> None:
        """Frames are other pages' from now on; nothing moves."""
        self.owner[frames[:, None] + np.arange(1 << order)] = keys[:, None]

    def owners(self, frame: int, order: int) -> list[int]:
        """Keys of the pages in a block, each once."""
        keys = np.unique(self.owner[frame : frame + (1 << order)])
        return [int(key) for key in keys if key >= 0]

    def blocks_by_use(self, order: int) -> list[int]:
        """First frames of all whole blocks of an order without retired frames, least used first."""
        nr_blocks = self.nr_frames >> order
        owners = self.owner[: nr_blocks << order].reshape(nr_blocks, -1)
        used = (owners != FREE).sum(axis=1)
        whole = ~(owners == RETIRED).any(axis=1)
        return [int(block) << order for block in np.argsort(used, kind="stable") if whole[block]]

    def free_blocks(self) -> list[int]:
        """Number of free blocks of each order, as buddyinfo shows them."""
        found: list[int] = self._blocks.tolist()
        return found

    def _weights(self) -> Tree:
        """What each frame counts in the tree of use."""
        return np.where(self.owner == RETIRED, RETIRED_WEIGHT, self.owner >= 0).astype(np.int32)

    def check(self) -> list[str]:
        """What is wrong, if anything: free blocks are the frames nobody owns, each once, aligned and merged."""
        covered = np.zeros(self.nr_frames, dtype=np.int64)
        wrong = []
        for order in range(MAX_ORDER + 1):
            for frame in np.flatnonzero(self._order_of == order).tolist():
                covered[frame : frame + (1 << order)] += 1
                buddy = frame ^ (1 << order)
                if order < MAX_ORDER and buddy < self.nr_frames and self._order_of[buddy] == order:
                    wrong.append(f"buddies {frame} and {buddy} of order {order} are both free")
        if self.free_blocks() != [int(np.count_nonzero(self._order_of == order)) for order in range(MAX_ORDER + 1)]:
            wrong.append(f"free blocks are miscounted: {self.free_blocks()}")
        counted = np.zeros_like(self._used)
        count(counted, self._weights())
        if not np.array_equal(counted, self._used):
            wrong.append("use of blocks is miscounted")
        if not np.array_equal(covered, (self.owner == FREE).astype(np.int64)):
            wrong.append("free lists and owners disagree")
        if int(np.count_nonzero(self.owner == RETIRED)) != self.nr_retired:
            wrong.append(f"{self.nr_retired} frames counted retired, which is wrong")
        if (self.owner == ISOLATED).any():
            wrong.append("frames are set apart, and nobody is at work")
        if int(covered.sum()) != self.nr_free:
            wrong.append(f"{self.nr_free} frames counted free, {int(covered.sum())} are")
        return wrong


def _tail(nr_frames: int) -> list[tuple[int, int]]:
    """(order, first frame) of the blocks that cover what the largest ones leave over."""
    at = nr_frames >> MAX_ORDER << MAX_ORDER
    blocks = []
    for order in range(MAX_ORDER - 1, -1, -1):
        if nr_frames - at >= 1 << order:
            blocks.append((order, at))
            at += 1 << order
    return blocks
