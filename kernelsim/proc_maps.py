# SPDX-License-Identifier: GPL-2.0-only
"""The texts of maps, smaps, smaps_rollup and numa_maps (fs/proc/task_mmu.c, 6.18).

A mapping here is either private anonymous memory or a shared mapping of a file; all of them can be read and written.
Emulated files have no directory: they are shown as /kernelsim/N, where N, their number in rmap.py, is also the inode,
on a device 00:01, of the kind that Linux gives to file systems without a disk.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kernelsim import task_mmu as mmu
from kernelsim.huge_memory import thp_allowable
from kernelsim.mmap import Mm, Vma
from kernelsim.page import PAGE_SIZE
from kernelsim.rmap import VM_HUGEPAGE, VM_LOCKED, VM_MERGEABLE, VM_SHARED

_NAME_COLUMN = 73
_KB = 1024
_PSS_KB = _KB << mmu.PSS_SHIFT
_SLICE_PAGES = 1 << 18  # about three milliseconds
Stats = NDArray[np.int64]


def path_of(vma: Vma) -> str | None:
    """The file's name; None for anonymous memory."""
    return None if vma.file is None else f"/kernelsim/{vma.file.mapping}"


def by_address(mm: Mm) -> list[Vma]:
    return sorted(mm.vma, key=lambda vma: vma.start)


def maps_line(vma: Vma) -> str:
    """One line of maps, also the head of a mapping in smaps (show_map_vma)."""
    row = vma.vm.vmas[vma.id]
    offset = int(row["pgoff"]) * PAGE_SIZE if vma.file else 0
    shared = "s" if row["flags"] & VM_SHARED else "p"
    inode, device = (vma.file.mapping, "00:01") if vma.file else (0, "00:00")
    line = f"{vma.start * PAGE_SIZE:08x}-{vma.end * PAGE_SIZE:08x} rw-{shared} {offset:08x} {device} {inode} "
    return f"{line:<{_NAME_COLUMN}s}{path_of(vma)}\n" if vma.file else f"{line}\n"


def gather(vma: Vma, mss: Stats) -> Iterator[None]:
    """Add up a mapping, slice by slice; what ends between two slices is not counted further."""
    vm = vma.vm
    for first in range(vma.start, vma.end, _SLICE_PAGES):
        if vma not in vma.mm.vma:
            return
        mmu.smap_gather(vm.mem.pages, vm.vmas, vm.pt, vma.id, first, min(first + _SLICE_PAGES, vma.end), mss)
        yield None


def new_stats() -> Stats:
    return np.zeros(mmu.NR_MEM_SIZE_STATS, dtype=np.int64)


def _lines(values: Iterator[tuple[str, int]]) -> str:
    return "".join(f"{name + ':':<16s}{kbytes:8d} kB\n" for name, kbytes in values)


def smap_stats(mss: Stats, rollup: bool) -> str:
    """The lines from Rss to Locked (__show_smap); there is no swap, and no hugetlb page is mapped."""
    return _lines(_smap_values([int(value) for value in mss], rollup))


def _smap_values(mss: list[int], rollup: bool) -> Iterator[tuple[str, int]]:
    yield "Rss", mss[mmu.RESIDENT] // _KB
    yield "Pss", mss[mmu.PSS] // _PSS_KB
    yield "Pss_Dirty", mss[mmu.PSS_DIRTY] // _PSS_KB
    if rollup:
        for name, stat in (("Pss_Anon", mmu.PSS_ANON), ("Pss_File", mmu.PSS_FILE), ("Pss_Shmem", mmu.PSS_SHMEM)):
            yield name, mss[stat] // _PSS_KB
    for name, size in _SIZES:
        yield name, mss[size] // _KB if size is not None else 0
    yield "Locked", mss[mmu.PSS_LOCKED] // _PSS_KB


