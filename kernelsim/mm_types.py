# SPDX-License-Identifier: GPL-2.0-only
"""Everything virtual: the tables of mms, VMAs and rmap chains, page tables, TLBs, and the bytes behind all of it.

The tables are record arrays that grow by doubling; ids are handed out lowest first, so that the same calls give the
same ids. A compiled loop never holds on to a table across calls.

`in_flight` lists the batches that a device is moving. Whoever meets a migration entry, or finds no memory while free
pages are held by a batch, yields the first of them and tries again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernelsim.content import WORDS_FULL, Memory
from kernelsim.gfp import gfp_migratetype
from kernelsim.mmzone import Mem
from kernelsim.operation import Mutex, Operation, Waitable
from kernelsim.overcommit import Overcommit
from kernelsim.page import AllocWords, zeroed_words
from kernelsim.page_alloc import get_page_from_freelist
from kernelsim.pgtable import PTRS_PER_PT, PageTables
from kernelsim.rmap import Avcs, avc_dtype, mm_dtype, vma_dtype
from kernelsim.tlb import Tlbs, alloc_tlbs
from kernelsim.trace_hook import NoTrace, TraceHook, no_debug
from kernelsim.vmstat import Events, alloc_events
from kernelsim.wait import WaitQueue

if TYPE_CHECKING:
    from kernelsim.cma import Cma
    from kernelsim.direct_alloc import DirectBlocks
    from kernelsim.filemap import File
    from kernelsim.hostmem import KernelStamps
    from kernelsim.mmap import Vma


LongOp: TypeAlias = Operation[None]
"""A long operation without a result."""


class Table:
    """A growing record array with free ids; id 0 is never handed out."""

    def __init__(self, dtype: np.dtype[np.void], capacity: int = 64) -> None:
        self.rows: Any = np.zeros(capacity, dtype=dtype)
        self._free = list(range(1, capacity))

    def take(self) -> int:
        """A zeroed row's id."""
        if not self._free:
            old = len(self.rows)
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
            self._free = list(range(old, 2 * old))
        number = heapq.heappop(self._free)
        self.rows[number] = np.zeros((), dtype=self.rows.dtype)
        return number

    def release(self, number: int) -> None:
        heapq.heappush(self._free, number)

    @property
    def in_use(self) -> set[int]:
        return set(range(1, len(self.rows))) - set(self._free)


class PageAllocator(Protocol):
    """What processes ask of the page allocator beyond its free lists (alloc_slowpath.py)."""

    def alloc_pages(self, gfp: int, order: int, nid: int, comm: str) -> Operation[int]:
        """A block's first pfn (refcount 1), node `nid` first, or -ENOMEM."""
        ...

    def make_room(self, nid: int, comm: str) -> Operation[bool]:
        """Free memory for a fault that found none; False: there is none."""
        ...

    def wake_if_low(self, nid: int) -> None:
        """Wake kswapd where no zone is above its low watermark."""
        ...


class SamepageMerging(Protocol):
    """What others ask of KSM (ksm.py)."""

    def madvise(self, vma: Vma, mergeable: bool) -> LongOp:
        """MADV_MERGEABLE and MADV_UNMERGEABLE. OSError(ENOMEM): a page cannot be copied."""
        ...

    def forget(self, vma: Vma) -> None:
        """A mapping is about to go."""
        ...

    def prune(self) -> None:
        """The last VMA of an anon_vma is gone."""
        ...

    def violations(self) -> list[str]:
        """What is wrong, one line each."""
        ...


class FreeListsOnly:
    """The allocator of a Vm that is no machine's: what is not free cannot be had."""

    def __init__(self, mem: Mem) -> None:
        self.mem = mem

    def alloc_pages(self, gfp: int, order: int, nid: int, comm: str) -> Operation[int]:
        yield from ()
        mem = self.mem
        return get_page_from_freelist(mem.pages, mem.zones, mem.blocks, mem.zonelist[nid], order, gfp_migratetype(gfp))

    def make_room(self, nid: int, comm: str) -> Operation[bool]:
        yield from ()
        return False

    def wake_if_low(self, nid: int) -> None:
        pass


