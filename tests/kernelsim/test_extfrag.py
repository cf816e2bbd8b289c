# SPDX-License-Identifier: GPL-2.0-only
"""The fragmentation indices and their files, against a real kernel's and against numbers worked out by hand."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from machines import Lab

from dpud.capture import DEMO
from kernelsim.extfrag import ExtfragDebugfs, fragmentation_score_node, fragmentation_score_zone
from kernelsim.mmzone import ZONE_NORMAL, Mem, zone_names

EXTFRAG = "/sys/kernel/debug/extfrag"
LINE = re.compile(r"Node (\d+), zone +(\w+) (.*)")


def zones_from(buddyinfo: str) -> Mem:
    """Zones with these free blocks and nothing else; spans mean nothing."""
    lines = [match.groups() for match in map(LINE.match, buddyinfo.splitlines()) if match]
    spans = [
        (int(nid), zone_names.index(name), 1024 * number, 1024 * (number + 1))
        for number, (nid, name, _) in enumerate(lines)
    ]
    nr_nodes = 1 + max(span[0] for span in spans)
    mem = Mem(spans, np.full((nr_nodes, nr_nodes), 10))
    mem.zones["present"] = mem.zones["managed"] = 1024
    for zone, (_, _, counts) in zip(mem.zones, lines, strict=True):
        zone["nr_free"][:, 1] = [int(count) for count in counts.split()]
    return mem


def texts(mem: Mem) -> tuple[str, str]:
    files = ExtfragDebugfs(mem)
    return files._extfrag_index(), files._unusable_index()


def test_the_demos_files_come_out_as_its_kernel_wrote_them() -> None:
    extfrag_index, unusable_index = texts(zones_from((DEMO / "buddyinfo.end").read_text()))
    assert extfrag_index == (DEMO / "extfrag_index").read_text()
    assert unusable_index == (DEMO / "unusable_index").read_text()


FREE = {
    # free blocks by order, then for some orders (extfrag_index, unusable_index)
    "none": ("0 0 0 0 0 0 0 0 0 0 0", {0: ("0.000", "1.000"), 10: ("0.000", "1.000")}),
    # order 1: 1000 - (1000 + 1000 / 2) / 1 = -500, which C prints as 0.-500
    "one page": ("1 0 0 0 0 0 0 0 0 0 0", {0: ("-1.000", "0.000"), 1: ("0.-500", "1.000")}),
    # order 1: 1000 - (1000 + 1000 * 1000 / 2) / 1000 = 499; order 9: 1000 - (1000 + 1000 * 1000 / 512) / 1000 = 998
    "1000 pages": ("1000 0 0 0 0 0 0 0 0 0 0", {1: ("0.499", "1.000"), 9: ("0.998", "1.000")}),
    # 4 blocks of order 8: 1000 - (1000 + 1024000 / 512) / 4 = 250
    "four of order 8": ("0 0 0 0 0 0 0 0 4 0 0", {8: ("-1.000", "0.000"), 9: ("0.250", "1.000")}),
    # 612 pages, 512 of them in a block of order 9: 100 / 612 = 0.163; for order 10: 1000 - (1000 + 597) / 101 = 985
    "mixed": ("100 0 0 0 0 0 0 0 0 1 0", {9: ("-1.000", "0.163"), 10: ("0.985", "1.000")}),
    # a block of order 10 serves two of order 9
    "order 10": ("0 0 0 0 0 0 0 0 0 0 1", {9: ("-1.000", "0.000"), 10: ("-1.000", "0.000")}),
}


@pytest.mark.parametrize("case", FREE)
def test_indices_worked_out_by_hand(case: str) -> None:
    counts, expected = FREE[case]
    columns = [text.split()[4:] for text in texts(zones_from(f"Node 0, zone   Normal {counts}\n"))]
    assert {order: tuple(column[order] for column in columns) for order in expected} == expected


def test_a_line_is_laid_out_as_the_kernel_does() -> None:
    mem = zones_from("Node 1, zone      DMA 3 0 0 0 0 0 0 0 0 0 0\nNode 1, zone   Normal 0 0 0 0 0 0 0 0 0 1 0\n")
    extfrag_index, unusable_index = texts(mem)
    assert extfrag_index.splitlines() == [
        "Node 1, zone      DMA -1.000  0.167  0.417  0.542  0.605  0.636  0.652  0.659  0.663  0.665  0.666 ",
        "Node 1, zone   Normal -1.000 -1.000 -1.000 -1.000 -1.000 -1.000 -1.000 -1.000 -1.000 -1.000  0.-500 ",
    ]
    assert unusable_index.splitlines() == [
        "Node 1, zone      DMA 0.000 1.000 1.000 1.000 1.000 1.000 1.000 1.000 1.000 1.000 1.000 ",
        "Node 1, zone   Normal 0.000 0.000 0.000 0.000 0.000 0.000 0.000 0.000 0.000 0.000 1.000 ",
    ]


# Scores.


@pytest.mark.parametrize(
    ("counts", "score"),
    [
        ("0 0 0 0 0 0 0 0 0 0 0", 0),
        ("0 0 0 0 0 0 0 0 0 1 3", 0),
        ("9 0 0 0 0 0 0 0 0 0 0", 100),
        ("512 0 0 0 0 0 0 0 0 1 0", 50),
        ("100 0 0 0 0 0 0 0 0 1 0", 16),
    ],
)
def test_the_score_is_the_part_of_free_memory_that_is_not_in_huge_pages(counts: str, score: int) -> None:
    mem = zones_from(f"Node 0, zone   Normal {counts}\n")
    assert fragmentation_score_zone(mem.zones, 0) == score


def test_a_nodes_score_weighs_its_zones_by_size() -> None:
    """1000 pages at 100 and 3000 at 50, over 4001: 24 + 37, each rounded down."""
    mem = zones_from("Node 0, zone      DMA 9 0 0 0 0 0 0 0 0 0 0\nNode 0, zone   Normal 512 0 0 0 0 0 0 0 0 1 0\n")
    mem.zones["present"] = [1000, 3000]
    assert fragmentation_score_node(mem, 0) == 24 + 37


# The files.


def test_the_files_follow_compaction() -> None:
    lab = Lab((32, 32), nr_ranks=None)
    lab.spawn("a", anon="26M", holes="50 seed=1")
    before = lab.read(f"{EXTFRAG}/unusable_index").splitlines()
    assert len(before) == len(lab.read(f"{EXTFRAG}/extfrag_index").splitlines()) == 3
    lab.write("/proc/sys/vm/compact_memory", "1")
    after = lab.read(f"{EXTFRAG}/unusable_index").splitlines()
    assert all(float(now.split()[-2]) < float(then.split()[-2]) for now, then in zip(after[:2], before, strict=False))
    assert after[2] == before[2]


def test_a_zone_without_memory_has_no_line() -> None:
    mem = zones_from("Node 0, zone   Normal 1 0 0 0 0 0 0 0 0 0 0\nNode 1, zone   Normal 1 0 0 0 0 0 0 0 0 0 0\n")
    assert {int(zone) for zone in mem.zones["type"]} == {ZONE_NORMAL}
    mem.zones["present"][0] = 0
    assert [text.splitlines()[0][:6] for text in texts(mem)] == ["Node 1"] * 2


@pytest.fixture
def debugfs(tmp_path: Path) -> Iterator[Path]:
    """The running kernel's own, mounted for the test."""
    if subprocess.run(["mount", "-t", "debugfs", "none", tmp_path], capture_output=True, check=False).returncode:
        pytest.skip("debugfs cannot be mounted")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.host
def test_the_running_kernels_files(debugfs: Path) -> None:
    """Free memory changes all the time: what is read between two equal readings of buddyinfo agrees, but for chance."""
    buddyinfo = Path("/proc/buddyinfo")
    files = [debugfs / "extfrag" / name for name in ("extfrag_index", "unusable_index")]
    agreed = []
    for _ in range(500):
        before = buddyinfo.read_text()
        real = tuple(file.read_text() for file in files)
        if buddyinfo.read_text() == before:
            agreed.append(texts(zones_from(before)) == real)
    assert sum(agreed) > len(agreed) // 2
