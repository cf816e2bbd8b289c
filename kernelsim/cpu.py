# SPDX-License-Identifier: GPL-2.0-only
"""/sys/devices/system/cpu: the CPUs and how they are laid out (drivers/base/cpu.c, drivers/base/topology.c).

A node is a socket, a CPU a core of its own. Difference from Linux: CPUs cannot be taken offline, so no cpu*/online.
"""

from collections.abc import Sequence

from kernelsim.attr import Attr, Kobject, Registry, Text
from kernelsim.bitmap import format_list, format_mask

CPUS_SYSFS = "/sys/devices/system/cpu"
NR_CPUS = 8192  # CONFIG_NR_CPUS of distribution kernels


class Cpus(Kobject):
    """The directory of all CPUs."""

    online = Attr(Text(), doc="CPUs that run.", mode=0o444, kept=True)
    possible = Attr(Text(), doc="CPUs that could be there.", mode=0o444, kept=True)
    present = Attr(Text(), doc="CPUs that are there.", mode=0o444, kept=True)
    offline = Attr(Text(), doc="CPUs that do not run: none.", mode=0o444, kept=True)
    isolated = Attr(Text(), doc="CPUs that the scheduler leaves alone: none.", mode=0o444, kept=True)
    kernel_max = Attr(Text(), doc="Highest CPU number that the kernel could have.", mode=0o444, kept=True)

    def __init__(self, nr_cpus: int) -> None:
        self.nr_cpus = nr_cpus

    @online.show
    @possible.show
    @present.show
    def _all(self) -> str:
        return format_list(range(self.nr_cpus))

    @offline.show
    @isolated.show
    def _none(self) -> str:
        return format_list([])

    @kernel_max.show
    def _kernel_max(self) -> str:
        return f"{NR_CPUS - 1}\n"


class Topology(Kobject):
    """cpu*/topology."""

    physical_package_id = Attr(Text(), doc="Socket, which is the node.", mode=0o444, kept=True)
    die_id = Attr(Text(), doc="Die of the socket: it has one.", mode=0o444, kept=True)
    core_id = Attr(Text(), doc="Core of the socket.", mode=0o444, kept=True)
    thread_siblings = Attr(Text(), doc="CPUs of the core as a bit mask.", mode=0o444, kept=True)
    thread_siblings_list = Attr(Text(), doc="CPUs of the core as a list.", mode=0o444, kept=True)
    core_cpus = Attr(Text(), doc="CPUs of the core as a bit mask.", mode=0o444, kept=True)
    core_cpus_list = Attr(Text(), doc="CPUs of the core as a list.", mode=0o444, kept=True)
    core_siblings = Attr(Text(), doc="CPUs of the socket as a bit mask.", mode=0o444, kept=True)
    core_siblings_list = Attr(Text(), doc="CPUs of the socket as a list.", mode=0o444, kept=True)
    package_cpus = Attr(Text(), doc="CPUs of the socket as a bit mask.", mode=0o444, kept=True)
    package_cpus_list = Attr(Text(), doc="CPUs of the socket as a list.", mode=0o444, kept=True)
    die_cpus = Attr(Text(), doc="CPUs of the die as a bit mask.", mode=0o444, kept=True)
    die_cpus_list = Attr(Text(), doc="CPUs of the die as a list.", mode=0o444, kept=True)

    def __init__(self, cpu: int, nid: int, siblings: Sequence[int], nr_cpus: int) -> None:
        self.cpu, self.nid, self.siblings, self.nr_cpus = cpu, nid, siblings, nr_cpus

    @physical_package_id.show
    def _package(self) -> str:
        return f"{self.nid}\n"

    @die_id.show
    def _die(self) -> str:
        return "0\n"

    @core_id.show
    def _core(self) -> str:
        return f"{self.siblings.index(self.cpu)}\n"

    @thread_siblings.show
    @core_cpus.show
    def _own_mask(self) -> str:
        return format_mask([self.cpu], self.nr_cpus) + "\n"

    @thread_siblings_list.show
    @core_cpus_list.show
    def _own_list(self) -> str:
        return format_list([self.cpu])

    @core_siblings.show
    @package_cpus.show
    @die_cpus.show
    def _socket_mask(self) -> str:
        return format_mask(self.siblings, self.nr_cpus) + "\n"

    @core_siblings_list.show
    @package_cpus_list.show
    @die_cpus_list.show
    def _socket_list(self) -> str:
        return format_list(self.siblings)


def add_cpu_files(registry: Registry, cpus: Sequence[Sequence[int]], nodes_sysfs: str | None) -> None:
    """The whole tree for the CPUs of each node; with links to and from `nodes_sysfs`, where nodes are shown."""
    nr_cpus = sum(len(of_node) for of_node in cpus)
    registry.add(CPUS_SYSFS, Cpus(nr_cpus))
    for nid, of_node in enumerate(cpus):
        for cpu in of_node:
            registry.add(f"{CPUS_SYSFS}/cpu{cpu}/topology", Topology(cpu, nid, of_node, nr_cpus))
            if nodes_sysfs:
                registry.link(f"{CPUS_SYSFS}/cpu{cpu}/node{nid}", f"../../node/node{nid}")
                registry.link(f"{nodes_sysfs}/node{nid}/cpu{cpu}", f"../../cpu/cpu{cpu}")
