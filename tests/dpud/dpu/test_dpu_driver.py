# SPDX-License-Identifier: GPL-2.0-only
import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud.dpu import move
from dpud.dpu.driver import BatchCompletion, DpuConfig, DpuDriver
from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.faults import FaultKind
from kernelsim.dpu_hw import DpuCompletion, DpuHardware, DpuResult

PAGE = 4096
NR_PAGES = 64
TEXTS = {
    FaultKind.DPU_FAULT: "dpu is in fault",
    FaultKind.TIMEOUT: "result timeout",
    FaultKind.PARTIAL: "internal error",
    FaultKind.CORRUPT: "corrupted memory",
    FaultKind.RANK_LOST: "driver error",
    FaultKind.LOST_COMPLETION: "result timeout",
}
RESULT_TIMEOUT_NS = 10_000_000


def layout_by_hand(base: int, frags: list[int], runs: list[tuple[int, int]]) -> list[int]:
    """The rule of kernelsim/dpu_hw.py over pfns, a page at a time."""
    taken = {start + i for start, nr_pages in runs for i in range(nr_pages)}
    layout, cursor = [], base
    for _ in frags:
        while cursor in taken:
            cursor += 1
        layout.append(cursor)
        cursor += 1
    return layout


def random_memory(seed: int = 0, words: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, (NR_PAGES, words), np.uint64)


def driver(memory: np.ndarray, **config: Any) -> DpuDriver:
    made = DpuDriver(DpuConfig(**({"nr_dpus": 4} | config)))
    made.attach(memory)
    return made


def request(
    base: int, frags: list[int], runs: list[tuple[int, int]] | None = None
) -> tuple[int, np.ndarray, int, np.ndarray | None]:
    """A batch in pfns, as the arguments of `dpu_hw_compact_execute`."""
    addrs = np.array(frags, np.uint64) * np.uint64(PAGE)
    skip = None
    if runs is not None:
        skip = np.array([(start * PAGE, nr_pages) for start, nr_pages in runs], np.uint64).reshape(-1, 2)
    return base * PAGE, addrs, len(frags), skip


