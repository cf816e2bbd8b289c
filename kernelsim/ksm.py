# SPDX-License-Identifier: GPL-2.0-only
"""Kernel samepage merging: ksmd looks for pages with the same content and makes one of them (mm/ksm.c, 6.18).

Theory of operation
    Memory takes part whose process asked for it (MADV_MERGEABLE). ksmd goes round over it, `pages_to_scan` pages every
    `sleep_millisecs`. A page whose checksum is another than at the last look changes too often: it is volatile. The
    others are looked up in two trees:
      - the stable tree has the KSM pages (stable_node.py). They cannot change: every PTE of theirs is read-only. If one
        is the same, it is mapped in place of the page, which is freed.
      - the unstable tree has the pages that ksmd met in this pass. If one of these is the same, both become one KSM
        page. Its pages may change at any time, so their bytes are compared before a merge, and it is begun anew in
        each pass.
    A write to a KSM page copies it (do_wp_page), and the next pass notices. So does one who wants to pin it.

    What ksmd remembers of a virtual page, Linux's rmap_item, is a record beside the VMA (ksm_merge.py), made when it
    first meets a page there. `pages_sharing` and its like are counted from these records when somebody looks.

    A KSM page is an anonymous page to everybody else: on the LRU, mlocked, migrated by compaction and the DPU through
    its own reverse map, shared by fork. A merge takes place between two yields of others, and never touches a page that
    is isolated: a batch in flight has its pages to itself, and ksmd comes again.

Invariants (violations(), beside those of debug_vm.py)
    - A STABLE record names a node, and a node counts the records that name it.
    - No PTE of a KSM page is writable.

Differences from Linux: records of a mapping go with it, not at ksmd's next pass. No zero page (`use_zero_pages`), as
this emulation has none; no advisor. Chains of nodes are pruned in each pass, not every some seconds.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from kernelsim.ksm_merge import (
    NONE,
    STABLE,
    UNSTABLE,
    VOLATILE,
    end_item,
    is_on_lru,
    ksm_pages_of,
    mapped_page,
    pages_identical,
    rmap_item_dtype,
    scan_pages,
    try_to_merge_one_page,
)
from kernelsim.kthread import Kthread
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmap import Mm, Vma
from kernelsim.operation import Mutex
from kernelsim.page import PAGE_SIZE, PG_ksm
from kernelsim.rmap import VM_MERGEABLE
from kernelsim.stable_node import Key, Place, StableNode, StableTree

KSM_RUN_STOP, KSM_RUN_MERGE, KSM_RUN_UNMERGE = range(3)
SLICE_PAGES = 512  # about half a millisecond of checksums
RMAP_ITEM_BYTES = 64  # sizeof(struct ksm_rmap_item) on x86-64


class Knobs(Protocol):
    """What it goes by (ksm_sysfs.py)."""

    run: int
    pages_to_scan: int
    sleep_millisecs: int
    max_page_sharing: int
    smart_scan: int


class Ksm:
    """All that is merged."""

    def __init__(self, vm: Vm, knobs: Knobs) -> None:
        self.vm = vm
        self.knobs = knobs
        self.mutex = Mutex(vm.wait_queue())  # ksm_thread_mutex
        self.stable = StableTree(vm)
        self.full_scans = self.pages_scanned = self.pages_skipped = 0
        self._unstable: dict[Key, tuple[Mm, int]] = {}
        self._slots: list[Mm] = []  # processes left in this pass
        self._address = 0  # the first one's next virtual page

    # What takes part.

    def mergeable(self) -> Iterator[Vma]:
        return (vma for vma in self.vm.vma_objects if self.vm.vmas["flags"][vma.id] & VM_MERGEABLE)

    def madvise(self, vma: Vma, mergeable: bool) -> LongOp:
        """ksm_madvise()."""
        flags = self.vm.vmas["flags"]
        if mergeable:
            flags[vma.id] |= VM_MERGEABLE
        elif flags[vma.id] & VM_MERGEABLE:
            flags[vma.id] &= ~VM_MERGEABLE  # or ksmd would begin again
            try:
                yield from self.unmerge(vma)
            except BaseException:
                self.vm.vmas["flags"][vma.id] |= VM_MERGEABLE
                raise

    def count(self, state: int, mm: Mm | None = None) -> int:
        """Records in this state, of all processes or of one; NONE: in any but that."""
        found = 0
        for vma in self.vm.vma_objects if mm is None else mm.vma:
            if vma.rmap_items is not None:
                states = vma.rmap_items["state"]
                found += int(np.count_nonzero(states if state == NONE else states == state))
        return found

    def general_profit(self) -> int:
        """Bytes saved, less what remembering costs (Documentation/admin-guide/mm/ksm.rst)."""
        nr_saved = self.stable.nr_items - self.stable.pages_shared
        return nr_saved * PAGE_SIZE - self.count(NONE) * RMAP_ITEM_BYTES

    def process_profit(self, mm: Mm) -> int:
        """The same of one process (ksm_process_profit)."""
        return self.count(STABLE, mm) * PAGE_SIZE - self.count(NONE, mm) * RMAP_ITEM_BYTES

    # The pass.

    def do_scan(self, nr_pages: int) -> LongOp:
        """Look at so many pages, or as many as are left in this pass."""
        yield from self.mutex.acquire()
        try:
            while nr_pages > 0 and (self._slots or self._begin_pass()):
                nr_pages -= self._scan_slice(min(nr_pages, SLICE_PAGES))
                if not self._slots:
                    self.full_scans += 1
                    return
                yield None
        finally:
            self.mutex.release()

    def _begin_pass(self) -> bool:
        self._unstable.clear()
        self.stable.prune()
        if not self.stable.merge_across_nodes:
            self.stable.rehome()
        self._slots = list({vma.mm.id: vma.mm for vma in self.mergeable()}.values())
        self._address = 0
        return bool(self._slots)

    def _scan_slice(self, nr_pages: int) -> int:
        """Look at up to so many pages of one mapping; returns how many it were."""
        vm = self.vm
        ahead = [vma for vma in self._slots[0].vma if vma.end > self._address and self._is_mergeable(vma)]
        if not ahead:
            self._slots.pop(0)
            self._address = 0
            return 0
        vma = min(ahead, key=lambda vma: vma.start)
        if vma.rmap_items is None:
            vma.rmap_items = np.zeros(vma.nr_pages, dtype=rmap_item_dtype)
        found = np.empty(nr_pages, dtype=np.int64)
        first, smart = max(vma.start, self._address), bool(self.knobs.smart_scan)
        self._address, nr, nr_skipped, nr_found = scan_pages(
            vm.mem.pages, vm.vmas, vm.pt, vm.memory, vma.rmap_items, vma.id, first, vma.end, smart, found
        )
        self.pages_scanned += nr
        self.pages_skipped += nr_skipped
        for vpn in found[:nr_found].tolist():
            if vpn < 0:
                self._remove_item(vma, ~vpn)
            else:
                self._cmp_and_merge_page(vma, vpn)
        return nr

    def _is_mergeable(self, vma: Vma) -> bool:
        return bool(self.vm.vmas["flags"][vma.id] & VM_MERGEABLE)

    # One page.

    def _cmp_and_merge_page(self, vma: Vma, vpn: int) -> None:
        """A page that has not changed since the last look, or a KSM page that a fork mapped here."""
        pfn = self._page(vma, vpn)
        node = self.stable.of_page(pfn)
        self._remove_item(vma, vpn)
        if node is not None:
            self._append(node, vma, vpn)
            return
        key = self.stable.key(pfn, int(self._item(vma, vpn)["checksum"]))
        node = self.stable.search(key, self.knobs.max_page_sharing)
        if node is None:
            self._search_unstable(vma, vpn, pfn, key)
        elif is_on_lru(self.vm.mem.pages, self.stable.pfn(node)) and self._merge(vma, vpn, self.stable.pfn(node)):
            self._append(node, vma, vpn)

    def _search_unstable(self, vma: Vma, vpn: int, pfn: int, key: Key) -> None:
        """Merge with a page met before in this pass, or be such a page (unstable_tree_search_insert)."""
        other = self._unstable_page(key)
        if other is None or not pages_identical(self.vm.memory, pfn, self._page(*other)):
            self._unstable[key] = vma.mm, vpn
            self._item(vma, vpn)["state"] = UNSTABLE
        elif pfn != self._page(*other) and self._merge(vma, vpn, -1) and self._merge(*other, pfn):
            del self._unstable[key]
            node = self.stable.insert(pfn, key)
            self._append(node, *other)
            self._append(node, vma, vpn)

    def _unstable_page(self, key: Key) -> tuple[Vma, int] | None:
        """Where the unstable tree has a page of this checksum, if there is one still and nobody has merged it."""
        if key not in self._unstable:
            return None
        mm, vpn = self._unstable[key]
        vma = next((vma for vma in mm.vma if vma.start <= vpn < vma.end and self._is_mergeable(vma)), None)
        pfn = -1 if vma is None else self._page(vma, vpn)
        if vma is None or pfn < 0 or self.vm.mem.pages["flags"][pfn] & PG_ksm or self.stable.key(pfn, key[1]) != key:
            return None
        return vma, vpn

    def _page(self, vma: Vma, vpn: int) -> int:
        return int(mapped_page(self.vm.mem.pages, self.vm.vmas, self.vm.pt, vma.id, vpn))

    def _merge(self, vma: Vma, vpn: int, kpfn: int) -> bool:
        vm, mem = self.vm, self.vm.mem
        return bool(
            try_to_merge_one_page(
                mem.pages, mem.zones, mem.blocks, mem.nodes, vm.vmas, vm.avcs, vm.mms, vm.pt, vm.tlbs, vm.events,
                vm.memory, vma.id, vpn, kpfn,
            )
        )  # fmt: skip

    # Records.

    def _item(self, vma: Vma, vpn: int) -> Any:
        assert vma.rmap_items is not None
        return vma.rmap_items[vpn - vma.start]

    def _place(self, vma: Vma, vpn: int) -> Place:
        row = self.vm.vmas[vma.id]
        return int(row["mapping"]), vpn - vma.start + int(row["pgoff"])

    def _append(self, node: StableNode, vma: Vma, vpn: int) -> None:
        item = self._item(vma, vpn)
        item["state"], item["node"] = STABLE, node.number
        self.stable.append(node, self._place(vma, vpn))

    def _remove_item(self, vma: Vma, vpn: int) -> None:
        """Take a record out of its tree (remove_rmap_item_from_tree); without a page there it ends."""
        item = self._item(vma, vpn)
        if item["state"] == STABLE:
            self.stable.remove(int(item["node"]), self._place(vma, vpn))
        item["state"] = VOLATILE
        if self._page(vma, vpn) < 0:
            end_item(vma.rmap_items, vpn - vma.start)

    def forget(self, vma: Vma) -> None:
        """Drop the records of a mapping."""
        if vma.rmap_items is not None:
            for i in np.flatnonzero(vma.rmap_items["state"] == STABLE).tolist():
                self.stable.remove(int(vma.rmap_items["node"][i]), self._place(vma, vma.start + i))
            vma.rmap_items = None

    def prune(self) -> None:
        """Forget what the stable tree has that is no more."""
        self.stable.prune()

    # Undoing it.

    def unmerge(self, vma: Vma) -> LongOp:
        """Give a mapping pages of its own where it has KSM pages (unmerge_ksm_pages). OSError(ENOMEM): no room."""
        found = np.empty(SLICE_PAGES, dtype=np.int64)
        vpn = vma.start
        while vma in vma.mm.vma and vpn < vma.end:
            yield from self.vm.wait_in_flight()
            reached, nr = ksm_pages_of(self.vm.mem.pages, self.vm.vmas, self.vm.pt, vma.id, vpn, vma.end, found)
            if nr:  # and then look again: one may have been on the move meanwhile
                yield from vma.mm.unshare(vma, found[:nr])
            else:
                vpn = reached
            yield None
        self.forget(vma)

    def unmerge_and_remove_all_rmap_items(self) -> LongOp:
        """run = 2. The caller has the mutex."""
        while vmas := [vma for vma in self.mergeable() if vma.rmap_items is not None or self._has_ksm_page(vma)]:
            for vma in vmas:
                yield from self.unmerge(vma)
        self._slots.clear()
        self._unstable.clear()
        self.stable.prune()
        self.full_scans = 0

    def remove_all_stable_nodes(self) -> None:
        """Before knobs change that the stable tree goes by. OSError(EBUSY): there are KSM pages."""
        self.stable.prune()
        if self.stable.nodes:
            raise OSError(errno.EBUSY, "pages are merged: write 2 to run first")

    def _has_ksm_page(self, vma: Vma) -> bool:
        vpn, nr, found = vma.start, 0, np.empty(1, dtype=np.int64)
        while vpn < vma.end and nr == 0:
            vpn, nr = ksm_pages_of(self.vm.mem.pages, self.vm.vmas, self.vm.pt, vma.id, vpn, vma.end, found)
        return nr > 0

    def violations(self) -> list[str]:
        """What is wrong, one line each."""
        by_node = dict.fromkeys(self.stable.nodes, 0)
        faults = list(self.stable.violations())
        for vma in self.vm.vma_objects:
            items = vma.rmap_items if vma.rmap_items is not None else np.zeros(0, dtype=rmap_item_dtype)
            for number, nr in zip(*np.unique(items["node"][items["state"] == STABLE], return_counts=True), strict=True):
                if number not in by_node:
                    faults.append(f"mm {vma.mm.id}: no stable node {number}")
                else:
                    by_node[int(number)] += int(nr)
        counted = {number: node.nr_items for number, node in self.stable.nodes.items()}
        if by_node != counted:
            faults.append(f"stable nodes count {counted}, there are {by_node}")
        return faults


class Ksmd(Kthread):
    """The thread."""

    def __init__(self, ksm: Ksm) -> None:
        super().__init__("ksmd", 0)
        self.ksm = ksm
        self._next_ns = 0

    def due_ns(self, now_ns: int) -> int | None:
        if self.ksm.knobs.run != KSM_RUN_MERGE or not (self.ksm.vm.vmas["flags"] & VM_MERGEABLE).any():
            return None
        return max(self._next_ns, now_ns)

    def work(self, now_ns: int) -> LongOp | None:
        self._next_ns = now_ns + self.ksm.knobs.sleep_millisecs * 1_000_000
        return self.ksm.do_scan(self.ksm.knobs.pages_to_scan)
