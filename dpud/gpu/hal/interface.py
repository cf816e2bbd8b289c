# SPDX-License-Identifier: MIT
"""What a device can do, whoever makes it.

Work is put into streams. Within a stream it happens in order; between streams only events order it. A call returns
when the work is queued: bytes are there, and host memory that was handed in may be touched again, after `sync`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

HostBytes: TypeAlias = bytes | bytearray | memoryview
Bytes: TypeAlias = NDArray[np.uint8]
Offsets: TypeAlias = NDArray[np.int64]


class Ecc(Protocol):
    """fault.Cells, as far as a device goes: what every byte passes on its way into a memory's cells and out of them."""

    @property
    def is_quiet(self) -> bool:
        """There is nothing to correct anywhere: the device need not ask."""
        ...

    def read(self, at: int, nr_bytes: int, work: Callable[[], None], /) -> None:
        """Do `work`, which copies these bytes out. Raises GpuError(EIO) where they cannot be had."""
        ...

    def write(self, at: int, nr_bytes: int, work: Callable[[], None], /) -> None:
        """Do `work`, which fills these bytes."""
        ...


class Event(ABC):
    """A point in a stream. cuda.core: Event."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether the stream has come to it."""

    @abstractmethod
    def sync(self) -> None:
        """Wait for it."""

    @abstractmethod
    def elapsed_ns(self, since: "Event") -> int:
        """Device time between two events that are over. Raises GpuError(EBUSY) while one is not."""

    def __sub__(self, since: "Event") -> float:
        """Milliseconds, as cuda.core and cudaEventElapsedTime count."""
        return self.elapsed_ns(since) / 1e6


class Stream(ABC):
    """A queue of work. cuda.core: Stream."""

    @abstractmethod
    def record(self, event: Event | None = None) -> Event:
        """Mark this point; a new event, or the given one moved here."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """What is queued from now on comes after the event, which may be another device's."""

    @abstractmethod
    def sync(self) -> None:
        """Wait until all of it is done."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether nothing is left to do."""


class Buffer(ABC):
    """A piece of a memory. cuda.core: Buffer."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes."""

    @property
    @abstractmethod
    def handle(self) -> int:
        """Its address in the device's own address space."""

    @abstractmethod
    def view(self, offset: int, size: int) -> "Buffer":
        """A part of it, sharing its bytes. Raises GpuError(EINVAL) where it sticks out."""

    @abstractmethod
    def copy_from(self, src: "Buffer | HostBytes", *, stream: Stream) -> None:
        """Fill all of this buffer. Raises GpuError(EINVAL) unless sizes are equal."""

    @abstractmethod
    def copy_to(self, dst: "Buffer | bytearray | memoryview", *, stream: Stream) -> None:
        """The other way."""

    @abstractmethod
    def fill(self, value: int, *, stream: Stream) -> None:
        """Set every byte, on the device itself. cuda.core: Buffer.fill."""

    @abstractmethod
    def gather(self, offsets: Offsets, size: int, out: Bytes, *, stream: Stream) -> None:
        """Read `size` bytes at each offset, into the rows of out[len(offsets), size], as one transfer."""

    @abstractmethod
    def scatter(self, offsets: Offsets, size: int, data: Bytes, *, stream: Stream) -> None:
        """The other way."""

    @abstractmethod
    def close(self, stream: Stream | None = None) -> None:
        """Give the memory back, after what the stream holds."""


class Device(ABC):
    """One device. cuda.core: Device."""

    device_id: int
    name: str
    memory_bytes: int
    lost = False
    """It answers nobody any more: whatever is asked of it raises GpuError(ENODEV)."""

    @abstractmethod
    def allocate(self, size: int, stream: Stream) -> Buffer:
        """Memory that may be used in the stream's order. Raises GpuError(ENOMEM)."""

    @abstractmethod
    def create_stream(self) -> Stream: ...

    def use_path(self, bytes_per_s: int, latency_ns: int) -> None:  # noqa: B027  not every device has to
        """The next transfers to and from it go over a path like this. Real ones are as fast as they are."""

    @abstractmethod
    def sync(self) -> None:
        """Wait for all streams."""
