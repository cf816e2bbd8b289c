# SPDX-License-Identifier: GPL-2.0-only
"""The files of swap, with the data path below them."""

import errno
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wiring import errno_of, for_each, run_all, wiring_cases

from dpud.gpu.address_space.regions import PageState
from dpud.gpu.clock import ManualClock
from dpud.gpu.system import CLASS_PATH, CONFIG_PATH, GpuConfig, add_files, build
from fs.kernfs import Tree
from kernelsim.attr import Registry

MIB = 1 << 20
TIERS = {"memory": MIB, "nvme": 2 * MIB, "ssd": 4 * MIB, "hdd": 16 * MIB}
SWAP = f"{CLASS_PATH}/gpu0/swap"
BUFFERS = f"{CONFIG_PATH}/gpu0/clients/a/buffers"
ABI = tomllib.loads((Path(__file__).parents[2] / "abi" / "swap.toml").read_text())
FACTS: dict[str, dict[str, Any]] = {
    path.replace("{tier}", tier): facts for path, facts in ABI.items() for tier in TIERS
}


class Gpu:
    """A device of 2 MiB with tiers right behind it, and a client that has a buffer of 6 MiB of noise."""

    def __init__(self, nr_bytes: int = 6 * MIB) -> None:
        self.clock = ManualClock()
        self.memory = build(GpuConfig(1, 2 * MIB, 4 * MIB, 0, tiers=TIERS), self.clock)
        self.registry = Registry()
        add_files(self.registry, self.memory)
        self.tree = Tree(self.registry)
        self.data = np.random.default_rng(9).bytes(nr_bytes)
        if nr_bytes:
            self.tree.mkdir(BUFFERS.removesuffix("/buffers"))
            self.tree.mkdir(f"{BUFFERS}/b")
            self.registry.write(f"{BUFFERS}/b/size", str(nr_bytes))
            file = self.tree.open(f"{BUFFERS}/b/data", os.O_RDWR)
            for at in range(0, nr_bytes, MIB):
                assert file.write(self.data[at : at + MIB], at) == MIB

    def read(self, name: str) -> str:
        return self.registry.read(f"{SWAP}/{name}").decode().removesuffix("\n")

    def write(self, name: str, text: str) -> None:
        self.registry.write(f"{SWAP}/{name}", text)

    def stat(self) -> dict[str, int]:
        return {name: int(value) for name, value in (line.split() for line in self.read("stat").splitlines())}

    def all_bytes(self) -> bytes:
        file = self.tree.open(f"{BUFFERS}/b/data", os.O_RDONLY)
        return b"".join(file.read(MIB, at) for at in range(0, len(self.data), MIB))


@pytest.fixture(scope="module")
def empty() -> Gpu:
    return Gpu(0)


def test_swap_has_these_files_and_no_others(empty: Gpu) -> None:
    modes = {path: oct(attr.mode) for path, _, attr in empty.registry.walk() if path.startswith(SWAP)}
    assert modes == {path: oct(facts["mode"]) for path, facts in FACTS.items()}


def test_defaults(empty: Gpu) -> None:
    wrong = {path: empty.registry.read(path).decode() for path, facts in FACTS.items() if "default" in facts}
    assert wrong == {path: facts["default"] + "\n" for path, facts in FACTS.items() if "default" in facts}


def test_ranges() -> None:
    for_each([path for path, facts in FACTS.items() if "range" in facts and "tiers/ss" not in path], check_range)


def check_range(path: str) -> None:
    gpu = Gpu(0)
    low, high = FACTS[path]["range"]
    for value in (low, high):
        gpu.registry.write(path, str(value))
        assert gpu.registry.read(path).decode() == f"{value}\n"
    assert [errno_of(gpu.registry.write, path, str(value)) for value in (low - 1, high + 1)] == [errno.EINVAL] * 2


def test_wiring() -> None:
    cases = [case for case in wiring_cases(Gpu(0).registry) if case.path.startswith(SWAP)]
    run_all(case for case in cases if "/ssd/" not in case.path)


@pytest.mark.slow
def test_bytes_go_to_tiers_and_come_back() -> None:
    gpu = Gpu()
    assert gpu.all_bytes() == gpu.data
    stat = gpu.stat()
    assert stat["written"] >= 2 * MIB // 4096
    assert stat["read"] > 0
    assert stat["demoted"] > 0
    used, read, written = map(int, gpu.read("bd_stat").split())
    assert used * 4096 == int(gpu.read("used_bytes"))
    assert read > 0
    assert written * 4096 == sum(int(gpu.read(f"tiers/{tier}/wear")) for tier in TIERS)
    assert sum(int(gpu.read(f"tiers/{tier}/nr_pages")) for tier in TIERS) == int(gpu.read("nr_pages"))


