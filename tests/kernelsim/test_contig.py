# SPDX-License-Identifier: GPL-2.0-only
"""Ranges emptied by the DPU or the CPU, and what happens where that cannot be done."""

import errno

import numpy as np
import pytest
from machines import NODES_SYSFS, Lab, advance, settle, small_slices

from dpud.dpu.faults import FaultKind
from kernelsim import page_alloc as buddy
from kernelsim.attr import complete
from kernelsim.page_isolation import RangeBusy
from kernelsim.pgtable import walk_leaf

LRU, HUGE = 1 << 5, 1 << 17
STATS = "/sys/kernel/debug/dpu_compact/contig_stats"


def stats(lab: Lab) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in lab.read(STATS).splitlines())}


def busy_lab(words: str = "stamp", nr_ranks: int | None = 1, nodes: tuple[int, ...] = (64,)) -> Lab:
    """A process with holes, file pages, locked pages and a child that shares the rest."""
    lab = Lab(nodes, words, nr_ranks=nr_ranks)
    lab.spawn("a", anon="30M", file="2M", holes="30 seed=1")
    lab.set("a", fork="child", mlock="20", touch="10 seed=2")
    lab.assert_at_rest()
    return lab


def used_range(lab: Lab, nr_pages: int = 2048) -> int:
    """The range of pageblocks with the most movable pages, among those without an unmovable one."""
    flags = lab.mem.pages["flags"][: lab.mem.nr_pages]
    movable = flags & np.uint32(LRU) != 0
    in_use = lab.mem.pages["refcount"][: len(flags)] > 0
    fixed = in_use & ~movable & (flags & np.uint32(HUGE) == 0)
    starts = [at for at in range(4096, lab.mem.nr_pages - nr_pages, 512) if not fixed[at : at + nr_pages].any()]
    return max(starts, key=lambda at: int(movable[at : at + nr_pages].sum()))


def take(lab: Lab, start: int, nr_pages: int) -> None:
    complete(lab.machine.contig.alloc_contig_range(start, start + nr_pages))


def nr_lru(lab: Lab, start: int, nr_pages: int) -> int:
    return int(np.count_nonzero(lab.mem.pages["flags"][start : start + nr_pages] & np.uint32(LRU)))


def assert_taken(lab: Lab, start: int, nr_pages: int) -> None:
    """Plain pages with one reference each, on no list."""
    pages = lab.mem.pages[start : start + nr_pages]
    assert (pages["flags"] == 0).all()
    assert (pages["refcount"] == 1).all()


@pytest.mark.parametrize("enabled", [1, 0], ids=["dpu", "cpu"])
@pytest.mark.parametrize("words", ["stamp", "full"])
@pytest.mark.parametrize("nodes", [(64,), (40, 40)], ids=["one node", "two nodes"])
@pytest.mark.slow
def test_a_range_is_emptied_and_given_back(enabled: int, words: str, nodes: tuple[int, ...]) -> None:
    lab = busy_lab(words, nodes=nodes)
    lab.sysctl(dpu_compact_enabled=enabled)
    before = int(lab.mem.zones["free_pages"].sum())
    start = used_range(lab)
    nr_in_use = nr_lru(lab, start, 2048)
    assert nr_in_use > 500
    take(lab, start, 2048)
    assert_taken(lab, start, 2048)
    lab.assert_at_rest()
    assert int(lab.mem.zones["free_pages"].sum()) == before - 2048
    moved = {name: stats(lab)[name] for name in ("dpu_pages_moved", "cpu_pages_moved")}
    assert moved == ({"dpu_pages_moved": nr_in_use, "cpu_pages_moved": 0} if enabled else
                     {"dpu_pages_moved": 0, "cpu_pages_moved": nr_in_use})  # fmt: skip
    assert lab.vmstat()["pgmigrate_success"] == nr_in_use
    lab.machine.contig.free_contig_range(start, 2048)
    assert int(lab.mem.zones["free_pages"].sum()) == before
    assert set(lab.mem.blocks.tolist()) == {0, 1}
    lab.assert_at_rest()


