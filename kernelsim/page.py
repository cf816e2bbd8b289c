# SPDX-License-Identifier: GPL-2.0-only
"""struct page: the memory map, an array of records indexed by pfn.

Every physical page frame has one record of 32 bytes (the real struct page has 64); a page *is* its pfn, never an
object. One array of records instead of an array for each field: the hot loops touch most fields of a page at once,
and passing one array to a compiled function instead of eight made the allocator six times faster. Frames in holes have
`PG_nopage` and nothing else.

`flags` numbers its bits as /proc/kpageflags does (bits 0 to 26), so that export is a mask; the bits which kpageflags
keeps above 31 live in 27 to 31 (`KPF_HIGH` maps them). As on Linux, a page is linked into at most one list at a time:
a free block's head into its free list, an LRU page into its LRU list, both through `next` and `prev`.

`refcount` counts as on Linux: one per mapping, one for the page cache, one while isolated, GUP_PIN_BIAS per pin (as
FOLL_PIN does, include/linux/mm.h), one for whoever else holds an allocated page. A free page has refcount 0.

`mlock_count` is how many VM_LOCKED mappings a PG_mlocked page has. `order` is the order of a free block or a compound
page, on its head; Linux keeps it in page->private.

A compound page (PG_head and 2^order - 1 times PG_tail) on an LRU list is one folio: flags, counts, mapping, index, list
link and `order` are its head's and speak for all of it. `mapcount` of a large folio is the number of entries that map
any part of it, one for each PTE and one for each PMD (Linux: _large_mapcount), and each holds one reference. A tail has
PG_tail, what marks the kind (PG_thp, PG_huge), and in `index` the pfn of its head. The first tail also has, as on
Linux, the number of PMD entries (_entire_mapcount, in `mapping`) and PG_partially_mapped: the folio lost some of its
mappings and should be split, which could not be done yet.

Differences from Linux: PG_buddy is on the head only (kpageflags shows it on all pages of the block); `mapping` is the
number of an rmap object (an anon_vma if PG_anon, else an address_space), 0 for none; `index` counts pages within that
object, so 32 bits reach 16 TiB.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit

AllocWords: TypeAlias = Callable[[int, int], NDArray[np.uint64]]
"""(nr, words) -> zeroed uint64[nr, words] that costs memory only where it is touched."""


Pages: TypeAlias = Any
"""The memory map: record array of `page_dtype`, [nr_pages + nr_lists]. Compiled code reads `pages[pfn].flags`."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

PG_locked = 1 << 0
PG_referenced = 1 << 2
PG_uptodate = 1 << 3
PG_dirty = 1 << 4
PG_lru = 1 << 5
PG_active = 1 << 6
PG_slab = 1 << 7
PG_writeback = 1 << 8
PG_reclaim = 1 << 9
PG_buddy = 1 << 10
PG_mmap = 1 << 11  # derived from mapcount on export; never stored
PG_anon = 1 << 12
PG_swapcache = 1 << 13
PG_swapbacked = 1 << 14
PG_head = 1 << 15
PG_tail = 1 << 16
PG_huge = 1 << 17
PG_unevictable = 1 << 18
PG_hwpoison = 1 << 19
PG_nopage = 1 << 20
PG_ksm = 1 << 21
PG_thp = 1 << 22
PG_offline = 1 << 23
PG_zero = 1 << 24
PG_idle = 1 << 25
PG_table = 1 << 26
PG_reserved = 1 << 27  # kpageflags bit 32
PG_mlocked = 1 << 28  # kpageflags bit 33
PG_private = 1 << 29  # kpageflags bit 35
PG_isolated = 1 << 30  # taken off the LRU by a compaction run
PG_held = 1 << 31  # free, but off the buddy lists: a destination of a batch in flight

PG_partially_mapped = PG_reclaim  # on a large folio's first tail

KPF_HIGH = {32: PG_reserved, 33: PG_mlocked, 35: PG_private}
"""kpageflags bits above 26 that this emulation keeps, and where."""

GUP_PIN_BIAS = 1024

page_dtype = np.dtype(
    [
        ("flags", np.uint32),
        ("refcount", np.int32),
        ("mapcount", np.int32),
        ("mapping", np.int32),
        ("index", np.uint32),
        ("next", np.int32),
        ("prev", np.int32),
        ("order", np.uint8),
        ("zone", np.uint8),
        ("mlock_count", np.uint16),
    ]
)


def zeroed_words(nr: int, words: int) -> NDArray[np.uint64]:
    """Plain numpy: the pages of a large zeroed array cost nothing until they are touched."""
    return np.zeros((nr, words), dtype=np.uint64)


@njit
def memmap_init_range(pages: Pages, start: int, end: int, zone: int, flags: int) -> None:
    """First state of zeroed records, each of them touched once: on no list, which is to point at itself."""
    for pfn in range(start, end):
        pages[pfn].flags = flags
        pages[pfn].next = pfn
        pages[pfn].prev = pfn
        pages[pfn].zone = zone


def alloc_mem_map(
    nr_pages: int,
    nr_lists: int,
    spans: Sequence[tuple[int, int]] = (),
    flags: int = PG_nopage,
    alloc_words: AllocWords = zeroed_words,
) -> Pages:
    """A memory map of `nr_pages`. Behind them come `nr_lists` empty lists' heads, list 0 last.

    Pages in `spans`, (start, end) of zone 0, zone 1 and so on in ascending order, have these flags and their zone;
    all others are holes.
    """
    nr_slots = nr_pages + nr_lists
    pages = alloc_words(nr_slots, page_dtype.itemsize // 8).reshape(-1).view(page_dtype)
    end = 0
    for zone, (start, stop) in enumerate(spans):
        memmap_init_range(pages, end, start, 0, PG_nopage)
        memmap_init_range(pages, start, stop, zone, flags)
        end = stop
    memmap_init_range(pages, end, nr_pages, 0, PG_nopage)
    memmap_init_range(pages, nr_pages, nr_slots, 0, 0)
    return pages


@njit
def compound_head(pages: Pages, pfn: int) -> int:
    """The page that speaks for this one: a tail's head, else the page itself."""
    return int(pages[pfn].index) if pages[pfn].flags & PG_tail else pfn


@njit
def folio_maybe_dma_pinned(pages: Pages, head: int) -> bool:
    """Somebody may have pinned it for DMA. (A small page with 1024 other references looks pinned too, as on Linux.)"""
    page = pages[head]
    return bool(page.refcount - (page.mapcount if page.order > 0 else 0) >= GUP_PIN_BIAS)
