# SPDX-License-Identifier: MIT
"""The C names of overcommitted memory.

`init_memory_overcommit(physical_memory_size, overcommit_ratio)`: a device of that many bytes, of which all allocations
together may have `overcommit_ratio` times as many. What is behind it are the parts that other init functions made
before; without them, host memory for the rest. It makes the memory, so init_swap_system is not called beside it.

`allocate_overcommit_memory(size, priority)`: admission decides; NULL and ENOMEM where the memory could not be honoured.
"""

import errno
from typing import Any

from dpud.gpu.accounting import MAX_PRIORITY
from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.facade_base import CLIENT, behind, c_int, c_pointer, has_memory, the_memory, use_memory
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import EXCHANGE_BYTES, GpuMemory
from dpud.gpu.overcommit import Admission
from dpud.gpu.performance import set_log_level
from dpud.gpu.store import HostPool

_MIN_BYTES = 64 << 10


class _Overcommit:
    admission: Admission | None = None


def _the_admission() -> Admission:
    if _Overcommit.admission is None:
        raise GpuError(errno.ENODEV, "init_memory_overcommit was not called")
    return _Overcommit.admission


@c_int
def init_memory_overcommit(physical_memory_size: int, overcommit_ratio: float) -> None:
    """EBUSY if there is memory already; EINVAL for a ratio below 1 or a size below 64 KiB."""
    if has_memory():
        raise GpuError(errno.EBUSY, "initialized already")
    if physical_memory_size < _MIN_BYTES or not 1 <= overcommit_ratio <= 1000:
        raise GpuError(errno.EINVAL, f"{physical_memory_size} bytes, ratio {overcommit_ratio}")
    set_log_level()
    clock = ManualClock()
    admission = Admission(physical_memory_size, clock, ratio_percent=round(100 * overcommit_ratio))
    device = SimulatedDevice(DeviceProfile(memory_bytes=physical_memory_size), clock)
    beyond = admission.limit_bytes - physical_memory_size
    parts: dict[str, Any] = {"pool": HostPool(beyond + EXCHANGE_BYTES)} if beyond > 0 else {}
    parts |= behind | {"admission": admission, "pressure": admission.pressure}
    use_memory(GpuMemory([device], clock=clock, **parts))
    _Overcommit.admission = admission


@c_pointer
def allocate_overcommit_memory(size: int, priority: int) -> int:
    """An address on the device; its bytes read as zeros. `priority`: 0 to 100, larger is more important."""
    _the_admission()
    if not 0 <= priority <= MAX_PRIORITY:
        raise GpuError(errno.EINVAL, f"priority {priority}")
    return the_memory().allocate(_client(priority), size, priority=priority)


def _client(priority: int) -> str:
    """C's callers have no names, so each priority is a client: what is reclaimed first is decided by client."""
    name = CLIENT if priority == 0 else f"{CLIENT}-{priority}"
    return the_memory().client(name).name


def free_overcommit_memory(ptr: int | None) -> None:
    """free(NULL) is nothing; a pointer that was not allocated is an error for last_error()."""
    if ptr is not None:
        _free(ptr)


@c_int
def _free(ptr: int) -> None:
    the_memory().free(ptr)


def get_overcommit_stats() -> dict[str, float]:
    """By name; empty before init."""
    admission = _Overcommit.admission
    if admission is None:
        return {}
    the_memory().accounting.tell()
    accounts = list(admission.accounts.values())
    used = sum(account.nr_used for account in accounts)
    return {
        "physical_bytes": admission.physical_bytes,
        "ratio": admission.ratio_percent / 100,
        "granted_bytes": admission.nr_granted,
        "used_bytes": used,
        "expected_bytes": used + admission.together.growth_bytes(accounts, admission.policy),
        "supply_bytes": admission.supply_bytes(),
        "compressibility": round(admission.measured_compressibility, 3),
        **admission.events,
    }


def print_overcommit_stats() -> None:
    stats = get_overcommit_stats()
    print("Memory overcommit:" if stats else "Memory overcommit: not initialized")
    for name, value in stats.items():
        print(f"  {name:16} {value}")


def cleanup_memory_overcommit() -> None:
    """Frees everything."""
    if _Overcommit.admission is not None:
        _Overcommit.admission = None
        use_memory(None)
