# SPDX-License-Identifier: GPL-2.0-only
"""Where pages of host memory are put, and what it costs to reach them."""

import errno

import pytest
from numa_memory import KIB, MIB, PAGE, Nodes
from small import DictSwap, errno_of

from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.check import violations
from dpud.gpu.memory import HOST


def fill(nodes: Nodes, va: int, nr_pages: int, node: int) -> None:
    nodes.memory.write("c", va, bytes(nr_pages * PAGE), nodes.at(node))


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_pages_are_put_where_they_are_first_used(node: int) -> None:
    nodes = Nodes()
    va = nodes.allocate(64 * PAGE)
    fill(nodes, va, 64, node)
    assert nodes.on(va)[node] == 64
    assert nodes.placement.stat[node]["local_node"] == 64


def test_a_device_s_accesses_are_its_node_s() -> None:
    nodes = Nodes()
    va = nodes.allocate(64 * PAGE)
    nodes.memory.write("c", va, bytes(64 * PAGE), 1)
    assert nodes.on(va) == [0, 64]


@pytest.mark.parametrize("device", [0, 1])
def test_pinned_memory_is_near_its_device_whatever_the_policy(device: int) -> None:
    nodes = Nodes()
    nodes.placement.set_policy(f"bind:{1 - device}")
    va = nodes.allocate(16 * PAGE, RegionType.PINNED, device)
    assert nodes.on(va)[device] == 16


def test_the_alias_of_the_host_is_the_client_s_node() -> None:
    nodes = Nodes()
    nodes.memory.client("c", 1)
    va = nodes.allocate(PAGE)
    nodes.memory.write("c", va, b"x", HOST)
    assert nodes.on(va) == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("interleave", [10, 10, 10, 10]),
        ("interleave:1-2", [0, 20, 20, 0]),
        ("prefer:2", [0, 0, 40, 0]),
        ("bind:1,3", [0, 40, 0, 0]),
    ],
)
def test_policies(policy: str, expected: list[int]) -> None:
    nodes = Nodes("four-node-cxl")
    nodes.placement.set_policy(policy)
    va = nodes.allocate(40 * PAGE)
    fill(nodes, va, 40, 1)
    assert nodes.on(va) == expected
    assert nodes.placement.policy == (f"{policy}:0-3" if policy == "interleave" else policy)


def test_weighted_interleave_follows_bandwidth() -> None:
    nodes = Nodes("four-node-cxl")
    nodes.placement.set_policy("weighted")
    va = nodes.allocate(60 * PAGE)
    fill(nodes, va, 60, 0)
    assert nodes.on(va) == [22, 22, 8, 8]


def test_weights_may_be_set() -> None:
    nodes = Nodes()
    nodes.placement.set_policy("weighted")
    nodes.placement.set_weight(0, 3)
    assert not nodes.placement.auto
    va = nodes.allocate(40 * PAGE)
    fill(nodes, va, 40, 1)
    assert nodes.on(va) == [30, 10]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["", "near", "local:0", "prefer", "prefer:0-1", "bind", "bind:7", "bind:x", "interleave:9"]
)
def test_a_policy_that_is_none_changes_nothing(text: str) -> None:
    nodes = Nodes()
    assert errno_of(nodes.placement.set_policy, text) == errno.EINVAL
    assert nodes.placement.policy == "local"


def test_a_full_node_falls_back_by_distance() -> None:
    nodes = Nodes("four-node-cxl")
    va = nodes.allocate(4 * MIB)
    fill(nodes, va, 600, 1)
    assert nodes.on(va) == [600 - 512, 512, 0, 0]
    assert nodes.placement.stat[0]["numa_miss"] == nodes.placement.stat[1]["numa_foreign"] == 88
    assert not violations(nodes.memory)


def test_bind_has_no_other_nodes() -> None:
    nodes = Nodes()
    nodes.placement.set_policy("bind:0")
    va = nodes.allocate(3 * MIB)
    assert errno_of(fill, nodes, va, 768, 1) == errno.ENOMEM
    assert nodes.on(va)[1] == 0


@pytest.mark.slow
def test_with_swap_bind_evicts_from_its_own_nodes() -> None:
    nodes = Nodes(swap=DictSwap(8 * MIB))
    nodes.placement.set_policy("bind:0")
    va = nodes.allocate(3 * MIB)
    for page in range(768):
        nodes.memory.write("c", va + page * PAGE, bytes([page % 251]), 2)
    assert nodes.on(va)[1] == 0
    assert all(nodes.memory.read("c", va + page * PAGE, 1, 2)[0] == page % 251 for page in range(768))
    assert not violations(nodes.memory)


def test_an_access_takes_what_the_matrix_says() -> None:
    """78 and 142 ns; 64 bytes at 80 and 30 GB/s are 0.8 and 2.1 ns, which are rounded up."""
    nodes = Nodes()
    va = nodes.allocate(PAGE)
    fill(nodes, va, 1, 0)
    nodes.memory.read("c", va, 1, nodes.at(1))  # the fault
    assert [nodes.read_ns(va, nodes.at(0)), nodes.read_ns(va, nodes.at(1))] == [78 + 1, 142 + 3]


def test_a_device_s_link_comes_on_top() -> None:
    """1000 ns and 31.5 GB/s; 256 KiB go at the narrower, 30 GB/s, from the other socket."""
    nodes = Nodes()
    va = nodes.allocate(256 * KIB)
    fill(nodes, va, 64, 0)
    for device in (0, 1):
        nodes.memory.read("c", va, 256 * KIB, device)
    near, far = (nodes.read_ns(va, device, 256 * KIB) for device in (0, 1))
    assert near == 1000 + 78 + -(-256 * KIB * 10**9 // 31_507_692_307)
    assert far == 1000 + 142 + -(-256 * KIB // 30)


def test_without_a_topology_times_are_the_profile_s() -> None:
    nodes = Nodes()
    nodes.numa.detach()
    va = nodes.allocate(PAGE)
    fill(nodes, va, 1, 0)
    assert nodes.read_ns(va, nodes.at(1)) == nodes.read_ns(va, nodes.at(0)) == 78 + 1


def test_a_topology_that_does_not_fit_is_refused() -> None:
    nodes, other = Nodes(), Nodes("four-node-cxl")
    assert errno_of(other.numa.attach, nodes.memory) == errno.EINVAL
