# SPDX-License-Identifier: GPL-2.0-only
"""The device's second operation: folios from listed places to listed places."""

import errno

import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud.dpu.driver import DpuConfig, DpuDriver
from dpud.dpu.faults import FaultKind
from kernelsim.dpu_hw import DpuResult

PAGE = 4096
NR_PAGES = 256
TEXTS = {
    FaultKind.DPU_FAULT: "dpu is in fault",
    FaultKind.TIMEOUT: "result timeout",
    FaultKind.PARTIAL: "internal error",
    FaultKind.CORRUPT: "corrupted memory",
    FaultKind.RANK_LOST: "driver error",
}

Move = tuple[int, int, int]
"""(source pfn, destination pfn, order)."""


def device(words: int = 8, nr_dpus: int = 4, nr_ranks: int = 1) -> tuple[DpuDriver, np.ndarray, np.ndarray]:
    memory = np.random.default_rng(1).integers(0, 2**63, (NR_PAGES, words), np.uint64)
    hw = DpuDriver(DpuConfig(nr_dpus=nr_dpus, nr_ranks=nr_ranks))
    hw.attach(memory)
    return hw, memory, memory.copy()


def lists(moves: list[Move]) -> tuple[np.ndarray, np.ndarray, int]:
    src = np.array([pfn << 12 | order for pfn, _, order in moves], np.uint64)
    dst = np.array([pfn << 12 for _, pfn, _ in moves], np.uint64)
    return src, dst, len(moves)


def assert_moved(memory: np.ndarray, before: np.ndarray, moves: list[Move], nr_retired: int) -> None:
    """What retired is at its new place, sources are whole, and pages that are no destination are untouched."""
    for src, dst, order in moves[:nr_retired]:
        assert (memory[dst : dst + (1 << order)] == before[src : src + (1 << order)]).all()
    targets = {dst + i for _, dst, order in moves for i in range(1 << order)}
    others = [pfn for pfn in range(NR_PAGES) if pfn not in targets]
    assert (memory[others] == before[others]).all()


@pytest.mark.parametrize("words", [1, 512])
def test_pages_and_large_folios_arrive(words: int) -> None:
    hw, memory, before = device(words)
    moves = [(3, 200, 0), (4, 10, 1), (64, 128, 5), (1, 0, 0), (250, 9, 0)]
    result = hw.dpu_hw_move_execute(*lists(moves))
    assert (result.nr_retired, result.error) == (5, None)
    assert (result.new_addrs // PAGE).tolist() == [200, 10, 128, 0, 9]
    assert_moved(memory, before, moves, 5)


def test_submitted_lists_queue_with_compactions() -> None:
    hw, memory, before = device()
    moves = [(pfn, pfn + 128, 0) for pfn in range(100)]
    completions = [hw.submit_move(*lists(moves[at : at + 20])) for at in range(0, 100, 20)]
    other = hw.submit(200 * PAGE, np.array([240 * PAGE, 241 * PAGE], np.uint64), 2)
    results = [completion.result() for completion in completions if completion.wait(10)]
    assert [result.nr_retired for result in results] == [20] * 5
    assert other.wait(10)
    assert memory[128:228].tolist()[:72] == before[:72].tolist()
    hw.close()


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([(4, 5, 1)], id="destination not aligned to its order"),
        pytest.param([(5, 8, 1)], id="source not aligned"),
        pytest.param([(4, NR_PAGES, 0)], id="beyond memory"),
        pytest.param([(NR_PAGES - 32, 0, 6)], id="a folio that reaches beyond memory"),
        pytest.param([(4, 6, 0), (5, 6, 0)], id="one destination twice"),
        pytest.param([(4, 6, 0), (4, 7, 0)], id="one source twice"),
        pytest.param([(4, 6, 0), (6, 7, 0)], id="a destination that is a source"),
        pytest.param([(4, 4, 0)], id="onto itself"),
        pytest.param([(0, 64, 5), (70, 200, 0)], id="a source inside a destination"),
        pytest.param([(0, 0, 19)], id="larger than 1 GiB"),
    ],
)
def test_an_illegal_list_moves_nothing(bad: list[Move]) -> None:
    hw, memory, before = device()
    result = hw.dpu_hw_move_execute(*lists([(100, 150, 0), *bad]))
    assert (result.nr_retired, result.error) == (0, "invalid mram access")
    assert (memory == before).all()


