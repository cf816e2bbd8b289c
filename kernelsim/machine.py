# SPDX-License-Identifier: GPL-2.0-only
"""A whole emulated machine: built from a configuration or from a real one, with all its files.

The machine has no threads and reads no clock but the one it is given. Whoever owns it calls it: library code directly,
the daemon under its lock.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kernelsim import debug_vm
from kernelsim.attr import Registry
from kernelsim.cma import CmaSysfs, cma_declare_contiguous, cma_init_reserved_areas
from kernelsim.compaction import Compaction
from kernelsim.compaction_sysctl import CompactionSysctl, NodeCompact
from kernelsim.content import WORDS_FULL, WORDS_STAMP
from kernelsim.contig import Contig
from kernelsim.dpu_compact import DpuCompact
from kernelsim.dpu_compact_hook import DpuCompactDebugfs, NodeCompactDpu
from kernelsim.dpu_compact_sysctl import DpuCompactSysctl
from kernelsim.dpu_hw import DpuHardware
from kernelsim.extfrag import ExtfragDebugfs
from kernelsim.filemap import File
from kernelsim.fork import dup_mm
from kernelsim.hostimage import HostImage
from kernelsim.hostmem import import_mem
from kernelsim.hostproc import import_processes
from kernelsim.huge_memory import TransparentHugepage
from kernelsim.hugetlb import HstateFiles, HugetlbPool
from kernelsim.meminfo import Meminfo
from kernelsim.mm_configfs import MmGroup, Process, check_name
from kernelsim.mm_types import AllocWords, LongOp, Vm, zeroed_words
from kernelsim.mmap import Mm
from kernelsim.mmzone import MAX_DMA32_PFN, MAX_DMA_PFN, ZONE_DMA, ZONE_DMA32, ZONE_NORMAL, Mem
from kernelsim.node import Node, Nodes
from kernelsim.page import PAGE_SIZE, PG_reserved
from kernelsim.page_alloc import free_range, init_range
from kernelsim.page_reporting import Discard, PageReporting
from kernelsim.printk import Printk
from kernelsim.timer import Clock, ManualClock
from kernelsim.vmstat import VmstatFiles
from kernelsim.wait import WaitQueue

MM_CONFIGFS = "/sys/kernel/config/kernelsim/mm"
NODES_SYSFS = "/sys/devices/system/node"
_MIN_NODE_BYTES = 32 << 20
_MEMMAP_BYTES = 64  # struct page: what a real machine sets aside for each of its pages
LOCAL_DISTANCE, REMOTE_DISTANCE = 10, 20


@dataclass(frozen=True)
class NodeConfig:
    memory_bytes: int = 4 << 30
    nr_cpus: int = 2
    cma_bytes: int = 0
    """Size of the node's CMA area; 0: none."""


@dataclass(frozen=True)
class MachineConfig:
    """What to build. `bytes`: "full" (4096 real bytes a page) or "stamp" (one content stamp a page).

    ValueError, in one line, if there can be no such machine.
    """

    nodes: tuple[NodeConfig, ...] = (NodeConfig(), NodeConfig())
    bytes: str = "full"
    debug_vm: bool = False
    distance: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if not 1 <= len(self.nodes) <= 64:
            raise ValueError("a machine has 1 to 64 nodes")
        for nid, node in enumerate(self.nodes):
            if node.memory_bytes < _MIN_NODE_BYTES or node.memory_bytes % (2 << 20):
                raise ValueError(f"node {nid}: memory must be a multiple of 2M and at least 32M")
            if not 0 <= node.cma_bytes < node.memory_bytes or node.cma_bytes % (2 << 20):
                raise ValueError(f"node {nid}: its CMA area must be a multiple of 2M and smaller than its memory")
            if not 0 <= node.nr_cpus <= 1024:
                raise ValueError(f"node {nid}: 0 to 1024 CPUs")
        if not any(node.nr_cpus for node in self.nodes):
            raise ValueError("a machine has at least one CPU")
        if self.bytes not in ("full", "stamp"):
            raise ValueError('memory bytes must be "full" or "stamp"')
        if self.distance and [len(row) for row in self.distance] != [len(self.nodes)] * len(self.nodes):
            raise ValueError("distance must be a square matrix, one row for each node")

    @property
    def words_per_page(self) -> int:
        return WORDS_FULL if self.bytes == "full" else WORDS_STAMP


def default_distance(nr_nodes: int) -> NDArray[np.int64]:
    distance = np.full((nr_nodes, nr_nodes), REMOTE_DISTANCE, dtype=np.int64)
    np.fill_diagonal(distance, LOCAL_DISTANCE)
    return distance


