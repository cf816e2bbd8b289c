# SPDX-License-Identifier: GPL-2.0-only
"""Does what requests say. It runs with the machine held, and what it gives may be an operation to be driven to its end.

What happens follows from the requests and their order alone, but for two things, which are asked for through `outside`:
the name of who asks, and whether somebody is reading in a directory that is to be removed.
"""

import os
from collections.abc import Callable
from errno import ENOENT
from typing import Any, TypeVar

from fs import requests
from fs.configfs import FLAVOURS, Ask, Items, error
from fs.requests import Cred, Request
from fs.rules import RULES
from kernelsim.attr import File, Flavour, Opener, Operation, Registry

R = TypeVar("R")

RunAs = Callable[[Cred, Operation[Any]], Operation[Any]]


def run_directly(_cred: Cred, operation: Operation[Any]) -> Operation[Any]:
    """The RunAs of a machine that does not care who asks."""
    return operation


class Performer:
    """Of one registry."""

    def __init__(self, registry: Registry, items: Items, run_as: RunAs, outside: Ask) -> None:
        self._nodes = registry.nodes
        self._changes = registry.changes
        self._items = items
        self._run_as = run_as
        self._outside = outside
        self._users: dict[int, tuple[File, Any]] = {}
        self._nr_opened = 0

    def settle(self, path: str, value: int) -> None:
        """Set what had been written into a file without the machine (Changes.settle). Raises ENOENT."""
        file = self._nodes.get(path)
        if not isinstance(file, File) or not file.attr.plain:
            raise error(ENOENT, path)
        file.attr.settle(file.kobj, value)

    def path_of(self, ino: int) -> str:
        """Where the node with that number is. Raises ENOENT."""
        for path, node in self._nodes.items():
            if node.ino == ino:
                return path
        raise error(ENOENT, f"inode {ino}")

    def perform(self, request: Request, cred: Cred) -> Any:
        """Do what a request says, with the machine held -> the outcome, or the operation that will come to it."""
        work = _ON_FILES.get(request.verb)
        if work is None:
            return self._perform_otherwise(request, cred)
        file = self._file(request)
        _, user = self._users.get(request.user, _NOBODY)
        operation = self._run_as(cred, work(file, request, user))
        return self._inside(file, operation) if file.flavour in FLAVOURS else operation

    def _file(self, request: Request) -> File:
        file = self._nodes.get(request.path)
        if file is None or file.ino != request.ino:
            raise error(RULES[Flavour.of(request.path)].gone, request.path)
        assert isinstance(file, File)
        return file

    def _perform_otherwise(self, request: Request, cred: Cred) -> Any:
        verb, path = request.verb, request.path
        if verb == requests.MKDIR:
            return self._run_as(cred, self._items.make(path))
        if verb == requests.RMDIR:
            return self._run_as(cred, self._items.drop(path))
        if verb == requests.RELEASE:
            opened, user = self._users.pop(request.user)
            return opened.attr.release_stream(opened.kobj, user)
        file = self._file(request)
        if verb == requests.OPEN:
            return self._open_stream(file, request, cred)
        assert verb == requests.CHMOD
        file.mode = request.pos
        self._changes.change_name(file.ino)
        return 0

    def _open_stream(self, file: File, request: Request, cred: Cred) -> int:
        """-> the number of the open file; 0 for who only reads: then no hook may change anything, nothing is kept."""
        opener = Opener(request.flags, self._outside(cred.comm), bool(request.pos))
        user = file.attr.open_stream(file.kobj, opener)
        if request.flags & os.O_ACCMODE == os.O_RDONLY:
            return 0
        self._nr_opened += 1
        self._users[self._nr_opened] = file, user
        return self._nr_opened

    def open_files(self) -> list[Request]:
        """A release for each open file that its attribute keeps something for."""
        return [
            Request(requests.RELEASE, file.path, file.ino, user=number, apart=file.kobj.apart)
            for number, (file, _) in self._users.items()
        ]

    def _inside(self, file: File, operation: Operation[R]) -> Operation[R]:
        """The same, kept from being dropped meanwhile."""
        with self._items.inside(file):
            return (yield from operation)


def _read(file: File, _request: Request, _user: Any) -> Operation[bytes]:
    file.counter_text = file.attr.counter_text(file.kobj)
    return file.attr.read_text(file.kobj)


def _write(file: File, request: Request, _user: Any) -> Operation[int]:
    return file.attr.write_text(file.kobj, request.data, file.flavour)


def _read_stream(file: File, request: Request, _user: Any) -> Operation[bytes]:
    return file.attr.read_stream(file.kobj, request.pos, request.size, bool(request.flags))


def _write_stream(file: File, request: Request, user: Any) -> Operation[int]:
    return file.attr.write_stream(file.kobj, request.data, request.pos, user)


def _skip(file: File, request: Request, _user: Any) -> Operation[int]:
    return file.attr.write_skipped(file.kobj, request.size)


def _truncate(file: File, _request: Request, _user: Any) -> Operation[None]:
    return file.attr.truncate_file(file.kobj)


_ON_FILES: dict[str, Callable[[File, Request, Any], Operation[Any]]] = {
    requests.READ: _read,
    requests.WRITE: _write,
    requests.READ_STREAM: _read_stream,
    requests.WRITE_STREAM: _write_stream,
    requests.SKIP: _skip,
    requests.TRUNCATE: _truncate,
}
_NOBODY = (None, None)
