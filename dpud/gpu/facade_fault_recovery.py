# SPDX-License-Identifier: MIT
"""The C names of fault recovery.

`init_fault_recovery(policy)` adds it to the memory that init_swap_system, init_unified_address_space or
init_memory_overcommit made. Without the first of these there are no stores behind the device, so that only checkpoints
have copies.

    init_swap_system(64 << 20, 4096, 0.8)
    init_fault_recovery(RECOVERY_MIGRATE)
    ptr = allocate_gpu_memory(1 << 20)
    create_memory_checkpoint()
    inject_memory_fault("bit bits=2")
    print_fault_recovery_stats()
"""

import errno
from typing import Any

from dpud.gpu.errors import GpuError
from dpud.gpu.facade_base import CLIENT, Ref, c_int, has_memory, the_memory
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.recovery import Policy

RECOVERY_RETRY = 0
RECOVERY_REMAP = 1
RECOVERY_MIGRATE = 2
RECOVERY_FAILOVER = 3
RECOVERY_CHECKPOINT_RESTORE = 4

_POLICIES = dict(enumerate(Policy))


def _the_fault() -> FaultModule:
    """Raises GpuError(ENODEV)."""
    fault = the_memory().fault
    if not isinstance(fault, FaultModule):
        raise GpuError(errno.ENODEV, "init_fault_recovery was not called")
    return fault


def _policy(number: int) -> Policy:
    if number not in _POLICIES:
        raise GpuError(errno.EINVAL, f"no recovery policy {number}")
    return _POLICIES[number]


@c_int
def init_fault_recovery(policy: int = RECOVERY_MIGRATE) -> None:
    """ENODEV where there is no memory, EBUSY where it is done already, EINVAL for a policy that is none."""
    chosen = _policy(policy)
    if the_memory().fault is not None:
        raise GpuError(errno.EBUSY, "initialized already")
    FaultModule(the_memory()).recovery.policy = chosen


@c_int
def set_recovery_policy(policy: int) -> None:
    _the_fault().recovery.policy = _policy(policy)


@c_int
def inject_memory_fault(what: str) -> None:
    """`bit`, `row`, `bank` or `device`, and key=value pairs (fault/injector.py)."""
    _the_fault().inject(what)


@c_int
def create_memory_checkpoint() -> None:
    """All of the program's memory as it is now; an increment where there is one to add to."""
    _the_fault().checkpoints.create(CLIENT)


@c_int
def restore_memory_checkpoint() -> None:
    """Back to the last one. ENOENT where there is none that is whole."""
    if not _the_fault().roll_back(CLIENT):
        raise GpuError(errno.ENOENT, "no checkpoint")


@c_int
def scrub_memory() -> None:
    """Look through all memory once."""
    scrubber = _the_fault().scrubber
    scrubber.scrub(scrubber.total_bytes)


@c_int
def acknowledge_fault_events() -> None:
    _the_fault().events.acknowledge()


@c_int
def predict_faults(banks: Ref[list[int]]) -> None:
    """Banks of device 0 that are predicted to have an uncorrectable error within a week."""
    predictor = _the_fault().predictors[0]
    predictor.learnt.expire(the_memory().clock.now_ns())
    banks.value = predictor.learnt.alarmed()


def cleanup_fault_recovery() -> None:
    """Memory goes on without it: what ECC cannot correct is an error for who reads it."""
    if has_memory() and isinstance(the_memory().fault, FaultModule):
        the_memory().fault.detach()


def get_fault_recovery_stats() -> dict[str, Any]:
    """Counters, the policy, events not acknowledged; precision and recall of predictions. Empty before init."""
    fault = the_memory().fault if has_memory() else None
    if not isinstance(fault, FaultModule):
        return {}
    board = fault.predictors[0].learnt
    return {
        "policy": fault.recovery.policy.value,
        **fault.stats(),
        "events": fault.events.nr_events,
        "unacknowledged": fault.events.nr_open,
        "prediction_precision": board.precision,
        "prediction_recall": board.recall,
    }


def print_fault_recovery_stats() -> None:
    """To stdout: one line for each."""
    stats = get_fault_recovery_stats()
    print("Fault recovery:", stats.pop("policy", "not initialized"))
    for name, value in stats.items():
        print(f"  {name:<26} {value:12.3f}" if isinstance(value, float) else f"  {name:<26} {value:12}")
