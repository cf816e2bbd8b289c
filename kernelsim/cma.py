# SPDX-License-Identifier: GPL-2.0-only
"""CMA areas: memory that movable pages may use until somebody needs a contiguous piece of it (mm/cma.c, cma_debug.c).

An area is set aside at boot: its pageblocks are MIGRATE_CMA and free, so that movable allocations fall back to them
(page_alloc.py) and nothing else gets in. `cma_alloc` finds a piece that no one has allocated before, in the bitmap, and
empties it of whatever lives there (contig.py).

Each node has the area that the configuration gives it, `pernumaN`, as with cma_pernuma= on Linux: at the end of the
node's memory, in its highest zone. debugfs cma/NAME has the kernel's files: `echo N > alloc` allocates N pages and
`echo N > free` frees N, the newest allocation first and as much of the last one as is needed. A write that fails is
ENOMEM, whatever the reason, as there; the log has the reason.

Invariants (debug_vm): a bit of the bitmap is set for exactly the pages that CMA callers hold (and those being emptied
for one); every other page of an area is free or movable, or belongs to a block that alloc_configfs.py was given for a
movable request and, as bad drivers do, does not let move; zone.cma_pages and free_cma add up.

Differences from Linux: after EBUSY the next try begins behind the page that was in the way, not one page further on:
all tries in between would meet it again. A long-term pin does not first move its page out of the area. One bit is one
page.
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernelsim.attr import Attr, Int, Kobject, Text
from kernelsim.contig import Contig
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import MIGRATE_CMA, Mem, pageblock_nr_pages, pageblock_order
from kernelsim.operation import Mutex, Operation
from kernelsim.page import PAGE_SHIFT
from kernelsim.page_alloc import free_range
from kernelsim.page_isolation import RangeBusy
from kernelsim.printk import KERN_ERR
from kernelsim.trace_hook import traced

CMA_MIN_ALIGNMENT_PAGES = pageblock_nr_pages
ORDER_PER_BIT = 0
_INT_MAX = 2**31 - 1
_U64 = Int(0, 2**64 - 1)


def cma_declare_contiguous(mem: Mem, nid: int, usable: int, count: int) -> None:
    """Set aside `count` pages of node `nid` at the end of what boot left usable, all in its highest zone.

    Called instead of free_range() for the zone's pages up to `usable`. ValueError if they do not fit.
    """
    zone = mem.zones_of(nid)[-1]
    start = int(mem.zones["start_pfn"][zone])
    base = (usable - count) & -CMA_MIN_ALIGNMENT_PAGES
    if base < start:
        raise ValueError(f"node {nid}: zone {mem.zone_name(zone)} is too small for its CMA area")
    end = base + count
    mem.blocks[base >> pageblock_order : end >> pageblock_order] = MIGRATE_CMA
    for first, last in ((start, base), (base, end), (end, usable)):
        free_range(mem.pages, mem.zones, mem.blocks, first, last)
    mem.zones["cma_pages"][zone] += count
    mem.cma_ranges.append((nid, base, count))


class CmaSysfs(Kobject):
    """/sys/kernel/mm/cma/NAME (mm/cma_sysfs.c)."""

    alloc_pages_success = Attr(Int(), doc="Pages that were allocated from the area.", mode=0o444)
    alloc_pages_fail = Attr(Int(), doc="Pages that could not be allocated from the area.", mode=0o444)
    release_pages_success = Attr(Int(), doc="Pages that were given back to the area.", mode=0o444)
    total_pages = Attr(Int(), doc="Size of the area in pages.", mode=0o444)
    available_pages = Attr(Int(), doc="Pages of the area that no caller holds.", mode=0o444)

    def __init__(self, area: Cma) -> None:
        self.area = area

    @alloc_pages_success.show
    def _success(self) -> int:
        return self.area.nr_pages_succeeded

    @alloc_pages_fail.show
    def _fail(self) -> int:
        return self.area.nr_pages_failed

    @release_pages_success.show
    def _released(self) -> int:
        return self.area.nr_pages_released

    @total_pages.show
    def _total(self) -> int:
        return self.area.nr_pages

    @available_pages.show
    def _available(self) -> int:
        return self.area.nr_pages - int(self.area.bits.sum())


class Cma(Kobject):
    """One area, and its directory in debugfs. `bits` uint8[nr_pages]: 1 for each page that a caller holds."""

    alloc = Attr(_U64, doc="Write N: allocate N contiguous pages.", mode=0o200)
    free = Attr(_U64, doc="Write N: free N pages, those of the newest allocation first.", mode=0o200)
    base_pfn = Attr(_U64, doc="First page of the area.", mode=0o444)
    count = Attr(_U64, doc="Size of the area in pages.", mode=0o444)
    order_per_bit = Attr(_U64, doc="Order of the pages that a bit of the bitmap stands for.", mode=0o444)
    used = Attr(_U64, doc="Pages that callers hold.", mode=0o444)
    maxchunk = Attr(_U64, doc="The longest run of pages that no caller holds.", mode=0o444)
    bitmap = Attr(Text(), doc="The bitmap as decimal 32-bit words.", mode=0o444)

    def __init__(self, vm: Vm, contig: Contig, name: str, base: int, nr_pages: int) -> None:
        self.vm = vm
        self.contig = contig
        self.name = name
        self.base = base
        self.nr_pages = nr_pages
        self.bits: NDArray[np.uint8] = np.zeros(nr_pages, dtype=np.uint8)
        self.being_emptied: tuple[int, int] | None = None
        self._alloc_mutex = Mutex(vm.wait_queue())
        self.nr_pages_succeeded = self.nr_pages_failed = self.nr_pages_released = 0
        self._held: list[tuple[int, int]] = []  # (pfn, pages) of each allocation by way of debugfs

    # What the kernel's other parts call.

    @traced("cma_alloc")
    def cma_alloc(self, count: int) -> Operation[int]:
        """Allocate `count` contiguous pages -> the first pfn, or -1 (and the reason in the log)."""
        self.vm.pr_debug("cma %s: %d pages wanted\n", self.name, count)
        if not 0 < count <= self.nr_pages:
            return -1
        pfn, error = -1, errno.ENOMEM
        at = self._find_next_zero_area(0, count)
        while pfn < 0 and at >= 0:
            try:
                yield from self._empty(self.base + at, count)
                pfn = self.base + at
            except RangeBusy as busy:
                error = errno.EBUSY
                self.vm.pr_debug("cma %s: range at 0x%lx is busy, trying again\n", self.name, busy.pfn)
                at = self._find_next_zero_area(max(busy.pfn - self.base, at) + 1, count)
            except OSError as failure:
                error = failure.errno or errno.ENOMEM
                break
        self._account(pfn, count, error)
        return pfn

    @traced("cma_release")
    def cma_release(self, pfn: int, count: int) -> None:
        """Give pages back that cma_alloc() gave."""
        self.vm.pr_debug("cma %s: %d pages released at 0x%lx\n", self.name, count, pfn)
        self.contig.free_contig_range(pfn, count)
        at = pfn - self.base
        self.bits[at : at + count] = 0
        self.nr_pages_released += count

    def _find_next_zero_area(self, start: int, count: int) -> int:
        """The first place from `start` on with `count` pages that nobody holds, or -1."""
        for first, last in self._zero_runs():
            at = max(first, start)
            if last - at >= count:
                return at
        return -1

    def _zero_runs(self) -> list[tuple[int, int]]:
        """The runs of pages that nobody holds: (first, last + 1), within the area."""
        edges = np.flatnonzero(np.diff(np.concatenate(([1], self.bits, [1]))))
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    def _empty(self, pfn: int, count: int) -> LongOp:
        """Claim the bits, so that no one else tries the same pages, and have the pages emptied and taken."""
        at = slice(pfn - self.base, pfn - self.base + count)
        yield from self._alloc_mutex.acquire()
        try:
            if self.bits[at].any():
                raise RangeBusy(pfn, "somebody else was faster")
            self.bits[at] = 1
            self.being_emptied = pfn, pfn + count
            try:
                yield from self.contig.alloc_contig_range(pfn, pfn + count, cma=True)
            except BaseException:
                self.bits[at] = 0
                raise
        finally:
            self.being_emptied = None
            self._alloc_mutex.release()

    def _account(self, pfn: int, count: int, error: int) -> None:
        events = self.vm.events
        if pfn >= 0:
            events["cma_alloc_success"] += 1
            self.nr_pages_succeeded += count
            return
        events["cma_alloc_fail"] += 1
        self.nr_pages_failed += count
        self.contig.printk(
            f"cma: __cma_alloc: {self.name}: alloc failed, req-size: {count} pages, ret: {-error}", KERN_ERR
        )

    # debugfs. The kernel takes the number as an int: what does not fit wraps.

    @alloc.store
    def _alloc(self, value: int) -> LongOp:
        count = _as_int(value)
        pfn = yield from self.cma_alloc(count)
        if pfn < 0:
            raise OSError(errno.ENOMEM, "no such piece of the area can be had")
        self._held.append((pfn, count))

    @free.store
    def _free(self, value: int) -> None:
        count = _as_int(value)
        left = count if count >= 0 else self.nr_pages
        while left and self._held:
            pfn, held = self._held.pop()
            nr = min(held, left)
            self.cma_release(pfn, nr)
            left -= nr
            if nr < held:
                self._held.append((pfn + nr, held - nr))

    @base_pfn.show
    def _base_pfn(self) -> int:
        return self.base

    @count.show
    def _count(self) -> int:
        return self.nr_pages

    @order_per_bit.show
    def _order_per_bit(self) -> int:
        return ORDER_PER_BIT

    @used.show
    def _used(self) -> int:
        return int(self.bits.sum())

    @maxchunk.show
    def _maxchunk(self) -> int:
        return max((last - first for first, last in self._zero_runs()), default=0)

    @bitmap.show
    def _bitmap(self) -> str:
        words: NDArray[Any] = np.packbits(self.bits, bitorder="little").view("<u4")
        return " ".join(str(word) for word in words.tolist()) + "\n"


def _as_int(value: int) -> int:
    """What a C int makes of an unsigned 64-bit number."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value > _INT_MAX else value


def cma_init_reserved_areas(vm: Vm, contig: Contig) -> list[Cma]:
    """The areas that boot set aside."""
    areas = []
    for nid, base, count in vm.mem.cma_ranges:
        size_mib = count >> (20 - PAGE_SHIFT)
        contig.printk(f"cma: Reserved {size_mib} MiB at {base << PAGE_SHIFT:#018x} on node {nid}")
        areas.append(Cma(vm, contig, f"pernuma{nid}", base, count))
    return areas
