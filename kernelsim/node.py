# SPDX-License-Identifier: GPL-2.0-only
"""/sys/devices/system/node: which nodes there are, and what each has (drivers/base/node.c)."""

from collections.abc import Sequence

import numpy as np

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.bitmap import format_list, format_mask
from kernelsim.hugetlb import HugetlbPool
from kernelsim.kconfig import Kconfig
from kernelsim.meminfo import node_meminfo
from kernelsim.mmzone import ZONE_NORMAL, Mem, zone_dtype
from kernelsim.seq_counters import CounterFile, CounterText, Words, number
from kernelsim.vmstat import counter_lines, node_items, word, zone_items


class Nodes(Kobject):
    """The directory of all nodes."""

    online = Attr(Text(), doc="Nodes that are there.", mode=0o444, kept=True)
    possible = Attr(Text(), doc="Nodes that could be there.", mode=0o444, kept=True)
    has_cpu = Attr(Text(), doc="Nodes with CPUs.", mode=0o444, kept=True)
    has_memory = Attr(Text(), doc="Nodes with memory.", mode=0o444, kept=True)
    has_normal_memory = Attr(Text(), doc="Nodes with memory that the kernel can use itself.", mode=0o444, kept=True)

    def __init__(self, mem: Mem, cpus: Sequence[Sequence[int]]) -> None:
        self.mem = mem
        self.cpus = cpus

    @online.show
    def _online(self) -> str:
        return format_list(range(self.mem.nr_nodes))

    @possible.show
    def _possible(self) -> str:
        return format_list(range(self.mem.nr_nodes))

    @has_cpu.show
    def _has_cpu(self) -> str:
        return format_list([nid for nid, cpus in enumerate(self.cpus) if cpus])

    @has_memory.show
    def _has_memory(self) -> str:
        return self._with_memory(self.mem.zones["type"] >= 0)

    @has_normal_memory.show
    def _has_normal_memory(self) -> str:
        return self._with_memory(self.mem.zones["type"] <= ZONE_NORMAL)

    def _with_memory(self, eligible: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> str:
        zones = self.mem.zones[eligible & (self.mem.zones["present"] > 0)]
        return format_list([int(nid) for nid in np.unique(zones["node"])])


class Node(Kobject):
    """One node's directory; compact_dpu is added by dpu_compact_hook.py."""

    cpulist = Attr(Text(), doc="The node's CPUs as a list.", kept=True)
    cpumap = Attr(Text(), doc="The node's CPUs as a bit mask.", kept=True)
    distance = Attr(Text(), doc="Distance to each node; 10 is local.", kept="memory")
    meminfo = Attr(Text(), doc="The node's memory in kB by use.", kept="memory")
    numastat = Attr(Text(), doc="Allocations by whether the node was the intended one.", kept="memory")
    vmstat = Attr(Text(), doc="The node's page counters.", kept="memory")

    def __init__(
        self, mem: Mem, hugetlb: HugetlbPool | None, nid: int, cpus: Sequence[int], nr_cpus: int, kconfig: Kconfig
    ) -> None:
        self.mem = mem
        self.hugetlb = hugetlb
        self.nid = nid
        self.cpus = cpus
        self.nr_cpus = nr_cpus
        self.kconfig = kconfig
        self._distance_now = CounterFile(self._describe_distance)
        self._numastat_now, self._vmstat_now = CounterFile(self._describe_numastat), CounterFile(self._describe_vmstat)

    @cpulist.show
    def _cpulist(self) -> str:
        return format_list(self.cpus)

    @cpumap.show
    def _cpumap(self) -> str:
        return format_mask(self.cpus, self.nr_cpus)

    @distance.counters
    def _distance(self) -> CounterText:
        return self._distance_now.now()

    def _describe_distance(self) -> CounterText:
        nids, distances = range(self.mem.nr_nodes), Words(self.mem.distance[self.nid])
        return CounterText(
            " ".join(["%d"] * len(nids)) + "\n", [number([distances.at(nid, 0)]) for nid in nids], (), (distances,)
        )

    @meminfo.show
    def _meminfo(self) -> str:
        thp = self.kconfig.IS_ENABLED("CONFIG_TRANSPARENT_HUGEPAGE")
        return node_meminfo(self.mem, self.hugetlb, self.nid, thp)

    @numastat.counters
    def _numastat(self) -> CounterText:
        return self._numastat_now.now()

    def _describe_numastat(self) -> CounterText:
        zones, rows = Words(self.mem.zones), self.mem.zones_of(self.nid)
        hit, miss, foreign = (
            number([zones.at(row, word(zone_dtype, name)) for row in rows])
            for name in ("numa_hit", "numa_miss", "numa_foreign")
        )
        # there is no interleaving policy, and a process runs on its home node
        items = {"numa_hit": hit, "numa_miss": miss, "numa_foreign": foreign, "interleave_hit": number(())}
        items |= {"local_node": hit, "other_node": miss}
        return CounterText("".join([f"{name} %d\n" for name in items]), list(items.values()), (), (zones,))

    @vmstat.counters
    def _vmstat(self) -> CounterText:
        return self._vmstat_now.now()

    def _describe_vmstat(self) -> CounterText:
        zones, nodes = Words(self.mem.zones), Words(self.mem.nodes)
        items = [*zone_items(zones, self.mem.zones_of(self.nid)), *node_items(nodes, [self.nid])]
        return counter_lines(self.kconfig, items, (zones, nodes))
