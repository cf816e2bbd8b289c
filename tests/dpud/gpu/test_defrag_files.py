# SPDX-License-Identifier: GPL-2.0-only
"""The files of defragmentation, with the data path below them."""

import errno
import os
import re
import tomllib
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wiring import errno_of, for_each, run_all, wiring_cases

from dpud.gpu.check import violations
from dpud.gpu.clock import Clock, Debt, ManualClock, PacedClock
from dpud.gpu.system import CLASS_PATH, CONFIG_PATH, GpuConfig, add_files, build
from fs.kernfs import Tree
from kernelsim.attr import Registry

KIB, MIB = 1 << 10, 1 << 20
DEFRAG = f"{CLASS_PATH}/gpu0/defrag"
CLIENT = f"{CONFIG_PATH}/gpu0/clients/train"
ABI = tomllib.loads((Path(__file__).parents[2] / "abi" / "defrag.toml").read_text())
FACTS: dict[str, dict[str, Any]] = {f"{DEFRAG}/{path}": facts for path, facts in ABI.items()}


class Gpu:
    """A device of 8 MiB with a client whose buffers are made and freed."""

    def __init__(self, clock: Clock | None = None, pool_bytes: int = 32 * MIB) -> None:
        self.clock = clock or ManualClock()
        self.memory = build(GpuConfig(1, 8 * MIB, 8 * MIB, pool_bytes), self.clock)
        self.registry = Registry()
        add_files(self.registry, self.memory)
        self.tree = Tree(self.registry)
        self.tree.mkdir(CLIENT)
        self.kept: dict[str, bytes] = {}

    def read(self, name: str, folder: str = DEFRAG) -> str:
        return self.registry.read(f"{folder}/{name}").decode().removesuffix("\n")

    def write(self, name: str, text: str, folder: str = DEFRAG) -> None:
        self.registry.write(f"{folder}/{name}", text)

    def metric(self, name: str, location: str = "device0") -> list[float]:
        rows = (line.split() for line in self.read(name).splitlines())
        return next([float(value) for value in values] for where, *values in rows if where == location)

    def stat(self) -> dict[str, int]:
        return {name: int(nr) for name, nr in (line.split() for line in self.read("stat").splitlines())}

    def map(self) -> dict[str, str]:
        """Read in pieces, as cat does."""
        file, found = self.tree.open(f"{DEFRAG}/map", os.O_RDONLY), b""
        while piece := file.read(1000, len(found)):
            found += piece
        rows = (line.split() for line in found.decode().splitlines())
        return {where: picture for where, size, picture in rows if size == "16384"}

    def buffer(self, name: str, nr_bytes: int, page_size: str = "4K") -> None:
        folder = f"{CLIENT}/buffers/{name}"
        self.tree.mkdir(folder)
        self.write("page_size", page_size, folder)
        self.write("size", str(nr_bytes), folder)
        self.kept[name] = np.random.default_rng(len(self.kept)).bytes(nr_bytes)
        file = self.tree.open(f"{folder}/data", os.O_RDWR)
        file.write(self.kept[name], 0)

    def scatter(self) -> None:
        """An eighth of memory in use, in pieces of 64 KiB, the others free: no block of 2 MiB is."""
        for number in range(124):
            self.buffer(f"b{number}", 64 * KIB)
        for number in range(124):
            if number % 8:
                self.tree.rmdir(f"{CLIENT}/buffers/b{number}")
                del self.kept[f"b{number}"]

    def check(self) -> None:
        for name, data in self.kept.items():
            assert self.tree.open(f"{CLIENT}/buffers/{name}/data", os.O_RDONLY).read(len(data), 0) == data
        assert violations(self.memory) == []


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


def test_there_are_these_files_and_no_others(gpu: Gpu) -> None:
    ours = {path: attr.mode for path, _, attr in gpu.registry.walk() if path.startswith(DEFRAG)}
    assert {path: oct(mode) for path, mode in ours.items()} == {p: oct(facts["mode"]) for p, facts in FACTS.items()}


def test_defaults() -> None:
    registry = Gpu().registry
    wanted = {path: facts["default"] for path, facts in FACTS.items() if "default" in facts}
    assert {path: registry.read(path).decode().removesuffix("\n") for path in wanted} == wanted


