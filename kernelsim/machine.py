# SPDX-License-Identifier: GPL-2.0-only
"""A whole emulated machine: built from a configuration or from a real one, with all its files.

The machine has no threads and reads no clock but the one it is given. Whoever owns it calls it: library code directly,
the daemon under its lock.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kernelsim import debug_vm
from kernelsim.alloc_slowpath import AllocSlowpath
from kernelsim.attr import Kobject, Registry
from kernelsim.cma import cma_declare_contiguous, cma_init_reserved_areas
from kernelsim.compaction import Compaction
from kernelsim.compaction_sysctl import CompactionSysctl
from kernelsim.content import WORDS_FULL, WORDS_NONE, WORDS_STAMP
from kernelsim.contig import Contig
from kernelsim.cpu import add_cpu_files
from kernelsim.cputime import CpuTime
from kernelsim.digest import Digest
from kernelsim.direct_alloc import DirectBlocks
from kernelsim.dpu_compact import DpuCompact
from kernelsim.dpu_compact_direct import DpuDirectCompaction
from kernelsim.dpu_compact_sysctl import DpuCompactSysctl
from kernelsim.dpu_hw import DpuHardware
from kernelsim.filemap import File
from kernelsim.fork import dup_mm
from kernelsim.hostimage import HostImage
from kernelsim.hostmem import import_mem
from kernelsim.hostproc import import_processes
from kernelsim.hugetlb import HugetlbPool
from kernelsim.kcompactd import Kcompactd
from kernelsim.kconfig import Kconfig
from kernelsim.ksm import Ksm, Ksmd
from kernelsim.ksm_sysfs import KsmFiles
from kernelsim.kswapd import Kswapd
from kernelsim.kthread import Kthreads
from kernelsim.machine_files import ALLOC_CONFIGFS as ALLOC_CONFIGFS
from kernelsim.machine_files import DEBUGFS as DEBUGFS
from kernelsim.machine_files import MM_CONFIGFS as MM_CONFIGFS
from kernelsim.machine_files import NODES_SYSFS as NODES_SYSFS
from kernelsim.machine_files import machine_files
from kernelsim.memory_block import add_memory_files
from kernelsim.mm_configfs import Process, check_name
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmap import Mm, alloc_root
from kernelsim.mmzone import MAX_DMA32_PFN, MAX_DMA_PFN, ZONE_DMA, ZONE_DMA32, ZONE_NORMAL, Mem
from kernelsim.operation import Operation
from kernelsim.page import PAGE_SIZE, AllocWords, PG_reserved, zeroed_words
from kernelsim.page_alloc import free_range, init_range
from kernelsim.page_reporting import Discard, PageReporting
from kernelsim.printk import Printk
from kernelsim.proc_pid import Tasks
from kernelsim.reclaim import Reclaim
from kernelsim.show_mem import AllocFailure
from kernelsim.timer import Clock, ManualClock
from kernelsim.tracing import Tracing
from kernelsim.wait import WaitQueue

_MIN_NODE_BYTES = 32 << 20
_MEMMAP_BYTES = 64  # struct page: what a real machine sets aside for each of its pages
LOCAL_DISTANCE, REMOTE_DISTANCE = 10, 20
_NOT_HASHED = (
    *("memory", "hw", "clock", "cputime", "btime_s", "console", "_callbacks", "nr_acquired", "changes"),
    "counter_text",
)
"""Attributes that `whole_hash` leaves out. Memory is in `state_hash`; who looks takes locks and hangs up callbacks, and
leaves what the next text is made with."""
_WORDS = {"full": WORDS_FULL, "stamp": WORDS_STAMP, "none": WORDS_NONE}


@dataclass(frozen=True)
class NodeConfig:
    memory_bytes: int = 4 << 30
    nr_cpus: int = 2
    cma_bytes: int = 0
    """Size of the node's CMA area; 0: none."""


