# SPDX-License-Identifier: GPL-2.0-only
"""Transparent huge pages: where they come from, how they are shared, split, and moved whole."""

import numpy as np
import pytest
from machines import Lab, settle, small_slices

from dpud.dpu.faults import FaultKind
from kernelsim.mmap import Vma
from kernelsim.operation import complete
from kernelsim.page import compound_head
from kernelsim.page_alloc import release_held
from kernelsim.pgtable import walk_leaf

HUGE = 512
PRESENT, RW, PSE = 1, 2, 1 << 7
HEAD, TAIL, THP, ANON, LRU, BUDDY = 1 << 15, 1 << 16, 1 << 22, 1 << 12, 1 << 5, 1 << 10
ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"


def thp_lab(words: str = "stamp", anon: str = "8M", **more: int) -> Lab:
    lab = Lab((32,), words)
    lab.sysctl(dpu_compact_min_fragments=1)
    lab.spawn("a", thp="1", anon=anon)
    return lab


def the_vma(lab: Lab, name: str = "a") -> Vma:
    (vma,) = lab.machine.processes[name].anon_vmas
    return vma


def entry(lab: Lab, vma: Vma, index: int) -> int:
    """The leaf that maps page `index` of a mapping."""
    at = walk_leaf(lab.vm.pt, vma.mm.root, vma.start + index)
    return int(lab.vm.pt[at]) if at >= 0 else 0


def write(vma: Vma, *indexes: int) -> None:
    complete(vma.mm.write(vma, vma.start + np.array(indexes, dtype=np.int64)))


def unmap(vma: Vma, first: int, last: int) -> None:
    complete(vma.mm.madvise_dontneed(vma, vma.vpns()[first:last]))


def huge_pages(lab: Lab) -> list[int]:
    """Heads of the 2 MiB folios."""
    pages = lab.mem.pages[: lab.mem.nr_pages]
    return np.flatnonzero((pages["flags"] & np.uint32(THP | HEAD)) == THP | HEAD).tolist()


def meminfo(lab: Lab, name: str) -> int:
    (line,) = [line for line in lab.read("/proc/meminfo").splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


# Faults.


@pytest.mark.parametrize("words", ["stamp", "full"])
def test_one_write_maps_two_mebibytes_of_zeros(words: str) -> None:
    lab = Lab((32,), words)
    process = lab.spawn("a", thp="1")
    vma = process.mm.mmap(2 * HUGE)
    vma.madvise_hugepage()
    write(vma, HUGE + 3)
    head = entry(lab, vma, HUGE) >> 12
    assert entry(lab, vma, HUGE) & (PRESENT | RW | PSE) == PRESENT | RW | PSE
    assert entry(lab, vma, 0) == 0
    assert head % HUGE == 0
    page = lab.mem.pages[head]
    assert (page["refcount"], page["mapcount"], page["order"], page["index"]) == (1, 1, 9, HUGE)
    assert page["flags"] & (HEAD | THP | ANON | LRU) == HEAD | THP | ANON | LRU
    tails = lab.mem.pages[head + 1 : head + HUGE]
    assert (tails["flags"] == TAIL | THP).all()
    assert (tails["index"] == head).all()
    assert not lab.vm.memory[head].any()
    assert lab.vm.memory[head + 3].any()
    assert process.mm.rss_pages == HUGE
    stat = lab.vmstat()
    assert (stat["thp_fault_alloc"], stat["pgfault"], stat["nr_anon_transparent_hugepages"]) == (1, 1, 1)
    assert (stat["nr_anon_pages"], stat["nr_inactive_anon"] + stat["nr_active_anon"]) == (HUGE, HUGE)
    assert meminfo(lab, "AnonHugePages") == 2048
    assert "Node 0 AnonHugePages:      2048 kB" in lab.read("/sys/devices/system/node/node0/meminfo")
    assert complete(vma.mm.count_wrong(vma)) == 0
    lab.assert_at_rest()


def test_small_pages_where_no_huge_one_is_to_be_had() -> None:
    """Each 2 MiB that has to do with small pages counts as one fallback."""
    lab = Lab((32,))
    lab.spawn("filler", anon="20M", holes="50 seed=1")
    lab.sysctl(nr_hugepages=100)  # all there are
    lab.spawn("a", thp="1", anon="4M")
    assert huge_pages(lab) == []
    assert lab.vmstat()["thp_fault_fallback"] == 2
    assert lab.vmstat()["thp_fault_alloc"] == 0
    lab.assert_at_rest()


def test_the_ends_of_a_mapping_are_small_pages() -> None:
    lab = Lab((32,))
    process = lab.spawn("a", thp="1")
    vma = process.mm.mmap(2 * HUGE, start=(1 << 20) + 100)
    vma.madvise_hugepage()
    complete(process.mm.write(vma))
    assert len(huge_pages(lab)) == 1
    assert lab.vmstat()["thp_fault_fallback"] == 0
    assert process.mm.rss_pages == 2 * HUGE
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("enabled", "thp", "expected"),
    [("never", "1", 0), ("madvise", "1", 2), ("madvise", "0", 0), ("always", "0", 2), ("always", "1", 2)],
)
def test_who_gets_huge_pages(enabled: str, thp: str, expected: int) -> None:
    lab = Lab((32,))
    lab.write(ENABLED, enabled)
    lab.spawn("a", thp=thp, anon="4M")
    assert len(huge_pages(lab)) == expected


