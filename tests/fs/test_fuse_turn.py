# SPDX-License-Identifier: GPL-2.0-only
"""Requests that are set aside while another one has the turn."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from mounted import AS_NOBODY, DEADLINE_S, Mounted, is_available, mounted, until

from fs import fuse_turn as turn
from fs.fuse_abi import IN_HEADER, Opcode
from fs.fuse_layout import MAX_ASIDE_BYTES, NR_ASIDE, make_buffer, make_table

HEADER = IN_HEADER.size
READ_AND_TELL = """
import ctypes, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
print("ready", flush=True)
input()
print(ctypes.CDLL(None).read(int(sys.argv[1]), bytes(99), 9))
"""


class Line:
    """A table, and requests that come to it."""

    def __init__(self) -> None:
        self.table = make_table(0, 0)
        self.buffer, self.request, _ = make_buffer()
        self.nr_came = 0

    def comes(self, uid: int = 0, opcode: Opcode = Opcode.LOOKUP, nr_bytes: int = HEADER) -> bool:
        """Is it set aside? Requests are numbered from 1."""
        self.nr_came += 1
        one = self.buffer[0]
        one["length"], one["opcode"], one["unique"], one["uid"] = nr_bytes, opcode, self.nr_came, uid
        return turn.is_set_aside(self.buffer, self.table, nr_bytes)

    def next(self) -> int:
        """The number of the one that is taken; 0: none."""
        return int(self.buffer[0]["unique"]) if turn.take_aside(self.buffer, self.table) else 0

    def rest(self) -> list[int]:
        return list(iter(self.next, 0))


@pytest.fixture
def line() -> Line:
    return Line()


def test_who_finds_the_turn_free_has_it(line: Line) -> None:
    assert not line.comes()
    assert line.comes()
    assert (line.rest(), line.comes()) == ([2], False), "the last one gave it away"


def test_a_request_comes_back_as_it_was(line: Line) -> None:
    assert not line.comes()
    text = os.urandom(5000)
    line.request[HEADER : HEADER + len(text)] = text
    assert line.comes(nr_bytes=HEADER + len(text))
    line.request[:6000] = bytes(6000)
    assert turn.take_aside(line.buffer, line.table) == HEADER + len(text)
    assert (bytes(line.request[HEADER : HEADER + len(text)]), line.buffer[0]["unique"]) == (text, 2)


def test_users_are_served_in_turns(line: Line) -> None:
    """One has asked for five things; others that come later do not wait for all of those."""
    assert not line.comes()
    assert all(line.comes(uid) for uid in (1000, 1000, 1000, 1000, 1000, 33, 33, 7))  # 2 to 6, 7 and 8, 9
    assert line.rest() == [2, 7, 9, 3, 8, 4, 5, 6]


def test_what_nobody_waits_for_and_interrupts_are_sides_of_their_own(line: Line) -> None:
    assert not line.comes()
    opcodes = [Opcode.RELEASE, Opcode.FORGET, Opcode.RELEASEDIR, Opcode.INTERRUPT, Opcode.LOOKUP]  # 2 to 6
    assert all(line.comes(0, opcode) for opcode in opcodes)
    assert line.rest() == [2, 5, 6, 3, 4]


def test_one_that_is_interrupted_is_marked(line: Line) -> None:
    assert not line.comes()
    assert all(line.comes() for _ in range(3))
    assert [turn.interrupt_aside(line.table, number) for number in (1, 3, 99)] == [False, True, False]
    marks = [(line.next(), IN_HEADER.unpack_from(line.request)[-1]) for _ in range(3)]
    assert marks == [(2, 0), (3, 1), (4, 0)]


def test_whoever_gives_the_turn_away_hears_of_what_is_left(line: Line) -> None:
    assert not line.comes()
    assert not turn.give_turn(line.table)
    assert not line.comes()
    assert line.comes()
    assert turn.keeps_turn(line.table)
    assert turn.give_turn(line.table)
    assert turn.takes_over(line.table)
    assert not turn.takes_over(line.table), "somebody is at it"
    assert line.next() == 3
    assert not turn.keeps_turn(line.table)
    assert not turn.takes_over(line.table), "nothing is left"


def test_who_comes_for_the_turn_is_let_in(line: Line) -> None:
    """One that has waited for something goes on, however many are set aside."""
    assert not line.comes()
    assert line.comes()
    taken = threading.Thread(target=turn.take_turn, args=(line.table,))
    taken.start()
    until(lambda: line.table[0]["nr_coming"] == 1)
    assert not turn.keeps_turn(line.table)
    taken.join(DEADLINE_S)  # the turn is that thread's, for ever
    assert line.table[0]["nr_coming"] == 0
    assert line.rest() == [2], "the thread that came has to see to it"


def test_nobody_slips_in_before_who_is_coming(line: Line) -> None:
    assert not line.comes()
    line.table["nr_coming"] = 1  # it is about to lock the mutex
    assert not turn.give_turn(line.table)
    assert line.comes()
    assert not turn.takes_over(line.table)
    line.table["nr_coming"] = 0
    assert turn.takes_over(line.table)
    assert line.rest() == [2]


@pytest.mark.parametrize(("nr_bytes", "fits"), [(HEADER, NR_ASIDE), (1 << 20, MAX_ASIDE_BYTES >> 20)])
def test_only_so_much_is_set_aside(line: Line, nr_bytes: int, fits: int) -> None:
    """The thread that reads one more waits for the turn with it."""
    assert not line.comes()
    assert all(line.comes(nr_bytes=nr_bytes) for _ in range(fits))
    came = []
    waits = threading.Thread(target=lambda: came.append(line.comes(nr_bytes=nr_bytes)))
    waits.start()
    until(lambda: line.table[0]["nr_coming"] == 1)
    assert not turn.keeps_turn(line.table)
    waits.join(DEADLINE_S)
    assert came == [False]
    assert line.rest() == list(range(2, fits + 2))
    assert line.table[0]["aside_bytes"] == 0


# On a mount.


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Mounted]:
    if not is_available("dev-fuse"):
        pytest.skip("no /dev/fuse")
    os.mkfifo(tmp_path / "fifo")
    with mounted(tmp_path, "dev-fuse") as found:
        yield found


@contextmanager
def held_up(mnt: Mounted) -> Iterator[None]:
    """Somebody reads a file that is not ready, and has the turn meanwhile."""
    with subprocess.Popen(["cat", "sys/kernel/debug/toy/stuck"], cwd=mnt.root, stdout=subprocess.PIPE) as reader:
        try:
            with _other_end(mnt.root.with_name("fifo")) as fifo:
                yield
                fifo.write(b"at last\n")
            assert reader.stdout is not None
            assert reader.stdout.read() == b"at last\n"
        finally:
            reader.kill()


def _other_end(path: Path) -> BinaryIO:
    """Of a FIFO that somebody is about to read."""
    found: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # ENXIO: not yet
            found.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        return bool(found)

    until(is_read)
    return open(found[0], "wb", buffering=0)


@pytest.mark.mount
def test_ready_answers_wait_for_nobody(mnt: Mounted) -> None:
    """And those that wait are answered afterwards."""
    ready = os.open(mnt.root / "proc/sys/vm/threshold", os.O_RDONLY)
    assert os.pread(ready, 10, 0) == b"500\n"
    files = [os.open(mnt.root / "proc/buddyinfo", os.O_RDONLY) for _ in range(20)]
    with held_up(mnt):
        waiting = [subprocess.Popen([*AS_NOBODY, "cat"], stdin=file, stdout=subprocess.PIPE) for file in files]
        until(lambda: all(sleeps_in_fuse(process.pid) for process in waiting))
        # An open would ask for the file's mode, if it is more than a second ago that the kernel heard of that.
        assert os.pread(ready, 10, 0) == b"500\n"
    assert {process.communicate(timeout=DEADLINE_S)[0][:7] for process in waiting} == {b"Node 0,"}
    for file in (ready, *files):
        os.close(file)
    assert mnt.stop() == 0


def sleeps_in_fuse(pid: int) -> bool:
    return Path(f"/proc/{pid}/wchan").read_text() == "request_wait_answer"


@pytest.mark.mount
def test_a_signal_ends_no_request_that_need_not_wait(mnt: Mounted) -> None:
    """As in a kernel: SIGCHLD must not make a shell's next open fail."""
    with (mnt.root / "proc/buddyinfo").open() as file:
        command = [sys.executable, "-c", READ_AND_TELL, str(file.fileno())]
        reader = subprocess.Popen(command, pass_fds=[file.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"ready\n"
        with held_up(mnt):
            assert reader.stdin is not None
            reader.stdin.write(b"go\n")
            reader.stdin.flush()
            until(lambda: sleeps_in_fuse(reader.pid))
            reader.send_signal(signal.SIGUSR1)
    assert reader.communicate(timeout=DEADLINE_S)[0] == b"9\n"


@pytest.mark.mount
def test_who_was_killed_before_he_could_wait_does_not_wait(mnt: Mounted) -> None:
    with (mnt.root / "dev/kmsg").open("rb", buffering=0) as file:
        assert file.read(99).endswith(b"first\n")
        with held_up(mnt):
            reader = subprocess.Popen("cat", stdin=file)
            until(lambda: sleeps_in_fuse(reader.pid))
            reader.kill()
    assert reader.wait(DEADLINE_S) == -9


@pytest.mark.mount
def test_a_large_write_can_be_set_aside(mnt: Mounted) -> None:
    mnt.out("mkdir sys/kernel/config/toy/a")
    path, data = mnt.root / "sys/kernel/config/toy/a/data", np.random.default_rng(5).bytes(300_000)
    with path.open("r+b", buffering=0) as file, held_up(mnt):
        command = ["dd", "bs=300000", "iflag=fullblock", "status=none"]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file)
        assert writer.stdin is not None
        writer.stdin.write(data)
        writer.stdin.close()
        until(lambda: sleeps_in_fuse(writer.pid))
    assert writer.wait(DEADLINE_S) == 0
    assert path.read_bytes() == data
