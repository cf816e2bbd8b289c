# SPDX-License-Identifier: GPL-2.0-only
"""A real machine's memory layout, as far as its /proc files tell it, and the inference of what they do not
tell.

Told: every page's flags and mapcount (kpageflags, kpagecount), the zones (zoneinfo), how many free blocks
each zone has (buddyinfo), how many pageblocks and free blocks per migratetype (pagetypeinfo). Not told, and
inferred here:

- Free blocks and the migratetypes of pageblocks: see hostblocks.
- Frames without memory. kpageflags may show 0 (not NOPAGE) for holes and for memory whose struct pages were
  never initialised. pagetypeinfo counts only pageblocks that really belong to the zone; the blocks in excess
  are looked for among the all-zero ones, longest run first, and become PG_nopage.
- Per-CPU free lists. Their pages are neither PG_buddy nor owned: they look like kernel pages with no flag.
  Such pages in Movable pageblocks are taken for them, up to the pageset counts of zoneinfo. In which order they
  were freed is not told, but a process that gives memory back does so by ascending addresses, and what it was handed
  out in a row has addresses in a row. So where the largest process still has their neighbours (pagemap), these tell
  which were freed last. Without pagemaps: in the order in which memory is handed out, which is by order-10 blocks; the
  blocks are shuffled (by a fixed seed) and the pages within one are not.
- Processes that ended between the two reads, as those of the capture itself do: an anonymous page that is mapped
  in kpageflags and not in kpagecount is free by now, and the last that was freed.
- References. ext4 reads its group descriptors one after the other when it is mounted, and holds their buffers ever
  after: they cannot move. So they are still where they were, in consecutive frames, while others of the buffer cache
  (PG_private, not PG_uptodate) come and go and are moved apart. A run of these that nobody has touched since the last
  idle mark is taken for them, if it is long, or shorter but in the same pageblock as a long one.

The files are read one after the other on a running machine, so they contradict each other a little.
kpageflags wins; `HostImage.notes` says in plain words what was inferred and what did not fit.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kernelsim.hostblocks import (
    NR_USES,
    USE_KERNEL,
    USE_MOVABLE,
    USE_NEUTRAL,
    USE_SLAB,
    USE_UNOWNED,
    FreeBlocks,
    HostZone,
    cut_free_blocks,
    infer_block_types,
    unmerge,
)
from kernelsim.jit import njit
from kernelsim.mmzone import MAX_PAGE_ORDER, MIGRATE_MOVABLE, pageblock_nr_pages, pageblock_order
from kernelsim.page import (
    KPF_HIGH,
    PG_anon,
    PG_buddy,
    PG_head,
    PG_huge,
    PG_idle,
    PG_ksm,
    PG_lru,
    PG_mmap,
    PG_nopage,
    PG_offline,
    PG_private,
    PG_referenced,
    PG_slab,
    PG_swapcache,
    PG_table,
    PG_tail,
    PG_thp,
    PG_uptodate,
)

__all__ = [
    "HostImage",
    "HostTask",
    "HostZone",
    "build_host_image",
    "count_free_blocks",
    "format_buddyinfo",
]

VM_READ, VM_WRITE, VM_EXEC, VM_SHARED, VM_GROWSDOWN = 1, 2, 4, 8, 0x100  # include/linux/mm.h

_KPF_LOW = (1 << 27) - 1  # kpageflags bits that page.py numbers alike
_MAPCOUNT_MAX = (1 << 31) - 1
LAST_FEW = pageblock_nr_pages // 8
_FEW_HELD, _MANY_HELD = 3, 8  # a group descriptor block describes 64 groups, which is 8 GiB of disk
_HIGH_BITS = np.array(list(KPF_HIGH.items()), dtype=np.int64)  # (kpageflags bit, PG_ mask)


@dataclass(frozen=True)
class HostTask:
    """A process and the pages it had mapped."""

    pid: int
    comm: str
    vmas: tuple[tuple[int, int, int], ...]
    """(start_vpn, end_vpn, VM_* flags), ascending, end exclusive"""
    vpn: NDArray[np.int64]
    """int64[n], ascending: virtual page numbers of the present entries"""
    pfn: NDArray[np.int64]
    """int64[n]: the page behind each"""


@dataclass(frozen=True)
class HostImage:
    """A machine's memory at one moment. nr_pages is the end of the last zone, rounded up to whole
    pageblocks."""

    zones: tuple[HostZone, ...]
    """By start_pfn."""
    flags: NDArray[np.uint32]
    """uint32[nr_pages]: PG_* of page.py. PG_buddy on all pages of a free block, and nothing else there;
    PG_nopage on frames without memory, and nothing else there; PG_mmap nowhere (mapcount tells)."""
    mapcount: NDArray[np.int32]
    """int32[nr_pages]: at least 1 on mapped pages, 0 elsewhere"""
    free_pfn: NDArray[np.int64]
    """int64[n], ascending: heads of the free blocks"""
    free_order: NDArray[np.uint8]
    """uint8[n]: their orders, 0..10"""
    block_migratetype: NDArray[np.uint8]
    """uint8[nr_pages >> 9]: MIGRATE_* of mmzone.py (Movable in holes)"""
    compound_order: NDArray[np.uint8]
    """uint8[nr_pages]: on PG_head pages, the order of the compound page; 0 elsewhere"""
    pcp_pfn: NDArray[np.int64]
    """int64[n], last freed first: pages taken to lie on per-CPU free lists (flags 0, no owner)"""
    pinned_pfn: NDArray[np.int64]
    """int64[n], ascending: LRU pages taken to be held by somebody, so that they cannot migrate"""
    mappings: tuple[HostTask, ...]
    """Empty where no pagemaps were captured. Entries of pages that are not mapped by now are left out."""
    buddyinfo: str
    buddyinfo_end: str
    """/proc/buddyinfo as read before and after kpageflags ("" if it was not)."""
    notes: tuple[str, ...]
    """What was inferred and what did not fit, one line each."""

    @property
    def nr_pages(self) -> int:
        return len(self.flags)


def build_host_image(
    zones: tuple[HostZone, ...],
    kpageflags: NDArray[np.uint64],
    kpagecount: NDArray[np.uint64],
    *,
    mappings: tuple[HostTask, ...] = (),
    buddyinfo: str = "",
    buddyinfo_end: str = "",
    guess: int = 0,
) -> HostImage:
    """Infer the layout. `zones` ascending and disjoint; both arrays uint64[nr_pages] as the kernel shows them, nr_pages
    a multiple of 512 that covers every zone. Both are only read. `guess` seeds what can only be guessed."""
    nr_pages = len(kpageflags)
    flags = np.full(nr_pages, PG_nopage, dtype=np.uint32)
    mapcount = np.zeros(nr_pages, dtype=np.int32)
    use = np.zeros((nr_pages >> pageblock_order, NR_USES), dtype=np.int32)
    ended = np.zeros(nr_pages, dtype=np.bool_)
    notes: list[str] = []
    for zone in zones:
        span = slice(zone.start_pfn, zone.end_pfn)
        _import_pages(kpageflags[span], kpagecount[span], zone.start_pfn, _HIGH_BITS, flags, mapcount, use, ended)
        _drop_frames_without_memory(zone, flags, use, notes)
    compound_order = _compound_orders(flags, notes)
    free, cut = unmerge(zones, cut_free_blocks(zones, flags), notes)
    populated = (flags.reshape(-1, pageblock_nr_pages) != PG_nopage).any(axis=1)
    block_type = infer_block_types(zones, populated, use, free, cut, notes)
    image = HostImage(
        zones=zones,
        flags=flags,
        mapcount=mapcount,
        free_pfn=free.pfn,
        free_order=free.order,
        block_migratetype=block_type,
        compound_order=compound_order,
        pcp_pfn=_pcp_pages(zones, flags, block_type, ended, _vpn_by_pfn(mappings, nr_pages), guess, notes),
        pinned_pfn=_pinned_pages(flags, notes),
        mappings=tuple(_mapped_only(task, mapcount) for task in mappings),
        buddyinfo=buddyinfo,
        buddyinfo_end=buddyinfo_end,
        notes=(),
    )
    _note_mappings(mappings, image, notes)
    _note_free_counts(image, notes)
    return replace(image, notes=tuple(notes))


def count_free_blocks(image: HostImage) -> NDArray[np.int64]:
    """int64[zone, order]: the free blocks of each zone of `image.zones`, as /proc/buddyinfo counts them."""
    free = FreeBlocks(image.free_pfn, image.free_order)
    return np.stack([free.per_order(zone) for zone in image.zones])


def format_buddyinfo(zones: tuple[HostZone, ...], counts: NDArray[np.int64]) -> str:
    """Text of /proc/buddyinfo (mm/vmstat.c frag_show_print) for int64[zone, order] counts: node by node."""
    rows = sorted(zip(zones, counts.tolist(), strict=True), key=lambda row: (row[0].node, row[0].start_pfn))
    return "".join(
        f"Node {zone.node}, zone {zone.name:>8} {''.join(f'{nr:6d} ' for nr in row)}\n" for zone, row in rows
    )


# Pages


@njit
def _use_of(kflags: np.int64) -> int:
    if kflags == 0:
        return USE_UNOWNED
    if kflags & (PG_lru | PG_huge):
        return USE_MOVABLE
    if kflags & PG_slab:
        return USE_SLAB
    if kflags >> 32 & 1 or kflags & PG_offline:  # bit 32: RESERVED
        return USE_NEUTRAL
    if kflags & PG_mmap and not kflags & PG_table:
        return USE_MOVABLE
    return USE_KERNEL


@njit
def _import_pages(
    kpageflags: NDArray[np.uint64],
    kpagecount: NDArray[np.uint64],
    start_pfn: int,
    high_bits: NDArray[np.int64],
    flags: NDArray[np.uint32],
    mapcount: NDArray[np.int32],
    use: NDArray[np.int32],
    ended: NDArray[np.bool_],
) -> None:
    """Translate one zone's pages and count their uses per pageblock. Marks in `ended` the pages of processes that were
    gone when kpagecount was read."""
    for i in range(len(kpageflags)):
        pfn = start_pfn + i
        kflags = np.int64(kpageflags[i])
        if kflags & PG_nopage:
            continue
        if kflags & PG_buddy:
            flags[pfn] = PG_buddy
            continue
        if kflags & PG_slab:  # the words behind these bits are reused by slab
            kflags &= ~(PG_mmap | PG_anon | PG_ksm)
        translated = kflags & _KPF_LOW & ~PG_mmap
        if kflags >> 32:
            for row in range(len(high_bits)):
                if kflags >> high_bits[row, 0] & 1:
                    translated |= high_bits[row, 1]
        flags[pfn] = translated
        kind = _use_of(kflags)
        use[pfn >> pageblock_order, kind] += 1
        if not kflags & PG_mmap:
            continue
        if kpagecount[i] or kflags & (PG_head | PG_tail | PG_ksm):  # of those it may be an average
            mapcount[pfn] = min(max(kpagecount[i], np.uint64(1)), np.uint64(_MAPCOUNT_MAX))
        elif kflags & PG_anon and not kflags & PG_swapcache:
            flags[pfn] = 0
            ended[pfn] = True


def _drop_frames_without_memory(
    zone: HostZone, flags: NDArray[np.uint32], use: NDArray[np.int32], notes: list[str]
) -> None:
    """Turn as many all-zero pageblocks into holes as the zone has more than pagetypeinfo counts."""
    first, last = zone.start_pfn >> pageblock_order, -(-zone.end_pfn // pageblock_nr_pages)
    populated = np.bitwise_or.reduceat(
        flags[zone.start_pfn : zone.end_pfn] != PG_nopage, _block_starts(zone, first, last)
    )
    excess = int(populated.sum()) - sum(zone.nr_blocks)
    if excess <= 0:
        return
    unowned = np.flatnonzero(use[first:last, USE_UNOWNED] == pageblock_nr_pages) + first
    run = np.cumsum(np.diff(unowned, prepend=-1) != 1)
    longest_first = np.lexsort((-unowned, -np.bincount(run)[run] if len(run) else run))
    gone = unowned[longest_first[:excess]]
    by_block = flags.reshape(-1, pageblock_nr_pages)
    by_block[gone] = PG_nopage
    use[gone] = 0
    notes.append(f"{zone.label}: {len(gone)} pageblocks show no flags and are not counted by pagetypeinfo: no memory")
    if len(gone) < excess:
        notes.append(f"{zone.label}: {excess - len(gone)} pageblocks more than pagetypeinfo counts")


def _block_starts(zone: HostZone, first: int, last: int) -> NDArray[np.int64]:
    """Offsets into the zone at which its pageblocks begin (the first one may be cut)."""
    starts = np.arange(first, last, dtype=np.int64) * pageblock_nr_pages - zone.start_pfn
    return np.maximum(starts, 0)


def _compound_orders(flags: NDArray[np.uint32], notes: list[str]) -> NDArray[np.uint8]:
    orders = np.zeros(len(flags), dtype=np.uint8)
    torn = _measure_compounds(flags, orders)
    if torn:
        notes.append(f"{torn} compound pages changed while being read: taken as single pages")
    return orders


@njit
def _measure_compounds(flags: NDArray[np.uint32], orders: NDArray[np.uint8]) -> int:
    """A head and the tails behind it. If that is no aligned power of two (the page was split or freed while
    the file was read) its pages become single ones; so do tails without a head. Returns how many were taken
    apart."""
    torn = 0
    pfn = 0
    while pfn < len(flags):
        if not flags[pfn] & (PG_head | PG_tail):
            pfn += 1
            continue
        end = pfn + 1
        while end < len(flags) and flags[end] & PG_tail:
            end += 1
        nr = end - pfn
        if flags[pfn] & PG_head and nr > 1 and nr & (nr - 1) == 0 and pfn % nr == 0:
            while 1 << orders[pfn] < nr:
                orders[pfn] += 1
        else:
            torn += 1
            for page in range(pfn, end):
                flags[page] &= ~(PG_head | PG_tail | PG_huge | PG_thp)
        pfn = end
    return torn


def _pcp_pages(
    zones: tuple[HostZone, ...],
    flags: NDArray[np.uint32],
    block_type: NDArray[np.uint8],
    ended: NDArray[np.bool_],
    vpn: NDArray[np.int64],
    guess: int,
    notes: list[str],
) -> NDArray[np.int64]:
    pages = [np.empty(0, dtype=np.int64)]
    for zone in zones:
        span = slice(zone.start_pfn, zone.end_pfn)
        unowned = np.flatnonzero((flags[span] == 0) & ~ended[span]) + zone.start_pfn
        likely = unowned[block_type[unowned >> pageblock_order] == MIGRATE_MOVABLE]
        likely = likely[~_of_the_kernel(flags)[likely >> pageblock_order]][: zone.nr_pcp]
        likely = _shuffle_blocks(likely, guess)
        told = "a guess"
        if guess == 0 and (near := _vpn_of_neighbours(likely, vpn)).any():
            likely = likely[np.argsort(-near, kind="stable")]
            told = f"that of the addresses of the largest process for {(near > 0).sum()} of them"
        pages += [np.flatnonzero(ended[span]) + zone.start_pfn, likely]
        if len(likely):
            notes.append(
                f"{zone.label}: {len(likely)} pages look free on per-CPU lists (zoneinfo: {zone.nr_pcp}); "
                f"the order in which they were freed is taken to be {told}"
            )
        if len(pages[-2]):
            notes.append(
                f"{zone.label}: {len(pages[-2])} pages of processes that ended meanwhile: free, on these lists"
            )
    return np.concatenate(pages)


def _of_the_kernel(flags: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Pageblocks whose unowned pages are the kernel's, not a CPU's list's: all of the block, or the last few that keep
    it from being free as a whole. What a process gave back lies dense, among pages that are still in use."""
    by_block = flags[: len(flags) & -pageblock_nr_pages].reshape(-1, pageblock_nr_pages)
    nr_unowned = (by_block == 0).sum(axis=1)
    nr_free = (by_block & np.uint32(PG_buddy) != 0).sum(axis=1)
    last_few = (nr_unowned + nr_free == pageblock_nr_pages) & (nr_unowned <= LAST_FEW)
    found: NDArray[np.bool_] = (nr_unowned == pageblock_nr_pages) | last_few
    return found


