# SPDX-License-Identifier: GPL-2.0-only
"""Replayed events against a plain account of which real page is in use; the machine's invariants hold throughout."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import captures
import numpy as np
import pytest

from dpud.capture import read_capture
from kernelsim.machine import Machine
from kernelsim.replay import Replay, requests
from kernelsim.trace_scan import ALLOC, EXTFRAG, FREE, LOST, MIGRATED, event_dtype

GFP_KERNEL, GFP_HIGHUSER_MOVABLE, RECLAIMABLE = 0xCC0, 0x100CCA, 0x10
FOREVER = 1 << 62
NORMAL = 2048  # first page of zone Normal, behind 8 MiB of zone DMA (captures.machine)


class Bench:
    """A captured machine of some MiB under replay."""

    def __init__(self, folder: Path, seed: int = 0, nr_blocks: int = 12, nr_nodes: int = 1) -> None:
        self.real = captures.machine(seed, nr_blocks, nr_nodes)
        image = read_capture(self.real.write(folder))

        def adopt(vm: Any, image: Any) -> Any:
            self.replay = Replay(vm)
            return self.replay.adopt(image)

        self.machine = Machine.from_image(image, owners=adopt)
        self.mem = self.machine.mem
        self.now = 0

    def event(self, kind: int, pfn: int, order: int = 0, migratetype: int = 1, gfp: int = GFP_HIGHUSER_MOVABLE,
              cpu: int = 0, nr: int = 0) -> tuple[int, ...]:  # fmt: skip
        self.now += 1000
        return self.now, pfn, nr, gfp, cpu, kind, order, migratetype

    def play(self, *events: tuple[int, ...], assisted: bool = False) -> int:
        rows = np.array(list(events), dtype=event_dtype).view(np.recarray)
        return self.replay.run(rows, *requests(rows, lambda _gfp: 0), 0, FOREVER, assisted)

    def alloc(self, pfn: int, order: int = 0, **how: int) -> None:
        self.play(self.event(ALLOC, pfn, order, **how))

    def free(self, pfn: int, order: int = 0) -> None:
        self.play(self.event(FREE, pfn, order))

    @property
    def counts(self) -> dict[str, int]:
        row = self.replay.counts[0]
        return {name: int(row[name]) for name in row.dtype.names if row[name]}

    @property
    def nr_free(self) -> int:
        return int(self.mem.zones["free_pages"].sum() + self.mem.pagesets["count"].sum())

    def place(self, pfn: int) -> int:
        """Where a real page is, or -1."""
        a = self.replay.arrays()
        slot = int(a.i_pages[a.avcs["i_base"][a.mapping] + pfn])
        return slot if slot >= 0 else int(a.where[pfn])

    def free_frames(self) -> Iterator[int]:
        """Real pages that were free at the beginning."""
        return (pfn for pfn in range(NORMAL, len(self.real.flags)) if self.real.flags[pfn] & captures.BUDDY)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "capture")


def in_use(real: captures.Machine, pfn: int) -> bool:
    return not real.flags[pfn] & (captures.BUDDY | captures.NOPAGE)


@pytest.mark.slow
def test_the_captured_machine_is_taken_over_as_it_is(bench: Bench) -> None:
    assert bench.machine.check() == []
    assert bench.machine.registry.read("/proc/buddyinfo").decode() == bench.real.buddyinfo()
    pcp = int(bench.mem.pagesets["count"].sum())
    places = [bench.place(pfn) for pfn in range(1, bench.mem.nr_pages)]
    assert all(place in (-1, pfn) for pfn, place in enumerate(places, 1))
    used = sum(in_use(bench.real, pfn) for pfn in range(1, bench.mem.nr_pages))
    assert sum(place >= 0 for place in places) == used - pcp


@pytest.mark.slow
def test_a_page_is_there_from_its_allocation_to_its_free(bench: Bench) -> None:
    pfn = next(bench.free_frames())
    before = bench.nr_free
    bench.alloc(pfn)
    assert bench.place(pfn) >= NORMAL
    assert bench.nr_free == before - 1
    bench.free(pfn)
    assert bench.place(pfn) == -1
    assert bench.nr_free == before
    assert bench.counts == {"allocs": 1, "alloc_pages": 1, "frees": 1, "free_pages": 1}


@pytest.mark.parametrize(("migratetype", "gfp"), [(0, GFP_KERNEL), (1, GFP_HIGHUSER_MOVABLE), (2, GFP_KERNEL | 0x10)])
@pytest.mark.parametrize("order", [1, 3, 9])
@pytest.mark.slow
def test_a_block_freed_in_pieces(bench: Bench, order: int, migratetype: int, gfp: int) -> None:
    before = bench.nr_free
    bench.alloc(NORMAL, order, migratetype=migratetype, gfp=gfp)
    size, half = 1 << order, 1 << (order - 1)
    first = bench.place(NORMAL)
    assert [bench.place(NORMAL + i) for i in range(size)] == list(range(first, first + size))
    counted = bench.counts.get("unseen_free", 0)  # what was captured in these frames counts as freed before
    bench.free(NORMAL + half, order - 1)
    assert bench.machine.check() == []
    for i in range(half):
        bench.free(NORMAL + i)
    assert bench.machine.check() == []
    assert bench.nr_free == before + counted
    assert "free_unknown" not in bench.counts


@pytest.mark.slow
def test_captured_pages_can_be_freed(bench: Bench) -> None:
    """Anonymous, slab and page-table pages alike; the node's counts follow."""
    pages = [pfn for pfn in range(NORMAL, bench.mem.nr_pages) if bench.place(pfn) >= 0]
    before = bench.nr_free
    for pfn in pages:
        bench.free(pfn)
    assert bench.nr_free == before + len(pages)
    assert bench.machine.check() == []
    for name in ("nr_slab", "nr_page_table_pages", "nr_file_pages", "nr_hugetlb"):
        assert int(bench.mem.nodes[name].sum()) == 0
    assert int(bench.mem.nodes["nr_lru"].sum()) == 0