def test_everything_is_given_back() -> None:
    lab = Lab((32,))
    before = lab.mem.zones["free_pages"].tolist()
    lab.spawn("a", thp="1", anon="9M", fork="b")
    lab.set("b", touch="3 seed=1", holes="20 seed=2")
    lab.assert_at_rest()
    settle([lab.end("a"), lab.end("b")])
    lab.assert_at_rest()
    assert lab.mem.zones["free_pages"].tolist() == before
    stat = lab.vmstat()
    assert (stat["nr_anon_transparent_hugepages"], stat["nr_anon_pages"], stat["nr_page_table_pages"]) == (0, 0, 0)


# Sharing.


def test_fork_shares_the_pmd_and_a_write_copies_one_page() -> None:
    lab = thp_lab(anon="2M")
    lab.set("a", fork="b")
    a, b = the_vma(lab), the_vma(lab, "b")
    head = entry(lab, a, 0) >> 12
    assert entry(lab, a, 0) & (PSE | RW) == entry(lab, b, 0) & (PSE | RW) == PSE
    assert lab.mem.pages["mapcount"][head] == 2
    write(b, 7)
    assert entry(lab, a, 0) & PSE
    assert not entry(lab, b, 0) & PSE
    assert entry(lab, b, 7) >> 12 != head + 7
    assert entry(lab, b, 8) >> 12 == head + 8
    assert lab.mem.pages["mapcount"][head] == 1 + 511
    assert lab.vmstat()["thp_split_pmd"] == 1
    assert lab.vmstat()["thp_split_page"] == 0
    assert lab.vmstat()["nr_anon_transparent_hugepages"] == 1
    lab.assert_at_rest()


def test_the_last_owner_reuses_the_huge_page() -> None:
    lab = thp_lab(anon="2M")
    lab.set("a", fork="b")
    head = huge_pages(lab)[0]
    settle([lab.end("b")])
    write(the_vma(lab), 5)
    assert entry(lab, the_vma(lab), 0) & (PSE | RW) == PSE | RW
    assert huge_pages(lab) == [head]
    assert lab.vmstat()["thp_split_pmd"] == 0
    lab.assert_at_rest()


def test_when_both_have_copied_it_the_rest_is_split_and_freed() -> None:
    """Nobody maps page 7 of the huge page any more."""
    lab = thp_lab("full", anon="2M")
    lab.set("a", fork="b")
    settle([lab.end("b")])
    lab.set("a", fork="c")
    free = lab.vmstat()["nr_free_pages"]
    write(the_vma(lab, "c"), 7)
    write(the_vma(lab), 7)
    unmap(the_vma(lab, "c"), 0, HUGE)
    assert huge_pages(lab) == []
    assert lab.vmstat()["thp_split_page"] == lab.vmstat()["thp_deferred_split_page"] == 1
    assert lab.vmstat()["nr_free_pages"] == free  # the copy that is left, against page 7 of the huge page
    lab.assert_at_rest()


def test_a_pinned_huge_page_stays_with_the_parent_and_the_child_gets_copies() -> None:
    lab = thp_lab(anon="2M")
    vma = the_vma(lab)
    complete(vma.mm.pin(vma, vma.vpns()[3:4]))
    head = huge_pages(lab)[0]
    assert lab.mem.pages["refcount"][head] == 1 + 1024
    lab.set("a", fork="b")
    assert entry(lab, vma, 3) >> 12 == head + 3
    assert entry(lab, vma, 3) & RW
    assert entry(lab, the_vma(lab, "b"), 3) >> 12 != head + 3
    write(vma, 3)
    assert entry(lab, vma, 3) >> 12 == head + 3
    lab.assert_at_rest()
    complete(vma.mm.unpin())
    lab.assert_at_rest()


