# SPDX-License-Identifier: MIT
"""The C names of defragmentation.

`init_defragmentation_manager(0.3, 60)`: where more than 30 % of a device's free memory is in blocks smaller than 2 MiB,
pages are put together, looked at every 60 s. It is in the memory of the other init functions, whichever is called
first. C's library has a thread for that. Here time is the data path's own: whenever something is allocated or freed, it
is looked at whether the interval is over; `run_defragmentation()` does not wait for it.
"""

import errno
from typing import Any

from dpud.gpu.defrag.module import DefragModule
from dpud.gpu.errors import GpuError
from dpud.gpu.facade_base import attachments, c_int, has_memory, the_memory
from dpud.gpu.performance import set_log_level


class _Defrag:
    module: DefragModule | None = None


def _the_module() -> DefragModule:
    if _Defrag.module is None:
        raise GpuError(errno.ENODEV, "init_defragmentation_manager was not called")
    the_memory()
    return _Defrag.module


@c_int
def init_defragmentation_manager(threshold: float, interval_seconds: int) -> None:
    """EBUSY if it was called before; EINVAL for a threshold that is not from 0 to 1, or an interval below 0."""
    if _Defrag.module is not None:
        raise GpuError(errno.EBUSY, "initialized already")
    set_log_level()
    module = DefragModule(threshold, interval_seconds)
    _Defrag.module = module
    attachments["defrag"] = module.attach
    if has_memory():
        module.attach(the_memory())


@c_int
def run_defragmentation() -> None:
    """A pass now, whatever the threshold. ENODEV before init, or where there is no memory."""
    _the_module().run()


@c_int
def pin_gpu_memory(address: int, size: int, owner: str, reason: str = "") -> None:
    """Keep pages in their frames. EFAULT where not all of it is allocated, ENOMEM where they cannot be brought in."""
    the_memory().pin(address, size, owner, reason)


@c_int
def unpin_gpu_memory(owner: str) -> None:
    """All pins of an owner. EINVAL where it has none."""
    pins = the_memory().residency.pins
    gone = [pin for pin in pins if pin.owner == owner]
    if not gone:
        raise GpuError(errno.EINVAL, f"{owner} has no pins")
    for pin in gone:
        pins.remove(pin)


def get_defragmentation_stats() -> dict[str, Any]:
    """Counters, limits, the longest pause; the four metrics by location. Empty before init, or without memory."""
    module = _Defrag.module
    if module is None or not has_memory():
        return {}
    locations = {
        location.name: vars(module.fragmentation(location)) | {"mean_run": module.locality.mean_run(location)}
        for location in module.memory.locations
    }
    return {
        "threshold": module.threshold,
        "interval_s": module.interval_s,
        **module.relocator.stats,
        "cost": module.cost,
        "longest_pause_ns": module.effort.longest_ns,
        "slices_over_limit": module.effort.nr_over_limit,
        "pins": len(module.pins),
        "last_failure": module.failures[-1][1] if module.failures else "",
        "locations": locations,
    }


def print_defragmentation_stats() -> None:
    """To stdout: one line for each."""
    stats = get_defragmentation_stats()
    print("Defragmentation:" if stats else "Defragmentation: not initialized")
    locations = stats.pop("locations", {})
    for name, value in stats.items():
        print(f"  {name:<18} {value:.3f}" if isinstance(value, float) else f"  {name:<18} {value}")
    for name, row in locations.items():
        print(f"  {name:<18}", " ".join(f"{key} {_shown(key, value)}" for key, value in row.items()))


def _shown(name: str, value: float) -> str:
    """As the module's files have it: an index is in thousandths."""
    if name.endswith("_index"):
        return f"{value / 1000:.3f}"
    return f"{value}" if isinstance(value, int) else f"{value:.3f}"


def cleanup_defragmentation_manager() -> None:
    """Pages stay where they are from now on; pins stay."""
    module, _Defrag.module = _Defrag.module, None
    attachments.pop("defrag", None)
    if module is not None and has_memory() and the_memory().defrag is module:
        module.detach()