@pytest.mark.slow
def test_what_does_not_fit_is_counted(bench: Bench) -> None:
    nowhere = bench.mem.nr_pages
    frames = list(bench.free_frames())
    free, used = frames[0], next(pfn for pfn in range(NORMAL, nowhere) if bench.place(pfn) >= 0)
    bench.free(free)
    bench.free(nowhere)
    bench.alloc(nowhere - 1, 1)
    bench.alloc(used)
    bench.alloc(-1, 9)
    bench.play(bench.event(EXTFRAG, 0, 10), bench.event(EXTFRAG, 0, 3))
    bench.play(bench.event(MIGRATED, 0, nr=7), bench.event(LOST, 0, nr=5))
    assert bench.counts == {
        "free_unknown": 1, "outside": 2, "unseen_free": 1, "allocs": 1, "alloc_pages": 1, "real_failed": 1,
        "real_fallbacks": 2, "real_fragmenting": 1, "real_migrated": 7, "lost": 5,
    }  # fmt: skip


@pytest.mark.slow
def test_a_request_for_which_there_is_no_room(bench: Bench) -> None:
    """Every block of order 9 is taken, and more are asked for."""
    asked = range(0, bench.mem.nr_pages & ~511, 512)
    room = [bench.mem.zones["nr_free"][:, 9:].sum()]
    assert room[0] > 0
    for pfn in asked:
        bench.play(bench.event(ALLOC, pfn, 9, 0, GFP_KERNEL))
    failed = bench.counts["failed"]
    assert failed == bench.replay.failed[9] > 0
    assert bench.counts["failed_pages"] == failed * 512
    for pfn in asked:
        bench.free(pfn, 9)
    assert bench.counts["free_unplaced"] == failed * 512
    assert bench.machine.check() == []


@pytest.mark.slow
def test_zones_and_nodes_are_the_real_request_s(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "capture", nr_nodes=2)
    zone_of = bench.mem.pages["zone"]
    second = int(bench.mem.zones["start_pfn"][2])
    bench.alloc(2)  # a real page of zone DMA, but nothing asked for it
    bench.alloc(3, migratetype=0, gfp=0x1)
    bench.alloc(second)
    assert [int(zone_of[bench.place(pfn)]) for pfn in (2, 3, second)] == [1, 0, 2]


