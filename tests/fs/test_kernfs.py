# SPDX-License-Identifier: GPL-2.0-only
"""The tree without a mount: sizes, modes, permission, offsets."""

import errno
import os
import stat
from collections.abc import Callable

import pytest
from toy import DATA_BYTES, Toy
from wiring import errno_of

from fs.kernfs import ROOT, Cred, Tree
from kernelsim.attr import Registry

NOBODY = Cred(65534, 65534)
THRESHOLD = "/proc/sys/vm/threshold"
COMPACT = "/sys/devices/system/node/node0/compact"
ONLINE = "/sys/devices/system/node/node0/online"


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def tree(toy: Toy) -> Tree:
    return Tree(toy.registry, now_ns=1_000)


def raises(number: int, fn: Callable[..., object], *args: object) -> None:
    assert errno_of(fn, *args) == number


def access(tree: Tree, path: str, cred: Cred = ROOT) -> str:
    """Which of r, w and rw open(2) lets `cred` have."""
    modes = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}
    errors = {name: errno_of(tree.open, path, flags, cred) for name, flags in modes.items()}
    assert set(errors.values()) <= {0, errno.EACCES}
    return " ".join(name for name, error in errors.items() if not error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "mode", "size", "blksize", "nlink"),
    [
        ("/proc", 0o40555, 0, 1024, 3),
        ("/proc/sys/vm", 0o40555, 0, 1024, 1),
        (THRESHOLD, 0o100644, 0, 1024, 1),
        ("/proc/sys/vm/compact_memory", 0o100200, 0, 1024, 1),
        ("/proc/buddyinfo", 0o100444, 0, 1024, 1),
        ("/proc/pagetypeinfo", 0o100400, 0, 1024, 1),
        ("/sys", 0o40555, 0, 4096, 5),
        ("/sys/devices/system/node", 0o40755, 0, 4096, 3),
        (COMPACT, 0o100200, 4096, 4096, 1),
        (ONLINE, 0o100444, 4096, 4096, 1),
        ("/sys/class/node/node0", 0o120777, 0, 4096, 1),
        ("/sys/kernel/debug", 0o40700, 0, 4096, 3),
        ("/sys/kernel/debug/toy/stats", 0o100444, 0, 4096, 1),
        ("/sys/kernel/config/toy", 0o40755, 0, 4096, 2),
        ("/dev/kmsg", 0o100644, len("6,0,0,-;first\n"), 4096, 1),
    ],
)
def test_stat(tree: Tree, path: str, mode: int, size: int, blksize: int, nlink: int) -> None:
    found = tree.getattr(path)
    assert oct(found.st_mode) == oct(mode)
    assert (found.st_size, found.st_blksize, found.st_nlink) == (size, blksize, nlink)
    assert (found.st_uid, found.st_gid, found.st_mtime) == (0, 0, 1_000)


def test_readdir_begins_with_the_dots_and_keeps_its_order(tree: Tree) -> None:
    names = [entry.name for entry in tree.readdir("/proc")]
    assert names == [".", "..", "sys", "buddyinfo", "big", "pagetypeinfo"]
    inodes = {entry.name: entry.ino for entry in tree.readdir("/proc/sys")}
    assert inodes["."] == tree.getattr("/proc/sys").st_ino
    assert inodes[".."] == tree.getattr("/proc").st_ino
    assert {e.name: stat.S_IFMT(e.mode) for e in tree.readdir("/sys/class/node")}["node0"] == stat.S_IFLNK


def test_names_that_are_not_there(tree: Tree) -> None:
    for fn in (tree.getattr, tree.readdir, tree.readlink, tree.unlink, tree.rmdir):
        raises(errno.ENOENT, fn, "/proc/nothing")
    raises(errno.ENOENT, tree.open, "/proc/nothing", os.O_RDONLY)
    raises(errno.ENOTDIR, tree.readdir, "/proc/buddyinfo")
    raises(errno.EINVAL, tree.readlink, "/proc/buddyinfo")
    raises(errno.EISDIR, tree.open, "/proc", os.O_RDONLY)


@pytest.mark.parametrize(
    ("path", "root", "nobody"),
    [
        (THRESHOLD, "r w rw", "r"),
        ("/proc/sys/vm/secret", "r w rw", ""),
        ("/proc/sys/vm/compact_memory", "w", ""),
        ("/proc/buddyinfo", "r w rw", "r"),
        ("/proc/pagetypeinfo", "r w rw", ""),
        (COMPACT, "w", ""),
        (ONLINE, "r", "r"),
        ("/sys/kernel/debug/toy/stats", "r w rw", "r"),
        ("/dev/kmsg", "r w rw", "r"),
    ],
)
def test_who_may_open_for_what(tree: Tree, path: str, root: str, nobody: str) -> None:
    assert access(tree, path) == root
    assert access(tree, path, NOBODY) == nobody


