# SPDX-License-Identifier: GPL-2.0-only
"""Which faults the emulated hardware will have: what breaks, at which move, how often.

Each kind of fault has one point. `times` works as in the kernel's fault-injection: 0 is off, -1 never runs
out. A batch meets at most one fault, the earliest armed one; a point beyond the end of the batch stays armed
for a longer one. What each does to the batch:

    dpu_fault   the DPU stops before move k and reports a fault
    timeout     the DPU stops answering before move k; nothing but the retire counter can be read
    partial     the program returns before move k as if all was well
    corrupt     bit `bit` of the page that move k wrote is flipped before it is read back
    rank_lost   the rank disappears before move k and stays away until it is revived
"""

import errno
import threading
from dataclasses import dataclass, field
from enum import StrEnum


class FaultKind(StrEnum):
    DPU_FAULT = "dpu_fault"
    TIMEOUT = "timeout"
    PARTIAL = "partial"
    CORRUPT = "corrupt"
    RANK_LOST = "rank_lost"


@dataclass
class FaultPoint:
    """When one kind of fault happens. A field set outside its range is OSError(EINVAL), nothing changed."""

    move: int = 0
    """Index of the move in its batch, from 0."""
    times: int = 0
    """How many more batches meet it; -1 for all of them."""
    bit: int = 0
    """`corrupt` only: which bit of the page, counted modulo the page's size."""

    def __setattr__(self, name: str, value: int) -> None:
        lowest = -1 if name == "times" else 0
        if value < lowest:
            raise OSError(errno.EINVAL, f"{name} must be at least {lowest}")
        super().__setattr__(name, value)


@dataclass(frozen=True)
class Fault:
    """One fault that a batch meets."""

    kind: FaultKind
    move: int
    bit: int = 0


@dataclass(frozen=True)
class FaultPlan:
    """The armed faults; one plan serves all ranks, whose workers take from it."""

    dpu_fault: FaultPoint = field(default_factory=FaultPoint)
    timeout: FaultPoint = field(default_factory=FaultPoint)
    partial: FaultPoint = field(default_factory=FaultPoint)
    corrupt: FaultPoint = field(default_factory=FaultPoint)
    rank_lost: FaultPoint = field(default_factory=FaultPoint)
    points: dict[FaultKind, FaultPoint] = field(default_factory=dict, init=False, repr=False)
    """The same by kind."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.points.update((kind, getattr(self, kind.value)) for kind in FaultKind)

    def clear(self) -> None:
        """Disarm everything."""
        for point in self.points.values():
            point.times = 0

    def take(self, nr_moves: int) -> Fault | None:
        """The fault that a batch of `nr_moves` meets, used up by one; None if it meets none."""
        with self._lock:
            armed = [(point, kind) for kind, point in self.points.items() if point.times and point.move < nr_moves]
            if not armed:
                return None
            point, kind = min(armed, key=lambda entry: entry[0].move)
            if point.times > 0:
                point.times -= 1
            return Fault(kind, point.move, point.bit)
