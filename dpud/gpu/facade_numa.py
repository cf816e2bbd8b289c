# SPDX-License-Identifier: MIT
"""The C names of NUMA.

    init_numa_memory_manager()                     the nodes of this machine
    init_numa_memory_manager("four-node-cxl")      those of a topology file, or of one that comes with dpud

The memory of the other init functions is made in one piece, so if there is one its host is a single node. Called first,
this makes a memory whose host is divided into nodes, which init_unified_address_space then uses.
"""

import errno
from typing import Any

from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.facade_base import attachments, c_int, has_memory, the_memory, use_memory
from dpud.gpu.memory import HOST_PROFILE, GpuMemory
from dpud.gpu.numa import sysfs
from dpud.gpu.numa.module import NumaModule, host_nodes
from dpud.gpu.numa.topology import load
from dpud.gpu.performance import set_log_level


class _Numa:
    module: NumaModule | None = None


@c_int
def init_numa_memory_manager(topology: str | None = None) -> None:
    """EBUSY if it was called before; ENODEV where this machine has no nodes to show, EINVAL for a bad file."""
    if _Numa.module is not None:
        raise GpuError(errno.EBUSY, "initialized already")
    set_log_level()
    nodes = sysfs.read() if topology is None else load(topology)
    module = NumaModule(nodes)
    if not has_memory() and topology is not None:
        clock = ManualClock()
        use_memory(GpuMemory(host=host_nodes(nodes, HOST_PROFILE.memory_bytes, clock), clock=clock))
    if has_memory():
        module.attach(the_memory())
    attachments["numa"] = module.attach
    _Numa.module = module


@c_int
def set_numa_policy(policy: str) -> None:
    """`local`, `prefer:1`, `bind:0-1`, `interleave:0-3`, `weighted:0-3`. ENODEV before init, EINVAL."""
    _attached().placement.set_policy(policy)


def _attached() -> NumaModule:
    if _Numa.module is None or not has_memory() or the_memory().numa is None:
        raise GpuError(errno.ENODEV, "init_numa_memory_manager was not called, or there is no memory")
    return _Numa.module


def get_numa_stats() -> dict[str, Any]:
    """Nodes, the policy, and counters; only nodes before there is memory, and nothing before init."""
    if _Numa.module is None:
        return {}
    stats: dict[str, Any] = {"nodes": len(_Numa.module.topology.nodes)}
    if has_memory() and the_memory().numa is not None:
        stats |= {"policy": _Numa.module.placement.policy, "balancing": _Numa.module.balancer.rule}
        stats |= _Numa.module.stats()
    return stats


def print_numa_stats() -> None:
    """To stdout: one line for each."""
    print("NUMA:" if _Numa.module is not None else "NUMA: not initialized")
    for name, value in get_numa_stats().items():
        print(f"  {name:<20} {value:>12}")


def cleanup_numa_memory_manager() -> None:
    """Memory stays, and its pages where they are."""
    if _Numa.module is not None and has_memory() and the_memory().numa is not None:
        _Numa.module.detach()
    _Numa.module = None
    attachments.pop("numa", None)