@pytest.mark.slow
def test_single_pages_come_from_the_cpu_s_list(bench: Bench) -> None:
    """The page freed last is given out first, on the same CPU only; an empty list is filled with a batch of 7."""
    zone = 1
    frames = list(bench.free_frames())
    bench.play(*(bench.event(ALLOC, pfn, cpu=1) for pfn in frames[:20]))
    last = bench.place(frames[7])
    bench.play(bench.event(FREE, frames[7], cpu=1))
    bench.play(bench.event(ALLOC, frames[30], cpu=0), bench.event(ALLOC, frames[31], cpu=1))
    assert bench.place(frames[30]) != last
    assert bench.place(frames[31]) == last
    bench.play(*(bench.event(ALLOC, pfn, 0, 2, GFP_KERNEL | RECLAIMABLE, 0) for pfn in frames[40:41]))
    count = int(bench.mem.pagesets["count"][zone, 0])
    bench.play(*(bench.event(ALLOC, pfn, 0, 2, GFP_KERNEL | RECLAIMABLE, 0) for pfn in frames[41:43]))
    assert int(bench.mem.pagesets["count"][zone, 0]) == count - 2
    assert bench.machine.check() == []


def test_a_fallback_is_counted_as_mm_page_alloc_extfrag_tells_it(bench: Bench) -> None:
    """The first request of a type without a free block of its own takes one of another type."""
    free_of_type = bench.mem.zones["nr_free"][1].sum(axis=0)
    types = [kind for kind in (0, 2) if not free_of_type[kind]]
    for kind in types:
        before = bench.replay.fallbacks.copy()
        bench.alloc(NORMAL, 3, migratetype=kind, gfp=GFP_KERNEL | (RECLAIMABLE if kind == 2 else 0))
        assert bench.replay.fallbacks[0] == before[0] + 1
    assert types, "the capture leaves no type without free blocks"


@pytest.mark.slow
def test_time_and_help_stop_it(bench: Bench) -> None:
    events = [bench.event(ALLOC, NORMAL + i) for i in range(4)]
    rows = np.array(events, dtype=event_dtype).view(np.recarray)
    how = requests(rows, lambda _gfp: 0)
    assert bench.replay.run(rows, *how, 0, events[2][0], False) == 2
    assert bench.replay.run(rows, *how, 2, FOREVER, False) == 4
    requested = [bench.event(ALLOC, pfn, 9, 0, GFP_KERNEL) for pfn in range(0, bench.mem.nr_pages & ~511, 512)]
    huge = next(event for event in requested if not bench.play(event, assisted=True))
    row = np.array([huge], dtype=event_dtype).view(np.recarray)[0]
    bench.replay.place(row, -1, 2, 0)
    assert bench.machine.check() == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_events_between_compactions(tmp_path: Path, seed: int) -> None:
    """Random allocations and frees, whole, in pieces and across; an account in plain Python says what must be there."""
    bench = Bench(tmp_path / "capture", seed)
    rng = random.Random(seed)
    names = {pfn for pfn in range(bench.mem.nr_pages) if bench.place(pfn) >= 0}
    total = bench.nr_free + len(names)
    for step in range(900):
        order = rng.choice((0, 0, 0, 0, 1, 2, 3, 6, 9))
        pfn = rng.randrange(NORMAL, bench.mem.nr_pages) & ~((1 << order) - 1)
        block = set(range(pfn, pfn + (1 << order)))
        if rng.random() < 0.5:
            kind, gfp = rng.choice(((0, GFP_KERNEL), (1, GFP_HIGHUSER_MOVABLE), (2, GFP_KERNEL | RECLAIMABLE)))
            failed = int(bench.replay.failed.sum())
            bench.alloc(pfn, order, migratetype=kind, gfp=gfp, cpu=rng.randrange(3))
            names = names - block if bench.replay.failed.sum() > failed else names | block
        else:
            bench.free(pfn, order)
            names -= block
        assert bench.nr_free + len(names) == total
        if step % 300 == 299:
            bench.machine.registry.write("/proc/sys/vm/compact_memory", "1")
            assert bench.machine.check() == []
            assert {pfn for pfn in range(bench.mem.nr_pages) if bench.place(pfn) >= 0} == names
    assert int(bench.machine.vm.events["pgmigrate_success"][0]) > 0
    places = [bench.place(pfn) for pfn in names]
    assert len(set(places)) == len(places)
