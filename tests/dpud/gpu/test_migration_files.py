# SPDX-License-Identifier: GPL-2.0-only
"""What a user types: two daemons' trees, a socket between them, and the machine given away as a daemon does."""

import errno
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wiring import errno_of, for_each, run_all, wiring_cases

from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.migration import MigrationModule
from dpud.gpu.system import CLASS_PATH, CONFIG_PATH, GpuConfig, add_files, build
from dpud.inject import BlockingWaitQueue
from dpud.owner import Owner
from fs.kernfs import Tree
from kernelsim.attr import Registry

MIB = 1 << 20
MIGRATION = f"{CLASS_PATH}/gpu0/migration"
CLIENTS = f"{CONFIG_PATH}/gpu0/clients"
FACTS: dict[str, dict[str, Any]] = tomllib.loads((Path(__file__).parents[2] / "abi" / "migration.toml").read_text())


class Daemon:
    """The tree of one, and its lock; the threads are those of a daemon."""

    def __init__(self, name: str = "x", nr_devices: int = 2) -> None:
        self.clock = ManualClock()
        ids = iter(range(100))
        self.migration = MigrationModule(BlockingWaitQueue, lambda: f"{name}{next(ids)}")
        config = GpuConfig(nr_devices, 4 * MIB, 4 * MIB, 4 * MIB, compression=False)
        self.memory = build(config, self.clock, migration=self.migration)
        self.registry = Registry()
        add_files(self.registry, self.memory)
        self.owner = Owner()
        self.tree = Tree(self.registry, self.owner.call)

    def start_threads(self) -> None:
        self.threads = [
            self.owner.background(self.migration.worker()),
            self.owner.background(self.migration.listener()),
        ]

    def close(self) -> None:
        self.owner.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()

    def read(self, name: str) -> str:
        file = self.tree.open(f"{MIGRATION}/{name}", os.O_RDONLY)
        return file.read(1 << 16, 0).decode().removesuffix("\n")

    def write(self, name: str, text: str) -> None:
        self.tree.open(f"{MIGRATION}/{name}", os.O_WRONLY).write(text.encode(), 0)

    def client(self, name: str, data: bytes) -> None:
        self.tree.mkdir(f"{CLIENTS}/{name}")
        self.tree.mkdir(f"{CLIENTS}/{name}/buffers/b")
        file = self.tree.open(f"{CLIENTS}/{name}/buffers/b/size", os.O_WRONLY)
        file.write(str(len(data)).encode(), 0)
        self.put(name, data)

    def put(self, name: str, data: bytes, at: int = 0) -> None:
        file = self.tree.open(f"{CLIENTS}/{name}/buffers/b/data", os.O_RDWR)
        for begin in range(0, len(data), 128 << 10):
            piece = data[begin : begin + (128 << 10)]
            assert file.write(piece, at + begin) == len(piece)

    def get(self, name: str, nr_bytes: int) -> bytes:
        file = self.tree.open(f"{CLIENTS}/{name}/buffers/b/data", os.O_RDONLY)
        return b"".join(file.read(128 << 10, at) for at in range(0, nr_bytes, 128 << 10))

    def wait(self, *states: str) -> str:
        while (state := self.read("state")) not in states:
            self.owner.call(lambda: None)
        return state


@pytest.fixture(scope="module")
def empty() -> Daemon:
    return Daemon()


def test_migration_has_these_files_and_no_others(empty: Daemon) -> None:
    modes = {path: oct(attr.mode) for path, _, attr in empty.registry.walk() if path.startswith(MIGRATION + "/")}
    assert modes == {path: oct(facts["mode"]) for path, facts in FACTS.items()}


def test_defaults(empty: Daemon) -> None:
    wanted = {path: facts["default"] for path, facts in FACTS.items() if "default" in facts}
    assert {path: empty.registry.read(path).decode().rstrip("\n") for path in wanted} == wanted


def test_ranges() -> None:
    for_each([path for path, facts in FACTS.items() if "range" in facts], check_range)


def check_range(path: str) -> None:
    daemon = Daemon()
    low, high = FACTS[path]["range"]
    for value in (low, high):
        daemon.registry.write(path, str(value))
        assert daemon.registry.read(path).decode() == f"{value}\n"
    assert [errno_of(daemon.registry.write, path, str(value)) for value in (low - 1, high + 1)] == [errno.EINVAL] * 2


def test_wiring() -> None:
    run_all(case for case in wiring_cases(Daemon().registry) if case.path.startswith(MIGRATION))


def test_every_device_has_the_same_migration(empty: Daemon) -> None:
    assert Tree(empty.registry).readlink(f"{CLASS_PATH}/gpu1/migration") == "../gpu0/migration"


DATA = np.random.default_rng(3).bytes(2 * MIB)


@pytest.mark.slow
def test_to_another_device_while_the_file_is_written() -> None:
    daemon = Daemon()
    daemon.client("a", DATA)
    daemon.start_threads()
    try:
        daemon.write("strategy", "precopy")
        daemon.write("start", "client=a device=1\n")
        model = bytearray(DATA)
        for nr in range(50):
            daemon.put("a", b"%4d" % nr, nr * 40_000)
            model[nr * 40_000 : nr * 40_000 + 4] = b"%4d" % nr
        assert daemon.wait("completed", "failed") == "completed", daemon.read("why")
        assert daemon.get("a", len(DATA)) == bytes(model)
        head, line = daemon.read("progress").splitlines()
        row = dict(zip(head.split(), line.split(), strict=True))
        assert (row["client"], row["target"], row["state"], row["strategy"]) == ("a", "device1", "completed", "precopy")
        assert int(row["moved_bytes"]) >= 2 * MIB
        assert len(daemon.read("digest")) == 32
        assert daemon.tree.open(f"{CLIENTS}/a/buffers/b/location", os.O_RDONLY).read(100, 0) == b"device1\n"
        state = daemon.tree.open(f"{CLIENTS}/a/buffers/b/state", os.O_RDONLY).read(1000, 0).decode()
        assert "on_device1 512" in state
        assert violations(daemon.memory) == []
    finally:
        daemon.close()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["precopy", "postcopy"])
