# SPDX-License-Identifier: GPL-2.0-only
"""The files of fault recovery, with the data path below them."""

import errno
import os
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wiring import errno_of, for_each, run_all, wiring_cases

from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.fault.files import CheckpointFiles, FaultFiles
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.system import CLASS_PATH, CONFIG_PATH, GpuConfig, add_files, build
from fs.kernfs import Tree
from kernelsim.attr import Registry

MIB = 1 << 20
FAULT = f"{CLASS_PATH}/gpu0/fault"
CLIENT = f"{CONFIG_PATH}/gpu0/clients/train"
POINTS = ("fail_bit", "fail_word", "fail_row", "fail_bank", "fail_device")
ABI = tomllib.loads((Path(__file__).parents[2] / "abi" / "fault.toml").read_text())
FACTS: dict[str, dict[str, Any]] = {
    f"{FAULT}/{path.replace('{point}', point)}": facts for path, facts in ABI.items() for point in POINTS
}


class Gpu:
    """Devices of 4 MiB with a pool behind them, and a client that has a buffer of noise."""

    def __init__(self, nr_bytes: int = MIB, nr_devices: int = 1, **config: Any) -> None:
        self.clock = ManualClock()
        self.memory = build(GpuConfig(nr_devices, 4 * MIB, 8 * MIB, 8 * MIB, **config), self.clock)
        fault = self.memory.fault
        assert isinstance(fault, FaultModule)
        self.fault = fault
        self.registry = Registry()
        add_files(self.registry, self.memory)
        self.tree = Tree(self.registry)
        self.data = np.random.default_rng(9).bytes(nr_bytes)
        if nr_bytes:
            self.tree.mkdir(CLIENT)
            self.add_buffer("b")

    def add_buffer(self, name: str) -> None:
        self.tree.mkdir(f"{CLIENT}/buffers/{name}")
        self.registry.write(f"{CLIENT}/buffers/{name}/size", str(len(self.data)))
        self.put(self.data, name)

    def put(self, data: bytes, name: str = "b", at: int = 0) -> None:
        assert self.tree.open(f"{CLIENT}/buffers/{name}/data", os.O_RDWR).write(data, at) == len(data)

    def bytes(self, name: str = "b") -> bytes:
        file = self.tree.open(f"{CLIENT}/buffers/{name}/data", os.O_RDONLY)
        return b"".join(file.read(MIB, at) for at in range(0, len(self.data), MIB))

    def read(self, name: str) -> str:
        return self.text(f"{FAULT}/{name}")

    def text(self, path: str) -> str:
        return self.tree.open(path, os.O_RDONLY).read(1 << 20, 0).decode().removesuffix("\n")

    def write(self, name: str, text: str) -> None:
        self.registry.write(f"{FAULT}/{name}", text)

    def stat(self) -> dict[str, int]:
        return {name: int(value) for name, value in (line.split() for line in self.read("stat").splitlines())}


@pytest.fixture(scope="module")
def empty() -> Gpu:
    return Gpu(0)


def test_fault_has_these_files_and_no_others(empty: Gpu) -> None:
    modes = {path: oct(attr.mode) for path, _, attr in empty.registry.walk() if path.startswith(f"{FAULT}/")}
    assert modes == {path: oct(facts["mode"]) for path, facts in FACTS.items()}


def test_defaults(empty: Gpu) -> None:
    expected = {path: facts["default"] for path, facts in FACTS.items() if "default" in facts}
    assert {path: empty.text(path) for path in expected} == expected


def test_ranges(empty: Gpu) -> None:
    ranges = [path for path, facts in FACTS.items() if "range" in facts and ("fail_" not in path or "fail_row" in path)]
    for_each(ranges, partial(check_range, empty))


def check_range(empty: Gpu, path: str) -> None:
    before = empty.registry.read(path).decode()
    low, high = FACTS[path]["range"]
    for value in (low, high):
        empty.registry.write(path, str(value))
        assert empty.registry.read(path).decode() == f"{value}\n"
    assert [errno_of(empty.registry.write, path, str(value)) for value in (low - 1, high + 1)] == [errno.EINVAL] * 2
    empty.registry.write(path, before)


