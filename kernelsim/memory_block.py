# SPDX-License-Identifier: GPL-2.0-only
"""/sys/devices/system/memory: memory in blocks, as hotplug sees it (drivers/base/memory.c). `lsmem` adds them up.

A block is as large as on x86 (probe_memory_block_size): 128 MiB, on machines of 64 GiB and more up to 2 GiB.
Differences from Linux: a block is smaller, down to 2 MiB, where the nodes would not end at block boundaries otherwise;
blocks cannot be taken offline, so `online` and `state` are read-only.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from kernelsim.attr import Attr, Kobject, Registry, Text
from kernelsim.mmzone import Mem
from kernelsim.page import PAGE_SIZE

MEMORY_SYSFS = "/sys/devices/system/memory"
_MIN_BLOCK, _X86_BLOCK, _MAX_BLOCK = 2 << 20, 128 << 20, 2 << 30
_LARGE_MACHINE = 64 << 30


def memory_block_size_bytes(mem: Mem) -> int:
    """Bytes of a block."""
    zones = _populated(mem)
    edges = [int(pfn) * PAGE_SIZE for pfn in np.unique(mem_edges(zones)) if pfn > 1]  # pfn 0 is no zone's
    total = int(zones["present"].sum()) * PAGE_SIZE
    size = _MAX_BLOCK if total >= _LARGE_MACHINE else _X86_BLOCK
    while size > _MIN_BLOCK and any(edge % size for edge in edges):
        size //= 2
    return size


def mem_edges(zones: Any) -> list[int]:
    """Where nodes begin and end: the outermost pfns of their zones."""
    edges = []
    for nid in np.unique(zones["node"]):
        of_node = zones[zones["node"] == nid]
        edges += [int(of_node["start_pfn"].min()), int(of_node["end_pfn"].max())]
    return edges


def _populated(mem: Mem) -> Any:
    return mem.zones[mem.zones["present"] > 0]


class MemoryBlocks(Kobject):
    """The directory of all blocks."""

    block_size_bytes = Attr(Text(), doc="Size of a block, hexadecimal.", mode=0o444, kept=True)

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    @block_size_bytes.show
    def _block_size_bytes(self) -> str:
        return f"{self.size_bytes:x}\n"


class MemoryBlock(Kobject):
    """One block's directory."""

    state = Attr(Text(), doc="online: the memory is in use.", mode=0o444, kept=True)
    online = Attr(Text(), doc="1: the memory is in use.", mode=0o444, kept=True)
    phys_index = Attr(
        Text(), doc="Number of the block: its address by the size of a block, hexadecimal.", mode=0o444, kept=True
    )
    phys_device = Attr(Text(), doc="0: the platform says nothing about devices.", mode=0o444, kept=True)
    removable = Attr(Text(), doc="1: the kernel could try to take it offline.", mode=0o444, kept=True)
    valid_zones = Attr(Text(), doc="Zone that the block is in; none: in several.", mode=0o444, kept=True)

    def __init__(self, mem: Mem, index: int, zones: list[int]) -> None:
        self.mem, self.index, self.zones = mem, index, zones

    @state.show
    def _state(self) -> str:
        return "online\n"

    @online.show
    def _online(self) -> str:
        return "1\n"

    @phys_index.show
    def _phys_index(self) -> str:
        return f"{self.index:08x}\n"

    @phys_device.show
    def _phys_device(self) -> str:
        return "0\n"

    @removable.show
    def _removable(self) -> str:
        return "1\n"

    @valid_zones.show
    def _valid_zones(self) -> str:
        return self.mem.zone_name(self.zones[0]) + "\n" if len(self.zones) == 1 else "none\n"


def _blocks(mem: Mem, nr_pages: int) -> Iterator[tuple[int, list[int]]]:
    """(number of the block, zones with memory in it)."""
    found: dict[int, list[int]] = {}
    for zone in np.flatnonzero(mem.zones["present"]).tolist():
        first, end = int(mem.zones["start_pfn"][zone]), int(mem.zones["end_pfn"][zone])
        for index in range(first // nr_pages, -(-end // nr_pages)):
            found.setdefault(index, []).append(zone)
    yield from sorted(found.items())


def add_memory_files(registry: Registry, mem: Mem, nodes_sysfs: str | None) -> None:
    """The whole tree; with links to and from `nodes_sysfs`, where nodes are shown."""
    size = memory_block_size_bytes(mem)
    registry.add(MEMORY_SYSFS, MemoryBlocks(size))
    for index, zones in _blocks(mem, size // PAGE_SIZE):
        path = f"{MEMORY_SYSFS}/memory{index}"
        registry.add(path, MemoryBlock(mem, index, zones))
        for nid in sorted({int(mem.zones["node"][zone]) for zone in zones}) if nodes_sysfs else ():
            registry.link(f"{path}/node{nid}", f"../../node/node{nid}")
            registry.link(f"{nodes_sysfs}/node{nid}/memory{index}", f"../../memory/memory{index}")