def pfns(result: DpuResult) -> list[int]:
    return (result.new_addrs // PAGE).tolist()  # type: ignore[no-any-return]


def as_contract(hw: DpuHardware, completion: DpuCompletion) -> tuple[int, bool]:
    """Type-checks that driver and completion are what the kernel expects."""
    return hw.max_in_flight, completion.done()


def test_moves_pages_and_reports() -> None:
    memory = random_memory(words=512)
    before = memory.copy()
    dpu = driver(memory)
    frags, runs = [9, 12, 13, 20, 33, 40, 41], [(2, 3), (7, 1)]
    result = dpu.dpu_hw_compact_execute(*request(1, frags, runs))
    assert (result.nr_retired, result.error) == (7, None)
    assert pfns(result) == [1, 5, 6, 8, 9, 10, 11]
    assert (memory[pfns(result)] == before[frags]).all()
    assert (memory[[2, 3, 4, 7]] == before[[2, 3, 4, 7]]).all()
    assert result.wall_ns > dpu.pool.ranks[0].run_ns > 0
    assert dpu.last_log == ""
    assert (dpu.stats.nr_batches, dpu.stats.nr_pages_retired, dict(dpu.stats.errors)) == (1, 7, {})
    assert (dpu.stats.device_ns, dpu.stats.wall_ns) == (result.device_ns, result.wall_ns)
    assert as_contract(dpu, BatchCompletion()) == (2, False)


def test_an_empty_batch() -> None:
    result = driver(random_memory()).dpu_hw_compact_execute(*request(0, []))
    assert (result.nr_retired, result.error, result.new_addrs.shape) == (0, None, (0,))


def test_page_sums_are_in_mram() -> None:
    memory = random_memory(words=1)
    dpu = driver(memory, nr_dpus=1)
    dpu.dpu_hw_compact_execute(*request(0, [3, 5]))
    sums = dpu.pool.ranks[0].words_of(1)[0, move.HEAP + 4 : move.HEAP + 6]  # type: ignore[arg-type]
    assert sums.tolist() == memory[:2, 0].tolist()


@pytest.mark.parametrize(
    ("base", "frags", "runs"),
    [
        (10, [8, 20], None),  # up
        (8, [8, 20], None),  # onto itself
        (0, [8, 20], [(0, 9)]),  # up, over a skip run
        (0, [8, 8], None),  # twice the same
        (0, [20, 8], None),  # descending
        (0, [8, NR_PAGES], None),  # beyond the end of memory
        (0, [8, 20], [(5, 1), (0, 1)]),  # skip runs not in order
        (0, [8, 2**49], None),
    ],
)
def test_an_illegal_batch_moves_nothing(base: int, frags: list[int], runs: list[tuple[int, int]] | None) -> None:
    memory = random_memory()
    before = memory.copy()
    dpu = driver(memory)
    result = dpu.dpu_hw_compact_execute(*request(base, frags, runs))
    assert (result.nr_retired, result.error) == (0, "invalid mram access")
    assert pfns(result) == frags
    assert (memory == before).all()
    assert dict(dpu.stats.errors) == {"DPU_ERR_INVALID_MRAM_ACCESS": 1}


@pytest.mark.parametrize("which", ["base", "fragment", "skip run", "huge run", "huge fragment"])
def test_misaligned_or_wild_addresses_are_refused(which: str) -> None:
    base, frags, nr, skip = request(0, [8, 20], [(1, 1)])
    assert skip is not None
    if which == "base":
        base += 8
    elif which == "fragment":
        frags[1] += 8
    elif which == "skip run":
        skip[0, 0] += 8
    elif which == "huge run":
        skip[0, 1] = 2**63
    else:
        frags[1] = 2**64 - PAGE
    result = driver(random_memory()).dpu_hw_compact_execute(base, frags, nr, skip)
    assert (result.nr_retired, result.error) == (0, "invalid mram access")


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_refused() -> None:
    dpu = driver(random_memory(), nr_dpus=1)
    dpu.dpu_hw_compact_execute(*request(0, [5]))
    too_many = np.arange((63 << 20) // 8 + 1, dtype=np.uint64)
    result = dpu.dpu_hw_compact_execute(0, too_many, len(too_many))
    assert (result.nr_retired, result.error) == (0, "invalid memory symbol access")
    assert (result.new_addrs == too_many & ~np.uint64(PAGE - 1)).all()


@pytest.mark.parametrize(
    "bad",
    [
        (0, np.zeros(2, np.uint64), 3, None),
        (0, np.zeros(2, np.uint64), -1, None),
        (0, np.zeros((2, 2), np.uint64), 2, None),
        (0, np.zeros(2, np.int64), 2, None),
        (-PAGE, np.zeros(2, np.uint64), 2, None),
        (0, np.zeros(2, np.uint64), 2, np.zeros(4, np.uint64)),
    ],
)
def test_a_misshapen_request_is_einval(bad: tuple[Any, ...]) -> None:
    with pytest.raises(OSError, match="must be") as caught:
        driver(random_memory()).dpu_hw_compact_execute(*bad)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("kind", [kind for kind in FaultKind if kind is not FaultKind.LOST_COMPLETION])
def test_after_a_fault_nothing_is_lost_and_the_rest_can_go_on(kind: FaultKind) -> None:
    memory = random_memory()
    before = memory.copy()
    dpu = driver(memory, nr_ranks=2)
    dpu.faults.arm(kind, 2, bit=1000)
    frags = [10, 11, 30, 31]
    result = dpu.dpu_hw_compact_execute(*request(0, frags))
    assert (result.nr_retired, result.error) == (2, TEXTS[kind])
    assert pfns(result) == [0, 1, 2, 3]
    assert (memory[[0, 1, 30, 31]] == before[frags]).all()
    assert sum(dpu.stats.errors.values()) == 1
    again = dpu.dpu_hw_compact_execute(*request(2, frags[2:]))
    assert (again.nr_retired, again.error) == (2, None)
    assert (memory[:4] == before[frags]).all()
    waited = result.device_ns - again.device_ns
    assert waited == (RESULT_TIMEOUT_NS if kind is FaultKind.TIMEOUT else 0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_lost_completion_is_recovered_by_the_timeout(asynchronous: bool) -> None:
    """The device did it all; the host finds out 10 ms later, by its own patience, and reads the retire counter."""
    memory = random_memory()
    before = memory.copy()
    dpu = driver(memory)
    dpu.faults.arm(FaultKind.LOST_COMPLETION)
    frags = [10, 11, 30, 31]
    if asynchronous:
        completion = dpu.submit(*request(0, frags))
        assert completion.wait(10)
        result = completion.result()
        assert result.wall_ns >= RESULT_TIMEOUT_NS
    else:
        result = dpu.dpu_hw_compact_execute(*request(0, frags))
    assert (result.nr_retired, result.error, result.reason) == (4, "result timeout", "timeout")
    assert (memory[:4] == before[frags]).all()
    assert pfns(result) == [0, 1, 2, 3]
    again = dpu.dpu_hw_compact_execute(*request(0, [40]))  # the rank works again
    assert again.error is None
    assert result.device_ns > RESULT_TIMEOUT_NS
    dpu.close()


BATCHES = st.tuples(
    st.integers(0, 20),
    st.sets(st.integers(1, NR_PAGES - 1), min_size=1).map(sorted),
    st.lists(st.tuples(st.integers(0, NR_PAGES), st.integers(0, 5)), max_size=6).map(sorted),
)
FAULTS = st.lists(st.tuples(st.sampled_from(FaultKind), st.integers(0, 20), st.integers(0, 600)), max_size=2)


@settings(max_examples=examples(150), deadline=None)
@given(BATCHES, FAULTS, st.sampled_from([1, 3, 64]), st.sampled_from([1, 8]), st.integers(0, 2**32 - 1))
@pytest.mark.slow
def test_a_page_is_never_lost(
    batch: tuple[int, list[int], list[tuple[int, int]]],
    faults: list[tuple[FaultKind, int, int]],
    nr_dpus: int,
    words: int,
    seed: int,
) -> None:
    base, frags, runs = batch
    layout = layout_by_hand(base, frags, runs)
    frags = [frag for frag, new in zip(frags, layout, strict=True) if new < frag]
    layout = layout_by_hand(base, frags, runs)
    legal = all(new < frag for frag, new in zip(frags, layout, strict=True))
    memory = random_memory(seed, words)
    before = memory.copy()
    dpu = driver(memory, nr_dpus=nr_dpus)
    for kind, at, bit in faults:
        dpu.faults.arm(kind, at, bit=bit)
    hits = [kind for kind in FaultKind if dpu.faults.points[kind].probability]
    hits = [kind for kind in hits if dpu.faults.points[kind].move < len(frags)]
    winner = min(hits, key=lambda kind: dpu.faults.points[kind].move, default=None)
    first = len(frags)
    if winner and winner is not FaultKind.LOST_COMPLETION:
        first = dpu.faults.points[winner].move

    result = dpu.dpu_hw_compact_execute(*request(base, frags, runs))

    n = result.nr_retired
    if not legal:
        assert (n, pfns(result)) == (0, frags)
        assert (memory == before).all()
        return
    assert n == first
    assert pfns(result) == layout
    assert result.error == (TEXTS[winner] if winner else None)
    assert (memory[layout[:n]] == before[frags[:n]]).all()
    assert (memory[frags[n:]] == before[frags[n:]]).all()
    changed = set(np.flatnonzero((memory != before).any(axis=1)).tolist())
    assert changed <= set(layout[: n + 1])


def folios_by_hand(base: int, folios: list[tuple[int, int]], runs: list[tuple[int, int]]) -> list[int]:
    """The same rule with folios (pfn, order): the first aligned place that no skip run touches."""
    taken = {start + i for start, nr_pages in runs for i in range(nr_pages)}
    layout, cursor = [], base
    for _, order in folios:
        size = 1 << order
        while cursor % size or taken.intersection(range(cursor, cursor + size)):
            cursor += 1
        layout.append(cursor)
        cursor += size
    return layout


FOLIOS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=12)


@settings(max_examples=examples(150), deadline=None)
@given(FOLIOS, st.sets(st.integers(0, 40), max_size=8), st.sampled_from([None, *FaultKind]), st.integers(0, 14))
@pytest.mark.slow
def test_folios_move_whole_and_none_is_lost(
    sizes: list[tuple[int, int]], taken: set[int], kind: FaultKind | None, at: int
) -> None:
    """Folios of orders 0 to 3 with gaps between; a fault before, in or behind the batch."""
    folios, cursor = [], 6
    for order, gap in sizes:
        pfn = -(-(cursor + gap) // (1 << order)) << order
        folios.append((pfn, order))
        cursor = pfn + (1 << order)
    inside = {page for pfn, order in folios for page in range(pfn, pfn + (1 << order))}
    runs = [(pfn, 1) for pfn in sorted(taken - inside)]
    kept: list[tuple[int, int]] = []
    for pfn, order in folios:  # as the kernel chooses: what has no place below it stays, and is in the way
        if folios_by_hand(0, [*kept, (pfn, order)], runs)[-1] + (1 << order) <= pfn:
            kept.append((pfn, order))
        else:
            runs = sorted([*runs, (pfn, 1 << order)])
    if not kept:
        return
    memory = np.random.default_rng(3).integers(0, 2**63, (256, 8), np.uint64)
    before = memory.copy()
    dpu = driver(memory, nr_dpus=3)
    if kind is not None:
        dpu.faults.arm(kind, at, bit=8 * 64 * 5 + 3)
    entries = np.array([pfn << 12 | order for pfn, order in kept], np.uint64)
    skip = np.array([(start * PAGE, nr_pages) for start, nr_pages in runs], np.uint64).reshape(-1, 2)
    result = dpu.dpu_hw_compact_execute(0, entries, len(entries), skip)
    layout = folios_by_hand(0, kept, runs)
    assert pfns(result) == layout
    stops = kind not in (None, FaultKind.LOST_COMPLETION) and at < len(kept)
    assert result.nr_retired == (at if stops else len(kept))
    assert dpu.stats.nr_pages_retired == sum(1 << order for _, order in kept[: result.nr_retired])
    for i, (pfn, order) in enumerate(kept):
        where, size = (layout[i] if i < result.nr_retired else pfn), 1 << order
        assert (memory[where : where + size] == before[pfn : pfn + size]).all()
    for start, nr_pages in runs:
        assert (memory[start : start + nr_pages] == before[start : start + nr_pages]).all()


@pytest.mark.parametrize(
    "entry",
    [
        20 << 12 | 3,  # not aligned to its size
        16 << 12 | 11,  # no such order
        56 << 12 | 4,  # beyond the end of memory
        4 << 12 | 2,  # its place would overlap it
    ],
)
def test_illegal_folios_are_refused(entry: int) -> None:
    memory = random_memory()
    before = memory.copy()
    result = driver(memory).dpu_hw_compact_execute(1 * PAGE, np.array([entry], np.uint64), 1)
    assert (result.nr_retired, result.error) == (0, "invalid mram access")
    assert pfns(result) == [entry >> 12]
    assert (memory == before).all()


def test_time_is_modelled_by_profile_and_waves() -> None:
    """Overlapping moves 4,5,6,7 -> 3,4,5,6 are four waves: four launches of 35 us, four pages of 12.49 us."""
    result = driver(random_memory()).dpu_hw_compact_execute(*request(3, [4, 5, 6, 7]))
    assert result.device_ns == pytest.approx(4 * (35_000 + 12_491), abs=10)
    many = driver(random_memory(), nr_dpus=2).dpu_hw_compact_execute(*request(0, [50, 51, 52, 53, 54]))
    assert many.device_ns == pytest.approx(35_000 + 3 * 12_491, abs=10)


def test_disabled_dpus_are_left_out() -> None:
    memory = random_memory()
    before = memory.copy()
    dpu = driver(memory, nr_dpus=4, disabled_mask=0b0101)
    dpu.faults.arm(FaultKind.DPU_FAULT, 9)  # behind the end of this batch
    result = dpu.dpu_hw_compact_execute(*request(0, [50, 51, 52, 53, 54]))
    assert (memory[:5] == before[50:55]).all()
    assert result.device_ns == pytest.approx(35_000 + 3 * 12_491, abs=10)
    dpu.faults.arm(FaultKind.DPU_FAULT, 1)
    assert dpu.dpu_hw_compact_execute(*request(0, [50, 51])).nr_retired == 1
    assert dpu.last_log == "=== DPU#0x30000001 ===\ndpu_compact: 1 pages moved, status 0\n"


def test_seed_and_host_profiles() -> None:
    seed = driver(random_memory(), profile="seed")
    assert seed.dpu_hw_compact_execute(*request(0, [50, 51])).device_ns == round(2 * 234567 / 128)
    assert seed.engine.mapping_update_ns(64, 1) == 123456
    host = driver(random_memory(), profile="host")
    assert host.dpu_hw_compact_execute(*request(0, [50])).device_ns == host.pool.ranks[0].run_ns


def test_no_device_is_enodev() -> None:
    none = DpuDriver(DpuConfig(nr_ranks=0))
    lost = driver(random_memory())
    lost.faults.arm(FaultKind.RANK_LOST)
    lost.dpu_hw_compact_execute(*request(0, [5]))
    for dpu in (none, lost):
        for call in (dpu.dpu_hw_compact_execute, dpu.submit):
            with pytest.raises(OSError, match="no DPU rank") as caught:
                call(*request(0, [5]))
            assert caught.value.errno == errno.ENODEV
    lost.pool.ranks[0].revive()
    assert lost.dpu_hw_compact_execute(*request(0, [5])).error is None


@pytest.mark.parametrize("bad", [{"nr_ranks": -1}, {"nr_dpus": 0}, {"nr_dpus": 65}, {"disabled_mask": -1}])
def test_impossible_config(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="nr_dpus 1 to 64"):
        DpuConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(DpuError, match="invalid profile"):
        replace(DpuConfig(), profile="none")


def test_memory_must_be_words_of_whole_pages() -> None:
    with pytest.raises(ValueError, match="C-contiguous"):
        DpuDriver().attach(np.zeros((8, 8), np.uint64)[:, ::2])


class HeldRank:
    """Keeps a driver's ranks busy: their programs wait until `let_go`."""

    def __init__(self, dpu: DpuDriver) -> None:
        self.running = threading.Semaphore(0)
        self.let_go = threading.Event()
        for rank in dpu.pool.ranks:
            rank.execute = partial(self._execute, rank.execute)  # type: ignore[method-assign]

    def _execute(self, execute: Callable[[Any], DpuErr], dpus: Any) -> DpuErr:
        self.running.release()
        assert self.let_go.wait(10)
        return execute(dpus)


def test_submit_queues_behind_busy_ranks() -> None:
    memory = random_memory()
    before = memory.copy()
    dpu = driver(memory, nr_ranks=2)
    held = HeldRank(dpu)
    batches = [dpu.submit(*request(4 * i, [40 + 4 * i, 41 + 4 * i])) for i in range(dpu.max_in_flight)]
    assert held.running.acquire(timeout=10)
    assert held.running.acquire(timeout=10)
    assert not any(batch.done() for batch in batches)
    assert not batches[0].wait(0.0)
    with pytest.raises(OSError, match="no DPU rank is free") as caught:
        dpu.dpu_hw_compact_execute(*request(30, [35]))
    assert caught.value.errno == errno.ENOMEM
    held.let_go.set()
    for i, batch in enumerate(batches):
        assert batch.wait(10)
        assert batch.done()
        assert (batch.result().nr_retired, batch.result().error) == (2, None)
        assert (memory[4 * i : 4 * i + 2] == before[40 + 4 * i : 42 + 4 * i]).all()
    dpu.close()
    assert dpu.stats.nr_batches == 3
    assert not any(rank.is_owned for rank in dpu.pool.ranks)


def test_close_ends_all_batches_first() -> None:
    others = set(threading.enumerate())
    dpu = driver(random_memory(), nr_ranks=2)
    batches = [dpu.submit(*request(4 * i, [40 + 4 * i])) for i in range(6)]
    dpu.close()
    assert [batch.result().nr_retired for batch in batches] == [1] * 6
    assert set(threading.enumerate()) <= others


def test_batches_that_wait_for_the_last_rank_fail_when_it_goes() -> None:
    dpu = driver(random_memory())
    dpu.faults.arm(FaultKind.RANK_LOST, 1)
    held = HeldRank(dpu)
    first, second = dpu.submit(*request(0, [40, 41])), dpu.submit(*request(4, [50, 51]))
    held.let_go.set()
    assert first.wait(10)
    assert (first.result().nr_retired, first.result().error) == (1, "driver error")
    assert second.wait(10)
    with pytest.raises(OSError, match="no DPU rank is present"):
        second.result()
    dpu.close()


def test_with_one_rank_lost_the_others_go_on() -> None:
    memory = random_memory()
    before = memory.copy()
    dpu = driver(memory, nr_ranks=2)
    dpu.faults.arm(FaultKind.RANK_LOST)
    outcomes = [dpu.submit(*request(8 * i, [40 + 8 * i])) for i in range(3)]
    assert all(outcome.wait(10) for outcome in outcomes)
    retired = [outcome.result().nr_retired for outcome in outcomes]
    assert sorted(retired) == [0, 1, 1]
    for i, n in enumerate(retired):
        assert (memory[8 * i if n else 40 + 8 * i] == before[40 + 8 * i]).all()
    dpu.close()


def test_a_host_without_memory_for_the_banks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    dpu = driver(random_memory())
    monkeypatch.setattr("dpud.dpu.rank.mmap.mmap", no_memory)
    batch = dpu.submit(*request(0, [5]))
    assert batch.wait(10)
    assert (batch.result().nr_retired, batch.result().error) == (0, "dpu allocation error")
    dpu.close()


def test_each_loop_is_compiled_once() -> None:
    """Whatever the shape of the rank and the way a batch ends: no user waits for a compiler in the middle."""
    for nr_dpus in (1, 64):
        dpu = driver(random_memory(), nr_dpus=nr_dpus)
        for kind in FaultKind:
            dpu.faults.arm(kind)
            dpu.dpu_hw_compact_execute(*request(0, [5, 6], [(1, 1)]))
            dpu.pool.ranks[0].revive()
    loops: tuple[Any, ...] = (move.plan_layout, move.move_pages, move.count_waves, move.deal_slices)
    assert [len(loop.signatures) for loop in loops] == [1, 1, 1, 1]
