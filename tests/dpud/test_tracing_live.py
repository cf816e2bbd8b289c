# SPDX-License-Identifier: GPL-2.0-only
"""Reading a trace through the mount: who waits, who is disturbed by it, and who is named in it."""

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_daemon import TIMEOUT_S, running

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened"),
]

NR_READERS, NR_MARKERS = 100, 200


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    with running(tmp_path / "new"):
        yield tmp_path / "new"


def numbers_from(pipes: list[int]) -> Iterator[int]:
    """Numbers of the markers that readers have got, as they come in."""
    while pipes:
        ready, _, _ = select.select(pipes, [], [], TIMEOUT_S)
        assert ready, "no reader gets anything any more"
        for pipe in ready:
            data = os.read(pipe, 1 << 16)
            if not data:
                pipes.remove(pipe)
            yield from (int(number) for number in re.findall(rb"tracing_mark_write: marker (\d+)\n", data))


def test_a_hundred_readers_share_what_there_is_and_disturb_nobody(mnt: Path) -> None:
    tracing = mnt / "sys/kernel/tracing"
    with ExitStack() as stack:
        readers = []
        for _ in range(NR_READERS):
            reader = stack.enter_context(subprocess.Popen(["cat", tracing / "trace_pipe"], stdout=subprocess.PIPE))
            stack.callback(reader.kill)
            readers.append(reader)
        for number in range(NR_MARKERS):
            (tracing / "trace_marker").write_text(f"marker {number}\n")
            assert (mnt / "proc/buddyinfo").read_text().startswith("Node 0")
        numbers = numbers_from([reader.stdout.fileno() for reader in readers if reader.stdout])
        assert sorted(next(numbers) for _ in range(NR_MARKERS)) == list(range(NR_MARKERS))
        assert "# entries-in-buffer/entries-written: 0/0 " in (tracing / "trace").read_text()


def test_a_reader_who_has_read_meets_the_end_when_tracing_stops(mnt: Path) -> None:
    tracing = mnt / "sys/kernel/tracing"
    (tracing / "trace_marker").write_text("last words\n")
    with subprocess.Popen(["cat", tracing / "trace_pipe"], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline().endswith(": tracing_mark_write: last words\n")
        (tracing / "tracing_on").write_text("0\n")
        assert reader.wait(TIMEOUT_S) == 0


def test_a_waiting_reader_can_be_interrupted(mnt: Path) -> None:
    with subprocess.Popen(["cat", mnt / "sys/kernel/tracing/trace_pipe"]) as reader:
        with pytest.raises(subprocess.TimeoutExpired):
            reader.wait(0.5)
        reader.send_signal(signal.SIGINT)
        assert reader.wait(TIMEOUT_S) == -signal.SIGINT


def test_the_writer_is_named(mnt: Path) -> None:
    tracing = mnt / "sys/kernel/tracing"
    marker = f"open({str(tracing / 'trace_marker')!r}, 'w').write('hello')"
    done = subprocess.Popen([sys.executable, "-c", f"open('/proc/self/comm', 'w').write('tester'); {marker}"])
    assert done.wait(TIMEOUT_S) == 0
    (line,) = [line for line in (tracing / "trace").read_text().splitlines() if line.endswith("write: hello")]
    assert line.split()[0] == f"tester-{done.pid}"
    assert f"{done.pid} tester\n" in (tracing / "saved_cmdlines").read_text()
