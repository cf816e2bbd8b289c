# SPDX-License-Identifier: GPL-2.0-only
"""Large folios of the page cache for which compaction finds no target of their size: split, or the end of the run."""

import numpy as np
import pytest
from captures import ANON_PAGE, BUDDY, LRU, MOVABLE, PAGES, UPTODATE, machine

from dpud.proctext import parse_zones
from kernelsim.hostimage import build_host_image
from kernelsim.machine import Machine

DIRTY, HEAD, TAIL, PRIVATE = 1 << 4, 1 << 15, 1 << 16, 1 << 35
ORDER = 3
FIRST = 4  # pageblock


def imported(folio: int) -> tuple[Machine, int]:
    """Every other page of all Movable blocks is free, no two of those side by side. Block FIRST ends with a folio
    with these flags, which is the first that is tried."""
    built = machine(4, nr_blocks=16)
    for block, kind in enumerate(built.types):
        pages = slice(block * PAGES, (block + 1) * PAGES)
        if kind == MOVABLE and (built.flags[pages] == ANON_PAGE).any():
            built.flags[pages] = np.where(np.arange(PAGES) % 2, ANON_PAGE, BUDDY)
            built.counts[pages] = np.arange(PAGES) % 2
    head = (FIRST + 1) * PAGES - (1 << ORDER)
    built.flags[head : head + (1 << ORDER)] = folio | TAIL
    built.flags[head] = folio | HEAD
    built.counts[head : head + (1 << ORDER)] = 0
    zones = parse_zones(built.zoneinfo(), built.buddyinfo(), built.pagetypeinfo())
    return Machine.from_image(build_host_image(zones, built.flags, built.counts)), head


def compact(emulated: Machine) -> dict[str, int]:
    """Migrated and failed pages."""
    assert emulated.check() == []
    emulated.registry.write("/proc/sys/vm/compact_memory", "1")
    assert emulated.check() == []
    lines = emulated.registry.read("/proc/vmstat").decode().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines) if name.startswith("pgmigrate")}


def cached(emulated: Machine) -> int:
    """Pages in page caches."""
    return int((emulated.vm.i_pages >= 0).sum())


@pytest.mark.slow
@pytest.mark.parametrize("buffers", [0, PRIVATE])
def test_a_clean_folio_is_split_and_its_pages_move(buffers: int) -> None:
    emulated, head = imported(UPTODATE | LRU | buffers)
    nr_cached = cached(emulated)
    counts = compact(emulated)
    flags = emulated.mem.pages["flags"][head : head + (1 << ORDER)]
    assert not (flags & np.uint32(HEAD | TAIL)).any()
    assert cached(emulated) == nr_cached
    moved_to = emulated.vm.i_pages[emulated.vm.i_pages >= 0]
    assert moved_to.min() > (FIRST + 2) * PAGES
    assert counts["pgmigrate_success"] > 2 * PAGES // 2  # went on behind that block


def test_a_folio_with_busy_buffers_ends_the_run() -> None:
    emulated, head = imported(UPTODATE | LRU | DIRTY | PRIVATE)
    anon_before = np.flatnonzero(emulated.mem.pages["flags"] & np.uint32(LRU))
    counts = compact(emulated)
    assert emulated.mem.pages["flags"][head] & HEAD
    assert emulated.mem.pages["order"][head] == ORDER
    assert counts["pgmigrate_fail"] == 1 << ORDER
    behind = anon_before[(anon_before > head + PAGES) & (anon_before < head + 3 * PAGES)]
    assert len(behind) > 100
    assert (emulated.mem.pages["flags"][behind] & np.uint32(LRU)).all()  # nothing moved behind it
