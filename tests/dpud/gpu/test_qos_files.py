# SPDX-License-Identifier: GPL-2.0-only
"""The files of QoS, with the data path below them."""

import errno
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from wiring import errno_of, for_each, run_all, wiring_cases

from dpud.gpu.clock import Clock, ManualClock, PacedClock
from dpud.gpu.qos.replay import replay
from dpud.gpu.system import CLASS_PATH, CONFIG_PATH, GpuConfig, add_files, build
from fs.kernfs import Tree
from kernelsim.attr import Bytes, File, Operation, Registry

KIB, MIB = 1 << 10, 1 << 20
NS_PER_S = 1_000_000_000
QOS = f"{CLASS_PATH}/gpu0/qos"
CLIENTS = f"{CONFIG_PATH}/gpu0/clients"
ABI = tomllib.loads((Path(__file__).parents[2] / "abi" / "qos.toml").read_text())
FACTS: dict[str, dict[str, Any]] = {
    path.replace("{level}", str(level)): facts for path, facts in ABI.items() for level in range(5)
}


class Gpu:
    """A device of 8 MiB, and clients with a buffer of 2 MiB each."""

    def __init__(self, *clients: str, clock: Clock | None = None) -> None:
        self.clock = clock or ManualClock()
        self.memory = build(GpuConfig(1, 8 * MIB, 8 * MIB, 32 * MIB), self.clock)
        self.registry = Registry()
        add_files(self.registry, self.memory)
        self.tree = Tree(self.registry)
        for client in clients or ("c",):
            self.tree.mkdir(f"{CLIENTS}/{client}")
            self.tree.mkdir(f"{CLIENTS}/{client}/buffers/b")
            self.registry.write(f"{CLIENTS}/{client}/buffers/b/size", "2M")

    def read(self, name: str) -> str:
        return self.registry.read(f"{QOS}/{name}").decode().removesuffix("\n")

    def write(self, name: str, text: str) -> None:
        self.registry.write(f"{QOS}/{name}", text)

    def promise(self, client: str, name: str, text: str) -> None:
        self.registry.write(f"{CLIENTS}/{client}/qos_{name}", text)

    def put(self, client: str, nr_bytes: int) -> None:
        self.tree.open(f"{CLIENTS}/{client}/buffers/b/data", os.O_RDWR).write(bytes(nr_bytes), 0)

    def putting(self, client: str, nr_bytes: int) -> Operation[int]:
        """The same as an operation that somebody else drives."""
        file = self.registry.nodes[f"{CLIENTS}/{client}/buffers/b/data"]
        assert isinstance(file, File)
        assert isinstance(file.attr.kind, Bytes)
        return file.attr.write_stream(file.kobj, bytes(nr_bytes))

    def log(self) -> str:
        """In pieces, as cat reads it."""
        file, found = self.tree.open(f"{QOS}/decisions", os.O_RDONLY), b""
        while piece := file.read(100, len(found)):
            found += piece
        return found.decode()

    def traffic(self) -> dict[tuple[str, str], int]:
        rows = (line.split() for line in self.read("traffic").splitlines())
        return {(client, cause): int(nr_bytes) for client, cause, nr_bytes in rows}


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


def test_there_are_these_files_and_no_others(gpu: Gpu) -> None:
    ours = {path: attr.mode for path, _, attr in gpu.registry.walk() if path.startswith(QOS) or "/qos_" in path}
    assert {path: oct(mode) for path, mode in ours.items()} == {p: oct(facts["mode"]) for p, facts in FACTS.items()}


def test_defaults() -> None:
    registry = Gpu().registry
    wanted = {path: facts["default"] + "\n" for path, facts in FACTS.items() if "default" in facts}
    assert {path: registry.read(path).decode() for path in wanted} == wanted


def test_ranges() -> None:
    for_each([path for path, facts in FACTS.items() if "range" in facts and "levels/3" not in path], check_range)


def check_range(path: str) -> None:
    registry = Gpu().registry
    low, high = FACTS[path]["range"]
    for value in (low, high):
        registry.write(path, str(value))
        assert registry.read(path).decode() == f"{value}\n"
    assert [errno_of(registry.write, path, str(value)) for value in (low - 1, high + 1)] == [errno.EINVAL] * 2


def test_wiring() -> None:
    cases = [case for case in wiring_cases(Gpu().registry) if case.path.startswith(QOS) or "/qos_" in case.path]
    run_all(case for case in cases if "/levels/3" not in case.path)


@pytest.mark.slow
def test_a_limit_paces_dd() -> None:
    gpu = Gpu()
    gpu.promise("c", "limit", "1M")
    gpu.promise("c", "burst", "128K")
    gpu.put("c", 2 * MIB)
    assert gpu.clock.now_ns() == pytest.approx(1.875 * NS_PER_S, rel=0.01)  # all but the burst
    assert gpu.traffic()["c", "access"] == 2 * MIB
    assert gpu.read("verify") == "ok"
    assert replay(gpu.log()).nr_grants == 16