def test_to_another_daemon_by_its_socket(tmp_path: Path, strategy: str) -> None:
    """And its directory, its files and its bytes are there, and not here any more."""
    here, there = Daemon("h"), Daemon("t")
    here.client("a", DATA)
    here.start_threads()
    there.start_threads()
    try:
        address = f"unix:{tmp_path}/migrate"
        there.write("listen", address)
        assert there.read("listen") == address
        here.write("strategy", strategy)
        here.write("start", f"client=a to={address}")
        if strategy == "postcopy":
            while f"{CLIENTS}/a" not in there.registry.nodes:
                here.read("progress")
            assert there.get("a", len(DATA))[-4096:] == DATA[-4096:]
        assert here.wait("completed", "failed") == "completed", here.read("why")
        assert there.wait("completed") == "completed"
        assert there.get("a", len(DATA)) == DATA
        there.put("a", b"goes on")
        size = here.tree.open(f"{CLIENTS}/a/buffers/b/size", os.O_RDONLY).read(100, 0)
        assert size == b"0\n"
        stat = dict(line.split() for line in there.read("stat").splitlines())
        assert (stat["came"], stat["came_completed"]) == ("1", "1")
        assert here.read("history").splitlines()[1].split()[3] == "completed"
        there.write("listen", "none")
        assert not (tmp_path / "migrate").exists()
        assert violations(there.memory) == violations(here.memory) == []
    finally:
        here.close()
        there.close()


@pytest.mark.slow
def test_a_client_that_was_here_before_is_shown_where_it_was(tmp_path: Path) -> None:
    """It had gone from its second device to another daemon, and comes back, where the first device has more room."""
    here, there = Daemon("h"), Daemon("t")
    group = CLIENTS.replace("gpu0", "gpu1")
    here.tree.mkdir(f"{group}/a")
    here.tree.mkdir(f"{group}/a/buffers/b")
    here.registry.write(f"{group}/a/buffers/b/size", "1M")
    here.memory.write("a", here.memory.clients["a"].regions[0].va, b"abc")
    for each in (here, there):
        each.start_threads()
    try:
        for giver, taker in ((here, there), (there, here)):
            taker.write("listen", f"unix:{tmp_path}/{taker.migration._new_id()}")
            giver.write("start", f"client=a to={taker.read('listen')}")
            while giver.read("stat").split()[3] == "0" and giver.read("state") != "failed":
                giver.owner.call(lambda: None)
            while not taker.memory.clients["a"].regions:
                taker.owner.call(lambda: None)
        assert [path for path in here.registry.nodes if path.endswith("/a/buffers/b")] == [f"{group}/a/buffers/b"]
        assert here.registry.read(f"{group}/a/buffers/b/size") == b"1048576\n"
        assert here.memory.read("a", here.memory.clients["a"].regions[0].va, 3) == b"abc"
        assert errno_of(here.tree.mkdir, f"{CLIENTS}/a") == errno.EEXIST
    finally:
        here.close()
        there.close()


@pytest.mark.slow
def test_nobody_listens(tmp_path: Path) -> None:
    daemon = Daemon()
    daemon.client("a", DATA)
    daemon.start_threads()
    try:
        daemon.write("start", f"client=a to=unix:{tmp_path}/nobody")
        assert daemon.wait("completed", "failed") == "failed"
        assert "no connection" in daemon.read("why")
        assert daemon.get("a", len(DATA)) == DATA
    finally:
        daemon.close()


def test_errors() -> None:
    daemon = Daemon()
    daemon.client("a", b"x")

    def fails(name: str, text: str) -> int | None:
        return errno_of(daemon.registry.write, f"{MIGRATION}/{name}", text)

    assert fails("start", "client=b device=1") == errno.ENOENT
    assert fails("start", "client=a device=7") == errno.EINVAL
    assert fails("start", "nonsense") == errno.EINVAL
    assert fails("cancel", "1") == errno.ESRCH
    assert fails("listen", "carrier pigeon") == errno.EINVAL
    assert fails("listen", "unix:/nowhere/at/all") == errno.ENOENT
    assert fails("recover", "m17") == errno.ENOENT
    assert fails("strategy", "teleport") == errno.EINVAL


def test_an_earlier_daemon_s_promises_are_found_again(tmp_path: Path) -> None:
    first = Daemon()
    first.registry.write(f"{MIGRATION}/journal", str(tmp_path))
    first.migration.out_journal.append("m1", "begun")
    first.migration.out_journal.append("m2", "begun")
    first.migration.out_journal.append("m2", "handed-over", postcopy=False, digest="")
    second = Daemon()
    second.registry.write(f"{MIGRATION}/journal", str(tmp_path))
    assert second.registry.read(f"{MIGRATION}/journal").decode() == f"{tmp_path}\n"
    lines = second.registry.read(f"{MIGRATION}/history").decode().splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["m2"]
    assert b"ask the target" in second.registry.read(f"{MIGRATION}/why")