@dataclass(frozen=True)
class MachineConfig:
    """What to build. `bytes`: what is kept of a page, "full" (4096 real bytes), "stamp" (one content stamp) or "none".

    ValueError, in one line, if there can be no such machine.
    """

    nodes: tuple[NodeConfig, ...] = (NodeConfig(), NodeConfig())
    bytes: str = "full"
    kconfig: Kconfig = field(default_factory=Kconfig)
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
        if self.bytes not in _WORDS:
            raise ValueError('memory bytes must be "full", "stamp" or "none"')
        has_cma = any(node.cma_bytes for node in self.nodes)
        kconfig = self.kconfig.for_machine(len(self.nodes), has_cma, self.bytes != "none")
        object.__setattr__(self, "kconfig", kconfig)
        if self.distance and [len(row) for row in self.distance] != [len(self.nodes)] * len(self.nodes):
            raise ValueError("distance must be a square matrix, one row for each node")

    @property
    def words_per_page(self) -> int:
        return _WORDS[self.bytes]


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


def boot_mem(config: MachineConfig, alloc_tables: AllocWords = zeroed_words) -> Mem:
    """Memory after boot: all free, but for the memory map that the kernel keeps at the end of each node."""
    distance = np.array(config.distance) if config.distance else default_distance(len(config.nodes))
    mem = Mem(zone_spans(config), distance, flags=0, alloc_words=alloc_tables)
    for nid, node in enumerate(config.nodes):
        zones = mem.zones_of(nid)
        memmap = node.memory_bytes // PAGE_SIZE * _MEMMAP_BYTES // PAGE_SIZE
        for zone in zones:
            start, end = (int(mem.zones[edge][zone]) for edge in ("start_pfn", "end_pfn"))
            usable = end - memmap if zone == zones[-1] else end
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
        alloc_tables: AllocWords = zeroed_words,
        discard: Discard | None = None,
        wait_queue: Callable[[], WaitQueue] = WaitQueue,
    ) -> None:
        """`alloc_words` makes the memory, `discard` gives free parts of it back to the host.

        `alloc_tables` makes the memory map, which is touched as a whole.
        """
        self.config = config or MachineConfig()
        self.clock = clock or ManualClock()
        self.mem = mem or boot_mem(self.config, alloc_tables)
        self.cpus = self._number_cpus()
        nr_cpus = sum(len(cpus) for cpus in self.cpus)
        self.vm = Vm(self.mem, self.config.words_per_page, nr_cpus, alloc_words, wait_queue)
        self.printk = Printk(self.clock.now_ns, wait_queue())
        self.tracing = Tracing(self.vm, self.clock, self.config.kconfig, self.printk, wait_queue())
        self.registry = Registry()
        self.reporting = PageReporting(self.mem, discard)
        self.processes: dict[str, Process] = {}
        self.imported: dict[str, Mm] = {}
        self.tasks = Tasks(self)
        self.cputime = CpuTime(self.cpus, self.clock.now_ns)
        self.btime_s = 0
        """When the machine was booted, in seconds since 1970; the daemon knows."""
        self._sharers: dict[int, int] = {}
        self._starting: set[str] = set()
        """Names of processes to be."""
        total = int(self.mem.zones["managed"].sum()) * (PAGE_SIZE // 1024)
        self.printk(f"kernelsim: {len(self.cpus)} nodes, {nr_cpus} CPUs, {total} kB of memory")
        self.sysctl = DpuCompactSysctl()
        self.compaction_sysctl = CompactionSysctl()
        self.compaction = Compaction(self.vm, self.compaction_sysctl)
        self.compaction_sysctl.compaction = self.compaction
        self.sysctl.dpu_compact_enabled = int(self.has("DPU_COMPACTION_DEFAULT_ON"))
        hw = hw if self.has("DPU_COMPACTION") else None
        self.dpu = DpuCompact(self.vm, hw, self.sysctl, self.printk, self.clock)
        self._add_allocator()
        self.dpu.inject.processes = lambda: iter(self.processes.values())
        self.contig = Contig(self.vm, hw, self.sysctl, self.printk)
        self.contig.hugetlb = self.hugetlb = HugetlbPool(self.vm, self.contig, self.slowpath)
        self.vm.cma_areas = cma_init_reserved_areas(self.vm, self.contig)
        if self.has("DPU_COMPACTION"):
            self.dpu.dpu_compact_init()
        self._add_tracing(hw)
        for path, kobj in machine_files(self):
            self.add_files(path, kobj)
        nodes_sysfs = NODES_SYSFS if self.has("NUMA") else None
        add_cpu_files(self.registry, self.cpus, nodes_sysfs)
        add_memory_files(self.registry, self.mem, nodes_sysfs)

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
        owners: Callable[[Vm, HostImage], list[tuple[str, Mm]]] = import_processes,
    ) -> Machine:
        """A machine with a real one's memory. Of `config` only CPUs and switches count; contents are always stamps.

        `owners` gives its pages owners and returns the processes among them, by name.
        ValueError if the capture cannot be built.
        """
        nr_nodes = max(zone.node for zone in image.zones) + 1
        nodes = (config or MachineConfig()).nodes
        nodes = tuple(nodes[nid] if nid < len(nodes) else NodeConfig() for nid in range(nr_nodes))
        config = replace(config or MachineConfig(), nodes=nodes, bytes="stamp", distance=())
        mem = import_mem(image, default_distance(nr_nodes))
        machine = cls(config, hw, clock, mem=mem, alloc_words=alloc_words, discard=discard, wait_queue=wait_queue)
        captured = {f"{task.comm}-{task.pid}": task for task in image.mappings}
        for name, mm in owners(machine.vm, image):
            task = captured.get(name)
            mm.comm = task.comm if task else name
            machine.tasks.add(mm, task.pid if task else machine.tasks.take_pid())
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

    def _add_allocator(self) -> None:
        """Reclaim, the slow path, and the kernel threads behind them."""
        vm = self.vm
        compaction = self.compaction if self.has("COMPACTION") else None
        self.dpu_direct = DpuDirectCompaction(self.mem, self.dpu) if self.has("DPU_COMPACTION") else None
        self.reclaim = Reclaim(vm, compaction)
        self.kswapds = [
            Kswapd(vm, self.reclaim, nid, compaction, self._wakeup_kcompactd) for nid in range(self.mem.nr_nodes)
        ]
        self.kcompactds = [
            Kcompactd(vm, kswapd.nid, compaction, self.compaction_sysctl, self.dpu_direct, kswapd)
            for kswapd in self.kswapds
            if compaction is not None
        ]
        self.compaction_sysctl.proactiveness_written = self._trigger_kcompactd
        threads = [*self.kswapds, *self.kcompactds, *self._ksmd()]
        self.kthreads = Kthreads(threads, current=self.tracing.trace.current)
        for pid, thread in enumerate(self.kthreads.threads, 2):  # init is 1
            thread.task.pid = pid
            thread.task.cpu = next(iter(self.cpus[thread.nid]), 0)
        report = AllocFailure(self.mem, self.printk, self.clock.now_ns, lambda nid: self.kswapds[nid].hopeless)
        self.slowpath = AllocSlowpath(vm, self.reclaim, self.kswapds, compaction, self.dpu_direct, report)
        self.direct_blocks = vm.direct_blocks = DirectBlocks(vm)
        vm.page_alloc = self.slowpath

    def _ksmd(self) -> list[Ksmd]:
        """KSM and its thread, where this kernel has it."""
        self.ksm: Ksm | None = None
        self.ksm_files = KsmFiles()
        if not self.has("KSM"):
            return []
        self.ksm = self.vm.ksm = self.ksm_files.ksm = Ksm(self.vm, self.ksm_files)
        return [Ksmd(self.ksm)]

    def _add_tracing(self, hw: DpuHardware | None) -> None:
        """What can be traced, and the place in debugfs where tracing used to be."""
        pools = [*self.hugetlb.hstates, *self.vm.cma_areas]
        core = [self.slowpath, self.reclaim, *self.kthreads.threads, self.contig, *pools]
        if self.has("COMPACTION"):
            core.append(self.compaction)
        if self.has("DPU_COMPACTION"):
            core += [self.dpu_direct, self.dpu, hw]
        self.tracing.add(core)
        if self.has("FTRACE") and self.has("DEBUG_FS"):
            self.registry.link(f"{DEBUGFS}/tracing", "../tracing")

    def _wakeup_kcompactd(self, nid: int, order: int, highest_type: int) -> None:
        if self.kcompactds:
            self.kcompactds[nid].wakeup_kcompactd(order, highest_type)

    def _trigger_kcompactd(self) -> None:
        for kcompactd in self.kcompactds:
            kcompactd.proactive_trigger()

    def has(self, option: str) -> bool:
        """Was this kernel built with CONFIG_`option`?"""
        return self.config.kconfig.IS_ENABLED(f"CONFIG_{option}")

    def add_files(self, path: str, kobj: Kobject) -> None:
        """Show `kobj` at `path`; not in a debugfs that this kernel lacks."""
        if self.has("DEBUG_FS") or not path.startswith(f"{DEBUGFS}/"):
            self.registry.add(path, kobj)

    # Time.

    def peek(self) -> int | None:
        """When the next timer is due, in the clock's nanoseconds; None if none is set."""
        now_ns = self.clock.now_ns()
        self.reporting.arm(now_ns)
        due = [ns for ns in (self.reporting.peek(), self.kthreads.peek(now_ns)) if ns is not None]
        return min(due, default=None)

    def step(self, now_ns: int) -> frozenset[str] | None:
        """Run what is due, and start the rounds of kernel threads that are.

        Returns None if anything happened, else who looked and went back to sleep: all that is new is when they look
        next, which is the same whether they looked before or not.
        """
        has_reported = self.reporting.step(now_ns)
        idle = self.kthreads.step(now_ns)
        return None if has_reported else idle

    # Processes.

    def count_processes(self) -> tuple[int, int, int]:
        """How many there are, kernel threads with them; the last pid; how many run now."""
        threads = self.kthreads.threads
        nr = len(self.tasks.by_pid) + len(threads)
        return nr, self.tasks.next_pid - 1, sum(thread.running for thread in threads)

    def start_process(self, name: str) -> Operation[Process]:
        """new_process() that waits for memory. OSError(EEXIST): another start under way has taken the name."""
        with self._taking(name):
            root = yield from alloc_root(self.vm, self._first_home, name)
            return self.new_process(name, root)

    def new_process(self, name: str, root: int | None = None) -> Process:
        """A process on the first node with a CPU. `root`: as for Mm()."""
        home = self._first_home
        process = Process(self, name, Mm(self.vm, home, self.cpus[home][0], root))
        self.processes[name] = process
        self.tasks.add(process.mm, process.pid_nr, busy=process.is_busy)
        return process

    @property
    def _first_home(self) -> int:
        return next(nid for nid, cpus in enumerate(self.cpus) if cpus)

    @contextmanager
    def _taking(self, name: str) -> Iterator[None]:
        """Nobody else may start a process of that name meanwhile. OSError(EEXIST): somebody is starting one."""
        if name in self._starting:
            raise OSError(errno.EEXIST, "name is taken")
        self._starting.add(name)
        try:
            yield
        finally:
            self._starting.remove(name)

    def fork_process(self, parent: Process, name: str) -> LongOp:
        """Fork `parent`; the child's directory appears beside it."""
        check_name(name)
        path = f"{MM_CONFIGFS}/{name}"
        if path in self.registry.nodes or name in self.processes:
            raise OSError(errno.EEXIST, "name is taken")
        cpus = self.cpus[parent.mm.node] or [parent.mm.cpu]
        with self._taking(name):  # a finished child could not be taken down at once, were this interrupted
            mm = yield from dup_mm(parent.mm, cpus[self.tasks.next_pid % len(cpus)])
        child = Process(self, name, mm)
        child.files = list(parent.files)
        child.mergeable = parent.mergeable
        for file in child.files:
            self.share(file)
        self.processes[name] = child
        task = self.tasks.add(mm, child.pid_nr, parent.pid_nr, busy=child.is_busy)
        task.oom_score_adj = self.tasks.by_pid[parent.pid_nr].oom_score_adj
        self.registry.add(path, child)

    def end_process(self, process: Process) -> LongOp:
        yield from process.end()
        if self.processes.get(process.name) is process:  # somebody may have taken the name
            del self.processes[process.name]

    def share(self, file: File) -> None:
        """One more process uses the file."""
        self._sharers[file.mapping] = self._sharers.get(file.mapping, 0) + 1

    def unshare(self, file: File) -> None:
        """One process less."""
        self._sharers[file.mapping] -= 1

    def nr_sharers(self, file: File) -> int:
        return self._sharers[file.mapping]

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

    def whole_hash(self) -> str:
        """The same over all there is: whatever files can show, and what decides how it goes on.

        Not in it: what is measured outside (cputime.py), which is no function of the inputs, and the device.
        """
        digest = Digest(("kernelsim",), _NOT_HASHED)
        digest.add(self)
        return hashlib.sha256(f"{self.state_hash()} {digest.hexdigest()}".encode()).hexdigest()
