# SPDX-License-Identifier: GPL-2.0-only
"""Topologies: what is parsed is what numactl sees in the same tree; files; what follows from matrices."""

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numa_trees import MACHINES, Machine
from small import errno_of

from dpud.gpu.numa import sysfs
from dpud.gpu.numa.module import merged
from dpud.gpu.numa.topology import Topology, format_list, load, parse_list, relative, shipped

MIB = 1 << 20


def numactl(tree: Path | None) -> tuple[dict[int, tuple[list[int], int]], list[list[int]]]:
    """({node: (CPUs, MiB)}, distances) that `numactl -H` reports, with another tree in the place of sysfs's."""
    command = "numactl -H" if tree is None else f"mount --bind {tree} {sysfs.SYSFS} && exec numactl -H"
    prefix = [] if tree is None else ["unshare", "-m"]
    done = subprocess.run([*prefix, "sh", "-c", command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"numactl does not run: {done.stderr}")
    cpus = {
        int(nid): [int(cpu) for cpu in row.split()] for nid, row in re.findall(r"node (\d+) cpus:(.*)", done.stdout)
    }
    sizes = {int(nid): int(mib) for nid, mib in re.findall(r"node (\d+) size: (\d+) MB", done.stdout)}
    rows = re.findall(r"^ +\d+: +([\d ]+)$", done.stdout, re.MULTILINE)
    return {nid: (cpus[nid], sizes[nid]) for nid in sizes}, [[int(cell) for cell in row.split()] for row in rows]


def seen(topology: Topology) -> tuple[dict[int, tuple[list[int], int]], list[list[int]]]:
    nodes = {node.nid: (list(node.cpus), node.memory_bytes // MIB) for node in topology.nodes}
    return nodes, topology.distance.tolist()


@pytest.mark.host
@pytest.mark.skipif(not shutil.which("numactl"), reason="no numactl")
def test_this_machine_is_what_numactl_says() -> None:
    assert seen(sysfs.read()) == numactl(None)


@pytest.mark.host
@pytest.mark.skipif(not shutil.which("numactl") or os.geteuid() != 0, reason="needs numactl, and root to mount")
@pytest.mark.parametrize("name", MACHINES)
def test_other_machines_are_what_numactl_says(name: str, tmp_path: Path) -> None:
    tree = MACHINES[name].write(tmp_path)
    assert seen(sysfs.read(tree)) == numactl(tree)


@pytest.mark.parametrize("name", MACHINES)
def test_trees_are_read_as_they_were_written(name: str, tmp_path: Path) -> None:
    machine = MACHINES[name]
    found = sysfs.read(machine.write(tmp_path))
    assert [node.nid for node in found.nodes] == list(machine.nodes)
    assert [node.memory_bytes // MIB for node in found.nodes] == [mib for _, mib in machine.nodes.values()]
    assert [format_list(node.cpus) for node in found.nodes] == [cpus for cpus, _ in machine.nodes.values()]
    assert found.distance.tolist() == [list(row) for row in machine.distances]


def test_what_is_left_of_a_node_that_went_offline_is_not_looked_at(tmp_path: Path) -> None:
    tree = MACHINES["two"].write(tmp_path)
    (tree / "node7").mkdir()
    (tree / "node7/distance").write_text("garbage\n")
    assert [node.nid for node in sysfs.read(tree).nodes] == [0, 1]


def test_a_node_of_cpus_only_has_no_memory_to_put_pages_on(tmp_path: Path) -> None:
    machine = Machine({0: ("0", 1024), 1: ("1", 0), 2: ("2", 1024)}, [[10, 20, 30], [20, 10, 20], [30, 20, 10]], "0-2")
    found = sysfs.read(machine.write(tmp_path))
    assert [node.nid for node in found.nodes] == [0, 2]
    assert found.distance.tolist() == [[10, 30], [30, 10]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "error"),
    [
        ("node0/distance", "10\n", errno.EINVAL),
        ("node0/distance", "10 x\n", errno.EINVAL),
        ("node0/distance", "10 9\n", errno.EINVAL),
        ("node1/meminfo", "Node 1 MemFree: 1 kB\n", errno.EINVAL),
        ("online", "0-2\n", errno.ENODEV),
        ("online", "\n", errno.EINVAL),
    ],
)
def test_a_tree_that_makes_no_sense_is_refused(file: str, text: str, error: int, tmp_path: Path) -> None:
    tree = MACHINES["two"].write(tmp_path)
    (tree / file).write_text(text)
    assert errno_of(sysfs.read, tree) == error


def test_latency_and_bandwidth_are_modelled_from_distances_and_say_so(tmp_path: Path) -> None:
    found = sysfs.read(MACHINES["two"].write(tmp_path))
    assert found.latency_ns.tolist() == [[100, 210], [210, 100]]
    assert "modelled" in found.source


@pytest.mark.parametrize("text", ["0", "0-3", "0-1,4,6-7", ""])
def test_lists_are_the_kernel_s(text: str) -> None:
    assert format_list(parse_list(f"{text}\n")) == text


def test_topologies_of_two_four_and_eight_nodes_are_shipped() -> None:
    assert {name: len(load(name).nodes) for name in shipped()} == {
        "two-socket": 2,
        "four-node-cxl": 4,
        "eight-node": 8,
    }
    assert all(load(name).source for name in shipped())


def test_eight_nodes_have_the_matrix_they_are_modelled_from() -> None:
    found = load("eight-node")
    assert (found.distance == found.distance.T).all()
    assert (found.latency_ns == 10 * found.distance).all()
    assert (abs(found.bandwidth - 256_000_000_000 / found.distance) < 1_000_000).all()


FILE = """
source = "a test"
latency_ns = [[100, 150], [200, 100]]
bandwidth_MBps = [[1000, 500], [250, 4000]]
devices = [3]
tiers = { nvme = 3 }
[[node]]
id = 1
cpus = "0-1"
memory_MiB = 64
[[node]]
id = 3
cpus = ""
memory_MiB = 32
"""


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(FILE)
    found = load(path)
    assert found.distance.tolist() == [[10, 15], [20, 10]]
    assert found.bandwidth.tolist() == [[10**9, 5 * 10**8], [25 * 10**7, 4 * 10**9]]
    assert [found.device_node(0), found.device_node(1), found.tier_node("nvme"), found.tier_node("hdd")] == [1, 0, 1, 0]
    assert found.nodes[1].memory_bytes == 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("id = 3", "id = 1"),
        ("id = 3", "id = 0"),
        ("[200, 100]", "[200]"),
        ("[200, 100]", "[200, 0]"),
        ("devices = [3]", "devices = [2]"),
        ("nvme = 3", "nvme = 0"),
        ('source = "a test"', ""),
        ('cpus = ""', 'cpus = "x"'),
        ("memory_MiB = 32", ""),
        ("[[node]]", "[[node"),
        ("devices = [3]", "distance = [[10, 9], [20, 10]]"),
        ("devices = [3]", "distance = [[11, 20], [20, 10]]"),
    ],
)
def test_a_bad_file_is_refused(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(FILE.replace(old, new))
    assert errno_of(load, path) == errno.EINVAL


def test_fallback_is_by_distance_and_spreads_equals() -> None:
    found = load("eight-node")
    for at in range(8):
        order = found.fallback(at)
        assert sorted(order) == list(range(8))
        assert order[0] == at
        assert (np.diff(found.distance[at, order]) >= 0).all()
    assert len({found.fallback(at)[1] for at in range(8)}) > 1


def test_auto_weights_are_the_kernel_s() -> None:
    """Of bandwidths 80, 80, 30, 30: 32 times each share, rounded down: 11, 11, 4, 4 (mm/mempolicy.c, by hand)."""
    assert load("four-node-cxl").auto_weights() == [11, 11, 4, 4]
    assert load("two-socket").auto_weights() == [1, 1]


def test_relative_distances_of_a_node_whose_own_memory_is_not_the_nearest() -> None:
    assert relative(np.array([[100, 150], [120, 240]])).tolist() == [[10, 15], [10, 10]]


def test_all_nodes_taken_as_one() -> None:
    one = merged(load("two-socket"))
    assert len(one.nodes) == 1
    assert len(one.nodes[0].cpus) == 48
    assert one.latency_ns.tolist() == [[(78 + 142) // 2]]
