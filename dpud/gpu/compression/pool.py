# SPDX-License-Identifier: MIT
"""The compressed pool: encoded pages by key, packed, under a limit that counts everything.

Theory of operation
    A page is an entry of 44 bytes (columns.py), found by its key (index.py), and its encoded bytes in a log (arena.py).
    A same-filled page's word is in the entry. `used_bytes` is all memory that keeping the pages takes: host pages of
    the spans, columns, index, and the dictionaries without which they could not be read. Not counted, as zram does not
    either, is what the coders work with: contexts, and samples for the next dictionary.

    Dead bytes are cleaned when they are more than DEAD_SHARE of the arena, and before anything is refused if they are
    more than WORTH_CLEANING; no more than MAX_CLEANED spans at once, so that nobody waits long for it. Cleaning needs
    room for one span beyond the limit for a moment.

    `recompress` gives the pages that were not used for longest to a stronger codec, each once.

Invariants
    - `get` gives the blob that was put, or a blob of which the checksum will not be right.
    - `used_bytes <= limit_bytes` after each `put`; one that would break this raises ENOSPC and changes nothing.
    - A key has one entry; putting it again replaces it.
"""

import errno
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from dpud.gpu.blob import RAW, SAME_FILLED, Blob
from dpud.gpu.compression.arena import OFFSET_BITS, Arena
from dpud.gpu.compression.columns import ENTRY_BYTES, LIVE, RECOMPRESSED, Column, Columns
from dpud.gpu.compression.dictionary import Dictionaries
from dpud.gpu.compression.index import NONE, Index
from dpud.gpu.compression.system import CompressionSystem, log
from dpud.gpu.errors import CorruptPage, GpuError

DEAD_SHARE = 1 / 8
WORTH_CLEANING = 1 / 64
"""Less than that is not cleaned to make room: a byte won would cost the copying of 64 others."""
DICTIONARY_SHARE = 1 / 64
"""Of the limit, what dictionaries may take at most."""
MARGIN = 1 / 32
"""Of the room that is left, what nobody is told of: for dead bytes between those that live."""
SMALLEST_PAGE_BYTES = 2048
MAX_CLEANED = 64
"""Spans that are cleaned at once: what one `put` may have to wait for is the copying of so many MiB."""
_COLD_BATCH = 4096
"""Pages that are put in order of age, unless more are asked for: sorting all of a large pool takes long."""
_RECOMPRESS_BATCH = 1 << 20
_MIN_GAIN = 32


