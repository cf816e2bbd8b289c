# SPDX-License-Identifier: GPL-2.0-only
"""Which steps a request goes through, typed in from mm/page_alloc.c 6.12, and what they leave in the counters."""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from machines import Lab, advance, settle
from wiring import errno_of

from dpud.dpu.faults import FaultKind
from dpud.dpu.rank import RankState
from kernelsim.alloc_slowpath import AllocContext
from kernelsim.attr import Operation
from kernelsim.gfp import parse_gfp
from kernelsim.operation import complete

SKIPPED, DEFERRED, COMPLETE, SUCCESS = 1, 2, 5, 8
SYNC_FULL, SYNC_LIGHT, ASYNC = 0, 1, 2


def fragmented(*, anon: str = "56M", holes: str = "50 seed=1", **options: int | None) -> Lab:
    """64 MiB, a random half of nearly all of it in use: no block of 2 MiB but one or two."""
    lab = Lab((64,), **options)  # type: ignore[arg-type]
    lab.spawn("a", anon=anon, holes=holes)
    return lab


def drained(lab: Lab) -> Lab:
    """What 2 MiB blocks there are, taken by somebody."""
    lab.alloc(lab.allocator("drain", order="9", gfp="GFP_NOWAIT", count="100"))
    return lab


@dataclass
class FakeCompaction:
    """Compaction that finds nothing, and remembers how it was asked."""

    results: list[int]
    prios: list[int] = field(default_factory=list)

    def try_to_compact_pages(
        self, gfp: int, order: int, prio: int, zonelist: object, highest_type: int, migratetype: int
    ) -> Operation[tuple[int, int]]:
        self.prios.append(prio)
        yield None
        return self.results.pop(0) if len(self.results) > 1 else self.results[0], -1

    def compaction_defer_reset(self, zone: int, order: int, alloc_success: bool) -> None: ...


def ask(lab: Lab, gfp: str, order: int) -> AllocContext:
    """One request, of which we do not keep the page."""
    ac = lab.machine.slowpath.context(parse_gfp(gfp), order, 0, "test")
    complete(lab.machine.slowpath.alloc(ac))
    return ac


# Steps by flags. The fragmented machine has no file pages, so reclaim never makes progress of its own.

R, A, C = "reclaim", "compact_async", "compact"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gfp", "order", "result", "steps", "prios"),
    [
        ("GFP_ATOMIC", 9, COMPLETE, [], []),
        ("GFP_NOWAIT", 9, COMPLETE, [], []),
        ("GFP_TRANSHUGE_LIGHT", 9, COMPLETE, [], []),
        ("GFP_NOIO", 9, COMPLETE, [R], []),
        ("GFP_KERNEL", 9, COMPLETE, [A, R, C], [ASYNC, SYNC_LIGHT]),
        ("GFP_KERNEL", 9, SKIPPED, [A, R, C], [ASYNC, SYNC_LIGHT]),
        ("GFP_KERNEL|__GFP_NORETRY", 9, SKIPPED, [A], [ASYNC]),
        ("GFP_KERNEL|__GFP_NORETRY", 9, DEFERRED, [A], [ASYNC]),
        ("GFP_KERNEL|__GFP_NORETRY", 9, COMPLETE, [A, R, A], [ASYNC, ASYNC]),
        ("GFP_KERNEL|__GFP_NORETRY|__GFP_THISNODE", 9, COMPLETE, [A], [ASYNC]),
        ("GFP_TRANSHUGE|__GFP_NORETRY", 9, COMPLETE, [A, R, A], [ASYNC, ASYNC]),
    ],
)
def test_steps_of_a_costly_request(gfp: str, order: int, result: int, steps: list[str], prios: list[int]) -> None:
    lab = drained(fragmented(nr_ranks=None))
    fake = FakeCompaction([result])
    lab.machine.slowpath.compaction = fake
    assert ask(lab, gfp, order).steps == steps
    assert fake.prios == prios


@pytest.mark.slow
def test_a_small_movable_request_reclaims_before_it_compacts() -> None:
    """Order 1 to 3: asynchronous compaction comes first only for what is not movable."""
    for gfp, first in (("GFP_HIGHUSER_MOVABLE|__GFP_NORETRY", R), ("GFP_KERNEL|__GFP_NORETRY", A)):
        lab = Lab((32,), nr_ranks=None)
        lab.alloc(lab.allocator("all", gfp="GFP_NOWAIT", count="10000"))
        lab.machine.slowpath.compaction = FakeCompaction([COMPLETE])
        assert ask(lab, gfp, 2).steps[0] == first


