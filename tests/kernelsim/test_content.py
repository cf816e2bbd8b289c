# SPDX-License-Identifier: GPL-2.0-only
"""What is kept of a page: real bytes, a stamp, or nothing; the kernel does the same with each."""

import numpy as np
import pytest
from machines import Lab

from dpud.dpu.faults import FaultKind
from kernelsim.content import fill_page, page_holds
from kernelsim.pgtable import walk_pte

KINDS = ("full", "stamp", "none")


def busy(words: str) -> Lab:
    """A machine on which much has happened."""
    lab = Lab((32, 32), words)
    lab.sysctl(dpu_compact_region_order=12, dpu_compact_min_fragments=4)
    lab.spawn("a", anon="12M", file="1M", holes="50 seed=1", mlock="10", pin="2 seed=4")
    lab.set("a", fork="b", touch="30 seed=2")
    lab.arm(FaultKind.CORRUPT, 60)
    lab.compact()
    lab.set("b", holes="40 seed=3", touch="20 seed=5")
    lab.sysctl(dpu_compact_enabled=0)
    lab.compact()
    return lab


@pytest.mark.slow
@pytest.mark.parametrize("words", KINDS)
def test_a_machine_works_with_each(words: str) -> None:
    lab = busy(words)
    assert lab.vm.memory.shape == (lab.mem.nr_pages, {"full": 512, "stamp": 1, "none": 0}[words])
    assert lab.stats()["pages_moved"] > 0
    assert lab.stats()["cpu_pages_moved"] > 0
    lab.assert_at_rest()


@pytest.mark.slow
def test_without_contents_pages_go_where_they_go_with_them() -> None:
    """But for the fault that spoils bytes: there are none to spoil."""
    labs = [Lab((32,), words) for words in KINDS]
    for lab in labs:
        lab.sysctl(dpu_compact_region_order=12)
        lab.spawn("a", anon="12M", holes="50 seed=1")
        lab.compact()
    first = labs[0].mem.pages
    for lab in labs[1:]:
        assert all((lab.mem.pages[name] == first[name]).all() for name in ("flags", "mapping", "index", "refcount"))
    faulty = [busy(words).stats()["failures"] for words in KINDS]
    assert faulty == [1, 1, 0]


def test_without_contents_verify_tells_whether_what_was_written_is_mapped() -> None:
    lab = Lab((32,), "none")
    vma = lab.spawn("a", anon="4M").mm.vma[0]
    assert lab.verify("a") == "ok"
    vma.wrote[7] = 0  # the process never wrote what is mapped there
    assert lab.verify("a") == "1"
    assert lab.machine.check() != []
    lab = Lab((32,), "none")
    vma = lab.spawn("a", anon="4M").mm.vma[0]
    for vpn in (3, 9):  # pages it wrote are gone
        lab.vm.pt[walk_pte(lab.vm.pt, vma.mm.root, vma.start + vpn)] = 0
    lab.vm.tlbs[:] = np.zeros((), dtype=lab.vm.tlbs.dtype)
    assert lab.verify("a") == "2"


@pytest.mark.parametrize("words", [512, 1])
def test_a_page_holds_what_it_was_filled_with_and_nothing_else(words: int) -> None:
    memory = np.zeros((2, words), dtype=np.uint64)
    fill_page(memory, 1, np.uint64(77))
    assert page_holds(memory, 1, np.uint64(77))
    assert not page_holds(memory, 1, np.uint64(78))
    memory[1, words - 1] ^= np.uint64(1)
    assert not page_holds(memory, 1, np.uint64(77))