def _vpn_by_pfn(mappings: tuple[HostTask, ...], nr_pages: int) -> NDArray[np.int64]:
    """int64[nr_pages]: where the process with the most pages has each mapped, 0 where it has not."""
    vpn = np.zeros(nr_pages, dtype=np.int64)
    if mappings:
        task = max(mappings, key=lambda task: len(task.pfn))
        known = (task.pfn >= 0) & (task.pfn < nr_pages)
        vpn[task.pfn[known]] = task.vpn[known]
    return vpn


def _vpn_of_neighbours(pfns: NDArray[np.int64], vpn: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in the process' memory these pages were, if they were handed out in a row with their next lower (else next
    higher) neighbour that it still has, in the same block of MAX_PAGE_ORDER; 0 where it has none there."""
    mapped = np.flatnonzero(vpn)
    if not len(mapped) or not len(pfns):
        return np.zeros(len(pfns), dtype=np.int64)
    at = np.searchsorted(mapped, pfns)
    below, above = mapped[np.maximum(at - 1, 0)], mapped[np.minimum(at, len(mapped) - 1)]
    found = np.where((below < pfns) & (below >> MAX_PAGE_ORDER == pfns >> MAX_PAGE_ORDER), below, above)
    near = found >> MAX_PAGE_ORDER == pfns >> MAX_PAGE_ORDER
    return np.where(near, np.maximum(vpn[found] + pfns - found, 1), 0)


def _shuffle_blocks(pfns: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Ascending pages, the same within a block of MAX_PAGE_ORDER, but with the blocks in an arbitrary order."""
    block, nr = np.unique(pfns >> MAX_PAGE_ORDER, return_counts=True)
    rank = np.random.default_rng(seed).permutation(len(block))
    return pfns[np.argsort(np.repeat(rank, nr), kind="stable")]


