# SPDX-License-Identifier: GPL-2.0-only
"""Long waves are moved by two threads: the same result, and nothing lost when one of them fails."""

from collections.abc import Iterator

import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud.dpu import move, program
from dpud.dpu.driver import DpuConfig, DpuDriver
from dpud.dpu.faults import FaultKind

NR_PAGES = 256


@pytest.fixture(autouse=True)
def _short_waves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(program, "PARALLEL_MOVES", 4)
    return


def addresses(pfns: list[int]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.array(pfns, np.uint64) << np.uint64(12)


def segments_by_hand(src: list[int], dst: list[int], smallest: int) -> list[tuple[int, bool]]:
    """(end, in order?) of each segment, straight from the definition of a wave."""
    waves, start = [], 0
    for k in range(len(src) + 1):
        if k == len(src) or dst[k] in src[start:k]:
            waves.append((start, k))
            start = k
    found: list[tuple[int, bool]] = []
    for start, end in waves:
        in_order = end - start < smallest
        if in_order and found and found[-1][1]:
            found.pop()
        found.append((end, in_order))
    return found


fragments = st.lists(st.integers(1, NR_PAGES - 1), min_size=8, max_size=100, unique=True).map(sorted)


@pytest.mark.slow
@settings(deadline=None)
@given(fragments, st.integers(1, 9))
def test_segments_are_the_long_waves_and_what_is_between(src: list[int], nr_dpus: int) -> None:
    dst = list(range(len(src)))
    while dst and dst[-1] >= src[-1]:  # pragma: no branch
        src, dst = src[:-1], dst[:-1]
    kept = [(s, d) for s, d in zip(src, dst, strict=True) if d < s]
    src, dst = [s for s, _ in kept], [d for _, d in kept]
    if not src:
        return
    slots = -(-len(src) // nr_dpus)
    mram = np.zeros((nr_dpus, move.HEAP + 2 * slots), np.int64)
    wram = np.full((nr_dpus, 8), slots, np.int64)
    for i, (s, d) in enumerate(zip(src, dst, strict=True)):
        mram[i // slots, move.HEAP + i % slots] = s << 12
        mram[i // slots, move.HEAP + slots + i % slots] = d << 12
    ends, alone = np.zeros(len(src) + 2, np.int64), np.zeros(len(src) + 2, np.int64)
    nr = move.cut_segments(mram, wram, np.arange(nr_dpus), len(src), 4, ends, alone)
    found = list(zip(ends[:nr].tolist(), (alone[:nr] == 1).tolist(), strict=True))
    assert found == segments_by_hand(src, dst, 4)


@settings(max_examples=examples(60), deadline=None)
@given(
    fragments,
    st.sampled_from([None, *FaultKind]),
    st.integers(0, 99),
    st.sampled_from([1, 3, 64]),
)
def test_no_page_is_lost_whichever_half_fails(src: list[int], kind: FaultKind | None, at: int, nr_dpus: int) -> None:
    base = 0
    frags = [pfn for i, pfn in enumerate(src) if pfn > i]
    frags = [pfn for i, pfn in enumerate(frags) if pfn > i]
    if not frags or any(pfn <= i for i, pfn in enumerate(frags)):
        return
    memory = np.random.default_rng(1).integers(1, 1 << 62, (NR_PAGES, 8)).astype(np.uint64)
    before = memory.copy()
    dpu = DpuDriver(DpuConfig(nr_ranks=1, nr_dpus=nr_dpus))
    dpu.attach(memory)
    if kind is not None:
        dpu.faults.arm(kind, at)
    result = dpu.dpu_hw_compact_execute(base, addresses(frags), len(frags))
    dpu.close()
    fails = kind is not None and at < len(frags)
    assert (result.error is not None) is fails
    assert result.nr_retired == (at if fails and kind is not FaultKind.LOST_COMPLETION else len(frags))
    for i, pfn in enumerate(frags):
        where = i if i < result.nr_retired else pfn
        assert (memory[where] == before[pfn]).all(), (i, pfn, result)
