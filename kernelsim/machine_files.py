# SPDX-License-Identifier: GPL-2.0-only
"""Which files a machine has, and where: the one list of paths.

What a directory holds is declared by the class that owns the state. Which of these classes this kernel has, and at
which paths, follows from its configuration and its hardware, and is said here. Files of drivers and of processes come
and go later (`Machine.add_files`, proc_pid.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from kernelsim.alloc_configfs import AllocGroup
from kernelsim.attr import Kobject
from kernelsim.cma import CmaSysfs
from kernelsim.compaction_sysctl import NodeCompact
from kernelsim.dpu_compact_hook import DpuCompactDebugfs, NodeCompactDpu
from kernelsim.extfrag import ExtfragDebugfs
from kernelsim.huge_memory import TransparentHugepage
from kernelsim.hugetlb import HstateFiles, HugetlbPool
from kernelsim.kconfig import IkConfig
from kernelsim.kpage import PageMonitor
from kernelsim.ksm_sysfs import KsmNumaFiles
from kernelsim.meminfo import Meminfo
from kernelsim.mm_configfs import MmGroup
from kernelsim.node import Node, Nodes
from kernelsim.page_alloc_sysctl import PageAllocSysctl
from kernelsim.pageset_sysctl import PagesetSysctl
from kernelsim.printk_sysctl import PrintkSysctl
from kernelsim.proc_stat import ProcStat
from kernelsim.slabinfo import Slabinfo
from kernelsim.vmstat import VmstatFiles
from kernelsim.zoneinfo import Zoneinfo

if TYPE_CHECKING:
    from kernelsim.machine import Machine

Files = Iterator[tuple[str, Kobject]]
"""(directory, what is in it)."""

ALLOC_CONFIGFS = "/sys/kernel/config/kernelsim/alloc"
MM_CONFIGFS = "/sys/kernel/config/kernelsim/mm"
NODES_SYSFS = "/sys/devices/system/node"
DEBUGFS = "/sys/kernel/debug"
SYSCTL_VM = "/proc/sys/vm"


def machine_files(machine: Machine) -> Files:
    """Every Kobject of the machine's configuration and its directory."""
    yield "/dev", machine.printk
    yield "/proc/sys/kernel", PrintkSysctl(machine.printk)
    yield MM_CONFIGFS, MmGroup(machine)
    yield ALLOC_CONFIGFS, AllocGroup(machine)
    yield from _proc(machine)
    yield from _sysctl(machine)
    yield from _kernel_mm(machine)
    yield from _debugfs(machine)
    yield from machine.tracing.files()
    if machine.has("NUMA"):
        yield from _nodes(machine)


def _proc(machine: Machine) -> Files:
    yield "/proc", VmstatFiles(machine.mem, machine.vm.events, machine.config.kconfig)
    yield "/proc", PageMonitor(machine.mem)
    yield "/proc", Zoneinfo(machine.mem, machine.vm.nr_cpus, machine.config.kconfig, machine.reclaim.failures)
    yield "/proc", Meminfo(machine.mem, machine.vm.overcommit, _hugetlb(machine), machine.has("TRANSPARENT_HUGEPAGE"))
    yield "/proc", IkConfig(machine.config.kconfig)
    btime_s = partial(getattr, machine, "btime_s")
    yield "/proc", ProcStat(machine.cpus, machine.cputime, machine.clock.now_ns, btime_s, machine.count_processes)
    yield "/proc", Slabinfo(machine.vm)


def _sysctl(machine: Machine) -> Files:
    yield SYSCTL_VM, machine.vm.overcommit
    if machine.mem.pagesets.size:
        yield SYSCTL_VM, PagesetSysctl(machine.mem, machine.cpus)
    yield SYSCTL_VM, PageAllocSysctl(machine.mem, machine.reclaim, machine.printk, machine.tracing.trace.current)
    if machine.has("HUGETLB_PAGE"):
        yield SYSCTL_VM, machine.hugetlb
    if machine.has("COMPACTION"):
        yield SYSCTL_VM, machine.compaction_sysctl
    if machine.has("DPU_COMPACTION"):
        yield SYSCTL_VM, machine.sysctl


def _kernel_mm(machine: Machine) -> Files:
    if machine.has("HUGETLB_PAGE"):
        for hstate in machine.hugetlb.hstates:
            yield f"/sys/kernel/mm/hugepages/{hstate.name}", HstateFiles(hstate)
    if machine.has("TRANSPARENT_HUGEPAGE"):
        yield "/sys/kernel/mm/transparent_hugepage", TransparentHugepage(machine.vm)
    if machine.ksm is not None:
        yield "/sys/kernel/mm/ksm", machine.ksm_files
        if machine.has("NUMA"):
            yield "/sys/kernel/mm/ksm", KsmNumaFiles(machine.ksm)
    for area in machine.vm.cma_areas:
        yield f"/sys/kernel/mm/cma/{area.name}", CmaSysfs(area)


def _debugfs(machine: Machine) -> Files:
    yield f"{DEBUGFS}/{machine.slowpath.fail_page_alloc.name}", machine.slowpath.fail_page_alloc
    if machine.has("COMPACTION"):
        yield f"{DEBUGFS}/extfrag", ExtfragDebugfs(machine.mem)
    if machine.has("DPU_COMPACTION"):
        yield f"{DEBUGFS}/dpu_compact", DpuCompactDebugfs(machine.dpu)
        yield f"{DEBUGFS}/dpu_compact", machine.dpu.failures
        for point in machine.dpu.inject.points.values():
            yield f"{DEBUGFS}/dpu_compact/{point.name}", point
        yield f"{DEBUGFS}/dpu_compact", machine.contig
    for area in machine.vm.cma_areas:
        yield f"{DEBUGFS}/cma/{area.name}", area


def _nodes(machine: Machine) -> Files:
    yield NODES_SYSFS, Nodes(machine.mem, machine.cpus)
    for nid in range(machine.mem.nr_nodes):
        for kobj in _node(machine, nid):
            yield f"{NODES_SYSFS}/node{nid}", kobj
        for hstate in machine.hugetlb.hstates if machine.has("HUGETLB_PAGE") else ():
            yield f"{NODES_SYSFS}/node{nid}/hugepages/{hstate.name}", HstateFiles(hstate, nid)


def _node(machine: Machine, nid: int) -> Iterator[Kobject]:
    """What is in one node's directory."""
    kconfig = machine.config.kconfig
    yield Node(machine.mem, _hugetlb(machine), nid, machine.cpus[nid], machine.vm.nr_cpus, kconfig)
    if machine.has("COMPACTION"):
        yield NodeCompact(machine.compaction, nid)
    if machine.has("DPU_COMPACTION"):
        yield NodeCompactDpu(machine.dpu, machine.compaction, nid)


def _hugetlb(machine: Machine) -> HugetlbPool | None:
    return machine.hugetlb if machine.has("HUGETLB_PAGE") else None
