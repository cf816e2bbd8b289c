# SPDX-License-Identifier: GPL-2.0-only
"""What the log says when an allocation fails (mm/page_alloc.c warn_alloc, mm/show_mem.c).

The first line is the kernel's; the stack trace that follows it there is left out. Then come the counters that this
emulation keeps, in the kernel's lines. The rate is DEFINE_RATELIMIT_STATE's default (ratelimit.py).
"""

from collections.abc import Callable, Iterator

import numpy as np

from kernelsim.bitmap import format_list
from kernelsim.gfp import _GFP_NOWARN, format_gfp
from kernelsim.mmzone import (
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    WMARK_HIGH,
    WMARK_LOW,
    WMARK_MIN,
    Mem,
    migratetype_names,
)
from kernelsim.printk import KERN_WARNING, Printk
from kernelsim.ratelimit import Ratelimit

_KB = 4
_TYPE_LETTERS = {"Unmovable": "U", "Movable": "M", "Reclaimable": "E", "HighAtomic": "H", "CMA": "C", "Isolate": "I"}


class AllocFailure:
    """Reports of one machine."""

    def __init__(
        self, mem: Mem, printk: Printk, now_ns: Callable[[], int], hopeless: Callable[[int], bool] = lambda _nid: False
    ) -> None:
        """`hopeless(nid)`: kswapd has given the node up."""
        self.mem = mem
        self.printk = printk
        self.now_ns = now_ns
        self.hopeless = hopeless
        self._ratelimit = Ratelimit(
            now_ns, missed=lambda nr_missed: self._warn(f"warn_alloc: {nr_missed} callbacks suppressed")
        )

    def warn_alloc(self, gfp: int, order: int, comm: str) -> None:
        """Report a failed request, unless it has __GFP_NOWARN or there were too many."""
        if gfp & _GFP_NOWARN or not self._ratelimit():
            return
        nodes = format_list(range(self.mem.nr_nodes)).rstrip()
        self._warn(
            f"{comm}: page allocation failure: order:{order}, mode:{gfp:#x}({format_gfp(gfp)}), "
            f"nodemask=(null),cpuset=/,mems_allowed={nodes}"
        )
        for line in self.show_mem():
            self._warn(line)

    def _warn(self, line: str) -> None:
        self.printk(line, KERN_WARNING)

    def show_mem(self) -> Iterator[str]:
        """The lines from `Mem-Info:` on."""
        mem = self.mem
        yield "Mem-Info:"
        yield from self._totals()
        for nid in range(mem.nr_nodes):
            yield self._node(nid)
        populated = [zone for zone in range(len(mem.zones)) if mem.zones["present"][zone]]
        for zone in populated:
            yield from self._zone(zone)
        for zone in populated:
            yield self._blocks(zone)
        yield f"{int(mem.nodes['nr_file_pages'].sum())} total pagecache pages"
        present, managed = int(mem.zones["present"].sum()), int(mem.zones["managed"].sum())
        yield f"{present} pages RAM"
        yield f"{present - managed} pages reserved"

    def _totals(self) -> Iterator[str]:
        nodes = self.mem.nodes
        inactive_anon, active_anon, inactive_file, active_file, unevictable = nodes["nr_lru"].sum(axis=0)
        isolated_anon, isolated_file = nodes["nr_isolated_anon"].sum(), nodes["nr_isolated_file"].sum()
        yield f"active_anon:{active_anon} inactive_anon:{inactive_anon} isolated_anon:{isolated_anon}"
        yield f" active_file:{active_file} inactive_file:{inactive_file} isolated_file:{isolated_file}"
        yield f" unevictable:{unevictable}"
        yield f" mapped:{nodes['nr_mapped'].sum()} pagetables:{nodes['nr_page_table_pages'].sum()}"
        yield f" free:{self.mem.zones['free_pages'].sum()}"

    def _node(self, nid: int) -> str:
        node = self.mem.nodes[nid]
        inactive_anon, active_anon, inactive_file, active_file, unevictable = node["nr_lru"] * _KB
        return (
            f"Node {nid} active_anon:{active_anon}kB inactive_anon:{inactive_anon}kB active_file:{active_file}kB "
            f"inactive_file:{inactive_file}kB unevictable:{unevictable}kB "
            f"isolated(anon):{node['nr_isolated_anon'] * _KB}kB isolated(file):{node['nr_isolated_file'] * _KB}kB "
            f"mapped:{node['nr_mapped'] * _KB}kB pagetables:{node['nr_page_table_pages'] * _KB}kB "
            f"all_unreclaimable? {'yes' if self.hopeless(nid) else 'no'}"
        )

    def _zone(self, zone: int) -> Iterator[str]:
        record = self.mem.zones[zone]
        marks = record["watermark"] * _KB
        yield (
            f"{self._name(zone)} free:{record['free_pages'] * _KB}kB min:{marks[WMARK_MIN]}kB low:{marks[WMARK_LOW]}kB "
            f"high:{marks[WMARK_HIGH]}kB present:{record['present'] * _KB}kB managed:{record['managed'] * _KB}kB "
            f"mlocked:{record['nr_mlock'] * _KB}kB"
        )
        yield "lowmem_reserve[]: " + " ".join(str(int(pages)) for pages in record["reserve"])

    def _blocks(self, zone: int) -> str:
        nr_free = self.mem.zones["nr_free"][zone]
        parts = []
        for order in range(NR_PAGE_ORDERS):
            letters = "".join(
                _TYPE_LETTERS[migratetype_names[migratetype]]
                for migratetype in range(MIGRATE_TYPES)
                if nr_free[order, migratetype]
            )
            parts.append(f"{int(nr_free[order].sum())}*{_KB << order}kB " + (f"({letters}) " if letters else ""))
        total = int((nr_free.sum(axis=1) << np.arange(NR_PAGE_ORDERS)).sum())
        return f"{self._name(zone)}: {''.join(parts)}= {total * _KB}kB"

    def _name(self, zone: int) -> str:
        return f"Node {self.mem.zones['node'][zone]} {self.mem.zone_name(zone)}"
