# SPDX-License-Identifier: GPL-2.0-only
"""/sys/kernel/debug/dpu_compact/fail_KIND/: break the device on purpose, in the manner of the kernel's fault injection.

echo 64 > fail_dpu_fault/move      the batch breaks before its 65th move
echo 1 > fail_dpu_fault/times      the next batch that long meets it; -1: every one; 0: off
echo 1 > revive                    bring lost ranks back
"""

from dpud.dpu.driver import DpuDriver
from dpud.dpu.faults import FaultKind, FaultPlan
from dpud.dpu.rank import RankState
from kernelsim.attr import Attr, Int, Kobject, Registry, Trigger

DEBUGFS_PATH = "/sys/kernel/debug/dpu_compact"
_INT_MAX = 2**31 - 1


class FailPoint(Kobject):
    """One kind of fault."""

    move = Attr(Int(0, _INT_MAX), doc="Index of the move that the fault comes before, from 0.")
    times = Attr(Int(-1, _INT_MAX), doc="How many more batches meet the fault; 0 is off, -1 never runs out.")

    def __init__(self, faults: FaultPlan, kind: FaultKind) -> None:
        self._point = faults.points[kind]

    @move.show
    def _move_show(self) -> int:
        return self._point.move

    @move.store
    def _move_store(self, value: int) -> None:
        self._point.move = value

    @times.show
    def _times_show(self) -> int:
        return self._point.times

    @times.store
    def _times_store(self, value: int) -> None:
        self._point.times = value


class FailCorrupt(FailPoint):
    """Corruption also says which bit."""

    bit = Attr(Int(0, _INT_MAX), doc="Which bit of the page flips, counted modulo the page's size.")

    @bit.show
    def _bit_show(self) -> int:
        return self._point.bit

    @bit.store
    def _bit_store(self, value: int) -> None:
        self._point.bit = value


class Revive(Kobject):
    """The way back for ranks that were lost."""

    revive = Attr(Trigger(), doc="Write anything: every lost rank is back.")

    def __init__(self, driver: DpuDriver) -> None:
        self._driver = driver

    @revive.store
    def _revive(self, _text: str) -> None:
        for rank in self._driver.pool.ranks:
            if rank.state is RankState.LOST:
                rank.revive()


def add_fault_files(registry: Registry, driver: DpuDriver) -> None:
    """Show the fault plan of a driver."""
    registry.add(DEBUGFS_PATH, Revive(driver))
    for kind in FaultKind:
        point = FailCorrupt if kind is FaultKind.CORRUPT else FailPoint
        registry.add(f"{DEBUGFS_PATH}/fail_{kind.value}", point(driver.faults, kind))