_SIZES = (
    ("Shared_Clean", mmu.SHARED_CLEAN),
    ("Shared_Dirty", mmu.SHARED_DIRTY),
    ("Private_Clean", mmu.PRIVATE_CLEAN),
    ("Private_Dirty", mmu.PRIVATE_DIRTY),
    ("Referenced", mmu.REFERENCED),
    ("Anonymous", mmu.ANONYMOUS),
    ("KSM", mmu.KSM),
    ("LazyFree", mmu.LAZYFREE),
    ("AnonHugePages", mmu.ANON_THP),
    ("ShmemPmdMapped", None),
    ("FilePmdMapped", mmu.FILE_THP),
    ("Shared_Hugetlb", None),
    ("Private_Hugetlb", None),
    ("Swap", None),
    ("SwapPss", None),
)
"""Lines by their counter; None where this emulation has nothing of the kind."""


def smap(vma: Vma, mss: Stats) -> str:
    """One mapping of smaps."""
    page_kb = PAGE_SIZE // _KB
    sizes = (("Size", vma.nr_pages * page_kb), ("KernelPageSize", page_kb), ("MMUPageSize", page_kb))
    eligible = vma.file is None and thp_allowable(vma.vm, vma.id)
    tail = f"{'THPeligible:':<16s}{int(eligible):8d}\nVmFlags: {_vm_flags(vma)} \n"
    return maps_line(vma) + _lines(iter(sizes)) + smap_stats(mss, False) + tail


def _vm_flags(vma: Vma) -> str:
    """Two letters a flag, in the order of their bits (show_smap_vma_flags)."""
    flags = vma.vm.vmas["flags"][vma.id]
    named = (
        ("rd", True),
        ("wr", True),
        ("sh", flags & VM_SHARED),
        ("mr", True),
        ("mw", True),
        ("me", True),
        ("ms", flags & VM_SHARED),
        ("lo", flags & VM_LOCKED),
        ("ac", vma.accounted),
        ("hg", flags & VM_HUGEPAGE),
        ("mg", flags & VM_MERGEABLE),
    )
    return " ".join(name for name, is_set in named if is_set)


def rollup_head(mm: Mm) -> str:
    """First line of smaps_rollup: from the first mapping to the last."""
    vmas = by_address(mm)
    start, end = (vmas[0].start, vmas[-1].end) if vmas else (0, 0)
    line = f"{start * PAGE_SIZE:08x}-{end * PAGE_SIZE:08x} ---p 00000000 00:00 0 "
    return f"{line:<{_NAME_COLUMN}s}[rollup]\n"


def gather_numa(vma: Vma, md: Stats) -> Iterator[None]:
    """Add up a mapping for numa_maps; `md` is int64[NR_NUMA_STATS + nr_nodes]."""
    vm, mem = vma.vm, vma.vm.mem
    for first in range(vma.start, vma.end, _SLICE_PAGES):
        if vma not in vma.mm.vma:
            return
        end = min(first + _SLICE_PAGES, vma.end)
        mmu.numa_gather(mem.pages, mem.zones, vm.vmas, vm.pt, vma.id, first, end, md)
        yield None


def numa_line(vma: Vma, md: Stats) -> str:
    """One line of numa_maps (show_numa_map). Every process has the default policy: its home node first."""
    line = f"{vma.start * PAGE_SIZE:08x} default" + (f" file={path_of(vma)}" if vma.file else "")
    pages = int(md[mmu.PAGES])
    if not pages:
        return line + "\n"
    if md[mmu.ANON]:
        line += f" anon={md[mmu.ANON]}"
    if md[mmu.DIRTY]:
        line += f" dirty={md[mmu.DIRTY]}"
    if pages not in (md[mmu.ANON], md[mmu.DIRTY]):
        line += f" mapped={pages}"
    if md[mmu.MAPCOUNT_MAX] > 1:
        line += f" mapmax={md[mmu.MAPCOUNT_MAX]}"
    if md[mmu.ACTIVE] < pages:
        line += f" active={md[mmu.ACTIVE]}"
    line += "".join(f" N{nid}={nr}" for nid, nr in enumerate(md[mmu.NR_NUMA_STATS :]) if nr)
    return f"{line} kernelpagesize_kB={PAGE_SIZE // _KB}\n"
