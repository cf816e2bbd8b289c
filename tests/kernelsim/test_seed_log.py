# SPDX-License-Identifier: GPL-2.0-only
"""The sample log of the seed document, reproduced: 128 fragments at 0x10000000, 64 of them mapped."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from machines import Lab

from kernelsim.filemap import File
from kernelsim.mmap import Mm, Vma
from kernelsim.operation import complete
from kernelsim.page import PG_buddy
from kernelsim.page_alloc import hold_free_block, release_held

BASE_PFN = 0x10000000 >> 12
END_PFN = BASE_PFN + 512
NR_EACH = 64


@contextmanager
def nothing_free(lab: Lab) -> Iterator[None]:
    """Hold every free block, so that a page lands where one frame is released."""
    mem = lab.mem
    for head in np.flatnonzero(mem.pages["flags"][: mem.nr_pages] & PG_buddy):
        hold_free_block(mem.pages, mem.zones, mem.blocks, head, head, head + 1024)
    yield
    for zone in mem.zones:
        release_held(mem.pages, mem.zones, mem.blocks, int(zone["start_pfn"]), int(zone["end_pfn"]))


def fault_into(lab: Lab, vma: Vma, index: int, pfn: int) -> None:
    mem = lab.mem
    release_held(mem.pages, mem.zones, mem.blocks, pfn, pfn + 1)
    complete(vma.mm.write(vma, np.array([vma.start + index])))
    assert mem.pages["refcount"][pfn] > 0


def lay_out(lab: Lab) -> None:
    """In every second frame of the region a page: 64 anonymous ones, and 64 of a file that is mapped no more."""
    mm = Mm(lab.vm)
    anon, cache = mm.mmap(NR_EACH + 1), mm.mmap(NR_EACH + 1, File(lab.vm, NR_EACH + 1))
    lab.mem.zones["watermark"] = 0  # the last free frame may be taken
    for vma in (anon, cache):
        complete(mm.write(vma, np.array([vma.start + NR_EACH])))  # so that the page tables are there
    with nothing_free(lab):
        for i in range(2 * NR_EACH):
            fault_into(lab, (anon, cache)[i % 2], i // 2, BASE_PFN + 1 + 2 * i)
    complete(mm.munmap(cache))


def test_the_seed_profile_prints_the_seeds_log() -> None:
    lab = Lab((288,), profile="seed")
    lay_out(lab)
    assert lab.machine.check() == []
    dpu = lab.machine.dpu
    region = dpu.dpu_compact_region_create(lab.mem.zones_of(0)[-1], BASE_PFN, END_PFN)
    assert region is not None
    complete(dpu._start(region))
    assert region.nr_fragments == 128
    complete(dpu._finish(region))
    assert lab.machine.printk.lines()[-3:] == [
        "DPU: Compacting 128 fragments at base 0x10000000",
        "DPU compaction completed: 128 pages moved in 234567 ns",
        "DPU mapping update completed: 64 PTEs updated in 123456 ns",
    ]
    assert (lab.mem.pages["refcount"][BASE_PFN : BASE_PFN + 128] > 0).all()
    assert (lab.mem.pages["refcount"][BASE_PFN + 128 : END_PFN] == 0).all()
    assert lab.machine.check() == []


def test_the_log_begins_as_the_seed_says() -> None:
    assert "DPU Memory Compaction initialized" in Lab((32,)).machine.printk.lines()
    assert "DPU Memory Compaction initialized" not in Lab((32,), nr_ranks=None).machine.printk.lines()
