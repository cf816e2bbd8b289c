# SPDX-License-Identifier: GPL-2.0-only
"""Pseudo-files by declaration: a Kobject is a directory, an Attr on its class is a file in it.

Theory of operation
    The class that owns a piece of state declares its files beside it, once: kind, default, doc, hooks.

        class CompactionSysctl(Kobject):
            extfrag_threshold = Attr(Int(0, 1000), 500, doc="Index above which a zone counts as fragmented.")
            compact_memory = Attr(Int(1, 1), doc="Write 1: compact every zone now.")

            @compact_memory.store
            def _compact_all(self, _one: int) -> Operation[None]: ...

        registry.add("/proc/sys/vm", CompactionSysctl())

    Code reads and sets a knob as the plain value `self.extfrag_threshold`. Everything else is derived: the
    mode from what the file can do, the grammar from its kind and its path (`kinds.Flavour`), the mounted
    tree, the ABI table and the wiring tests from `Registry.walk()`. Declarations are checked when a Kobject
    is added, not at the first read.

    A hook that takes long is a generator, see operation.py.

Invariants
    - Registry.nodes has one Node per path and each Node but the root is in its parent's `entries`.
    - A Node's inode number is never used again.
    - Only the owner of the machine changes a Registry. Readers need no lock: each lookup is one dict access.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, overload

from kernelsim.attr_check import problem_of
from kernelsim.attr_hooks import Hooks
from kernelsim.attr_node import NR_COUNTS as NR_COUNTS
from kernelsim.attr_node import Changes as Changes
from kernelsim.attr_node import CounterText as CounterText
from kernelsim.attr_node import Dir as Dir
from kernelsim.attr_node import File as File
from kernelsim.attr_node import Guard as Guard
from kernelsim.attr_node import Link as Link
from kernelsim.attr_node import Node as Node
from kernelsim.attr_node import Opener as Opener
from kernelsim.attr_node import split_path
from kernelsim.kinds import PAGE_SIZE as PAGE_SIZE
from kernelsim.kinds import Bool as Bool
from kernelsim.kinds import Bytes as Bytes
from kernelsim.kinds import Choice as Choice
from kernelsim.kinds import Entries as Entries
from kernelsim.kinds import Flavour as Flavour
from kernelsim.kinds import Int as Int
from kernelsim.kinds import IntVector as IntVector
from kernelsim.kinds import Kind as Kind
from kernelsim.kinds import PartialWrite as PartialWrite
from kernelsim.kinds import Size as Size
from kernelsim.kinds import Stream as Stream
from kernelsim.kinds import StreamOverrun as StreamOverrun
from kernelsim.kinds import StrictVector as StrictVector
from kernelsim.kinds import Text as Text
from kernelsim.kinds import Trigger as Trigger
from kernelsim.kinds import Word as Word
from kernelsim.operation import Operation as Operation
from kernelsim.operation import Waitable as Waitable
from kernelsim.operation import complete as complete
from kernelsim.operation import outcome as outcome
from kernelsim.wait import WaitQueue as WaitQueue

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", bound="Kobject")


nr_values_set = memoryview(bytearray(8)).cast("Q")
"""How many values were set so far, by whomever: until then a text that is just a value holds. Read by compiled code."""


class Attr(Hooks[T]):
    """One pseudo-file. On an instance it is the stored value; on the class it is this declaration.

    kind      what values it takes and how it prints them
    default   the value at first; without one, the file is what its hooks make of it
    doc       one line for the ABI table
    since     first version of this project that has the file
    name      file name, where Python cannot spell it
    kept      its show hook goes by nothing that changes while nobody holds the machine, as the time; "memory": by
              nothing but the kernel's pages and what counts them, so not by a plain number either
    late      its stored hook only sets other values, by the last number written, and never fails: it may come late
    guard     what it asks of who opens it beside the mode
    mode      permission bits; else 0644 with a default or both directions, 0200 or 0444 with one hook
    """

    def __init__(
        self,
        kind: Kind[T],
        default: T | None = None,
        *,
        doc: str,
        since: str = "0.1",
        name: str | None = None,
        mode: int | None = None,
        kept: bool | Literal["memory"] = False,
        late: bool = False,
        guard: Guard = Guard.NOTHING,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.is_stream = isinstance(kind, Stream)
        self.default = default
        self.doc = doc
        self.since = since
        self.guard = guard
        self.name = name or ""
        self._mode = mode
        self._kept = kept
        self._late = late
        self._key = ""

    # The descriptor: the value lives in the instance's own dictionary.

    def __set_name__(self, owner: type, name: str) -> None:
        self._key = name
        self.name = self.name or name

    @overload
    def __get__(self, kobj: None, owner: type) -> Self: ...
    @overload
    def __get__(self, kobj: "Kobject", owner: type) -> T: ...
    def __get__(self, kobj: "Kobject | None", owner: type) -> Self | T:
        if kobj is None:
            return self
        return cast(T, kobj.__dict__.get(self._key, self.default))

    def __set__(self, kobj: "Kobject", value: T) -> None:
        nr_values_set[0] += 1
        kobj.__dict__[self._key] = value

    # What the file can do.

    @property
    def can_poll(self) -> bool:
        return self._poll is not None

    @property
    def kept(self) -> bool:
        """Does a text hold until somebody has held the machine? A stored value does."""
        return bool(self._kept) or self.counts or self.shows_itself

    @property
    def shows_memory(self) -> bool:
        """Does a text hold until the kernel's memory may have changed?"""
        return self._kept == "memory"

    @property
    def counts(self) -> bool:
        """Is its text numbers of the machine (Hooks.counters)?"""
        return self._counters is not None

    @property
    def shows_itself(self) -> bool:
        """Is its text just its value?"""
        return self._show is None and self.default is not None

    @property
    def plain(self) -> bool:
        """Is it a whole number that can be set just before anybody looks? Who is told, if anybody, may be told late."""
        is_number = type(self.kind) in (Int, Bool) and self.shows_itself
        return is_number and not self._store and (self._late or not self._stored)

    @property
    def sets_others(self) -> bool:
        """May others change their values as this one is written?"""
        return self._stored is not None

    @property
    def has_users(self) -> bool:
        return self._open is not None

    @property
    def readable(self) -> bool:
        return self.default is not None or any((self._show, self._counters, self._read))

    @property
    def writable(self) -> bool:
        return self.default is not None or any((self._store, self._write, self._write_at))

    @property
    def truncatable(self) -> bool:
        return self._truncate is not None

    @property
    def mode(self) -> int:
        """Permission bits, as the kernel's __ATTR_RO, _WO and _RW macros give them."""
        if self._mode is not None:
            return self._mode
        return {(True, True): 0o644, (True, False): 0o444}.get((self.readable, self.writable), 0o200)

    def read_text(self, kobj: "Kobject") -> Operation[bytes]:
        """The text of the file now."""
        if self._counters is not None:
            return self._counters(kobj).text()
        shown: Any = self.__get__(kobj, type(kobj))
        if self._show is not None:
            shown = yield from outcome(self._show(kobj))
        if not isinstance(shown, str | bytes) or isinstance(self.kind, Choice):
            shown = self.kind.format(shown)
        if isinstance(shown, bytes):
            return shown
        text: str = shown if not shown or shown.endswith("\n") else shown + "\n"
        return text.encode("utf-8", "surrogateescape")

    def write_text(self, kobj: "Kobject", data: bytes, flavour: Flavour) -> Operation[int]:
        """One write(2): parse, check, store -> bytes taken. An OSError leaves the value as it was."""
        try:
            value, nr_taken = self.kind.parse(data, flavour)
        except PartialWrite as partial:
            if self._store is not None:
                yield from outcome(self._store(kobj, cast(T, partial.value)))
            raise
        if self._store is not None:
            yield from outcome(self._store(kobj, value))
            return nr_taken
        old = self.__get__(kobj, type(kobj))
        self.__set__(kobj, value)
        if self._stored is not None:
            try:
                yield from outcome(self._stored(kobj, old, value))
            except OSError:
                self.__set__(kobj, old)
                raise
        return nr_taken

    def settle(self, kobj: "Kobject", value: T) -> None:
        """Set what was written while nobody held the machine; `plain` says whether that may be.

        It is not counted as set now: texts do not hold any more since it was written.
        """
        old = self.__get__(kobj, type(kobj))
        kobj.__dict__[self._key] = value
        if self._stored is not None:
            self._stored(kobj, old, value)

    def counter_text(self, kobj: "Kobject") -> "CounterText | None":
        """What its text is made of, if that is numbers of the machine."""
        return None if self._counters is None else self._counters(kobj)

    def read_stream(self, kobj: "Kobject", pos: int, size: int, nonblock: bool) -> Operation[bytes]:
        """The record at byte offset `pos`, or what the stream gives for it; b"" at its end. May raise StreamOverrun."""
        assert self._read is not None
        return cast(bytes, (yield from outcome(self._read(kobj, pos, size, nonblock))))

    def write_skipped(self, kobj: "Kobject", nr: int) -> Operation[int]:
        """A write(2) of `nr` bytes beyond position 0 of a sysctl -> bytes taken, all of them."""
        if self._skipped is not None:
            yield from outcome(self._skipped(kobj))
        return nr

    def open_stream(self, kobj: "Kobject", opener: "Opener") -> Any:
        """What stands for one open file of a stream. Raises OSError as the hook does."""
        return None if self._open is None else self._open(kobj, opener)

    def release_stream(self, kobj: "Kobject", user: Any) -> None:
        """The open file is no more."""
        if self._release is not None:
            self._release(kobj, user)

    def poll_stream(self, kobj: "Kobject", pos: int) -> WaitQueue | None:
        """Where a read at `pos` would wait; None: it would not."""
        return None if self._poll is None else self._poll(kobj, pos)

    def write_stream(self, kobj: "Kobject", data: bytes, pos: int = 0, user: Any = None) -> Operation[int]:
        """One write(2) to a stream -> bytes taken: all of them, or what its hook says."""
        if self._write_at is not None:
            return cast(int, (yield from outcome(self._write_at(kobj, pos, data))))
        assert self._write is not None
        write = cast(Any, self._write)
        nr_taken = yield from outcome(write(kobj, data) if self._open is None else write(kobj, data, user))
        return len(data) if nr_taken is None else cast(int, nr_taken)

    def truncate_file(self, kobj: "Kobject") -> Operation[None]:
        """open(2) with O_TRUNC, which a shell's `>` does before it writes anything; or truncate(2)."""
        if self._truncate is not None:
            yield from outcome(self._truncate(kobj))

    def stream_size(self, kobj: "Kobject") -> int:
        """Bytes in the stream so far; 0 where nobody counts them."""
        return 0 if self._size is None else self._size(kobj)

    def validate(self) -> None:
        """Raises ValueError for a declaration that cannot work. Source of the idea: sysctl_check_table()."""
        if problem := problem_of(self):
            raise ValueError(f"attribute {self.name!r}: {problem}")


