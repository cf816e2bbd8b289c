# SPDX-License-Identifier: GPL-2.0-only
"""Directories that users make and remove: mkdir and rmdir below a ConfigGroup, in configfs and in tracefs.

Theory of operation
    mkdir asks the ConfigGroup of the parent directory for an item and registers it. An item is any
    directory below a ConfigGroup that did not come with its parent, so one that the core registered
    itself (a forked child) can be removed too. rmdir refuses an item that still holds items; attribute
    files and default groups do not count. It waits until no request is inside the item's files, takes the
    item out of the registry, and only then lets the group drop it: a drop hook never meets a half-done
    store, and nobody finds an item that is half gone. tracefs does not wait: its rmdir says EBUSY.

    Everything here runs with the machine held; methods that return an Operation give it away while they
    wait.
"""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fs.rules import RULES
from kernelsim.attr import ConfigGroup, Dir, File, Flavour, Node, Operation, Registry, outcome


def error(number: int, path: str) -> OSError:
    """OSError with the system's text for a number."""
    return OSError(number, os.strerror(number), path)


FLAVOURS = (Flavour.CONFIGFS, Flavour.DEBUGFS)
"""Where such directories are."""
MAX_ITEMS = 1 << 14
"""In one directory: each is some 20 to 100 KB of the daemon's memory, which no quota of the host is charged with."""

Ask = Callable[[Callable[[], Any]], Any]
"""Gives what its argument does: something that does not follow from the requests that came before."""


def ask_directly(read: Callable[[], Any]) -> Any:
    """The Ask of a machine whose inputs are not written down."""
    return read()


class Items:
    """The user-made directories of one registry, and who is inside them."""

    def __init__(self, registry: Registry, ask: Ask = ask_directly) -> None:
        self._registry = registry
        self._ask = ask
        self._nr_inside: Counter[Dir] = Counter()
        self._emptied: dict[Dir, threading.Event] = {}

    @contextmanager
    def inside(self, file: File) -> Iterator[None]:
        """Keeps the item that `file` belongs to from being dropped."""
        item = self._item_of(file) if file.flavour in FLAVOURS else None
        if item is None:
            yield
            return
        self._nr_inside[item] += 1
        try:
            yield
        finally:
            self._nr_inside[item] -= 1
            if not self._nr_inside[item]:
                del self._nr_inside[item]
                if event := self._emptied.pop(item, None):
                    event.set()

    def make(self, path: str) -> Operation[None]:
        """mkdir(2). EEXIST, ENOENT without a parent, EPERM where none are made, ENOSPC; else as the group says."""
        parent_path, _, name = path.rpartition("/")
        parent = self._registry.nodes.get(parent_path or "/")
        if path in self._registry.nodes:
            raise error(errno.EEXIST, path)
        if parent is None:
            raise error(errno.ENOENT, path)
        group = _group_of(parent)
        if group is None:
            raise error(RULES[parent.flavour].make, path)
        if isinstance(parent, Dir) and len(parent.entries) >= MAX_ITEMS:
            raise error(errno.ENOSPC, path)
        item = yield from outcome(group.make_item(name))
        self._registry.add(path, item)

    def drop(self, path: str) -> Operation[bool]:
        """rmdir(2) -> False, and nothing done, while a request is inside; EBUSY in tracefs. Not to be interrupted."""
        item, group = self._removable(path)
        if self._ask(lambda: int(item in self._nr_inside)):  # who only reads is nowhere written down
            if item.flavour is Flavour.DEBUGFS:
                raise error(errno.EBUSY, path)
            return False
        kobjs = list(item.kobjs)
        for kobj in kobjs:
            self._registry.remove(path, kobj)
        yield from outcome(group.drop_item(path.rpartition("/")[2], kobjs[0]))
        return True

    def idle(self, path: str) -> Operation[None]:
        """Waits until nobody is inside the item."""
        item, _group = self._removable(path)
        while item in self._nr_inside:
            yield self._emptied.setdefault(item, threading.Event())

    def _removable(self, path: str) -> tuple[Dir, ConfigGroup]:
        node = self._registry.nodes.get(path)
        if node is None:
            raise error(errno.ENOENT, path)
        if not isinstance(node, Dir):
            raise error(errno.EACCES if node.flavour is Flavour.SYSCTL else errno.ENOTDIR, path)
        group = _group_of(self._parent(node))
        if group is None or node.is_default:
            raise error(RULES[node.flavour].remove, path)
        if _holds_items(node):
            raise error(errno.ENOTEMPTY, path)
        return node, group

    def _item_of(self, node: Node) -> Dir | None:
        """The innermost user-made directory that holds a node."""
        while node is not self._registry.root:
            parent = self._parent(node)
            if isinstance(node, Dir) and not node.is_default and _group_of(parent):
                return node
            node = parent
        return None

    def _parent(self, node: Node) -> Node:
        return self._registry.nodes[node.path.rpartition("/")[0] or "/"]


def _group_of(node: Node) -> ConfigGroup | None:
    """The ConfigGroup behind a directory, if it takes items."""
    kobjs = node.kobjs if isinstance(node, Dir) else []
    return next((kobj for kobj in kobjs if isinstance(kobj, ConfigGroup)), None)


def _holds_items(directory: Dir) -> bool:
    subdirs = [node for node in directory.entries.values() if isinstance(node, Dir)]
    return any(not subdir.is_default or _holds_items(subdir) for subdir in subdirs)
