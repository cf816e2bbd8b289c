# SPDX-License-Identifier: GPL-2.0-only
"""Large folios of a made-up capture: mapped as the capture says, moved whole, split where Linux splits them."""

from pathlib import Path

import captures
import numpy as np
import pytest

from dpud.capture import read_capture
from dpud.dpu.driver import DpuDriver
from kernelsim.machine import NODES_SYSFS, Machine
from kernelsim.page_alloc import get_page_from_freelist

PAGES = 512
HEAD, TAIL, KPF_KSM, THP, MLOCKED = 1 << 15, 1 << 16, 1 << 21, 1 << 22, 1 << 33
FILE_PAGE = captures.UPTODATE | captures.LRU | captures.MMAP
PARTIALLY_MAPPED = 1 << 9  # on the first tail
THP_BLOCK, FILE_BLOCK, PART_BLOCK = 7, 11, 15


def put_folio(built: captures.Machine, pfn: int, order: int, flags: int, counts: list[int]) -> None:
    size = 1 << order
    built.flags[pfn : pfn + size] = flags | TAIL | THP
    built.flags[pfn] = flags | HEAD | THP
    built.counts[pfn : pfn + size] = counts
    built.flags[pfn : pfn + size][built.counts[pfn : pfn + size] == 0] &= np.uint64(~captures.MMAP & 2**64 - 1)
    built.types[pfn // PAGES] = captures.MOVABLE


def made_up(captured: bool, part_block: int = PART_BLOCK, nr_mapped: int = 20) -> captures.Machine:
    """A huge page, file folios of order 4 and an anonymous one of order 5 that is mapped in part, among single pages.

    `captured`: one process's page map tells where the huge page and the file folios are mapped.
    """
    built = captures.machine(seed=3, nr_blocks=20)
    built.tasks = []
    built.flags[256:320] = captures.PGTABLE  # frames for the page tables
    put_folio(built, THP_BLOCK * PAGES, 9, captures.ANON_PAGE | MLOCKED, [2] * PAGES)
    for pfn in range(FILE_BLOCK * PAGES, FILE_BLOCK * PAGES + 256, 32):
        put_folio(built, pfn, 4, FILE_PAGE, [1] * 16)
    put_folio(built, part_block * PAGES + 64, 5, captures.ANON_PAGE, [1] * nr_mapped + [0] * (32 - nr_mapped))
    if captured:
        huge = [(0x2000 + i, THP_BLOCK * PAGES + i) for i in range(PAGES)]
        cache = [(0x4008 + i, FILE_BLOCK * PAGES + i) for i in range(256) if i % 32 < 16]
        part = [(0x6000 + i, part_block * PAGES + 64 + i) for i in range(nr_mapped)]
        built.tasks = [(41, "web", huge), (42, "db", huge + part), (43, "files", cache)]
    return built


def imported(built: captures.Machine, folder: Path) -> Machine:
    image = read_capture(built.write(folder))
    machine = Machine.from_image(image, None, DpuDriver())
    assert machine.check() == []
    return machine


@pytest.fixture(params=[False, True], ids=["synthetic", "captured"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return imported(made_up(request.param), tmp_path / "capture")


def head_of(machine: Machine, order: int) -> list[int]:
    pages = machine.mem.pages[: machine.mem.nr_pages]
    return np.flatnonzero((pages["flags"] & np.uint32(HEAD) != 0) & (pages["order"] == order)).tolist()


@pytest.mark.slow
def test_folios_are_mapped_as_captured(machine: Machine) -> None:
    pages = machine.mem.pages
    huge = THP_BLOCK * PAGES
    assert (pages["mapcount"][huge], pages["mapping"][huge + 1], pages["refcount"][huge]) == (2, 2, 2)
    assert int(machine.mem.nodes["nr_anon_thps"].sum()) == PAGES
    assert int(machine.mem.zones["nr_mlock"].sum()) == PAGES
    for pfn in head_of(machine, 4):
        assert (pages["mapcount"][pfn], pages["refcount"][pfn]) == (16, 32)  # and a reference for each cached page
    assert len(head_of(machine, 4)) == 8
    (part,) = head_of(machine, 5)
    assert (pages["mapcount"][part], pages["flags"][part + 1] & PARTIALLY_MAPPED) == (20, PARTIALLY_MAPPED)


@pytest.mark.slow
def test_the_dpu_moves_them_whole(machine: Machine) -> None:
    machine.registry.write("/proc/sys/vm/dpu_compact_min_fragments", "1")
    machine.registry.write("/proc/sys/vm/dpu_compact_region_order", "18")
    before = {order: head_of(machine, order) for order in (4, 9)}
    machine.registry.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    assert machine.check() == []
    assert len(head_of(machine, 4)) == 8
    assert len(head_of(machine, 9)) == 1
    assert head_of(machine, 4) != before[4]
    assert int(machine.mem.nodes["nr_anon_thps"].sum()) == PAGES


def test_linux_splits_what_finds_no_target_of_its_size(machine: Machine) -> None:
    """No free block above order 3 is left: the folios of order 4 and 5 go on as single pages; huge pages stay."""
    mem = machine.mem
    mem.zones["watermark"] = 0
    for order in range(10, 3, -1):  # somebody takes them all
        while get_page_from_freelist(mem.pages, mem.zones, mem.blocks, mem.zonelist[0], order, captures.MOVABLE) >= 0:
            pass
    assert mem.zones["nr_free"].sum(axis=(0, 2))[:4].all()
    moved = int(machine.vm.events["pgmigrate_success"][0])
    machine.registry.write("/proc/sys/vm/compact_memory", "1")
    assert machine.check() == []
    assert int(machine.vm.events["pgmigrate_success"][0]) > moved + 100
    assert len(head_of(machine, 4)) < 8
    assert THP_BLOCK * PAGES in head_of(machine, 9)


@pytest.mark.slow
@pytest.mark.parametrize("nr_mapped", [20, 32])
@pytest.mark.parametrize("captured", [False, True], ids=["synthetic", "captured"])
def test_linux_splits_what_is_mapped_in_part_before_it_moves_it(captured: bool, nr_mapped: int, tmp_path: Path) -> None:
    """Only its mapped pages move; one that is mapped as a whole finds room of its size and moves whole."""
    built = made_up(captured, 4, nr_mapped)
    roomy = slice(22 * PAGES + 256, 23 * PAGES)
    built.flags[roomy], built.counts[roomy] = captures.BUDDY, 0
    machine = imported(built, tmp_path / "capture")
    (folio,) = head_of(machine, 5)
    stamps = machine.vm.memory[folio : folio + nr_mapped, 0].tolist()
    machine.registry.write("/proc/sys/vm/compact_memory", "1")
    assert machine.check() == []
    lru = machine.mem.pages["flags"][: machine.mem.nr_pages] & np.uint32(captures.LRU | TAIL) != 0
    now = np.flatnonzero(lru & np.isin(machine.vm.memory[: machine.mem.nr_pages, 0], stamps)).tolist()
    assert len(now) == nr_mapped
    assert min(now) >= 22 * PAGES
    assert head_of(machine, 5) == ([] if nr_mapped == 20 else now[:1])


def test_what_the_host_s_ksm_had_merged_moves_as_any_page(tmp_path: Path) -> None:
    built = captures.machine(seed=3, nr_blocks=20)
    built.tasks = []
    built.flags[256:320] = captures.PGTABLE  # frames for the page tables
    merged = np.flatnonzero((built.flags == captures.ANON_PAGE) & (built.counts > 0))[::3]
    built.flags[merged] |= KPF_KSM
    machine = imported(built, tmp_path / "capture")
    assert np.flatnonzero(machine.mem.pages["flags"] & np.uint32(KPF_KSM)).tolist() == merged.tolist()
    machine.registry.write("/proc/sys/vm/compact_memory", "1")
    machine.registry.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    assert machine.check() == []
    moved = np.flatnonzero(machine.mem.pages["flags"] & np.uint32(KPF_KSM))
    assert len(moved) == len(merged)
    assert set(moved.tolist()) != set(merged.tolist())