@pytest.mark.slow
def test_pages_go_to_another_node_where_their_own_has_no_room() -> None:
    """Counters of both nodes and zones follow: debug_vm compares them with what is there."""
    lab = Lab((40, 40), "full")
    lab.spawn("a", anon="30M", file="5M", mlock="50")
    start = used_range(lab, 4096)
    on_one = int(lab.mem.nodes["nr_anon_pages"][1])
    assert start + 4096 <= 40 * 256
    take(lab, start, 4096)
    assert int(lab.mem.nodes["nr_anon_pages"][1]) > on_one
    assert lab.vmstat()["numa_miss"] > 0
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize(("start", "nr"), [(3, 5), (511, 2), (512, 512), (700, 100), (100, 1500)])
def test_exactly_the_range_is_taken(start: int, nr: int) -> None:
    lab = busy_lab()
    start += used_range(lab)
    before = int(lab.mem.zones["free_pages"].sum())
    take(lab, start, nr)
    assert_taken(lab, start, nr)
    assert int(lab.mem.zones["free_pages"].sum()) == before - nr
    lab.assert_at_rest()


def test_a_free_range_is_taken_without_moving_anything() -> None:
    lab = Lab((64,))
    take(lab, 0x2000, 3000)
    assert_taken(lab, 0x2000, 3000)
    assert stats(lab)["dpu_batches"] == stats(lab)["cpu_pages_moved"] == 0
    lab.assert_at_rest()


def test_few_pages_go_by_cpu() -> None:
    lab = Lab((64,))
    lab.sysctl(dpu_compact_min_fragments=100)
    lab.spawn("a", anon="20M")
    start = used_range(lab, 1024)
    assert nr_lru(lab, start, 1024) == 1024
    take(lab, start, 99)
    assert (stats(lab)["dpu_batches"], stats(lab)["cpu_pages_moved"]) == (0, 99)
    take(lab, start + 99, 100)
    assert (stats(lab)["dpu_batches"], stats(lab)["dpu_pages_moved"]) == (1, 100)
    lab.assert_at_rest()


@pytest.mark.slow
def test_a_pinned_page_makes_it_busy_and_is_counted() -> None:
    lab = busy_lab("full")
    start = used_range(lab)
    lab.set("a", pin="2 seed=5")
    pinned = [int(pfn) for pfn in lab.machine.processes["a"].mm.pinned if start <= pfn < start + 2048]
    assert pinned
    types, free = lab.mem.blocks.tolist(), int(lab.mem.zones["free_pages"].sum())
    with pytest.raises(RangeBusy) as refusal:
        take(lab, start, 2048)
    assert (refusal.value.errno, refusal.value.pfn) == (errno.EBUSY, min(pinned))
    assert stats(lab)["busy_pinned"] == len(pinned)
    assert (stats(lab)["ranges"], stats(lab)["ranges_busy"]) == (1, 1)
    assert nr_lru(lab, start, 2048) == len(pinned)  # the others stay where they went
    assert lab.mem.blocks.tolist() == types
    assert int(lab.mem.zones["free_pages"].sum()) == free
    assert lab.machine.printk.lines()[-1] == f"alloc_contig_range: [{start:x}, {start + 2048:x}) PFNs busy"
    lab.assert_at_rest()
    lab.set("a", pin="0")
    take(lab, start, 2048)
    lab.assert_at_rest()


@pytest.mark.slow
def test_a_pin_that_goes_away_in_time_does_no_harm() -> None:
    """Five tries, with a turn for others in between."""
    lab = busy_lab()
    start = used_range(lab)
    lab.set("a", pin="2 seed=5")
    emptying = lab.machine.contig.alloc_contig_range(start, start + 2048)
    while stats(lab)["dpu_pages_moved"] == 0:
        assert not advance(emptying)[0]
    lab.set("a", pin="0")
    assert settle([emptying]) == [None]
    assert_taken(lab, start, 2048)
    lab.assert_at_rest()


