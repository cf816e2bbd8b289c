# SPDX-License-Identifier: GPL-2.0-only
"""The TLB against least recently used lists, and bulk translation against a dictionary."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import KIB, MIB, small_memory

from dpud.gpu.address_space.pagetable import NOT_MAPPED, NOT_RESIDENT, PTE_PRESENT, PageTable
from dpud.gpu.address_space.tlb import Tlb

VA = 1 << 45
NR_PAGES = 512


def table() -> tuple[PageTable, int]:
    pages = PageTable(1)
    leaf = pages.map_region(VA, 1, 12)
    pages.ptes[0, leaf : leaf + NR_PAGES] = PTE_PRESENT | (np.arange(NR_PAGES, dtype=np.uint64) << np.uint64(16))
    return pages, leaf


@given(st.lists(st.integers(0, NR_PAGES - 1), max_size=300), st.sampled_from([(1, 8), (8, 2), (16, 1)]))
def test_hits_are_those_of_lru_lists(accesses: list[int], shape: tuple[int, int]) -> None:
    """One list of `ways` pages for each set; a page's set is its number's lowest bits."""
    nr_sets, ways = shape
    (pages, _), tlb = table(), Tlb(nr_sets, ways)
    lists = [OrderedDict[int, None]() for _ in range(nr_sets)]
    nr_hits = 0
    for page in accesses:
        (entry,) = tlb.translate(pages.dirs, pages.ptes[0], VA + page * 4096, 12, 1)
        assert int(entry) >> 16 == page
        lru = lists[(VA // 4096 + page) % nr_sets]
        nr_hits += page in lru
        lru[page] = None
        lru.move_to_end(page)
        if len(lru) > ways:
            lru.popitem(last=False)
    assert (tlb.nr_hits, tlb.nr_misses) == (nr_hits, len(accesses) - nr_hits)


def test_an_invalidated_entry_is_walked_again() -> None:
    (pages, leaf), tlb = table(), Tlb()
    tlb.translate(pages.dirs, pages.ptes[0], VA, 12, 40)
    pages.ptes[0, leaf : leaf + 40] = 0
    assert tlb.translate(pages.dirs, pages.ptes[0], VA, 12, 1)[0] != 0  # that is why it has to be invalidated
    tlb.invalidate(np.array([VA, VA + 4096]), 12)
    assert tlb.translate(pages.dirs, pages.ptes[0], VA, 12, 3).astype(bool).tolist() == [False, False, True]
    assert tlb.nr_invalidated == 2
    tlb.invalidate(VA + 4096 * np.arange(40), 12)
    assert (tlb.nr_flushes, tlb.believed()) == (1, [])


@given(st.data())
@pytest.mark.slow
def test_bulk_translation_is_a_dictionary_s(data: st.DataObject) -> None:
    memory = small_memory(MIB)
    regions = [
        (memory.allocate("a", size, page_size=page), size, page)
        for size, page in ((100 * KIB, 2048), (300 * KIB, 4096), (200 * KIB, 65536))
    ]
    mapped: dict[int, int] = {}
    for va, size, page in regions:
        for start in data.draw(st.lists(st.integers(0, size // page - 1), max_size=4)):
            memory.write("a", va + start * page, b"x")
            phys = memory.translate(va + start * page)
            mapped |= {(va + start * page >> 11) + i: phys + (i << 11) for i in range(page >> 11)}
    vas = [
        va + at for va, size, _ in regions for at in data.draw(st.lists(st.integers(-5000, size + 5000), max_size=20))
    ]
    for va, found in zip(vas, memory.translate_bulk(np.array(vas, dtype=np.int64)).tolist(), strict=True):
        if va >> 11 in mapped:
            assert found == mapped[va >> 11] + va % 2048
        else:
            assert found in (NOT_RESIDENT, NOT_MAPPED)
    assert memory.translate_bulk(np.array([0, -1, 1 << 60])).tolist() == [NOT_MAPPED] * 3