def test_wiring() -> None:
    cases = [case for case in wiring_cases(Gpu(0).registry) if case.path.startswith(f"{FAULT}/")]
    run_all(case for case in cases if "/fail_" not in case.path or "/fail_row/" in case.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("inject", "byte"),
        ("inject", "bit bit=72"),
        ("inject", "bit bits=0"),
        ("inject", "bit stuck=2"),
        ("inject", "bit gpu=7"),
        ("inject", "bit location=device9"),
        ("inject", "bit address=0x400000"),
        ("inject", "bit va=0"),
        ("inject", "bit client=nobody"),
        ("inject", "bit where=here"),
        ("inject", "bit nr=x"),
        ("inject", "device location=host"),
        ("inject", "--inject --gpuid 0 -f 999 -v 1"),
        ("inject", "--inject --gpuid 1 -f 311 -v 1"),
        ("inject", "--inject --gpuid 0 -f 230 -v 31"),
        ("ack", "1"),
        ("ack", "-1"),
        ("ack", "some"),
        ("spare", "host"),
        ("drain", "host"),
        ("reset", "device7"),
        ("checkpoint/interval", "0"),
        ("checkpoint/interval", "-3"),
        ("checkpoint/interval", "nan"),
        ("checkpoint/interval", "inf"),
        ("checkpoint/mtbf", "soon"),
        ("checkpoint/create", "train half"),
        ("checkpoint/restore", "train x"),
    ],
)
def test_what_makes_no_sense_is_refused(empty: Gpu, name: str, text: str) -> None:
    assert errno_of(empty.write, name, text) == errno.EINVAL
    assert empty.fault.events.nr_events == 0
    assert all(cells.is_quiet for cells in empty.fault.cells)


@pytest.mark.parametrize("name", ["create", "rollback", "restore"])
def test_checkpoints_of_nobody(empty: Gpu, name: str) -> None:
    assert errno_of(empty.write, f"checkpoint/{name}", "nobody") == errno.ENOENT


@pytest.mark.slow
def test_an_injected_error_is_an_event_until_it_is_acknowledged() -> None:
    gpu = Gpu()
    gpu.write("inject", "bit bits=2 client=train seed=1")
    assert errno_of(gpu.bytes) == errno.EIO
    lines = gpu.read("events").splitlines()
    assert [line.split("Xid ")[1].split()[0] for line in lines] == ["48", "63", "94"]
    assert all("client=train" in lines[at] for at in (0, 2))
    assert gpu.read("counters").splitlines()[0] == "48 device0 1 1 dbe"
    assert gpu.read("unacknowledged") == "3"
    gpu.write("ack", "1")
    assert (gpu.read("ack"), gpu.read("unacknowledged")) == ("1", "2")
    assert gpu.read("counters").splitlines()[0] == "48 device0 1 0 dbe"
    gpu.write("ack", "all")
    assert gpu.read("unacknowledged") == "0"
    assert errno_of(gpu.write, "ack", "2") == errno.EINVAL
    gpu.put(gpu.data)
    gpu.write("inject", "bit bits=2 client=train seed=2")
    assert errno_of(gpu.bytes) == errno.EIO
    assert gpu.read("counters").splitlines()[0] == "48 device0 2 1 dbe"


@pytest.mark.slow
@pytest.mark.parametrize(("field", "number"), [("310", 0), ("312", 0), ("311", errno.EIO), ("313", errno.EIO)])
def test_what_dcgmi_takes(field: str, number: int) -> None:
    gpu = Gpu()
    gpu.write("inject", f"--inject --gpuid 0 -f {field} -v 1")
    assert errno_of(gpu.bytes) == number
    assert gpu.stat()["corrected"] == (0 if number else 1)
    assert gpu.stat()["injected_bit"] == 1


@pytest.mark.slow
def test_a_device_that_falls_off_the_bus_and_the_spare_that_takes_over() -> None:
    gpu = Gpu(nr_devices=3)
    gpu.write("spare", "device2")
    gpu.write("checkpoint/create", "train")
    gpu.put(b"after", at=5000)
    gpu.write("inject", "--inject --gpuid 0 -f 230 -v 79")
    assert gpu.bytes() == gpu.data  # back at the checkpoint
    assert gpu.registry.read(f"{CLIENT}/buffers/b/location") == b"device2\n"
    assert gpu.read("counters").splitlines()[0] == "79 device0 1 1 off_the_bus"
    assert "checkpoint=255" in gpu.read("failovers")
    assert "rolled_back=1" in gpu.read("failovers")
    assert gpu.read("recovery_action").splitlines()[0] == "device0 reset"
    assert gpu.registry.read(f"{CLASS_PATH}/gpu0/memory/free_bytes") == b"0\n"
    assert violations(gpu.memory) == []
    gpu.write("reset", "device0")
    assert gpu.read("recovery_action").splitlines()[0] == "device0 none"
    assert int(gpu.registry.read(f"{CLASS_PATH}/gpu0/memory/free_bytes")) == 4 * MIB
    assert violations(gpu.memory) == []