@pytest.mark.slow
def test_an_unmovable_page_refuses_at_once() -> None:
    lab = busy_lab()
    pfn = int(buddy.get_page_from_freelist(lab.mem.pages, lab.mem.zones, lab.mem.blocks, lab.mem.zonelist[0], 0, 0))
    with pytest.raises(RangeBusy) as refusal:
        take(lab, pfn & -512, 512)
    assert refusal.value.pfn <= pfn
    assert stats(lab)["dpu_batches"] == stats(lab)["cpu_pages_moved"] == 0
    lab.assert_at_rest()


@pytest.mark.slow
def test_no_room_is_enomem_and_changes_nothing() -> None:
    lab = Lab((32,))
    lab.spawn("a", anon="27M")
    start = used_range(lab, 1024)
    types = lab.mem.blocks[start >> 9 :][:2].tolist()
    with pytest.raises(OSError, match="no room") as refusal:
        take(lab, start, 1024)
    assert refusal.value.errno == errno.ENOMEM
    assert stats(lab)["ranges_nomem"] == 1
    assert lab.mem.blocks[start >> 9 :][:2].tolist() == types
    lab.assert_at_rest()


@pytest.mark.parametrize("kind", FaultKind)
@pytest.mark.parametrize("late", [None, 3], ids=["threads", "late"])
@pytest.mark.slow
def test_the_cpu_moves_what_a_failing_device_left(kind: FaultKind, late: int | None) -> None:
    lab = Lab((64,), "full", patience=late)
    lab.spawn("a", anon="24M", holes="30 seed=1", fork="child")
    start = used_range(lab)
    nr_in_use = nr_lru(lab, start, 2048)
    lab.arm(kind, 100)
    take(lab, start, 2048)
    assert_taken(lab, start, 2048)
    figures = stats(lab)
    nr_moved = nr_in_use if kind is FaultKind.LOST_COMPLETION else 100  # then the device had done it all
    assert (figures["dpu_failures"], figures["dpu_pages_moved"]) == (1, nr_moved)
    assert figures["cpu_pages_moved"] == nr_in_use - nr_moved
    assert any(f"{nr_moved} of {nr_in_use} fragments moved" in line for line in lab.machine.printk.lines())
    lab.assert_at_rest()


@pytest.mark.slow
def test_a_lost_device_and_no_device() -> None:
    for nr_ranks in (0, None):
        lab = busy_lab(nr_ranks=nr_ranks)
        start = used_range(lab)
        take(lab, start, 2048)
        assert stats(lab)["dpu_batches"] == 0
        assert stats(lab)["cpu_pages_moved"] > 500
        lab.assert_at_rest()


@pytest.mark.slow
def test_unused_huge_pages_are_replaced() -> None:
    lab = busy_lab()
    lab.sysctl(nr_hugepages=3)
    huge = lab.machine.hugetlb.default.pfns[1]
    take(lab, huge + 100, 50)
    assert_taken(lab, huge + 100, 50)
    assert lab.read("/proc/sys/vm/nr_hugepages") == "3\n"
    assert huge not in lab.machine.hugetlb.default.pfns
    assert lab.vmstat()["nr_hugetlb"] == 3 * 512
    assert stats(lab)["hugepages_replaced"] == 1
    lab.assert_at_rest()


def test_a_huge_page_that_cannot_be_replaced_is_enomem() -> None:
    lab = Lab((32,))
    lab.sysctl(nr_hugepages=100)
    pool = list(lab.machine.hugetlb.default.pfns)
    with pytest.raises(OSError, match="huge page") as refusal:
        take(lab, pool[0], 512)
    assert refusal.value.errno == errno.ENOMEM
    assert lab.machine.hugetlb.default.pfns == pool
    lab.assert_at_rest()