class Vm:
    """Virtual memory's tables around one `Mem`."""

    def __init__(
        self,
        mem: Mem,
        words: int,
        nr_cpus: int,
        alloc_words: AllocWords = zeroed_words,
        wait_queue: Callable[[], WaitQueue] = WaitQueue,
    ) -> None:
        self.mem = mem
        self.wait_queue = wait_queue
        self.memory: Memory = alloc_words(mem.nr_pages, words)
        tables = self.memory if words == WORDS_FULL else alloc_words(mem.nr_pages, PTRS_PER_PT)
        self.pt: PageTables = tables.reshape(-1)
        self.tlbs: Tlbs = alloc_tlbs(nr_cpus)
        self.events: Events = alloc_events()
        self._mms = Table(mm_dtype)
        self._vmas = Table(vma_dtype)
        self._avcs = Table(avc_dtype)
        self.i_pages: NDArray[np.int64] = np.full(0, -1, dtype=np.int64)
        self.in_flight: list[Waitable] = []
        self.compaction_mutex = Mutex(wait_queue())  # of those who hold free frames: one compaction at a time
        self.nr_forks = 0  # forks that are copying; no batch begins while there are any
        self.sequence = 0
        self.thp_enabled = "never"  # /sys/kernel/mm/transparent_hugepage/enabled
        self.thp_defrag = "madvise"
        self.overcommit = Overcommit(mem)
        self.files: list[File] = []
        self.cma_areas: list[Cma] = []
        self.vma_objects: list[Vma] = []
        self.foreign_tables = 0  # page-table pages of an imported host, whose processes are not here
        self.kernel_stamps: KernelStamps | None = None
        self.direct_blocks: DirectBlocks | None = None
        self.ksm: SamepageMerging | None = None
        self.page_alloc: PageAllocator = FreeListsOnly(mem)
        self.trace: TraceHook = NoTrace()
        self.pr_debug: Callable[..., object] = no_debug
        self._dead_mappings: list[int] = []
        self._touched = np.zeros(0, dtype=np.uint8)

    def wait_in_flight(self) -> LongOp:
        """Wait until no batch is being moved."""
        while self.in_flight:
            yield self.in_flight[0]

    @property
    def nr_cpus(self) -> int:
        return int(self.tlbs.shape[0])

    @property
    def mms(self) -> Any:
        return self._mms.rows

    @property
    def vmas(self) -> Any:
        return self._vmas.rows

    @property
    def avcs(self) -> Avcs:
        return self._avcs.rows

    def touched(self) -> NDArray[np.uint8]:
        """uint8[mm], all 0: a scratch flag for each mm."""
        if len(self._touched) < len(self.mms):
            self._touched = np.zeros(len(self.mms), dtype=np.uint8)
        return self._touched

    @property
    def mms_in_use(self) -> set[int]:
        return self._mms.in_use

    def take_mm(self) -> int:
        return self._mms.take()

    def release_mm(self, mm: int) -> None:
        self._mms.release(mm)

    def take_vma(self) -> int:
        return self._vmas.take()

    def release_vma(self, vma: int) -> None:
        self.vmas[vma] = np.zeros((), dtype=vma_dtype)
        self._vmas.release(vma)

    def take_mapping(self) -> int:
        """A new rmap object: the head of an empty chain."""
        while self._dead_mappings and not self.in_flight:
            self._avcs.release(self._dead_mappings.pop())
        return self._avcs.take()

    def release_mapping(self, mapping: int) -> None:
        """An rmap object is gone. A page in flight may still name it: its number is not used anew before that ends."""
        if self.in_flight:
            self._dead_mappings.append(mapping)
        else:
            self._avcs.release(mapping)

    def link(self, mapping: int, vma: int, index: int = 0) -> int:
        """Put a VMA at the front of an rmap object's chain; or a place, an anon_vma and an index, at a stable node's.

        Returns the avc.
        """
        avc = self._avcs.take()
        avcs = self.avcs
        avcs["vma"][avc] = vma
        avcs["i_base"][avc] = index
        avcs["next"][avc] = avcs["next"][mapping]
        avcs["next"][mapping] = avc
        return avc

    def unlink(self, mapping: int, vma: int) -> bool:
        """Take a VMA out of a chain; True if the chain is empty now."""
        avcs = self.avcs
        avc = int(avcs["next"][mapping])
        while avcs["vma"][avc] != vma:
            avc = int(avcs["next"][avc])
        self.unlink_avc(mapping, avc)
        return bool(avcs["next"][mapping] == 0)

    def unlink_avc(self, mapping: int, avc: int) -> None:
        """Take one avc out of a chain."""
        avcs = self.avcs
        before = mapping
        while avcs["next"][before] != avc:
            before = int(avcs["next"][before])
        avcs["next"][before] = avcs["next"][avc]
        self._avcs.release(avc)

    def put_anon_vma(self, mapping: int) -> None:
        """An anon_vma lost a VMA, or a stable node's place that named it: it is gone with the last of both."""
        avcs = self.avcs
        if avcs["next"][mapping] == 0 and avcs["i_base"][mapping] == 0:
            self.release_mapping(mapping)

    def chain(self, mapping: int) -> list[int]:
        """The VMAs of an rmap object."""
        vmas = []
        avc = int(self.avcs["next"][mapping])
        while avc:
            vmas.append(int(self.avcs["vma"][avc]))
            avc = int(self.avcs["next"][avc])
        return vmas

    def grow_page_cache(self, nr_pages: int) -> int:
        """Room for one more file in `i_pages`; returns where it begins."""
        base = len(self.i_pages)
        self.i_pages = np.concatenate([self.i_pages, np.full(nr_pages, -1, dtype=np.int64)])
        return base
