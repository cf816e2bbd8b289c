# SPDX-License-Identifier: MIT
"""Behind the devices: the compressed pool, and swap tiers behind that.

Theory of operation
    Pages go into the pool. What the pool has no room for makes room first: its coldest pages move on to swap. Where
    there is no pool, or it has no room even so, pages go to swap at once. Where there is no swap, a full pool is the
    end. `put` does all or nothing: a page that found no room is still where it was, and nobody's bytes are lost.

    A page that is fetched from the pool leaves it (memory is what it is short of); its copy in swap stays until the
    page is written to or freed (`drop`), so that a page that was only read costs no second write.

Invariant
    `_places` has exactly the keys whose bytes are kept here, and each is in the store that it says.
"""

import errno
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

from dpud.gpu.blob import Blob, PageCodec, PlainCodec
from dpud.gpu.enums import plain_members
from dpud.gpu.errors import CorruptPage, GpuError

NOWHERE = -1
"""No location in particular."""
POOL_HIGH_PERCENT, POOL_LOW_PERCENT = 95, 90
"""How full a pool with swap behind it is kept in the background; 90 is zswap's accept_threshold_percent."""


class Pool(Protocol):
    """compression.CompressedPool, as far as the data path goes."""

    def put(self, keys: Sequence[int], blobs: Sequence[Blob], /) -> None: ...
    def get(self, key: int, /) -> Blob: ...
    def drop(self, key: int, /) -> None: ...
    def coldest(self, nr_bytes: int, /) -> Sequence[int]: ...
    def raw_room(self, nr_keys: int, /) -> int: ...

    limit_bytes: int
    """0 for none."""

    @property
    def used_bytes(self) -> int: ...
    @property
    def encoded_bytes(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...


class Swap(Protocol):
    """swap.SwapSpace, as far as the data path goes."""

    def write(self, items: Sequence[tuple[int, Blob]], near: int = ..., /) -> None: ...
    def read_many(self, keys: Sequence[int], near: int = ..., /) -> Sequence[Blob | GpuError]: ...
    def drop(self, key: int, /) -> None: ...

    def background(self, budget_bytes: int, /) -> int: ...

    @property
    def nr_free_bytes(self) -> int: ...
    @property
    def saved_bytes(self) -> int: ...


class Mover(Protocol):
    """Who knows whose pages are, and is told before they move from one store to another."""

    def node(self, key: int, /) -> int:
        """The location in whose memory the pool has a page."""
        ...

    def charge(self, sizes: Mapping[int, int], /) -> None:
        """Pages, and what they take in the store, are about to move."""
        ...


class Nobody:
    """A Mover where there are no clients."""

    def node(self, _key: int) -> int:
        return NOWHERE

    def charge(self, _sizes: Mapping[int, int]) -> None:
        """Nobody is told."""


@plain_members
class Place(Enum):
    POOL = "pool"
    SWAP = "swap"


class BackingStore:
    """Where pages are that are not in memory."""

    def __init__(self, codec: PageCodec | None = None, pool: Pool | None = None, swap: Swap | None = None) -> None:
        self.codec = codec or PlainCodec()
        self.pool, self.swap = pool, swap
        self.mover: Mover = Nobody()
        self._places: dict[int, Place] = {}
        self.nr_stored = 0
        self.nr_fetched = 0
        self.nr_demoted = 0

    @property
    def exists(self) -> bool:
        """Whether pages can leave memory at all."""
        return self.pool is not None or self.swap is not None

    @property
    def saved_bytes(self) -> int:
        """Raw bytes of the pages that are here, less what they take."""
        pool = 0 if self.pool is None else self.pool.stored_bytes - self.pool.encoded_bytes
        return pool + (0 if self.swap is None else self.swap.saved_bytes)

    def place(self, key: int) -> Place | None:
        """Which store has a page."""
        return self._places.get(key)

    def put(self, keys: Sequence[int], pages: Sequence[memoryview], client: str = "", near: int = NOWHERE) -> None:
        """Keep the bytes of a client's pages; `near`: the location whose memory has them.

        Raises GpuError(ENOSPC), and has kept none of them.
        """
        if not self.exists:
            raise GpuError(errno.ENOSPC, "there is nothing behind the devices")
        blobs = self.codec.encode(pages, client)
        place = Place.POOL if self._put_into_pool(keys, blobs) else Place.SWAP
        if place is Place.SWAP:
            if self.swap is None:
                raise GpuError(errno.ENOSPC, "the pool is full and there is no swap")
            self.swap.write(list(zip(keys, blobs, strict=True)), near)
        self._places.update(dict.fromkeys(keys, place))
        self.nr_stored += len(keys)

    def fetch(self, keys: Sequence[int], outs: Sequence[memoryview], near: int = NOWHERE) -> list[int]:
        """Bytes of pages -> keys of those that are corrupt; their `outs` mean nothing. They are dropped.

        near    the location to whose memory they go

        Raises GpuError of a tier that does not answer at all.
        """
        bad: list[int] = []
        found: list[tuple[int, Blob, memoryview]] = []
        for key, blob, out in zip(keys, self._read(keys, near), outs, strict=True):
            if isinstance(blob, CorruptPage):
                bad.append(key)
            elif isinstance(blob, GpuError):
                raise blob
            else:
                found.append((key, blob, out))
        bad += self._decode(found)
        for key in bad:
            self.drop(key)
        for key in keys:
            if self._places.get(key) is Place.POOL:
                self.drop(key)
        self.nr_fetched += len(keys)
        return bad

    def peek(self, keys: Sequence[int], outs: Sequence[memoryview], *, patient: bool = False) -> list[int]:
        """The same as `fetch`, but what is here stays.

        patient     raise GpuError of a tier that does not answer at all: its pages are not lost yet. Else they count
                    as corrupt.
        """
        found, bad = [], []
        for key, blob, out in zip(keys, self._read(keys), outs, strict=True):
            if isinstance(blob, GpuError) and patient and not isinstance(blob, CorruptPage):
                raise blob
            if isinstance(blob, GpuError):
                bad.append(key)
            else:
                found.append((key, blob, out))
        return bad + self._decode(found)

    def drop(self, key: int) -> None:
        """Forget a page, if it is here."""
        place = self._places.pop(key, None)
        if place is Place.POOL and self.pool is not None:
            self.pool.drop(key)
        elif place is Place.SWAP and self.swap is not None:
            self.swap.drop(key)

    def demote(self, nr_bytes: int) -> int:
        """Move about that much of the pool's coldest to swap -> how many pages. Raises GpuError(ENOSPC) for none."""
        if self.pool is None or self.swap is None:
            return 0
        by_node: dict[int, list[int]] = {}
        for key in self.pool.coldest(nr_bytes):
            by_node.setdefault(self.mover.node(key), []).append(key)
        before = self.nr_demoted
        for node, keys in by_node.items():
            try:
                self._demote(self.pool, self.swap, keys, node)
            except GpuError:
                if self.nr_demoted == before:
                    raise
                break
        return self.nr_demoted - before

    def _demote(self, pool: Pool, swap: Swap, keys: Sequence[int], node: int) -> None:
        """Pages that a node has. Raises GpuError(ENOSPC), and all are where they were."""
        items = [(key, pool.get(key)) for key in keys]
        self.mover.charge({key: len(blob.data) for key, blob in items})
        swap.write(items, node)
        for key in keys:
            pool.drop(key)
            self._places[key] = Place.SWAP
        self.nr_demoted += len(keys)

    def background(self, budget_bytes: int) -> int:
        """Keep room in the pool, if there is swap behind it, and in fast tiers -> bytes moved, as they lie there."""
        if self.swap is None or budget_bytes <= 0:
            return 0
        moved = self._drain_pool(budget_bytes)
        return moved + self.swap.background(budget_bytes - moved) if moved < budget_bytes else moved

    def _drain_pool(self, budget_bytes: int) -> int:
        if self.pool is None or not self.pool.limit_bytes:
            return 0
        before, limit = self.pool.used_bytes, self.pool.limit_bytes
        if before * 100 <= limit * POOL_HIGH_PERCENT:
            return 0
        self._demote_for(min(budget_bytes, before - limit * POOL_LOW_PERCENT // 100))
        return max(0, before - self.pool.used_bytes)

    def _put_into_pool(self, keys: Sequence[int], blobs: Sequence[Blob]) -> bool:
        if self.pool is None:
            return False
        try:
            self.pool.put(keys, blobs)
            return True
        except GpuError as error:
            if error.errno != errno.ENOSPC:
                raise
        if not self._demote_for(sum(len(blob.data) for blob in blobs)):
            return False
        try:
            self.pool.put(keys, blobs)
        except GpuError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        return True

    def _demote_for(self, nr_bytes: int) -> bool:
        """Try to make room in the pool."""
        try:
            return self.demote(nr_bytes) > 0
        except GpuError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False

    def _read(self, keys: Sequence[int], near: int = NOWHERE) -> list[Blob | GpuError]:
        """Each page, or what is wrong with it."""
        swapped = [key for key in keys if self._places[key] is Place.SWAP]
        answers: dict[int, Blob | GpuError] = {}
        if swapped:
            assert self.swap is not None
            answers.update(zip(swapped, self.swap.read_many(swapped, near), strict=True))
        return [answers[key] if key in answers else self._read_pool(key) for key in keys]

    def _read_pool(self, key: int) -> Blob | GpuError:
        assert self.pool is not None
        try:
            return self.pool.get(key)
        except CorruptPage as error:
            return error

    def _decode(self, found: list[tuple[int, Blob, memoryview]]) -> list[int]:
        """All at once; where that fails, one by one to find those that are wrong."""
        try:
            self.codec.decode([blob for _, blob, _ in found], [out for _, _, out in found])
            return []
        except CorruptPage:
            return [key for key, blob, out in found if not self._is_good(blob, out)]

    def _is_good(self, blob: Blob, out: memoryview) -> bool:
        try:
            self.codec.decode([blob], [out])
        except CorruptPage:
            return False
        return True


class HostPool:
    """A pool in host memory that keeps blobs as they come, oldest first: what there is without compression."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._blobs: dict[int, Blob] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def encoded_bytes(self) -> int:
        return self._used_bytes

    @property
    def stored_bytes(self) -> int:
        return sum(blob.raw_bytes for blob in self._blobs.values())

    def raw_room(self, nr_keys: int) -> int:
        """Bytes of pages that certainly still fit."""
        return max(0, self.limit_bytes - self._used_bytes)

    def put(self, keys: Sequence[int], blobs: Sequence[Blob]) -> None:
        """Raises GpuError(ENOSPC), and has kept nothing."""
        nr_bytes = sum(len(blob.data) for blob in blobs)
        if self._used_bytes + nr_bytes > self.limit_bytes:
            raise GpuError(errno.ENOSPC, f"{nr_bytes} bytes do not fit, {self._used_bytes} of {self.limit_bytes} used")
        self._blobs.update(zip(keys, blobs, strict=True))
        self._used_bytes += nr_bytes

    def get(self, key: int) -> Blob:
        return self._blobs[key]

    def drop(self, key: int) -> None:
        self._used_bytes -= len(self._blobs.pop(key).data)

    def coldest(self, nr_bytes: int) -> list[int]:
        keys, nr = [], 0
        for key, blob in self._blobs.items():
            if nr >= nr_bytes:
                break
            keys.append(key)
            nr += len(blob.data)
        return keys
