# SPDX-License-Identifier: MIT
"""The compiled loops that a pass needs, taken from their files before anybody waits for the pass.

The first call of such a loop reads it from the disk and links it, which takes some ms: many times what a pause may
take. So before the first pass where real time passes, a small memory is put in order that nobody else has. That is done
while the pass waits, when others have their turn.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from dpud.gpu.clock import ManualClock
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory

if TYPE_CHECKING:
    from dpud.gpu.defrag.module import DefragModule

_BYTES, _PIECE_BYTES = 8 << 20, 64 << 10
_KEPT_EVERY = 8


@cache
def load(make: Callable[[], "DefragModule"]) -> None:
    """Once in a process."""
    clock = ManualClock()
    memory = GpuMemory([SimulatedDevice(DeviceProfile(memory_bytes=_BYTES), clock)], clock=clock)
    defrag = make()
    defrag.attach(memory)
    addresses = [memory.allocate("loops", _PIECE_BYTES) for _ in range(_BYTES // _PIECE_BYTES)]
    for address in addresses:
        memory.write("loops", address, b"\1" * _PIECE_BYTES)
    for number, address in enumerate(addresses):
        if number % _KEPT_EVERY:
            memory.free(address)
    memory.read("loops", addresses[0], _PIECE_BYTES)
    defrag.run()


class Loops:
    """A kernelsim.operation.Waitable: who waits for it loads them."""

    def __init__(self, make: Callable[[], "DefragModule"]) -> None:
        self._make = make

    def wait(self, _timeout_s: float, /) -> bool:
        """It is not cut short."""
        load(self._make)
        return True