@pytest.mark.parametrize("patience", [0, 2, 30])
@pytest.mark.parametrize("nr_slices", [1, 3, 8, 20, 60])
@pytest.mark.slow
def test_an_interrupted_one_leaves_nothing_behind(patience: int, nr_slices: int) -> None:
    patch = small_slices(100)
    try:
        lab = Lab((64,), patience=patience)
        lab.spawn("a", anon="24M", holes="30 seed=1", fork="child")
        types, free = lab.mem.blocks.tolist(), int(lab.mem.zones["free_pages"].sum())
        start = used_range(lab)
        emptying = lab.machine.contig.alloc_contig_range(start, start + 2048)
        for _ in range(nr_slices):
            over, _ = advance(emptying)
            assert lab.machine.check() == []
            if over:
                break
        emptying.close()
        if not over:
            assert int(lab.mem.zones["free_pages"].sum()) == free
            assert lab.mem.blocks.tolist() == types
        lab.assert_at_rest()
    finally:
        patch.undo()


@pytest.mark.slow
def test_beside_compaction_fork_and_faults() -> None:
    """Whatever runs in between, the range is had in the end, and nothing is lost."""
    patch = small_slices(64)
    try:
        for patience in (0, 3, 25):
            lab = Lab((64,), patience=patience)
            lab.spawn("a", anon="24M", holes="30 seed=1", file="1M")
            start = used_range(lab)
            outcomes = settle(
                [
                    lab.start_compact(),
                    lab.machine.contig.alloc_contig_range(start, start + 2048),
                    lab.start_set("a", "fork", "child"),
                    lab.machine.contig.alloc_contig_range(start + 2048, start + 2560),
                    lab.start_compact(),
                ]
            )
            assert outcomes[1] is outcomes[3] is None
            settle([lab.start_set("a", "touch", "100"), lab.start_set("child", "anon", "1M")])
            assert_taken(lab, start, 2560)
            lab.assert_at_rest()
    finally:
        patch.undo()


@pytest.mark.slow
def test_any_aligned_range_that_can_be_emptied_serves() -> None:
    lab = busy_lab()
    contig = lab.machine.contig
    pfn = complete(contig.alloc_contig_pages(4096, 0))
    assert pfn % 4096 == 0
    assert_taken(lab, pfn, 4096)
    lab.assert_at_rest()
    with pytest.raises(OSError, match="no range") as refusal:
        complete(contig.alloc_contig_pages(8192, 0))
    assert refusal.value.errno == errno.ENOMEM
    lab.assert_at_rest()


def test_the_other_node_serves_unless_told_not_to() -> None:
    lab = Lab((64, 64))
    contig = lab.machine.contig
    with pytest.raises(OSError, match="no range"):
        complete(contig.alloc_contig_pages(1 << 15, 0, this_node=True))
    first = complete(contig.alloc_contig_pages(8192, 1, this_node=True))
    second = complete(contig.alloc_contig_pages(4096, 1))
    assert [lab.mem.zones["node"][lab.mem.pages["zone"][pfn]] for pfn in (first, second)] == [1, 1]
    assert complete(contig.alloc_contig_pages(4096, 1)) < 16384
    assert f"{NODES_SYSFS}/node1/numastat" in lab.registry.nodes
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [0, 1])
def test_a_huge_page_goes_whole_and_stays_one(enabled: int) -> None:
    """Its PMD is counted besides its mappings (found by the soak)."""
    lab = Lab((64,))
    lab.sysctl(dpu_compact_enabled=enabled, dpu_compact_min_fragments=1)
    lab.spawn("a", thp="1", anon="8M")
    huge = lab.vmstat()["nr_anon_transparent_hugepages"]
    pages = lab.mem.pages[: lab.mem.nr_pages]
    head = int(np.flatnonzero((pages["order"] == 9) & (pages["mapcount"] > 0))[0])
    complete(lab.machine.contig.alloc_contig_range(head, head + 512))
    assert lab.vmstat()["nr_anon_transparent_hugepages"] == huge > 0
    assert lab.verify("a") == "ok"
    lab.machine.contig.free_contig_range(head, 512)
    lab.assert_at_rest()


# Large folios.


