# SPDX-License-Identifier: GPL-2.0-only
"""Real files that are damaged, cut, taken away, or have no room: known, said and counted; never silent."""

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import errno_of
from swapping import BLOCK, blob_of, items, small_space

from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import CorruptPage
from dpud.gpu.swap import SwapSpace, new_tier
from dpud.gpu.swap.blockfile import BlockFile
from dpud.gpu.swap.slots import open_label, scan


@pytest.fixture
def space(tmp_path: Path) -> Iterator[SwapSpace]:
    space = small_space(("nvme", 64), ("ssd", 64), folder=tmp_path)
    yield space
    assert space.violations() == []
    space.close()


def flip(path: Path, at: int) -> None:
    """One bit."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.slow
def test_any_flipped_bit_is_found(space: SwapSpace, tmp_path: Path) -> None:
    """In any byte of a header, and here and there in the data."""
    nr_found = 0
    for at in [*range(0, 64, 3), *range(64, 64 + BLOCK, 401)]:
        space.write(items(1, 1))
        slot = dict(space.slots())[1]
        flip(tmp_path / "nvme", slot.at + at)
        with pytest.raises(CorruptPage) as caught:
            space.read(1)
        assert (caught.value.errno, caught.value.key) == (errno.EIO, 1)
        nr_found += 1
    assert space.events["corrupt"] == nr_found
    assert space.tiers[0].nr_errors == nr_found


def test_a_lost_page_stays_lost_until_it_is_written_anew(
    space: SwapSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space.write(items(1, 2))
    flip(tmp_path / "nvme", dict(space.slots())[1].at + 100)
    for _ in range(2):
        assert errno_of(space.read, 1) == errno.EIO
    assert "page 0x1" in caplog.text
    assert space.read(2) == blob_of(2)
    assert 1 in space
    space.write(items(1, 1))
    assert space.read(1) == blob_of(1)


def test_damage_found_while_pages_sink_is_not_passed_on(space: SwapSpace, tmp_path: Path) -> None:
    space.write(items(0, 6))
    flip(tmp_path / "nvme", dict(space.slots())[3].at + 70)
    space.demote("nvme", 64 * BLOCK)
    assert errno_of(space.read, 3) == errno.EIO
    assert [space.read(key) for key in (0, 1, 2, 4, 5)] == [blob_of(key) for key in (0, 1, 2, 4, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("nr_bytes", [1, 63, 64, 100, BLOCK, BLOCK + 63])
def test_a_torn_write_is_found(space: SwapSpace, tmp_path: Path, nr_bytes: int) -> None:
    """Only the first bytes of a slot got there; behind them is what was there before."""
    space.write(items(1, 1))
    old = (tmp_path / "nvme").read_bytes()
    space.drop(1)
    space.write([(2, blob_of(99))])
    slot = dict(space.slots())[2]
    assert slot.at == BLOCK  # where page 1 was
    with (tmp_path / "nvme").open("r+b") as file:
        file.seek(slot.at + nr_bytes)
        file.write(old[slot.at + nr_bytes : slot.at + slot.nr_bytes])
    assert errno_of(space.read, 2) == errno.EIO


def test_a_write_that_never_got_there_is_found(space: SwapSpace, tmp_path: Path) -> None:
    """The slot holds a whole record, of the same page, but of an older write."""
    space.write(items(1, 1))
    old = (tmp_path / "nvme").read_bytes()
    space.drop(1)
    space.write([(1, blob_of(55))])
    (tmp_path / "nvme").write_bytes(old)
    with pytest.raises(CorruptPage, match="never got there"):
        space.read(1)


def test_a_cut_file_loses_what_was_cut_off_and_no_more(
    space: SwapSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space.write(items(0, 10))
    last = dict(space.slots())[9]
    os.truncate(tmp_path / "nvme", last.at)
    assert errno_of(space.read, 9) == errno.EIO
    assert space.read(0) == blob_of(0)
    assert "cut" in caplog.text
    space.write(items(20, 2))
    assert space.tier_of(20) is space.tiers[1]


def test_a_file_that_is_gone_takes_nothing_more(
    space: SwapSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space.write(items(0, 2))
    (tmp_path / "nvme").unlink()
    space.write(items(10, 2))
    assert space.tier_of(10) is space.tiers[1]
    assert "is gone" in caplog.text
    assert space.tiers[0].trouble is not None
    assert space.read(0) == blob_of(0)  # we still have it open


def test_a_file_that_was_replaced_is_gone_too(space: SwapSpace, tmp_path: Path) -> None:
    space.write(items(0, 2))
    (tmp_path / "nvme").rename(tmp_path / "away")
    (tmp_path / "nvme").write_bytes(b"something else")
    space.write(items(10, 2))
    assert space.tier_of(10) is space.tiers[1]


def test_a_tier_that_does_not_answer_is_an_error_not_a_loss(space: SwapSpace, caplog: pytest.LogCaptureFixture) -> None:
    """A descriptor that cannot be read stands for a disk that gives EIO."""
    space.write(items(0, 1))
    tier = space.tiers[0]
    good, tier.file._fd = tier.file._fd, os.open("/dev/null", os.O_WRONLY)
    assert errno_of(space.read, 0) == errno.EIO
    assert space.events["read_errors"] == 1
    os.close(tier.file._fd)
    tier.file._fd = good
    assert space.read(0) == blob_of(0)
    assert caplog.text


def test_another_file_is_not_taken_for_swap(tmp_path: Path) -> None:
    (tmp_path / "ssd").write_bytes(b"precious" * 4096)
    with pytest.raises(CorruptPage, match="not a swap file"):
        new_tier("ssd", 64 * BLOCK, ManualClock(), path=tmp_path / "ssd")
    assert (tmp_path / "ssd").read_bytes()[:8] == b"precious"


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may be written beyond 20 blocks: write(2) gives part, then EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_in_the_middle_of_a_write(
    small_files: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space = small_space(("nvme", 64), ("ssd", 64), folder=tmp_path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * BLOCK, hard))
    space.write(items(0, 12))
    space.write(items(20, 16))
    assert errno_of(space.write, items(40, 16)) == errno.ENOSPC
    assert [space.read(key) for key, _ in space.slots()] == [blob_of(key) for key, _ in space.slots()]
    assert all(key in space for key in [*range(12), *range(20, 36)])
    assert not any(key in space for key in range(40, 56))
    assert space.violations() == []
    assert "full" in caplog.text
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    space.write(items(40, 16))
    assert space.read(55) == blob_of(55)
    space.close()


WRITER = """
import sys
from pathlib import Path
from swapping import blob_of, small_space
space = small_space(("nvme", 400), ("hdd", 2000), folder=Path(sys.argv[1]))
generation = 0
while True:
    generation += 1
    space.write([(key, blob_of(1000 * generation + key)) for key in range(generation % 7, 40)])
    print(generation, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 5, 20])
