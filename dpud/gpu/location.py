# SPDX-License-Identifier: MIT
"""One memory that pages can be in: a device's, or the host's.

All of the memory is one buffer of the hardware layer; frames.py cuts it into pages. Bytes move in as few transfers as
the frames' places allow, and every method here returns when they are there.

Where there is a NUMA topology, who moves them (`at`, a location) says over which path: `paths` has one for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.frames import FramePool
from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.hal.interface import Bytes, Device
from dpud.gpu.policy import ClientPolicies, NewPolicy

Frames = NDArray[np.int64]

HOST = -1
"""Stands for the host node nearest to the client."""


@dataclass(frozen=True)
class Path:
    """How one location reaches another's memory."""

    latency_ns: int
    bytes_per_s: int


class Location:
    """Frames of a memory, and the order in which pages leave it."""

    def __init__(self, number: int, name: str, hardware: Device, new_policy: NewPolicy, is_host: bool = False) -> None:
        self.number = number
        self.is_host = is_host
        self.name = name
        self.hardware = hardware
        self.frames = FramePool(hardware.memory_bytes)
        self.policy = ClientPolicies(new_policy)
        self.paths: Sequence[Path] = ()
        """From each location to this memory; none: its hardware has one for all."""
        self._stream = hardware.create_stream()
        self._buffer = hardware.allocate(hardware.memory_bytes, self._stream)
        self._stream.sync()

    @property
    def is_lost(self) -> bool:
        """Its device answers nobody any more."""
        return self.hardware.lost

    def _go(self, at: int | None) -> None:
        if self.paths:
            path = self.paths[self.number if at is None else at]
            self.hardware.use_path(path.bytes_per_s, path.latency_ns)

    def load_pages(self, frames: Frames, page_bytes: int, at: int | None = None) -> Bytes:
        """Bytes of pages, [page, byte]."""
        self._go(at)
        out = np.empty((len(frames), page_bytes), dtype=np.uint8)
        self._buffer.gather(frames * FRAME_BYTES, page_bytes, out, stream=self._stream)
        self._stream.sync()
        return out

    def store_pages(self, frames: Frames, data: Bytes, at: int | None = None) -> None:
        """The other way; data[page, byte]."""
        self._go(at)
        self._buffer.scatter(frames * FRAME_BYTES, data.shape[1], data, stream=self._stream)
        self._stream.sync()

    def zero_pages(self, frames: Frames, page_bytes: int) -> None:
        for at, nr_bytes, _ in _runs(frames, page_bytes, 0, len(frames) * page_bytes):
            self._buffer.view(at, nr_bytes).fill(0, stream=self._stream)
        self._stream.sync()

    def copy_pages(self, sources: Frames, targets: Frames, page_bytes: int) -> None:
        """Pages into other frames, within the memory."""
        per_page = page_bytes // FRAME_BYTES
        if len(sources) == 1:
            self.copy(int(sources[0]) * FRAME_BYTES, int(targets[0]) * FRAME_BYTES, page_bytes)
            self._stream.sync()
            return
        breaks = np.flatnonzero((np.diff(sources) != per_page) | (np.diff(targets) != per_page)) + 1
        for group in np.split(np.arange(len(sources)), breaks):
            if len(group):
                at = int(sources[group[0]]) * FRAME_BYTES, int(targets[group[0]]) * FRAME_BYTES
                self.copy(*at, len(group) * page_bytes)
        self._stream.sync()

    def copy(self, source: int, target: int, nr_bytes: int) -> None:
        """Bytes of the memory to where they do not overlap; they are there after the next method that waits."""
        view = self._buffer.view
        view(source, nr_bytes).copy_to(view(target, nr_bytes), stream=self._stream)

    def wait(self) -> None:
        """Until what `copy` queued is done."""
        self._stream.sync()

    def load(self, frames: Frames, page_bytes: int, offset: int, out: Bytes, at: int | None = None) -> None:
        """len(out) bytes from `offset` on in the pages taken together."""
        self._go(at)
        for at, nr_bytes, done in _runs(frames, page_bytes, offset, len(out)):
            self._buffer.view(at, nr_bytes).copy_to(out[done : done + nr_bytes].data, stream=self._stream)
        self._stream.sync()

    def store(self, frames: Frames, page_bytes: int, offset: int, data: Bytes, at: int | None = None) -> None:
        """The other way."""
        self._go(at)
        for at, nr_bytes, done in _runs(frames, page_bytes, offset, len(data)):
            self._buffer.view(at, nr_bytes).copy_from(data[done : done + nr_bytes].data, stream=self._stream)
        self._stream.sync()


def make_locations(devices: Sequence[Device], hosts: Sequence[Device], new_policy: NewPolicy) -> list[Location]:
    """device0, device1, ..., then `host`, or each host memory by its own name where there are several."""
    names = [f"device{number}" for number in range(len(devices))]
    names += ["host"] if len(hosts) == 1 else [each.name for each in hosts]
    return [
        Location(number, name, hardware, new_policy, number >= len(devices))
        for number, (name, hardware) in enumerate(zip(names, [*devices, *hosts], strict=True))
    ]


def _runs(frames: Frames, page_bytes: int, offset: int, nr_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(byte in memory, bytes, bytes before) for each run of adjacent frames."""
    if len(frames) == 1:  # most faults
        yield int(frames[0]) * FRAME_BYTES + offset, min(page_bytes - offset, nr_bytes), 0
        return
    breaks = np.flatnonzero(np.diff(frames) != page_bytes // FRAME_BYTES) + 1
    starts = [0, *breaks.tolist()]
    done, skip = 0, offset
    for start, end in zip(starts, [*starts[1:], len(frames)], strict=True):
        length = (end - start) * page_bytes
        nr = min(length - skip, nr_bytes - done)
        if nr > 0:
            yield int(frames[start]) * FRAME_BYTES + skip, nr, done
            done += nr
        skip = max(skip - length, 0)
