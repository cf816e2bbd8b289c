# SPDX-License-Identifier: GPL-2.0-only
"""What stands at a path of the Registry: a directory, a file or a link; and who opens it. See kernelsim.attr."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

from kernelsim.kinds import Flavour

if TYPE_CHECKING:
    from kernelsim.attr import Attr, Kobject


NR_COUNTS = 5


class Changes:
    """What says whether a text, or what is known of a name, still holds: counts that only grow.

    turns   turns of the machine in which anything could be changed; who holds the machine counts each as it begins
    names   files that came, went or got another mode, counted afterwards; then `forget` is told of one that was there
    stores  values that were taken by whoever does not hold the machine (Attr.plain); of these, the first `nr_settled`
            were set. Who gets the machine calls `settle`, which sets the others and gives (path, value) of each,
            before he looks at anything
    memory  turns that are over, but for those of who keeps apart from the kernel's memory (Kobject.apart): until then
            nobody has been told of a change. Who ends one calls `renew` before it is counted
    ended   turns that are over. While that is as many as have begun, the machine rests
    """

    TURNS, NAMES, STORES, MEMORY_TURNS, ENDED = range(NR_COUNTS)
    """Places in `counts`."""

    def __init__(self) -> None:
        self.counts = memoryview(bytearray(8 * NR_COUNTS)).cast("Q")
        """turns, names, stores, memory, ended: shared with compiled code."""
        self.nr_settled = 0
        self.settle: Callable[[], list[tuple[str, int]]] = list
        self.forget: Callable[[int], object] = lambda ino: None
        self.renew: Callable[[], object] = lambda: None

    def go_on_from(self, nr_stores: int) -> None:
        """So many values were taken and set, in a life before this one."""
        self.counts[self.STORES] = self.nr_settled = nr_stores

    def begin_turn(self) -> None:
        self.counts[self.TURNS] += 1

    def end_memory_turn(self) -> None:
        self.renew()
        self.counts[self.MEMORY_TURNS] += 1

    def end_turn(self) -> None:
        """By whoever holds the machine, be it that his turn was counted or not."""
        self.counts[self.ENDED] = self.counts[self.TURNS]

    def tell(self) -> None:
        """Somebody is going to be told of a change before its turn is over."""
        self.counts[self.MEMORY_TURNS] += 1

    def change_name(self, ino: int = 0) -> None:
        """`ino`: of a file that went, or got another mode."""
        self.counts[self.NAMES] += 1
        if ino:
            self.forget(ino)


class CounterText(Protocol):
    """A text that is numbers of the machine in a form that stays (seq_counters.py)."""

    @property
    def form(self) -> Any:
        """Array of one record that describes it to compiled code."""
        ...

    @property
    def room_bytes(self) -> int:
        """What it takes to make it."""
        ...

    def text(self) -> bytes:
        """As of now; for whoever holds the machine."""
        ...


class Guard(Enum):
    """What a file asks of who opens it beside its mode."""

    NOTHING = auto()
    PTRACE = auto()
    """ptrace_may_access() of the process it is about, PTRACE_MODE_READ."""
    HOST = auto()
    """To write it makes the daemon act on its host, on files or sockets: nothing that could be given to a group."""


@dataclass(eq=False, slots=True)
class Node:
    """What stands at one path."""

    path: str
    ino: int
    flavour: Flavour
    alive: bool = True
    """False once removed: those who hold it open find out."""


@dataclass(eq=False, slots=True)
class Dir(Node):
    """A directory: children by name in the order they came, and the Kobjects whose files it holds."""

    entries: dict[str, Node] = field(default_factory=dict)
    kobjs: list[Kobject] = field(default_factory=list)
    is_default: bool = False
    """Came with its parent (`Kobject.children`); configfs users cannot remove it."""
    nr_dirs: int = 0
    """Of its children."""


@dataclass(eq=False, slots=True)
class File(Node):
    """One attribute of one Kobject."""

    kobj: Kobject = field(kw_only=True)
    attr: Attr[Any] = field(kw_only=True)
    mode: int = field(kw_only=True)
    """Permission bits now: the declared ones until a chmod(2)."""
    counter_text: CounterText | None = field(kw_only=True, default=None)
    """What its text was last made of, if that was numbers of the machine."""


@dataclass(eq=False, slots=True)
class Link(Node):
    """A symbolic link; the target is used as it stands."""

    target: str = field(kw_only=True)


@dataclass(frozen=True)
class Opener:
    """Who opens a stream, and how."""

    flags: int
    """As of open(2)."""
    comm: str = "kernelsim"
    privileged: bool = True
    """Has the capabilities of the emulated kernel's root."""


def split_path(path: str) -> tuple[str, str]:
    """("/proc/sys", "vm") of "/proc/sys/vm"."""
    parent, _, name = path.rpartition("/")
    return parent or "/", name
