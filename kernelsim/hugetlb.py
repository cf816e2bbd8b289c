# SPDX-License-Identifier: GPL-2.0-only
"""The hugetlb pools: /proc/sys/vm/nr_hugepages, /sys/kernel/mm/hugepages and each node's hugepages (mm/hugetlb.c).

There is one pool (struct hstate) for each size of huge page, 2 MiB and 1 GiB. Writing N to a nr_hugepages resizes the
pool as far as memory allows, taking pages from the nodes in turn and giving the newest back first; a node's own file
does so on that node. As on Linux the write succeeds even when it got fewer: the file then reads what there is. The
buddy allocator has no gigantic pages: a range of that size is emptied for each (contig.py).

No process maps huge pages yet, so all of a pool is free, nothing is reserved and nothing is surplus.

A 2 MiB page comes through the slow path with __GFP_RETRY_MAYFAIL: it reclaims and compacts, by the DPU first. A node
that failed once during a resize is asked with less effort from there on (node_alloc_noretry).
"""

from __future__ import annotations

import errno
import itertools

from kernelsim.alloc_slowpath import AllocSlowpath
from kernelsim.attr import Attr, Int, Kobject
from kernelsim.contig import Contig
from kernelsim.gfp import _GFP_COMP, _GFP_NOWARN, _GFP_RECLAIM, _GFP_RETRY_MAYFAIL, _GFP_THISNODE, GFP_HIGHUSER_MOVABLE
from kernelsim.jit import njit
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import MAX_PAGE_ORDER, Blocks, Zones, pageblock_order
from kernelsim.operation import Mutex, Operation
from kernelsim.page import PAGE_SIZE, Pages, PG_huge
from kernelsim.page_alloc import free_pages, prep_compound_page
from kernelsim.trace_hook import traced

HUGEPAGE_KBYTES = 2048
GIGANTIC_ORDER = 18
HSTATE_ORDERS = (pageblock_order, GIGANTIC_ORDER)
_GROW_SLICE = 256
_HTLB_GFP = GFP_HIGHUSER_MOVABLE | _GFP_COMP | _GFP_NOWARN | _GFP_THISNODE  # htlb_alloc_mask, and what is added to it
_HTLB_GFP_TRY_HARD = _HTLB_GFP | _GFP_RETRY_MAYFAIL
_ULONG = Int(0, 2**64 - 1)


@njit
def _free_huge(pages: Pages, zones: Zones, blocks: Blocks, pfn: int, order: int) -> None:
    """Give a huge page back to the buddy lists, in the largest blocks they have."""
    part = min(order, MAX_PAGE_ORDER)
    for start in range(pfn, pfn + (1 << order), 1 << part):
        free_pages(pages, zones, blocks, start, part)


