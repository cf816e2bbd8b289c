# SPDX-License-Identifier: GPL-2.0-only
"""The hash over all that can be reached: equal for equal things, another for any difference, the same elsewhere."""

import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import Lab

from kernelsim.digest import Digest
from kernelsim.ratelimit import Ratelimit


def digest(root: Any, skip: tuple[str, ...] = ()) -> str:
    found = Digest(("kernelsim",), skip)
    found.add(root)
    return found.hexdigest()


def limit(**values: Any) -> Ratelimit:
    one = Ratelimit(lambda: 0)
    vars(one).update(values)
    return one


DIFFERENT = [
    *(None, 0, False, "0", b"0", 0.0, [], (), {}, set(), [0], [[0]], [0, 0], {0: 1}, {1: 0}, {"a", "b"}, {"a"}),
    *(deque([1]), np.zeros(2), np.zeros(2, dtype=np.int8), np.zeros((1, 2)), np.float64(0)),
    *(limit(x=1), limit(x=2), limit(y=1), np.random.default_rng(0), np.random.default_rng(1)),
]


def test_different_things_have_different_hashes() -> None:
    assert len({digest(thing) for thing in DIFFERENT}) == len(DIFFERENT)


def test_sharing_counts_and_cycles_end() -> None:
    one: list[Any] = [1]
    assert digest([one, one]) != digest([[1], [1]])
    one.append(one)
    other: list[Any] = [1]
    other.append(other)
    assert digest(one) == digest(other)


def test_of_what_cannot_change_nobody_can_tell_how_many_there_are() -> None:
    """A constant of the program is one; a checkpoint brings back two."""
    one, other = tuple(range(3)), tuple(range(3))
    assert one is not other
    assert digest([one, one]) == digest([one, other])


def test_a_generator_that_was_used_is_another() -> None:
    rng = np.random.default_rng(3)
    before = digest(rng)
    rng.random()
    assert digest(rng) != before


def test_what_is_skipped_does_not_count() -> None:
    assert digest(limit(x=1, y=3), ("x",)) == digest(limit(x=2, y=3), ("x",))


@pytest.mark.slow
def test_a_long_chain_is_no_problem() -> None:
    chain: list[Any] = []
    for _ in range(100_000):
        chain = [chain]
    assert len(digest(chain)) == 64
    while chain:  # taken apart, or its end would need as deep a stack
        (chain,) = chain


def small() -> Lab:
    lab = Lab((32,), nr_ranks=None)
    lab.spawn("a", anon="2M")
    return lab


@pytest.mark.slow
def test_another_process_comes_to_the_same() -> None:
    code = "from test_digest import small; print(small().machine.whole_hash())"
    hashes = {
        subprocess.check_output(
            [sys.executable, "-c", f"import dpud; {code}"],
            env=os.environ | {"PYTHONPATH": ":".join([*sys.path, str(Path(__file__).parent)]), "PYTHONHASHSEED": seed},
            text=True,
        ).strip()
        for seed in ("1", "2")
    }
    lab = small()
    assert hashes == {lab.machine.whole_hash()}
    lab.sysctl(extfrag_threshold=499)
    assert lab.machine.whole_hash() not in hashes
