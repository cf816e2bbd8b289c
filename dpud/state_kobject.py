# SPDX-License-Identifier: GPL-2.0-only
"""/sys/kernel/dpud_state: how a machine that is kept is kept; there where a state directory is configured."""

from typing import TYPE_CHECKING

from kernelsim.attr import Attr, Int, Kobject, Text

if TYPE_CHECKING:
    from dpud.checkpoint_keeper import Keeper

PATH = "/sys/kernel/dpud_state"


class StateFiles(Kobject):
    """`keeper` is who makes checkpoints; nobody while turns are done again."""

    checkpoint = Attr(
        Int(1, 1), doc="Write 1: write the whole machine down now. Returns at once; `stats` says when it is done."
    )
    stats = Attr(
        Text(),
        doc="The journal that grows, the last checkpoint of this daemon: its number, bytes, us for which it held the "
        "machine, ms until it was on disk. One `name value` line each.",
        mode=0o444,
    )
    problem = Attr(
        Text(), doc="What the next checkpoint waits for, or why the last one failed; else empty.", mode=0o444
    )

    def __init__(self) -> None:
        self.keeper: Keeper | None = None

    @checkpoint.store
    def _ask(self, _one: int) -> None:
        if self.keeper is not None:
            self.keeper.ask()

    @stats.show
    def _stats(self) -> str:
        found = {} if self.keeper is None else self.keeper.figures()
        return "".join(f"{name} {number}\n" for name, number in found.items())

    @problem.show
    def _problem(self) -> str:
        return "" if self.keeper is None or not self.keeper.stats.problem else f"{self.keeper.stats.problem}\n"
