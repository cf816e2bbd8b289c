# SPDX-License-Identifier: GPL-2.0-only
"""/proc/meminfo and node*/meminfo (fs/proc/meminfo.c, drivers/base/node.c).

Only lines that this emulation has something to say about. There is no swap and there are no block devices, so
SwapTotal, SwapFree, SwapCached, Buffers, Dirty and Writeback are truly 0 (what no device is behind is not counted as
dirty, noop_dirty_folio()). Nothing shrinks slab pages, so all of them are SUnreclaim. A kernel without
CONFIG_HUGETLB_PAGE has no hugetlb lines.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.hugetlb import HUGEPAGE_KBYTES, HugetlbPool
from kernelsim.mmzone import WMARK_HIGH, WMARK_LOW, Mem
from kernelsim.overcommit import Overcommit

_KB = 4


def si_mem_available(mem: Mem) -> int:
    """Pages that could be had without hurting anyone (mm/show_mem.c): free beyond the reserves, most of the cache."""
    zones = mem.zones
    low = int(zones["watermark"][:, WMARK_LOW].sum())
    reserved = int(np.minimum(zones["reserve"].max(axis=1) + zones["watermark"][:, WMARK_HIGH], zones["managed"]).sum())
    cache = int(mem.nodes["nr_lru"][:, 2:4].sum())
    return max(int(zones["free_pages"].sum()) - reserved + cache - min(cache // 2, low), 0)


def summed(records: Any) -> Any:
    """One record with all of `records`, zones or nodes, added up field by field, in one numpy call."""
    return records.view(np.int64).reshape(len(records), -1).sum(axis=0).view(records.dtype)[0]


def _lru_lines(nodes: Any) -> Iterator[tuple[str, int]]:
    inactive_anon, active_anon, inactive_file, active_file, unevictable = nodes["nr_lru"].tolist()
    yield "Active", active_anon + active_file
    yield "Inactive", inactive_anon + inactive_file
    yield "Active(anon)", active_anon
    yield "Inactive(anon)", inactive_anon
    yield "Active(file)", active_file
    yield "Inactive(file)", inactive_file
    yield "Unevictable", unevictable


def _slab_lines(nodes: Any) -> Iterator[tuple[str, int]]:
    nr_slab = int(nodes["nr_slab"])
    yield "Slab", nr_slab
    yield "SReclaimable", 0
    yield "SUnreclaim", nr_slab


class Meminfo(Kobject):
    """The whole machine's."""

    meminfo = Attr(Text(), doc="Memory in kB by use.", kept="memory")

    def __init__(self, mem: Mem, overcommit: Overcommit, hugetlb: HugetlbPool | None, thp: bool) -> None:
        self.mem = mem
        self.overcommit = overcommit
        self.thp = thp
        self.hugetlb = hugetlb

    @meminfo.show
    def _meminfo(self) -> str:
        return "".join(f"{name + ':':<16s}{pages * _KB:8d} kB\n" for name, pages in self._lines()) + self._huge()

    def _lines(self) -> Iterator[tuple[str, int]]:
        zones, nodes = summed(self.mem.zones), summed(self.mem.nodes)
        yield "MemTotal", int(zones["managed"])
        yield "MemFree", int(zones["free_pages"])
        yield "MemAvailable", si_mem_available(self.mem)
        yield "Buffers", 0
        yield "Cached", int(nodes["nr_file_pages"])
        yield "SwapCached", 0
        yield from _lru_lines(nodes)
        yield "Mlocked", int(zones["nr_mlock"])
        yield "SwapTotal", 0
        yield "SwapFree", 0
        yield "Dirty", 0
        yield "Writeback", 0
        yield "AnonPages", int(nodes["nr_anon_pages"])
        yield "Mapped", int(nodes["nr_mapped"])
        yield from _slab_lines(nodes)
        yield "PageTables", int(nodes["nr_page_table_pages"])
        yield "CommitLimit", self.overcommit.vm_commit_limit()
        yield "Committed_AS", self.overcommit.vm_committed_as
        if self.thp:
            yield "AnonHugePages", int(nodes["nr_anon_thps"])
        if self.mem.has_cma:
            yield "CmaTotal", int(zones["cma_pages"])
            yield "CmaFree", int(zones["free_cma"])

    def _huge(self) -> str:
        if self.hugetlb is None:
            return ""
        nr = self.hugetlb.default.nr_pages()
        counts = (
            ("HugePages_Total", nr),
            ("HugePages_Free", nr),
            ("HugePages_Rsvd", 0),
            ("HugePages_Surp", 0),
        )
        sizes = (("Hugepagesize", HUGEPAGE_KBYTES), ("Hugetlb", self.hugetlb.total_kbytes))
        return "".join(f"{name + ':':<16s}{value:8d}\n" for name, value in counts) + "".join(
            f"{name + ':':<16s}{value:8d} kB\n" for name, value in sizes
        )


def node_meminfo(mem: Mem, hugetlb: HugetlbPool | None, nid: int, thp: bool) -> str:
    """Text of node*/meminfo. `thp`: with a line for transparent huge pages."""
    zones = summed(mem.zones[mem.zones["node"] == nid])
    node = mem.nodes[nid]
    total, free = int(zones["managed"]), int(zones["free_pages"])
    lines = [
        ("MemTotal", total),
        ("MemFree", free),
        ("MemUsed", total - free),
        *_lru_lines(node),
        ("Mlocked", int(zones["nr_mlock"])),
        ("Dirty", 0),
        ("Writeback", 0),
        ("FilePages", int(node["nr_file_pages"])),
        ("Mapped", int(node["nr_mapped"])),
        ("AnonPages", int(node["nr_anon_pages"])),
        ("PageTables", int(node["nr_page_table_pages"])),
        *_slab_lines(node),
        *([("AnonHugePages", int(node["nr_anon_thps"]))] if thp else []),
    ]
    text = "".join(f"Node {nid} {name + ':':<16s}{pages * _KB:8d} kB\n" for name, pages in lines)
    if hugetlb is None:
        return text
    nr_huge = hugetlb.default.nr_pages(nid)
    for name, nr in (("HugePages_Total", nr_huge), ("HugePages_Free", nr_huge), ("HugePages_Surp", 0)):
        text += f"Node {nid} {name + ':':<16s}{nr:6d}\n"
    return text
