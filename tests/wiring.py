# SPDX-License-Identifier: GPL-2.0-only
"""Tests made from the declarations: every file of a registry behaves as it was declared.

    def test_wiring():
        run_all(wiring_cases(machine().registry))

They find a file that is wired up wrongly, not a declaration that is wrong: the facts themselves (modes,
ranges, defaults) have to be typed in once more elsewhere.
"""

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from fs.kernfs import Cred, Tree
from kernelsim.attr import File, Flavour, Registry

T = TypeVar("T")
NOBODY = Cred(65534, 65534)
CHECKS_METHODS = (Flavour.SYSFS, Flavour.CONFIGFS)
TRACED = re.compile(r"/proc/\d+/(maps|smaps|smaps_rollup|numa_maps|pagemap)")
"""Open for whoever may trace the process, by proc_pid_maps(5) and the like, whatever the mode says."""


@dataclass(frozen=True)
class Case:
    """One property of one file."""

    path: str
    what: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.path}-{self.what}"


def let_others_in(folder: Path) -> None:
    """Into one of pytest's folders, which are its user's alone."""
    folder.chmod(0o755)
    for parent in folder.parents:
        if parent.name.startswith(("pytest-", "popen-", "test_")):
            parent.chmod(0o755)


def for_each(items: Iterable[T], check: Callable[[T], object]) -> None:
    """Check every one, and fail then, with all that was wrong and what it was wrong with.

    For the many that are small: a test of its own takes pytest longer than it takes to check one.
    """
    failures: list[BaseException] = []
    nr_items = 0
    for item in items:
        nr_items += 1
        try:
            check(item)
        except (Exception, pytest.fail.Exception) as error:
            error.add_note(f"of {item}")
            failures.append(error)
    assert nr_items, "there is nothing to check"
    if failures:
        raise BaseExceptionGroup(f"{len(failures)} of {nr_items} are wrong", failures)


def run_all(cases: Iterable[Case]) -> None:
    """Every property of every file; a failure names all that do not hold."""
    for_each(cases, lambda case: case.run())


def wiring_cases(registry: Registry) -> list[Case]:
    """Cases for every file there is now. Hooks that replace a store are only given values they never see."""
    files = [registry.nodes[path] for path, _kobj, _attr in registry.walk()]
    tree = Tree(registry)
    return [case for file in files if isinstance(file, File) for case in _cases(registry, tree, file)]


def _cases(registry: Registry, tree: Tree, file: File) -> Iterator[Case]:
    attr, kind = file.attr, file.attr.kind
    yield Case(file.path, "mode", lambda: _check_mode(tree, file))
    if attr.is_stream:
        return
    is_plain = attr.default is not None and attr._show is None and attr._store is None
    if is_plain:
        yield Case(file.path, "shows_value", lambda: _check_shown(registry, file))
        for text in kind.legal():
            yield Case(file.path, f"takes_{text!r}", lambda text=text: _check_legal(registry, file, text))
    if attr.writable:
        for text in kind.illegal():
            yield Case(file.path, f"refuses_{text!r}", lambda text=text: _check_illegal(registry, file, text))


def errno_of(fn: Callable[..., object], *args: object) -> int:
    """The number of the OSError that `fn(*args)` raises; 0 if it raises none."""
    try:
        fn(*args)
    except OSError as error:
        return error.errno or -1
    return 0


def _text(file: File, value: object) -> bytes:
    text = file.attr.kind.format(value)
    return text.encode() if isinstance(text, str) else text


def _check_shown(registry: Registry, file: File) -> None:
    value = getattr(file.kobj, file.attr._key)
    assert registry.read(file.path) == _text(file, value)


def _check_legal(registry: Registry, file: File, text: str) -> None:
    before = getattr(file.kobj, file.attr._key)
    try:
        assert registry.write(file.path, text) == len(text)
        value, _nr_taken = file.attr.kind.parse(text.encode(), file.flavour)
        assert getattr(file.kobj, file.attr._key) == value
        assert registry.read(file.path) == _text(file, value)
    finally:
        registry.write(file.path, _written(file, before))
    assert getattr(file.kobj, file.attr._key) == before


def _written(file: File, value: object) -> str:
    """The text that stores a value (a Choice shows more than that)."""
    return f"{value}\n" if isinstance(value, str) else _text(file, value).decode()


def _check_illegal(registry: Registry, file: File, text: str) -> None:
    before = registry.read(file.path) if file.attr.readable else None
    assert errno_of(registry.write, file.path, text) == errno.EINVAL
    assert before is None or registry.read(file.path) == before


def _check_mode(tree: Tree, file: File) -> None:
    """Who may open it for what: root, and a user who is neither owner nor in the group."""
    mode = file.mode
    assert tree.getattr(file.path).st_mode & 0o777 == mode
    for cred, shift in ((Cred(0, 0), 6), (NOBODY, 0)):
        for flags, bit in ((os.O_RDONLY, 4), (os.O_WRONLY, 2)):
            allowed = bool(mode >> shift & bit)
            if cred.uid == 0 and file.flavour in CHECKS_METHODS:
                allowed = bool(mode & bit * 0o111)
            elif cred.uid == 0 and file.flavour is not Flavour.SYSCTL:
                allowed = True
            elif cred.uid and TRACED.fullmatch(file.path):
                allowed = False
            expected = 0 if allowed else errno.EACCES
            assert errno_of(tree.open, file.path, flags, cred) == expected, (cred, flags)
