# SPDX-License-Identifier: GPL-2.0-only
"""Memory laid out page by page, for tests that must know where everything is.

One zone, Normal, of whole pageblocks that begins at pfn 1024, with watermarks too low to count unless set. All of it
belongs to the kernel until a test frees pages or puts movable ones there. Movable pages have no process: as on an
imported machine they are LRU pages with one reference, which is enough for everything but the page tables.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from kernelsim import page_alloc
from kernelsim.compact_control import CompactControl, VmArrays, vm_arrays
from kernelsim.compaction import Compaction
from kernelsim.filemap import File
from kernelsim.lruvec import lruvec_add_folio
from kernelsim.machine import Machine, MachineConfig, NodeConfig
from kernelsim.mmzone import ZONE_NORMAL, Mem, pageset_dtype
from kernelsim.operation import complete

START = 1024
BLOCK = 512
UPTODATE, LRU, SLAB, WRITEBACK, BUDDY, ANON, SWAPBACKED = (1 << bit for bit in (3, 5, 7, 8, 10, 12, 14))
HEAD, TAIL, HUGE, UNEVICTABLE = (1 << bit for bit in (15, 16, 17, 18))
HELD, ISOLATED = 1 << 31, 1 << 30
PIN = 1024
ASYNC, SYNC_LIGHT, SYNC = range(3)
UNMOVABLE, MOVABLE, RECLAIMABLE, HIGHATOMIC = range(4)


class Board:
    """`nr_blocks` pageblocks; block 0 is the one at START."""

    def __init__(self, nr_blocks: int, pageset: Sequence[int] | None = None) -> None:
        """`pageset`: (count, high, high_min, high_max, batch, free_count) of a per-CPU list; None for no such lists."""
        end = START + nr_blocks * BLOCK
        spans = [(0, ZONE_NORMAL, START, end)]
        self.mem = Mem(spans, np.array([[10]]), 0 if pageset is None else 1)
        if pageset is not None:
            self.mem.pagesets[0, 0] = np.array((*pageset, 0), dtype=pageset_dtype)
        page_alloc.init_range(self.mem.pages, START, end, SLAB, 1)
        self.mem.zones["present"] = self.mem.zones["managed"] = end - START
        config = MachineConfig(nodes=(NodeConfig(32 << 20, 1),), bytes="stamp")
        self.machine = Machine(config, mem=self.mem)
        self.vm = self.machine.vm
        self.zone = self.mem.zones[0]
        self.end = end
        self._stamps: dict[int, int] = {}
        self.watermarks(-100_000)

    # Laying out.

    def pfn(self, block: int, offset: int = 0) -> int:
        return START + block * BLOCK + offset

    def free(self, start: int, nr: int = 1) -> None:
        """Free pages, merged as far as they go."""
        for pfn in range(start, start + nr):
            page_alloc.clear_page(self.mem.pages, pfn)
        page_alloc.free_range(self.mem.pages, self.mem.zones, self.mem.blocks, start, start + nr)

    def free_each(self, pfns: Iterable[int]) -> None:
        for pfn in pfns:
            self.free(pfn)

    def movable(self, pfns: Iterable[int], flags: int = 0, refcount: int = 1) -> None:
        """Anonymous pages on the LRU, each with content of its own."""
        for pfn in pfns:
            self._on_lru(pfn, UPTODATE | ANON | SWAPBACKED | flags, refcount)
            self.vm.memory[pfn, 0] = self._stamps[pfn] = 1 << 40 | pfn

    def cached(self, pfns: Sequence[int], refcount: int = 1) -> None:
        """The page cache of a new file. More references than one: somebody uses the page."""
        file = File(self.vm, len(pfns))
        for index, pfn in enumerate(pfns):
            self._on_lru(pfn, UPTODATE, refcount)
            self.mem.pages["mapping"][pfn], self.mem.pages["index"][pfn] = file.mapping, index
            self.vm.i_pages[file.i_base + index] = pfn
            self.vm.memory[pfn, 0] = self._stamps[pfn] = int(file.disk[index])
        self.mem.nodes["nr_file_pages"][0] += len(pfns)

    def _on_lru(self, pfn: int, flags: int, refcount: int) -> None:
        page_alloc.clear_page(self.mem.pages, pfn)
        self.mem.pages["flags"][pfn], self.mem.pages["refcount"][pfn] = flags, refcount
        lruvec_add_folio(self.mem.pages, self.mem.zones, self.mem.nodes, pfn)

    def compound(self, pfn: int, order: int, flags: int) -> None:
        """The kernel's, or hugetlb's."""
        self.mem.pages["flags"][pfn : pfn + (1 << order)] = flags
        page_alloc.prep_compound_page(self.mem.pages, pfn, order, flags & HUGE)
        self.mem.pages["refcount"][pfn + 1 : pfn + (1 << order)] = 0

    def kind(self, block: int, migratetype: int) -> None:
        pages, zones, blocks = self.mem.pages, self.mem.zones, self.mem.blocks
        page_alloc.set_pageblock_migratetype(pages, zones, blocks, 0, self.pfn(block) // BLOCK, migratetype)

    def watermarks(self, low: int, gap: int = 10) -> None:
        self.zone["watermark"] = [low, low + gap, low + 2 * gap, low + 3 * gap]

    # Looking.

    def where(self) -> dict[int, int]:
        """Where each movable page's content is now, by where it was put."""
        at = {int(self.vm.memory[pfn, 0]): pfn for pfn in self.lru()}
        return {pfn: at[stamp] for pfn, stamp in self._stamps.items() if stamp in at}

    def lru(self) -> list[int]:
        """The pages on LRU lists, ascending."""
        return np.flatnonzero(self.mem.pages["flags"][: self.end] & np.uint32(LRU)).tolist()

    def free_blocks(self) -> dict[int, int]:
        """Order of each free block, by its first page."""
        pages = self.mem.pages[: self.end]
        heads = np.flatnonzero(pages["flags"] & np.uint32(BUDDY)).tolist()
        return {head: int(pages["order"][head]) for head in heads}

    def skipped(self) -> list[int]:
        """Blocks with the skip bit."""
        return [block for block in range((self.end - START) // BLOCK) if self.mem.skip[self.pfn(block) // BLOCK]]

    def events(self, *names: str) -> list[int]:
        return [int(self.vm.events[name][0]) for name in names]

    def assert_sound(self) -> None:
        """Nothing lost, nothing overwritten."""
        assert not self.machine.check(), self.machine.check()
        assert len(self.where()) == len(self._stamps) == len(self.lru())

    # Compacting.

    @property
    def compaction(self) -> Compaction:
        return self.machine.compaction

    def control(self, order: int = -1, mode: int = SYNC, **fields: int) -> CompactControl:
        """A run of the zone; by hand unless said otherwise."""
        if order == -1:
            fields = {"ignore_skip_hint": 1, "whole_zone": 1} | fields
        cc = self.compaction._control(0, order, mode, **fields)
        self.compaction._set_up(cc)
        return cc

    def arrays(self) -> VmArrays:
        return vm_arrays(self.vm, self.compaction._src, self.compaction._dst)

    def run(self, cc: CompactControl) -> int:
        return complete(self.compaction._compact_zone(cc))
