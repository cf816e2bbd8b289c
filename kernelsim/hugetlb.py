# SPDX-License-Identifier: GPL-2.0-only
"""The hugetlb pool: /proc/sys/vm/nr_hugepages.

Writing N resizes the pool as far as memory allows, taking 2 MiB blocks from the nodes in turn and giving the newest
back first. As on Linux the write succeeds even when it got fewer: the file then reads what there is. Linux would
compact on the way (__GFP_RETRY_MAYFAIL); here compaction is a command of its own, so what the file reads shows how many
free 2 MiB blocks there were.
"""

import itertools

from kernelsim.attr import Attr, Int, Kobject
from kernelsim.mm_types import Vm
from kernelsim.mmzone import MIGRATE_MOVABLE, pageblock_order
from kernelsim.page import PG_huge
from kernelsim.page_alloc import free_pages, get_page_from_freelist, prep_compound_page

HUGEPAGE_KBYTES = 2048
HUGEPAGE_PAGES = 1 << pageblock_order


class HugetlbPool(Kobject):
    """Persistent 2 MiB pages, all unused: nothing maps them yet."""

    nr_hugepages = Attr(Int(0, 2**31 - 1), doc="Size of the pool of 2 MiB pages; reads back what the write could get.")

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.pfns: list[int] = []
        self._nids = itertools.cycle(range(vm.mem.nr_nodes))

    @nr_hugepages.show
    def _nr(self) -> int:
        return len(self.pfns)

    @nr_hugepages.store
    def set_max_huge_pages(self, count: int) -> None:
        while len(self.pfns) < count and self._alloc():
            pass
        while len(self.pfns) > count:
            self._free(self.pfns.pop())

    def _alloc(self) -> bool:
        """One more page, from the next node that has one."""
        for _ in range(self.vm.mem.nr_nodes):
            if self._alloc_on(next(self._nids)):
                self.vm.events["htlb_buddy_alloc_success"] += 1
                return True
        self.vm.events["htlb_buddy_alloc_fail"] += 1
        return False

    def _alloc_on(self, nid: int) -> bool:
        mem = self.vm.mem
        own = mem.zonelist[nid][mem.zones["node"][mem.zonelist[nid]] == nid]
        pfn = get_page_from_freelist(mem.pages, mem.zones, mem.blocks, own, pageblock_order, MIGRATE_MOVABLE)
        if pfn < 0:
            return False
        prep_compound_page(mem.pages, pfn, pageblock_order, PG_huge)
        mem.nodes["nr_hugetlb"][nid] += HUGEPAGE_PAGES
        self.pfns.append(pfn)
        return True

    def _free(self, pfn: int) -> None:
        mem = self.vm.mem
        mem.nodes["nr_hugetlb"][mem.zones["node"][mem.pages["zone"][pfn]]] -= HUGEPAGE_PAGES
        free_pages(mem.pages, mem.zones, mem.blocks, pfn, pageblock_order)
