# SPDX-License-Identifier: GPL-2.0-only
"""/proc/kpageflags and kpagecount, read as page-types does, against the other files, the machine and a real one."""

import errno

import numpy as np
import pytest
import zstandard
from machines import MIB, Lab
from numpy.typing import NDArray
from wiring import errno_of

from dpud.capture import DEMO, read_capture
from dpud.physmem import PhysMem
from kernelsim.machine import Machine
from kernelsim.operation import complete

U64 = NDArray[np.uint64]

# admin-guide/mm/pagemap.rst, and include/linux/kernel-page-flags.h for those from 32 on
_NAMES = """
    LOCKED ERROR REFERENCED UPTODATE DIRTY LRU ACTIVE SLAB WRITEBACK RECLAIM BUDDY MMAP ANON SWAPCACHE SWAPBACKED
    COMPOUND_HEAD COMPOUND_TAIL HUGE UNEVICTABLE HWPOISON NOPAGE KSM THP OFFLINE ZERO_PAGE IDLE PGTABLE
"""
_NUMBERS = {name: bit for bit, name in enumerate(_NAMES.split())} | {"RESERVED": 32, "MLOCKED": 33, "PRIVATE": 35}
BITS = {name: np.uint64(1 << bit) for name, bit in _NUMBERS.items()}
COMPARED = """
    LRU ACTIVE ANON SWAPBACKED BUDDY COMPOUND_HEAD COMPOUND_TAIL UNEVICTABLE THP RESERVED MLOCKED DIRTY REFERENCED MMAP
    PRIVATE
"""
NR_SECTION = 32768


def busy_lab() -> Lab:
    """Two processes that share, with locked, pinned, huge and missing pages, on two nodes; a hugetlb page."""
    lab = Lab((32, 64))
    lab.spawn("a", anon="16M", file="3M", mlock="20", pin="3", holes="20 seed=1", fork="b")
    lab.spawn("huge", thp="1", anon="8M", fork="c")
    lab.set("huge", holes="5 seed=4")
    lab.write("/proc/sys/vm/nr_hugepages", "2")
    return lab


@pytest.fixture(scope="module")
def lab() -> Lab:
    return busy_lab()


@pytest.fixture(scope="module")
def flags(lab: Lab) -> U64:
    return lab.read_numbers("/proc/kpageflags")


@pytest.fixture(scope="module")
def count(lab: Lab) -> U64:
    return lab.read_numbers("/proc/kpagecount")


def has(flags: U64, *names: str) -> NDArray[np.bool_]:
    mask = np.bitwise_or.reduce([BITS[name] for name in names])
    return flags & mask == mask


def test_flags_tell_what_the_counters_count(lab: Lab, flags: U64) -> None:
    vmstat = lab.vmstat()
    lru, anon, active = has(flags, "LRU"), has(flags, "SWAPBACKED"), has(flags, "ACTIVE")
    unevictable = has(flags, "UNEVICTABLE")
    assert has(flags, "BUDDY").sum() == vmstat["nr_free_pages"]
    assert has(flags, "PGTABLE").sum() == vmstat["nr_page_table_pages"]
    assert has(flags, "HUGE").sum() == vmstat["nr_hugetlb"] == 1024
    assert (lru & unevictable).sum() == vmstat["nr_unevictable"]
    assert (lru & ~unevictable & anon & ~active).sum() == vmstat["nr_inactive_anon"]
    assert (lru & ~unevictable & anon & active).sum() == vmstat["nr_active_anon"]
    assert (lru & ~unevictable & ~anon & ~active).sum() == vmstat["nr_inactive_file"]
    assert has(flags, "MLOCKED").sum() == vmstat["nr_mlock"]
    assert has(flags, "MMAP", "ANON").sum() == vmstat["nr_anon_pages"]
    assert (has(flags, "MMAP") & ~has(flags, "ANON")).sum() == vmstat["nr_mapped"]