class Hstate:
    """The pool of one size. `pfns`: its pages, oldest first."""

    def __init__(self, vm: Vm, contig: Contig, slowpath: AllocSlowpath, order: int) -> None:
        self.vm = vm
        self.slowpath = slowpath
        self.contig = contig
        self.order = order
        self.pfns: list[int] = []
        self._nids = itertools.cycle(range(vm.mem.nr_nodes))
        self._resize_lock = Mutex(vm.wait_queue())

    @property
    def name(self) -> str:
        return f"hugepages-{(PAGE_SIZE << self.order) // 1024}kB"

    def nr_pages(self, nid: int | None = None) -> int:
        """Huge pages in the pool, or those of one node."""
        return len(self.pfns) if nid is None else sum(self._nid(pfn) == nid for pfn in self.pfns)

    @traced("set_max_huge_pages")
    def set_max_huge_pages(self, count: int, nid: int | None = None) -> LongOp:
        """Grow or shrink the pool, or a node's share of it, to `count` huge pages as far as that goes."""
        yield from self._resize_lock.acquire()
        self.vm.pr_debug("%s: %d pages wanted, %d there\n", self.name, count, self.nr_pages(nid))
        try:
            yield from self._grow(count, nid)
            while self.nr_pages(nid) > count:
                self._remove(next(pfn for pfn in reversed(self.pfns) if nid in (None, self._nid(pfn))))
        finally:
            self._resize_lock.release()

    def _grow(self, count: int, nid: int | None) -> LongOp:
        failed: set[int] = set()
        for grown in range(max(count - self.nr_pages(nid), 0)):
            if not (yield from self._alloc_pool_huge_page(nid, failed)):
                return
            if grown % _GROW_SLICE == _GROW_SLICE - 1:
                yield None

    @traced("alloc_pool_huge_folio")
    def _alloc_pool_huge_page(self, nid: int | None, failed: set[int]) -> Operation[bool]:
        """One more page for the pool, of node `nid` or of the next one that has any; `failed`: nodes that had none."""
        for _ in range(self.vm.mem.nr_nodes if nid is None else 1):
            node = next(self._nids) if nid is None else nid
            pfn = yield from self.alloc_fresh_huge_page(node, _HTLB_GFP if node in failed else _HTLB_GFP_TRY_HARD)
            if pfn >= 0:
                failed.discard(node)
                self._add(pfn)
                return True
            failed.add(node)
            self.vm.pr_debug("%s: node %d has none\n", self.name, node)
        return False

    @traced("alloc_fresh_hugetlb_folio")
    def alloc_fresh_huge_page(self, nid: int, gfp: int) -> Operation[int]:
        """A new huge page's first pfn from one node, or -ENOMEM: the one place where the pools get their memory."""
        if self.order > MAX_PAGE_ORDER:
            try:
                return (yield from self.contig.alloc_contig_pages(1 << self.order, nid, this_node=True))
            except OSError:
                return -errno.ENOMEM
        pfn = yield from self.slowpath.alloc_pages(gfp, self.order, nid)
        self.vm.events["htlb_buddy_alloc_success" if pfn >= 0 else "htlb_buddy_alloc_fail"] += 1
        return pfn

    @traced("isolate_or_dissolve_huge_folio")
    def isolate_or_dissolve(self, pfn: int) -> Operation[int]:
        """Put a new page of the node in the place of the unused one at `pfn`; 0, -EBUSY (not ours) or -ENOMEM."""
        if pfn not in self.pfns:
            return -errno.EBUSY
        if self.order > MAX_PAGE_ORDER:
            return -errno.ENOMEM  # as on Linux: gigantic pages are not replaced
        # who empties a range holds the compaction mutex already: take what is free
        new = yield from self.alloc_fresh_huge_page(self._nid(pfn), _HTLB_GFP & ~_GFP_RECLAIM)
        if new < 0:
            return new
        if pfn in self.pfns:  # the pool may have shrunk meanwhile
            self._remove(pfn)
            self._add(new)
        else:
            self._free(new)
        return 0

    def _nid(self, pfn: int) -> int:
        return int(self.vm.mem.zones["node"][self.vm.mem.pages["zone"][pfn]])

    def _add(self, pfn: int) -> None:
        mem = self.vm.mem
        mem.pages["refcount"][pfn + 1 : pfn + (1 << self.order)] = 0
        prep_compound_page(mem.pages, pfn, self.order, PG_huge)
        mem.nodes["nr_hugetlb"][self._nid(pfn)] += 1 << self.order
        self.pfns.append(pfn)

    def _remove(self, pfn: int) -> None:
        self.pfns.remove(pfn)
        self.vm.mem.nodes["nr_hugetlb"][self._nid(pfn)] -= 1 << self.order
        self._free(pfn)

    def _free(self, pfn: int) -> None:
        mem = self.vm.mem
        _free_huge(mem.pages, mem.zones, mem.blocks, pfn, self.order)


class HugetlbPool(Kobject):
    """All pools, and the sysctl of the default size."""

    nr_hugepages = Attr(
        Int(0, 2**31 - 1), doc="Size of the pool of 2 MiB pages; reads back what the write could get.", kept=True
    )

    def __init__(self, vm: Vm, contig: Contig, slowpath: AllocSlowpath) -> None:
        self.vm = vm
        self.hstates = [Hstate(vm, contig, slowpath, order) for order in HSTATE_ORDERS]
        self.default = self.hstates[0]

    @property
    def total_kbytes(self) -> int:
        """What all pools of all sizes take."""
        return sum(len(hstate.pfns) << hstate.order for hstate in self.hstates) * (PAGE_SIZE // 1024)

    @nr_hugepages.show
    def _nr(self) -> int:
        return self.default.nr_pages()

    @nr_hugepages.store
    def _set(self, count: int) -> LongOp:
        yield from self.default.set_max_huge_pages(count)

    def isolate_or_dissolve_huge_page(self, pfn: int) -> Operation[int]:
        """For contig.py: Hstate.isolate_or_dissolve() of whichever pool the page is in."""
        order = int(self.vm.mem.pages["order"][pfn])
        for hstate in self.hstates:
            if hstate.order == order:
                return (yield from hstate.isolate_or_dissolve(pfn))
        return -errno.EBUSY


class HstateFiles(Kobject):
    """hugepages-SIZE: of the whole machine, or of one node."""

    nr_hugepages = Attr(_ULONG, doc="Size of the pool; reads back what the write could get.", kept=True)
    free_hugepages = Attr(_ULONG, doc="Huge pages that nobody uses.", mode=0o444, kept=True)
    surplus_hugepages = Attr(
        _ULONG, doc="Huge pages beyond nr_hugepages: none, nothing overcommits.", mode=0o444, kept=True
    )

    def __init__(self, hstate: Hstate, nid: int | None = None) -> None:
        self.hstate = hstate
        self.nid = nid

    @nr_hugepages.show
    def _nr(self) -> int:
        return self.hstate.nr_pages(self.nid)

    @nr_hugepages.store
    def _set(self, count: int) -> LongOp:
        yield from self.hstate.set_max_huge_pages(count, self.nid)

    @free_hugepages.show
    def _nr_free(self) -> int:
        return self.hstate.nr_pages(self.nid)

    @surplus_hugepages.show
    def _surplus(self) -> int:
        return 0
