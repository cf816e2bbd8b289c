# SPDX-License-Identifier: MIT
"""What is known of each page in the compressed pool, as columns: 44 bytes a page.

Slots that are free are chained through `where`, so the list of them costs nothing. Single cells are read and written
through `cell`, memoryviews of the same arrays: numpy takes three times as long for a scalar.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Column: TypeAlias = NDArray[Any]

_DTYPES = {
    "key": np.int64,
    "where": np.int64,
    "length": np.uint32,
    "raw_bytes": np.uint32,
    "checksum": np.uint64,
    "stamp": np.uint64,
    "dictionary": np.uint16,
    "codec": np.uint8,
    "flags": np.uint8,
}
ENTRY_BYTES = sum(np.dtype(dtype).itemsize for dtype in _DTYPES.values())

LIVE, RECOMPRESSED = 1, 2
_MIN_GROWTH = 64
_END = -1


class Cells:
    """The same columns, cell by cell: Python ints in and out."""

    __slots__ = tuple(_DTYPES)

    key: memoryview
    where: memoryview
    length: memoryview
    raw_bytes: memoryview
    checksum: memoryview
    stamp: memoryview
    dictionary: memoryview
    codec: memoryview
    flags: memoryview

    def __init__(self, columns: "Columns") -> None:
        for name in _DTYPES:
            setattr(self, name, memoryview(getattr(columns, name)))


class Columns:
    """Arrays of one length, and the slots of them that are free."""

    key: Column
    where: Column
    """Place in the arena; the word itself for a same-filled page."""
    length: Column
    """Encoded bytes in the arena."""
    raw_bytes: Column
    checksum: Column
    stamp: Column
    """When it was last put or read; counts operations."""
    dictionary: Column
    codec: Column
    flags: Column

    def __init__(self) -> None:
        for name, dtype in _DTYPES.items():
            setattr(self, name, np.zeros(0, dtype))
        self.cell = Cells(self)
        self._free = _END
        self.nr_used = 0

    @property
    def nr_bytes(self) -> int:
        return len(self.key) * ENTRY_BYTES

    def growth(self, nr: int) -> int:
        """Bytes that `nr` more slots take beyond what is held."""
        return self._missing(nr) * ENTRY_BYTES

    def most(self, nr: int) -> int:
        """Bytes that `nr` slots in all take beyond what is held, at most, if they come one by one."""
        return max(0, (nr + max(_MIN_GROWTH, nr // 8)) * ENTRY_BYTES - self.nr_bytes)

    def _missing(self, nr: int) -> int:
        """Slots to add; an eighth at least, so that growing costs little on the whole."""
        missing = self.nr_used + nr - len(self.key)
        return max(missing, _MIN_GROWTH, len(self.key) // 8) if missing > 0 else 0

    def reserve(self, nr: int) -> None:
        """Make room for `nr` more."""
        old, more = len(self.key), self._missing(nr)
        if not more:
            return
        for name, dtype in _DTYPES.items():
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more, dtype)]))
        self.where[old:] = range(old + 1, old + more + 1)
        self.where[-1] = self._free
        self._free = old
        self.cell = Cells(self)

    def take(self) -> int:
        """A free slot. Precondition: reserved."""
        slot = self._free
        self._free = self.cell.where[slot]
        self.nr_used += 1
        return slot

    def give_back(self, slot: int) -> None:
        self.cell.flags[slot] = 0
        self.cell.where[slot] = self._free
        self._free = slot
        self.nr_used -= 1

    def live(self) -> Column:
        """Slots in use."""
        return np.flatnonzero(self.flags & LIVE)
