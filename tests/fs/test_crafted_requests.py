# SPDX-License-Identifier: GPL-2.0-only
"""Requests that no kernel sends: each is answered with an errno that means it, and the server goes on.

`served` also fails a test in which anything was answered with EIO: that would be a bug, not a refusal.
"""

import errno
import os
from collections.abc import Iterator

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_side import OtherSide, served
from test_kernfs import THRESHOLD, raises
from toy import Toy
from wiring import errno_of

from dpud.owner import Owner
from fs import fuse_abi as abi
from fs import fuse_loop as loop
from fs.fuse_abi import Opcode
from fs.kernfs import Tree

pytestmark = pytest.mark.slow  # the loop's loading

GROUP = "/sys/kernel/config/toy"
NO_ANSWER = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT)
REFUSALS = {
    *(errno.EINVAL, errno.EBADF, errno.ESTALE, errno.ENOSYS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.EPERM, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTEMPTY),
}
EDGES = (0, 1, 2, 39, 40, 41, 4095, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@pytest.fixture(scope="module")
def side() -> Iterator[OtherSide]:
    toy, owner = Toy(), Owner()
    owner.changes = toy.registry.changes
    with served(Tree(toy.registry, owner.call, owner.look)) as other_side:
        yield other_side


def goes_on(side: OtherSide) -> None:
    assert side.cat(THRESHOLD) == b"500\n"
    assert side.request(Opcode.STATFS, abi.ROOT_ID, b"")


numbers = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
words = st.lists(numbers, max_size=12).map(lambda values: b"".join(value.to_bytes(8, "little") for value in values))
names = st.sampled_from(
    [b"proc\0", b"..\0", b".\0", b"\0", b"a/b\0", b"proc/sys\0", b"x" * 5000 + b"\0", b"no end", b"new\0"]
)


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    opcode=st.sampled_from([int(op) for op in Opcode if op not in (Opcode.INIT, Opcode.DESTROY)])
    | st.integers(0, 2**32 - 1).filter(lambda number: number != Opcode.INIT),
    nodeid=st.integers(0, 60) | numbers,
    body=words | st.binary(max_size=200) | st.tuples(words, names).map(b"".join),
    uid=st.sampled_from([0, 65534, 2**32 - 1]),
    length=st.none() | st.sampled_from(EDGES).filter(lambda number: number < 2**32),
)
def test_any_request(side: OtherSide, opcode: int, nodeid: int, body: bytes, uid: int, length: int | None) -> None:
    number = side.send(opcode, nodeid, body, uid, length)
    if opcode not in NO_ANSWER:
        assert errno_of(side.answer, number) in {0, *REFUSALS}
    goes_on(side)


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=120))
def test_any_bytes(side: OtherSide, request: bytes) -> None:
    crafted = bytearray(request)
    crafted[4:16] = (bytes(4) + b"\xff" * 8)[: len(crafted[4:16])]  # no opcode, and a number that nobody waits for
    side.send_raw(bytes(crafted))
    goes_on(side)


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=numbers, offset=numbers, size=st.sampled_from(EDGES).filter(lambda n: n < 2**32), is_read=st.booleans())
def test_handles_and_positions_that_are_not_there(
    side: OtherSide, row: int, offset: int, size: int, is_read: bool
) -> None:
    """Beyond tables and texts is other memory."""
    mine = side.open(THRESHOLD)
    side.read(mine)
    for handle in (mine, loop.QUICK | row & (loop.QUICK - 1), row):
        opcode = Opcode.READ if is_read else Opcode.READDIR
        number = side.send(opcode, side.lookup(THRESHOLD), abi.READ_IN.pack(handle, offset, size, 0, 0, 0))
        replies: list[bytes] = []
        assert errno_of(lambda number=number, replies=replies: replies.append(side.answer(number))) in {
            0,
            errno.EBADF,
            errno.EINVAL,
        }
        assert set(replies) <= {b"500\n"[offset:], b"500\n"[:size], b""}
    side.release(mine)


def test_what_is_closed_twice(side: OtherSide) -> None:
    for path in (THRESHOLD, "/dev/kmsg"):
        handle, nodeid = side.open(path), side.lookup(path)
        side.release(handle)
        raises(errno.EBADF, side.request, Opcode.RELEASE, nodeid, abi.RELEASE_IN.pack(handle) + bytes(16))
        raises(errno.EBADF, side.request, Opcode.READ, nodeid, abi.READ_IN.pack(handle, 0, 100, 0, 0, 0))
    raises(errno.EBADF, side.request, Opcode.RELEASEDIR, abi.ROOT_ID, abi.RELEASE_IN.pack(1 << 40) + bytes(16))
    goes_on(side)


def test_nodes_that_are_not_known(side: OtherSide) -> None:
    for opcode, body in ((Opcode.GETATTR, bytes(16)), (Opcode.OPEN, bytes(8)), (Opcode.LOOKUP, b"x\0")):
        raises(errno.ESTALE, side.request, opcode, 1 << 50, body)


@pytest.mark.parametrize("name", [b"a/b\0", b"..\0", b".\0", b"\0", b"sys/vm\0", b"endless"])
def test_a_name_is_not_a_path(side: OtherSide, name: bytes) -> None:
    raises(errno.EINVAL, side.request, Opcode.LOOKUP, side.lookup("/proc"), name)
    raises(errno.EINVAL, side.request, Opcode.MKDIR, side.lookup(GROUP), bytes(8) + name)
    raises(errno.EINVAL, side.request, Opcode.RMDIR, side.lookup(GROUP), name)


def test_a_write_holds_no_more_than_was_sent(side: OtherSide) -> None:
    """Else old bytes of the buffer would be written: those of somebody else's request."""
    side.mkdir(f"{GROUP}/w")
    path = f"{GROUP}/w/data"
    handle, nodeid = side.open(path, os.O_RDWR), side.lookup(path)
    side.write(handle, b"secret" * 100)
    for size in (7, 100, 2**31, 2**32 - 1):
        body = abi.WRITE_IN.pack(handle, 4096, size, 0, 0, 0) + b"x" * 6
        raises(errno.EINVAL, side.request, Opcode.WRITE, nodeid, body)
    assert side.read(handle, 100, 4096) == bytes(100)
    side.release(handle)
    side.rmdir(f"{GROUP}/w")


def test_more_to_forget_than_was_sent(side: OtherSide) -> None:
    for count in (2, 1000, 2**32 - 1):
        side.send(Opcode.BATCH_FORGET, 0, abi.BATCH_FORGET_IN.pack(count, 0) + abi.FORGET_ONE.pack(2, 1))
        goes_on(side)
    side.send(Opcode.FORGET, abi.ROOT_ID, abi.FORGET_IN.pack(2**64 - 1))
    goes_on(side)