def thp_lab(words: str = "stamp", size: int = 64) -> Lab:
    lab = Lab((size,), words)
    lab.spawn("a", thp="1", anon="20M")
    lab.set("a", fork="child", touch="5 seed=2", mlock="30")
    return lab


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [1, 0], ids=["dpu", "cpu"])
@pytest.mark.parametrize("words", ["stamp", "full"])
def test_large_folios_move_whole(enabled: int, words: str) -> None:
    lab = thp_lab(words)
    lab.sysctl(dpu_compact_enabled=enabled)
    nr_thps = lab.vmstat()["nr_anon_transparent_hugepages"]
    assert nr_thps >= 5
    start = used_range(lab)
    in_use = nr_folio_pages(lab, start, 2048)
    assert in_use > 1500
    take(lab, start + 100, 1700)  # the folios at both ends reach beyond the range
    assert_taken(lab, start + 100, 1700)
    assert lab.vmstat()["nr_anon_transparent_hugepages"] == nr_thps
    assert lab.vmstat()["thp_migration_success"] >= 3
    assert lab.vmstat()["thp_migration_split"] == 0
    moved = stats(lab)["dpu_pages_moved" if enabled else "cpu_pages_moved"]
    assert moved == lab.vmstat()["pgmigrate_success"] > 1500
    lab.assert_at_rest()


def nr_folio_pages(lab: Lab, start: int, nr_pages: int) -> int:
    """Pages of a range that are on an LRU list themselves or by their heads."""
    pages = lab.mem.pages[start : start + nr_pages]
    lru = pages["flags"] & np.uint32(LRU) != 0
    return int((1 << pages["order"][lru].astype(np.int64)).sum())


def test_a_large_folio_is_split_where_no_room_of_its_size_is_left() -> None:
    lab = thp_lab()
    lab.spawn("b", anon="26M", holes="40 seed=3")
    while int(lab.mem.zones["nr_free"][:, 9:].sum()):
        lab.sysctl(nr_hugepages=int(lab.read("/proc/sys/vm/nr_hugepages")) + 1)
    heads = np.flatnonzero(lab.mem.pages["flags"][: lab.mem.nr_pages] & np.uint32(1 << 22 | LRU) == (1 << 22 | LRU))
    start = int(heads[len(heads) // 2])
    take(lab, start, 512)
    assert_taken(lab, start, 512)
    assert lab.vmstat()["thp_migration_split"] == 1
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FaultKind)
def test_a_device_that_fails_between_large_folios(kind: FaultKind) -> None:
    lab = thp_lab("full")
    lab.sysctl(dpu_compact_min_fragments=1)
    start = used_range(lab)
    lab.arm(kind, 1)
    take(lab, start, 2048)
    assert_taken(lab, start, 2048)
    assert stats(lab)["dpu_failures"] == 1
    assert lab.vmstat()["nr_anon_transparent_hugepages"] >= 5
    lab.assert_at_rest()


def test_a_large_folio_that_is_mapped_in_part_is_split_first() -> None:
    """Though there is room for it as a whole; a pin kept it from being split when it lost its pages."""
    lab = Lab((64,))
    mm = lab.spawn("a", thp="1", anon="20M").mm
    vma = mm.vma[0]
    head = int(lab.vm.pt[walk_leaf(lab.vm.pt, mm.root, vma.start)]) >> 12
    assert lab.mem.pages["order"][head] == 9
    complete(mm.pin(vma, vma.vpns()[300:301]))
    complete(mm.madvise_dontneed(vma, vma.vpns()[:150]))
    assert lab.vmstat()["thp_split_page"] == 0
    complete(mm.unpin())
    nr_moved = lab.vmstat()["pgmigrate_success"]
    take(lab, head, 512)
    assert_taken(lab, head, 512)
    stat = lab.vmstat()
    assert (stat["thp_migration_split"], stat["thp_split_page"], stat["pgmigrate_success"] - nr_moved) == (1, 1, 362)
    lab.assert_at_rest()