def _pinned_pages(flags: NDArray[np.uint32], notes: list[str]) -> NDArray[np.int64]:
    asked = np.uint32(PG_lru | PG_private | PG_uptodate | PG_anon | PG_head | PG_tail)
    cached = np.flatnonzero(flags & asked == np.uint32(PG_lru | PG_private))
    idle = flags[cached] & np.uint32(PG_idle | PG_referenced) == np.uint32(PG_idle)
    run = np.cumsum(np.diff(cached, prepend=-2) != 1)
    length = np.bincount(run)[run] if len(run) else run
    in_a_row = (np.bincount(run, ~idle)[run] == 0) & (length >= _FEW_HELD) if len(run) else idle
    blocks = cached[in_a_row & (length >= _MANY_HELD)] >> pageblock_order
    pinned: NDArray[np.int64] = cached[in_a_row & np.isin(cached >> pageblock_order, blocks)]
    if len(pinned):
        notes.append(
            f"{len(pinned)} idle buffer-cache pages in consecutive frames are taken to be held by a file system "
            "since it was mounted: they cannot move"
        )
    return pinned


# Processes and the comparison with what was counted


def _mapped_only(task: HostTask, mapcount: NDArray[np.int32]) -> HostTask:
    known = (task.pfn >= 0) & (task.pfn < len(mapcount))
    known[known] = mapcount[task.pfn[known]] > 0
    return task if known.all() else replace(task, vpn=task.vpn[known], pfn=task.pfn[known])


def _note_mappings(captured: tuple[HostTask, ...], image: HostImage, notes: list[str]) -> None:
    nr, kept = (sum(len(task.vpn) for task in tasks) for tasks in (captured, image.mappings))
    if nr > kept:
        notes.append(f"{nr - kept} of {nr} page table entries name pages that kpageflags does not show as mapped")


def _note_free_counts(image: HostImage, notes: list[str]) -> None:
    for zone, found in zip(image.zones, count_free_blocks(image).tolist(), strict=True):
        moved = [
            f"order {order}: {nr} in kpageflags, {zone.nr_free[order]} in buddyinfo"
            for order, nr in enumerate(found)
            if nr != zone.nr_free[order]
        ]
        if moved:
            notes.append(f"{zone.label} changed while it was read: {'; '.join(moved)}")
