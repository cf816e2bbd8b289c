# SPDX-License-Identifier: GPL-2.0-only
"""The CPU path: clusters of 32 pages, one TLB flush for each mm and cluster."""

import numpy as np
import pytest
from machines import Lab
from numpy.typing import NDArray

from kernelsim.mm_configfs import Process
from kernelsim.operation import complete
from kernelsim.pgtable import walk_pte


@pytest.mark.parametrize("children", [0, 2])
def test_one_flush_for_each_mm_and_cluster(children: int) -> None:
    """Every page is mapped by every mm here, so each cluster flushes all of them once."""
    lab = Lab((32,))
    lab.sysctl(dpu_compact_enabled=0, dpu_compact_region_order=13)
    lab.spawn("a", anon="8M", holes="50 seed=1")
    for nr in range(children):
        lab.set("a", fork=f"child{nr}")
    before = lab.vmstat()
    lab.compact()
    after = lab.vmstat()
    moved = after["pgmigrate_success"] - before["pgmigrate_success"]
    assert moved > 500
    clusters = -(-moved // 32)
    assert after["nr_tlb_local_flush_all"] - before["nr_tlb_local_flush_all"] == clusters * (1 + children)
    lab.assert_at_rest()


def frames_of(lab: Lab, process: Process) -> NDArray[np.int64]:
    """The pfn of each page of the process's one mapping; -1 where there is none."""
    (vma,) = process.anon_vmas
    ptes = [int(lab.vm.pt[walk_pte(lab.vm.pt, process.mm.root, int(vpn))]) for vpn in vma.vpns()]
    return np.array([pte >> 12 if pte & 1 else -1 for pte in ptes])


def test_a_dense_run_slides_down_by_one_frame() -> None:
    """One hole below 511 pages: each goes to the frame that the page before it leaves, within a cluster too."""
    lab = Lab((32,), "full")
    lab.sysctl(dpu_compact_enabled=0, dpu_compact_region_order=9)
    process = lab.spawn("a", anon="4M")
    before = frames_of(lab, process)
    full = next(base for base in range(4096, 8192, 512) if set(range(base, base + 512)) <= set(before.tolist()))
    (vma,) = process.anon_vmas
    complete(process.mm.madvise_dontneed(vma, vma.vpns()[before == full]))
    lab.compact()
    after = frames_of(lab, process)
    inside = (before > full) & (before < full + 512)
    assert inside.sum() == 511
    assert (after[inside] == before[inside] - 1).all()
    lab.assert_at_rest()