def test_the_user_who_runs_the_emulated_kernel_is_its_root(toy: Toy) -> None:
    tree = Tree(toy.registry, uid=1000, gid=100)
    assert tree.getattr(THRESHOLD).st_uid == 1000
    assert access(tree, THRESHOLD, Cred(1000, 100)) == "r w rw"
    assert access(tree, COMPACT, Cred(1000, 100)) == "w"
    assert access(tree, THRESHOLD, Cred(1001, 1001)) == "r"


def test_group_bits_ask_for_supplementary_groups(toy: Toy) -> None:
    tree = Tree(toy.registry, gid=4)
    tree.chmod(ONLINE, 0o440)
    assert access(tree, ONLINE, Cred(5, 4)) == "r"
    assert access(tree, ONLINE, Cred(5, 5, lambda: frozenset({4}))) == "r"
    assert access(tree, ONLINE, Cred(5, 5)) == ""


# sysctl


def test_sysctl_reads_at_offset_zero_only(tree: Tree) -> None:
    file = tree.open(THRESHOLD, os.O_RDONLY)
    assert file.read(1, 0) == b"5"
    assert file.read(1, 1) == b""
    assert file.read(100, 0) == b"500\n"


def test_sysctl_ignores_writes_elsewhere(tree: Tree, toy: Toy) -> None:
    file = tree.open(THRESHOLD, os.O_WRONLY | os.O_TRUNC)
    assert toy.vm.threshold == 500
    assert file.write(b"5", 0) == 1
    assert file.write(b"garbage", 1) == 7
    assert file.write(b"6", 1) == 1
    assert toy.vm.threshold == 5
    assert file.write(b"7 abc", 0) == 2
    assert toy.vm.threshold == 7


def test_sysctl_asks_again_at_each_access(tree: Tree) -> None:
    file = tree.open(THRESHOLD, os.O_RDWR)
    raises(errno.EPERM, file.write, b"1", 0, NOBODY)
    raises(errno.EPERM, file.write, b"1", 1, NOBODY)
    assert file.read(9, 0, NOBODY) == b"500\n"
    raises(errno.EPERM, tree.open("/proc/sys/vm/secret", os.O_RDONLY).read, 9, 0, NOBODY)


def test_sysctl_append_goes_by_what_this_file_wrote(tree: Tree, toy: Toy) -> None:
    file = tree.open(THRESHOLD, os.O_WRONLY | os.O_APPEND)
    assert file.write(b"8", 4) == 1
    assert file.write(b"9", 4) == 1
    assert toy.vm.threshold == 8


@pytest.mark.parametrize("text", [b"1001", b"-1", b"abc", b"7\0", b"\n", b" " * 4095 + b"7"])
def test_sysctl_error_changes_nothing(tree: Tree, toy: Toy, text: bytes) -> None:
    raises(errno.EINVAL, tree.open(THRESHOLD, os.O_WRONLY).write, text, 0)
    assert toy.vm.threshold == 500


# procfs


def test_proc_text_is_made_once_per_open(tree: Tree) -> None:
    file = tree.open("/proc/buddyinfo", os.O_RDONLY)
    text = b""
    while piece := file.read(7, len(text)):
        text += piece
        tree.open("/proc/buddyinfo", os.O_RDONLY).read(4096, 0)
    assert len(set(text.splitlines())) == 1
    assert file.read(4096, 0) != text


def test_proc_writes_without_a_store_are_eio(tree: Tree) -> None:
    raises(errno.EIO, tree.open("/proc/buddyinfo", os.O_WRONLY).write, b"1", 0)


@pytest.mark.slow
def test_long_text_arrives_whole(tree: Tree) -> None:
    file = tree.open("/proc/big", os.O_RDONLY)
    assert b"".join(file.read(131072, at) for at in range(0, 400_000, 131072)).count(b"\n") == 40_000


# sysfs


def test_sysfs_reads_at_any_offset_and_ignores_it_for_writes(tree: Tree, toy: Toy) -> None:
    assert tree.open(ONLINE, os.O_RDONLY).read(100, 2) == b"1\n"
    scale = tree.open("/sys/devices/system/node/node0/scale", os.O_RDWR)
    assert scale.write(b"10\n", 4096) == 3
    assert scale.write(b"20\n", 3) == 3
    assert toy.node.scale == 20


