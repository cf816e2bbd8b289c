# SPDX-License-Identifier: MIT
"""Which blocks of a tier are free: for each block, how many live records have a byte in it.

One byte a block: a record takes 128 bytes or more, so that at most 33 have a byte in it. Zero is free, so a free run is
a run of zero bytes, which `bytearray.find` finds at the speed of memmem(3). First fit: what was used stays low, and a
tier that is hardly used takes little of its file.

Invariant: `nr_free` is the number of zeros; block 0, the label, is never free.
"""

import numpy as np
from numpy.typing import NDArray

_LABEL_BLOCKS = 1


class BlockMap:
    """Free and used blocks of one file."""

    def __init__(self, nr_blocks: int) -> None:
        self._users = bytearray(nr_blocks)
        self._users[:_LABEL_BLOCKS] = b"\1" * _LABEL_BLOCKS
        self.nr_free = nr_blocks - _LABEL_BLOCKS
        self._lowest = _LABEL_BLOCKS  # no free block lies below

    def find(self, nr_blocks: int) -> int | None:
        """The first run of that many free blocks; None where there is none. They stay free until they are used."""
        if nr_blocks > self.nr_free:
            return None
        self._lowest = max(self._users.find(0, self._lowest), self._lowest)
        at = self._users.find(bytes(nr_blocks), self._lowest)
        return None if at < 0 else at

    def use(self, blocks: range) -> None:
        """One record more in each of these."""
        for block in blocks:
            self.nr_free -= not self._users[block]
            self._users[block] += 1

    def release(self, blocks: range) -> None:
        """One record less in each of these."""
        for block in blocks:
            self._users[block] -= 1
            if not self._users[block]:
                self.nr_free += 1
                self._lowest = min(self._lowest, block)

    def users(self) -> NDArray[np.uint8]:
        """Of each block; the label counts as one."""
        return np.frombuffer(bytes(self._users), dtype=np.uint8)
