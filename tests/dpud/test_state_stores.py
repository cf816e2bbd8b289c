# SPDX-License-Identifier: GPL-2.0-only
"""Values that are written without Python, and a daemon that is killed before anybody has noted them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dpud.bench.kept import Daemon, started
from dpud.errors import UserError
from dpud.state_stores import KeptStores, Pending, Store
from fs.fuse_stores import checksum

needs_fuse = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened")
NR_STORES, WORD_BYTES, RECORD_BYTES = 256, 8, 32
THRESHOLD, FRAGMENTS = "proc/sys/vm/extfrag_threshold", "proc/sys/vm/dpu_compact_min_fragments"
MASK = (1 << 64) - 1


def put(path: Path, number: int, nodeid: int, value: int, spoilt: int = 0) -> None:
    """As the compiled loop does it, in the format that fs/fuse_stores.py describes."""
    words = np.array([number, nodeid, value, checksum(number, nodeid, value) ^ spoilt], dtype="<i8")
    with open(path, "r+b") as file:
        file.seek(RECORD_BYTES + number % NR_STORES * RECORD_BYTES)
        file.write(words.tobytes())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "stores"
    KeptStores(path).close()
    return path


def test_an_empty_one_has_none(path: Path) -> None:
    assert path.stat().st_size == RECORD_BYTES * (1 + NR_STORES)
    assert KeptStores(path).pending(0) == Pending([])
    assert KeptStores(path).pending(256).stores == []


def test_those_after_a_number_in_their_order_round_the_end(path: Path) -> None:
    for number in range(100, 300):
        put(path, number, 7, number)
    pending = KeptStores(path).pending(250)
    assert pending.stores == [Store(7, number) for number in range(250, 300)]
    assert pending.problem == ""
    assert KeptStores(path).pending(300).stores == []
    assert KeptStores(path).pending(300).problem == "", "those before are noted, whatever they are"


def test_the_last_may_be_torn(path: Path) -> None:
    put(path, 0, 7, 1)
    put(path, 1, 7, 2, spoilt=1)
    assert KeptStores(path).pending(0).stores == [Store(7, 1)]
    assert KeptStores(path).pending(0).problem == ""


def test_one_that_is_not_whole_before_others_is_a_loss(path: Path) -> None:
    put(path, 0, 7, 1)
    put(path, 1, 7, 2, spoilt=1 << 40)
    put(path, 2, 7, 3)
    assert KeptStores(path).pending(0).stores == [Store(7, 1)]
    assert KeptStores(path).pending(0).problem == "store 1 is not whole, and 1 later ones are"


def test_none_is_taken_unless_the_disk_may_be_later(path: Path) -> None:
    for sync_ms, may in ((None, True), (1000, True), (0, False)):
        stores = KeptStores(path, sync_ms)
        assert not stores.is_open
        stores.is_open = True
        assert stores.is_open is may
        stores.close()
        assert path.read_bytes()[:WORD_BYTES] == bytes(WORD_BYTES)


def test_a_checksum_knows_every_bit_and_zeros() -> None:
    right = checksum(5, 6, 7)
    assert checksum(0, 0, 0) != 0
    for bit in range(63):
        flipped = {checksum(5 ^ 1 << bit, 6, 7), checksum(5, 6 ^ 1 << bit, 7), checksum(5, 6, 7 ^ 1 << bit)}
        assert right not in flipped
        assert len(flipped) == 3
    assert len({right, checksum(5, 7, 6), checksum(6, 5, 7), checksum(7, 6, 5)}) == 4


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(tmp_path)
    yield one
    one.kill()


def echo(daemon: Daemon, name: str, *values: int) -> None:
    for value in values:
        (daemon.mount / name).write_text(f"{value}\n")


def shown(daemon: Daemon) -> list[str]:
    """The journal's records of stores, without their numbers."""
    command = [sys.executable, "-P", "-m", "dpud", "journal", "show", str(daemon.state)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    return [line.split(" ", 2)[2] for line in lines if line.split()[1] == "stores"]


def ring(daemon: Daemon) -> list[int]:
    """Values that are in the file `stores`."""
    words = np.fromfile(daemon.state / "stores", dtype="<i8")[4:].reshape(-1, 4)
    return [int(value) for _, nodeid, value, _ in words if nodeid]


@needs_fuse
@pytest.mark.mount
def test_what_nobody_had_noted_is_there_after_kill_9(daemon: Daemon) -> None:
    daemon.start()
    echo(daemon, FRAGMENTS, 3)
    echo(daemon, THRESHOLD, *range(1, 101))
    assert ring(daemon)[-1] == 100
    daemon.kill()
    assert [line.split(" into the file ")[0] for line in shown(daemon)][-1] == "only: 100", "nobody had looked"
    daemon.start()
    assert (daemon.mount / THRESHOLD).read_text() == "100\n"
    assert (daemon.mount / FRAGMENTS).read_text() == "3\n"
    assert ring(daemon) == [], "they are in the journal now"
    assert (
        shown(daemon)[-1].startswith("101 100 into /proc/sys/vm/extfrag_threshold") or "100 into" in shown(daemon)[-1]
    )
    echo(daemon, THRESHOLD, 7)
    (daemon.mount / THRESHOLD).write_text("0x8")  # that needs Python
    daemon.kill()
    daemon.start()
    assert (daemon.mount / THRESHOLD).read_text() == "8\n", "the one before it is not set again"
    assert (daemon.mount / FRAGMENTS).read_text() == "3\n"


def until_made(daemon: Daemon, nr_checkpoints: int) -> None:
    stats = daemon.mount / "sys/kernel/dpud_state/stats"
    while f"checkpoints {nr_checkpoints}\n" not in stats.read_text():
        time.sleep(0.02)


@needs_fuse
@pytest.mark.mount
def test_more_than_the_ring_has_and_a_checkpoint(daemon: Daemon) -> None:
    daemon.start()
    for number in range(1, 700):
        echo(daemon, (THRESHOLD, FRAGMENTS)[number % 2], number)
        if number in (300, 650):
            (daemon.mount / "sys/kernel/dpud_state/checkpoint").write_text("1\n")
            while (
                f"checkpoints {1 + (number == 650)}\n" not in (daemon.mount / "sys/kernel/dpud_state/stats").read_text()
            ):
                pass
    daemon.kill()
    daemon.start()
    assert (daemon.mount / FRAGMENTS).read_text() == "699\n"
    assert (daemon.mount / THRESHOLD).read_text() == "698\n"


@needs_fuse
@pytest.mark.mount
def test_a_loss_is_said_and_the_good_part_kept(daemon: Daemon) -> None:
    daemon.start()
    echo(daemon, THRESHOLD, 1)
    assert (daemon.mount / THRESHOLD).read_text() == "1\n"
    echo(daemon, THRESHOLD, *range(2, 8))
    daemon.kill()
    stores = daemon.state / "stores"
    words = np.fromfile(stores, dtype="<i8")
    at = 4 + 4 * (int(np.flatnonzero(words[4:].reshape(-1, 4)[:, 2] == 4)[0]))
    words[at + 2] = 44
    words.tofile(stores)
    with pytest.raises(
        UserError, match=r"stores: store \d+ is not whole, and 3 later ones are. What was acknowledged is"
    ):
        daemon.start()
    assert "kept as stores.damaged-1" in daemon.start("--recover")
    assert (daemon.mount / THRESHOLD).read_text() == "3\n"
    assert (daemon.state / "stores.damaged-1").stat().st_size == stores.stat().st_size


@needs_fuse
@pytest.mark.mount
def test_where_the_disk_is_waited_for_each_is_noted(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, sync='"always"')
    with started(daemon):
        echo(daemon, THRESHOLD, 1, 2, 3)
        assert ring(daemon) == []
    assert shown(daemon) == []
    with started(daemon):
        assert (daemon.mount / THRESHOLD).read_text() == "3\n"
