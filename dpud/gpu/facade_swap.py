# SPDX-License-Identifier: MIT
"""The C names of GPU memory whose pages can leave the device.

`init_swap_system(max_gpu_memory, page_size, swap_threshold)`: a device of that many bytes; once `swap_threshold` of it
is used, pages leave it in the background (background_swap() is one round of that). Behind it are tiers of system
memory, NVMe, SSD and HDD, eight times the device, and before them the pool of init_compression_system(), if that was
called before; it may grow as large as the device then.
"""

import errno
from typing import Any

from dpud.gpu.address_space.permissions import READ
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.clock import Clock, ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.facade_base import CLIENT, behind, c_int, c_pointer, has_memory, the_memory, use_memory
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.performance import set_log_level
from dpud.gpu.swap.module import SwapModule

TIER_TIMES = {"memory": 2, "nvme": 2, "ssd": 2, "hdd": 2}
"""Tiers behind the device, as multiples of its size."""
_HEADERS = 17 / 16
"""Room for what swap writes along with pages of 2 KiB and more (slots.py)."""


class _Swap:
    page_size = 4096
    limits_pool = False


@c_int
def init_swap_system(max_gpu_memory: int, page_size: int, swap_threshold: float) -> None:
    """EBUSY if there is memory already; EINVAL for values that make no sense."""
    if has_memory():
        raise GpuError(errno.EBUSY, "initialized already")
    if page_size not in (2048, 4096, 65536, 2 << 20) or not 0 < swap_threshold < 1 or max_gpu_memory < 4 * page_size:
        raise GpuError(errno.EINVAL, f"{max_gpu_memory} bytes, pages of {page_size}, threshold {swap_threshold}")
    set_log_level()
    clock = ManualClock()
    device = SimulatedDevice(DeviceProfile(memory_bytes=max_gpu_memory), clock)
    swap = _default_swap(max_gpu_memory, clock)
    memory = GpuMemory([device], clock=clock, **({"swap": swap.space} | behind))
    swap.attach(memory)
    pool = memory.store.pool
    if pool is not None and not pool.limit_bytes:
        pool.limit_bytes = max_gpu_memory
        _Swap.limits_pool = True
    marks = memory.residency.watermarks
    marks.low = round(100 * (1 - swap_threshold))
    marks.high = min(100, marks.low + 5)
    _Swap.page_size = page_size
    use_memory(memory)


def _default_swap(device_bytes: int, clock: Clock) -> SwapModule:
    """Tiers in temporary files, eight times as much as the device. Raises OSError."""
    sizes = {name: max(1 << 20, int(device_bytes * times * _HEADERS)) for name, times in TIER_TIMES.items()}
    return SwapModule.with_tiers(sizes, clock)


@c_pointer
def allocate_gpu_memory(size: int) -> int:
    """An address on the device; its bytes read as zeros."""
    return the_memory().allocate(CLIENT, size, RegionType.DEVICE, page_size=_Swap.page_size)


def free_gpu_memory(ptr: int | None) -> None:
    """free(NULL) is nothing; a pointer that was not allocated is an error for last_error()."""
    if ptr is not None:
        _free(ptr)


@c_int
def _free(ptr: int) -> None:
    the_memory().free(ptr, CLIENT)


@c_pointer
def access_gpu_memory(ptr: int) -> int:
    """The same address, once its page is on the device."""
    return the_memory().access(CLIENT, ptr, READ).va


def background_swap(budget_bytes: int = 1 << 30) -> int:
    """One round of background eviction -> bytes."""
    return the_memory().background(budget_bytes)


def cleanup_swap_system() -> None:
    """Frees everything; temporary files go. A pool of init_compression_system() is empty then, and still there."""
    if not has_memory():
        return
    memory = the_memory()
    for name in list(memory.clients):
        memory.remove_client(name)
    if isinstance(memory.watcher, SwapModule):
        memory.watcher.space.close()
    pool = memory.store.pool
    if pool is not None and _Swap.limits_pool:
        pool.limit_bytes = 0
    _Swap.limits_pool = False
    use_memory(None)


def get_swap_stats() -> dict[str, Any]:
    """Counters, device_bytes and what of it is used, and for each tier what it has and did. Empty before init."""
    swap = the_memory().watcher if has_memory() else None
    if not isinstance(swap, SwapModule):
        return {}
    device = the_memory().locations[0].frames
    tiers = {
        tier.name: {
            "size_bytes": tier.size_bytes,
            "used_bytes": tier.used_bytes,
            "pages": tier.nr_pages,
            "reads": tier.nr_reads,
            "writes": tier.nr_writes,
            "errors": tier.nr_errors,
        }
        for tier in swap.space.tiers
    }
    return {
        **swap.stats(),
        "device_bytes": device.nr_bytes,
        "device_used_bytes": device.nr_bytes - device.nr_free_bytes,
        "prefetch_accuracy": swap.accuracy.accuracy,
        "prefetch_coverage": swap.accuracy.coverage,
        "tiers": tiers,
    }


def print_swap_stats() -> None:
    """To stdout: counters, then one line a tier."""
    stats = get_swap_stats()
    print("Swap:", "not initialized" if not stats else "counters, then tiers")
    tiers = stats.pop("tiers", {})
    for name, value in stats.items():
        print(f"  {name:<20} {value:12.3f}" if isinstance(value, float) else f"  {name:<20} {value:12}")
    for name, row in tiers.items():
        print(f"  {name:<8}", " ".join(f"{key} {value}" for key, value in row.items()))
