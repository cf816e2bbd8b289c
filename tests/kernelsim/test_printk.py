# SPDX-License-Identifier: GPL-2.0-only
"""The kernel log against Documentation/ABI/testing/dev-kmsg, and as util-linux dmesg reads it."""

import errno
import os
import re
from functools import partial

import pytest
from wiring import errno_of

from fs.kernfs import Tree
from kernelsim import printk as printk_module
from kernelsim.attr import Operation, Registry, StreamOverrun, complete
from kernelsim.printk import Printk
from kernelsim.timer import ManualClock
from kernelsim.wait import WaitQueue

RECORD = re.compile(rb"(\d+),(\d+),(\d+),([-c]);([ -~]*)\n")


class Log:
    """A log and a reader's view of it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.printk = Printk(self.clock.now_ns, WaitQueue())

    def pread(self, pos: int, size: int = 8191) -> bytes:
        """One non-blocking read(2) of /dev/kmsg."""
        return complete(Printk.kmsg.read_stream(self.printk, pos, size, True))

    def write(self, data: bytes) -> int:
        return complete(Printk.kmsg.write_stream(self.printk, data))

    def dmesg(self, limit: int = 100_000) -> list[bytes]:
        """Read from the start until there is nothing new, as dmesg does."""
        records: list[bytes] = []
        pos = 0
        while len(records) < limit:
            if errno_of(self.pread, pos) == errno.EAGAIN:
                return records
            records.append(self.pread(pos))
            pos += len(records[-1])
        raise AssertionError("the log does not end")


def test_a_record_is_priority_sequence_microseconds_and_text() -> None:
    log = Log()
    log.clock.advance(1_234_567_890)
    log.printk("DPU: hello")
    log.printk("bad", printk_module.KERN_ERR)
    assert log.dmesg() == [b"6,0,1234567,-;DPU: hello\n", b"3,1,1234567,-;bad\n"]


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        (b"plain\n", b"12,0,0,-;plain\n"),  # facility 1 (user), level 4 (warning)
        (b"<3>x", b"11,0,0,-;x\n"),
        (b"<6>x\n", b"14,0,0,-;x\n"),
        (b"<0>x", b"8,0,0,-;x\n"),  # user space cannot speak as the kernel
        (b"<30>x", b"30,0,0,-;x\n"),  # facility 3 (daemon), level 6
        (b"<x>y", b"12,0,0,-;<x>y\n"),
        ("<\u0663>x".encode(), b"12,0,0,-;<\\xd9\\xa3>x\n"),  # a digit, but not an ASCII one
        (b"<3x", b"12,0,0,-;<3x\n"),
        (b"a\tb\\c\x7f\xc3\xa9", b"12,0,0,-;a\\x09b\\x5cc\\x7f\\xc3\\xa9\n"),
        (b"\xff\xfe", b"12,0,0,-;\\xff\\xfe\n"),
    ],
)
def test_writing(written: bytes, stored: bytes) -> None:
    log = Log()
    assert log.write(written) == len(written)
    assert log.dmesg() == [stored]


def test_a_line_of_1024_bytes_is_the_longest() -> None:
    log = Log()
    assert log.write(b"x" * 1024) == 1024  # of which 1023 are kept: a record has room for the NUL
    assert log.dmesg()[-1].endswith(b";" + b"x" * 1023 + b"\n")
    with pytest.raises(OSError, match="too long") as caught:
        log.write(b"x" * 1025)
    assert caught.value.errno == errno.EINVAL
    assert len(log.dmesg()) == 1


def test_one_record_a_read_and_never_part_of_one() -> None:
    log = Log()
    for text in ("one", "two", "three"):
        log.printk(text)
    first = log.pread(0)
    assert first == b"6,0,0,-;one\n"
    assert log.pread(len(first)) == b"6,1,0,-;two\n"
    with pytest.raises(OSError, match="smaller") as caught:
        log.pread(0, len(first) - 1)
    assert caught.value.errno == errno.EINVAL
    assert log.pread(0, len(first)) == first
    assert log.pread(3) == first[3:]  # a reader that stopped inside a record gets the rest of it


def test_the_end_is_eagain_and_a_waiting_reader_goes_on_with_the_next_record() -> None:
    log = Log()
    log.printk("one")
    end = Printk.kmsg.stream_size(log.printk)
    assert end == len(log.pread(0))
    with pytest.raises(OSError, match="no more") as caught:
        log.pread(end)
    assert caught.value.errno == errno.EAGAIN
    reader: Operation[bytes] = Printk.kmsg.read_stream(log.printk, end, 8191, False)
    assert next(reader) is not None
    assert next(reader) is not None
    log.printk("two")
    with pytest.raises(StopIteration) as stopped:
        next(reader)
    assert stopped.value.value == b"6,1,0,-;two\n"


def test_every_record_parses_whatever_is_logged() -> None:
    log = Log()
    for code in range(256):
        log.write(bytes([code]) + b"x")
    for seq, record in enumerate(log.dmesg()):
        parsed = RECORD.fullmatch(record)
        assert parsed
        assert int(parsed[2]) == seq


def test_lines_are_the_texts() -> None:
    log = Log()
    log.printk("DPU compaction completed: 128 pages moved in 234567 ns")
    assert log.printk.lines() == ["DPU compaction completed: 128 pages moved in 234567 ns"]


# The ring wraps.


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> Log:
    """A log that has dropped its first records."""
    monkeypatch.setattr(printk_module, "LOG_BUF_BYTES", 4096)
    log = Log()
    for number in range(1000):
        log.printk(f"record {number}")
    return log


def test_old_records_go_and_the_latest_stay(wrapped: Log) -> None:
    lines = wrapped.printk.lines()
    assert lines == [f"record {number}" for number in range(1000 - len(lines), 1000)]
    assert 4096 * 0.7 <= sum(len(f"6,999,0,-;{line}\n") for line in lines) <= 4096


def test_a_reader_in_the_middle_keeps_its_place(wrapped: Log) -> None:
    end = Printk.kmsg.stream_size(wrapped.printk)
    last = wrapped.pread(end - 5)
    assert b"record 999\n".endswith(last)
    wrapped.printk("next")
    assert wrapped.pread(end) == b"6,1000,0,-;next\n"


def test_a_record_larger_than_the_ring_is_kept_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty log dmesg would show the real kernel's."""
    monkeypatch.setattr(printk_module, "LOG_BUF_BYTES", 64)
    log = Log()
    for size in (10, 200, 300):
        log.printk("x" * size)
        assert log.printk.lines()
    assert log.printk.lines() == ["x" * 300]