class CompressedPool:
    """`limit_bytes`: what `used_bytes` may be, 0 for no limit. It may be changed; that alone shrinks nothing."""

    def __init__(self, limit_bytes: int, system: CompressionSystem) -> None:
        self.limit_bytes = limit_bytes
        self.system = system
        self._strong = CompressionSystem(
            quality="best", workers=system.workers, dictionaries=Dictionaries(enabled=False), regret_every=0
        )
        system.dictionaries.limit = self._dictionary_limit
        self._columns = Columns()
        self._index = Index()
        self._arena = Arena()
        self._clock = 0
        self.stored_bytes = 0
        """Raw bytes of the pages that are in the pool."""
        self.max_used_bytes = 0
        self.nr_same = 0
        self.nr_huge = 0
        """Pages that are kept raw."""
        self.nr_huge_ever = 0
        """Like `nr_huge`, but never goes down."""
        self.nr_recompressed = 0
        self.recompressed_bytes = 0
        """Encoded bytes saved by recompressing, ever."""

    def __len__(self) -> int:
        return self._columns.nr_used

    def __contains__(self, key: int) -> bool:
        return self._index.get(key) != NONE

    @property
    def used_bytes(self) -> int:
        dictionaries = self.system.dictionaries.nr_bytes
        return self._arena.nr_bytes + self._columns.nr_bytes + self._index.nr_bytes + dictionaries

    def _dictionary_limit(self) -> int:
        return int(DICTIONARY_SHARE * self.limit_bytes) if self.limit_bytes else 1 << 62

    def raw_room(self, nr_keys: int) -> int:
        """Bytes of pages that certainly still fit, however small and incompressible they are.

        nr_keys     keys that there may be, in runs: all of them may be here, or few of each of the index's chunks
        """
        dead = max(0, self._arena.dead_bytes - int(WORTH_CLEANING * self.limit_bytes))
        free = self.limit_bytes - self.used_bytes + dead + self._arena.unused_bytes
        free -= max(0, self._dictionary_limit() - self.system.dictionaries.nr_bytes)
        free -= self._arena.bound(free) - free + self._index.growth(nr_keys) + self._columns.most(nr_keys)
        return max(0, int(free * (1 - MARGIN)) // SMALLEST_PAGE_BYTES * SMALLEST_PAGE_BYTES)

    @property
    def encoded_bytes(self) -> int:
        """Bytes of the encoded pages alone."""
        return self._arena.live_bytes

    @property
    def dead_bytes(self) -> int:
        """Bytes of pages that are gone, to be had by `compact`."""
        return self._arena.dead_bytes

    @property
    def metadata_bytes(self) -> int:
        """Columns, index and dictionaries."""
        return self.used_bytes - self._arena.nr_bytes

    def flip_bit(self, key: int, bit: int) -> None:
        """Change one bit of a page's encoded bytes, as a memory error would. Raises GpuError(ENOENT)."""
        slot = self._slot(key)
        cell = self._columns.cell
        if length := cell.length[slot]:
            self._arena.flip(cell.where[slot], bit % (8 * length))
        else:
            cell.where[slot] ^= 1 << bit % 63

    @property
    def nr_compacted(self) -> int:
        """Host pages freed by compacting, ever."""
        return self._arena.nr_returned

    # Pages.

    def put(self, keys: Sequence[int], blobs: Sequence[Blob]) -> None:
        """Keep blobs. Raises GpuError(ENOSPC), and keeps none, if they do not all fit. Keys are different ones."""
        self._index.reserve(keys)
        nr_bytes = sum(_stored_length(blob) for blob in blobs)
        if not self._has_room(nr_bytes, len(keys)):
            self._index.prune(keys)
            raise GpuError(errno.ENOSPC, f"the compressed pool is full: {nr_bytes} bytes do not fit")
        self._columns.reserve(len(keys))
        for key, blob in zip(keys, blobs, strict=True):
            slot = self._index.get(key)
            if slot == NONE:
                slot = self._columns.take()
                self._columns.cell.key[slot] = key
                self._index.set(key, slot)
            else:
                self._forget(slot)
            self._fill(slot, blob)
        self.max_used_bytes = max(self.max_used_bytes, self.used_bytes)

    def _has_room(self, nr_bytes: int, nr_entries: int) -> bool:
        """Whether that much fits, after cleaning if need be."""
        if self._arena.dead_bytes > DEAD_SHARE * (self._arena.live_bytes + nr_bytes):
            self._clean(DEAD_SHARE)
        wanted = self._arena.bound(nr_bytes) + self._columns.growth(nr_entries)
        if not self.limit_bytes or self.used_bytes + wanted <= self.limit_bytes:
            return True
        self._arena.give_back_spare()
        missing = self.used_bytes + wanted - self.limit_bytes
        if missing <= 0:
            return True
        if self._arena.dead_bytes < max(missing, WORTH_CLEANING * self._arena.live_bytes):
            return False
        self._clean(0, missing)
        self._arena.give_back_spare()
        return self.used_bytes + wanted <= self.limit_bytes

    def _fill(self, slot: int, blob: Blob) -> None:
        cell, codec = self._columns.cell, blob.codec
        length = cell.length[slot] = 0 if codec == SAME_FILLED else len(blob.data)
        cell.where[slot] = self._arena.put(blob.data) if length else _word(blob)
        cell.raw_bytes[slot] = blob.raw_bytes
        cell.checksum[slot] = blob.checksum
        cell.dictionary[slot] = blob.dictionary
        cell.codec[slot] = codec
        cell.flags[slot] = LIVE
        self._clock += 1
        cell.stamp[slot] = self._clock
        self.stored_bytes += blob.raw_bytes
        if codec == SAME_FILLED:
            self.nr_same += 1
        elif codec == RAW:
            self.nr_huge += 1
            self.nr_huge_ever += 1

    def _forget(self, slot: int) -> None:
        """What `_fill` counted."""
        cell = self._columns.cell
        codec, length = cell.codec[slot], cell.length[slot]
        if length:
            self._arena.free(cell.where[slot], length)
        self.stored_bytes -= cell.raw_bytes[slot]
        if codec == SAME_FILLED:
            self.nr_same -= 1
        elif codec == RAW:
            self.nr_huge -= 1

    def store(self, keys: Sequence[int], pages: Sequence[memoryview], client: str = "") -> None:
        """`encode` and `put`. Incompressible pages are copied once, into the pool, instead of twice."""
        self.put(keys, self.system.encode(pages, client, copy=False))

    def get(self, key: int) -> Blob:
        """The blob of a page that is there. Raises GpuError(ENOENT)."""
        slot = self._slot(key)
        self._touch(slot)
        return self._blob(slot)

    def take(self, key: int) -> Blob:
        """`get`, and `drop`. Raises GpuError(ENOENT)."""
        blob = self._blob(self._slot(key))
        self._release(key)
        return blob

    def drop(self, key: int) -> None:
        """Forget a page. Raises GpuError(ENOENT)."""
        self._slot(key)
        self._release(key)

    def coldest(self, nr_bytes: int) -> list[int]:
        """Keys of the pages not used for longest, as many as hold `nr_bytes` of pool memory, the coldest first."""
        slots = self._by_age(_COLD_BATCH)
        sums = np.cumsum(self._columns.length[slots].astype(np.int64) + ENTRY_BYTES)
        if len(slots) < len(self) and (not len(sums) or sums[-1] < nr_bytes):
            slots = self._by_age()
            sums = np.cumsum(self._columns.length[slots].astype(np.int64) + ENTRY_BYTES)
        nr = int(np.searchsorted(sums, nr_bytes)) + 1
        return [int(key) for key in self._columns.key[slots[:nr]]]

    def _by_age(self, nr: int | None = None) -> Column:
        """Slots, the coldest first: `nr` of them, or all."""
        slots = self._columns.live()
        if nr is not None and nr < len(slots):
            slots = slots[np.argpartition(self._columns.stamp[slots], nr - 1)[:nr]]
        ordered: Column = slots[np.argsort(self._columns.stamp[slots], kind="stable")]
        return ordered

    def _slot(self, key: int) -> int:
        slot = self._index.get(key)
        if slot == NONE:
            raise GpuError(errno.ENOENT, f"page {key:#x} is not in the compressed pool")
        return slot

    def _blob(self, slot: int) -> Blob:
        cell = self._columns.cell
        where, codec = cell.where[slot], cell.codec[slot]
        if codec == SAME_FILLED:
            data = where.to_bytes(8, "little", signed=True)
        else:
            data = self._arena.get(where, cell.length[slot])
        return Blob(data, codec, cell.raw_bytes[slot], cell.checksum[slot], cell.dictionary[slot])

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._columns.cell.stamp[slot] = self._clock

    def _release(self, key: int) -> None:
        slot = self._index.get(key)
        self._index.remove(key)
        self._forget(slot)
        self._columns.give_back(slot)

    # Cleaning.

    def compact(self) -> int:
        """Move pages together until no span has dead bytes -> bytes given back."""
        before = self.used_bytes
        for _ in self.compacting():
            pass
        return before - self.used_bytes

    def compacting(self) -> Iterator[None]:
        """`compact`, span by span: whoever drives it may do other things in between."""
        before = self._arena.nr_bytes
        for number in list(self._arena.sparse(0)):
            self._empty(number)
            yield None
        self._arena.give_back_spare()
        self._arena.count_returned(before)

    def _clean(self, min_dead: float, wanted_bytes: int = 1 << 62) -> None:
        """Empty the spans of which more than that share is dead, until that much was won, or MAX_CLEANED are empty."""
        before = self._arena.nr_bytes
        for number in list(islice(self._arena.sparse(min_dead), MAX_CLEANED)):
            if self._arena.nr_bytes <= before - wanted_bytes:
                break
            self._empty(number)
        self._arena.count_returned(before)

    def _empty(self, number: int) -> None:
        """Append what lives in a span to the log again."""
        columns, arena = self._columns, self._arena
        if not arena.close_open(number):
            return
        slots = columns.live()
        slots = slots[(columns.length[slots] > 0) & (columns.where[slots] >> OFFSET_BITS == number)]
        cell = columns.cell
        for slot in slots:
            place, length = cell.where[slot], cell.length[slot]
            cell.where[slot] = arena.put(arena.get(place, length))
            arena.free(place, length)

    # Recompressing.

    def recompress(self, budget_bytes: int) -> int:
        """Give cold pages to a stronger codec until `budget_bytes` raw ones were tried -> bytes saved."""
        before = self.recompressed_bytes
        for _ in self.recompressing(budget_bytes):
            pass
        return self.recompressed_bytes - before

    def recompressing(self, budget_bytes: int) -> Iterator[None]:
        """`recompress`, batch by batch: whoever drives it may do other things in between."""
        columns = self._columns
        slots = self._by_age()
        slots = slots[(columns.flags[slots] & RECOMPRESSED == 0) & (columns.length[slots] > 0)]
        sums = np.cumsum(columns.raw_bytes[slots].astype(np.int64))
        nr = int(np.searchsorted(sums, budget_bytes, "right"))
        numbers = sums[:nr] // _RECOMPRESS_BATCH
        for number in np.unique(numbers):
            self._recompress([int(key) for key in columns.key[slots[:nr][numbers == number]]])
            yield None

    def _recompress(self, keys: Sequence[int]) -> None:
        """One batch, of pages that are still there. One that is corrupt stays: whoever wants it will be told."""
        slots = [slot for slot in map(self._index.get, keys) if slot != NONE]
        pages = [(slot, blob, page) for slot in slots for blob in [self._blob(slot)] if (page := self._decoded(blob))]
        self._columns.flags[slots] |= RECOMPRESSED
        blobs = self._strong.encode([memoryview(page) for _, _, page in pages])
        for (slot, old, _), new in zip(pages, blobs, strict=True):
            if len(new.data) <= len(old.data) - len(old.data) // _MIN_GAIN and self._has_room(len(new.data), 0):
                self._replace(slot, old, new)

    def _decoded(self, blob: Blob) -> bytearray | None:
        page = bytearray(blob.raw_bytes)
        try:
            self.system.decode([blob], [memoryview(page)])
        except CorruptPage as error:
            log.error("recompress: %s", error.strerror)
            return None
        return page

    def _replace(self, slot: int, old: Blob, new: Blob) -> None:
        cell = self._columns.cell
        self._arena.free(cell.where[slot], len(old.data))
        cell.where[slot] = self._arena.put(new.data)
        cell.length[slot] = len(new.data)
        cell.codec[slot] = new.codec
        cell.dictionary[slot] = new.dictionary
        self.nr_huge -= old.codec == RAW
        self.nr_recompressed += 1
        self.recompressed_bytes += len(old.data) - len(new.data)


def _stored_length(blob: Blob) -> int:
    """Bytes in the arena."""
    return 0 if blob.codec == SAME_FILLED else len(blob.data)


def _word(blob: Blob) -> int:
    return int.from_bytes(blob.data, "little", signed=True)