def test_ranges(gpu: Gpu) -> None:
    for_each([path for path, facts in FACTS.items() if "range" in facts], partial(check_range, gpu))


def check_range(gpu: Gpu, path: str) -> None:
    low, high = FACTS[path]["range"]
    for value in (low, high):
        gpu.registry.write(path, str(value))
        assert gpu.registry.read(path).decode() == f"{value}\n"
    assert [errno_of(gpu.registry.write, path, str(value)) for value in (low - 1, high + 1)] == [errno.EINVAL] * 2


def test_wiring() -> None:
    run_all(case for case in wiring_cases(Gpu().registry) if case.path.startswith(DEFRAG))


@pytest.mark.slow
def test_run_puts_free_memory_together() -> None:
    gpu = Gpu()
    gpu.write("rearrange", "0")
    gpu.scatter()
    assert gpu.metric("unusable_index")[-1] == 1
    assert gpu.metric("extfrag_index")[-1] > 0.9
    gpu.write("run", "1")
    assert gpu.metric("unusable_index")[-1] < 0.2
    assert gpu.metric("extfrag_index")[-1] == -1
    stat = gpu.stat()
    assert stat["blocks_made"] == 3
    assert stat["bytes_moved"] == 12 * 64 * KIB  # three of four blocks have four buffers each
    assert stat["bytes_moved"] / stat["gained_bytes"] == pytest.approx(float(gpu.read("cost")), abs=0.001)
    assert 0 < int(gpu.read("longest_pause_ns")) <= 500_000
    assert f"train relocation {12 * 64 * KIB}" in gpu.read("traffic", f"{CLASS_PATH}/gpu0/qos")
    gpu.check()


@pytest.mark.slow
def test_the_interval_and_the_threshold_decide_when() -> None:
    clock = ManualClock()
    gpu = Gpu(clock)
    gpu.write("interval", "30")
    gpu.scatter()
    clock.advance(29_000_000_000)
    gpu.buffer("one", 4096)
    assert gpu.stat()["passes"] == 0
    clock.advance(2_000_000_000)
    gpu.buffer("two", 4096)
    assert (gpu.stat()["passes"], gpu.metric("unusable_index")[-1] <= 0.3) == (1, True)
    assert gpu.stat()["blocks_made"] == 3
    gpu.check()


