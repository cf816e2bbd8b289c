# SPDX-License-Identifier: GPL-2.0-only
"""Plans of the suballocator, against an exact search that knows nothing of them."""

import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud.bench.gpu.defrag import crowded_case
from dpud.bench.gpu.min_moves import least_displaced, least_moved
from dpud.gpu.defrag.heap import ALIGNMENT, Block, Heap, rounded
from dpud.gpu.defrag.plan import plan

UNIT = ALIGNMENT


@st.composite
def heaps(draw: st.DrawFn) -> tuple[Heap, list[Block]]:
    """Small ones with up to five blocks, some of them pinned."""
    heap = Heap(draw(st.integers(5, 12)) * UNIT)
    blocks = [block for size in draw(st.lists(st.integers(1, 5), max_size=9)) if (block := heap.alloc(size * UNIT))]
    for gone in draw(st.permutations(range(len(blocks))))[: draw(st.integers(max(0, len(blocks) - 5), len(blocks)))]:
        heap.free(blocks[gone])
    alive = [block for block in blocks if block.is_live]
    for block in alive:
        if draw(st.integers(0, 5)) == 0:
            block.pins.append(("nic", "test"))
    return heap, alive


def carry_out(heap: Heap, size: int) -> int | None:
    """Do what is planned -> bytes moved; None where there is no plan."""
    found = plan(heap, size)
    if found is None:
        return None
    for move in found.moves:
        assert heap.begin_move(move.block, move.target)
        heap.end_move(move.block)
        assert heap.check() == []
    assert heap.largest_hole >= size
    return found.nr_bytes


@settings(max_examples=examples(150), deadline=None)
@given(heaps(), st.integers(1, 12))
def test_small_cases_move_no_more_than_the_minimum(made: tuple[Heap, list[Block]], wanted: int) -> None:
    """Twice the minimum would do; where all layouts can be tried, it is the minimum."""
    heap, blocks = made
    starts, sizes = tuple(block.start // UNIT for block in blocks), [block.size // UNIT for block in blocks]
    pinned = [bool(block.pins) for block in blocks]
    exact = least_moved(starts, sizes, pinned, heap.nr_bytes // UNIT, wanted)
    moved = carry_out(heap, wanted * UNIT)
    assert moved == (None if exact is None else exact * UNIT)
    assert [block.start // UNIT for block in blocks if block.pins] == [
        start for start, pin in zip(starts, pinned, strict=True) if pin
    ]


@pytest.mark.slow
@pytest.mark.parametrize("nr_blocks", [9, 10, 11, 12])
def test_nine_to_twelve_blocks_move_at_most_twice_the_minimum(nr_blocks: int) -> None:
    """Against a bound from below: bytes that are elsewhere in the cheapest layout that has the hole."""
    cases = [crowded_case(seed) for seed in range(nr_blocks - 9, 48, 4)]
    ratios = [ours / bound for ours, bound in filter(None, cases)]
    assert len(ratios) >= 6
    assert 1 <= min(ratios) <= max(ratios) <= 2


@pytest.mark.slow
@settings(max_examples=examples(20), deadline=None)
@given(heaps(), st.integers(1, 12))
def test_the_bound_is_one(made: tuple[Heap, list[Block]], wanted: int) -> None:
    """Never above what moves really are needed, and possible wherever they are."""
    heap, blocks = made
    starts, sizes = tuple(block.start // UNIT for block in blocks), [block.size // UNIT for block in blocks]
    pinned = [bool(block.pins) for block in blocks]
    exact = least_moved(starts, sizes, pinned, heap.nr_bytes // UNIT, wanted)
    if exact is not None:
        bound = least_displaced(starts, sizes, pinned, heap.nr_bytes // UNIT, wanted)
        assert bound is not None
        assert bound <= exact


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_blocks_never_fail_while_enough_is_free(seed: int) -> None:
    """Also at 100 percent, where the last hole has to be made of all others."""
    rng, heap, live = np.random.default_rng(seed), Heap(256 * 1024), list[Block]()
    for _ in range(600):
        size = int(np.exp(rng.uniform(np.log(64), np.log(16384))))
        if heap.live_bytes + rounded(size) > heap.nr_bytes:
            heap.free(live.pop(int(rng.integers(len(live)))))
            continue
        block = heap.alloc(size)
        if block is None:
            assert carry_out(heap, rounded(size)) is not None
            block = heap.alloc(size)
        assert block is not None
        live.append(block)
    assert heap.check() == []