def test_retry_mayfail_tries_a_successful_compaction_four_times_more() -> None:
    """16 retries after SUCCESS, a quarter of that for costly orders; SYNC_LIGHT is as hard as it gets for those."""
    lab = drained(fragmented(nr_ranks=None))
    fake = FakeCompaction([SUCCESS])
    lab.machine.slowpath.compaction = fake
    lab.machine.compaction.compaction_suitable = lambda *_: True  # so that reclaim says: go on and compact
    ask(lab, "GFP_KERNEL|__GFP_RETRY_MAYFAIL", 9)
    assert fake.prios == [ASYNC] + [SYNC_LIGHT] * 5


@pytest.mark.slow
def test_a_small_order_tries_harder_up_to_sync_full() -> None:
    lab = Lab((32,), nr_ranks=None)
    lab.alloc(lab.allocator("all", gfp="GFP_NOWAIT", count="10000"))
    fake = FakeCompaction([COMPLETE])
    lab.machine.slowpath.compaction = fake
    progress = iter([32, 32, 32])

    def some_progress(*_: object) -> Operation[int]:
        yield None
        return next(progress, 0)

    lab.machine.reclaim.try_to_free_pages = some_progress  # type: ignore[method-assign, assignment]
    ask(lab, "GFP_KERNEL", 2)
    assert fake.prios == [ASYNC, SYNC_LIGHT, SYNC_FULL]


# Watermarks.


def free_left(gfp: str) -> int:
    """Free pages of a machine of one zone when requests of single pages begin to fail."""
    lab = Lab((32,), nr_ranks=None)
    lab.sysctl(min_free_kbytes=4096)
    lab.alloc(lab.allocator("all", gfp=gfp, count="10000"))
    zones = lab.mem.zones
    assert zones["watermark"][:, 0].sum() == 1023  # two zones, each rounded down
    return int(zones["free_pages"].sum())


@pytest.mark.slow
def test_how_deep_a_request_may_go() -> None:
    """min; half of it with __GFP_HIGH; another quarter off for those who cannot block either."""
    reserve = 47  # what DMA keeps back from requests that could use DMA32: (32 MiB - 16 MiB) / 256, rounded
    normal = free_left("GFP_NOWAIT")
    assert 1023 <= normal <= 1023 + reserve
    assert normal - free_left("GFP_KERNEL|__GFP_HIGH") == pytest.approx(512, abs=2)
    assert normal - free_left("GFP_ATOMIC") == pytest.approx(512 + 128, abs=2)
    assert free_left("GFP_KERNEL") == normal


# The DPU first, then the scanners, then failure.


def test_the_dpu_comes_first() -> None:
    lab = drained(fragmented())
    before = lab.vmstat()
    ac = ask(lab, "GFP_KERNEL", 9)
    after = lab.vmstat()
    assert ac.steps == ["dpu"]
    assert ac.device_ns > 0
    assert after["dpu_compact_regions"] > before["dpu_compact_regions"]
    assert after["compact_migrate_scanned"] == before["compact_migrate_scanned"]
    assert after["compact_stall"] - before["compact_stall"] == 1
    assert after["compact_success"] - before["compact_success"] == 1
    assert lab.machine.check() == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["disabled", "no device", "no rank"])
def test_without_a_dpu_the_scanners_serve(how: str) -> None:
    lab = drained(fragmented(nr_ranks=None if how == "no device" else 1))
    if how == "disabled":
        lab.sysctl(dpu_compact_enabled=0)
    if how == "no rank":
        assert lab.hw is not None
        for rank in lab.hw.pool.ranks:
            rank.state = RankState.LOST
    before = lab.vmstat()
    ac = ask(lab, "GFP_KERNEL", 9)
    after = lab.vmstat()
    assert "dpu" not in ac.steps
    assert ac.steps[-1].startswith("compact")
    assert after["compact_success"] - before["compact_success"] == 1
    assert after["compact_migrate_scanned"] > before["compact_migrate_scanned"]
    assert after["dpu_compact_regions"] == 0