def test_what_is_reserved_is_at_most_what_there_is() -> None:
    gpu = Gpu("a", "b")
    gpu.write("total_bandwidth", "100M")
    gpu.promise("a", "reservation", "60M")
    assert errno_of(gpu.promise, "b", "reservation", "50M") == errno.EBUSY
    gpu.promise("b", "reservation", "40M")
    assert gpu.read("reserved") == str(100 * MIB)
    assert errno_of(gpu.write, "total_bandwidth", "99M") == errno.EBUSY
    assert errno_of(gpu.promise, "a", "limit", "50M") == errno.EINVAL
    gpu.promise("a", "limit", "60M")
    rows = {line.split()[0]: line.split()[1:6] for line in gpu.read("clients").splitlines()}
    assert rows["a"] == ["2", str(60 * MIB), str(60 * MIB), str(60 * MIB // 50), "100"]


def test_clients_are_there_before_they_do_anything() -> None:
    gpu = Gpu("b", "a")
    assert [line.split()[0] for line in gpu.read("clients").splitlines()] == ["client", "a", "b"]
    assert gpu.tree.open(f"{CLIENTS}/a/qos_share", os.O_RDONLY).read(9, 0) == b"100\n"
    assert gpu.log() == "", "who looks decides nothing"


def test_a_client_that_goes_gives_its_reservation_back() -> None:
    gpu = Gpu("a", "b")
    gpu.write("total_bandwidth", "100M")
    gpu.promise("a", "reservation", "60M")
    gpu.tree.rmdir(f"{CLIENTS}/a/buffers/b")
    gpu.tree.rmdir(f"{CLIENTS}/a")
    assert gpu.read("reserved") == "0"
    gpu.promise("b", "reservation", "100M")


@pytest.mark.slow
def test_who_waits_holds_nobody_up() -> None:
    """In the daemon: one client has to wait for a second, the other is served at once; the queue shows who waits."""
    gpu = Gpu("slow", "quick", clock=PacedClock())
    gpu.promise("slow", "limit", "256K")
    gpu.promise("slow", "burst", "128K")
    slow = gpu.putting("slow", 256 * KIB)
    waitable = next(slow)
    while waitable is None or waitable.wait(0):  # the first 128 KiB are the burst
        waitable = next(slow)
    for _ in gpu.putting("quick", MIB):
        pass
    assert gpu.traffic() == {("slow", "access"): 128 * KIB, ("quick", "access"): MIB}
    assert gpu.read("queue").split()[:4] == ["slow", "2", "access", str(128 * KIB)]
    slow.close()
    assert gpu.read("queue") == ""
    assert gpu.read("verify") == "ok"


def test_a_promise_that_changes_wakes_who_waits() -> None:
    gpu = Gpu("slow", clock=PacedClock())
    gpu.promise("slow", "limit", "1K")
    gpu.promise("slow", "burst", "1K")
    operation = gpu.putting("slow", 256 * KIB)  # more than four minutes
    for _ in range(3):
        next(operation)
    gpu.promise("slow", "limit", "0")
    for waitable in operation:
        while waitable is not None and not waitable.wait(0.05):
            pass
    assert gpu.traffic()["slow", "access"] == 256 * KIB


@pytest.mark.slow
def test_charges_of_programs_that_move_bytes_themselves() -> None:
    gpu = Gpu()
    gpu.promise("c", "limit", "100M")
    gpu.promise("c", "burst", "1M")
    for _ in range(101):
        gpu.promise("c", "charge", "1M")
    assert gpu.clock.now_ns() == pytest.approx(NS_PER_S, rel=0.001)
    assert gpu.traffic() == {("c", "external"): 101 * MIB}


def test_levels_show_waits_and_missed_targets() -> None:
    gpu = Gpu()
    gpu.write("policy", "adaptive")
    gpu.write("total_bandwidth", "1M")
    gpu.write("burst", "128K")
    gpu.write("levels/2/latency_target_us", "1000")
    gpu.put("c", 512 * KIB)
    seen = dict(line.split() for line in gpu.read("levels/2/stat").splitlines())
    assert (seen["granted"], seen["granted_bytes"], seen["missed"]) == ("4", str(512 * KIB), "3")
    waits = dict(line.split() for line in gpu.read("levels/2/latency").splitlines())
    assert int(waits["max"]) == pytest.approx(NS_PER_S / 8, rel=0.001)
    assert int(gpu.read("levels/2/cap")) > 0


def test_writing_clears_the_decision_log() -> None:
    gpu = Gpu()
    gpu.write("total_bandwidth", "1G")
    assert gpu.log().startswith("state 0 {")
    gpu.tree.open(f"{QOS}/decisions", os.O_WRONLY).write(b"\n", 0)
    assert gpu.log() == ""
    gpu.put("c", 4096)
    assert str(replay(gpu.log())) == "1 decisions of 3 records: the same"