def test_a_reader_that_was_overtaken_is_told_where_the_log_goes_on(wrapped: Log) -> None:
    with pytest.raises(StreamOverrun) as caught:
        wrapped.pread(7)
    assert caught.value.errno == errno.EPIPE
    oldest = 1000 - len(wrapped.printk.lines())
    assert wrapped.pread(caught.value.resume) == b"6,%d,0,-;record %d\n" % (oldest, oldest)


@pytest.mark.parametrize("nr_read_before", [0, 3])
def test_dmesg_shows_each_record_once_after_a_wrap(monkeypatch: pytest.MonkeyPatch, nr_read_before: int) -> None:
    """Through an open file, whose offset cannot jump: EPIPE once if the reader missed something, then the rest."""
    monkeypatch.setattr(printk_module, "LOG_BUF_BYTES", 4096)
    log = Log()
    registry = Registry()
    registry.add("/dev", log.printk)
    file = Tree(registry).open("/dev/kmsg", os.O_RDONLY)
    pos = 0
    for number in range(1000):
        log.printk(f"record {number}")
        if number < nr_read_before:
            pos += len(file.read(8191, pos, nonblock=True))
    if nr_read_before:
        assert errno_of(partial(file.read, 8191, pos, nonblock=True)) == errno.EPIPE
    found = []
    while errno_of(partial(file.read, 8191, pos, nonblock=True)) != errno.EAGAIN:
        found.append(file.read(8191, pos, nonblock=True))
        pos += len(found[-1])
    sequence = [int(record.split(b",")[1]) for record in found]
    assert sequence == list(range(1000 - len(log.printk.lines()), 1000))
