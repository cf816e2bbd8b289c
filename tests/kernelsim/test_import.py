# SPDX-License-Identifier: GPL-2.0-only
"""A real machine's memory, emulated: what the files say, and what compaction leaves alone."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dpud.capture import DEMO, read_capture
from dpud.dpu.driver import DpuDriver
from dpud.physmem import PhysMem
from kernelsim.hostimage import HostImage
from kernelsim.machine import NODES_SYSFS, Machine
from kernelsim.page import (
    PG_anon,
    PG_buddy,
    PG_head,
    PG_huge,
    PG_lru,
    PG_nopage,
    PG_reserved,
    PG_slab,
    PG_table,
    PG_tail,
)

SHARED = Path(__file__).parents[3] / "shared/data/host-fragmentation"
CASES = {"demo": DEMO, "random50": SHARED / "random50/before", "runs40": SHARED / "runs40/before"}
KEPT = PG_slab | PG_reserved | PG_table | PG_nopage
COMPOUND = PG_head | PG_tail


@cache
def image_of(case: str) -> HostImage:
    if not CASES[case].exists():
        pytest.skip("needs ../shared/data")
    return read_capture(CASES[case])


def machine_of(case: str) -> Machine:
    return Machine.from_image(image_of(case), None, DpuDriver(), alloc_words=PhysMem().alloc)


def rows(text: str) -> dict[str, list[int]]:
    """{zone: counts} of a buddyinfo."""
    return {line[:23]: [int(word) for word in line[23:].split()] for line in text.splitlines()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_buddyinfo_is_the_real_machines(case: str) -> None:
    """DMA and DMA32 to the byte; Normal, which moved meanwhile, within 3 % or half the difference of the range."""
    image = image_of(case)
    ours = machine_of(case).registry.read("/proc/buddyinfo").decode()
    assert ours.splitlines()[:2] == image.buddyinfo.splitlines()[:2]
    first, last = rows(image.buddyinfo), rows(image.buddyinfo_end)
    for zone, counts in rows(ours).items():
        for count, a, b in zip(counts, first[zone], last[zone], strict=True):
            slack = max(0.03 * max(a, b), abs(a - b) / 2)
            assert min(a, b) - slack <= count <= max(a, b) + slack


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_pagetypeinfo_has_the_real_block_counts(case: str) -> None:
    path = CASES[case] / "pagetypeinfo"
    if not path.exists():
        pytest.skip("the demo keeps its text compressed; the captures are tested")
    real = path.read_text().splitlines()[-4:]
    assert machine_of(case).registry.read("/proc/pagetypeinfo").decode().splitlines()[-4:] == real


@pytest.mark.slow
def test_pages_keep_their_place_and_compaction_moves_only_what_may_move() -> None:
    image, machine = image_of("demo"), machine_of("demo")
    nr = machine.mem.nr_pages
    flags = machine.mem.pages["flags"][:nr].copy()
    kept = image.flags[:nr] & KEPT != 0
    taken = (flags & PG_table != 0) & (image.flags[:nr] & KEPT == 0)  # unowned frames that hold our page tables
    assert (flags[kept & ~taken] & KEPT == image.flags[:nr][kept & ~taken] & KEPT).all()
    single = (image.flags[:nr] & (PG_lru | PG_anon)) == (PG_lru | PG_anon)
    single &= image.flags[:nr] & (KEPT | COMPOUND) == 0
    assert (flags[single] & (PG_lru | PG_anon) == PG_lru | PG_anon).all()
    assert not (flags[image.flags[:nr] & (PG_buddy | PG_nopage) == 0] & PG_buddy).any()
    assert machine.check() == []
    machine.registry.write("/proc/sys/vm/dpu_compact_region_order", "18")
    machine.registry.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    assert machine.dpu.stats.pages_moved > 100_000
    assert (machine.mem.pages["flags"][:nr][kept] & KEPT == flags[kept] & KEPT).all()
    assert machine.check() == []


def large_folios(image: HostImage, nr: int) -> np.ndarray:
    """Heads of compound pages on an LRU list that are neither slab nor hugetlb."""
    flags = image.flags[:nr]
    return np.flatnonzero((flags & PG_head != 0) & (flags & PG_lru != 0) & (flags & (PG_slab | PG_huge) == 0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_large_folios_are_mapped_again_and_move_whole(case: str) -> None:
    image, machine = image_of(case), machine_of(case)
    pages, nr = machine.mem.pages, machine.mem.nr_pages
    heads = large_folios(image, nr)
    orders = image.compound_order[heads]
    assert len(set(orders.tolist())) > 2
    assert (pages["order"][heads] == orders).all()
    by_hand = [int(np.minimum(image.mapcount[h : h + (1 << o)], 16).sum()) for h, o in zip(heads, orders, strict=True)]
    whole = pages["mapping"][heads + 1]  # PMD entries
    assert (pages["mapcount"][heads] + whole * 511 == by_hand).all()
    assert machine.check() == []
    machine.registry.write("/proc/sys/vm/dpu_compact_region_order", "18")
    machine.registry.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    after = np.flatnonzero((pages["flags"][:nr] & PG_head != 0) & (pages["flags"][:nr] & PG_lru != 0))
    split = int(machine.vm.events["thp_split_page"][0])
    assert sorted(pages["order"][after].tolist()) == sorted(orders.tolist()) or split
    assert len(set(after.tolist()) - set(heads.tolist())) > len(heads) // 10
    assert machine.check() == []


@pytest.mark.slow
def test_every_mapped_page_is_mapped_again() -> None:
    image, machine = image_of("demo"), machine_of("demo")
    nr = machine.mem.nr_pages
    single = image.flags[:nr] & (PG_lru | KEPT | COMPOUND) == PG_lru
    assert single.sum() > 100_000
    expected = np.minimum(image.mapcount[:nr], 16)[single]
    assert (machine.mem.pages["mapcount"][:nr][single] == expected).all()
