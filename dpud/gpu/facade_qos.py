# SPDX-License-Identifier: MIT
"""The C names of quality of service.

`init_memory_qos(total_bandwidth_mbps, policy)`: all clients together move at most so many MB/s (10^6 bytes/s) from now
on, in the memory of the other init functions, whichever is called first. `submit_memory_request` queues a request at a
priority level, for the client of a number; it moves real bytes when its turn comes. C's library has a thread for that.
Here time is the data path's own: `process_memory_requests()` does what is queued, at the times that the scheduler
grants, and so does `get_qos_stats()`, before it prints.
"""

import errno
from typing import Any

from dpud.gpu.errors import GpuError
from dpud.gpu.facade_base import attachments, c_int, has_memory, the_memory
from dpud.gpu.performance import set_log_level
from dpud.gpu.qos.module import QosModule
from dpud.gpu.traffic import TrafficCounts

BANDWIDTH_POLICY_FAIR = "fair"
BANDWIDTH_POLICY_PRIORITY = "priority"
BANDWIDTH_POLICY_ADAPTIVE = "adaptive"

QOS_LEVEL_CRITICAL, QOS_LEVEL_HIGH, QOS_LEVEL_NORMAL, QOS_LEVEL_LOW, QOS_LEVEL_BACKGROUND = range(5)
ACCESS_TYPE_READ, ACCESS_TYPE_WRITE = range(2)

LATENCY_TARGETS_US = (1_000, 5_000, 20_000, 0, 0)
"""What BANDWIDTH_POLICY_ADAPTIVE pursues, by level, until it is told otherwise. Uncalibrated."""

_BYTES_PER_MB = 1_000_000
_NS_PER_US = 1000


class _Qos:
    module: QosModule | None = None


def _the_module() -> QosModule:
    if _Qos.module is None:
        raise GpuError(errno.ENODEV, "init_memory_qos was not called")
    return _Qos.module


@c_int
def init_memory_qos(total_bandwidth_mbps: int, policy: str) -> None:
    """EBUSY if it was called before; EINVAL for no bandwidth or a policy that is none."""
    if _Qos.module is not None:
        raise GpuError(errno.EBUSY, "initialized already")
    if total_bandwidth_mbps <= 0:
        raise GpuError(errno.EINVAL, f"{total_bandwidth_mbps} MB/s")
    set_log_level()
    module = QosModule()
    module.set_policy(policy)
    module.set_total(total_bandwidth_mbps * _BYTES_PER_MB)
    for level, target_us in enumerate(LATENCY_TARGETS_US):
        module.set_level(level, target_ns=target_us * _NS_PER_US)
    _Qos.module = module
    attachments["qos"] = module.attach
    if has_memory():
        module.attach(the_memory())


@c_int
def submit_memory_request(address: int, size: int, type: int, qos_level: int, client_id: int) -> None:
    """Queue an access to allocated memory. A write marks the bytes as written and leaves them as they are.

    EFAULT where not all of it is allocated, EINVAL for a type or level that is none, or no bytes.
    """
    module, memory = _the_module(), the_memory()
    if size <= 0 or type not in (ACCESS_TYPE_READ, ACCESS_TYPE_WRITE):
        raise GpuError(errno.EINVAL, f"{size} bytes, access type {type}")
    region = memory.space.regions.find(address)
    if region is None or address + size > region.end:
        raise GpuError(errno.EFAULT, f"not all of {size} bytes at {address:#x} are allocated")
    owner, client = region.client, client_name(client_id)
    moved = size if type == ACCESS_TYPE_READ else 2 * size

    def access() -> None:
        data = memory.read(owner, address, size)
        if type == ACCESS_TYPE_WRITE:
            memory.write(owner, address, data)

    module.submit(client, qos_level, moved, access)


def client_name(client_id: int) -> str:
    """What the client of a number is called in statistics."""
    return f"client-{client_id}"


def process_memory_requests() -> int:
    """Do all that is queued -> how many requests. Raises GpuError(ENODEV) before init."""
    return _the_module().run()


@c_int
def set_client_qos(client_id: int, reservation_mbps: int = 0, limit_mbps: int = 0, share: int = 100) -> None:
    """What a client is promised, in MB/s; 0 for no reservation and no limit. EBUSY, EINVAL as QosModule.set_client."""
    rates = {"reservation": reservation_mbps * _BYTES_PER_MB, "limit": limit_mbps * _BYTES_PER_MB}
    _the_module().set_client(client_name(client_id), **rates, share=share)


def get_qos_stats() -> dict[str, Any]:
    """Do what is queued; print and return totals, then a row for each level and client. Empty before init."""
    if _Qos.module is None:
        return {}
    _Qos.module.run()
    stats = _stats(_Qos.module)
    print(f"Memory QoS: {stats['total_mbps']} MB/s, {stats['policy']}")
    for name in ("by_constraint", "by_weight", "owed"):
        print(f"  {name:<14} {stats[name]}")
    for kind in ("levels", "clients"):
        for name, row in stats[kind].items():
            print(f"  {kind[:-1]:<7} {name:<12}", " ".join(f"{key} {value}" for key, value in row.items()))
    return stats


def _stats(module: QosModule) -> dict[str, Any]:
    scheduler = module.scheduler
    levels = {
        level: {
            "requests": stat.counts["granted"],
            "bytes": stat.counts["granted_bytes"],
            "p50_us": stat.waits.quantile(0.5) // _NS_PER_US,
            "p99_us": stat.waits.quantile(0.99) // _NS_PER_US,
            "missed": stat.counts["missed"],
        }
        for level, stat in enumerate(scheduler.stats)
    }
    clients = {name: {"bytes": nr} for name, nr in scheduler.granted_bytes.items()}
    total = {"policy": scheduler.policy.name, "total_mbps": scheduler.total.rate // _BYTES_PER_MB}
    return total | dict(scheduler.counts) | {"levels": levels, "clients": clients}


def cleanup_memory_qos() -> None:
    """What is queued is dropped; bytes move unhindered from now on."""
    if _Qos.module is None:
        return
    _Qos.module = None
    attachments.pop("qos", None)
    if has_memory():
        the_memory().residency.traffic = TrafficCounts()
