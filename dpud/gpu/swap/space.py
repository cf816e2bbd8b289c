# SPDX-License-Identifier: MIT
"""SwapSpace: pages on tiers, by key.

Theory of operation
    Pages that are written together go together, in slots of up to BATCH_BYTES, to the fastest tier that has room. Where
    the fastest has none, its coldest pages move down first, to the next, which may have to do the same. So new pages
    are on fast tiers and old ones sink. `background` does that ahead of time: a tier with less than `low` percent free
    moves pages down until it has `high`.

    Cold is what was written or read longest ago, but a page that was read since it was last looked at gets another
    round, and its heat is halved (the CLOCK of many caches, with counts). A page that is read often from a slow tier
    moves up in the background, where there is more than enough room.

    `write` does all or nothing: slots first, then the index. What a tier refuses (full, broken, budget used up) goes to
    the next; only if all refuse is it ENOSPC, and the caller keeps its pages: that is the back-pressure.

    A page whose record is found damaged is `lost`: it stays known, so that every read of it is an error until it is
    dropped or written anew; it is never read as something else.

    Where tiers hang at different nodes, `crossing` says which is best for a page of some location's memory, and how
    long the way takes besides (numa/tiers.py); without, the fastest is.

Invariants
    - A key is in exactly one of: one tier's order, and then in `_slots` with that tier; `_lost`; neither.
    - A block's count in its tier's map is the number of slots that have a byte in it. No two slots overlap.
"""

import errno
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from dpud.gpu.blob import Blob
from dpud.gpu.clock import Clock
from dpud.gpu.errors import CorruptPage, GpuError
from dpud.gpu.performance import performance
from dpud.gpu.store import NOWHERE, Mover, Nobody
from dpud.gpu.swap.slots import record_bytes
from dpud.gpu.swap.tier import Slot, Tier

BATCH_BYTES = 1 << 20
HOT = 2
"""Reads from a slow tier that make a page move up."""
_MAX_HEAT = 7
MAX_LOOKS = 4096
"""Warm pages that are passed over before the next one goes whatever its heat: who waits for room waits for this."""
_COUNTERS = ("written", "read", "dropped", "demoted", "promoted", "corrupt", "read_errors", "refused")

Item = tuple[int, Blob]
log = logging.getLogger("dpud.gpu.swap")


class Crossing(Protocol):
    """numa.TierPaths, as far as swap goes."""

    def order(self, tiers: Sequence[Tier], location: int, nr_bytes: int, /) -> Sequence[int]:
        """Numbers of tiers, best first, for pages of a location."""
        ...

    def crossed(self, tier: Tier, location: int, nr_pages: int, nr_bytes: int, /, *, out: bool) -> int:
        """Pages go there, or come from there -> ns that the way takes."""
        ...

    def preferred(self, nr_pages: int, /) -> None:
        """Pages went to a tier that is not the fastest, because of the way."""
        ...


@dataclass
class TierMarks:
    """Free space, in percent, below which a tier moves pages down, and at which it stops."""

    low: int = 10
    high: int = 20