@pytest.mark.slow
def test_the_background_sleeps_until_it_is_due() -> None:
    """By the daemon's clock, moved by hand: a pass after the interval and not before, then rests between slices."""
    real_ns = [0]
    clock = PacedClock(lambda: max(real_ns[0], clock._ahead_ns))
    gpu = Gpu(clock)
    gpu.write("interval", "25")
    gpu.write("cpu_percent", "10")
    gpu.write("pause_limit_us", "20")
    gpu.scatter()
    background, seen = gpu.memory.defrag.background(clock), []
    gpu.memory.defrag._last_ns = real_ns[0] = clock.now_ns()
    begin_ns = real_ns[0]
    for _ in range(200):
        if gpu.stat()["blocks_made"] == 3:
            break
        waitable = next(background)
        if isinstance(waitable, Debt):
            real_ns[0] = max(real_ns[0], waitable._deadline_ns)
            seen.append(real_ns[0] - begin_ns)
    assert [ns // 1_000_000_000 for ns in seen[:3]] == [10, 20, 25]
    assert gpu.stat()["blocks_made"] == 3
    rests_ns = [after - before for before, after in pairwise(seen) if 0 < after - before < 1_000_000_000]
    assert sum(rests_ns) == pytest.approx(9 * gpu.stat()["total_ns"], rel=0.3)  # the clock also has the slices in it
    assert len(rests_ns) == gpu.stat()["slices"] > 10
    gpu.check()


@pytest.mark.slow
def test_no_pause_is_longer_than_the_limit() -> None:
    gpu = Gpu()
    gpu.scatter()
    gpu.write("pause_limit_us", "1")  # 0.5 us to begin with, and 5 ns for the bytes
    gpu.write("run", "1")
    assert int(gpu.read("longest_pause_ns")) <= 1000
    assert gpu.metric("unusable_index")[-1] < 0.2
    gpu.check()


@pytest.mark.slow
def test_a_page_larger_than_the_pause_stays() -> None:
    gpu = Gpu()
    for number in range(60):
        gpu.buffer(f"b{number}", 128 * KIB, "64K")
    for number in range(0, 60, 2):
        gpu.tree.rmdir(f"{CLIENT}/buffers/b{number}")
        del gpu.kept[f"b{number}"]
    gpu.memory.defrag.effort.pause_limit_ns = 550  # 64 KiB take 584 ns
    gpu.write("run", "1")
    assert gpu.stat()["pages_moved"] == 0
    gpu.write("pause_limit_us", "1")
    gpu.write("run", "1")
    assert gpu.stat()["pages_moved"] > 0
    assert int(gpu.read("longest_pause_ns")) <= 1000
    gpu.check()


@pytest.mark.slow
def test_pins_are_honoured_and_reported() -> None:
    gpu = Gpu()
    gpu.scatter()
    folder = f"{CLIENT}/buffers/b0"
    va = gpu.read("va", folder)
    gpu.write("pins", f"{va} 4096 nic RDMA of rank 3")
    assert re.fullmatch(rf"{hex(int(va, 0))} 1 train nic RDMA of rank 3", gpu.read("pins"))
    frame = gpu.memory.translate(int(va, 0))
    gpu.write("run", "1")
    gpu.memory.evict(8 * MIB)
    assert gpu.memory.translate(int(va, 0)) == frame
    assert errno_of(gpu.write, "unpin", "other") == errno.EINVAL
    gpu.write("unpin", "nic")
    assert gpu.read("pins") == ""
    gpu.memory.evict(8 * MIB)
    assert errno_of(gpu.memory.translate, int(va, 0)) == errno.EFAULT
    gpu.check()


@pytest.mark.parametrize("text", ["", "0x1", "x 4096 nic", "0x1 4096 a/b why"])
def test_a_pin_that_makes_no_sense(gpu: Gpu, text: str) -> None:
    assert errno_of(gpu.write, "pins", text) == errno.EINVAL


def test_a_pin_of_what_is_not_allocated(gpu: Gpu) -> None:
    assert errno_of(gpu.write, "pins", "0x1000 4096 nic") == errno.EFAULT


@pytest.mark.slow
def test_the_map_shows_what_is_in_use_and_pinned() -> None:
    gpu = Gpu()
    rows = gpu.map()
    assert rows["device0"] == "." * 512
    gpu.buffer("one", 16 * KIB)
    gpu.buffer("two", 16 * KIB)
    gpu.write("pins", f"{gpu.read('va', f'{CLIENT}/buffers/two')} 4096 nic")
    assert sorted(gpu.map()["device0"].strip(".")) == ["9", "P"]
    frame = gpu.memory.locations[0].frames.owner
    used = (frame >= 0).reshape(512, 8).any(axis=1)
    assert ["." if not each else "x" for each in used] == [c if c == "." else "x" for c in gpu.map()["device0"]]


@pytest.mark.slow
def test_enomem_says_who_is_in_the_way() -> None:
    gpu = Gpu(pool_bytes=0)
    gpu.write("threshold", "100")
    gpu.scatter()
    for number in range(0, 124, 8):
        va = gpu.read("va", f"{CLIENT}/buffers/b{number}")
        gpu.write("pins", f"{va} 4096 nic RDMA")
    folder = f"{CLIENT}/buffers/large"
    gpu.tree.mkdir(folder)
    gpu.write("page_size", "2M", folder)
    gpu.write("size", "2M", folder)
    file = gpu.tree.open(f"{folder}/data", os.O_RDWR)
    assert errno_of(file.write, bytes(2 * MIB), 0) == errno.ENOMEM
    text = gpu.read("last_failure")
    assert re.search(r"device0: wanted 2097152, free 7\d+, largest hole \d+, in the way: ", text)
    assert "train (pinned by nic: RDMA) 65536" in text
    assert text.endswith("blocks: pinned by nic (RDMA)")
    gpu.write("unpin", "nic")
    file.write(bytes(2 * MIB), 0)  # now a block is made, and nobody has to leave
    assert gpu.stat()["blocks_made"] == 1
    gpu.check()