def zone_spans(config: MachineConfig) -> list[tuple[int, int, int, int]]:
    """Zones of the nodes' memory laid out one behind the other from address 0; pfn 0 is left out, as on x86."""
    spans = []
    start = 0
    for nid, node in enumerate(config.nodes):
        end = start + node.memory_bytes // PAGE_SIZE
        for zone_type, lo, hi in (
            (ZONE_DMA, 1, MAX_DMA_PFN),
            (ZONE_DMA32, MAX_DMA_PFN, MAX_DMA32_PFN),
            (ZONE_NORMAL, MAX_DMA32_PFN, end),
        ):
            if max(lo, start) < min(hi, end):
                spans.append((nid, zone_type, max(lo, start), min(hi, end)))
        start = end
    return spans


def boot_mem(config: MachineConfig) -> Mem:
    """Memory after boot: all free, but for the memory map that the kernel keeps at the end of each node."""
    distance = np.array(config.distance) if config.distance else default_distance(len(config.nodes))
    mem = Mem(zone_spans(config), distance)
    for nid, node in enumerate(config.nodes):
        zones = mem.zones_of(nid)
        memmap = node.memory_bytes // PAGE_SIZE * _MEMMAP_BYTES // PAGE_SIZE
        for zone in zones:
            start, end = (int(mem.zones[edge][zone]) for edge in ("start_pfn", "end_pfn"))
            usable = end - memmap if zone == zones[-1] else end
            init_range(mem.pages, start, usable, 0, 0)
            init_range(mem.pages, usable, end, PG_reserved, 1)
            if zone == zones[-1] and node.cma_bytes:
                cma_declare_contiguous(mem, nid, usable, node.cma_bytes // PAGE_SIZE)
            else:
                free_range(mem.pages, mem.zones, mem.blocks, start, usable)
            mem.zones["present"][zone], mem.zones["managed"][zone] = end - start, usable - start
    mem.setup_watermarks()
    return mem


class Machine:
    """The emulated kernel and its files, `registry`."""

    def __init__(
        self,
        config: MachineConfig | None = None,
        hw: DpuHardware | None = None,
        clock: Clock | None = None,
        *,
        mem: Mem | None = None,
        alloc_words: AllocWords = zeroed_words,
        discard: Discard | None = None,
        wait_queue: Callable[[], WaitQueue] = WaitQueue,
    ) -> None:
        """`alloc_words` makes the memory, `discard` gives free parts of it back to the host."""
        self.config = config or MachineConfig()
        self.clock = clock or ManualClock()
        self.mem = mem or boot_mem(self.config)
        self.cpus = self._number_cpus()
        nr_cpus = sum(len(cpus) for cpus in self.cpus)
        self.vm = Vm(self.mem, self.config.words_per_page, nr_cpus, alloc_words)
        self.printk = Printk(self.clock.now_ns, wait_queue())
        self.registry = Registry()
        self.reporting = PageReporting(self.mem, discard)
        self.processes: dict[str, Process] = {}
        self.imported: dict[str, Mm] = {}
        self._next_pid = 1
        self._sharers: dict[int, int] = {}
        total = int(self.mem.zones["managed"].sum()) * (PAGE_SIZE // 1024)
        self.printk(f"kernelsim: {len(self.cpus)} nodes, {nr_cpus} CPUs, {total} kB of memory")
        self.sysctl = DpuCompactSysctl()
        self.compaction_sysctl = CompactionSysctl()
        self.compaction = Compaction(self.vm, self.compaction_sysctl)
        self.compaction_sysctl.compaction = self.compaction
        self.dpu = DpuCompact(self.vm, hw, self.sysctl, self.printk, self.clock)
        self.contig = Contig(self.vm, hw, self.sysctl, self.printk)
        self.contig.hugetlb = self.hugetlb = HugetlbPool(self.vm, self.contig)
        self.vm.cma_areas = cma_init_reserved_areas(self.vm, self.contig)
        self._add_files()

    @classmethod
    def from_image(
        cls,
        image: HostImage,
        config: MachineConfig | None = None,
        hw: DpuHardware | None = None,
        clock: Clock | None = None,
        *,
        alloc_words: AllocWords = zeroed_words,
        discard: Discard | None = None,
        wait_queue: Callable[[], WaitQueue] = WaitQueue,
    ) -> Machine:
        """A machine with a real one's memory. Of `config` only CPUs and switches count; contents are always stamps.

        ValueError if the capture cannot be built.
        """
        nr_nodes = max(zone.node for zone in image.zones) + 1
        nodes = (config or MachineConfig()).nodes
        nodes = tuple(nodes[nid] if nid < len(nodes) else NodeConfig() for nid in range(nr_nodes))
        config = replace(config or MachineConfig(), nodes=nodes, bytes="stamp", distance=())
        mem = import_mem(image, default_distance(nr_nodes))
        machine = cls(config, hw, clock, mem=mem, alloc_words=alloc_words, discard=discard, wait_queue=wait_queue)
        for name, mm in import_processes(machine.vm, image):
            machine.imported[name] = mm
        return machine

    def _number_cpus(self) -> list[list[int]]:
        cpus: list[list[int]] = []
        nr = 0
        for nid in range(self.mem.nr_nodes):
            wanted = self.config.nodes[nid].nr_cpus if nid < len(self.config.nodes) else 1
            cpus.append(list(range(nr, nr + wanted)))
            nr += wanted
        return cpus

    def _add_files(self) -> None:
        add = self.registry.add
        nr_cpus = self.vm.nr_cpus
        add("/proc/sys/vm", self.sysctl)
        add("/proc/sys/vm", self.compaction_sysctl)
        add("/proc/sys/vm", self.hugetlb)
        add("/sys/kernel/mm/transparent_hugepage", TransparentHugepage(self.vm))
        add("/proc", VmstatFiles(self.mem, self.vm.events))
        add("/proc", Meminfo(self.mem, self.hugetlb))
        add("/dev", self.printk)
        add(NODES_SYSFS, Nodes(self.mem, self.cpus))
        for nid, cpus in enumerate(self.cpus):
            path = f"{NODES_SYSFS}/node{nid}"
            add(path, Node(self.mem, self.hugetlb, nid, cpus, nr_cpus))
            add(path, NodeCompact(self.compaction, nid))
            add(path, NodeCompactDpu(self.dpu, nid))
            for hstate in self.hugetlb.hstates:
                add(f"{path}/hugepages/{hstate.name}", HstateFiles(hstate, nid))
        for hstate in self.hugetlb.hstates:
            add(f"/sys/kernel/mm/hugepages/{hstate.name}", HstateFiles(hstate))
        for area in self.vm.cma_areas:
            add(f"/sys/kernel/debug/cma/{area.name}", area)
            add(f"/sys/kernel/mm/cma/{area.name}", CmaSysfs(area))
        add("/sys/kernel/debug/extfrag", ExtfragDebugfs(self.mem))
        add("/sys/kernel/debug/dpu_compact", DpuCompactDebugfs(self.dpu))
        add("/sys/kernel/debug/dpu_compact", self.dpu.failures)
        self.dpu.inject.processes = lambda: iter(self.processes.values())
        self.dpu.inject.add_files(self.registry)
        add("/sys/kernel/debug/dpu_compact", self.contig)
        add(MM_CONFIGFS, MmGroup(self))

    # Time.

    def peek(self) -> int | None:
        """When the next timer is due, in the clock's nanoseconds; None if none is set."""
        self.reporting.arm(self.clock.now_ns())
        return self.reporting.peek()

    def step(self, now_ns: int) -> None:
        """Run what is due."""
        self.reporting.step(now_ns)

    # Processes.

    def take_pid(self) -> int:
        pid = self._next_pid
        self._next_pid += 1
        return pid

    def new_process(self, name: str) -> Process:
        """Start a process, on the first node with a CPU."""
        home = next(nid for nid, cpus in enumerate(self.cpus) if cpus)
        process = Process(self, name, Mm(self.vm, home, self.cpus[home][0]))
        self.processes[name] = process
        return process

    def fork_process(self, parent: Process, name: str) -> LongOp:
        """Fork `parent`; the child's directory appears beside it."""
        check_name(name)
        path = f"{MM_CONFIGFS}/{name}"
        if path in self.registry.nodes or name in self.processes:
            raise OSError(errno.EEXIST, "name is taken")
        cpus = self.cpus[parent.mm.node] or [parent.mm.cpu]
        mm = yield from dup_mm(parent.mm, cpus[self._next_pid % len(cpus)])
        if path in self.registry.nodes:  # taken in the meantime
            yield from mm.exit()
            raise OSError(errno.EEXIST, "name is taken")
        child = Process(self, name, mm)
        child.files = list(parent.files)
        for file in child.files:
            self.share(file)
        self.processes[name] = child
        self.registry.add(path, child)

    def end_process(self, process: Process) -> LongOp:
        yield from process.end()
        self.processes = {name: other for name, other in self.processes.items() if other is not process}

    def share(self, file: File) -> None:
        """One more process uses the file."""
        self._sharers[file.mapping] = self._sharers.get(file.mapping, 0) + 1

    def unshare(self, file: File) -> bool:
        """One process less; True if it was the last."""
        self._sharers[file.mapping] -= 1
        return self._sharers[file.mapping] == 0

    # Looking at the whole.

    def check(self) -> list[str]:
        """Every violated invariant (debug_vm.py)."""
        return debug_vm.check(self.vm)

    def state_hash(self) -> str:
        """One hash over everything that the same inputs must bring to the same state, contents included."""
        digest = hashlib.sha256()
        mem, vm = self.mem, self.vm
        for array in (
            mem.pages,
            mem.zones,
            mem.nodes,
            mem.blocks,
            vm.mms,
            vm.vmas,
            vm.avcs,
            vm.tlbs,
            vm.i_pages,
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(debug_vm.content_digest(mem.pages, vm.memory, mem.nr_pages).tobytes())
        digest.update("\n".join(self.printk.lines()).encode())
        return digest.hexdigest()
