# SPDX-License-Identifier: MIT
"""The device that needs no hardware: real bytes in host memory, times by a profile.

Theory of operation
    Memory is one sparse array; only pages written to cost the host anything. Queued work has a finish time, by the
    copy engine that does it (engine.py), and a closure that moves the bytes. The bytes move when time has come to the
    finish, not when the work is queued: a program that forgets to wait reads the old bytes, as it would on a device.
    `sync` sleeps until a stream's last finish time on the clock that was passed in. With a ManualClock this takes no
    time and the same calls always give the same bytes at the same times.

Invariants
    - Finish times never fall within a stream, and work is done in the order of finish times over all streams.
    - An allocation owns its bytes alone until it is closed and its stream has come there. New memory reads as zeros.

Differs from hardware: one engine a direction and one for local copies (an A100 has more); allocation takes no time.
"""

import errno
import heapq
import itertools
from collections.abc import Callable
from functools import partial

import numpy as np

from dpud.gpu.clock import Clock, ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.hal.engine import CopyEngine, DeviceProfile
from dpud.gpu.hal.extents import Extents
from dpud.gpu.hal.interface import Buffer, Bytes, Device, Ecc, Event, HostBytes, Offsets, Stream

Work = Callable[[], None]


class SimEvent(Event):
    """Recorded at a moment of device time."""

    def __init__(self, device: "SimulatedDevice") -> None:
        self._device = device
        self.at_ns = 0

    @property
    def is_done(self) -> bool:
        return self._device.clock.now_ns() >= self.at_ns

    def sync(self) -> None:
        self._device.clock.sleep_until(self.at_ns)
        self._device.retire()

    def elapsed_ns(self, since: Event) -> int:
        assert isinstance(since, SimEvent)
        if not (self.is_done and since.is_done):
            raise GpuError(errno.EBUSY, "the event is not over yet")
        return self.at_ns - since.at_ns


class SimStream(Stream):
    """Work in order."""

    def __init__(self, device: "SimulatedDevice") -> None:
        self._device = device
        self.free_at_ns = 0
        """When all that is queued will be done."""

    def record(self, event: Event | None = None) -> Event:
        if event is None:
            event = SimEvent(self._device)
        assert isinstance(event, SimEvent)
        event.at_ns = max(self.free_at_ns, self._device.clock.now_ns())
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, SimEvent)
        self.free_at_ns = max(self.free_at_ns, event.at_ns)

    def sync(self) -> None:
        self._device.clock.sleep_until(self.free_at_ns)
        self._device.retire()

    @property
    def is_done(self) -> bool:
        return self._device.clock.now_ns() >= self.free_at_ns