def test_draining_takes_everything_along() -> None:
    gpu = Gpu(nr_devices=2)
    gpu.write("drain", "device0")
    assert gpu.registry.read(f"{CLIENT}/buffers/b/location") == b"device1\n"
    assert int(gpu.registry.read(f"{CLASS_PATH}/gpu0/memory/free_bytes")) == 4 * MIB
    assert gpu.bytes() == gpu.data
    assert "device=256" in gpu.read("failovers")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.slow
def test_faults_by_chance_in_the_kernel_s_manner(point: str) -> None:
    gpu = Gpu(nr_devices=2)
    gpu.write("checkpoint/create", "train")
    for name, value in (("interval", "3"), ("times", "2"), ("probability", "100")):
        gpu.write(f"{point}/{name}", value)
    for _ in range(12):
        assert gpu.bytes() == gpu.data  # what breaks is in the checkpoint
    assert gpu.read(f"{point}/injected") == "2"
    assert gpu.read(f"{point}/times") == "0"
    assert violations(gpu.memory) == []


def test_nth_strikes_once() -> None:
    gpu = Gpu()
    gpu.write("fail_word/nth", "2")
    assert errno_of(gpu.bytes) == errno.EIO
    assert gpu.read("fail_word/nth") == "0"


@pytest.mark.slow
def test_scrub() -> None:
    gpu = Gpu()
    gpu.write("inject", "bit nr=20 seed=3")
    gpu.write("scrub", "1")
    assert gpu.stat()["suspect_frames"] == 0
    assert gpu.stat()["scrub_rounds"] == 1
    assert gpu.bytes() == gpu.data


@pytest.mark.slow
def test_checkpoint_files() -> None:
    gpu = Gpu()
    gpu.write("checkpoint/create", "train")
    gpu.put(b"x" * 10_000)
    gpu.write("checkpoint/create", "train")
    rows = [line.split() for line in gpu.read("checkpoint/list").splitlines()]
    assert [row[:3] for row in rows] == [["train", "1", "full"], ["train", "2", "1"]]
    assert [row[4] for row in rows] == ["256", "3"]
    gpu.put(b"y" * 10_000)
    gpu.write("checkpoint/rollback", "train")
    assert gpu.bytes() == b"x" * 10_000 + gpu.data[10_000:]
    gpu.write("checkpoint/restore", "train 1")
    assert gpu.bytes() == gpu.data
    gpu.write("checkpoint/create", "train full")
    assert gpu.read("checkpoint/list").splitlines()[-1].split()[2] == "full"
    assert float(gpu.read("checkpoint/cost")) > 0
    gpu.write("checkpoint/mtbf", "3600")
    cost_s = float(gpu.read("checkpoint/cost"))
    assert float(gpu.read("checkpoint/interval_now")) == pytest.approx((2 * cost_s * 3600) ** 0.5, rel=0.01)
    gpu.write("checkpoint/interval", "2.5")
    assert (gpu.read("checkpoint/interval"), gpu.read("checkpoint/interval_now")) == ("2.5", "2.500000")


def test_the_guide_s_table_has_every_file() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "guide.md").read_text()
    _, _, rest = guide.partition("## When memory breaks")
    section = rest.partition("\n## ")[0]
    for attr in (*FaultFiles.attrs, *CheckpointFiles.attrs):
        assert f"`{attr.name}`" in section or f" {attr.name}" in section or f"{attr.name}`" in section, attr.name


def guide_commands() -> list[str]:
    """The indented lines of the guide's section, without what they say."""
    guide = (Path(__file__).parents[3] / "docs" / "guide.md").read_text()
    section = guide.partition("## When memory breaks")[2].partition("\n## ")[0]
    lines = [line.partition(" # ")[0].strip() for line in section.splitlines() if line.startswith("    ")]
    return [line for line in lines if line]


@pytest.mark.slow
def test_the_guide_s_commands_run() -> None:
    gpu, folder, nr_run = Gpu(), "", 0
    for line in guide_commands():
        word, *rest = line.split()
        match word:
            case "cd":
                folder = rest[0]
            case "cat":
                nr_run += sum(gpu.text(f"{folder}/{name}") is not None for name in rest)
            case "echo":
                text, _, name = line.removeprefix("echo ").partition(" > ")
                nr_run += gpu.registry.write(f"{folder}/{name}", text + "\n") > 0
            case _:
                pytest.fail(f"what is {line!r}?")
    assert nr_run >= 15
    assert gpu.read("policy") == "retry [remap] migrate failover checkpoint-restore"
    assert gpu.read("unacknowledged") == "0"
    assert gpu.stat()["injected_bit"] == 8
