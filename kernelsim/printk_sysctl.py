# SPDX-License-Identifier: GPL-2.0-only
"""/proc/sys/kernel/printk and its kin: who may log, how much, and what reaches the console (kernel/printk/sysctl.c)."""

from kernelsim.attr import Attr, Bool, Int, Kobject, StrictVector, Word
from kernelsim.kinds import INT_MAX, INT_MIN
from kernelsim.printk import DEVKMSG_OFF, DEVKMSG_ON, DEVKMSG_RATELIMIT, Printk

HZ = 250
_NS = 1_000_000_000


class PrintkSysctl(Kobject):
    """The sysctls of one log."""

    printk = Attr(
        StrictVector(4),
        doc="Log levels: what is below the first goes to the console; default message, lowest and default first.",
        mode=0o644,
    )
    printk_ratelimit = Attr(
        Int(INT_MIN // HZ, INT_MAX // HZ),
        5,
        doc="Seconds in which a burst of recurring messages may be logged; 0: any number.",
        late=True,
    )
    printk_ratelimit_burst = Attr(Int(INT_MIN, INT_MAX), 10, doc="How many recurring messages are a burst.", late=True)
    printk_devkmsg = Attr(
        Word(DEVKMSG_ON, DEVKMSG_OFF, DEVKMSG_RATELIMIT),
        DEVKMSG_RATELIMIT,
        doc="What users may write to /dev/kmsg: everything, nothing, or 10 lines in 5 s for each open file.",
    )
    dmesg_restrict = Attr(Bool(), 0, doc="1: only root may open /dev/kmsg for reading.", late=True)

    def __init__(self, log: Printk) -> None:
        self.log = log

    @printk.show
    def _printk(self) -> tuple[int, ...]:
        return tuple(self.log.levels)

    @printk.store
    def _set_levels(self, levels: tuple[int, ...]) -> None:
        self.log.levels[: len(levels)] = levels

    @printk_ratelimit.stored
    def _set_interval(self, _old: int, seconds: int) -> None:
        self.log.printk_ratelimit.interval_ns = seconds * _NS

    @printk_ratelimit_burst.stored
    def _set_burst(self, _old: int, burst: int) -> None:
        self.log.printk_ratelimit.burst = burst

    @printk_devkmsg.stored
    def _set_devkmsg(self, _old: str, new: str) -> None:
        self.log.devkmsg_log = new

    @dmesg_restrict.stored
    def _restrict(self, _old: int, new: int) -> None:
        self.log.dmesg_restrict = bool(new)
