# SPDX-License-Identifier: GPL-2.0-only
"""What a pseudo-file's declaration calls as the file is used: the hooks of an Attr (attr.py), and how they are named.

Each decorator gives the method back unchanged, so it stays callable as what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kernelsim.wait import WaitQueue

if TYPE_CHECKING:
    from kernelsim.attr import Kobject
    from kernelsim.attr_node import CounterText, Opener

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", bound="Kobject")


class Hooks(Generic[T]):
    """Of one declaration; those that it does not have are None."""

    def __init__(self) -> None:
        self._show: Callable[[Any], Any] | None = None
        self._counters: Callable[[Any], CounterText] | None = None
        self._store: Callable[[Any, T], Any] | None = None
        self._stored: Callable[[Any, T, T], Any] | None = None
        self._read: Callable[[Any, int, int, bool], Any] | None = None
        self._write: Callable[[Any, bytes], Any] | None = None
        self._write_at: Callable[[Any, int, bytes], Any] | None = None
        self._size: Callable[[Any], int] | None = None
        self._truncate: Callable[[Any], Any] | None = None
        self._open: Callable[[Any, Opener], Any] | None = None
        self._release: Callable[[Any, Any], object] | None = None
        self._poll: Callable[[Any, int], WaitQueue | None] | None = None
        self._skipped: Callable[[Any], Any] | None = None

    def show(self, hook: Callable[[K], R]) -> Callable[[K], R]:
        """`(self) -> value or finished text`, instead of the stored value; may be an operation."""
        self._show = hook
        return hook

    def counters(self, hook: Callable[[K], CounterText]) -> Callable[[K], CounterText]:
        """`(self) -> what its text is made of` instead of `show`, where that is numbers of the machine."""
        self._counters = hook
        return hook

    def store(self, hook: Callable[[K, T], R]) -> Callable[[K, T], R]:
        """`(self, value)`, instead of storing a valid value; may be an operation."""
        self._store = hook
        return hook

    def stored(self, hook: Callable[[K, T, T], R]) -> Callable[[K, T, T], R]:
        """`(self, old, new)` after a valid value was stored; may be an operation. OSError takes it back."""
        self._stored = hook
        return hook

    def read(self, hook: Callable[[K, int, int, bool], R]) -> Callable[[K, int, int, bool], R]:
        """Stream: `(self, pos, size, nonblock) -> bytes`, or an operation that yields while it waits."""
        self._read = hook
        return hook

    def write(self, hook: Callable[[K, bytes], R]) -> Callable[[K, bytes], R]:
        """Stream: `(self, data)` for each write(2) -> bytes taken, None for all; may be an operation."""
        self._write = hook
        return hook

    def write_at(self, hook: Callable[[K, int, bytes], R]) -> Callable[[K, int, bytes], R]:
        """Bytes: `(self, pos, data) -> bytes taken` for each write(2); may be an operation."""
        self._write_at = hook
        return hook

    def size(self, hook: Callable[[K], int]) -> Callable[[K], int]:
        """Stream: `(self) -> bytes in the stream so far`, shown as the file's size."""
        self._size = hook
        return hook

    def truncate(self, hook: Callable[[K], R]) -> Callable[[K], R]:
        """`(self)` when the file is opened with O_TRUNC or truncated; without it nothing happens then."""
        self._truncate = hook
        return hook

    def open(self, hook: Callable[[K, Opener], R]) -> Callable[[K, Opener], R]:
        """Stream: `(self, opener) -> user` at each open(2), which it may refuse; write hooks then take `user` too."""
        self._open = hook
        return hook

    def release(self, hook: Callable[[K, Any], R]) -> Callable[[K, Any], R]:
        """Stream: `(self, user)` when the last descriptor of an open file is closed."""
        self._release = hook
        return hook

    def poll(self, hook: Callable[[K, int], WaitQueue | None]) -> Callable[[K, int], WaitQueue | None]:
        """Stream: `(self, pos) -> None` if a read at `pos` would not wait, else the queue it would wait on."""
        self._poll = hook
        return hook

    def skipped(self, hook: Callable[[K], R]) -> Callable[[K], R]:
        """Sysctl: `(self)` for a write beyond position 0, whose data are ignored; may be an operation."""
        self._skipped = hook
        return hook