def test_a_shared_huge_page_is_unshared_before_it_is_pinned() -> None:
    """Only the page that is pinned."""
    lab = thp_lab(anon="2M")
    lab.set("a", fork="b")
    b = the_vma(lab, "b")
    complete(b.mm.pin(b, b.vpns()[9:10]))
    head = huge_pages(lab)[0]
    pinned = int(b.mm.pinned[0])
    assert compound_head(lab.mem.pages, pinned) == pinned
    assert pinned == entry(lab, b, 9) >> 12
    assert entry(lab, b, 8) >> 12 == head + 8
    write(b, 9)
    assert entry(lab, b, 9) >> 12 == pinned
    lab.assert_at_rest()


# Splitting.


@pytest.mark.slow
@pytest.mark.parametrize("words", ["stamp", "full"])
def test_holes_split_pmd_and_page(words: str) -> None:
    lab = thp_lab(words, anon="4M")
    free = lab.vmstat()["nr_free_pages"]
    unmap(the_vma(lab), 100, 400)
    assert len(huge_pages(lab)) == 1
    stat = lab.vmstat()
    assert stat["nr_free_pages"] == free + 300
    assert (stat["thp_split_pmd"], stat["thp_split_page"], stat["thp_split_page_failed"]) == (1, 1, 0)
    assert stat["nr_anon_transparent_hugepages"] == 1
    page = lab.mem.pages[entry(lab, the_vma(lab), 99) >> 12]
    assert (page["refcount"], page["mapcount"], page["index"], page["order"]) == (1, 1, 99, 0)
    lab.assert_at_rest()


def test_unmapped_whole_it_is_not_split() -> None:
    lab = thp_lab(anon="6M")
    unmap(the_vma(lab), HUGE, 2 * HUGE)
    assert len(huge_pages(lab)) == 2
    assert lab.vmstat()["thp_split_pmd"] == 0
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("slice_pages", [16, 100])
def test_whatever_the_slices(slice_pages: int) -> None:
    patch = small_slices(slice_pages)
    try:
        lab = thp_lab(anon="9M")
        settle([lab.start_set("a", "anon", "1M")])
        assert lab.vmstat()["thp_split_pmd"] == 0
        lab.assert_at_rest()
    finally:
        patch.undo()


def partially_mapped(lab: Lab) -> tuple[Vma, int]:
    """A huge page that lost 200 pages while it was pinned and so could not be split: (its VMA, its head)."""
    vma = lab.machine.processes["huge"].mm.vma[2]
    head = entry(lab, vma, 0) >> 12
    complete(vma.mm.pin(vma, vma.vpns()[300:301]))
    free = lab.vmstat()["nr_free_pages"]
    unmap(vma, 0, 150)
    unmap(vma, 400, 450)
    stat = lab.vmstat()
    assert (stat["thp_split_pmd"], stat["thp_deferred_split_page"], stat["thp_split_page_failed"]) == (1, 1, 1)
    assert (stat["thp_split_page"], stat["nr_free_pages"]) == (0, free)
    assert head in huge_pages(lab)
    lab.assert_at_rest()
    return vma, head


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [1, 0], ids=["dpu", "cpu"])
def test_compaction_splits_what_is_mapped_in_part_and_cannot_move(enabled: int) -> None:
    """Not while it is pinned, and no other huge page."""
    lab = scattered()
    vma, head = partially_mapped(lab)
    lab.sysctl(dpu_compact_region_order=9, dpu_compact_enabled=enabled)
    lab.compact()
    assert (len(huge_pages(lab)), lab.stats()["thp_split"]) == (6, 0)
    complete(vma.mm.unpin())
    lab.compact()
    assert (len(huge_pages(lab)), lab.stats()["thp_split"]) == (5, 1)
    assert lab.vmstat()["thp_split_page"] == lab.vmstat()["thp_migration_split"] == 1
    packed = [entry(lab, vma, i) >> 12 for i in range(HUGE) if entry(lab, vma, i)]
    assert packed == list(range(head, head + HUGE - 200))
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [1, 0], ids=["dpu", "cpu"])
def test_what_is_mapped_in_part_but_can_move_moves_whole(enabled: int) -> None:
    lab = scattered()
    vma, head = partially_mapped(lab)
    complete(vma.mm.unpin())
    lab.sysctl(dpu_compact_region_order=18, dpu_compact_enabled=enabled)
    lab.compact()
    assert lab.stats()["thp_split"] == 0
    assert entry(lab, vma, 300) >> 12 < head + 300
    lab.assert_at_rest()
    unmap(vma, 300, 301)  # with nothing in the way, the next page that goes has it split
    assert len(huge_pages(lab)) == 5
    lab.assert_at_rest()


