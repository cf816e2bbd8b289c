# SPDX-License-Identifier: GPL-2.0-only
"""What one user may keep of the server: over it an errno, for that user alone, until something is given back."""

import errno
import os
import random
from collections.abc import Iterator

import pytest
from mounted import until
from other_side import OtherSide, served
from test_kernfs import THRESHOLD, raises
from toy import Toy
from wiring import errno_of

from dpud.owner import Owner
from fs import fuse_abi as abi
from fs import shares
from fs.fuse_abi import Opcode
from fs.kernfs import Tree
from fs.shares import Share, Shares
from kernelsim.wait import WaitQueue

pytestmark = pytest.mark.slow  # the loop's loading

NOBODY, OTHER = 65534, 1000
KMSG = "/dev/kmsg"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of a size for tests."""
    for name, value in {
        "MAX_OPEN": 8, "MAX_OPEN_OF_ALL": 12, "MAX_TEXT_BYTES": 700_000, "MAX_TEXT_BYTES_OF_ALL": 1_000_000,
        "MAX_WAITING": 4, "MAX_WAITING_OF_ALL": 6, "MAX_WAITING_OF_ANYBODY": 9,
    }.items():  # fmt: skip
        monkeypatch.setattr(shares, name, value)


@pytest.fixture
def side(small: None) -> Iterator[OtherSide]:
    toy, owner = Toy(), Owner()
    owner.changes = toy.registry.changes
    with served(Tree(toy.registry, owner.call, owner.look)) as other_side:
        yield other_side
        other_side.echo("end", KMSG)  # wakes whoever waits still


def test_open_files_are_counted_until_they_are_closed(side: OtherSide) -> None:
    handles = [side.open(KMSG, uid=NOBODY) for _ in range(8)]
    raises(errno.ENFILE, side.open, KMSG, os.O_RDONLY, NOBODY)
    raises(errno.ENFILE, side.request, Opcode.OPENDIR, abi.ROOT_ID, bytes(8), NOBODY)
    others = [side.open(KMSG, uid=OTHER) for _ in range(4)]
    raises(errno.ENFILE, side.open, KMSG, os.O_RDONLY, OTHER)
    side.release(side.open(KMSG))
    side.release(handles.pop())
    others.append(side.open(KMSG, uid=OTHER))
    for handle in handles + others:
        side.release(handle)
    assert [side.release(side.open(KMSG, uid=NOBODY)) for _ in range(9)]


def test_directories_count_too(side: OtherSide) -> None:
    for _ in range(8):
        side.request(Opcode.OPENDIR, abi.ROOT_ID, bytes(8), NOBODY)
    raises(errno.ENFILE, side.open, KMSG, os.O_RDONLY, NOBODY)


def test_what_is_opened_in_vain_does_not_count(side: OtherSide) -> None:
    for _ in range(20):
        raises(errno.EACCES, side.open, "/proc/pagetypeinfo", os.O_RDONLY, NOBODY)
        side.release(side.open(THRESHOLD, uid=NOBODY))


def test_texts_are_counted_until_their_files_are_closed(side: OtherSide) -> None:
    """/proc/big has 320,000 bytes."""
    handles = [side.open("/proc/big", uid=NOBODY) for _ in range(3)]
    assert [side.read(handle, 100, uid=NOBODY) for handle in handles[:2] * 3] == [side.cat("/proc/big")[:100]] * 6
    raises(errno.ENOMEM, side.read, handles[2], 1, 0, NOBODY)
    other = side.open("/proc/big", uid=OTHER)
    assert side.read(other, 1, uid=OTHER)
    raises(errno.ENOMEM, side.read, handles[2], 1, 0, NOBODY)
    side.release(handles[0])
    assert side.read(handles[2], 7, uid=NOBODY) == b"      0"
    assert side.read(handles[2], 8, 8, uid=NOBODY) == b"      1\n"


def wait_for_the_log(side: OtherSide, uid: int) -> int:
    """A request that has to wait for a line, and does unless it is refused."""
    handle = side.open(KMSG, uid=uid)
    body = abi.READ_IN.pack(handle, 1 << 20, 4096, 0, 0, 0)
    number = side.send(Opcode.READ, side.lookup(KMSG), body, uid)
    until(lambda: number in side.session.threads.waiting or side.has_answer(number))
    return number


def test_too_many_that_wait_are_sent_away(side: OtherSide) -> None:
    waiting = [wait_for_the_log(side, uid) for uid in [NOBODY] * 4 + [OTHER] * 2]
    for uid in (NOBODY, OTHER):
        with pytest.raises(BlockingIOError):
            side.answer(wait_for_the_log(side, uid))
    waiting += [wait_for_the_log(side, 0) for _ in range(3)]
    with pytest.raises(BlockingIOError):
        side.answer(wait_for_the_log(side, 0))
    assert side.cat(THRESHOLD) == b"500\n", "others go on"
    for number in waiting:
        side.send(Opcode.INTERRUPT, 0, abi.INTERRUPT_IN.pack(number))
    assert [errno_of(side.answer, number) for number in waiting] == [errno.EINTR] * 9
    assert wait_for_the_log(side, NOBODY) in side.session.threads.waiting


def test_a_system_without_threads_is_no_reason_to_stop(side: OtherSide, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    results = []
    for _ in range(4):
        number = wait_for_the_log(side, 0)
        results.append(number)
        assert side.cat(THRESHOLD) == b"500\n"
    with pytest.raises(BlockingIOError):
        side.answer(results[-1])


def test_who_polls_again_and_again_waits_once(side: OtherSide) -> None:
    handles = [side.open(KMSG, uid=NOBODY) for _ in range(3)]
    for _ in range(50):
        for number, handle in enumerate(handles):
            side.request(Opcode.POLL, side.lookup(KMSG), abi.POLL_IN.pack(handle, number, 1, 1), NOBODY)
    side.echo("news", KMSG)
    side.cat(THRESHOLD)
    assert side.nr_polled <= 3


def test_a_queue_calls_each_back_once() -> None:
    called: list[int] = []
    queue = WaitQueue()

    def callback() -> None:
        called.append(1)

    for _ in range(5):
        queue.notify_once(callback)
    queue.wake_up()
    queue.wake_up()
    assert called == [1]


def test_a_share_never_gives_more_than_there_is() -> None:
    """At random, against plain sums."""
    rng = random.Random(7)
    share, taken = Share(10, 25), dict.fromkeys(range(4), 0)
    for _ in range(2000):
        uid, nr = rng.randrange(4), rng.randrange(6)
        if rng.random() < 0.5:
            fits = taken[uid] + nr <= 10 and sum(taken.values()) + nr <= 25
            assert share.take(uid, nr) == fits
            taken[uid] += nr * fits
        else:
            nr = min(nr, taken[uid])
            share.give(uid, nr)
            taken[uid] -= nr
        assert share.nr_taken == sum(taken.values())


def test_the_owner_and_root_are_not_limited(small: None) -> None:
    of_user = Shares(1000)
    assert [of_user.is_limited(uid) for uid in (0, 1000, 1001)] == [False, False, True]
    assert all(of_user.open(handle, 1000) and of_user.hold(handle, 1 << 30) for handle in range(100))
