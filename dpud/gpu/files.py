# SPDX-License-Identifier: MIT
"""/sys/class/gpu_memvirt/gpuN/{memory,address_space}: a device's memory, and the address space they all share.

Tables have one record a line; what is one number is a file of its own. Counters only grow.
"""

import errno
import re
from collections.abc import Iterator

from dpud.gpu.address_space.permissions import Permission
from dpud.gpu.address_space.regions import Region
from dpud.gpu.check import violations
from dpud.gpu.clock import PacedClock
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.location import Location
from dpud.gpu.memory import GpuMemory
from kernelsim.attr import Attr, Int, Kobject, Operation, Size, Text

_SLICE_BYTES = 4 << 20
"""How much is evicted before others may use the machine."""


def settle(memory: GpuMemory) -> Operation[None]:
    """Wait, without holding the machine, until real time has come to where the device is."""
    if isinstance(memory.clock, PacedClock) and not (debt := memory.clock.debt()).is_over:
        yield debt


def reclaim(memory: GpuMemory, nr_bytes: int, location: int) -> Operation[None]:
    """Evict so many bytes. Raises OSError(EAGAIN) where fewer could go, as cgroup's memory.reclaim does."""
    left = nr_bytes
    while left > 0:
        freed = memory.evict(min(left, _SLICE_BYTES), location)
        if not freed:
            raise OSError(errno.EAGAIN, f"{nr_bytes - left} of {nr_bytes} bytes could be evicted")
        left -= freed
        yield from settle(memory)
        yield None


class MemoryFiles(Kobject):
    """One location's memory."""

    total_bytes = Attr(Text(), doc="Size of the memory.")
    free_bytes = Attr(Text(), doc="Of it, in free frames.")
    free_blocks = Attr(Text(), doc="Free blocks of 2K, 4K, ... 2M, as buddyinfo has them.")
    reclaim = Attr(
        Size(1), doc="Evict this much, in the policy's order, into pool and swap. EAGAIN where less could go."
    )
    engine_stat = Attr(Text(), doc="Copy engines: name, transfers, bytes, bandwidth in bytes/s, latency in ns.")

    def __init__(self, memory: GpuMemory, location: Location) -> None:
        self.memory = memory
        self.location = location

    @total_bytes.show
    def _total_bytes(self) -> str:
        return str(self.location.frames.nr_bytes)

    @free_bytes.show
    def _free_bytes(self) -> str:
        return str(self.location.frames.nr_free_bytes)

    @free_blocks.show
    def _free_blocks(self) -> str:
        return " ".join(map(str, self.location.frames.free_blocks()))

    @reclaim.store
    def _reclaim(self, nr_bytes: int) -> Operation[None]:
        return reclaim(self.memory, nr_bytes, self.location.number)

    @engine_stat.show
    def _engine_stat(self) -> str:
        device = self.location.hardware
        assert isinstance(device, SimulatedDevice)
        engines = {"upload": device.upload, "download": device.download, "local": device.local}
        return "".join(
            f"{name} {e.nr_transfers} {e.nr_bytes} {e.bandwidth_bytes_per_s} {e.latency_ns}\n"
            for name, e in engines.items()
        )


class AddressSpaceFiles(Kobject):
    """The unified address space."""

    range_bytes = Attr(Text(), doc="Addresses there are for regions.")
    table_bytes = Attr(Text(), doc="What the page tables take.")
    nr_regions = Attr(Text(), doc="Regions allocated.")
    maps = Attr(Text(), doc="A line for each region: addresses, permissions, type, page size, priority, client.")
    residency = Attr(Text(), doc="A line for each region: address, pages, then by state, then by location.")
    tlb_stat = Attr(Text(), doc="A line for each location: hits, misses, entries invalidated, flushes.")
    fault_stat = Attr(Text(), doc="Faults served and refused, in pages: name and count.")
    faults = Attr(Text(), doc="The last refused accesses: who, where, what, why.")
    stat = Attr(Text(), doc="Pages evicted, found corrupt, put into the stores and taken out: name and count.")
    low_watermark = Attr(Int(0, 99), 10, doc="Percent free below which a location's pages are evicted in background.")
    watermark_gap = Attr(Int(1, 100), 5, doc="It stops when so many percent more than low_watermark are free.")
    verify = Attr(Text(), doc="Checks every invariant: ok, or a line for each that is violated.")

    def __init__(self, memory: GpuMemory) -> None:
        self.memory = memory

    @range_bytes.show
    def _range_bytes(self) -> str:
        return str(self.memory.space.nr_bytes)

    @table_bytes.show
    def _table_bytes(self) -> str:
        return str(self.memory.space.table.nr_bytes)

    @nr_regions.show
    def _nr_regions(self) -> str:
        return str(len(self.memory.space.regions))

    @maps.show
    def _maps(self) -> str:
        return "".join(_map_line(region) for region in self.memory.space.regions)

    @residency.show
    def _residency(self) -> str:
        return "".join(self._residency_lines())

    def _residency_lines(self) -> Iterator[str]:
        for region in self.memory.space.regions:
            counts = self.memory.state_of(region)
            yield f"{region.va:x} {region.nr_pages} " + " ".join(f"{name}={nr}" for name, nr in counts.items()) + "\n"

    @tlb_stat.show
    def _tlb_stat(self) -> str:
        space = self.memory.space
        return "".join(
            f"{name} {tlb.nr_hits} {tlb.nr_misses} {tlb.nr_invalidated} {tlb.nr_flushes}\n"
            for name, tlb in zip(space.names, space.tlbs, strict=True)
        )

    @fault_stat.show
    def _fault_stat(self) -> str:
        faults = self.memory.space.faults
        refused = {f"refused_{name}": nr for name, nr in sorted(faults.refused.items())}
        return "".join(f"{name} {nr}\n" for name, nr in (faults.served | refused).items())

    @faults.show
    def _faults(self) -> str:
        return "".join(f"{record}\n" for record in self.memory.space.faults.records)

    @stat.show
    def _stat(self) -> str:
        store = self.memory.store
        counts = dict(self.memory.residency.events)
        counts |= {"stored": store.nr_stored, "fetched": store.nr_fetched, "demoted": store.nr_demoted}
        return "".join(f"{name} {nr}\n" for name, nr in counts.items())

    @low_watermark.stored
    def _set_low(self, _old: int, _new: int) -> None:
        self._set_watermarks()

    @watermark_gap.stored
    def _set_gap(self, _old: int, _new: int) -> None:
        self._set_watermarks()

    def _set_watermarks(self) -> None:
        marks = self.memory.residency.watermarks
        marks.low, marks.high = self.low_watermark, min(100, self.low_watermark + self.watermark_gap)

    @verify.show
    def _verify(self) -> str:
        return "\n".join(violations(self.memory)) or "ok"


def _map_line(region: Region) -> str:
    permissions = region.permissions.get(region.client)
    owner = sorted({str(Permission(int(p))) for p in permissions}) if permissions is not None else ["---"]
    return (
        f"{region.va:x}-{region.end:x} {','.join(owner)} {region.type.value} {region.page_bytes >> 10}K"
        f" {region.priority} {region.client}\n"
    )


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def check_name(name: str) -> None:
    """Raises OSError(EINVAL) for a name that would be ambiguous in the tables."""
    if not _NAME.fullmatch(name):
        raise OSError(errno.EINVAL, "bad name")
