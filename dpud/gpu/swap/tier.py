# SPDX-License-Identifier: MIT
"""Tiers: what pages are swapped to, fastest first.

A tier is a file of fixed size, a map of its free blocks, a profile that says how fast it is, and a write budget. A new
kind is one class:

    @register("optane")
    class Optane(Tier):
        profile = TierProfile("p5800x-400gb", 7_200_000_000, 4_800_000_000, 10_000, 10_000)

A tier fails as a whole when its file has gone or was cut (`trouble`): nothing more is placed there, and what is there
is read as long as it can be. ENOSPC of the file system under it is no trouble but a full tier: it is tried again.
"""

import errno
import logging
from abc import ABC
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from dpud.gpu.blob import Blob
from dpud.gpu.clock import Clock
from dpud.gpu.errors import CorruptPage, GpuError
from dpud.gpu.swap.blockfile import BLOCK_BYTES, BlockFile, CutShort
from dpud.gpu.swap.blockmap import BlockMap
from dpud.gpu.swap.budget import WriteBudget
from dpud.gpu.swap.latency import Latencies
from dpud.gpu.swap.profile import HDD, MEMORY, NVME, SSD, TierProfile, TierTiming
from dpud.gpu.swap.slots import get_record, nr_blocks_of, open_label, put_record, record_bytes

log = logging.getLogger("dpud.gpu.swap")


