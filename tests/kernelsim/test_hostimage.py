# SPDX-License-Identifier: GPL-2.0-only
"""What is inferred from a machine's own figures, on made-up machines whose truth is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from captures import (
    ANON_PAGE,
    BUDDY,
    HIGHATOMIC,
    ISOLATE,
    LRU,
    MOVABLE,
    PAGES,
    RESERVED,
    SLAB,
    UNMOVABLE,
    UPTODATE,
    Machine,
    machine,
)

from dpud.proctext import parse_zones
from kernelsim.hostblocks import HostPageset
from kernelsim.hostimage import (
    HostImage,
    HostTask,
    _shuffle_blocks,
    build_host_image,
    count_free_blocks,
    format_buddyinfo,
)

HEAD, TAIL = 1 << 15, 1 << 16
REFERENCED, DIRTY, KSM, IDLE, PRIVATE = 1 << 2, 1 << 4, 1 << 21, 1 << 25, 1 << 35


def import_machine(built: Machine, mappings: tuple[HostTask, ...] = ()) -> HostImage:
    zones = parse_zones(built.zoneinfo(), built.buddyinfo(), built.pagetypeinfo())
    return build_host_image(zones, built.flags, built.counts, mappings=mappings)


def free_blocks(image: HostImage) -> list[tuple[int, int]]:
    return list(zip(image.free_pfn.tolist(), image.free_order.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("nr_nodes", [1, 2])
def test_free_blocks_and_types_are_recovered(seed: int, nr_nodes: int) -> None:
    built = machine(seed, nr_nodes=nr_nodes)
    image = import_machine(built)
    assert free_blocks(image) == built.free_blocks()
    assert image.block_migratetype.tolist() == built.types
    assert format_buddyinfo(image.zones, count_free_blocks(image)) == built.buddyinfo()
    assert image.notes == ()


def test_a_run_of_free_pages_is_cut_at_zone_borders() -> None:
    built = machine(nr_blocks=4)
    built.flags[2048 : 2048 + PAGES] = BUDDY  # joins the free end of DMA
    image = import_machine(built)
    assert free_blocks(image) == built.free_blocks()
    assert not ((image.free_pfn < 2048) & (image.free_pfn + (1 << image.free_order.astype(int)) > 2048)).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HIGHATOMIC, ISOLATE])
def test_a_pageblock_that_refuses_to_merge_is_found_in_the_counts(kind: int) -> None:
    built = machine(nr_blocks=8)
    built.flags[4 * PAGES : 12 * PAGES] = BUDDY
    built.types[4:12] = [MOVABLE] * 8
    built.types[4], built.apart = kind, {4}
    image = import_machine(built)
    assert format_buddyinfo(image.zones, count_free_blocks(image)) == built.buddyinfo()
    assert "      2      3 \n" in built.buddyinfo()
    assert image.block_migratetype.tolist() == built.types
    assert any("did not merge" in note for note in image.notes)


def test_the_partner_of_a_block_that_did_not_merge_is_of_another_type() -> None:
    """Else both would have merged after all."""
    built = machine(nr_blocks=8)
    built.flags[4 * PAGES : 12 * PAGES] = BUDDY
    built.types[4:12] = [MOVABLE] * 8
    built.flags[10 * PAGES : 11 * PAGES] = SLAB
    built.types[4], built.types[10], built.types[11] = HIGHATOMIC, UNMOVABLE, HIGHATOMIC
    built.apart = {4}
    image = import_machine(built)
    assert image.block_migratetype.tolist() == built.types
    assert free_blocks(image) == built.free_blocks()


def test_free_counts_by_type_decide_where_contents_say_nothing() -> None:
    built = machine(nr_blocks=4)
    built.flags[1:2048] = RESERVED
    for block, nr_free in enumerate((1, 2, 4, 8)):
        built.flags[block * PAGES + 256 : block * PAGES + 256 + nr_free] = BUDDY
    built.types[2] = UNMOVABLE
    assert import_machine(built).block_migratetype.tolist() == built.types


def test_blocks_without_memory_are_told_from_kernel_pages_without_flags() -> None:
    built = machine(nr_blocks=12)
    hole = slice(12 * PAGES, 15 * PAGES)
    built.flags[hole] = 0
    built.counts[hole] = 0
    built.zones[1].nr_absent_blocks = 3
    for block in (12, 13, 14):
        built.types[block] = MOVABLE
    built.flags[5 * PAGES : 6 * PAGES] = 0  # a big allocation of the kernel's
    built.types[5] = UNMOVABLE
    built.pagetypeinfo = counting(built, 5)  # type: ignore[method-assign]
    image = import_machine(built)
    nopage = 1 << 20
    assert (image.flags[hole] == nopage).all()
    assert (image.flags[5 * PAGES : 6 * PAGES] == 0).all()
    assert image.flags[0] == nopage
    assert image.block_migratetype[5] == UNMOVABLE
    assert any("3 pageblocks" in note and "no memory" in note for note in image.notes)


def counting(built: Machine, block: int):  # type: ignore[no-untyped-def]
    """pagetypeinfo of a machine whose all-zero `block` is memory nevertheless."""
    shown = built.flags.copy()
    shown[block * PAGES] = SLAB
    return replace(built, flags=shown).pagetypeinfo


def test_flags_are_translated_and_junk_is_masked() -> None:
    built = machine(nr_blocks=4)
    at = 4 * PAGES
    reserved, mlocked, private, owner_2 = (1 << bit for bit in (32, 33, 35, 34))
    built.flags[at : at + 5] = [
        SLAB | 1 << 12 | 1 << 11 | 1 << 21,
        reserved,
        ANON_PAGE | mlocked,
        private | owner_2,
        0,
    ]
    built.counts[at : at + 5] = [7, 7, 3, 7, 7]
    image = import_machine(built)
    anon = 1 << 3 | 1 << 5 | 1 << 12 | 1 << 14  # PG_mmap is never stored
    assert image.flags[at : at + 5].tolist() == [SLAB, 1 << 27, anon | 1 << 28, 1 << 29, 0]
    assert image.mapcount[at : at + 5].tolist() == [0, 0, 3, 0, 0]


def test_a_free_page_keeps_nothing_but_pg_buddy() -> None:
    built = machine(nr_blocks=4)
    free = built.free_blocks()[0][0]
    built.flags[free] |= 1 << 3
    assert import_machine(built).flags[free] == BUDDY


def test_a_mapped_page_has_a_mapcount_whatever_was_read_later() -> None:
    built = machine(nr_blocks=4)
    first, second = np.flatnonzero(built.counts)[:2]
    built.flags[first] |= KSM  # shared by processes: the count is an average
    built.counts[first], built.counts[second] = 0, 1 << 63
    mapcount = import_machine(built).mapcount
    assert (mapcount[first], mapcount[second]) == (1, 2**31 - 1)


def test_pages_of_a_process_that_ended_while_it_was_read_were_freed_last() -> None:
    built = machine(nr_blocks=4)
    anon = np.flatnonzero((built.flags == ANON_PAGE) & (built.counts > 0))
    built.flags[anon[:9]] = 0
    built.counts[anon[:9]] = 0
    built.counts[anon[20]] = 0
    image = import_machine(built)
    assert image.pcp_pfn.tolist() == [anon[20], *anon[:7]]
    assert image.flags[anon[20]] == image.mapcount[anon[20]] == 0
    assert any("1 pages of processes that ended" in note for note in image.notes)


def test_the_order_of_frees_goes_by_blocks_of_the_largest_order() -> None:
    pfns = np.arange(512, 8 * 1024, 2)
    shuffled = _shuffle_blocks(pfns, 1)
    assert sorted(shuffled.tolist()) == pfns.tolist()
    blocks = [int(block) for block, _ in itertools.groupby(shuffled >> 10)]
    assert sorted(blocks) == list(range(8)) != blocks
    assert all((np.diff(shuffled[shuffled >> 10 == block]) > 0).all() for block in blocks)
    assert (_shuffle_blocks(pfns, 1) == shuffled).all()
    assert (_shuffle_blocks(pfns, 2) != shuffled).any()


HELD = LRU | IDLE | PRIVATE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "held"),
    [
        ([16, 5], [16, 5]),  # of one pageblock
        ([16, 2], [16]),
        ([7, 7], []),
        ([1] * 60, []),  # bitmaps and inode tables, read as needed
    ],
)
def test_buffers_in_a_row_are_taken_to_be_held(runs: list[int], held: list[int]) -> None:
    """ext4 reads its group descriptors at mount and keeps them; other idle buffers are moved by a real compaction."""
    built = machine(nr_blocks=4)
    block = slice(2 * PAGES, 3 * PAGES)
    built.flags[block], built.counts[block], built.types[2] = SLAB, 0, UNMOVABLE
    expected, at = [], 2 * PAGES
    for nr in runs:
        built.flags[at : at + nr] = HELD
        if nr in held:
            expected += range(at, at + nr)
        at += nr + 1
    assert import_machine(built).pinned_pfn.tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("used", "nr"), [(HELD | DIRTY, 16), (HELD & ~IDLE, 0), (HELD | REFERENCED, 0), (HELD | UPTODATE, 8)]
)
def test_a_run_of_buffers_that_is_used_is_not_held(used: int, nr: int) -> None:
    built = machine(nr_blocks=4)
    block = slice(2 * PAGES, 3 * PAGES)
    built.flags[block], built.counts[block], built.types[2] = SLAB, 0, UNMOVABLE
    built.flags[2 * PAGES : 2 * PAGES + 16] = HELD
    built.flags[2 * PAGES + 8] = used
    found = import_machine(built).pinned_pfn
    assert len(found) == (15 if nr == 8 else nr)


def test_pagemaps_tell_in_which_order_pages_were_given_back() -> None:
    """Pages next to each other were handed out in a row, and are freed by ascending addresses: the highest last."""
    built = machine(nr_blocks=6)
    blocks = [3, 5]
    for block in blocks:
        span = slice(block * PAGES, (block + 1) * PAGES)
        built.flags[span], built.counts[span], built.types[block] = ANON_PAGE, 1, MOVABLE
        freed = slice(block * PAGES + 1, (block + 1) * PAGES, 2)
        built.flags[freed], built.counts[freed] = 0, 0
    base = {3: 90_000, 5: 10_000}  # block 3 has the higher addresses
    kept = np.concatenate([np.arange(block * PAGES, (block + 1) * PAGES, 2) for block in blocks])
    vpn = np.array([base[pfn // PAGES] + pfn % PAGES for pfn in kept.tolist()])
    by_vpn = np.argsort(vpn)
    task = HostTask(1, "fragmenter", ((0, 100_000, 3),), vpn[by_vpn], kept[by_vpn])
    zones = tuple(
        replace(zone, pagesets=(HostPageset(PAGES, 600, 600, 600, 63),))
        for zone in parse_zones(built.zoneinfo(), built.buddyinfo(), built.pagetypeinfo())
    )
    image = build_host_image(zones, built.flags, built.counts, mappings=(task,))
    odd = [np.arange(block * PAGES + 1, (block + 1) * PAGES, 2)[::-1] for block in blocks]
    assert image.pcp_pfn.tolist() == np.concatenate(odd).tolist()


def test_compound_pages_get_their_order() -> None:
    built = machine(nr_blocks=4)
    at = 7 * PAGES
    built.flags[at : at + 8] = [SLAB | HEAD] + [SLAB | TAIL] * 3 + [HEAD, TAIL, HEAD, TAIL]
    image = import_machine(built)
    assert image.compound_order[at : at + 8].tolist() == [2, 0, 0, 0, 1, 0, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offset", "pages"), [(0, [HEAD, TAIL, TAIL]), (1, [HEAD, TAIL]), (0, [TAIL, TAIL]), (2, [HEAD])]
)
def test_a_torn_compound_page_becomes_single_pages(offset: int, pages: list[int]) -> None:
    built = machine(nr_blocks=4)
    at = 7 * PAGES + offset
    built.flags[at : at + len(pages)] = [page | SLAB for page in pages]
    image = import_machine(built)
    assert (image.flags[at : at + len(pages)] == SLAB).all()
    assert not image.compound_order.any()
    assert any("1 compound pages changed" in note for note in image.notes)


def test_pages_without_an_owner_in_movable_blocks_lie_on_per_cpu_lists() -> None:
    built = machine(nr_blocks=4)
    anon = np.flatnonzero(built.flags == ANON_PAGE)
    built.flags[anon[:9]] = 0
    built.counts[anon[:9]] = 0
    image = import_machine(built)
    assert image.pcp_pfn.tolist() == anon[:7].tolist()  # two CPUs with 3 and 4


def test_mappings_of_pages_that_are_gone_are_left_out() -> None:
    built = machine(nr_blocks=4)
    mapped = int(np.flatnonzero(built.counts)[0])
    free = built.free_blocks()[0][0]
    pfns = np.array([mapped, free, 1 << 40, -1])
    task = HostTask(7, "x", ((16, 20, 3),), np.arange(16, 20), pfns)
    image = import_machine(built, (task,))
    assert image.mappings[0].vpn.tolist() == [16]
    assert image.mappings[0].pfn.tolist() == [mapped]
    assert any(note.startswith("3 of 4 page table entries") for note in image.notes)


@pytest.mark.slow
def test_totals_hold_when_the_evidence_contradicts_them() -> None:
    """As many pageblocks of each type as counted, although other blocks would look better."""
    built = machine(nr_blocks=12)
    honest = built.pagetypeinfo()
    zones = parse_zones(built.zoneinfo(), built.buddyinfo(), honest)
    counted = replace(zones[1], nr_blocks=(1, 9, 2, 0, 0, 0))
    image = build_host_image((zones[0], counted), built.flags, built.counts)
    assert np.bincount(image.block_migratetype[4:], minlength=5).tolist() == [1, 9, 2, 0, 0]


def test_a_difference_to_buddyinfo_is_noted() -> None:
    built = machine(nr_blocks=4)
    zones = parse_zones(built.zoneinfo(), built.buddyinfo(), built.pagetypeinfo())
    before = replace(zones[1], nr_free=(zones[1].nr_free[0] + 5, *zones[1].nr_free[1:]))
    image = build_host_image((zones[0], before), built.flags, built.counts)
    assert any("order 0" in note and "changed while it was read" in note for note in image.notes)