class Kobject:
    """One directory, or a part of one: its class's Attrs are the files."""

    attrs: ClassVar[tuple[Attr[Any], ...]] = ()
    apart: ClassVar[bool] = False  # what hooks of its files do changes nothing of the kernel's memory

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found = {k: v for base in reversed(cls.__mro__) for k, v in vars(base).items() if isinstance(v, Attr)}
        cls.attrs = tuple(found.values())

    def children(self) -> Mapping[str, "Kobject"]:
        """Directories that come and go with this one (configfs: default groups), by name.

        The same objects each time it is asked.
        """
        return {}


class ConfigGroup(Kobject):
    """A configfs directory in which users make items: mkdir calls `make_item`, rmdir calls `drop_item`."""

    def make_item(self, name: str) -> "Kobject | Operation[Kobject]":
        """The Kobject behind a new directory, or the operation that makes it. OSError: a wrong name or moment."""
        raise NotImplementedError

    def drop_item(self, name: str, kobj: Kobject) -> object:
        """The item was removed; may be an operation, which rmdir(2) then waits for."""
        return None


class Registry:
    """Every pseudo-file there is, by absolute path below the mount point."""

    def __init__(self) -> None:
        self.root = Dir("/", 1, Flavour.of("/"))
        self.nodes: dict[str, Node] = {"/": self.root}
        self.changes = Changes()
        self.mode_of: Callable[[Attr[Any]], int] = lambda attr: attr.mode
        self._next_ino = 2

    def add(self, path: str, kobj: Kobject) -> None:
        """Show `kobj` at `path`, with its children; several Kobjects may share a directory.

        Raises ValueError, and adds nothing, for a bad declaration or a name that is taken.
        """
        self._add(path, kobj, is_default=False)

    def remove(self, path: str, kobj: Kobject) -> None:
        """The inverse of `add`; a directory left empty goes too. Raises KeyError if it is not there."""
        directory = self.nodes[path]
        if not isinstance(directory, Dir) or kobj not in directory.kobjs:
            raise KeyError(f"{kobj!r} is not at {path}")
        for name, child in kobj.children().items():
            self.remove(f"{path}/{name}", child)
        for node in list(directory.entries.values()):
            if isinstance(node, File) and node.kobj is kobj:
                self._drop(node)
        directory.kobjs.remove(kobj)
        self._prune(directory)

    def link(self, path: str, target: str) -> None:
        """Put a symbolic link at `path`. Raises ValueError if the name is taken."""
        parent, name = split_path(path)
        directory = self._mkdir(parent)
        if name in directory.entries:
            raise ValueError(f"{path} is taken")
        self._enter(directory, name, Link(path, self._ino(), Flavour.of(path), target=target))

    def unlink(self, path: str) -> None:
        """Remove a symbolic link. Raises KeyError if there is none."""
        node = self.nodes[path]
        if not isinstance(node, Link):
            raise KeyError(f"{path} is not a link")
        self._drop(node)
        self._prune(self.nodes[split_path(path)[0]])

    def walk(self) -> Iterator[tuple[str, Kobject, Attr[Any]]]:
        """Every file: (path, kobj, attr), directory by directory in the order things were added."""
        pending: list[Dir] = [self.root]
        while pending:
            directory = pending.pop()
            nodes = list(directory.entries.values())
            for node in nodes:
                if isinstance(node, File):
                    yield node.path, node.kobj, node.attr
            pending += reversed([node for node in nodes if isinstance(node, Dir)])

    def read(self, path: str) -> bytes:
        """Text of a file, as `cat` would show it: for library use, without a mount. Raises KeyError."""
        node = self._file(path)
        return complete(node.attr.read_text(node.kobj))

    def write(self, path: str, text: str) -> int:
        """One write(2), run to its end -> bytes taken. Raises KeyError; OSError as the file does."""
        node = self._file(path)
        return complete(node.attr.write_text(node.kobj, text.encode(), node.flavour))

    def truncate(self, path: str) -> None:
        """What a shell's `>` does to a file before it writes. Raises KeyError; OSError as the file does."""
        node = self._file(path)
        complete(node.attr.truncate_file(node.kobj))

    def _file(self, path: str) -> File:
        node = self.nodes[path]
        if not isinstance(node, File):
            raise KeyError(f"{path} is not a file")
        return node

    def _add(self, path: str, kobj: Kobject, is_default: bool) -> None:
        self._check(path, kobj)
        directory = self._mkdir(path)
        directory.is_default |= is_default
        directory.kobjs.append(kobj)
        for attr in kobj.attrs:
            where = f"{path}/{attr.name}"
            file = File(where, self._ino(), directory.flavour, kobj=kobj, attr=attr, mode=self.mode_of(attr))
            self._enter(directory, attr.name, file)
        for name, child in kobj.children().items():
            self._add(f"{path}/{name}", child, is_default=True)

    def _check(self, path: str, kobj: Kobject) -> None:
        """Refuse a whole Kobject, children included, before any of it is entered."""
        if not path.startswith("/") or path.endswith("/") or "//" in path:
            raise ValueError(f"bad path {path!r}")
        directory = self.nodes.get(path)
        if directory is not None and not isinstance(directory, Dir):
            raise ValueError(f"{path} is not a directory")
        names = [attr.name for attr in kobj.attrs]
        for attr in kobj.attrs:
            attr.validate()
            if names.count(attr.name) > 1 or (directory and attr.name in directory.entries):
                raise ValueError(f"{path}/{attr.name}: two files of one name")
        for name, child in kobj.children().items():
            if name in names:
                raise ValueError(f"{path}/{name}: a file and a directory of one name")
            self._check(f"{path}/{name}", child)

    def _mkdir(self, path: str) -> Dir:
        """The directory at `path`, made with its parents where missing."""
        node = self.nodes.get(path)
        if node is None:
            parent, name = split_path(path)
            node = Dir(path, self._ino(), Flavour.of(path))
            self._enter(self._mkdir(parent), name, node)
        if not isinstance(node, Dir):
            raise ValueError(f"{path} is not a directory")
        return node

    def _enter(self, directory: Dir, name: str, node: Node) -> None:
        self.nodes[node.path] = node
        directory.entries[name] = node
        directory.nr_dirs += isinstance(node, Dir)
        self.changes.change_name()

    def _drop(self, node: Node) -> None:
        parent, name = split_path(node.path)
        directory = self.nodes[parent]
        assert isinstance(directory, Dir)
        del directory.entries[name], self.nodes[node.path]
        directory.nr_dirs -= isinstance(node, Dir)
        node.alive = False
        self.changes.change_name(node.ino)

    def _prune(self, node: Node) -> None:
        """Remove empty directories upwards from here."""
        while isinstance(node, Dir) and not node.entries and not node.kobjs and node is not self.root:
            parent = self.nodes[split_path(node.path)[0]]
            self._drop(node)
            node = parent

    def _ino(self) -> int:
        self._next_ino += 1
        return self._next_ino - 1
