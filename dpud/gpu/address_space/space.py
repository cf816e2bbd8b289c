# SPDX-License-Identifier: MIT
"""The unified address space: regions, who may do what with them, and which locations reach their pages how.

It knows addresses, permissions and translations, and moves no bytes; `memory.py` does that. Every change of an entry
goes through `map_pages` and `unmap_pages`, which keep TLBs and software translations in step.

`translate` is the software's way to ask (as /proc/PID/pagemap): it has a cache of its own and leaves TLB and counters
alone. Accesses go through `entries`, by the location's TLB.
"""

import errno
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.faultlog import FaultLog, FaultRecord
from dpud.gpu.address_space.pagetable import (
    CHUNK_BYTES,
    PAGE_SHIFTS,
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_PRESENT,
    PTE_WRITE,
    PageTable,
    Ptes,
    find_chunk,
    make_ptes,
    point_elsewhere,
    pte_phys,
    translate_bulk,
)
from dpud.gpu.address_space.permissions import Permission
from dpud.gpu.address_space.regions import PageState, Region, Regions, RegionType
from dpud.gpu.address_space.tlb import Tlb
from dpud.gpu.clock import Clock
from dpud.gpu.errors import GpuError
from dpud.gpu.hal.extents import Extents

VA_BASE = 1 << 45
DEFAULT_BYTES = 1 << 40
_GRANULE_SHIFT = 12
MAX_GRANULES = 1 << 22
_WINDOW_GRANULES = 64
_WINDOW_BYTES = _WINDOW_GRANULES << _GRANULE_SHIFT

Pages = NDArray[np.int64]


class Translations:
    """Software's translations of one location: for each 4 KiB of the range, physical minus relative address.

    They are a list from the beginning of the range on, so that asking is a subtraction, a shift and a load: a
    dictionary has to hash and to compare. What is not known is None, or beyond the list's end, and is walked. So is
    what lies beyond MAX_GRANULES, and pages of 2 KiB, of which a granule has two.
    """

    def __init__(self, table: PageTable, location: int) -> None:
        self.deltas: list[int | None] = []
        self._table = table
        self.location = location
        self.translate = self._translator()
        """Physical address (location << 40 | byte) of a virtual one. Raises GpuError(EFAULT)."""

    def _translator(self) -> Callable[[int], int]:
        """A function with all it needs in its closure: to look up attributes would take a fifth of its time."""
        deltas, walk, base = self.deltas, self._walk, VA_BASE

        def translate(va: int) -> int:
            at = va - base
            try:
                if at >= 0:
                    return at + deltas[at >> 12]  # type: ignore[operator]  # _GRANULE_SHIFT; None is a TypeError
            except (IndexError, TypeError):
                pass
            return walk(va)

        return translate

    def _walk(self, va: int) -> int:
        chunk = find_chunk(self._table.dirs, va)
        if chunk == 0:
            raise GpuError(errno.EFAULT, f"nothing is mapped at {va:#x}")
        shift = chunk & 63
        pte = self._table.ptes[self.location, (chunk >> 6) + ((va & (CHUNK_BYTES - 1)) >> shift)]
        if not pte & PTE_PRESENT:
            raise GpuError(errno.EFAULT, f"the page at {va:#x} is not resident here")
        if shift >= _GRANULE_SHIFT:
            self._fill(va)
        return pte_phys(pte, va & ((1 << shift) - 1))

    def _fill(self, va: int) -> None:
        """Enter what is resident around an address: whoever asks for one page asks for the next."""
        first = ((va & -_WINDOW_BYTES) - VA_BASE) >> _GRANULE_SHIFT
        if first + _WINDOW_GRANULES > MAX_GRANULES:
            return
        self.deltas.extend([None] * (first + _WINDOW_GRANULES - len(self.deltas)))
        vas = (va & -_WINDOW_BYTES) + np.arange(0, _WINDOW_BYTES, 1 << _GRANULE_SHIFT)
        phys = np.empty_like(vas)
        translate_bulk(self._table.dirs, self._table.ptes[self.location], vas, phys)
        deltas = phys - (vas - VA_BASE)
        for index in np.flatnonzero(phys >= 0).tolist():
            self.deltas[first + index] = int(deltas[index])

    def forget(self, vas: NDArray[np.int64], shift: int) -> None:
        """Drop what concerns pages that begin at these addresses."""
        if not self.deltas or shift < _GRANULE_SHIFT:
            return
        per_page = 1 << (shift - _GRANULE_SHIFT)
        if len(vas) * per_page > len(self.deltas):
            self.deltas.clear()
            return
        for first in ((vas - VA_BASE) >> _GRANULE_SHIFT).tolist():
            known = min(per_page, len(self.deltas) - first)
            if known > 0:
                self.deltas[first : first + known] = [None] * known

    def believed(self) -> list[tuple[int, int]]:
        """(address, what it is believed to be translated to) of everything it holds, for checks."""
        starts = ((at << _GRANULE_SHIFT, delta) for at, delta in enumerate(self.deltas) if delta is not None)
        return [(VA_BASE + at, at + delta) for at, delta in starts]


