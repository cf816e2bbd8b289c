# SPDX-License-Identifier: GPL-2.0-only
"""`dpud top`: a running daemon, live. It reads the mount's files and writes the node's `compact` files, nothing else.

Theory of operation
    One thread draws and waits: for a key, a signal (they wake it through a pipe), or the next second. A compaction is
    written on a thread of its own, since that write returns when the compaction is done. The terminal is put back
    however this ends: `Live` leaves the other screen, `_keys` the mode without echo, SIGTERM and SIGHUP become
    SystemExit.
"""

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console, Group
from rich.live import Live

from dpud.errors import UserError
from dpud.status_files import MountFiles
from dpud.top_screen import plain, screen
from dpud.top_state import View

_NEXT, _PREVIOUS = ("\t", "\x1b[C", "\x1b[B"), ("\x1b[Z", "\x1b[D", "\x1b[A")
_COMPACT = {"c": ("compact_dpu", "by the DPU"), "t": ("compact", "by the CPU, as Linux does it")}
_PIPE_WIDTH = 100


def once(mountpoint: str) -> None:
    """Print the state once. Raises UserError."""
    view = View(MountFiles(mountpoint))
    view.start()
    try:
        for sweep in view.maps.values():
            sweep.read_all()
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    for line in plain(view, console.width, coloured=console.is_terminal):
        line.rstrip()
        console.print(line, no_wrap=True, overflow="crop")


def live(mountpoint: str, interval_s: float) -> None:
    """Draw until `q`, a signal, or the daemon's end. Raises UserError."""
    view = View(MountFiles(mountpoint))
    view.start()
    console = Console(highlight=False)
    with _signals() as wakeup, _keys(), Live(console=console, screen=True, auto_refresh=False) as display:
        _loop(Top(view), console, display, interval_s, wakeup)


def _loop(top: "Top", console: Console, display: Live, interval_s: float, wakeup: int) -> None:
    due_s = time.monotonic() + interval_s
    while True:
        width, height = os.get_terminal_size(sys.stdout.fileno())
        console.size = (width, height)
        display.update(Group(*screen(top.view, width, height)), refresh=True)
        readable, _, _ = select.select([sys.stdin, wakeup], [], [], max(due_s - time.monotonic(), 0))
        if wakeup in readable:
            os.read(wakeup, 64)
        if sys.stdin in readable and not all(map(top.key, _pressed())):
            return
        if time.monotonic() >= due_s:
            due_s = time.monotonic() + interval_s
            top.tick()


class Top:
    """What keys do."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._compacting: threading.Thread | None = None

    def key(self, key: str) -> bool:
        """Act on one; False to quit."""
        if key in ("q", "Q", "\x04", ""):
            return False
        if key in _COMPACT:
            self._compact(*_COMPACT[key])
        elif key == "p":
            self.view.paused = not self.view.paused
        elif key in _NEXT or key in _PREVIOUS:
            self.view.step_node(1 if key in _NEXT else -1)
            self.tick(force=True)
        return True

    def tick(self, force: bool = False) -> None:
        """Read everything anew, unless paused. Raises UserError."""
        if self.view.paused and not force:
            return
        try:
            self.view.refresh()
        except OSError as error:
            raise UserError(f"the daemon at {self.view.files.root} is gone: {error.strerror}") from error

    def _compact(self, name: str, how: str) -> None:
        if self._compacting is not None and self._compacting.is_alive():
            return
        node = self.view.node
        self.view.say(f"Compacting node {node} {how} ...")
        self._compacting = threading.Thread(target=self._write, args=(node, name, how), daemon=True)
        self._compacting.start()

    def _write(self, node: int, name: str, how: str) -> None:
        path = self.view.files.root / f"sys/devices/system/node/node{node}/{name}"
        begin_s = time.monotonic()
        try:
            path.write_text("1")
        except OSError as error:
            self.view.say(f"{path.name} of node {node}: {error.strerror}")
        else:
            self.view.say(f"Node {node} was compacted {how} in {time.monotonic() - begin_s:.2f} s (measured here)")


def _pressed() -> Iterator[str]:
    """The keys in what the terminal sent; "" at its end."""
    data = os.read(sys.stdin.fileno(), 64).decode(errors="replace")
    if not data:
        yield ""
    while data:
        length = 3 if data.startswith("\x1b[") else 1
        yield data[:length].replace("\x1bO", "\x1b[")
        data = data[length:]


@contextmanager
def _keys() -> Iterator[None]:
    """Keys come one by one and are not shown."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that can be read after a signal; those that end a program end the loop in order."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {signum: signal.signal(signum, _leave) for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda signum, frame: None)
    try:
        yield reading
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(reading)
        os.close(writing)


def _leave(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