def test_sysfs_write_carries_one_page(tree: Tree, toy: Toy) -> None:
    assert tree.open(COMPACT, os.O_WRONLY).write(b"x" * 5000, 0) == 4096
    assert len(toy.node.triggers[0]) == 4096


def test_configfs_and_debugfs_writes(tree: Tree) -> None:
    raises(errno.EINVAL, tree.open("/sys/kernel/debug/toy/stats", os.O_WRONLY).write, b"1", 0)
    tree.mkdir("/sys/kernel/config/toy/a")
    assert tree.open("/sys/kernel/config/toy/a/size", os.O_WRONLY).write(b"4G\n", 0) == 3
    assert tree.open("/sys/kernel/config/toy/a/size", os.O_RDONLY).read(99, 0) == b"4294967296\n"


# streams


def test_bytes_are_read_and_written_at_offsets(tree: Tree) -> None:
    """In configfs too, where a text file takes a page at most."""
    tree.mkdir("/sys/kernel/config/toy/one")
    path = "/sys/kernel/config/toy/one/data"
    assert tree.getattr(path).st_size == DATA_BYTES
    file = tree.open(path, os.O_RDWR)
    assert file.write(b"x" * 10_000, 5) == 10_000
    assert file.read(10_010, 0) == bytes(5) + b"x" * 10_000 + bytes(5)
    assert file.write(b"end", DATA_BYTES - 2) == 2
    assert file.read(100, DATA_BYTES - 2) == b"en"
    assert file.read(100, DATA_BYTES) == b""
    assert errno_of(file.write, b"more", DATA_BYTES) == errno.ENOSPC


def test_stream_gives_the_record_at_the_offset(tree: Tree) -> None:
    file = tree.open("/dev/kmsg", os.O_RDWR)
    assert file.write(b"second\n", 0) == 7
    first = file.read(8191, 0)
    assert first == b"6,0,0,-;first\n"
    assert file.read(8191, len(first)) == b"6,1,0,-;second\n"
    end = tree.getattr("/dev/kmsg").st_size
    with pytest.raises(BlockingIOError):
        file.read(8191, end, nonblock=True)
    raises(errno.EINVAL, file.read, 3, 0)


# what cannot be done


@pytest.mark.parametrize(
    ("directory", "create", "make", "remove"),
    [
        ("/proc/sys/vm", errno.ENOENT, errno.ENOENT, errno.EACCES),
        ("/proc", errno.ENOENT, errno.ENOENT, errno.EPERM),
        ("/sys/devices/system/node", errno.EACCES, errno.EPERM, errno.EPERM),
        ("/sys/kernel/debug", errno.EACCES, errno.EPERM, errno.EPERM),
        ("/sys/kernel/config", errno.EACCES, errno.EPERM, errno.EPERM),
    ],
)
def test_changes_are_refused(tree: Tree, directory: str, create: int, make: int, remove: int) -> None:
    raises(create, tree.create, directory + "/new")
    raises(make, tree.make, directory + "/new")
    raises(make, tree.mkdir, directory + "/new")
    raises(remove, tree.rmdir, directory)
    raises(remove, tree.unlink, f"{directory}/{tree.readdir(directory)[-1].name}")


def test_chmod_and_chown(tree: Tree) -> None:
    raises(errno.EPERM, tree.chmod, THRESHOLD, 0o600)
    raises(errno.EPERM, tree.chown, THRESHOLD, 0, 0)
    raises(errno.EPERM, tree.chown, ONLINE, 1000, -1)
    tree.chown(ONLINE, 0, -1)
    tree.chmod(ONLINE, 0o100400)
    assert oct(tree.getattr(ONLINE).st_mode) == oct(0o100400)
    assert access(tree, ONLINE, NOBODY) == ""


@pytest.mark.parametrize(
    ("path", "file", "number"),
    [
        ("/proc/sys/vm", "threshold", errno.ENOENT),
        ("/proc", "buddyinfo", errno.ESRCH),
        ("/sys/devices/system/node/node0", "online", errno.ENODEV),
        ("/sys/kernel/debug/toy", "stats", errno.EIO),
    ],
)
def test_open_file_of_a_removed_attribute(toy: Toy, tree: Tree, path: str, file: str, number: int) -> None:
    opened = tree.open(f"{path}/{file}", os.O_RDONLY)
    toy.registry.remove(path, opened.node.kobj)
    raises(number, opened.read, 100, 0)
    raises(errno.ENOENT, tree.getattr, f"{path}/{file}")


def test_an_empty_registry_is_a_file_system() -> None:
    tree = Tree(Registry())
    assert [entry.name for entry in tree.readdir("/")] == [".", ".."]
    assert tree.getattr("/").st_nlink == 2
