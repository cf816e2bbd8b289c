# SPDX-License-Identifier: GPL-2.0-only
"""/proc/sys/vm/percpu_pagelist_high_fraction: how long per-CPU page lists may grow (mm/page_alloc.c).

Only an imported machine has such lists (pcp.py), so only there is the file. 0, the default, leaves their limits to the
kernel: from the zone's low watermark to 1/8 of its pages, shared out over the node's CPUs. A fraction N makes it 1/N,
fixed.

What the imported machine came with stays in force until the first write.
"""

import errno
from collections.abc import Sequence
from typing import Any

from kernelsim.attr import Attr, Int, Kobject
from kernelsim.mmzone import WMARK_LOW, Mem

MIN_PERCPU_PAGELIST_HIGH_FRACTION = 8


def zone_highsize(zone: Any, batch: int, nr_cpus: int, high_fraction: int) -> int:
    """Pages that one CPU's lists of a zone may hold; `nr_cpus` share the zone."""
    total = int(zone["managed"]) // high_fraction if high_fraction else int(zone["watermark"][WMARK_LOW])
    return max(total // nr_cpus, batch << 2)


class PagesetSysctl(Kobject):
    """`cpus`: CPU numbers by node."""

    percpu_pagelist_high_fraction = Attr(
        Int(0, 2**31 - 1), 0, doc="0, or N >= 8: each zone's per-CPU lists may hold 1/N of its pages in all."
    )

    def __init__(self, mem: Mem, cpus: Sequence[Sequence[int]]) -> None:
        self.mem = mem
        self.cpus = cpus

    @percpu_pagelist_high_fraction.stored
    def _set(self, _old: int, new: int) -> None:
        if 0 < new < MIN_PERCPU_PAGELIST_HIGH_FRACTION:
            raise OSError(errno.EINVAL, "less than 8")
        for number, zone in enumerate(self.mem.zones):
            nr_cpus = len(self.cpus[int(zone["node"])]) or sum(map(len, self.cpus))
            for pageset in self.mem.pagesets[number]:
                batch = int(pageset["batch"])
                pageset["high_min"] = zone_highsize(zone, batch, nr_cpus, new)
                pageset["high_max"] = zone_highsize(zone, batch, nr_cpus, new or MIN_PERCPU_PAGELIST_HIGH_FRACTION)