@pytest.mark.parametrize("kind", TEXTS)
def test_a_failing_device_says_how_far_it_came(kind: FaultKind) -> None:
    hw, memory, before = device()
    hw.faults.arm(kind, 7)
    moves = [(pfn, pfn + 100, 0) for pfn in range(20)]
    result = hw.dpu_hw_move_execute(*lists(moves))
    assert (result.nr_retired, result.error) == (7, TEXTS[kind])
    assert_moved(memory, before, moves, 7)


@settings(max_examples=examples(40), deadline=None)
@given(seed=st.integers(0, 10**6), nr_dpus=st.sampled_from([1, 3, 64]), fail_at=st.integers(0, 60))
def test_any_legal_list(seed: int, nr_dpus: int, fail_at: int) -> None:
    """Aligned slots of mixed orders, half of them sources."""
    rng = np.random.default_rng(seed)
    slots: list[tuple[int, int]] = []
    pfn = 0
    while pfn < NR_PAGES:
        order = int(rng.integers(0, 5))
        while pfn % (1 << order) or pfn + (1 << order) > NR_PAGES:
            order -= 1
        slots.append((pfn, order))
        pfn += 1 << order
    rng.shuffle(slots)
    moves = []
    for order in range(5):
        same = [at for at, its in slots if its == order]
        moves += [(src, dst, order) for src, dst in zip(same[::2], same[1::2], strict=False)]
    hw, memory, before = device(nr_dpus=nr_dpus)
    hw.faults.arm(FaultKind.CORRUPT, fail_at, bit=int(rng.integers(0, 2**16)))
    result = hw.dpu_hw_move_execute(*lists(moves))
    assert result.nr_retired == min(fail_at, len(moves))
    assert_moved(memory, before, moves, result.nr_retired)


def time_of(nr_dpus: int, moves: list[Move]) -> DpuResult:
    return device(nr_dpus=nr_dpus)[0].dpu_hw_move_execute(*lists(moves))


def test_the_modelled_time_is_that_of_the_busiest_dpu() -> None:
    """upmem-v1a: 35 us for the launch, 4372 cycles at 350 MHz for each page (reference dpu.md 6(b)); one wave."""
    page_ns = 4372 / 350 * 1000
    singles = [(pfn, pfn + 100, 0) for pfn in range(10)]
    assert time_of(4, singles).device_ns == round(35_000 + 3 * page_ns)
    assert time_of(1, singles).device_ns == round(35_000 + 10 * page_ns)
    assert time_of(4, [(0, 64, 4), (17, 100, 0)]).device_ns == round(35_000 + 16 * page_ns)


def test_a_misshapen_request_is_refused() -> None:
    hw, _, _ = device()
    src, dst, _ = lists([(1, 2, 0)])
    for args in ((src, dst, 2), (src, dst.astype(np.int64), 1), (src.reshape(1, 1), dst, 1), (src, dst, -1)):
        with pytest.raises(OSError, match="uint64") as refusal:
            hw.dpu_hw_move_execute(*args)
        assert refusal.value.errno == errno.EINVAL


def test_without_a_rank_there_is_no_device() -> None:
    hw, _, _ = device(nr_ranks=0)
    for call in (hw.dpu_hw_move_execute, hw.submit_move):
        with pytest.raises(OSError, match="no DPU rank") as refusal:
            call(*lists([(1, 2, 0)]))
        assert refusal.value.errno == errno.ENODEV


def test_long_lists_are_moved_by_two_threads() -> None:
    nr = 10_000
    memory = np.random.default_rng(3).integers(0, 2**63, (2 * nr, 4), np.uint64)
    before = memory.copy()
    hw = DpuDriver(DpuConfig())
    hw.attach(memory)
    result = hw.dpu_hw_move_execute(*lists([(pfn, pfn + nr, 0) for pfn in range(nr)]))
    assert result.nr_retired == nr
    assert (memory[nr:] == before[:nr]).all()
    hw.close()