class SwapSpace:
    """Tiers, fastest first."""

    def __init__(self, tiers: Sequence[Tier], clock: Clock, generation: int = 0) -> None:
        """`generation`: the highest that is in the files, where they were kept from an earlier run."""
        self.tiers = list(tiers)
        self.clock = clock
        self.marks = TierMarks()
        self.events: Counter[str] = Counter(dict.fromkeys(_COUNTERS, 0))
        self._slots: dict[int, Slot] = {}
        self._lost: dict[int, str] = {}
        self._orders: dict[Tier, OrderedDict[int, None]] = {tier: OrderedDict() for tier in self.tiers}
        self._hot: deque[int] = deque(maxlen=1024)
        self._sinking: set[Tier] = set()
        self._generation = generation
        self.crossing: Crossing | None = None
        self.mover: Mover = Nobody()
        """Who is told whose pages move from tier to tier."""

    def __len__(self) -> int:
        return len(self._slots) + len(self._lost)

    def __contains__(self, key: int) -> bool:
        return key in self._slots or key in self._lost

    @property
    def nr_free_bytes(self) -> int:
        """Of all tiers that take pages; headers and padding come off that."""
        return sum(tier.free_bytes for tier in self.tiers if tier.trouble is None)

    @property
    def saved_bytes(self) -> int:
        """Raw bytes of the pages that are here, less the blocks that they take; 0 where that is more."""
        return max(0, sum(tier.nr_stored_bytes - tier.used_bytes for tier in self.tiers))

    @property
    def used_bytes(self) -> int:
        return sum(tier.used_bytes for tier in self.tiers)

    def close(self) -> None:
        """Temporary files go."""
        for tier in self.tiers:
            tier.close()

    def tier_of(self, key: int) -> Tier | None:
        """Where a page is."""
        slot = self._slots.get(key)
        return slot.tier if slot is not None else None

    def slots(self) -> Iterator[tuple[int, Slot]]:
        """Of all pages that are whole, as far as is known."""
        return iter(self._slots.items())

    # Writing.

    def write(self, items: Sequence[Item], near: int = NOWHERE) -> None:
        """Keep pages, instead of what is kept under their keys; `near`: the location whose memory they leave.

        Raises GpuError(ENOSPC), and has kept none of them.
        """
        began_ns, placed = self.clock.now_ns(), list[tuple[int, Slot]]()
        try:
            self._check_room(items)
            for batch in _batches(items):
                placed += self._place(batch, 0, near)
        except GpuError:
            for _, slot in placed:
                slot.tier.release(slot)
            self.events["refused"] += len(items)
            raise
        for key, slot in placed:
            slot.near = near
            self._forget(key)
            self._enter(key, slot)
        self.events["written"] += len(items)
        self._log_speed("out", items, began_ns)

    def _check_room(self, items: Sequence[Item]) -> None:
        """Say no before anything is moved."""
        nr_bytes = sum(record_bytes(len(blob.data)) for _, blob in items)
        if nr_bytes > (nr_free := self.nr_free_bytes):
            raise GpuError(errno.ENOSPC, f"{nr_bytes} bytes, and {nr_free} are free")

    def _place(self, items: Sequence[Item], level: int, near: int = NOWHERE) -> list[tuple[int, Slot]]:
        """Slots for pages at this level or below it; in halves where there is no room in one piece."""
        slots = self._try_place(items, level, near)
        if slots is not None:
            return [(key, slot) for (key, _), slot in zip(items, slots, strict=True)]
        if len(items) == 1:
            raise GpuError(errno.ENOSPC, f"no tier has room for a page of {len(items[0][1].data)} bytes")
        half = len(items) // 2
        first = self._place(items[:half], level, near)
        try:
            return first + self._place(items[half:], level, near)
        except GpuError:
            for _, slot in first:
                slot.tier.release(slot)
            raise

    def _try_place(self, items: Sequence[Item], level: int, near: int) -> list[Slot] | None:
        nr_bytes = sum(record_bytes(len(blob.data)) for _, blob in items)
        for number in self._order(level, near, nr_bytes):
            tier = self.tiers[number]
            if tier.free_bytes < nr_bytes and tier.trouble is None and tier.size_bytes >= nr_bytes:
                self._sink(number, nr_bytes)
            if (slots := self._write_to(tier, items)) is not None:
                self._cross(number, near, len(items), nr_bytes)
                return slots
        return None

    def _order(self, level: int, near: int, nr_bytes: int) -> Sequence[int]:
        """Tiers in the order in which pages try them."""
        if near == NOWHERE or self.crossing is None:
            return range(level, len(self.tiers))
        return self.crossing.order(self.tiers, near, nr_bytes)

    def _cross(self, number: int, near: int, nr_pages: int, nr_bytes: int) -> None:
        """Pages have gone from a location to a tier."""
        if near == NOWHERE or self.crossing is None:
            return
        ns = self.crossing.crossed(self.tiers[number], near, nr_pages, nr_bytes, out=True)
        if any(tier.room_bytes >= nr_bytes for tier in self.tiers[:number]):
            self.crossing.preferred(nr_pages)
        self.clock.sleep_until(self.clock.now_ns() + ns)

    def _write_to(self, tier: Tier, items: Sequence[Item]) -> list[Slot] | None:
        self._generation += 1
        try:
            return tier.write(items, self._generation)
        except GpuError:
            return None  # the tier has logged and counted it; the next one may take them

    def _enter(self, key: int, slot: Slot) -> None:
        self._slots[key] = slot
        self._orders[slot.tier][key] = None

    def _forget(self, key: int) -> None:
        self._lost.pop(key, None)
        if (slot := self._slots.pop(key, None)) is not None:
            del self._orders[slot.tier][key]
            slot.tier.release(slot)

    # Reading.

    def read(self, key: int) -> Blob:
        """Raises CorruptPage for a slot that is torn, damaged or cut off, GpuError(EIO) where nothing can be read."""
        (found,) = self.read_many([key])
        if isinstance(found, GpuError):
            raise found
        return found

    def read_many(self, keys: Sequence[int], near: int = NOWHERE) -> list[Blob | GpuError]:
        """Each page, or the error that `read` would raise; `near`: the location whose memory they come to.

        What lies together is read together.
        """
        began_ns, found = self.clock.now_ns(), self._fetch(keys, near)
        for key, blob in found.items():
            if isinstance(blob, Blob):
                self._warm(key)
        self._log_speed("in", [(key, blob) for key, blob in found.items() if isinstance(blob, Blob)], began_ns)
        return [found[key] for key in keys]

    def _warm(self, key: int) -> None:
        slot = self._slots[key]
        self.events["read"] += 1
        slot.heat = min(slot.heat + 1, _MAX_HEAT)
        self._orders[slot.tier].move_to_end(key)
        if slot.heat >= HOT and slot.tier is not self.tiers[0]:
            self._hot.append(key)

    def _fetch(self, keys: Sequence[int], near: int = NOWHERE) -> dict[int, Blob | GpuError]:
        """All tiers at the same time; returns when the last page is there."""
        found = {key: CorruptPage(key, self._lost[key]) for key in keys if key in self._lost}
        began_ns = end_ns = self.clock.now_ns()
        answers: dict[int, Blob | GpuError] = {**found}
        for run in self._runs([key for key in keys if key not in found]):
            blobs, done_ns = run[0][1].tier.read(run, began_ns)
            if near != NOWHERE and self.crossing is not None:
                nr_bytes = sum(slot.nr_bytes for _, slot in run)
                done_ns += self.crossing.crossed(run[0][1].tier, near, len(run), nr_bytes, out=False)
            end_ns = max(end_ns, done_ns)
            for (key, slot), blob in zip(run, blobs, strict=True):
                answers[key] = blob
                if isinstance(blob, GpuError):
                    self._note(key, slot.tier, blob)
        self.clock.sleep_until(end_ns)
        return answers

    def _runs(self, keys: Sequence[int]) -> Iterator[list[tuple[int, Slot]]]:
        """Slots in the order of their tiers and places, cut where they do not follow one another."""
        levels = {tier: level for level, tier in enumerate(self.tiers)}
        items = sorted(((key, self._slots[key]) for key in keys), key=lambda each: (levels[each[1].tier], each[1].at))
        run: list[tuple[int, Slot]] = []
        for key, slot in items:
            if run and not _follows(run, slot):
                yield run
                run = []
            run.append((key, slot))
        if run:
            yield run

    def _note(self, key: int, tier: Tier, error: GpuError) -> None:
        """Say it, count it; a page that is damaged is lost."""
        log.error("%s: %s", tier.name, error.strerror)
        if isinstance(error, CorruptPage):
            self.events["corrupt"] += 1
            self._forget(key)
            self._lost[key] = f"{tier.name}: lost before"
        else:
            self.events["read_errors"] += 1

    def drop(self, key: int) -> None:
        """Forget a page. Raises KeyError if it is not here."""
        if key not in self:
            raise KeyError(key)
        self._forget(key)
        self.events["dropped"] += 1

    # Moving.

    def background(self, budget_bytes: int) -> int:
        """Bring tiers that are short of space up to their high mark, and hot pages up -> bytes moved."""
        moved = 0
        for number, tier in enumerate(self.tiers[:-1]):
            if tier.free_bytes * 100 < tier.size_bytes * self.marks.low:
                self._sinking.add(tier)
            lacking = tier.size_bytes * self.marks.high // 100 - tier.free_bytes
            if tier not in self._sinking or lacking <= 0:
                self._sinking.discard(tier)
                continue
            nr = self._sink(number, min(lacking, budget_bytes - moved))
            if not nr and moved < budget_bytes:
                self._sinking.discard(tier)  # nothing more can go
            moved += nr
        return moved + self._raise_hot(budget_bytes - moved)

    def demote(self, name: str, nr_bytes: int) -> int:
        """Move about that much of the coldest of a tier down -> bytes. Raises GpuError(EINVAL) for no such tier."""
        names = [tier.name for tier in self.tiers]
        if name not in names:
            raise GpuError(errno.EINVAL, f"no tier {name}")
        return self._sink(names.index(name), nr_bytes)

    def _sink(self, number: int, nr_bytes: int) -> int:
        """Move the coldest of a tier to the next ones -> bytes that went, 0 where there is no room below."""
        tier, moved = self.tiers[number], 0
        while moved < nr_bytes and number + 1 < len(self.tiers):
            wanted = min(nr_bytes - moved, BATCH_BYTES)
            if sum(below.room_bytes for below in self.tiers[number + 1 :]) < wanted:
                break
            keys = self._coldest(tier, wanted)
            nr = self._move(keys, number + 1)
            if not nr:
                self._put_back(tier, keys)
                break
            moved += nr
        return moved

    def _put_back(self, tier: Tier, keys: Sequence[int]) -> None:
        """They could not go, and are still the coldest."""
        order = self._orders[tier]
        for key in reversed(keys):
            if key in order:
                order.move_to_end(key, last=False)

    def _coldest(self, tier: Tier, nr_bytes: int) -> list[int]:
        """Keys, coldest first; warm ones get another round, but no more than MAX_LOOKS of them at once."""
        order, keys, nr = self._orders[tier], list[int](), 0
        nr_spared, most = 0, min(len(order), MAX_LOOKS)
        while nr < nr_bytes and order:
            key = next(iter(order))
            order.move_to_end(key)
            slot = self._slots[key]
            if slot.heat and nr_spared < most:
                nr_spared += 1
                slot.heat >>= 1
            elif key not in keys[:1]:
                keys.append(key)
                nr += slot.nr_bytes
            else:
                break
        return keys

    def _move(self, keys: Sequence[int], level: int) -> int:
        """Move pages to a level or below -> bytes of records that went. What is found damaged is lost, and goes too."""
        sizes = {key: self._slots[key].nr_bytes for key in keys}
        found = self._fetch(keys)
        items = [(key, blob) for key, blob in found.items() if isinstance(blob, Blob)]
        lost = sum(sizes[key] for key, blob in found.items() if isinstance(blob, CorruptPage))
        if not items:
            return lost
        self.mover.charge({key: sizes[key] for key, _ in items})
        try:
            placed = self._place(items, level)
        except GpuError:
            return lost
        nr = sum(self._slots[key].nr_bytes for key, _ in placed)
        for key, slot in placed:
            slot.heat, slot.near = self._slots[key].heat, self._slots[key].near
            self._forget(key)
            self._enter(key, slot)
        self.events["demoted"] += len(placed)
        return lost + nr

    def _raise_hot(self, budget_bytes: int) -> int:
        moved = 0
        while self._hot and moved < budget_bytes:
            key = self._hot.popleft()
            slot = self._slots.get(key)
            if slot is not None and slot.heat >= HOT:
                moved += self._raise(key, slot)
        return moved

    def _raise(self, key: int, slot: Slot) -> int:
        """Move a page up, if a better tier for it has room to spare -> its bytes."""
        order = list(self._order(0, slot.near, slot.nr_bytes))
        for number in order[: order.index(self.tiers.index(slot.tier))]:
            tier = self.tiers[number]
            if tier.trouble is not None or tier.free_bytes * 100 < tier.size_bytes * self.marks.high:
                continue
            blob = self._fetch([key])[key]
            if isinstance(blob, GpuError):
                return 0
            self.mover.charge({key: slot.nr_bytes})
            if (found := self._write_to(tier, [(key, blob)])) is not None:
                found[0].near = slot.near
                self._forget(key)
                self._enter(key, found[0])
                self.events["promoted"] += 1
                return slot.nr_bytes
        return 0

    def _log_speed(self, what: str, items: Sequence[Item], began_ns: int) -> None:
        if log.isEnabledFor(logging.INFO):
            nr_bytes = sum(blob.raw_bytes for _, blob in items)
            performance(log, f"swap {what}", nr_bytes, began_ns, self.clock.now_ns())

    # Checking.

    def violations(self) -> list[str]:
        """What is wrong with the index; empty if nothing."""
        found = []
        for tier in self.tiers:
            keys = {key for key, slot in self._slots.items() if slot.tier is tier}
            if keys != set(self._orders[tier]):
                found.append(f"{tier.name}: {len(keys)} slots, {len(self._orders[tier])} in order")
            found += _map_violations(tier, [self._slots[key] for key in keys])
        found += [f"page {key:#x} is both lost and not" for key in self._lost.keys() & self._slots.keys()]
        return found


