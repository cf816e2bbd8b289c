# SPDX-License-Identifier: GPL-2.0-only
"""The files of devices, modules, clients and buffers, without a mount."""

import errno
import os
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wiring import errno_of, for_each, run_all, wiring_cases

from dpud.gpu.clock import Debt, PacedClock
from dpud.gpu.system import CLASS_PATH, CONFIG_PATH, GpuConfig, add_files, build, reclaimer
from fs.kernfs import OpenFile, Tree
from kernelsim.attr import File, Flavour, Registry
from kernelsim.wait import WaitQueue

MIB = 1 << 20
CLIENTS = f"{CONFIG_PATH}/gpu0/clients"
BUFFER = f"{CLIENTS}/c/buffers/b"
SPACE = f"{CLASS_PATH}/gpu0/address_space"
ABI = {
    path: facts
    for table in ("gpu.toml", "numa.toml", "qos.toml")
    for path, facts in tomllib.loads((Path(__file__).parents[2] / "abi" / table).read_text()).items()
}
FACTS: dict[str, dict[str, Any]] = {
    path.replace("{place}", place).replace("{level}", str(level)): facts
    for path, facts in ABI.items()
    for place in ("gpu0", "host")
    for level in range(5)
}


class Gpu:
    """Devices of 8 MiB with a client that has a buffer, worked through a tree."""

    def __init__(self, config: GpuConfig | None = None) -> None:
        self.memory = build(config or GpuConfig(1, 8 * MIB, 8 * MIB, 32 * MIB))
        self.registry = Registry()
        add_files(self.registry, self.memory)
        self.tree = Tree(self.registry)
        self.tree.mkdir(f"{CLIENTS}/c")
        self.tree.mkdir(BUFFER)

    def read(self, name: str, folder: str = BUFFER) -> str:
        return self.registry.read(f"{folder}/{name}").decode().removesuffix("\n")

    def write(self, name: str, text: str, folder: str = BUFFER) -> None:
        self.registry.write(f"{folder}/{name}", text)

    def data(self, flags: int = os.O_RDWR) -> OpenFile:
        return self.tree.open(f"{BUFFER}/data", flags)

    def state(self) -> dict[str, int]:
        return {name: int(value) for name, value in (line.split() for line in self.read("state").splitlines())}

    def counts(self, name: str) -> dict[str, int]:
        return {key: int(value) for key, value in (line.split() for line in self.read(name, SPACE).splitlines())}


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


def test_a_client_waits_for_memory_and_the_queue_shows_it(gpu: Gpu) -> None:
    folder = f"{CLASS_PATH}/gpu0/overcommit"
    gpu.tree.mkdir(f"{CLIENTS}/d")
    gpu.tree.mkdir(f"{CLIENTS}/d/buffers/b")
    gpu.write("queue_timeout_ms", "5000", f"{CLIENTS}/d")
    gpu.write("size", "30M")
    operation = gpu.registry.nodes[f"{CLIENTS}/d/buffers/b/size"].attr.write_text(  # type: ignore[union-attr]
        gpu.registry.nodes[f"{CLIENTS}/d/buffers/b/size"].kobj,  # type: ignore[union-attr]
        b"20M",
        Flavour.CONFIGFS,
    )
    next(operation)
    assert [line.split()[:4] for line in gpu.read("queue", folder).splitlines()[1:]] == [["d", str(20 * MIB), "0", "0"]]
    gpu.write("size", "0")
    with pytest.raises(StopIteration):
        next(operation)
    assert gpu.read("allocated_bytes", f"{CLIENTS}/d") == str(20 * MIB)
    assert len(gpu.read("queue", folder).splitlines()) == 1


def test_a_client_s_promises(gpu: Gpu) -> None:
    client = f"{CLIENTS}/c"
    gpu.write("limit", "4M", client)
    assert errno_of(gpu.write, "size", "5M") == errno.ENOMEM
    gpu.write("size", "3M")
    assert errno_of(gpu.write, "limit", "2M", client) == errno.EBUSY
    assert errno_of(gpu.write, "reservation", "1G", client) == errno.ENOMEM
    gpu.write("reservation", "2M", client)
    gpu.write("priority", "7", client)
    table = gpu.read("clients", f"{CLASS_PATH}/gpu0/overcommit").splitlines()
    assert table[1].split() == ["c", "7", str(3 * MIB), "0", str(3 * MIB), "0", str(2 * MIB), str(4 * MIB)]
    gpu.write("ratio", "10", f"{CLASS_PATH}/gpu0/overcommit")
    assert gpu.read("headroom", f"{CLASS_PATH}/gpu0/overcommit") == "0"


