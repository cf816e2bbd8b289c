# SPDX-License-Identifier: GPL-2.0-only
"""/proc/kpageflags, kpagecount and kpagecgroup: 64 bits for each page frame (fs/proc/page.c, 6.18).

They are made for just the frames that are read, straight from the memory map: no text, no snapshot. As on Linux a read
must begin and end at a multiple of 8, frames that do not exist have KPF_NOPAGE alone, and the files end where the last
section of memory (128 MiB) does.

`stable_page_flags` goes by the folio: of a large folio every page shows the flags of its head, with COMPOUND_HEAD or
COMPOUND_TAIL saying which it is. BUDDY is on every page of a free block, MMAP on every page of a folio that is mapped
anywhere.

A large folio's mappings are counted for the folio, not for each of its pages (CONFIG_NO_PAGE_MAPCOUNT), so kpagecount
shows the average, rounded, but at least 1.

There is one memory cgroup, the root of the hierarchy, whose inode number is 1. Nobody can make another, so kpagecgroup
says who is charged for a page, 1, or that nobody is, 0. Charged are the folios of processes and of the page cache. In
the root kernel memory is not accounted (obj_cgroup_from_current()), hugetlb pages are not without
memory_hugetlb_accounting.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kernelsim.attr import Attr, Entries, Kobject
from kernelsim.jit import njit, u64
from kernelsim.mmzone import MAX_PAGE_ORDER, Mem
from kernelsim.page import (
    Pages,
    PG_anon,
    PG_buddy,
    PG_head,
    PG_held,
    PG_huge,
    PG_isolated,
    PG_lru,
    PG_mlocked,
    PG_mmap,
    PG_nopage,
    PG_private,
    PG_reserved,
    PG_swapbacked,
    PG_swapcache,
    PG_tail,
    compound_head,
)

PAGES_PER_SECTION = 1 << 15
KPF_RESERVED, KPF_MLOCKED, KPF_PRIVATE = 32, 33, 35
_OURS = PG_reserved | PG_mlocked | PG_private | PG_isolated | PG_held  # kept where kpageflags has no bits, or others
_OF_THE_FOLIO = ~(_OURS | PG_head | PG_tail | PG_buddy | PG_mmap | PG_swapcache) & 0xFFFFFFFF
ROOT_CGROUP_INO = 1
_CHARGED = PG_lru | PG_isolated | PG_anon
_SWAPCACHE = PG_swapbacked | PG_swapcache


@njit
def stable_page_flags(pages: Pages, pfn: int) -> int:
    """kpageflags bits of one frame that is not inside a free block (of which only the head is marked)."""
    own = pages[pfn].flags
    if own & PG_nopage:
        return PG_nopage
    head = compound_head(pages, pfn)
    flags = pages[head].flags
    out = flags & _OF_THE_FOLIO
    out |= own & (PG_head | PG_tail | PG_buddy)
    if pages[head].mapcount > 0:
        out |= PG_mmap
    if flags & _SWAPCACHE == _SWAPCACHE:
        out |= PG_swapcache
    out |= (1 << KPF_RESERVED) if flags & PG_reserved else 0
    out |= (1 << KPF_MLOCKED) if flags & PG_mlocked else 0
    out |= (1 << KPF_PRIVATE) if flags & PG_private else 0
    return int(out)


@njit
def free_block_end(pages: Pages, pfn: int) -> int:
    """The end of the free block that holds a page, or 0 (is_free_buddy_page)."""
    for order in range(MAX_PAGE_ORDER + 1):
        head = pfn & ~((1 << order) - 1)
        if pages[head].flags & PG_buddy and pages[head].order >= order:
            end = head + (1 << pages[head].order)
            return int(end) if end > pfn else 0
    return 0


@njit
def kpageflags_read(pages: Pages, nr_pages: int, first: int, out: NDArray[np.uint64]) -> None:
    """Flags of the frames from `first` on."""
    free_until = free_block_end(pages, first) if first < nr_pages else 0
    for i in range(len(out)):
        pfn = first + i
        if pfn >= nr_pages:
            out[i] = u64(PG_nopage)
        elif pfn < free_until:
            out[i] = u64(PG_buddy)
        else:
            flags = stable_page_flags(pages, pfn)
            out[i] = u64(flags)
            if flags & PG_buddy:
                free_until = pfn + (1 << pages[pfn].order)


@njit
def folio_average_page_mapcount(pages: Pages, head: int) -> int:
    """How often a page of this folio is mapped; of a large one on average, rounded, but 1 if anything is mapped."""
    mapcount = int(pages[head].mapcount)
    order = int(pages[head].order)
    if order == 0 or mapcount <= 0:
        return mapcount
    entire = int(pages[head + 1].mapping)
    if mapcount <= entire:
        return entire
    average = ((mapcount - entire + (1 << order) // 2) >> order) + entire
    return max(average, 1)


@njit
def kpagecount_read(pages: Pages, nr_pages: int, first: int, out: NDArray[np.uint64]) -> None:
    """Mappings of the frames from `first` on."""
    for i in range(len(out)):
        pfn = first + i
        out[i] = u64(0)
        if pfn < nr_pages and pages[pfn].flags & PG_nopage == 0:
            out[i] = u64(folio_average_page_mapcount(pages, compound_head(pages, pfn)))


@njit
def kpagecgroup_read(pages: Pages, nr_pages: int, first: int, out: NDArray[np.uint64]) -> None:
    """Inode number of the cgroup that is charged for each of the frames from `first` on; 0: none."""
    for i in range(len(out)):
        pfn = first + i
        out[i] = u64(0)
        if pfn < nr_pages and pages[pfn].flags & PG_nopage == 0:
            flags = pages[compound_head(pages, pfn)].flags
            if flags & _CHARGED and flags & PG_huge == 0:
                out[i] = u64(ROOT_CGROUP_INO)


class PageMonitor(Kobject):
    """CONFIG_PROC_PAGE_MONITOR's files that tell of physical pages."""

    kpageflags = Attr(Entries(), mode=0o400, doc="64 flags of each page frame (admin-guide/mm/pagemap.rst).")
    kpagecount = Attr(Entries(), mode=0o400, doc="How often each page frame is mapped.")
    kpagecgroup = Attr(Entries(), mode=0o400, doc="Inode number of the memory cgroup charged for each page frame.")

    def __init__(self, mem: Mem) -> None:
        self.mem = mem

    @kpageflags.read
    def _kpageflags(self, pos: int, size: int, _nonblock: bool) -> bytes:
        return self._read(kpageflags_read, pos, size)

    @kpagecount.read
    def _kpagecount(self, pos: int, size: int, _nonblock: bool) -> bytes:
        return self._read(kpagecount_read, pos, size)

    @kpagecgroup.read
    def _kpagecgroup(self, pos: int, size: int, _nonblock: bool) -> bytes:
        return self._read(kpagecgroup_read, pos, size)

    def _read(self, fill: Callable[[Pages, int, int, NDArray[np.uint64]], None], pos: int, size: int) -> bytes:
        first, nr = _ENTRIES.span(pos, size)
        end = -(-self.mem.nr_pages // PAGES_PER_SECTION) * PAGES_PER_SECTION
        out = np.empty(max(min(nr, end - first), 0), dtype=np.uint64)
        if len(out):
            fill(self.mem.pages, self.mem.nr_pages, first, out)
        return out.tobytes()


_ENTRIES = Entries()
