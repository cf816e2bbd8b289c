# SPDX-License-Identifier: GPL-2.0-only
"""Who may do what, by the credentials of each request: nothing is left to whoever mounted it."""

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

import pytest
from test_kernfs import COMPACT, NOBODY, ONLINE, THRESHOLD, access, raises
from toy import Toy

from fs import requests
from fs.kernfs import ROOT, Cred, Tree
from fs.requests import Request
from kernelsim.attr import Attr, Guard, Kobject, Stream, Text
from kernelsim.attr_node import Opener

CONTROLLERS = 990
MEMBER = Cred(1000, 1000, lambda: frozenset({4, CONTROLLERS}))
GROUP = "/sys/kernel/config/toy"
STATS = "/sys/kernel/debug/toy/stats"


class Process(Kobject):
    maps = Attr(Text(), guard=Guard.PTRACE, doc="For whoever may trace it.")

    @maps.show
    def _maps(self) -> str:
        return "55d0-55d1 r-xp\n"


class Log(Kobject):
    log = Attr(Stream(), doc="Each writer has something of its own.")

    def __init__(self) -> None:
        self.open_for: list[int] = []

    @log.open
    def _open(self, opener: Opener) -> int:
        return opener.flags

    @log.release
    def _release(self, user: int) -> None:
        self.open_for.append(user)

    @log.write
    def _write(self, data: bytes, user: int) -> None:
        assert user

    @log.read
    def _read(self, pos: int, size: int, nonblock: bool) -> bytes:
        return b""


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def tree(toy: Toy) -> Tree:
    return Tree(toy.registry)


@pytest.fixture
def shared(toy: Toy) -> Tree:
    """With a control group."""
    return Tree(toy.registry, control_gid=CONTROLLERS)


def owner(tree: Tree, path: str) -> tuple[str, int, int]:
    found = tree.getattr(path)
    return oct(stat.S_IMODE(found.st_mode)), found.st_uid, found.st_gid


# Changes of the tree, checked even if the mount does not.


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (errno.EACCES, lambda tree, cred: tree.mkdir(f"{GROUP}/b", cred)),
        (errno.EACCES, lambda tree, cred: tree.rmdir(f"{GROUP}/a", cred)),
        (errno.EACCES, lambda tree, cred: tree.mkdir(f"{GROUP}/a/buffers/c", cred)),
        (errno.EPERM, lambda tree, cred: tree.chmod(ONLINE, 0o666, cred)),
        (errno.EPERM, lambda tree, cred: tree.chown(ONLINE, 65534, 65534, cred)),
        (errno.EACCES, lambda tree, cred: tree.truncate(THRESHOLD, cred)),
        (errno.EACCES, lambda tree, cred: tree.open(THRESHOLD, os.O_RDONLY | os.O_TRUNC, cred)),
    ],
)
def test_nobody_changes_anything(tree: Tree, number: int, change: Callable[[Tree, Cred], None]) -> None:
    tree.mkdir(f"{GROUP}/a")
    raises(number, change, tree, NOBODY)
    assert [entry.name for entry in tree.readdir(GROUP)][2:] == ["a"]
    assert owner(tree, ONLINE) == ("0o444", 0, 0)


def test_what_cannot_be_made_anywhere_is_still_refused_as_the_file_system_does(tree: Tree) -> None:
    for cred in (ROOT, NOBODY):
        raises(errno.ENOENT, tree.mkdir, "/proc/sys/vm/new", cred)
        raises(errno.EPERM, tree.mkdir, "/sys/devices/system/node/new", cred)


# ptrace_may_access().


def test_another_user_s_process_may_not_be_looked_into(toy: Toy) -> None:
    toy.registry.add("/proc/7", Process())
    tree = Tree(toy.registry, uid=1000, gid=1000)
    assert owner(tree, "/proc/7/maps") == ("0o444", 1000, 1000)
    assert access(tree, "/proc/7/maps", NOBODY) == ""
    for cred in (ROOT, Cred(1000, 1000)):
        assert access(tree, "/proc/7/maps", cred) == "r w rw"
    assert tree.access.rights(toy.registry.nodes["/proc/7/maps"])[1] == 0  # type: ignore[arg-type]
    opened = tree.open("/proc/7/maps", os.O_RDONLY)
    assert opened.read(4096, 0, NOBODY) == b"55d0-55d1 r-xp\n", "asked as it is opened, not as it is read"


# The control group.


def test_the_group_gets_what_its_owner_has_of_what_can_be_written(shared: Tree) -> None:
    assert owner(shared, THRESHOLD) == ("0o664", 0, CONTROLLERS)
    assert owner(shared, COMPACT) == ("0o220", 0, CONTROLLERS)
    assert owner(shared, "/proc/sys/vm/secret") == ("0o660", 0, CONTROLLERS)
    assert owner(shared, "/dev/kmsg") == ("0o664", 0, CONTROLLERS)
    for path, mode in ((ONLINE, "0o444"), ("/proc/pagetypeinfo", "0o400"), (STATS, "0o444"), ("/proc", "0o555")):
        assert owner(shared, path) == (mode, 0, 0)