def _follows(run: Sequence[tuple[int, Slot]], slot: Slot) -> bool:
    """Whether a slot begins where a run ends, and the run is not too long yet."""
    first, last = run[0][1], run[-1][1]
    return slot.tier is last.tier and slot.at == last.at + last.nr_bytes and slot.at - first.at < BATCH_BYTES


def _map_violations(tier: Tier, slots: Sequence[Slot]) -> Iterator[str]:
    users = np.zeros(tier.file.nr_blocks, dtype=np.int64)
    for slot in slots:
        users[slot.blocks.start : slot.blocks.stop] += 1
    said = tier.map.users()
    for block in (np.flatnonzero(users[1:] != said[1:]) + 1).tolist():
        yield f"{tier.name}: block {block} has {users[block]} users, its map says {said[block]}"
    free = int(np.count_nonzero(users[1:] == 0))
    if free != tier.map.nr_free:
        yield f"{tier.name}: {free} blocks are free, {tier.map.nr_free} are counted"
    ends = sorted((slot.at, slot.at + slot.nr_bytes) for slot in slots)
    for (_, end), (start, _) in pairwise(ends):
        if start < end:
            yield f"{tier.name}: two slots own byte {start}"
    if sum(slot.raw_bytes for slot in slots) != tier.nr_stored_bytes or len(slots) != tier.nr_pages:
        yield f"{tier.name}: pages or their bytes are miscounted"


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Pages in pieces of about BATCH_BYTES."""
    start = nr = 0
    for index, (_, blob) in enumerate(items):
        nr += record_bytes(len(blob.data))
        if nr >= BATCH_BYTES:
            yield items[start : index + 1]
            start, nr = index + 1, 0
    if start < len(items):
        yield items[start:]