class AddressSpace:
    """One virtual range over several locations; the names are for the fault log."""

    def __init__(self, names: Sequence[str], clock: Clock, nr_bytes: int = DEFAULT_BYTES) -> None:
        self.names = tuple(names)
        self.clock = clock
        self.nr_bytes = nr_bytes
        self.regions = Regions()
        self.table = PageTable(len(names))
        self.tlbs = [Tlb() for _ in names]
        self.faults = FaultLog()
        self.translations = [Translations(self.table, location) for location in range(len(names))]
        self._extents = Extents(nr_bytes, CHUNK_BYTES)
        self._next_key = 0
        self.nr_region_bytes = 0
        self.limit_bytes = nr_bytes
        """Of all regions together."""

    # Regions.

    def reserve(self, client: str, nr_bytes: int, kind: RegionType, page_bytes: int, device: int) -> Region:
        """Addresses for a region, its owner without permissions yet. Raises GpuError(EINVAL), GpuError(ENOMEM)."""
        page_shift = page_bytes.bit_length() - 1
        if page_shift not in PAGE_SHIFTS or page_bytes != 1 << page_shift:
            raise GpuError(errno.EINVAL, f"pages of {page_bytes} bytes")
        if nr_bytes < 1:
            raise GpuError(errno.EINVAL, f"a region of {nr_bytes} bytes")
        if self.nr_region_bytes + nr_bytes > self.limit_bytes:
            raise GpuError(errno.ENOMEM, f"{nr_bytes} bytes more are out of all proportion to the memory there is")
        nr_chunks = -(-nr_bytes // CHUNK_BYTES)
        start = self._extents.take((nr_chunks + 1) * CHUNK_BYTES)  # one stays empty, so that running over is a fault
        if start is None:
            raise GpuError(errno.ENOMEM, f"no {nr_bytes} addresses in a row are left of {self.nr_bytes}")
        va = VA_BASE + start
        leaf = self.table.map_region(va, nr_chunks, page_shift)
        region = Region(va, nr_bytes, page_shift, kind, client, device, self._next_key, leaf)
        self._next_key += region.nr_pages
        self.nr_region_bytes += nr_bytes
        self.regions.add(region)
        return region

    def release(self, region: Region) -> None:
        """Give a region's addresses back; it has no pages any more."""
        region.released = True
        self.nr_region_bytes -= region.nr_bytes
        self.table.unmap_region(region.va, region.nr_chunks, region.page_shift, region.leaf)
        self.regions.remove(region)
        self._extents.give(region.va - VA_BASE)

    def owned(self, client: str, va: int) -> Region:
        """The region that begins at an address, for its owner. Raises GpuError(EFAULT), GpuError(EACCES)."""
        region = self.regions.find(va)
        if region is None or region.va != va:
            raise GpuError(errno.EFAULT, f"no region begins at {va:#x}")
        if region.client != client:
            raise GpuError(errno.EACCES, f"the region at {va:#x} is {region.client}'s")
        return region

    # Permission.

    def check_access(self, client: str, va: int, nr_bytes: int, wanted: Permission, location: int) -> Region:
        """The region of an access that is allowed. Raises GpuError(EFAULT | EACCES), and logs it."""
        region = self.regions.find(va)
        if region is None or va + nr_bytes > region.end:
            at = va if region is None else region.end
            self.refuse(client, at, wanted, location, errno.EFAULT, "nothing is mapped there")
        assert region is not None
        first, end = self.page_range(region, va, nr_bytes)
        if not region.allowed(client, first, end, wanted):
            at = max(va, self._first_denied(region, client, first, end, wanted))
            self.refuse(client, at, wanted, location, errno.EACCES, self._granted(region, client, at))
        return region

    def refuse(self, client: str, va: int, wanted: Permission, location: int, number: int, why: str) -> None:
        """Log a refused access and raise its GpuError."""
        region = self.regions.find(va)
        page = "none" if region is None else PageState(region.state[(va - region.va) >> region.page_shift]).name
        record = FaultRecord(self.clock.now_ns(), client, self.names[location], va, wanted, number, page, why)
        self.faults.refuse(record)
        raise GpuError(number, f"{client} at {self.names[location]}, {wanted} of {va:#x}: {why}")

    def _first_denied(self, region: Region, client: str, first: int, end: int, wanted: Permission) -> int:
        granted = region.permissions.get(client)
        if granted is None:
            return region.va
        page = first + int(np.argmax(granted[first:end] & wanted != wanted))
        return region.va + (page << region.page_shift)

    def _granted(self, region: Region, client: str, va: int) -> str:
        granted = region.permissions.get(client)
        if granted is None:
            return f"a page of {region.client} that it has no permission for"
        return f"permissions are {Permission(int(granted[(va - region.va) >> region.page_shift]))}"

    def protect(self, region: Region, client: str, first: int, end: int, permission: Permission) -> None:
        """Give a client these permissions, and no others, for pages [first, end)."""
        granted = region.permissions.get(client)
        if granted is None:
            granted = region.permissions[client] = np.zeros(region.nr_pages, dtype=np.uint8)
        granted[first:end] = permission.effective()
        if not granted.any() and client != region.client:
            del region.permissions[client]

    @staticmethod
    def page_range(region: Region, va: int, nr_bytes: int) -> tuple[int, int]:
        """Pages [first, end) that a range touches."""
        first = (va - region.va) >> region.page_shift
        return first, max(first, -(-(va + nr_bytes - region.va) >> region.page_shift))

    # Entries.

    def entries(self, region: Region, first: int, nr_pages: int, location: int) -> Ptes:
        """What a location's TLB, or a walk, says of pages; 0 for those that it cannot reach."""
        va = region.va + (first << region.page_shift)
        return self.tlbs[location].translate(
            self.table.dirs, self.table.ptes[location], va, region.page_shift, nr_pages
        )

    def set_dirty(self, region: Region, first: int, nr_pages: int, location: int) -> None:
        """A location wrote to pages."""
        at = region.leaf + first
        self.table.ptes[location, at : at + nr_pages] |= PTE_DIRTY
        for log in region.dirty_logs:
            log.mark(first, nr_pages)

    def map_pages(self, region: Region, pages: Pages, location: int, home: int, frames: Pages, *, write: bool) -> None:
        """Let a location reach pages in frames of `home`."""
        at = region.leaf + pages
        old = self.table.ptes[location, at]
        new = make_ptes(home, frames, PTE_WRITE if write else np.uint64(0))
        self.table.ptes[location, at] = new | (old & PTE_DIRTY)
        if old.any():
            self._invalidate(region, pages[old != 0], location)

    def unmap_pages(self, region: Region, pages: Pages, locations: Sequence[int] | None = None) -> NDArray[np.bool_]:
        """Let no location, or none of these, reach pages any more -> which of them had been written to."""
        dirty = np.zeros(len(pages), dtype=np.bool_)
        at = region.leaf + pages
        for location in range(len(self.names)) if locations is None else locations:
            old = self.table.ptes[location, at]
            dirty |= old & PTE_DIRTY != 0
            self.table.ptes[location, at] = 0
            if old.any():
                self._invalidate(region, pages[old != 0], location)
        return dirty

    def relocate_pages(self, region: Region, pages: Pages, home: int, frames: Pages) -> None:
        """Pages of a memory are in other frames of it: every entry that points there follows, and keeps its bits."""
        reached = np.zeros((len(self.names), len(pages)), dtype=np.bool_)
        point_elsewhere(self.table.ptes, region.leaf + pages, home, frames, reached)
        for location, here in enumerate(reached):
            if here.any():
                self._invalidate(region, pages[here], location)

    def write_protect(self, region: Region, pages: Pages) -> None:
        """The next write to these pages asks first."""
        at = region.leaf + pages
        for location in range(len(self.names)):
            self.table.ptes[location, at] &= ~(PTE_WRITE | PTE_DIRTY)
            self._invalidate(region, pages, location)

    def accessed(self, region: Region) -> NDArray[np.bool_]:
        """Which pages were accessed by any location since `clear_accessed`, or since they were mapped."""
        entries = self.table.ptes[:, region.leaf : region.leaf + region.nr_pages]
        found: NDArray[np.bool_] = (entries & PTE_ACCESSED != 0).any(axis=0)
        return found

    def clear_accessed(self, region: Region) -> None:
        """Forget which pages were accessed."""
        self.table.ptes[:, region.leaf : region.leaf + region.nr_pages] &= ~PTE_ACCESSED
        for location in range(len(self.names)):
            self._invalidate(region, np.arange(region.nr_pages), location)

    def _invalidate(self, region: Region, pages: Pages, location: int) -> None:
        vas = region.vas(pages)
        self.tlbs[location].invalidate(vas, region.page_shift)
        self.translations[location].forget(vas, region.page_shift)

    # Translation.

    def translate(self, va: int, location: int = 0) -> int:
        """Physical address (location << 40 | byte) of a virtual one. Raises GpuError(EFAULT)."""
        return self.translations[location].translate(va)

    def translate_bulk(self, vas: NDArray[np.int64], location: int = 0) -> NDArray[np.int64]:
        """The same for int64 addresses; NOT_RESIDENT or NOT_MAPPED where there is none."""
        out = np.empty(len(vas), dtype=np.int64)
        translate_bulk(self.table.dirs, self.table.ptes[location], np.ascontiguousarray(vas, dtype=np.int64), out)
        return out

    def check_translations(self) -> list[str]:
        """What a TLB or a software cache believes that the page table does not say."""
        wrong = []
        ignored = ~int(PTE_ACCESSED | PTE_DIRTY)
        for name, table, tlb, cache in zip(self.names, self.table.ptes, self.tlbs, self.translations, strict=True):
            for va, shift, pte in tlb.believed():
                chunk = find_chunk(self.table.dirs, va)
                true = int(table[(chunk >> 6) + ((va & (CHUNK_BYTES - 1)) >> shift)]) if chunk & 63 == shift else 0
                if (true ^ pte) & ignored:
                    wrong.append(f"the TLB of {name} believes {pte:#x} of {va:#x}, the table says {true:#x}")
            believed = cache.believed()
            vas = np.array([va for va, _ in believed], dtype=np.int64)
            for (va, phys), true in zip(believed, self.translate_bulk(vas, cache.location).tolist(), strict=True):
                if phys != true:
                    wrong.append(f"software's translations of {name} are stale at {va:#x}")
        return wrong
