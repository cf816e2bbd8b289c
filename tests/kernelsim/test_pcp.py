# SPDX-License-Identifier: GPL-2.0-only
"""Per-CPU page lists: first in, first out, in batches, and limits that grow as a kernel's do."""

import numpy as np
import pytest

from kernelsim import page_alloc, pcp
from kernelsim.mmzone import MIGRATE_MOVABLE, ZONE_NORMAL, Mem
from kernelsim.page_alloc import free_range, init_range

NR_PAGES = 4096
BATCH = 8


def mem_with_lists(high: int, high_max: int, nr_cpus: int = 2) -> Mem:
    """One zone, all free, empty lists."""
    mem = Mem([(0, ZONE_NORMAL, 0, NR_PAGES)], np.array([[10]]), nr_cpus)
    init_range(mem.pages, 0, NR_PAGES, 0, 0)
    free_range(mem.pages, mem.zones, mem.blocks, 0, NR_PAGES)
    mem.zones["present"] = mem.zones["managed"] = NR_PAGES
    for cpu in range(nr_cpus):
        mem.pagesets[0, cpu] = (0, high, high, high_max, BATCH, 0, 0)
    return mem


def take(mem: Mem, nr: int) -> list[int]:
    return [int(page_alloc.rmqueue(mem.pages, mem.zones, mem.blocks, 0, 0, MIGRATE_MOVABLE)) for _ in range(nr)]


def free(mem: Mem, pfn: int, cpu: int = 0, order: int = 0) -> None:
    for page in range(pfn, pfn + (1 << order)):
        page_alloc.clear_page(mem.pages, page)
    pcp.free_frozen_pages(mem.pages, mem.zones, mem.blocks, mem.nodes, mem.pagesets, cpu, pfn, order)


def buddies(mem: Mem) -> int:
    return int(mem.zones["free_pages"][0])


def test_without_lists_a_page_is_free_at_once() -> None:
    mem = mem_with_lists(0, 0, nr_cpus=0)
    pfns = take(mem, 3)
    for pfn in pfns:
        free(mem, pfn)
    assert buddies(mem) == NR_PAGES
    assert int(mem.zones["pgfree"][0]) == 3


def test_pages_wait_until_the_list_is_full_then_the_oldest_go() -> None:
    mem = mem_with_lists(high=20, high_max=20)
    pfns = take(mem, 40)
    for pfn in pfns[:19]:
        free(mem, pfn)
    assert (buddies(mem), int(mem.pagesets["count"][0, 0])) == (NR_PAGES - 40, 19)
    free(mem, pfns[19])  # 20 pages: as many as were freed in a row, but a batch stays
    assert (buddies(mem), int(mem.pagesets["count"][0, 0])) == (NR_PAGES - 40 + 12, 8)
    again = take(mem, 12)
    assert sorted(again) == sorted(pfns[:12])


def test_the_limit_grows_with_frees_in_a_row_up_to_its_maximum() -> None:
    """nr_pcp_high(): room for the pages freed in a row and a batch."""
    mem = mem_with_lists(high=20, high_max=500)
    for pfn in take(mem, 1000):
        free(mem, pfn)
    pageset = mem.pagesets[0, 0]
    assert int(pageset["high"]) == BATCH * 32 + BATCH  # free_count stops at batch << 5
    assert int(pageset["count"]) < int(pageset["high"])


def test_each_cpu_has_its_own() -> None:
    mem = mem_with_lists(high=20, high_max=20)
    for cpu, pfn in zip((0, 1, 1), take(mem, 3), strict=True):
        free(mem, pfn, cpu)
    assert mem.pagesets["count"][0].tolist() == [1, 2]


@pytest.mark.parametrize("nr", [0, 1, 19])
def test_drained_lists_are_empty_and_all_pages_merge(nr: int) -> None:
    mem = mem_with_lists(high=20, high_max=20)
    for number, pfn in enumerate(take(mem, nr)):
        free(mem, pfn, number % 2)
    pcp.drain_all_pages(mem)
    assert buddies(mem) == NR_PAGES
    assert int(mem.zones["nr_free"][0, 10].sum()) == NR_PAGES >> 10
    assert not mem.pagesets["count"].any()


def test_filled_lists_give_the_last_of_the_pages_first() -> None:
    """fill_pagesets(): the first of `pfns` was freed last."""
    mem = mem_with_lists(high=12, high_max=12)
    pfns = np.array(take(mem, 12))
    pcp.fill_pagesets(mem, 0, pfns[:11])
    free(mem, int(pfns[11]))
    assert int(mem.pagesets["count"][0, 0]) == 12 - BATCH
    assert sorted(take(mem, BATCH)) == sorted(pfns[3:11].tolist())


def block(mem: Mem, order: int) -> int:
    return int(page_alloc.rmqueue(mem.pages, mem.zones, mem.blocks, 0, order, MIGRATE_MOVABLE))


@pytest.mark.parametrize("order", [1, 2, 3, 9])
def test_folios_of_small_orders_and_huge_pages_rest_too(order: int) -> None:
    mem = mem_with_lists(high=2000, high_max=2000)
    free(mem, block(mem, order), order=order)
    assert (buddies(mem), int(mem.pagesets["count"][0, 0])) == (NR_PAGES - (1 << order), 1 << order)
    pcp.drain_all_pages(mem)
    assert (buddies(mem), int(mem.pagesets["count"][0, 0])) == (NR_PAGES, 0)


@pytest.mark.parametrize("order", [4, 8, 10])
def test_folios_of_other_orders_are_free_at_once(order: int) -> None:
    mem = mem_with_lists(high=2000, high_max=2000)
    free(mem, block(mem, order), order=order)
    assert (buddies(mem), int(mem.pagesets["count"][0, 0])) == (NR_PAGES, 0)


def test_the_list_that_is_freed_to_is_emptied_before_others() -> None:
    """A large folio that rests keeps its surroundings from merging for as long as single pages are freed."""
    mem = mem_with_lists(high=40, high_max=40)
    large, pfns = block(mem, 2), take(mem, 100)
    free(mem, large, order=2)
    for pfn in pfns:
        free(mem, pfn)
    assert not mem.pages["flags"][large]  # PG_buddy
    listed = int(mem.pagesets["count"][0, 0])
    assert buddies(mem) == NR_PAGES - listed
    assert listed >= 4


def test_freeing_small_folios_in_a_row_empties_the_lists() -> None:
    """free_high: once as many pages were freed in a row as a batch and half of high_min."""
    mem = mem_with_lists(high=40, high_max=4000)
    pfns = [block(mem, 1) for _ in range(30)]
    for nr, pfn in enumerate(pfns):
        free(mem, pfn, order=1)
        if nr < 14:  # 28 pages, the 15th finds so many freed before it
            assert int(mem.pagesets["count"][0, 0]) == 2 * (nr + 1)
        if nr == 14:
            assert int(mem.pagesets["count"][0, 0]) == 0
    assert buddies(mem) == NR_PAGES
