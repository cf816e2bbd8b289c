# SPDX-License-Identifier: GPL-2.0-only
"""This host's tracefs: an instance of our own, with buffers, events and a clock, so that nobody's tracing is disturbed.

Where tracefs is mounted nowhere, it is opened without mounting it: fsmount(2) gives a mount that only this process and
its children see. The instance is removed by a shell that waits for the end of its input: it goes when we close it, and
also when we are killed.
"""

import ctypes
import errno
import os
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from dpud.errors import UserError

PLACES = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432  # the same on all architectures
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_JANITOR = """
trap '' INT TERM HUP
read -r _
echo 0 >"$1/tracing_on"
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    rmdir "$1" 2>/dev/null && exit 0
    sleep 0.25
done
exit 1
"""
READ_BYTES = 1 << 16


class TracefsError(UserError):
    """This host's tracing cannot be used; the text is one line."""


def open_root() -> int:
    """A descriptor of the root of tracefs. Raises TracefsError."""
    try:
        for place in PLACES:
            if (place / "instances").is_dir():
                return os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return _open_unmounted()
    except OSError as error:
        is_denied = error.errno in (errno.EPERM, errno.EACCES)
        reason = "tracing needs root" if is_denied else "tracefs cannot be opened"
        raise TracefsError(f"{PLACES[0]}: {error.strerror}: {reason}") from None


def _open_unmounted() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    context = _checked(libc.syscall(_SYS_FSOPEN, b"tracefs", _FSOPEN_CLOEXEC))
    try:
        _checked(libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0))
        return _checked(libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0))
    finally:
        os.close(context)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class TraceInstance(AbstractContextManager["TraceInstance"]):
    """instances/NAME while the block lasts, with `events` on and tracing off. Raises TracefsError."""

    def __init__(self, name: str, events: tuple[str, ...], buffer_kb: int, clock: str = "mono") -> None:
        """`events` are `system/event`, `buffer_kb` is for each CPU."""
        self._name = name
        self._events = events
        self._settings = {"buffer_size_kb": str(buffer_kb), "trace_clock": clock}
        self._root = self._pipe = -1
        self._janitor: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> Path:
        return Path(f"/proc/self/fd/{self._root}/instances/{self._name}")

    def __enter__(self) -> "TraceInstance":
        self._root = open_root()
        try:
            self._make()
        except OSError as error:
            self._close()
            file = str(error.filename).partition("/instances/")[2] or "tracefs"
            raise TracefsError(f"instances/{file}: {error.strerror}") from None
        except BaseException:
            self._close()
            raise
        return self

    def _make(self) -> None:
        self.path.mkdir()
        self._janitor = subprocess.Popen(
            ["/bin/sh", "-c", _JANITOR, "dpud-record", str(self.path)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._root,),
            start_new_session=True,
        )
        self.write("tracing_on", "0")
        for name, value in self._settings.items():
            self.write(name, value)
        for event in self._events:
            self.write(f"events/{event}/enable", "1")
        self._pipe = os.open(self.path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def write(self, name: str, value: str) -> None:
        """Write one of the instance's files. Raises OSError."""
        (self.path / name).write_text(value)

    def read(self) -> bytes:
        """Text that came since the last time; b"" if there is none (now)."""
        try:
            return os.read(self._pipe, READ_BYTES)
        except BlockingIOError:
            return b""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
        if self._janitor is not None:
            self._janitor.communicate()
        os.close(self._root)
