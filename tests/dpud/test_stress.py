# SPDX-License-Identifier: GPL-2.0-only
"""`dpud stress`: it finds nothing where nothing is wrong, and does find what is."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dpud import stress
from dpud.errors import UserError
from dpud.gpu.address_space.regions import PageState

MIB = 1 << 20


def started(nr_steps: int, compression: bool = True) -> stress.Stress:
    """Two clients, 16 MiB on 8, after some steps in turns."""
    options = stress.Options(2, 1.0, 16 * MIB, 8 * MIB, compression, True, 7)
    found = stress.Stress(stress._memory(options), options, 7)
    for worker in found.workers:
        worker.fill(found.tally)
    for _ in range(nr_steps):
        for worker in found.workers:
            worker.step(found.tally)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("compression", [True, False])
def test_every_byte_is_right(compression: bool) -> None:
    said: list[str] = []
    run = started(400, compression)
    assert run.verdict(said.append) == 0
    assert said[-1] == "every byte was right"
    assert run.memory.residency.events["evicted"] > 500
    assert run.memory.space.faults.served["from_store"] > 100
    assert {"read", "write", "pressure", "free and allocate"} == set(run.tally.ops)


@pytest.mark.slow
def test_one_wrong_bit_on_the_device_is_found() -> None:
    run = started(50)
    buffer = next(b for worker in run.workers for b in worker.buffers if any(b.versions))
    region = run.memory.space.regions.find(buffer.va)
    assert region is not None
    page = int(np.flatnonzero(region.state == PageState.RESIDENT)[0])
    location = run.memory.locations[region.home[page]]
    location._buffer.bytes[int(region.frame[page]) * 2048 + 99] ^= 1  # type: ignore[attr-defined]
    said: list[str] = []
    assert run.verdict(said.append) == 1
    assert any("are not what was written" in line for line in said)


def test_pages_differ_by_number_and_version() -> None:
    rng = np.random.default_rng(0)
    for kind in range(5):
        content = stress.Content(4096, kind, rng)
        pages = {content.page(1, page, version) for page in range(20) for version in range(1, 20)}
        assert len(pages) == 20 * 19
        assert {len(page) for page in pages} == {4096}
        assert content.page(1, 5, 0) == bytes(4096)


def test_without_anything_behind_it_the_device_has_to_be_large_enough() -> None:
    with pytest.raises(UserError, match="--size up to 8"):
        stress._memory(stress.Options(size=32 * MIB, device=8 * MIB, compression=False, swap=False))
    memory = stress._memory(stress.Options(size=33 * MIB, compression=False, swap=False))
    assert memory.locations[0].frames.nr_bytes == 34 * MIB


@pytest.mark.slow
def test_who_interrupts_it_is_told_of_what_was_done() -> None:
    command = [
        sys.executable,
        "-m",
        "dpud",
        "stress",
        "--threads",
        "2",
        "--duration",
        "60",
        "--size",
        "16",
        "--no-swap",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = [process.stderr.readline(), process.stderr.readline()]
        assert said[-1] == "all buffers are filled\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        said += process.stderr.read().splitlines()
        assert process.wait(60) == 130
    assert any(line.startswith("interrupted after ") for line in said)
    assert said[-1] == "every byte was right"


@pytest.mark.slow
def test_the_command_line() -> None:
    command = [
        sys.executable,
        "-m",
        "dpud",
        "stress",
        "--threads",
        "3",
        "--duration",
        "2",
        "--size",
        "16",
        "--seed",
        "5",
    ]
    done = subprocess.run([*command, "--device", "8"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stderr.splitlines()
    assert first == "seed 5, 3 threads, 16 MiB on a device of 8 MiB with CompressedPool and SwapSpace behind it"
    assert last == "every byte was right"
