# SPDX-License-Identifier: MIT
"""Where a page's entry is: key -> slot, as the kernel's XArray maps an index (include/linux/xarray.h).

Page indices come in runs, so they are kept in chunks of 64 neighbours: 4 bytes a key where all of a run are there,
against some 100 of a dict of ints. Only one level has chunks of its own; the one above is a dict.
"""

import sys
from array import array
from collections.abc import Iterable

CHUNK_SHIFT = 6
_CHUNK = 1 << CHUNK_SHIFT
_MASK = _CHUNK - 1
NONE = -1
_EMPTY = array("i", [NONE]) * _CHUNK
_DICT_ENTRY_BYTES = 64
"""Of a dict of CPython 3.11, just after it grew: 60 were measured."""
_CHUNK_BYTES = sys.getsizeof(_EMPTY[:]) + sys.getsizeof(1 << 40)  # and the number of the chunk, in the dict


class Index:
    """Slots by key. Keys are non-negative."""

    def __init__(self) -> None:
        self._chunks: dict[int, array[int]] = {}
        self._nr: dict[int, int] = {}

    def get(self, key: int) -> int:
        """The slot, or NONE."""
        chunk = self._chunks.get(key >> CHUNK_SHIFT)
        return NONE if chunk is None else chunk[key & _MASK]

    def reserve(self, keys: Iterable[int]) -> None:
        """Make `set` of these keys cost nothing more."""
        for number in {key >> CHUNK_SHIFT for key in keys}:
            if number not in self._chunks:
                self._chunks[number] = _EMPTY[:]
                self._nr[number] = 0

    def prune(self, keys: Iterable[int]) -> None:
        """Take `reserve` back, as far as nothing was set."""
        empty = {number for key in keys if not self._nr.get(number := key >> CHUNK_SHIFT, 1)}
        for number in empty:
            del self._chunks[number], self._nr[number]
        if empty:
            self._chunks, self._nr = dict(self._chunks), dict(self._nr)  # a dict does not shrink by itself

    def set(self, key: int, slot: int) -> None:
        """Precondition: its chunk was reserved."""
        number = key >> CHUNK_SHIFT
        chunk = self._chunks[number]
        self._nr[number] += chunk[key & _MASK] == NONE
        chunk[key & _MASK] = slot

    def remove(self, key: int) -> None:
        """Precondition: it is there."""
        number = key >> CHUNK_SHIFT
        self._chunks[number][key & _MASK] = NONE
        self._nr[number] -= 1
        if not self._nr[number]:
            del self._chunks[number], self._nr[number]

    def growth(self, nr_keys: int) -> int:
        """Bytes beyond what is held that as many keys, in runs, may take, if few of each chunk are here."""
        nr_chunks = nr_keys // _CHUNK + _CHUNK
        return max(0, nr_chunks * (_CHUNK_BYTES + 2 * _DICT_ENTRY_BYTES) - self.nr_bytes)

    @property
    def nr_bytes(self) -> int:
        """Memory held, as the interpreter counts it."""
        return len(self._chunks) * _CHUNK_BYTES + sys.getsizeof(self._chunks) + sys.getsizeof(self._nr)
