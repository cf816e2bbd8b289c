# SPDX-License-Identifier: GPL-2.0-only
"""Which faults the emulated hardware will have: what breaks, at which move, in which batches.

Each kind has one point with the kernel's fault-injection knobs (kernelsim.fault_inject). A batch meets at most one
fault, the earliest by its move; the points behind it are not asked. What each does to the batch:

    dpu_fault        the DPU stops before move k and reports a fault
    timeout          the DPU stops answering before move k; nothing but the retire counter can be read
    partial          the program returns before move k as if all was well
    corrupt          bit `bit` of the page that move k wrote is flipped before it is read back
    rank_lost        the rank disappears before move k and stays away until it is revived
    lost_completion  all moves are done, but the host never hears of it; it gives up after the result timeout

Faults are drawn when a batch is submitted, so that with several ranks the same seed still hits the same batches.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from kernelsim.attr import Attr, Int
from kernelsim.fault_inject import BatchFaultAttr


class FaultKind(StrEnum):
    DPU_FAULT = "dpu_fault"
    TIMEOUT = "timeout"
    PARTIAL = "partial"
    CORRUPT = "corrupt"
    RANK_LOST = "rank_lost"
    LOST_COMPLETION = "lost_completion"


class CorruptAttr(BatchFaultAttr):
    """Corruption also says which bit."""

    bit = Attr(Int(0, 2**31 - 1), 0, doc="Which bit of the page flips, counted modulo the page's size.")


@dataclass(frozen=True)
class Fault:
    """One fault that a batch meets."""

    kind: FaultKind
    move: int
    bit: int = 0


class FaultPlan:
    """The fault points of all ranks, `points` by kind. Safe to take from on several threads."""

    def __init__(self) -> None:
        self.corrupt = CorruptAttr("fail_corrupt")
        self.points: dict[FaultKind, BatchFaultAttr] = {
            kind: self.corrupt if kind is FaultKind.CORRUPT else BatchFaultAttr(f"fail_{kind}") for kind in FaultKind
        }
        self._lock = threading.Lock()

    def arm(self, kind: FaultKind, move: int = 0, times: int = 1, bit: int = 0) -> None:
        """Let the next `times` batches that come as far as `move` meet that fault; -1: all of them."""
        self.points[kind].arm(move, times)
        if kind is FaultKind.CORRUPT:
            self.corrupt.bit = bit

    def report_to(self, log: Callable[[str], object]) -> None:
        """Where injected faults are logged."""
        for point in self.points.values():
            point.report = log

    def clear(self) -> None:
        """Disarm everything."""
        for point in self.points.values():
            point.probability = point.nth = 0

    def take(self, nr_moves: int) -> Fault | None:
        """The fault that a batch of `nr_moves` meets, counted; None if it meets none."""
        armed = [(kind, point) for kind, point in self.points.items() if point.armed]
        if not armed:
            return None
        with self._lock:
            for kind, point in sorted(armed, key=lambda entry: entry[1].move):
                if point.should_fail(nr_moves):
                    return Fault(kind, point.move, self.corrupt.bit)
        return None