@pytest.mark.slow
def test_small_orders_do_not_go_to_the_dpu() -> None:
    lab = Lab((64,))
    lab.spawn("a", anon="56M", holes="50 seed=1")
    lab.alloc(lab.allocator("drain", order="2", gfp="GFP_NOWAIT", count="20000"))
    lab.set("a", touch="1")
    before = lab.stats()
    lab.alloc(lab.allocator("small", order="3", gfp="GFP_KERNEL", count="20"))
    assert lab.stats()["regions"] == before["regions"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("gfp", ["GFP_ATOMIC", "GFP_NOWAIT", "GFP_TRANSHUGE_LIGHT"])
def test_who_may_not_block_never_compacts(gfp: str) -> None:
    lab = fragmented()
    result = lab.alloc(lab.allocator("x", order="9", gfp=gfp, count="100"))
    assert result["allocated"] == result["by_freelist"] < 5
    counted = {name: nr for name, nr in lab.vmstat().items() if name.startswith(("compact_", "allocstall", "dpu_"))}
    assert set(counted.values()) == {0}


@pytest.mark.slow
def test_a_failing_device_leaves_it_to_the_scanners() -> None:
    lab = drained(fragmented(words="full"))  # type: ignore[arg-type]
    for kind in (FaultKind.DPU_FAULT, FaultKind.TIMEOUT):
        lab.arm(kind, 0, times=1000)
    result = lab.alloc(lab.allocator("x", order="9", gfp="GFP_KERNEL", count="3"))
    assert result["allocated"] == 3
    assert lab.stats()["failures"] > 0
    lab.assert_at_rest()


@pytest.mark.slow
def test_a_zone_that_did_not_help_is_passed_by() -> None:
    """Everything pinned: the DPU can do nothing there, and is not asked for the next 1, 3, 7, ... requests."""
    lab = drained(fragmented(anon="48M"))
    lab.set("a", pin="100")
    path = lab.allocator("x", order="9", gfp="GFP_KERNEL|__GFP_NORETRY", count="1")
    tried = []
    for _ in range(12):
        before = sum(deferral.shift for deferral in lab.machine.dpu_direct.deferral)
        lab.alloc(path)
        tried.append(sum(deferral.shift for deferral in lab.machine.dpu_direct.deferral) > before)
    assert tried[0]
    assert tried.count(True) <= 8
    assert not all(tried)


# Failure.


def test_the_log_says_what_failed() -> None:
    lab = drained(fragmented(nr_ranks=None))
    lab.set("a", pin="100")
    nr = len(lab.machine.printk.lines())
    path = lab.allocator("greedy", order="10", gfp="GFP_KERNEL|__GFP_COMP")
    assert errno_of(lab.write, f"{path}/alloc", "1") == errno.ENOMEM
    lines = lab.machine.printk.lines()[nr:]
    assert lines[0] == (
        "greedy: page allocation failure: order:10, mode:0x40cc0(GFP_KERNEL|__GFP_COMP), "
        "nodemask=(null),cpuset=/,mems_allowed=0"
    )
    assert lines[1] == "Mem-Info:"
    assert any(line.startswith("Node 0 DMA32 free:") for line in lines)
    assert lines[-2:] == ["16383 pages RAM", "256 pages reserved"]
    lab.alloc(path, gfp="GFP_KERNEL|__GFP_NOWARN")
    assert len(lab.machine.printk.lines()) == nr + len(lines)


def test_the_log_is_not_flooded() -> None:
    lab = drained(fragmented(nr_ranks=None))
    nr = len(lab.machine.printk.lines())
    lab.alloc(lab.allocator("greedy", order="10", gfp="GFP_ATOMIC", count="25"))
    lines = lab.machine.printk.lines()[nr:]
    assert sum("page allocation failure" in line for line in lines) == 10
    lab.machine.clock.advance(5_000_000_000)  # type: ignore[attr-defined]
    lab.alloc(lab.allocator("again", order="10", gfp="GFP_ATOMIC"))
    assert "warn_alloc: 15 callbacks suppressed" in lab.machine.printk.lines()


@pytest.mark.slow
def test_nofail_waits_for_memory() -> None:
    lab = Lab((32,), nr_ranks=None)
    hog = lab.allocator("hog", gfp="GFP_NOWAIT", count="10000")
    lab.alloc(hog)
    request = lab.machine.slowpath.alloc_pages(parse_gfp("GFP_KERNEL|__GFP_NOFAIL"), 0, 0)
    for _ in range(100):
        assert advance(request) == (False, None)
    lab.write(f"{hog}/free", "1")
    over = [advance(request) for _ in range(40)]
    assert any(ended and isinstance(pfn, int) and pfn > 0 for ended, pfn in over)


# Interrupted.


@pytest.mark.slow
@pytest.mark.parametrize("nr_ranks", [1, None])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 8, 13])
def test_an_interrupted_request_leaves_nothing_behind(nr_ranks: int | None, after: int) -> None:
    lab = drained(fragmented(nr_ranks=nr_ranks))
    free = int(lab.mem.zones["free_pages"].sum())
    request = lab.machine.slowpath.alloc_pages(parse_gfp("GFP_KERNEL|__GFP_RETRY_MAYFAIL"), 9, 0)
    ended: Iterator[bool] = (advance(request)[0] for _ in range(after))
    if not any(ended):
        request.close()
        assert int(lab.mem.zones["free_pages"].sum()) == free
    lab.assert_at_rest()


@pytest.mark.slow
def test_requests_that_take_turns() -> None:
    """Two who allocate, a compaction by hand and a process, all at once."""
    lab = fragmented()
    x, y = (lab.allocator(name, order="9", gfp="GFP_KERNEL|__GFP_RETRY_MAYFAIL", count="8") for name in "xy")
    settle(
        [
            lab.start(f"{x}/alloc", "1"),
            lab.start(f"{y}/alloc", "1"),
            lab.start("/proc/sys/vm/compact_memory", "1"),
            lab.start_set("a", "touch", "20"),
            lab.start_compact(),
        ]
    )
    lab.assert_at_rest()
