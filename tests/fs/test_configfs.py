# SPDX-License-Identifier: GPL-2.0-only
"""mkdir and rmdir below a ConfigGroup."""

import errno
import os

import pytest
from test_kernfs import raises
from toy import Item, Toy

from fs.configfs import Items
from fs.kernfs import Tree
from kernelsim.attr import complete

ROOT = "/sys/kernel/config/toy"


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def tree(toy: Toy) -> Tree:
    return Tree(toy.registry)


def names(tree: Tree, path: str) -> list[str]:
    return [entry.name for entry in tree.readdir(path)][2:]


def test_mkdir_makes_an_item_with_its_default_groups(tree: Tree) -> None:
    tree.mkdir(f"{ROOT}/a")
    assert names(tree, ROOT) == ["a"]
    assert names(tree, f"{ROOT}/a") == ["size", "slow", "data", "buffers"]


def test_a_directory_takes_so_many(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fs.configfs.MAX_ITEMS", 3)
    for name in "abc":
        tree.mkdir(f"{ROOT}/{name}")
    raises(errno.ENOSPC, tree.mkdir, f"{ROOT}/d")
    tree.rmdir(f"{ROOT}/a")
    tree.mkdir(f"{ROOT}/d")


def test_mkdir_errors(tree: Tree) -> None:
    tree.mkdir(f"{ROOT}/a")
    raises(errno.EEXIST, tree.mkdir, f"{ROOT}/a")
    raises(errno.EINVAL, tree.mkdir, f"{ROOT}/bad")
    raises(errno.ENOENT, tree.mkdir, f"{ROOT}/none/b")
    raises(errno.EPERM, tree.mkdir, f"{ROOT}/a/b")
    raises(errno.EEXIST, tree.mkdir, f"{ROOT}/a/size")


def test_rmdir_drops_the_item_and_everything_in_it(toy: Toy, tree: Tree) -> None:
    nr_nodes = len(toy.registry.nodes)
    tree.mkdir(f"{ROOT}/a")
    tree.rmdir(f"{ROOT}/a")
    assert toy.group.dropped == ["a"]
    assert len(toy.registry.nodes) == nr_nodes
    raises(errno.ENOENT, tree.rmdir, f"{ROOT}/a")


def test_rmdir_errors(tree: Tree) -> None:
    tree.mkdir(f"{ROOT}/a")
    tree.mkdir(f"{ROOT}/a/buffers/one")
    raises(errno.ENOTEMPTY, tree.rmdir, f"{ROOT}/a")
    raises(errno.EPERM, tree.rmdir, f"{ROOT}/a/buffers")
    raises(errno.EPERM, tree.rmdir, ROOT)
    raises(errno.ENOTDIR, tree.rmdir, f"{ROOT}/a/size")
    tree.rmdir(f"{ROOT}/a/buffers/one")
    tree.rmdir(f"{ROOT}/a")


def test_an_item_that_the_core_added_can_be_removed(toy: Toy, tree: Tree) -> None:
    toy.registry.add(f"{ROOT}/child", Item(toy.debug.opened))
    tree.rmdir(f"{ROOT}/child")
    assert toy.group.dropped == ["child"]


def test_open_files_of_a_dropped_item_say_so(tree: Tree) -> None:
    tree.mkdir(f"{ROOT}/a")
    file = tree.open(f"{ROOT}/a/size", os.O_RDWR)
    tree.rmdir(f"{ROOT}/a")
    raises(errno.ENOENT, file.read, 10, 0)
    raises(errno.ENOENT, file.write, b"1", 0)


def test_rmdir_waits_for_requests_inside(toy: Toy) -> None:
    items = Items(toy.registry)
    complete(items.make(f"{ROOT}/a"))
    file = toy.registry.nodes[f"{ROOT}/a/size"]
    idle = items.idle(f"{ROOT}/a")
    with items.inside(file):  # type: ignore[arg-type]
        assert complete(items.drop(f"{ROOT}/a")) is False
        emptied = next(idle)
        assert emptied is not None
        assert not emptied.wait(0)
    assert emptied.wait(0)
    assert list(idle) == []
    assert complete(items.drop(f"{ROOT}/a")) is True
    assert toy.group.dropped == ["a"]


def test_requests_elsewhere_do_not_hold_an_item(toy: Toy) -> None:
    items = Items(toy.registry)
    complete(items.make(f"{ROOT}/a"))
    complete(items.make(f"{ROOT}/b"))
    with items.inside(toy.registry.nodes[f"{ROOT}/b/size"]):  # type: ignore[arg-type]
        assert complete(items.drop(f"{ROOT}/a")) is True
