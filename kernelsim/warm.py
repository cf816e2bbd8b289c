# SPDX-License-Identifier: GPL-2.0-only
"""Runs every compiled loop once, on small machines, so that no user waits for the compiler (`dpud warm`)."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from kernelsim.alloc_configfs import AllocGroup
from kernelsim.attr import PAGE_SIZE, File
from kernelsim.compaction import COMPACT_PRIO_ASYNC, COMPACT_PRIO_SYNC_FULL, COMPACT_PRIO_SYNC_LIGHT
from kernelsim.dpu_hw import DpuHardware
from kernelsim.hostimage import HostImage
from kernelsim.machine import ALLOC_CONFIGFS, MM_CONFIGFS, NODES_SYSFS, Machine, MachineConfig, NodeConfig
from kernelsim.mm_types import Vm
from kernelsim.mmap import Mm
from kernelsim.mmzone import MIGRATE_MOVABLE
from kernelsim.operation import complete
from kernelsim.page_alloc import free_pages
from kernelsim.pcp import drain_all_pages
from kernelsim.replay import Replay, requests
from kernelsim.trace_scan import (
    ALLOC,
    EXTFRAG,
    FREE,
    LOST,
    MIGRATED,
    NR_GFP_TEXTS,
    event_dtype,
    scan_lines,
)

Step = tuple[str, Callable[[], object]]

_NODE = NodeConfig(32 << 20, 1, 4 << 20)
_GFP_KERNEL = 0xCC0


def _compact(machine: Machine) -> None:
    """Traditional compaction for each of its callers, and the files that show what it did."""
    mem, compaction = machine.mem, machine.compaction
    for zone in range(len(mem.zones)):
        zone_type = int(mem.zones["type"][zone])
        for prio in (COMPACT_PRIO_ASYNC, COMPACT_PRIO_SYNC_LIGHT, COMPACT_PRIO_SYNC_FULL):
            request = compaction.try_to_compact_pages(_GFP_KERNEL, 9, prio, [zone], zone_type, MIGRATE_MOVABLE)
            _, captured = complete(request)
            if captured >= 0:
                free_pages(mem.pages, mem.zones, mem.blocks, captured, 9)
        for defrag_mode in "10":
            machine.registry.write("/proc/sys/vm/defrag_mode", defrag_mode)
            complete(compaction.compact_zone_for_kcompactd(zone, 9, zone_type))
        mem.zones["compact_blockskip_flush"][zone] = 1
    for nid in range(mem.nr_nodes):
        complete(compaction.proactive_compact_node(nid))
        compaction.reset_isolation_suitable(nid)
        machine.registry.write(f"{NODES_SYSFS}/node{nid}/compact", "1")
    machine.registry.write("/proc/sys/vm/compact_memory", "1")
    drain_all_pages(mem)
    for name in ("extfrag_index", "unusable_index"):
        machine.registry.read(f"/sys/kernel/debug/extfrag/{name}")


def _exercise(machine: Machine) -> None:
    """Everything a process can go through, and compaction by each who can copy."""
    read, write = machine.registry.read, machine.registry.write
    machine.registry.add(f"{MM_CONFIGFS}/warm", machine.new_process("warm"))
    home = f"{MM_CONFIGFS}/warm"
    for name, text in (("anon", "24M"), ("file", "1M"), ("holes", "50 seed=1"), ("pin", "1"), ("mlock", "10")):
        write(f"{home}/{name}", text)
    write(f"{home}/fork", "child")
    write(f"{home}/touch", "10")
    for seed, engine in enumerate((machine.dpu.engine.name, "cpu", "cpu-batched")):
        write("/sys/kernel/debug/dpu_compact/engine", engine)
        for name in ("warm", "child"):
            write(f"{MM_CONFIGFS}/{name}/holes", f"40 seed={seed}")
        for nid in range(machine.mem.nr_nodes):
            write(f"{NODES_SYSFS}/node{nid}/compact_dpu", "1")
    write(f"{home}/holes", "50 seed=9")
    _compact(machine)
    for name, text in (("thp", "1"), ("anon", "8M"), ("fork", "huge"), ("touch", "1"), ("pin", "1"), ("holes", "1")):
        write(f"{home}/{name}", text)
    _merge(machine)
    _allocate(machine)
    for enabled in "10":
        write("/proc/sys/vm/dpu_compact_enabled", enabled)
        write("/sys/kernel/debug/cma/pernuma0/alloc", "600")
        write("/sys/kernel/debug/cma/pernuma0/free", "600")
    write("/proc/sys/vm/nr_hugepages", "2")
    write("/proc/sys/vm/nr_hugepages", "0")
    for path in ("/proc/buddyinfo", "/proc/pagetypeinfo", "/proc/vmstat", "/proc/meminfo", f"{home}/verify"):
        read(path)
    _look_at_pages(machine, read(f"{home}/pid").decode().strip())
    assert not machine.check()
    machine.state_hash()
    for process in list(machine.processes.values()):
        complete(machine.end_process(process))


def _merge(machine: Machine) -> None:
    """KSM: pages become one, are found by compaction, and part."""
    for name, text in (("mergeable", "1"), ("thp", "0"), ("anon", "2M"), ("same", "50 kinds=3")):
        machine.registry.write(f"{MM_CONFIGFS}/warm/{name}", text)
    assert machine.ksm is not None
    for _ in range(2):
        complete(machine.ksm.do_scan(2000))
    machine.registry.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    machine.registry.write("/sys/kernel/mm/ksm/run", "2")


def _look_at_pages(machine: Machine, pid: str) -> None:
    """The files that walk page tables, and those that show page frames."""
    for name in ("smaps", "smaps_rollup", "numa_maps", "status"):
        machine.registry.read(f"/proc/{pid}/{name}")
    machine.registry.write(f"/proc/{pid}/clear_refs", "1")
    for path in ("/proc/kpageflags", "/proc/kpagecount", "/proc/kpagecgroup", f"/proc/{pid}/pagemap"):
        file = machine.registry.nodes[path]
        assert isinstance(file, File)
        complete(file.attr.read_stream(file.kobj, 0, PAGE_SIZE, False))


def _allocate(machine: Machine) -> None:
    """The slow path with all that is behind it: more than there is, of small and of large blocks."""
    home = f"{ALLOC_CONFIGFS}/warm"
    machine.registry.add(home, AllocGroup(machine).make_item("warm"))
    write = machine.registry.write
    for order, gfp in (("9", "GFP_KERNEL|__GFP_NOWARN"), ("2", "GFP_KERNEL|__GFP_NOWARN"), ("0", "GFP_ATOMIC")):
        for name, text in (("order", order), ("gfp", gfp), ("count", "5000")):
            write(f"{home}/{name}", text)
        with suppress(OSError):  # there was nothing left
            write(f"{home}/alloc", "1")
        assert not machine.check()
    machine.step(machine.clock.now_ns())
    write(f"{home}/free", "1")
    write("/proc/sys/vm/drop_caches", "3")


def preload(hw: DpuHardware) -> None:
    """Load the compiled loops that a first compaction needs, so that it does not wait for the disk."""
    machine = Machine(MachineConfig(nodes=(_NODE,), bytes="stamp"), hw)
    machine.registry.add(f"{MM_CONFIGFS}/warm", machine.new_process("warm"))
    for name, text in (("anon", "8M"), ("holes", "50"), ("touch", "10")):
        machine.registry.write(f"{MM_CONFIGFS}/warm/{name}", text)
    machine.registry.read(f"{MM_CONFIGFS}/warm/verify")
    for order in ("9", "18"):
        machine.registry.write("/proc/sys/vm/dpu_compact_region_order", order)
        machine.registry.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    machine.registry.write("/proc/sys/vm/compact_memory", "1")


def _import(image: HostImage, hw: DpuHardware) -> None:
    machine = Machine.from_image(image, None, hw)
    machine.registry.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    _compact(machine)
    assert not machine.check(), machine.check()


def _replay(image: HostImage) -> None:
    """Every kind of event, so that a trace does not wait: blocks that move and do not, freed whole and in pieces."""
    replays: list[Replay] = []

    def adopt(vm: Vm, image: HostImage) -> list[tuple[str, Mm]]:
        replays.append(Replay(vm))
        return replays[0].adopt(image)

    machine = Machine.from_image(image, owners=adopt)
    events = np.zeros(10, dtype=event_dtype).view(np.recarray)
    events["kind"] = [ALLOC, ALLOC, ALLOC, FREE, FREE, FREE, FREE, EXTFRAG, MIGRATED, LOST]
    events["order"] = [0, 2, 2, 0, 1, 0, 9, 0, 0, 0]
    events["migratetype"] = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    events["pfn"] = [0, 8, 16, 0, 8, 17, 1024, 1, 1, 1]
    events["gfp"] = _GFP_KERNEL
    replay = replays[0]
    line = np.frombuffer(b" a-1 [000] 1.000001: mm_page_free: page=1 pfn=0x1 order=0\n", dtype=np.uint8)
    rows = np.zeros(1, dtype=event_dtype).view(np.recarray)
    scan_lines(line, rows, np.zeros(NR_GFP_TEXTS, np.uint64), np.zeros((NR_GFP_TEXTS, 2), np.int64))
    replay.run(events, *requests(events, lambda _gfp: 0), 0, 1, False)
    events["pfn"][1] = 15 * 512  # free in the image
    replay.place(events[1], -1, 2, 0)
    machine.registry.write("/proc/sys/vm/compact_memory", "1")
    assert not machine.check(), machine.check()


def steps(new_hw: Callable[[], DpuHardware], small_image: Callable[[], HostImage]) -> list[Step]:
    """(what, call) pairs in order; `new_hw` makes a device, `small_image` a host image of a few MiB."""

    def run(words: str) -> None:
        _exercise(Machine(MachineConfig(nodes=(_NODE, _NODE), bytes=words), new_hw()))

    return [
        ("machine with real bytes", lambda: run("full")),
        ("machine with content stamps", lambda: run("stamp")),
        ("machine from a capture", lambda: _import(small_image(), new_hw())),
        ("replay of a trace", lambda: _replay(small_image())),
    ]
