# SPDX-License-Identifier: GPL-2.0-only
"""The simulated device: bytes, order, time, and what it refuses."""

import errno
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.hal.engine import CopyEngine, DeviceProfile
from dpud.gpu.hal.extents import ALIGNMENT, Extents
from dpud.gpu.hal.simulated import SimulatedDevice

MIB = 1 << 20
SLOW = DeviceProfile("slow", 4 * MIB, link_bytes_per_s=1_000_000_000, link_latency_ns=100, local_latency_ns=0)


def errno_of(fn: Callable[..., object], *args: object, **kwargs: object) -> int | None:
    with pytest.raises(GpuError) as caught:
        fn(*args, **kwargs)
    return caught.value.errno


def test_the_default_link_is_pci_express_4_x16() -> None:
    """16 GT/s a lane, 16 lanes, 128b/130b coding."""
    assert DeviceProfile().link_bytes_per_s == pytest.approx(16e9 * 16 * 128 / 130 / 8, rel=1e-6)


def test_bytes_come_back() -> None:
    device = SimulatedDevice(SLOW)
    stream = device.create_stream()
    buffer = device.allocate(1000, stream)
    data, out = np.random.default_rng(0).bytes(1000), bytearray(1000)
    buffer.copy_from(data, stream=stream)
    buffer.copy_to(out, stream=stream)
    stream.sync()
    assert bytes(out) == data


def test_bytes_are_there_only_when_their_time_has_come() -> None:
    clock = ManualClock()
    device = SimulatedDevice(SLOW, clock)
    stream = device.create_stream()
    buffer = device.allocate(1000, stream)
    buffer.copy_from(b"\1" * 1000, stream=stream)  # 1000 ns at 1 GB/s, and 100
    out = bytearray(1000)
    clock.advance(1099)
    device.retire()
    assert not stream.is_done
    assert not buffer.bytes.any()
    clock.advance(1)
    assert stream.is_done
    device.retire()
    assert buffer.bytes.all()
    assert not any(out)


def test_events_measure_device_time() -> None:
    device = SimulatedDevice(SLOW)
    stream = device.create_stream()
    buffer = device.allocate(MIB, stream)
    start = stream.record()
    buffer.copy_from(bytes(MIB), stream=stream)
    buffer.copy_to(bytearray(MIB), stream=stream)
    end = stream.record()
    assert not end.is_done
    assert errno_of(end.elapsed_ns, start) == errno.EBUSY
    end.sync()
    assert end.elapsed_ns(start) == 2 * (MIB + 100)
    assert end - start == 2 * (MIB + 100) / 1e6


def test_directions_overlap_and_one_direction_does_not() -> None:
    device = SimulatedDevice(SLOW)
    streams = [device.create_stream() for _ in range(3)]
    up, down, up_too = (device.allocate(MIB, stream) for stream in streams)
    up.copy_from(bytes(MIB), stream=streams[0])
    down.copy_to(bytearray(MIB), stream=streams[1])
    up_too.copy_from(bytes(MIB), stream=streams[2])
    device.sync()
    assert [stream.free_at_ns for stream in streams] == [MIB + 100, MIB + 100, 2 * MIB + 100]


def test_an_event_orders_streams() -> None:
    device = SimulatedDevice(SLOW)
    one, two = device.create_stream(), device.create_stream()
    buffer, out = device.allocate(MIB, one), bytearray(MIB)
    buffer.copy_from(b"\7" * MIB, stream=one)
    two.wait(one.record())
    buffer.copy_to(out, stream=two)
    two.sync()
    assert out == b"\7" * MIB
    assert device.clock.now_ns() == 2 * (MIB + 100)


def test_peer_copies_cross_both_links() -> None:
    clock = ManualClock()
    here, there = SimulatedDevice(SLOW, clock), SimulatedDevice(SLOW, clock, 1)
    stream = here.create_stream()
    source, target = here.allocate(1000, stream), there.allocate(1000, there.create_stream())
    source.copy_from(b"\3" * 1000, stream=stream)
    source.copy_to(target, stream=stream)
    stream.sync()
    assert target.bytes.tobytes() == b"\3" * 1000
    assert (here.download.nr_bytes, there.upload.nr_bytes) == (1000, 1000)


def test_gather_and_scatter_are_one_transfer() -> None:
    device = SimulatedDevice(SLOW)
    stream = device.create_stream()
    buffer = device.allocate(MIB, stream)
    offsets = np.array([8192, 0, 40960], dtype=np.int64)
    rows = np.arange(3 * 4096, dtype=np.uint64).astype(np.uint8).reshape(3, 4096)
    rows[1] += 1
    buffer.scatter(offsets, 4096, rows, stream=stream)
    out = np.zeros_like(rows)
    buffer.gather(offsets, 4096, out, stream=stream)
    stream.sync()
    assert np.array_equal(out, rows)
    assert buffer.bytes[8192 : 8192 + 4096].tobytes() == rows[0].tobytes()
    assert (device.upload.nr_transfers, device.upload.nr_bytes) == (1, 3 * 4096)
    assert errno_of(buffer.gather, offsets + MIB, 4096, out, stream=stream) == errno.EINVAL
    assert errno_of(buffer.gather, offsets, 2048, out, stream=stream) == errno.EINVAL


def test_new_memory_is_zero_and_closed_memory_is_gone() -> None:
    device = SimulatedDevice(SLOW)
    stream = device.create_stream()
    buffer = device.allocate(4 * MIB, stream)
    buffer.copy_from(b"\1" * 4 * MIB, stream=stream)
    assert errno_of(device.allocate, 1, stream) == errno.ENOMEM
    view = buffer.view(0, 10)
    buffer.close(stream)
    assert errno_of(view.copy_from, bytes(10), stream=stream) == errno.EINVAL
    assert errno_of(buffer.close, stream) == errno.EINVAL
    assert errno_of(device.allocate, 1, stream) == errno.ENOMEM  # the copy is still on its way
    stream.sync()
    again = device.allocate(4 * MIB, stream)
    stream.sync()
    assert not again.bytes.any()


def test_sizes_have_to_fit() -> None:
    device = SimulatedDevice(SLOW)
    stream = device.create_stream()
    buffer = device.allocate(100, stream)
    assert errno_of(buffer.copy_from, bytes(99), stream=stream) == errno.EINVAL
    assert errno_of(buffer.view, 50, 51) == errno.EINVAL
    assert errno_of(device.allocate, 0, stream) == errno.EINVAL


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20)), max_size=60))
def test_extents_never_overlap_and_nothing_is_lost(ops: list[tuple[int, int]]) -> None:
    extents, taken = Extents(1 << 15), dict[int, int]()
    for size, victim in ops:
        start = extents.take(size)
        if start is not None:
            assert start % ALIGNMENT == 0
            assert all(start + size <= other or other + length <= start for other, length in taken.items())
            taken[start] = size
        if victim < len(taken):
            gone = list(taken)[victim]
            extents.give(gone)
            del taken[gone]
    for start in taken:
        extents.give(start)
    assert extents.nr_free_bytes == 1 << 15
    assert extents.take(1 << 15) == 0


def test_an_engine_is_taken_for_the_transfer_not_for_the_latency() -> None:
    engine = CopyEngine(1_000_000_000, 50)
    assert engine.transfer(100, 10) == 10 + 100 + 50
    assert engine.transfer(100, 0) == 110 + 100 + 50
