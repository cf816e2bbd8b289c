# SPDX-License-Identifier: GPL-2.0-only
"""Files: an address_space each, with its page cache.

The cache of file f is `i_pages[i_base + index]`, the pfn or -1. A cached page holds one reference of the cache's own, a
large folio one for each of its pages.
`disk` is what the file holds, one stamp a page, and at the same time what every process that maps it knows to be
there: mappings are shared, so a write by one is a write for all.
"""

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import new_stamps
from kernelsim.jit import njit
from kernelsim.lruvec import put_page
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import Blocks, Nodes, Zones
from kernelsim.page import Pages, compound_head

TRUNCATE_SLICE_PAGES = 1 << 15


@njit
def truncate_inode_pages(
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    nodes: Nodes,
    i_pages: NDArray[np.int64],
    start: int,
    end: int,
) -> None:
    """Drop cached pages; those still mapped or pinned are freed with their last reference."""
    for slot in range(start, end):
        pfn = i_pages[slot]
        if pfn >= 0:
            i_pages[slot] = -1
            nodes[zones[pages[pfn].zone].node].nr_file_pages -= 1
            head = compound_head(pages, pfn)
            pages[head].refcount -= 1
            put_page(pages, zones, blocks, nodes, head)


class File:
    """One file. `mapping` is its rmap object, `disk` uint64[nr_pages] its content as stamps."""

    def __init__(self, vm: Vm, nr_pages: int) -> None:
        self.vm = vm
        self.nr_pages = nr_pages
        self.mapping = vm.take_mapping()
        self.i_base = vm.grow_page_cache(nr_pages)
        vm.avcs["i_base"][self.mapping] = self.i_base
        self.disk = new_stamps(nr_pages, vm.sequence + 1)
        vm.sequence += nr_pages
        vm.files.append(self)

    def evict(self) -> LongOp:
        """Delete the file: the cache lets go of its pages, none of which is then in flight. No VMA may map it any more.

        To be called again if interrupted.
        """
        mem, vm = self.vm.mem, self.vm
        end = self.i_base + self.nr_pages
        for first in range(self.i_base, end, TRUNCATE_SLICE_PAGES):
            yield from vm.wait_in_flight()
            truncate_inode_pages(
                mem.pages, mem.zones, mem.blocks, mem.nodes, vm.i_pages, first, min(first + TRUNCATE_SLICE_PAGES, end)
            )
            if first + TRUNCATE_SLICE_PAGES < end:
                yield None
        vm.release_mapping(self.mapping)
        vm.files.remove(self)