class Slot:
    """Where a record lies, and how often its page was read lately."""

    __slots__ = ("at", "generation", "heat", "near", "nr_bytes", "raw_bytes", "tier")

    def __init__(self, tier: "Tier", at: int, nr_bytes: int, raw_bytes: int, generation: int) -> None:
        self.tier = tier
        self.at = at
        """Byte in the tier's file."""
        self.nr_bytes = nr_bytes
        """Of the record."""
        self.raw_bytes = raw_bytes
        self.generation = generation
        self.heat = 0
        self.near = -1
        """The location whose memory its page left; -1: none in particular."""

    @property
    def blocks(self) -> range:
        return range(self.at // BLOCK_BYTES, nr_blocks_of(self.at + self.nr_bytes))


class Tier(ABC):
    """One tier.

    size_bytes  of its file; at least two blocks
    name        where there are several of its kind
    path        a file that is kept; else a temporary one in `folder`

    Raises GpuError, OSError.
    """

    kind: ClassVar[str] = ""
    profile: ClassVar[TierProfile]

    def __init__(
        self, size_bytes: int, clock: Clock, *, name: str = "", path: Path | None = None, folder: Path | None = None
    ) -> None:
        self.name = name or self.kind
        if size_bytes < 2 * BLOCK_BYTES:
            raise GpuError(errno.EINVAL, f"a tier of {size_bytes} bytes")
        self.file = self._open(size_bytes // BLOCK_BYTES, path, folder)
        self.salt = open_label(self.file)
        self.map = BlockMap(self.file.nr_blocks)
        self.timing = TierTiming(self.profile, clock)
        self.budget = WriteBudget(clock, self.profile.endurance_bytes)
        self.latencies = Latencies()
        self.clock = clock
        self.trouble: str | None = None
        self.nr_pages = 0
        self.nr_stored_bytes = 0
        """Raw bytes of the pages."""
        self.nr_reads = self.nr_read_blocks = 0
        self.nr_writes = self.nr_written_blocks = 0
        self.nr_errors = 0
        self._is_full = False

    def _open(self, nr_blocks: int, path: Path | None, folder: Path | None) -> BlockFile:
        if path is not None:
            return BlockFile.named(self.name, nr_blocks, path)
        return BlockFile.temporary(self.name, nr_blocks, folder)

    def close(self) -> None:
        self.file.close()

    @property
    def size_bytes(self) -> int:
        return (self.file.nr_blocks - 1) * BLOCK_BYTES

    @property
    def free_bytes(self) -> int:
        return self.map.nr_free * BLOCK_BYTES

    @property
    def used_bytes(self) -> int:
        return self.size_bytes - self.free_bytes

    @property
    def room_bytes(self) -> int:
        """What may be expected to go here: free, within the budget, and the file system has room."""
        if self.trouble is not None or self._is_full:
            return 0
        return min(self.free_bytes, self.budget.left_bytes)

    def write(self, items: Sequence[tuple[int, Blob]], generation: int) -> list[Slot] | None:
        """Write records in one piece -> their slots, or None where there is no room for them in one piece.

        Raises GpuError(ENOSPC | EIO) of the file; nothing is taken then.
        """
        nr_bytes = sum(record_bytes(len(blob.data)) for _, blob in items)
        nr_blocks = nr_blocks_of(nr_bytes)
        first = self.map.find(nr_blocks) if self.trouble is None and self.budget.allows(nr_blocks) else None
        if first is None:
            return None
        began_ns = self.clock.now_ns()
        self._write_blocks(first, self._filled(items, generation, nr_bytes))
        self.timing.write(first * BLOCK_BYTES, nr_blocks * BLOCK_BYTES, began_ns)
        self.budget.spend(nr_blocks)
        self.nr_writes += 1
        self.nr_written_blocks += nr_blocks
        return self._slots(items, generation, first * BLOCK_BYTES)

    def _filled(self, items: Sequence[tuple[int, Blob]], generation: int, nr_bytes: int) -> memoryview:
        view = self.file.buffer(nr_bytes)
        at = 0
        for key, blob in items:
            at = put_record(view, at, key, generation, blob, self.salt)
        view[at:] = bytes(len(view) - at)
        return view

    def _write_blocks(self, first: int, view: memoryview) -> None:
        self.check()
        if self.trouble is not None:
            raise GpuError(errno.EIO, f"{self.name}: {self.trouble}")
        try:
            self.file.write(first, view)
        except GpuError as error:
            self.nr_errors += 1
            if error.errno != errno.ENOSPC:
                self.fail(str(error.strerror))
            elif not self._is_full:
                log.error("%s: the file system under it is full, after %d of its bytes", self.name, self.used_bytes)
            self._is_full = True
            raise
        self._is_full = False

    def _slots(self, items: Sequence[tuple[int, Blob]], generation: int, at: int) -> list[Slot]:
        slots = []
        for _, blob in items:
            slot = Slot(self, at, record_bytes(len(blob.data)), blob.raw_bytes, generation)
            self.map.use(slot.blocks)
            self.nr_pages += 1
            self.nr_stored_bytes += blob.raw_bytes
            at += slot.nr_bytes
            slots.append(slot)
        return slots

    def read(self, items: Sequence[tuple[int, Slot]], began_ns: int) -> tuple[list[Blob | GpuError], int]:
        """Pages whose slots follow one another -> (each one, or why not; when they are there, in ns).

        CorruptPage where something else lies there, GpuError(EIO) where nothing can be read.
        """
        first, end = items[0][1].blocks.start, items[-1][1].blocks.stop
        try:
            view = self.file.read(first, (end - first) * BLOCK_BYTES)
        except GpuError as error:
            return self._unread(items, began_ns, error)
        self.nr_reads += 1
        self.nr_read_blocks += end - first
        found = [self._record(view[slot.at - first * BLOCK_BYTES :], key, slot) for key, slot in items]
        end_ns = self.timing.read(first * BLOCK_BYTES, len(view), began_ns)
        self.latencies.add(max(end_ns, self.clock.now_ns()) - began_ns)
        return found, end_ns

    def _record(self, view: memoryview, key: int, slot: Slot) -> Blob | GpuError:
        try:
            return get_record(view, key, slot.generation, self.salt)
        except CorruptPage as error:
            self.nr_errors += 1
            return error

    def _unread(
        self, items: Sequence[tuple[int, Slot]], began_ns: int, error: GpuError
    ) -> tuple[list[Blob | GpuError], int]:
        """One by one, to find those that can be read; a page beyond the file's end is lost."""
        if len(items) > 1:
            apart = [self.read([item], began_ns) for item in items]
            return [found for each, _ in apart for found in each], max(end_ns for _, end_ns in apart)
        self.nr_errors += 1
        self.check()
        key = items[0][0]
        return [CorruptPage(key, str(error.strerror)) if isinstance(error, CutShort) else error], began_ns

    def release(self, slot: Slot) -> None:
        """Its page is gone or elsewhere."""
        self.map.release(slot.blocks)
        self.nr_pages -= 1
        self.nr_stored_bytes -= slot.raw_bytes

    def check(self) -> None:
        """Look whether the file is still there, and as long as it was."""
        if self.trouble is None and (trouble := self.file.trouble()) is not None:
            self.fail(trouble)

    def fail(self, why: str) -> None:
        """Nothing more is placed here."""
        if self.trouble is None:
            log.error("%s: %s; nothing more is written to it", self.name, why)
            self.trouble = why


_KINDS: dict[str, type[Tier]] = {}


def register(name: str) -> Callable[[type[Tier]], type[Tier]]:
    """A kind of tier, by name."""

    def registered(kind: type[Tier]) -> type[Tier]:
        if name in _KINDS:
            raise ValueError(f"there is a tier {name} already")
        kind.kind = name
        _KINDS[name] = kind
        return kind

    return registered


def kinds() -> tuple[str, ...]:
    """Names of all kinds, in the order in which they were registered: the built-in ones from fast to slow."""
    return tuple(_KINDS)


def new_tier(name: str, size_bytes: int, clock: Clock, *, path: Path | None = None, folder: Path | None = None) -> Tier:
    """`name`: a kind, with a number behind it where there are several. Raises GpuError(EINVAL) for what is none."""
    kind = name if name in _KINDS else name.rstrip("0123456789")
    if kind not in _KINDS:
        raise GpuError(errno.EINVAL, f"no tier {name}: there are {', '.join(_KINDS)}")
    return _KINDS[kind](size_bytes, clock, name=name, path=path, folder=folder)


@register("memory")
class MemoryTier(Tier):
    """System memory."""

    profile = MEMORY

    def _open(self, nr_blocks: int, path: Path | None, folder: Path | None) -> BlockFile:
        return BlockFile.in_memory(self.name, nr_blocks)


@register("nvme")
class NvmeTier(Tier):
    """Flash on PCI Express."""

    profile = NVME


@register("ssd")
class SsdTier(Tier):
    """Flash on SATA."""

    profile = SSD


@register("hdd")
class HddTier(Tier):
    """A disk."""

    profile = HDD
