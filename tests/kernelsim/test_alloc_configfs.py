# SPDX-License-Identifier: GPL-2.0-only
"""Direct allocation from the shell: what is taken, held, reported and given back."""

import errno

import pytest
from machines import Lab, advance, settle
from wiring import errno_of

from kernelsim import alloc_configfs, direct_alloc


def free_pages(lab: Lab) -> int:
    return int(lab.mem.zones["free_pages"].sum())


@pytest.mark.parametrize(
    "gfp", ["GFP_KERNEL", "GFP_KERNEL|__GFP_COMP", "GFP_HIGHUSER_MOVABLE", "GFP_KERNEL|__GFP_ZERO"]
)
@pytest.mark.parametrize("order", [0, 3, 9, 10])
@pytest.mark.parametrize("words", ["stamp", "full"])
@pytest.mark.slow
def test_blocks_are_held_and_given_back(order: int, gfp: str, words: str) -> None:
    lab = Lab((32,), words, nr_ranks=None)
    before = free_pages(lab)
    path = lab.allocator("x", order=str(order), gfp=gfp, count="2")
    lab.write(f"{path}/alloc", "2")
    assert lab.read(f"{path}/allocated") == "4\n"
    assert free_pages(lab) == before - (4 << order)
    assert lab.machine.check() == []
    lab.write(f"{path}/free", "1")
    assert lab.read(f"{path}/allocated") == "0\n"
    assert free_pages(lab) == before
    assert lab.machine.check() == []


def test_the_result_says_what_it_took() -> None:
    lab = Lab((32,), nr_ranks=None)
    path = lab.allocator("x", order="10", gfp="GFP_NOWAIT", count="20")
    result = lab.alloc(path)
    assert result["requests"] == 20
    assert 0 < result["allocated"] == result["by_freelist"] < 8
    assert result["allocated"] + result["failed"] == 20
    assert [name for name in result if name.startswith("wall_ns")] == [
        *("wall_ns_p50", "wall_ns_p95", "wall_ns_p99", "wall_ns_max"),
    ]
    assert result["device_ns_max"] == 0
    assert lab.read(f"{path}/allocated") == f"{result['allocated']}\n"


def test_enomem_only_if_there_was_nothing() -> None:
    lab = Lab((32,), nr_ranks=None)
    path = lab.allocator("x", order="10", gfp="GFP_NOWAIT", count="20")
    lab.write(f"{path}/alloc", "1")
    assert errno_of(lab.write, f"{path}/alloc", "1") == errno.ENOMEM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attr", "text"),
    [("order", "11"), ("order", "-1"), ("gfp", "GFP_NONE"), ("gfp", ""), ("node", "1"), ("count", "0"), ("alloc", "0")],
)
def test_bad_settings_are_refused(attr: str, text: str) -> None:
    lab = Lab((32,), nr_ranks=None)
    path = lab.allocator("x", gfp="GFP_ATOMIC")
    before = [lab.read(f"{path}/{name}") for name in ("order", "gfp", "node", "count", "allocated")]
    assert errno_of(lab.write, f"{path}/{attr}", text) == errno.EINVAL
    assert [lab.read(f"{path}/{name}") for name in ("order", "gfp", "node", "count", "allocated")] == before


def test_the_preferred_node_comes_first() -> None:
    lab = Lab((32, 32), nr_ranks=None)
    hits = lab.mem.zones["numa_hit"].copy()
    lab.alloc(lab.allocator("x", node="1", count="10"))
    taken = lab.mem.zones["numa_hit"] - hits
    assert taken[lab.mem.zones["node"] == 1].sum() == 10
    lab.alloc(lab.allocator("y", node="1", gfp="GFP_NOWAIT|__GFP_THISNODE", order="10", count="50"))
    assert lab.mem.zones["numa_miss"].sum() == 0


def test_overwriting_a_block_is_found() -> None:
    lab = Lab((32,), nr_ranks=None)
    lab.alloc(lab.allocator("x", order="3", count="3"))
    pfn, _order = next(lab.machine.direct_blocks.blocks())
    lab.vm.memory[pfn + 7, 0] += 1
    assert any("was overwritten" in line for line in lab.machine.check())


def test_only_the_first_blocks_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_alloc, "MAX_WRITTEN", 2)
    lab = Lab((32,), nr_ranks=None)
    lab.alloc(lab.allocator("x", count="3"))
    last, _order = list(lab.machine.direct_blocks.blocks())[-1]
    lab.vm.memory[last, 0] += 1
    assert lab.machine.check() == []


def test_rmdir_ends_an_allocation_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alloc_configfs, "YIELD_EVERY", 1)
    lab = Lab((32,), nr_ranks=None)
    before = free_pages(lab)
    path = lab.allocator("x", count="100")
    request = lab.start(f"{path}/alloc", "1")
    for _ in range(5):
        assert advance(request) == (False, None)
    directory = lab.registry.nodes[path]
    kobj = directory.kobjs[0]  # type: ignore[union-attr]
    lab.registry.remove(path, kobj)
    kobj.end()
    (outcome,) = settle([request])
    assert isinstance(outcome, OSError)
    assert outcome.errno == errno.ESRCH
    assert free_pages(lab) == before
    lab.assert_at_rest()


def test_an_interrupted_allocation_keeps_what_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alloc_configfs, "YIELD_EVERY", 1)
    lab = Lab((32,), nr_ranks=None)
    path = lab.allocator("x", count="100")
    request = lab.start(f"{path}/alloc", "1")
    for _ in range(5):
        advance(request)
    request.close()
    assert lab.read(f"{path}/allocated") == "5\n"
    assert lab.machine.check() == []
