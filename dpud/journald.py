# SPDX-License-Identifier: GPL-2.0-only
"""The journal's native protocol: a datagram of fields to its socket (systemd's docs/JOURNAL_NATIVE_PROTOCOL.md).

A field is `NAME=value` and a newline; a value with newlines in it is `NAME`, newline, its length as a little-endian
64-bit number, value, newline. What is too large for a datagram goes as a descriptor of a sealed memfd. So each entry
keeps its level, and its lines together, which levels in front of lines on stderr do not.

Where the socket does not answer (there is none in sight, journald restarts), the caller's fallback says it.
"""

import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable

SOCKET = "/run/systemd/journal/socket"
KERNEL, DAEMON = "dpud-kernel", "dpud"
"""SYSLOG_IDENTIFIER of what the emulated kernel says, and of what this program says of itself."""

LEVELS = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def level_of(record: logging.LogRecord) -> int:
    """The kernel's number of its level."""
    return next((number for floor, number in LEVELS.items() if record.levelno >= floor), 7)


def entry(fields: dict[str, str]) -> bytes:
    """One entry as it is sent."""
    return b"".join(_field(name.encode(), value.encode("utf-8", "replace")) for name, value in fields.items())


def _field(name: bytes, value: bytes) -> bytes:
    if b"\n" in value:
        return b"%s\n%s%s\n" % (name, struct.pack("<Q", len(value)), value)
    return b"%s=%s\n" % (name, value)


class Journal:
    """A connection; `send` says whether the entry went out."""

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def send(self, level: int, message: str, identifier: str, **fields: str) -> bool:
        """An entry with PRIORITY, SYSLOG_IDENTIFIER and `fields`."""
        data = entry({"MESSAGE": message, "PRIORITY": str(level), "SYSLOG_IDENTIFIER": identifier, **fields})
        try:
            try:
                self._socket.sendto(data, self._path)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    raise
                self._send_large(data)
        except OSError:
            return False
        return True

    def _send_large(self, data: bytes) -> None:
        fd = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))
            self._socket.sendmsg([b""], [rights], 0, self._path)  # socket.send_fds() drops the address
        finally:
            os.close(fd)

    def close(self) -> None:
        self._socket.close()

    def kernel(self, fallback: Callable[[int, str], object]) -> Callable[[int, str], None]:
        """A console for the emulated kernel's log: facility 0 is the kernel's (sys/syslog.h)."""

        def say(level: int, text: str) -> None:
            if not self.send(level, text, KERNEL, SYSLOG_FACILITY="0"):
                fallback(level, text)

        return say


class JournalHandler(logging.Handler):
    """Python's log: a record is one entry, with where it comes from."""

    def __init__(self, journal: Journal, fallback: logging.Handler) -> None:
        super().__init__()
        self._journal, self._fallback = journal, fallback
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        where = {"CODE_FILE": record.pathname, "CODE_LINE": str(record.lineno), "CODE_FUNC": record.funcName or ""}
        try:
            sent = self._journal.send(level_of(record), self.format(record), DAEMON, LOGGER=record.name, **where)
        except Exception:  # a record whose arguments do not fit its format: logging's own way to say so
            self.handleError(record)
        else:
            if not sent:
                self._fallback.handle(record)