class SimulatedDevice(Device):
    """A device by a profile."""

    def __init__(self, profile: DeviceProfile | None = None, clock: Clock | None = None, device_id: int = 0) -> None:
        self.profile = profile or DeviceProfile()
        self.clock = clock or ManualClock()
        self.device_id = device_id
        self.name = self.profile.name
        self.memory_bytes = self.profile.memory_bytes
        self.memory: Bytes = np.zeros(self.memory_bytes, dtype=np.uint8)
        self.upload = self.profile.host_to_device()
        self.download = self.profile.device_to_host()
        self.local = self.profile.local()
        self._extents = Extents(self.memory_bytes)
        self._fresh = 0  # memory from here on was never allocated: it is zero, and costs the host nothing
        self._streams: list[SimStream] = []
        self._pending: list[tuple[int, int, Work]] = []
        self._order = itertools.count()
        self.ecc: Ecc | None = None
        """What bytes pass, once somebody has put faults into the memory."""

    def allocate(self, size: int, stream: Stream) -> "SimBuffer":
        """256-byte aligned, as cudaMalloc's. Raises GpuError(ENOMEM), GpuError(EINVAL) for a size below 1."""
        self.retire()
        handle = self._extents.take(size)
        if handle is None:
            raise GpuError(errno.ENOMEM, f"device {self.device_id} has no {size} bytes in one piece")
        buffer = SimBuffer(self, handle, size)
        used = self.memory[handle : min(handle + size, self._fresh)]
        self.submit(self.local, 0, stream, lambda: used.fill(0))
        self._fresh = max(self._fresh, handle + size)
        return buffer

    def free(self, buffer: "SimBuffer", stream: Stream) -> None:
        """Give an allocation back when the stream comes there."""
        self.submit(self.local, 0, stream, lambda: self._extents.give(buffer.handle))

    def create_stream(self) -> SimStream:
        self._streams.append(SimStream(self))
        return self._streams[-1]

    def use_path(self, bytes_per_s: int, latency_ns: int) -> None:
        for engine in (self.upload, self.download):
            engine.bandwidth_bytes_per_s, engine.latency_ns = bytes_per_s, latency_ns

    def sync(self) -> None:
        self.clock.sleep_until(max((stream.free_at_ns for stream in self._streams), default=0))
        self.retire()

    def submit(self, engine: CopyEngine, nr_bytes: int, stream: Stream, work: Work) -> None:
        """Queue work that takes an engine for `nr_bytes`; without bytes it takes no time. Raises GpuError(ENODEV)."""
        assert isinstance(stream, SimStream)
        if self.lost:
            raise GpuError(errno.ENODEV, f"device {self.device_id} has fallen off the bus")
        earliest_ns = max(self.clock.now_ns(), stream.free_at_ns)
        finish_ns = engine.transfer(nr_bytes, earliest_ns) if nr_bytes else earliest_ns
        stream.free_at_ns = finish_ns
        heapq.heappush(self._pending, (finish_ns, next(self._order), work))

    def retire(self) -> None:
        """Do what is finished by now."""
        now_ns = self.clock.now_ns()
        while self._pending and self._pending[0][0] <= now_ns:
            heapq.heappop(self._pending)[2]()

    @property
    def noisy_ecc(self) -> Ecc | None:
        """The ECC, where it has something to do."""
        return None if self.ecc is None or self.ecc.is_quiet else self.ecc

    def read(self, at: int, nr_bytes: int, work: Work) -> None:
        """Work that copies bytes out of the memory, through its ECC."""
        ecc = self.noisy_ecc
        work() if ecc is None else ecc.read(at, nr_bytes, work)

    def write(self, at: int, nr_bytes: int, work: Work) -> None:
        """Work that fills bytes of the memory."""
        ecc = self.noisy_ecc
        work() if ecc is None else ecc.write(at, nr_bytes, work)


