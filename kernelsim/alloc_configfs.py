# SPDX-License-Identifier: GPL-2.0-only
"""/sys/kernel/config/kernelsim/alloc: allocations straight from the page allocator, made with mkdir and echo.

    mkdir big                              somebody who allocates; its name is the `comm` of log lines
    echo 9 > big/order                     2^9 pages at a time
    echo 'GFP_KERNEL|__GFP_NORETRY' > big/gfp
    echo 100 > big/count                   how many for each `alloc`
    echo 1 > big/alloc                     does it (N: that many times `count`), and returns when it is done
    cat big/allocated                      blocks held
    cat big/result                         the last `alloc`: outcomes by what it took, and latencies
    echo 1 > big/free                      gives all of them back
    rmdir big                              the same

A write to `alloc` fails with ENOMEM only if it could have no block at all. Blocks that it got stay, whatever ends it.
"""

import errno
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kernelsim.alloc_slowpath import AllocContext
from kernelsim.attr import Attr, ConfigGroup, Int, Kobject, Text, Trigger
from kernelsim.gfp import format_gfp, parse_gfp
from kernelsim.mm_configfs import check_name
from kernelsim.mm_types import LongOp
from kernelsim.mmzone import MAX_PAGE_ORDER

if TYPE_CHECKING:
    from kernelsim.machine import Machine

MAX_COUNT = 1 << 24
YIELD_EVERY = 32  # allocations from the free lists between two slices
_PERCENTILES = (50, 95, 99)
OUTCOMES = ("freelist", "reclaim", "compact_async", "compact", "dpu")
"""What the last thing was that a successful request had to wait for; freelist: nothing."""


class AllocResult:
    """The requests of one write to `alloc`."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wall_ns: list[int] = []
        self.device_ns: list[int] = []

    @property
    def nr_allocated(self) -> int:
        return sum(self.outcomes[name] for name in OUTCOMES)

    def add(self, ac: AllocContext, success: bool, wall_ns: int) -> None:
        self.outcomes[ac.outcome if success else "failed"] += 1
        self.wall_ns.append(wall_ns)
        self.device_ns.append(ac.device_ns)

    def text(self) -> str:
        """`name value` lines."""
        lines = [("requests", len(self.wall_ns)), ("allocated", self.nr_allocated), ("failed", self.outcomes["failed"])]
        lines += [(f"by_{name}", self.outcomes[name]) for name in OUTCOMES]
        for name, values in (("wall_ns", self.wall_ns), ("device_ns", self.device_ns)):
            some = values or [0]
            ranks = np.percentile(some, _PERCENTILES, method="inverted_cdf")
            lines += [(f"{name}_p{p}", int(value)) for p, value in zip(_PERCENTILES, ranks, strict=True)]
            lines.append((f"{name}_max", max(some)))
        return "".join(f"{name} {value}\n" for name, value in lines)


class AllocItem(Kobject):
    """One who allocates."""

    order = Attr(Int(0, MAX_PAGE_ORDER), 0, doc="Size of each allocation: 2^order pages.")
    gfp = Attr(Text(), "GFP_KERNEL", doc="GFP flags by name or number, joined by `|`.")
    count = Attr(Int(1, MAX_COUNT), 1, doc="How many allocations each `alloc` makes.")
    node = Attr(Int(0, 1023), 0, doc="The preferred node.")
    alloc = Attr(Int(1, MAX_COUNT), doc="N: make N times `count` allocations; ENOMEM if none could be had.")
    allocated = Attr(Text(), doc="How many blocks are held.")
    result = Attr(
        Text(),
        doc="The last `alloc`: outcomes by what they took; latency percentiles as measured here (wall_ns), and of "
        "modelled time spent in the DPU and on its mapping updates (device_ns).",
    )
    free = Attr(Trigger(), doc="Write anything: give all blocks back.")

    def __init__(self, machine: "Machine", name: str) -> None:
        self.machine = machine
        self.name = name
        self._pfns: list[int] = []
        self._last = AllocResult()
        self._ended = False

    @gfp.stored
    def _check_gfp(self, _old: str, new: str) -> None:
        self.gfp = format_gfp(parse_gfp(new))

    @node.stored
    def _check_node(self, _old: int, new: int) -> None:
        if new >= self.machine.mem.nr_nodes:
            raise OSError(errno.EINVAL, "no such node")

    @allocated.show
    def _nr_allocated(self) -> str:
        return str(len(self._pfns))

    @result.show
    def _result(self) -> str:
        return self._last.text()

    @alloc.store
    def _alloc(self, times: int) -> LongOp:
        gfp, order, nid = parse_gfp(self.gfp), self.order, self.node
        result = self._last = AllocResult()
        for number in range(times * self.count):
            ac = self.machine.slowpath.context(gfp, order, nid, self.name)
            yield from self._alloc_one(ac, result)
            if number % YIELD_EVERY == YIELD_EVERY - 1:
                yield None
        if result.nr_allocated == 0:
            raise OSError(errno.ENOMEM, "no block of this order")

    def _alloc_one(self, ac: AllocContext, result: AllocResult) -> LongOp:
        wall_ns = self.machine.clock.wall_ns
        begin_ns = wall_ns()
        pfn = yield from self.machine.slowpath.alloc(ac)
        if pfn >= 0:
            self.machine.direct_blocks.adopt(pfn, ac.order, ac.gfp)
            self._pfns.append(pfn)
        result.add(ac, pfn >= 0, wall_ns() - begin_ns)
        if self._ended:
            self.free_all()
            raise OSError(errno.ESRCH, "the directory was removed")

    @free.store
    def _free(self, _text: str) -> None:
        self.free_all()

    def free_all(self) -> None:
        for pfn in self._pfns:
            self.machine.direct_blocks.free(pfn)
        self._pfns.clear()

    def end(self) -> None:
        """The directory is gone; an `alloc` still under way ends at its next block."""
        self._ended = True
        self.free_all()


class AllocGroup(ConfigGroup):
    """The directory of all who allocate."""

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine

    def make_item(self, name: str) -> Kobject:
        check_name(name)
        return AllocItem(self.machine, name)

    def drop_item(self, name: str, kobj: Kobject) -> None:
        assert isinstance(kobj, AllocItem)
        kobj.end()