@pytest.mark.slow
def test_policy_and_prefetch_are_changed_while_pages_are_there() -> None:
    gpu = Gpu()
    gpu.write("policy", "s3-fifo\n")
    assert gpu.read("policy") == "lru [s3-fifo]"
    for name in ("majority", "none"):
        gpu.write("prefetch", name)
        assert f"[{name}]" in gpu.read("prefetch")
        assert gpu.all_bytes() == gpu.data
    assert errno_of(gpu.write, "policy", "fifo\n") == errno.EINVAL


@pytest.mark.slow
def test_the_threshold_is_where_background_eviction_begins() -> None:
    gpu = Gpu()
    gpu.write("swap_threshold", "50")
    while gpu.memory.background(MIB):
        pass
    free = int(gpu.registry.read(f"{CLASS_PATH}/gpu0/memory/free_bytes"))
    assert MIB <= free <= 3 * MIB // 2


@pytest.mark.slow
def test_a_cluster_is_what_leaves_at_once_and_without_only_what_has_to() -> None:
    """One page of 4 KiB comes into a full device; a sixteenth of that is 128 KiB."""
    gpu = Gpu()
    gpu.write("prefetch", "none")
    file, evicted = gpu.tree.open(f"{BUFFERS}/b/data", os.O_RDONLY), gpu.memory.residency.events
    for number, (value, nr_pages) in enumerate([("0", 1), ("2048", 1), ("64K", 16), ("0", 1)]):
        gpu.write("cluster", value)
        before = evicted["evicted"]
        while evicted["evicted"] == before:  # what an earlier cluster left free is used up first
            at = int(np.flatnonzero(gpu.memory.client("a").regions[0].state != PageState.RESIDENT)[number]) * 4096
            assert file.read(4096, at) == gpu.data[at : at + 4096]
        assert evicted["evicted"] - before == nr_pages
        assert gpu.read("cluster") == value.replace("64K", "65536")


@pytest.mark.slow
def test_demote_moves_pages_down() -> None:
    gpu = Gpu()
    before = int(gpu.read("tiers/hdd/nr_pages"))
    pages = int(gpu.read("tiers/ssd/nr_pages"))
    assert pages
    gpu.write("tiers/ssd/demote", "256K")
    assert int(gpu.read("tiers/hdd/nr_pages")) >= before + 63
    assert errno_of(gpu.write, "tiers/hdd/demote", "1M") == errno.EAGAIN
    assert gpu.all_bytes() == gpu.data


@pytest.mark.slow
def test_a_slower_tier_is_slower() -> None:
    gpu = Gpu()
    gpu.write("prefetch", "none")
    for tier in TIERS:
        gpu.write(f"tiers/{tier}/bandwidth", "1M")
    before = gpu.clock.now_ns()
    gpu.all_bytes()
    assert gpu.clock.now_ns() - before > 4 * 1_000_000_000  # at least 4 MiB were not on the device
    seen = dict(line.split() for line in gpu.read("tiers/ssd/fault_latency").splitlines())
    assert int(seen["nr"]) > 0
    assert 3_000_000 < int(seen["p50"]) <= int(seen["p99"]) <= int(seen["max"])


def test_the_watermarks_are_in_order() -> None:
    gpu = Gpu(0)
    gpu.write("low_watermark", "60")
    assert gpu.read("high_watermark") == "60"
    gpu.write("high_watermark", "30")
    assert gpu.read("low_watermark") == "30"


@pytest.mark.slow
def test_belady_names_the_distance_to_the_optimum() -> None:
    gpu = Gpu()
    for _ in range(2):
        gpu.all_bytes()
    head, line = gpu.read("belady").splitlines()
    row = dict(zip(head.split(), line.split(), strict=True))
    assert row["location"] == "device0"
    assert int(row["optimal"]) < int(row["lru"]) == int(row["policy"])
    assert float(row["gap_closed_percent"]) == 0
    gpu.write("policy", "s3-fifo")
    row = dict(zip(head.split(), gpu.read("belady").splitlines()[1].split(), strict=True))
    assert float(row["gap_closed_percent"]) > 0


@pytest.mark.slow
def test_a_budget_by_file() -> None:
    gpu = Gpu(0)
    gpu.write("tiers/nvme/daily_limit", "1M")
    assert gpu.read("tiers/nvme/writeback_limit") == "256"
    assert gpu.read("tiers/nvme/writeback_limit_enable") == "1"


def test_every_device_has_the_same_swap() -> None:
    memory = build(GpuConfig(2, 4 * MIB, 4 * MIB, 0, tiers={"nvme": MIB}), ManualClock())
    registry = Registry()
    add_files(registry, memory)
    assert Tree(registry).readlink(f"{CLASS_PATH}/gpu1/swap") == "../gpu0/swap"