@pytest.mark.slow
def test_locking_a_part_takes_the_mapping_apart_not_the_page() -> None:
    lab = thp_lab(anon="4M")
    lab.set("a", mlock="30")  # 307 pages: 2 MiB - 205
    assert lab.vmstat()["thp_split_pmd"] == 1
    assert lab.vmstat()["thp_split_page"] == 0
    assert lab.vmstat()["nr_mlock"] == HUGE
    assert len(huge_pages(lab)) == 2
    lab.assert_at_rest()
    lab.set("a", mlock="100")
    assert lab.vmstat()["nr_mlock"] == lab.vmstat()["nr_unevictable"] == 2 * HUGE
    lab.assert_at_rest()
    lab.set("a", holes="50 seed=1")
    lab.assert_at_rest()
    assert lab.vmstat()["nr_mlock"] == lab.machine.processes["a"].mm.rss_pages
    lab.set("a", mlock="0")
    assert lab.vmstat()["nr_mlock"] == 0
    lab.assert_at_rest()


# Moving.


def scattered(words: str = "stamp", patience: int | None = None) -> Lab:
    """Huge pages of one process between the pages of another, which then gives most of its memory back."""
    lab = Lab((64,), words, patience=patience)
    lab.sysctl(dpu_compact_min_fragments=1)
    small, huge = lab.spawn("small"), lab.spawn("huge", thp="1")
    for _ in range(6):
        vma = small.mm.mmap(3 * HUGE)
        complete(small.mm.write(vma))
        large = huge.mm.mmap(HUGE)
        large.madvise_hugepage()
        complete(huge.mm.write(large))
    lab.set("small", holes="70 seed=1")
    lab.assert_at_rest()
    assert len(huge_pages(lab)) == 6
    return lab


@pytest.mark.slow
@pytest.mark.parametrize("words", ["stamp", "full"])
@pytest.mark.parametrize("enabled", [1, 0], ids=["dpu", "cpu"])
def test_huge_pages_move_whole(words: str, enabled: int) -> None:
    lab = scattered(words)
    before = huge_pages(lab)
    lab.sysctl(dpu_compact_region_order=18, dpu_compact_enabled=enabled)
    lab.compact()
    after = huge_pages(lab)
    assert len(after) == 6
    stats, stat = lab.stats(), lab.vmstat()
    assert sum(after) < sum(before) - 6 * HUGE
    assert stats["thp_moved"] == stat["thp_migration_success"] >= 4
    assert (stats["thp_split"], stat["thp_split_page"], stat["thp_split_pmd"]) == (0, 0, 0)
    assert stat["nr_anon_transparent_hugepages"] == 6
    assert stats["pages_moved"] + stats["cpu_pages_moved"] == stat["pgmigrate_success"] == stat["compact_isolated"]
    assert all(head % HUGE == 0 for head in after)
    lab.assert_at_rest()


@pytest.mark.slow
def test_both_paths_lay_out_alike() -> None:
    layouts = []
    for enabled in (1, 0):
        lab = scattered()
        lab.sysctl(dpu_compact_region_order=18, dpu_compact_enabled=enabled)
        lab.compact()
        pages = lab.mem.pages[: lab.mem.nr_pages]
        layouts.append((pages["flags"] & np.uint32(HEAD | TAIL | LRU | BUDDY)).tolist())
        layouts[-1].append(lab.vm.memory[:, 0].tolist())
    assert layouts[0] == layouts[1]


@pytest.mark.slow
def test_two_mebibyte_regions_leave_huge_pages_alone() -> None:
    lab = scattered()
    before = huge_pages(lab)
    lab.sysctl(dpu_compact_region_order=9)
    lab.compact()
    assert huge_pages(lab) == before
    assert lab.stats()["pages_moved"] > 500
    assert lab.stats()["thp_moved"] == lab.stats()["thp_split"] == 0
    lab.assert_at_rest()


@pytest.mark.slow
def test_a_pinned_huge_page_is_skipped_and_counted() -> None:
    lab = scattered()
    huge = lab.machine.processes["huge"]
    vma = huge.mm.vma[3]
    complete(huge.mm.pin(vma, vma.vpns()[5:6]))
    head = compound_head(lab.mem.pages, int(huge.mm.pinned[0]))
    lab.sysctl(dpu_compact_region_order=18)
    lab.compact()
    assert head in huge_pages(lab)
    assert lab.stats()["skipped_pinned"] == HUGE
    assert lab.stats()["thp_moved"] >= 3
    lab.assert_at_rest()