def test_the_root_cgroup_is_charged_for_what_processes_and_the_page_cache_have(lab: Lab, flags: U64) -> None:
    """As a 6.18 kernel shows it of what belongs to no other cgroup: each page on an LRU list, tails as their heads;
    page tables, free and hugetlb pages never."""
    cgroup = lab.read_numbers("/proc/kpagecgroup")
    assert set(np.unique(cgroup)) == {0, 1}
    assert len(cgroup) == len(flags)
    vmstat = lab.vmstat()
    lists = ("inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable")
    assert cgroup.sum() == sum(vmstat[f"nr_{name}"] for name in lists)
    assert (has(flags, "LRU") == (cgroup == 1)).all()
    assert (has(flags, "THP") <= (cgroup == 1)).all()


def test_the_map_ends_with_its_section_and_holes_have_no_page(lab: Lab, flags: U64) -> None:
    assert len(flags) == NR_SECTION  # 96 MiB are less than one of 128 MiB
    assert flags[0] == BITS["NOPAGE"]  # as this emulation lays memory out
    assert (flags[96 * MIB // 4096 :] == BITS["NOPAGE"]).all()
    assert has(flags[1 : 96 * MIB // 4096], "NOPAGE").sum() == 0
    assert has(flags, "RESERVED").sum() == 96 * 4  # the memory map: 64 bytes for each page


def cut_into_free_blocks(free: NDArray[np.bool_], start: int, end: int) -> list[int]:
    """Blocks by order, when each run of free pages is cut into the largest aligned blocks there are."""
    nr = [0] * 11
    pfn = start
    while pfn < end:
        if not free[pfn]:
            pfn += 1
            continue
        order = next(o for o in range(10, -1, -1) if pfn % (1 << o) == 0 and free[pfn : pfn + (1 << o)].all())
        nr[order] += 1
        pfn += 1 << order
    return nr


def test_runs_of_free_pages_are_buddyinfo(lab: Lab, flags: U64) -> None:
    free = has(flags, "BUDDY")
    spans = ((1, 4096), (4096, 8192), (8192, 24576))
    for (start, end), line in zip(spans, lab.read("/proc/buddyinfo").splitlines(), strict=True):
        assert cut_into_free_blocks(free, start, end) == [int(nr) for nr in line.split()[4:]]


def test_compound_pages_are_a_head_and_tails(flags: U64) -> None:
    heads = np.flatnonzero(has(flags, "COMPOUND_HEAD"))
    assert len(heads) > 4
    for head in heads:
        pages = flags[head : head + 512]
        assert has(pages[1:], "COMPOUND_TAIL").all()
        assert len(set((pages & ~(BITS["COMPOUND_HEAD"] | BITS["COMPOUND_TAIL"])).tolist())) == 1
        assert has(pages, "THP").all() != has(pages, "HUGE").all()
    assert has(flags, "COMPOUND_TAIL").sum() == 511 * len(heads)


def mappings(lab: Lab, nr_pages: int) -> tuple[NDArray[np.int64], dict[int, int]]:
    """How often each frame is mapped, from all pagemaps; and how many frames each pid has."""
    nr = np.zeros(nr_pages, dtype=np.int64)
    resident = {}
    for pid in range(100, 104):
        rss = 0
        for line in lab.read(f"/proc/{pid}/maps").splitlines():
            start, end = (int(address, 16) // 4096 for address in line.split()[0].split("-"))
            entries = lab.read_numbers(f"/proc/{pid}/pagemap", start, end - start)
            pfns = entries[entries >> np.uint64(63) == 1] & np.uint64((1 << 55) - 1)
            np.add.at(nr, pfns.astype(np.int64), 1)
            rss += len(pfns)
        resident[pid] = rss
    return nr, resident


def test_kpagecount_is_how_often_pagemaps_name_a_page(lab: Lab, flags: U64, count: U64) -> None:
    """Page by page; pages of a folio in several pieces show their average."""
    nr, resident = mappings(lab, len(flags))
    small = ~(has(flags, "COMPOUND_HEAD") | has(flags, "COMPOUND_TAIL"))
    assert (nr[small] == count[small]).all()
    assert (nr[small] > 1).sum() > 1000
    for head in np.flatnonzero(has(flags, "COMPOUND_HEAD", "THP")):
        mapped = nr[head : head + 512].sum()
        pmds = 1 if (nr[head : head + 512] >= 1).all() else 0  # who has a whole one maps it by a PMD, or did not split
        assert set(count[head : head + 512].tolist()) <= {max(round(mapped / 512), pmds), max(mapped // 512, 1)}
    for pid, pages in resident.items():
        assert int(lab.read(f"/proc/{pid}/statm").split()[1]) == pages


@pytest.mark.slow
def test_pieces_agree_with_the_whole(lab: Lab, flags: U64) -> None:
    """Whatever a piece begins in the middle of: a free block, a folio, memory that is not there."""
    for nr in (1, 7, 512, 4096, 10007):
        pieces = [lab.read_numbers("/proc/kpageflags", first, nr) for first in range(0, NR_SECTION, nr)]
        assert (np.concatenate(pieces) == flags).all()
    assert len(lab.read_numbers("/proc/kpageflags", NR_SECTION, 8)) == 0
    assert len(lab.read_numbers("/proc/kpageflags", NR_SECTION - 3, 8)) == 3


@pytest.mark.parametrize("name", ["kpageflags", "kpagecount", "100/pagemap"])
def test_only_whole_entries_can_be_read(lab: Lab, name: str) -> None:
    attr = lab.registry.nodes[f"/proc/{name}"].attr  # type: ignore[attr-defined]
    kobj = lab.registry.nodes[f"/proc/{name}"].kobj  # type: ignore[attr-defined]
    for pos, size in ((4, 8), (0, 12), (1, 1), (8, 7)):
        assert errno_of(lambda pos=pos, size=size: complete(attr.read_stream(kobj, pos, size, False))) == errno.EINVAL
    assert complete(attr.read_stream(kobj, 0, 0, False)) == b""


# A real machine's.


def captured(name: str) -> U64:
    with (DEMO / f"{name}.zst").open("rb") as file:
        return np.frombuffer(zstandard.ZstdDecompressor().stream_reader(file).read(), dtype=np.uint64)


@pytest.fixture(scope="module")
def demo() -> Machine:
    return Machine.from_image(read_capture(DEMO), alloc_words=PhysMem().alloc)


def numbers(machine: Machine, name: str) -> U64:
    file = machine.registry.nodes[f"/proc/{name}"]
    return np.frombuffer(complete(file.attr.read_stream(file.kobj, 0, 1 << 30, False)), dtype=np.uint64)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_an_imported_machine_shows_the_captured_flags(demo: Machine) -> None:
    """Bit by bit, where this emulation has the flag and knows who owns the page.

    Not compared: kernel frames that hold the emulated page tables, ANON on slab pages (a leftover on Linux), pages of
    nobody (Linux has not initialised their flags, or they were on their way while the capture was taken).
    """
    ours, theirs = numbers(demo, "kpageflags"), captured("kpageflags")
    assert len(ours) == len(theirs)
    everybodys = ~(has(theirs, "SLAB") | has(theirs, "PGTABLE") | has(ours, "PGTABLE")) & (theirs != 0)
    for name in COMPARED.split():
        differ = (has(ours, name) != has(theirs, name)) & everybodys
        assert differ.sum() <= 0.016 * has(theirs, name).sum(), name
    assert has(ours, "BUDDY").sum() == demo.mem.zones["free_pages"].sum()


@pytest.mark.slow
def test_an_imported_machine_shows_the_captured_counts(demo: Machine) -> None:
    """But of pages whose owners had gone when the flags were read."""
    ours, theirs = numbers(demo, "kpagecount"), captured("kpagecount")
    lru = has(captured("kpageflags"), "LRU") & has(numbers(demo, "kpageflags"), "LRU")
    assert lru.sum() > 500_000
    assert (np.minimum(ours[lru], 16) != np.minimum(theirs[lru], 16)).sum() < 100
