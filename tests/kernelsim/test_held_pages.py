# SPDX-License-Identifier: GPL-2.0-only
"""Who finds no memory while a compaction holds free frames waits for them: nothing fails that would have succeeded
before the compaction, or after it."""

import errno

import pytest
from machines import Lab, advance, settle, small_slices

from kernelsim.attr import Operation, outcome
from kernelsim.gfp import parse_gfp
from kernelsim.mm_configfs import MmGroup
from kernelsim.wait import WaitQueue

COMPACT = "/sys/devices/system/node/node0/compact"


@pytest.fixture
def scarce():
    """32 MiB, full but for the holes of one process, and every operation yields after few pages."""
    patch = small_slices(64)
    lab = Lab((32,), nr_ranks=1, patience=30)
    lab.spawn("a", anon="24M", holes="20 runs seed=1")
    yield lab
    patch.undo()


def held(lab: Lab) -> int:
    return int(lab.mem.zones["held_pages"].sum())


def free_above_min(lab: Lab) -> int:
    """Pages that a process can have at once."""
    return int((lab.mem.zones["free_pages"] - lab.mem.zones["watermark"][:, 0]).sum())


def holding(lab: Lab, compaction: Operation[object], least: int) -> Operation[object]:
    """A compaction, run until it holds so many free frames."""
    while held(lab) < least:
        assert not advance(compaction)[0]
    return compaction


BY = {"scanners": lambda lab: lab.start(COMPACT, "1"), "batches": lambda lab: lab.start_compact()}


@pytest.mark.slow
@pytest.mark.parametrize("by", BY)
def test_a_fault_waits_for_frames_that_a_compaction_holds(scarce: Lab, by: str) -> None:
    scarce.spawn("b")
    compaction = holding(scarce, BY[by](scarce), 100)
    wanted = free_above_min(scarce) + 50
    outcomes = settle([scarce.start_set("b", "anon", f"{wanted * 4}K"), compaction])
    assert not any(isinstance(outcome, OSError) for outcome in outcomes)
    scarce.assert_at_rest()


def drain(lab: Lab) -> None:
    """Leave no page above the min watermark."""
    lab.alloc(lab.allocator("single", gfp="GFP_NOWAIT", count="10000"))


@pytest.mark.parametrize("by", BY)
@pytest.mark.slow
def test_a_request_that_may_block_waits_and_one_that_may_not_fails(scarce: Lab, by: str) -> None:
    compaction = holding(scarce, BY[by](scarce), 100)
    drain(scarce)
    slowpath = scarce.machine.slowpath
    assert advance(slowpath.alloc_pages(parse_gfp("GFP_NOWAIT"), 0, 0)) == (True, -errno.ENOMEM)
    for gfp in ("GFP_KERNEL", "GFP_KERNEL|__GFP_RETRY_MAYFAIL"):
        request = slowpath.alloc_pages(parse_gfp(gfp), 0, 0)
        pfns = settle([request, compaction])
        assert isinstance(pfns[0], int)
        assert pfns[0] > 0
        scarce.machine.direct_blocks.adopt(pfns[0], 0, 0)
    scarce.assert_at_rest()


@pytest.mark.parametrize("by", BY)
@pytest.mark.slow
def test_mkdir_waits_too(scarce: Lab, by: str) -> None:
    compaction = holding(scarce, BY[by](scarce), 100)
    drain(scarce)
    mkdir = outcome(MmGroup(scarce.machine).make_item("b"))
    assert not advance(mkdir)[0]
    fork = settle([scarce.start_set("a", "fork", "b")])[0]
    assert isinstance(fork, OSError)
    assert fork.errno == errno.EEXIST  # the name is taken
    process, _ = settle([mkdir, compaction])
    assert process is scarce.machine.processes["b"]
    settle([scarce.machine.end_process(process)])
    scarce.assert_at_rest()


@pytest.mark.slow
def test_what_nobody_holds_is_not_waited_for(scarce: Lab) -> None:
    drain(scarce)
    request = scarce.machine.slowpath.alloc_pages(parse_gfp("GFP_KERNEL"), 0, 0)
    assert settle([request]) == [-errno.ENOMEM]
    mkdir = settle([outcome(MmGroup(scarce.machine).make_item("b"))])[0]
    assert isinstance(mkdir, OSError)
    assert mkdir.errno == errno.ENOMEM


def test_the_compaction_mutex_is_slept_for(scarce: Lab) -> None:
    """A second compaction has something to sleep on, and is woken when the first ends."""
    woken = []

    class Bell(WaitQueue):
        def wake_up(self) -> None:
            woken.append(self)

    mutex = scarce.vm.compaction_mutex
    mutex.waiters = Bell()
    first, second = scarce.start(COMPACT, "1"), scarce.start_compact()
    next(first)
    assert next(second) is mutex.waiters
    assert woken == []
    settle([first])
    assert woken
    settle([second])
    scarce.assert_at_rest()
