# SPDX-License-Identifier: GPL-2.0-only
"""The files of NUMA, with several nodes behind them."""

import errno
import os
from pathlib import Path

import pytest
from wiring import errno_of

from dpud.config import Config
from dpud.config import Gpu as Section
from dpud.daemon import add_gpu
from dpud.errors import UserError
from dpud.gpu.clock import PacedClock
from dpud.gpu.numa import sysfs
from dpud.gpu.system import CLASS_PATH, CONFIG_PATH, REAL, GpuConfig, add_files, build
from fs.kernfs import Tree
from kernelsim.attr import Registry

MIB = 1 << 20
NUMA = f"{CLASS_PATH}/gpu0/numa"
BUFFER = f"{CONFIG_PATH}/gpu0/clients/c/buffers/b"


class Gpu:
    """A device of 8 MiB, and 16 MiB of host memory in the nodes of a topology."""

    def __init__(self, numa: str = "four-node-cxl") -> None:
        self.memory = build(GpuConfig(1, 8 * MIB, 16 * MIB, 32 * MIB, numa=numa))
        self.registry = Registry()
        add_files(self.registry, self.memory)
        self.tree = Tree(self.registry)
        self.tree.mkdir(f"{CONFIG_PATH}/gpu0/clients/c")
        self.tree.mkdir(BUFFER)

    def read(self, name: str, folder: str = NUMA) -> str:
        return self.registry.read(f"{folder}/{name}").decode().removesuffix("\n")

    def write(self, name: str, text: str, folder: str = NUMA) -> None:
        self.registry.write(f"{folder}/{name}", text)

    def host_buffer(self, location: str) -> None:
        """1 MiB of host memory, written from a location."""
        self.write("type", "host", BUFFER)
        self.write("size", "1M", BUFFER)
        self.write("location", location, BUFFER)
        self.tree.open(f"{BUFFER}/data", os.O_RDWR).write(bytes(MIB), 0)

    def long(self, name: str) -> list[str]:
        """A file that is longer than a page, in pieces as `cat` reads it."""
        file, found = self.tree.open(f"{NUMA}/{name}", os.O_RDONLY), b""
        while piece := file.read(1000, len(found)):
            found += piece
        return found.decode().splitlines()

    def free(self) -> list[int]:
        return [int(self.read(f"nodes/node{nid}/free_bytes")) for nid in range(4)]


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


def test_nodes_show_what_the_topology_says(gpu: Gpu) -> None:
    shown = {
        name: [gpu.read(f"nodes/node{nid}/{name}") for nid in range(4)] for name in ("cpulist", "distance", "tiers")
    }
    assert shown["cpulist"] == ["0-23", "24-47", "", ""]
    assert shown["distance"][0] == "10 18 20 28"
    assert shown["tiers"] == ["nvme", "ssd", "", ""]
    assert [gpu.read(f"nodes/node{nid}/devices") for nid in range(4)] == ["gpu0", "", "", ""]
    assert gpu.read("nodes/node1/fallback") == "1 0 3 2"


def test_host_memory_is_divided_as_the_topology_s(gpu: Gpu) -> None:
    """128, 128, 256 and 256 GiB: of 16 MiB a sixth each and a third each, in whole pages of 2 MiB."""
    assert [int(gpu.read(f"nodes/node{nid}/total_bytes")) for nid in range(4)] == [2 * MIB, 2 * MIB, 4 * MIB, 4 * MIB]
    assert gpu.read("total_bytes", f"{CLASS_PATH}/node2/memory") == str(4 * MIB)


def test_the_topology_names_its_source(gpu: Gpu) -> None:
    lines = gpu.read("topology").splitlines()
    assert lines[0] == "node0 cpus=0-23 bytes=2097152"
    assert lines[4] == "distance"
    assert lines[5].split() == ["10", "18", "20", "28"]
    assert lines[-1].startswith("source ")