def test_there_are_these_files_and_no_others(gpu: Gpu) -> None:
    others = "/fault/", "/migration/", "/defrag/"  # test_fault_files.py and so on
    walked = {path: oct(attr.mode) for path, _, attr in gpu.registry.walk() if not any(each in path for each in others)}
    assert walked == {path: oct(facts["mode"]) for path, facts in FACTS.items()}


def test_defaults() -> None:
    registry = Gpu().registry
    wanted = {path: facts["default"] + "\n" for path, facts in FACTS.items() if "default" in facts}
    assert {path: registry.read(path).decode() for path in wanted} == wanted


def test_ranges() -> None:
    for_each([path for path, facts in FACTS.items() if "range" in facts], partial(check_range, Gpu()))


def check_range(gpu: Gpu, path: str) -> None:
    low, high = FACTS[path]["range"]
    for value in (low, high):
        gpu.registry.write(path, str(value))
        assert gpu.registry.read(path).decode() == f"{value}\n"
    assert [errno_of(gpu.registry.write, path, str(value)) for value in (low - 1, high + 1)] == [errno.EINVAL] * 2


def test_wiring() -> None:
    run_all(wiring_cases(Gpu().registry))


@pytest.mark.slow
def test_bytes_go_through_the_data_path(gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    gpu.write("size", "20M")
    data = bytearray(rng.bytes(20 * MIB))
    file = gpu.data()
    for at in range(0, len(data), 131072):
        assert file.write(bytes(data[at : at + 131072]), at) == 131072
    patch = rng.bytes(300_000)
    assert file.write(patch, 1_000_001) == len(patch)
    data[1_000_001:1_300_001] = patch
    assert gpu.state()["stored"] > 3000
    assert b"".join(file.read(131072, at) for at in range(0, len(data), 131072)) == data
    assert gpu.read("verify", SPACE) == "ok"


def test_the_end_of_a_buffer(gpu: Gpu) -> None:
    file = gpu.data()
    assert file.read(10, 0) == b""
    assert errno_of(file.write, b"x", 0) == errno.ENOSPC
    gpu.write("size", "10000")
    assert gpu.tree.getattr(f"{BUFFER}/data").st_size == 10000
    assert file.write(b"abcdef", 9996) == 4
    assert file.read(100, 9990) == bytes(6) + b"abcd"
    assert file.read(100, 10000) == b""
    assert errno_of(file.write, b"x", 10000) == errno.ENOSPC


def test_permissions_hold_for_the_data_file(gpu: Gpu) -> None:
    gpu.write("size", "8K")
    gpu.data().write(b"secret", 0)
    gpu.write("permissions", "r--")
    assert errno_of(gpu.data().write, b"x", 0) == errno.EACCES
    gpu.write("permissions", "---")
    assert errno_of(gpu.data().read, 6, 0) == errno.EACCES
    assert [line.split(" ", 1)[1].split(" page")[0] for line in gpu.read("faults", SPACE).splitlines()] == [
        f"client=c at=device0 va={gpu.read('va')} access=w error=EACCES",
        f"client=c at=device0 va={gpu.read('va')} access=r error=EACCES",
    ]
    assert gpu.counts("fault_stat")["refused_EACCES"] == 2


def test_what_is_settled_at_allocation_is_busy_afterwards(gpu: Gpu) -> None:
    gpu.write("type", "managed")
    gpu.write("page_size", "64K")
    gpu.write("size", "1M")
    for name, text in (("type", "device"), ("page_size", "4K"), ("priority", "5"), ("size", "2M")):
        assert errno_of(gpu.write, name, text) == errno.EBUSY
    assert gpu.read("type") == "host device [managed] pinned"
    assert gpu.read("maps", SPACE).split()[1:] == ["rw-", "managed", "64K", "0", "c"]
    gpu.write("size", "0")
    gpu.write("type", "pinned")
    assert errno_of(gpu.write, "size", "16M") == errno.ENOMEM
    assert (gpu.read("size"), gpu.read("maps", SPACE)) == ("0", "")


@pytest.mark.slow
def test_pressure_by_echo(gpu: Gpu) -> None:
    gpu.write("size", "4M")
    gpu.data().write(b"\5" * 4 * MIB, 0)
    memory = f"{CLASS_PATH}/gpu0/memory"
    assert gpu.read("free_bytes", memory) == str(4 * MIB)
    gpu.write("reclaim", "1M", memory)
    assert (gpu.read("free_bytes", memory), gpu.state()["stored"]) == (str(5 * MIB), 256)
    gpu.write("reclaim", "1M")
    assert gpu.state()["stored"] == 512
    assert errno_of(gpu.write, "reclaim", "4M") == errno.EAGAIN
    assert gpu.state()["stored"] == 1024
    assert gpu.data().read(4 * MIB, 0) == b"\5" * 4 * MIB


def test_accessed_dirty_and_sync(gpu: Gpu) -> None:
    gpu.write("size", "16K")
    gpu.data().write(b"1" * 9000, 0)
    assert [gpu.state()[name] for name in ("accessed", "dirty", "untouched")] == [3, 3, 1]
    gpu.write("clear_refs", "1")
    gpu.write("sync", "1")
    assert [gpu.state()[name] for name in ("accessed", "dirty", "resident")] == [0, 0, 3]
    gpu.data().read(1, 5000)
    assert [gpu.state()[name] for name in ("accessed", "dirty")] == [1, 0]


def test_another_client_is_granted_a_buffer(gpu: Gpu) -> None:
    gpu.tree.mkdir(f"{CLIENTS}/infer")
    gpu.write("size", "8K")
    gpu.data().write(b"weights", 0)
    va = int(gpu.read("va"), 16)
    assert errno_of(gpu.memory.read, "infer", va, 7) == errno.EACCES
    gpu.write("grant", "infer r--")
    assert gpu.memory.read("infer", va, 7) == b"weights"
    assert errno_of(gpu.memory.write, "infer", va, b"x") == errno.EACCES
    assert gpu.read("grant") == "infer r--"
    assert [errno_of(gpu.write, "grant", text) for text in ("nobody r", "c rw", "infer rz")] == [errno.EINVAL] * 3
    gpu.tree.rmdir(f"{CLIENTS}/infer")
    assert gpu.read("grant") == ""


@pytest.mark.slow
def test_advice_and_locations_over_two_devices() -> None:
    gpu = Gpu(GpuConfig(2, 8 * MIB, 8 * MIB, 32 * MIB))
    assert gpu.tree.readlink(f"{CLASS_PATH}/gpu1/address_space") == "../gpu0/address_space"
    gpu.write("type", "managed")
    gpu.write("size", "64K")
    gpu.write("location", "host")
    gpu.data().write(b"x" * 65536, 0)
    assert gpu.state()["on_host"] == 16
    gpu.write("prefetch", "device1")
    assert gpu.state()["on_device1"] == 16
    gpu.write("advice", "read-mostly")
    gpu.data().read(65536, 0)
    assert (gpu.state()["on_device1"], gpu.state()["copies"]) == (16, 16)
    wrong = (("advice", "nonsense"), ("advice", "accessed-by"), ("advice", "read-mostly host"), ("location", "moon"))
    assert [errno_of(gpu.write, name, text) for name, text in wrong] == [errno.EINVAL] * 4


@pytest.mark.slow
def test_rmdir_frees(gpu: Gpu) -> None:
    gpu.write("size", "4M")
    gpu.data().write(b"\5" * 4 * MIB, 0)
    gpu.tree.rmdir(BUFFER)
    assert gpu.memory.locations[0].frames.nr_free_bytes == 8 * MIB
    gpu.tree.rmdir(f"{CLIENTS}/c")
    assert gpu.memory.clients == {}
    assert [errno_of(gpu.tree.mkdir, f"{CLIENTS}/{name}") for name in ("a b", ".x", "x" * 65)] == [errno.EINVAL] * 3


@pytest.mark.slow
def test_the_reclaimer_keeps_the_watermarks(gpu: Gpu) -> None:
    woken: list[int] = []
    operation = reclaimer(gpu.memory, WaitQueue(), lambda: woken.append(1))
    next(operation)
    gpu.write("size", "8M")
    file = gpu.data()
    file.write(b"\7" * 7 * MIB, 0)
    assert not woken
    file.write(bytes(range(256)) * 4 * 1024, 7 * MIB)
    assert woken
    for _ in range(8):
        next(operation)
    free = int(gpu.read("free_bytes", f"{CLASS_PATH}/gpu0/memory"))
    assert 8 * MIB * 15 // 100 - 4096 <= free <= 8 * MIB * 15 // 100 + 131072


def test_a_paced_device_makes_the_caller_wait_and_nobody_else() -> None:
    gpu = Gpu()
    gpu.memory.clock = PacedClock()
    gpu.write("size", "1M")
    gpu.memory.clock.sleep_until(gpu.memory.clock.now_ns() + 20_000_000_000)
    file = gpu.registry.nodes[f"{BUFFER}/data"]
    assert isinstance(file, File)
    waits = list(file.attr.read_stream(file.kobj, 0, 10, False))
    assert [isinstance(wait, Debt) and not wait.is_over for wait in waits] == [True]


def test_programs_copy_a_buffer_in_large_pieces(gpu: Gpu) -> None:
    assert gpu.tree.getattr(f"{BUFFER}/data").st_blksize == 128 << 10
    assert gpu.tree.getattr(f"{BUFFER}/size").st_blksize == 4096
