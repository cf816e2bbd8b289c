# SPDX-License-Identifier: GPL-2.0-only
"""Small memories for tests, where everything is soon full."""

import errno
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dpud.gpu.blob import Blob
from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import CorruptPage, GpuError
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory

KIB, MIB = 1 << 10, 1 << 20


class DictSwap:
    """Swap of a given size that can lose what it has."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.blobs: dict[int, Blob] = {}
        self.torn: set[int] = set()
        self.nr_writes = 0

    @property
    def nr_free_bytes(self) -> int:
        return self.limit_bytes - sum(len(blob.data) for blob in self.blobs.values())

    @property
    def saved_bytes(self) -> int:
        return sum(blob.raw_bytes - len(blob.data) for blob in self.blobs.values())

    def write(self, items: Sequence[tuple[int, Blob]], near: int = -1) -> None:
        if sum(len(blob.data) for _, blob in items) > self.nr_free_bytes:
            raise GpuError(errno.ENOSPC, "swap is full")
        self.nr_writes += len(items)
        self.blobs.update(items)

    def read(self, key: int) -> Blob:
        if key in self.torn:
            raise CorruptPage(key, "torn slot")
        return self.blobs[key]

    def read_many(self, keys: Sequence[int], near: int = -1) -> list[Blob | GpuError]:
        return [self._answer(key) for key in keys]

    def _answer(self, key: int) -> Blob | GpuError:
        try:
            return self.read(key)
        except GpuError as error:
            return error

    def drop(self, key: int) -> None:
        del self.blobs[key]

    def background(self, budget_bytes: int) -> int:
        return 0


def small_memory(*device_bytes: int, host_bytes: int = MIB, **collaborators: Any) -> GpuMemory:
    """Devices of these sizes."""
    clock = collaborators.setdefault("clock", ManualClock())
    devices = [
        SimulatedDevice(DeviceProfile(memory_bytes=size), clock, number) for number, size in enumerate(device_bytes)
    ]
    host = SimulatedDevice(DeviceProfile("host", host_bytes), clock, len(devices))
    return GpuMemory(devices, host=host, **collaborators)


def errno_of(fn: Callable[..., object], *args: object, **kwargs: object) -> int | None:
    with pytest.raises(GpuError) as caught:
        fn(*args, **kwargs)
    return caught.value.errno


def attempt(fn: Callable[..., object], *args: object, **kwargs: object) -> int:
    """errno of the GpuError that a call raises; 0 if it raises none."""
    try:
        fn(*args, **kwargs)
    except GpuError as error:
        return error.errno or -1
    return 0