class SimBuffer(Buffer):
    """Bytes of a simulated device."""

    def __init__(self, device: SimulatedDevice, handle: int, size: int, whole: "SimBuffer | None" = None) -> None:
        self.device = device
        self._handle = handle
        self._size = size
        self._whole = whole
        self._closed = False

    @property
    def size(self) -> int:
        return self._size

    @property
    def handle(self) -> int:
        return self._handle

    @property
    def bytes(self) -> Bytes:
        """The array behind it, as it is now."""
        if self._closed or (self._whole is not None and self._whole._closed):
            raise GpuError(errno.EINVAL, "the buffer is closed")
        return self.device.memory[self._handle : self._handle + self._size]

    def view(self, offset: int, size: int) -> "SimBuffer":
        if offset < 0 or size < 0 or offset + size > self._size:
            raise GpuError(errno.EINVAL, f"{offset}+{size} is outside a buffer of {self._size} bytes")
        return SimBuffer(self.device, self._handle + offset, size, self._whole or self)

    def copy_from(self, src: Buffer | HostBytes, *, stream: Stream) -> None:
        if isinstance(src, SimBuffer):
            return src.copy_to(self, stream=stream)
        assert not isinstance(src, Buffer), "another backend's buffer"
        into, data = self.bytes, np.frombuffer(src, dtype=np.uint8)
        self._check_size(len(data))
        return self._upload(self._size, stream, lambda: self._fill(lambda: np.copyto(into, data)))

    def copy_to(self, dst: Buffer | bytearray | memoryview, *, stream: Stream) -> None:
        source = self.bytes
        if isinstance(dst, SimBuffer):
            into = dst.bytes
            self._check_size(dst.size)
            self._copy_to_device(dst, stream, lambda: self._drain(lambda: dst._fill(lambda: np.copyto(into, source))))
            return
        assert not isinstance(dst, Buffer), "another backend's buffer"
        out = np.frombuffer(dst, dtype=np.uint8)
        self._check_size(len(out))
        self._download(self._size, stream, lambda: self._drain(lambda: np.copyto(out, source)))

    def _drain(self, work: Work) -> None:
        self.device.read(self._handle, self._size, work)

    def _fill(self, work: Work) -> None:
        self.device.write(self._handle, self._size, work)

    def _copy_to_device(self, dst: "SimBuffer", stream: Stream, work: Work) -> None:
        """Within a device, or from peer to peer: then both links are taken, and it ends when the later one does."""
        if dst.device is self.device:
            return self.device.submit(self.device.local, self._size, stream, work)
        assert isinstance(stream, SimStream)
        stream.free_at_ns = max(stream.free_at_ns, dst.device.upload.transfer(self._size, self.device.clock.now_ns()))

        def land() -> None:
            dst.device.retire()  # what is due there comes first
            work()

        return self._download(self._size, stream, land)

    def fill(self, value: int, *, stream: Stream) -> None:
        into = self.bytes
        self.device.submit(self.device.local, self._size, stream, lambda: self._fill(lambda: into.fill(value)))

    def gather(self, offsets: Offsets, size: int, out: Bytes, *, stream: Stream) -> None:
        rows = self._rows(offsets, size, out)
        self._download(out.nbytes, stream, lambda: self._gather(rows, offsets, size, out))

    def scatter(self, offsets: Offsets, size: int, data: Bytes, *, stream: Stream) -> None:
        rows = self._rows(offsets, size, data)
        self._upload(data.nbytes, stream, lambda: self._scatter(rows, offsets, size, data))

    def close(self, stream: Stream | None = None) -> None:
        assert self._whole is None, "a view is not an allocation"
        if self._closed:
            raise GpuError(errno.EINVAL, "closed twice")
        self._closed = True
        self.device.free(self, stream or self.device.create_stream())

    def _upload(self, nr_bytes: int, stream: Stream, work: Work) -> None:
        self.device.submit(self.device.upload, nr_bytes, stream, work)

    def _download(self, nr_bytes: int, stream: Stream, work: Work) -> None:
        self.device.submit(self.device.download, nr_bytes, stream, work)

    def _check_size(self, nr_bytes: int) -> None:
        if nr_bytes != self._size:
            raise GpuError(errno.EINVAL, f"{nr_bytes} bytes for a buffer of {self._size}")

    def _rows(self, offsets: Offsets, size: int, array: Bytes) -> Bytes:
        if array.shape != (len(offsets), size):
            raise GpuError(errno.EINVAL, f"{array.shape} bytes for {len(offsets)} pieces of {size}")
        if len(offsets) and (int(offsets.min()) < 0 or int(offsets.max()) + size > self._size):
            raise GpuError(errno.EINVAL, "a piece is outside the buffer")
        return self.bytes

    def _gather(self, source: Bytes, offsets: Offsets, size: int, out: Bytes) -> None:
        ecc = self.device.noisy_ecc
        for row, offset in enumerate(offsets.tolist()):
            if ecc is None:
                out[row] = source[offset : offset + size]
            else:
                ecc.read(self._handle + offset, size, partial(np.copyto, out[row], source[offset : offset + size]))

    def _scatter(self, into: Bytes, offsets: Offsets, size: int, data: Bytes) -> None:
        ecc = self.device.noisy_ecc
        for row, offset in enumerate(offsets.tolist()):
            if ecc is None:
                into[offset : offset + size] = data[row]
            else:
                ecc.write(self._handle + offset, size, partial(np.copyto, into[offset : offset + size], data[row]))