def test_killed_while_it_writes(tmp_path: Path, after: int) -> None:
    """Whatever was said to be written is there, whole; whatever else is there is whole, or known not to be."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    paths = os.pathsep.join([os.getcwd(), str(Path(__file__).parent)])
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert child.stdout is not None
    said = [int(child.stdout.readline()) for _ in range(after)]
    child.send_signal(signal.SIGKILL)
    said += [int(line) for line in child.stdout if line.endswith("\n")]
    child.wait()
    logging.debug("killed after %d writes", said[-1])
    latest: dict[int, int] = {}
    for generation in said:
        latest.update(dict.fromkeys(range(generation % 7, 40), generation))
    for key, generation in latest.items():
        found = best_of(tmp_path, key)
        assert found in {(1000 * g + key) for g in (generation, said[-1] + 1)}


def best_of(folder: Path, key: int) -> int:
    """Which write the newest whole record of a page is from."""
    records = []
    for name, nr_blocks in (("nvme", 401), ("hdd", 2001)):
        file = BlockFile.named(name, nr_blocks, folder / name)
        records += [each for each in scan(file, open_label(file)) if each.key == key and each.blob is not None]
        file.close()
    newest = max(records, key=lambda each: each.generation)
    seeds = [seed for seed in range(key, 1_000_000, 1000) if seed > key]
    return next(seed for seed in seeds if blob_of(seed) == newest.blob)
