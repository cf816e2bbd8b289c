# SPDX-License-Identifier: MIT
"""The C names of swap: what is behind init_swap_system(), and what it counts."""

from typing import Any

from dpud.gpu.clock import Clock
from dpud.gpu.facade_base import has_memory, the_memory
from dpud.gpu.swap.module import SwapModule

TIER_TIMES = {"memory": 2, "nvme": 2, "ssd": 2, "hdd": 2}
"""Tiers behind the device, as multiples of its size."""
_HEADERS = 17 / 16
"""Room for what swap writes along with pages of 2 KiB and more (slots.py)."""


def default_swap(device_bytes: int, clock: Clock) -> SwapModule:
    """Tiers in temporary files, eight times as much as the device. Raises OSError."""
    sizes = {name: max(1 << 20, int(device_bytes * times * _HEADERS)) for name, times in TIER_TIMES.items()}
    return SwapModule.with_tiers(sizes, clock)


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