@pytest.mark.parametrize("kind", list(FaultKind), ids=str)
@pytest.mark.parametrize("words", ["stamp", "full"])
@pytest.mark.slow
def test_a_fault_in_mid_batch_loses_nothing(kind: FaultKind, words: str) -> None:
    lab = scattered(words)
    lab.sysctl(dpu_compact_region_order=18)
    sizes = [1 << int(order) for order in lab.mem.pages["order"][: lab.mem.nr_pages] if order == 9]
    assert sizes
    for move in (0, 3, 460):
        lab.arm(kind, move, bit=4096 * 8 * 100 + 77)
        lab.compact()
        lab.assert_at_rest()
        lab.revive()
        lab.set("small", touch="100", holes="60 seed=9")
    assert len(huge_pages(lab)) == 6
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [1, 0], ids=["dpu", "cpu"])
def test_fork_trees_share_what_moves(enabled: int) -> None:
    """Three generations and sixteen children; some wrote, some unmapped a part."""
    lab = Lab((64,))
    lab.sysctl(dpu_compact_min_fragments=1, dpu_compact_region_order=18, dpu_compact_enabled=enabled)
    lab.spawn("filler", anon="8M")
    lab.spawn("a", thp="1", anon="8M", fork="b")
    lab.set("a", anon="8M")
    for number in range(14):
        lab.set("b", fork=f"child{number}")
    for number in range(3):
        lab.set(f"child{number}", fork=f"grandchild{number}")
    lab.set("child0", touch="2 seed=1")
    lab.set("grandchild1", touch="1 seed=2", holes="10 seed=3")
    lab.set("child5", holes="30 seed=4")
    lab.assert_at_rest()
    lab.set("filler", holes="90 seed=5")
    ptes = lab.stats()["ptes_updated"] + lab.stats()["cpu_ptes_updated"]
    lab.compact()
    stats = lab.stats()
    assert stats["thp_moved"] >= 4
    assert stats["ptes_updated"] + stats["cpu_ptes_updated"] - ptes >= 15 * 4
    lab.assert_at_rest()


@pytest.mark.slow
def test_a_huge_page_unmapped_in_part_while_in_flight_is_split_later() -> None:
    """The batch holds it, so it arrives whole and mapped in part; the Linux-like compaction splits what it moves of it,
    the DPU's what it cannot move."""
    patch = small_slices(64)
    try:
        lab = scattered(patience=100)
        lab.sysctl(dpu_compact_region_order=18)
        compaction = lab.start_compact()
        while not any(region.completion and region.nr_fragments > 100 for region in lab.vm.in_flight):
            next(compaction)
        settle([lab.start_set("huge", "holes", "50 runs")])
        assert lab.machine.check() == []
        assert lab.vmstat()["thp_split_pmd"] == 6
        settle([compaction])
        lab.assert_at_rest()
        assert lab.stats()["thp_moved"] >= 4
        left = huge_pages(lab)
        assert left
        lab.sysctl(dpu_compact_region_order=9)
        lab.set("small", holes="50 seed=7")
        lab.compact()
        lab.assert_at_rest()
        assert lab.stats()["thp_split"] == len(left) - len(huge_pages(lab))
    finally:
        patch.undo()


def test_the_search_for_a_place_goes_on_where_the_last_one_ended() -> None:
    """Else isolating a large region would take time by the square of its fragments."""
    lab = Lab((32,))
    lab.spawn("a", anon="16M", holes="50 seed=1")
    zone = lab.mem.zones[1]
    dpu = lab.machine.dpu
    region = dpu.dpu_compact_region_create(1, int(zone["start_pfn"]), int(zone["end_pfn"]))
    assert region is not None
    complete(dpu.dpu_compact_isolate_pages(region))
    fragments = region.fragments[: region.nr_fragments]
    last_place = int(fragments["new_pfn"][-1])
    assert region.cursors[0].tolist() == [last_place, int((fragments["old_pfn"] < last_place).sum())]
    assert region.cursors[0, 1] > 100
    dpu._put_back(region)
    release_held(lab.mem.pages, lab.mem.zones, lab.mem.blocks, region.first, region.last)
    lab.vm.in_flight.remove(region)
    lab.assert_at_rest()
