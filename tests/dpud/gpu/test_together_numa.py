# SPDX-License-Identifier: GPL-2.0-only
"""Broken memory where host memory is in nodes: who takes over, and where pages are made good."""

from pathlib import Path

import numpy as np
import pytest
from numa_memory import MIB, PAGE, Nodes

from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.check import violations
from dpud.gpu.fault.module import FaultModule

SIZE = 64 * PAGE
DATA = np.random.default_rng(6).bytes(SIZE)


class BreakableNodes(Nodes):
    """With checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("two-socket")
        self.fault = FaultModule(self.memory, None, folder)

    def filled(self, client: str, kind: RegionType, device: int) -> int:
        """A region with DATA, of which there is a checkpoint."""
        self.memory.client(client, device)
        va = self.memory.allocate(client, SIZE, kind, page_size=PAGE)
        self.memory.write(client, va, DATA)
        self.fault.checkpoints.create(client)
        return va


@pytest.mark.slow
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("kind", [RegionType.DEVICE, RegionType.MANAGED])
def test_clients_of_the_last_device_go_to_the_node_that_it_hangs_at(
    last: int, kind: RegionType, tmp_path: Path
) -> None:
    nodes = BreakableNodes(tmp_path)
    regions = {client: nodes.filled(client, kind, device) for device, client in enumerate(("ann", "bob"))}
    for device in (1 - last, last):
        nodes.fault.lose(nodes.memory.locations[device])
    for client, va in regions.items():
        assert nodes.memory.client(client).device == nodes.at(last)
        assert nodes.on(va) == [SIZE // PAGE * (node == last) for node in (0, 1)]
        assert nodes.memory.read(client, va, SIZE) == DATA
    assert nodes.fault.stats()["lost_pages"] == 0
    assert violations(nodes.memory) == []


def test_a_page_of_a_node_is_made_good_on_it(tmp_path: Path) -> None:
    nodes = BreakableNodes(tmp_path)
    va = nodes.filled("bob", RegionType.HOST, 1)
    assert nodes.on(va) == [0, SIZE // PAGE]
    nodes.fault.inject(f"bit location=node1 bits=2 va={va + 5 * PAGE:#x}")
    assert nodes.memory.read("bob", va, SIZE) == DATA
    assert nodes.on(va) == [0, SIZE // PAGE]
    assert [len(each) for each in nodes.fault.placing.retired] == [0, 0, 0, 1]
    assert violations(nodes.memory) == []


def test_where_its_node_is_full_another_takes_it(tmp_path: Path) -> None:
    nodes = BreakableNodes(tmp_path)
    va = nodes.filled("bob", RegionType.HOST, 1)
    nodes.placement.set_policy("bind:1")
    rest = nodes.memory.locations[nodes.at(1)].frames.nr_free_bytes
    full = nodes.memory.allocate("bob", rest, RegionType.HOST, page_size=PAGE)
    nodes.memory.write("bob", full, b"\x55" * rest)
    nodes.fault.inject(f"bit location=node1 bits=2 va={va + 5 * PAGE:#x}")
    assert nodes.memory.read("bob", va, SIZE) == DATA
    assert nodes.on(va) == [1, SIZE // PAGE - 1]
    assert nodes.memory.read("bob", full, MIB) == b"\x55" * MIB
    assert nodes.fault.stats()["lost_pages"] == 0
    assert violations(nodes.memory) == []


@pytest.mark.slow
def test_balancing_goes_on_while_a_node_breaks(tmp_path: Path) -> None:
    """Pages are on the wrong node, and break one after the other while hint faults bring them home."""
    nodes = BreakableNodes(tmp_path)
    nodes.sample_every(1_000_000)
    va = nodes.filled("bob", RegionType.HOST, 1)
    for turn in range(80):
        nodes.clock.advance(500_000)
        if turn % 5 == 0 and turn < 60:
            page = va + turn * PAGE
            where = nodes.memory.space.names[_home(nodes, page)]
            nodes.fault.inject(f"bit location={where} bits=2 va={page:#x}")
        nodes.memory.read("bob", va + turn % 7 * PAGE, 1, nodes.at(0))  # when it is time to unmap pages, they are
        assert nodes.memory.read("bob", va, SIZE, nodes.at(0)) == DATA
    assert nodes.on(va) == [SIZE // PAGE, 0]
    assert nodes.fault.stats()["repaired_from_checkpoint"] == 12
    assert violations(nodes.memory) == []


def _home(nodes: Nodes, va: int) -> int:
    region = nodes.memory.space.regions.find(va)
    assert region is not None
    return int(region.home[va - region.va >> region.page_shift])