@pytest.mark.slow
@pytest.mark.parametrize(("location", "node"), [("node2", 2), ("device0", 0)])
def test_a_buffer_is_put_where_it_is_written(gpu: Gpu, location: str, node: int) -> None:
    before = gpu.free()
    gpu.host_buffer(location)
    assert [old - new for old, new in zip(before, gpu.free(), strict=True)] == [MIB * (nid == node) for nid in range(4)]
    assert "local_node 256" in gpu.read(f"nodes/node{node}/numastat").splitlines()
    assert gpu.read("verify", f"{CLASS_PATH}/gpu0/address_space") == "ok"


@pytest.mark.slow
def test_a_policy(gpu: Gpu) -> None:
    gpu.write("policy", "interleave:2-3\n")
    assert gpu.read("policy") == "interleave:2-3"
    before = gpu.free()
    gpu.host_buffer("node0")
    assert [old - new for old, new in zip(before, gpu.free(), strict=True)] == [0, 0, MIB // 2, MIB // 2]
    assert "interleave_hit 128" in gpu.read("nodes/node3/numastat").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["interleave:7\n", "somewhere\n", "\n"])
def test_a_policy_that_is_none(gpu: Gpu, text: str) -> None:
    assert errno_of(gpu.registry.write, f"{NUMA}/policy", text) == errno.EINVAL
    assert gpu.read("policy") == "local"


def test_weights(gpu: Gpu) -> None:
    folder = f"{NUMA}/weighted_interleave"
    weights = [f"node{nid}" for nid in range(4)]
    assert [gpu.read(name, folder) for name in weights] == ["11", "11", "4", "4"]
    gpu.write("node2", "255", folder)
    assert (gpu.read("node2", folder), gpu.read("auto", folder)) == ("255", "0")
    assert errno_of(gpu.registry.write, f"{folder}/node2", "256") == errno.EINVAL
    gpu.write("auto", "1", folder)
    assert gpu.read("node2", folder) == "4"


def test_the_scan_period_is_cut_to_its_limits(gpu: Gpu) -> None:
    gpu.write("scan_period_ms", "50")
    assert gpu.read("scan_period_ms") == "100"
    gpu.write("scan_period_min_ms", "70000")
    assert [gpu.read(f"scan_period{name}_ms") for name in ("", "_min", "_max")] == ["70000"] * 3


@pytest.mark.slow
def test_decisions_say_why(gpu: Gpu) -> None:
    gpu.host_buffer("node0")
    balancer = gpu.memory.numa.balancer
    balancer.min_period_ns = 20_000
    balancer.set_period(20_000)
    balancer.horizon_ns = 1_000_000
    region = next(iter(gpu.memory.space.regions))
    for number in range(4000):
        gpu.memory.read("c", region.va + 4096 * (number * 7 % 64), 64, gpu.memory.nr_devices + 1)
    ns, address, source, target, verdict, *figures = gpu.long("decisions")[0].split()
    assert (source, target, verdict) == ("node0", "node1", "promoted:pays")
    assert int(ns) > 0
    assert len(gpu.long("decisions")) == 64
    assert region.va <= int(address, 16) < region.end
    benefit, cost, net = (int(figure.partition("=")[2]) for figure in figures)
    assert abs(benefit - cost - net) <= 1
    assert "promoted 64" in gpu.read("stat").splitlines()


def test_a_machine_of_one_node_has_nothing_to_balance() -> None:
    gpu = Gpu("")
    assert gpu.read("balancing").startswith("[off]")
    assert "no topology" in gpu.read("topology")


@pytest.mark.slow
def test_the_topology_of_this_machine(tmp_path: Path) -> None:
    gpu = Gpu(REAL)
    assert gpu.read("topology").count("cpus=") == len(sysfs.read().nodes)


@pytest.mark.parametrize("name", ["/nonexistent.toml", "nowhere"])
def test_a_topology_that_is_none_is_named_to_the_user(name: str) -> None:
    config = Config(gpu=Section(numa=name))
    with pytest.raises(UserError, match=r"gpu\.numa: no topology"):
        add_gpu(None, None, config, PacedClock())  # type: ignore[arg-type]  nothing is asked of them before
