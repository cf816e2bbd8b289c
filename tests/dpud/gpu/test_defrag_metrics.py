# SPDX-License-Identifier: GPL-2.0-only
"""Fragmentation in numbers, held against a real kernel's."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dpud.gpu.address_space.frames import MAX_ORDER, FramePool
from dpud.gpu.defrag.metrics import extfrag_index, of_frames, scattered, unusable_index


@pytest.fixture
def extfrag(tmp_path: Path) -> Iterator[Path]:
    if subprocess.run(["mount", "-t", "debugfs", "none", tmp_path], capture_output=True, check=False).returncode:
        pytest.skip("debugfs cannot be mounted")
    yield tmp_path / "extfrag"
    subprocess.run(["umount", tmp_path], check=True)


def zones(text: str) -> dict[str, list[str]]:
    """`Node 0, zone Normal` -> the columns behind it."""
    return {head: rest.split() for head, rest in re.findall(r"^(Node \d+, zone +\w+) +(.*)$", text, re.MULTILINE)}


@pytest.mark.host
def test_both_indices_are_the_running_kernel_s(extfrag: Path) -> None:
    """buddyinfo's counts, with which extfrag's files were made: read before and after, until nothing changed."""
    for _ in range(500):
        before = Path("/proc/buddyinfo").read_text()
        unusable, index = ((extfrag / name).read_text() for name in ("unusable_index", "extfrag_index"))
        if Path("/proc/buddyinfo").read_text() == before:
            break
    else:
        pytest.skip("free memory does not stand still here")
    for zone, columns in zones(before).items():
        blocks = [int(nr) for nr in columns]
        for shown, ours in ((zones(unusable), unusable_index), (zones(index), extfrag_index)):
            wanted = [round(float(value) * 1000) for value in shown[zone]]
            assert [ours(blocks, order) for order in range(len(blocks))] == wanted, zone


def test_nothing_free_and_all_free() -> None:
    none, whole = [0] * 11, [0] * 10 + [4]
    assert (unusable_index(none, 10), extfrag_index(none, 10), scattered([])) == (1000, 0, 0)
    assert (unusable_index(whole, 10), extfrag_index(whole, 10), scattered([4])) == (0, -1000, 0)
    assert scattered([1, 1, 1, 1]) == 0.75


def test_of_frames_counts_what_numpy_counts() -> None:
    pool, rng = FramePool(8 << 20), np.random.default_rng(4)
    held = [pool.alloc(int(order), np.array([key])) for key, order in enumerate(rng.integers(0, 6, 300))]
    orders = np.random.default_rng(4).integers(0, 6, 300)
    for key in range(0, 300, 2):
        pool.free(held[key], int(orders[key]), np.array([key]))
    free = pool.owner == -1
    found = of_frames(pool, 10)
    longest = max(len(run) for run in "".join("x" if each else " " for each in free).split())
    assert found.largest_hole_bytes == longest * 2048
    assert found.scattered == pytest.approx(1 - longest / free.sum())
    in_use = free.reshape(-1, 1024)[(~free).reshape(-1, 1024).any(axis=1)]
    assert found.slack_bytes == in_use.sum() * 2048
    whole = free.reshape(-1, 1024).all(axis=1).sum() * 1024
    assert found.unusable_index == (free.sum() - whole) * 1000 // free.sum()
    assert len(pool.free_blocks()) == MAX_ORDER + 1
