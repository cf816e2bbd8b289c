# SPDX-License-Identifier: GPL-2.0-only
"""/sys/kernel/debug/dpu_compact/fail_KIND/: break the device on purpose, in the manner of the kernel's fault injection.

echo 64 > fail_dpu_fault/move           the batch breaks before its 65th move
echo 100 > fail_dpu_fault/probability   every batch that long meets it, as often as `times` says (once)
echo 3 > fail_timeout/nth               the third batch from now on meets that one
echo 1 > revive                         bring lost ranks back

The fault points of the kernel's own side (fail_page_*) are in kernelsim.dpu_compact_inject.
"""

from collections.abc import Callable

from dpud.dpu.driver import DpuDriver
from dpud.dpu.rank import RankState
from kernelsim.attr import Attr, Kobject, Registry, Trigger

DEBUGFS_PATH = "/sys/kernel/debug/dpu_compact"


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


def add_fault_files(registry: Registry, driver: DpuDriver, log: Callable[[str], object] | None = None) -> None:
    """Show the fault plan of a driver; injected faults go to `log`, the kernel's printk."""
    registry.add(DEBUGFS_PATH, Revive(driver))
    for point in driver.faults.points.values():
        registry.add(f"{DEBUGFS_PATH}/{point.name}", point)
    if log:
        driver.faults.report_to(log)
