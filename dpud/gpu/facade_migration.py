# SPDX-License-Identifier: MIT
"""The C names of hot migration.

`init_migration_manager(nr_devices, device_bytes)`: for the memory that another init function made, or else for one of
so many devices. `start_memory_migration(destination, strategy)` moves all memory of the program: to `device1`, or to
another daemon, `unix:/path` or `tcp:host:port`; it returns when that is over. `receive_memory_migration(address)` takes
one that comes.
"""

import errno
from enum import IntEnum
from typing import Any

from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.facade_base import CLIENT, behind, c_int, has_memory, the_memory, use_memory
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.module import MigrationModule
from dpud.gpu.migration.state import State
from dpud.gpu.performance import set_log_level
from kernelsim.operation import complete


class MigrationStrategy(IntEnum):
    """migration_strategy_t"""

    AUTO = 0
    PRE_COPY = 1
    POST_COPY = 2
    HYBRID = 3
    STOP_AND_COPY = 4


MIGRATION_AUTO = MigrationStrategy.AUTO
MIGRATION_PRE_COPY = MigrationStrategy.PRE_COPY
MIGRATION_POST_COPY = MigrationStrategy.POST_COPY
MIGRATION_HYBRID = MigrationStrategy.HYBRID
MIGRATION_STOP_AND_COPY = MigrationStrategy.STOP_AND_COPY

_STRATEGIES = dict(zip(MigrationStrategy, Strategy, strict=True))


class _Manager:
    module: MigrationModule | None = None
    made_memory = False


def _module() -> MigrationModule:
    """Raises GpuError(ENODEV)."""
    if _Manager.module is None or not has_memory():
        raise GpuError(errno.ENODEV, "init_migration_manager was not called")
    return _Manager.module


@c_int
def init_migration_manager(nr_devices: int = 2, device_bytes: int = 256 << 20) -> None:
    """EBUSY if it was called already; EINVAL for no devices, or devices below 64 KiB."""
    if _Manager.module is not None:
        raise GpuError(errno.EBUSY, "initialized already")
    if nr_devices < 1 or device_bytes < 64 << 10:
        raise GpuError(errno.EINVAL, f"{nr_devices} devices of {device_bytes} bytes")
    set_log_level()
    if not has_memory():
        clock = ManualClock()
        profile = DeviceProfile(memory_bytes=device_bytes)
        devices = [SimulatedDevice(profile, clock, number) for number in range(nr_devices)]
        use_memory(GpuMemory(devices, clock=clock, **behind))
        _Manager.made_memory = True
    module = the_memory().migration
    if module is None:
        module = MigrationModule()
        module.attach(the_memory())
    _Manager.module = module


@c_int
def start_memory_migration(destination: str, strategy: int = MIGRATION_AUTO) -> None:
    """EINVAL, ENODATA without memory; EIO where it failed, and the memory is still here."""
    module = _module()
    if strategy not in list(MigrationStrategy):
        raise GpuError(errno.EINVAL, f"strategy {strategy}")
    module.settings.strategy = _STRATEGIES[MigrationStrategy(strategy)]
    number = destination.removeprefix("device")
    where = f"device={number}" if number != destination else f"to={destination}"
    progress = module.migrate(f"client={CLIENT} {where}")
    if progress.state is not State.COMPLETED:
        raise GpuError(errno.EIO, progress.why)


@c_int
def receive_memory_migration(address: str) -> None:
    """Listen there until one has come; EIO where it did not come to its end."""
    module = _module()
    module.listen(address)
    assert module.listening is not None
    try:
        while (channel := module.listening.accept()) is None:
            module.listening.wait(1.0)
        complete(module.receiver.serve(channel))
    finally:
        module.listen("")
    last = module.receiver.history[-1:]
    if not last or last[0].state is not State.COMPLETED:
        raise GpuError(errno.EIO, last[0].why if last else "nothing came")


def cleanup_migration_manager() -> None:
    """Memory that init_migration_manager() made is freed."""
    if _Manager.made_memory and has_memory():
        memory = the_memory()
        for name in list(memory.clients):
            memory.remove_client(name)
        use_memory(None)
    _Manager.module, _Manager.made_memory = None, False


def get_migration_stats() -> dict[str, Any]:
    """Counters, and state, strategy, times and digest of the last one. Empty before init."""
    if _Manager.module is None:
        return {}
    stats: dict[str, Any] = dict(_Manager.module.stats())
    if _Manager.module.history:
        last = _Manager.module.history[-1]
        stats |= {
            "state": str(last.state),
            "strategy": last.strategy,
            "total_ns": last.end_ns - last.begin_ns,
            "downtime_ns": last.downtime_ns,
            "digest": last.digest,
        }
    return stats


def print_migration_stats() -> None:
    """To stdout."""
    stats = get_migration_stats()
    print("Migration:", "not initialized" if not stats else "counters, then the last one")
    for name, value in stats.items():
        print(f"  {name:<20} {value:>12}")