def test_without_one_nothing_changes(tree: Tree) -> None:
    for path, mode in ((THRESHOLD, "0o644"), (COMPACT, "0o200"), (GROUP, "0o755"), ("/sys/kernel/debug", "0o700")):
        assert owner(tree, path) == (mode, 0, 0)


@pytest.mark.parametrize(
    ("path", "member", "nobody"),
    [
        (THRESHOLD, "r w rw", "r"),
        (COMPACT, "w", ""),
        ("/proc/sys/vm/compact_memory", "w", ""),
        ("/proc/sys/vm/secret", "r w rw", ""),
        ("/proc/pagetypeinfo", "", ""),
        (ONLINE, "r", "r"),
    ],
)
def test_what_members_may_open(shared: Tree, path: str, member: str, nobody: str) -> None:
    assert access(shared, path, MEMBER) == member
    assert access(shared, path, Cred(1001, CONTROLLERS)) == member
    assert access(shared, path, NOBODY) == nobody


def test_members_make_items_and_what_is_in_them_is_theirs_too(shared: Tree) -> None:
    shared.mkdir(f"{GROUP}/a", MEMBER)
    assert owner(shared, f"{GROUP}/a/size") == ("0o664", 0, CONTROLLERS)
    assert owner(shared, f"{GROUP}/a/buffers") == ("0o775", 0, CONTROLLERS)
    assert owner(shared, f"{GROUP}/a") == ("0o755", 0, 0)
    assert access(shared, f"{GROUP}/a/size", MEMBER) == "r w rw"
    raises(errno.EACCES, shared.rmdir, f"{GROUP}/a", NOBODY)
    shared.rmdir(f"{GROUP}/a", MEMBER)


class Remote(Kobject):
    connect = Attr(Text(), "", guard=Guard.HOST, doc="Where the daemon connects to.")


def test_members_do_not_act_on_the_host_in_the_daemon_s_name(toy: Toy) -> None:
    toy.registry.add("/sys/class/toy", Remote())
    tree = Tree(toy.registry, control_gid=CONTROLLERS)
    assert owner(tree, "/sys/class/toy/connect") == ("0o644", 0, 0)
    assert (access(tree, "/sys/class/toy/connect", MEMBER), access(tree, "/sys/class/toy/connect")) == ("r", "r w rw")


def test_members_enter_debugfs_and_change_no_modes(shared: Tree) -> None:
    assert owner(shared, "/sys/kernel/debug") == ("0o750", 0, CONTROLLERS)
    raises(errno.EPERM, shared.chmod, COMPACT, 0o666, MEMBER)


def test_root_can_lock_members_out_of_one_file(shared: Tree) -> None:
    shared.chmod(COMPACT, 0o200)
    assert access(shared, COMPACT, MEMBER) == ""


def test_a_sysctl_asks_again_whose_hands_a_descriptor_is_in(shared: Tree) -> None:
    opened = shared.open(THRESHOLD, os.O_RDWR)
    assert opened.write(b"7\n", 0, MEMBER) == 2
    raises(errno.EPERM, opened.write, b"8\n", 0, NOBODY)
    assert opened.read(10, 0, NOBODY) == b"7\n"


def test_descriptors_of_members_who_left(shared: Tree) -> None:
    """The groups that count are those of now."""
    groups = {CONTROLLERS}
    cred = Cred(1000, 1000, lambda: frozenset(groups))
    opened = shared.open(THRESHOLD, os.O_WRONLY, cred)
    groups.clear()
    raises(errno.EPERM, opened.write, b"8\n", 0, cred)


# Who only reads leaves nothing behind, not even in a journal.


def test_opening_a_stream_to_read_changes_nothing(toy: Toy) -> None:
    asked: list[Request] = []

    def ask(perform: Callable[..., Any], request: Request, cred: Cred, **_: object) -> Any:
        asked.append(request)
        return perform(request, cred)

    log = Log()
    toy.registry.add("/dev/toy", log)
    tree = Tree(toy.registry, request=ask)
    tree.open("/dev/toy/log", os.O_RDONLY, NOBODY).release()
    assert [(request.verb, request.changes) for request in asked] == [(requests.OPEN, False)]
    assert log.open_for == []
    tree.open("/dev/toy/log", os.O_WRONLY).release()
    assert [(request.verb, request.changes) for request in asked[1:]] == [
        (requests.OPEN, True),
        (requests.RELEASE, True),
    ]
    assert log.open_for == [os.O_WRONLY]
