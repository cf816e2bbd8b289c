# SPDX-License-Identifier: GPL-2.0-only
"""The TLBs: what each CPU still believes about page tables.

One direct-mapped table of TLB_ENTRIES translations for each CPU, tagged with the mm. An access that hits does not look
at the page table, so a translation that was not flushed after its PTE changed is a real bug with real consequences;
debug_vm finds it by comparing every entry with the page tables.

Flushing follows arch/x86/mm/tlb.c: a range of more than `tlb_single_page_flush_ceiling` (33) pages flushes all of the
mm's entries. Every CPU that may hold the mm is interrupted once for each flush.
"""

from typing import Any, TypeAlias

import numpy as np

from kernelsim.jit import njit
from kernelsim.vmstat import Events

TLB_ENTRIES = 1024
tlb_single_page_flush_ceiling = 33

Tlbs: TypeAlias = Any
"""Record array [cpu, TLB_ENTRIES] of `tlb_dtype`; mm 0 marks an empty entry."""

tlb_dtype = np.dtype([("mm", np.int32), ("write", np.uint8), ("vpn", np.int64), ("pfn", np.int64)])


def alloc_tlbs(nr_cpus: int) -> Tlbs:
    return np.zeros((nr_cpus, TLB_ENTRIES), dtype=tlb_dtype)


@njit
def tlb_lookup(tlbs: Tlbs, cpu: int, mm: int, vpn: int, write: bool) -> int:
    """The pfn this CPU believes in, or -1 (also where it holds no write permission)."""
    entry = tlbs[cpu, vpn & (TLB_ENTRIES - 1)]
    if entry.mm != mm or entry.vpn != vpn or (write and entry.write == 0):
        return -1
    return int(entry.pfn)


@njit
def tlb_fill(tlbs: Tlbs, cpu: int, mm: int, vpn: int, pfn: int, write: bool) -> None:
    entry = tlbs[cpu, vpn & (TLB_ENTRIES - 1)]
    entry.mm = mm
    entry.vpn = vpn
    entry.pfn = pfn
    entry.write = 1 if write else 0


@njit
def flush_tlb_page(tlbs: Tlbs, events: Events, mm: int, vpn: int) -> None:
    """Forget one translation on every CPU."""
    for cpu in range(tlbs.shape[0]):
        entry = tlbs[cpu, vpn & (TLB_ENTRIES - 1)]
        if entry.mm == mm and entry.vpn == vpn:
            entry.mm = 0
    events[0].nr_tlb_remote_flush += tlbs.shape[0] - 1
    events[0].nr_tlb_local_flush_one += 1


@njit
def flush_tlb_mm(tlbs: Tlbs, events: Events, mm: int) -> None:
    """Forget everything about one mm on every CPU."""
    for cpu in range(tlbs.shape[0]):
        for slot in range(TLB_ENTRIES):
            if tlbs[cpu, slot].mm == mm:
                tlbs[cpu, slot].mm = 0
    events[0].nr_tlb_remote_flush += tlbs.shape[0] - 1
    events[0].nr_tlb_local_flush_all += 1
