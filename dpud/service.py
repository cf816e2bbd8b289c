# SPDX-License-Identifier: GPL-2.0-only
"""What the daemon says to systemd, and gets from it: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

Theory of operation
    The unit hides most of the system from the daemon, and a service with a view of its own cannot mount anything that
    others see. So the mount is made before, by `dpud service-mount DIR`, as an ExecStartPre= which has all privileges
    and the view of pid 1 for as long as it takes: it clears away what a killed daemon left, mounts, and puts the
    connection (the descriptor of /dev/fuse) into systemd's store under the name `fuse`. The daemon, which has neither
    privileges nor a device, gets it from there and serves. Files belong to root, whoever serves them.

    Between a death of the daemon and the next start the store keeps the connection, so requests wait rather than fail.
    The next `service-mount` takes it out of the store, which ends them, and the mount they came through.

    The watchdog is fed after a file was read through the mount: so kernel, FUSE, this daemon and its machine answer. A
    process of its own reads it. A thread of the daemon's would wait in the kernel for an answer of the daemon's, which
    no signal interrupts: one that is killed meanwhile could not end, and its connection would not close either. So
    does the first look that says that the daemon is ready (`is_served`).
"""

import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from dpud.journald import Journal, JournalHandler, level_of
from fs.fuse_attach import attach
from fs.mountpoint import MountError, check_mountable, detach_stale

STORED = "fuse"
_FIRST_FD = 3  # SD_LISTEN_FDS_START
_NULL = subprocess.DEVNULL

_log = logging.getLogger("dpud")


def notify(*states: str, fds: Sequence[int] = ()) -> None:
    """Tell systemd, where it started us; an address that starts with @ is an abstract one."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect(re.sub("^@", "\0", address))
            socket.send_fds(channel, ["\n".join(states).encode()], list(fds))


def inherited() -> int | None:
    """The connection that `hand_over` put into the store; None if there is none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found = [number for number, name in enumerate(names, _FIRST_FD) if name == STORED]
    for fd in found:
        os.set_inheritable(fd, False)
    return found[-1] if found else None


def hand_over(path: str) -> None:
    """Mount at `path`, made where missing, and give the connection to the service that this is part of.

    Raises MountError.
    """
    if "NOTIFY_SOCKET" not in os.environ:
        raise MountError("service-mount is for ExecStartPre= of a unit with NotifyAccess=exec")
    notify("FDSTOREREMOVE=1", f"FDNAME={STORED}")
    detach_stale(path)
    try:
        os.umask(0o022)  # the unit's is for what the daemon writes
        os.makedirs(path, 0o755, exist_ok=True)
    except OSError as error:
        raise MountError(f"{path}: cannot make that directory: {error.strerror}") from error
    check_mountable(path)
    fd = attach(path, allow_other=True)
    notify("FDSTORE=1", f"FDNAME={STORED}", fds=[fd])


def watch(probe: str) -> threading.Event | None:
    """Feed the watchdog, if there is one, twice in each of its periods, as long as `probe` can be read.

    Returns what ends that when it is set.
    """
    usec = os.environ.get("WATCHDOG_USEC")
    if usec is None or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    period_s = int(usec) / 2e6
    stop = threading.Event()
    threading.Thread(target=_feed, args=(probe, period_s, stop), name="dpud-watchdog", daemon=True).start()
    return stop


def _feed(probe: str, period_s: float, stop: threading.Event) -> None:
    while not stop.wait(period_s):
        if answers(probe):
            notify("WATCHDOG=1")


def is_served(path: str) -> bool:
    """Wait until a path can be looked up; why it cannot be is logged. For who serves the mount that it is in."""
    return _does_another("stat", path)


def answers(probe: str) -> bool:
    """Whether a file can be read; why not is logged. For who serves the mount that it is in."""
    return _does_another("head", "-c1", probe)


def _does_another(*command: str) -> bool:
    """Whether another process can: who waits for itself in the kernel cannot be killed."""
    done = subprocess.run(command, stdin=_NULL, stdout=_NULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        _log.warning("the mount does not answer: %s", done.stderr.strip())
    return done.returncode == 0


def in_journal() -> bool:
    """Whether stderr goes to the journal, which takes a level in front of each line."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    found = os.fstat(sys.stderr.fileno())
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def say(level: int, text: str) -> None:
    """A line of the kernel log for the journal."""
    print(f"<{level}>{text}", file=sys.stderr, flush=True)


class _Leveled(logging.Formatter):
    """Each line of a record, tracebacks too, with its level in front."""

    def format(self, record: logging.LogRecord) -> str:
        level = level_of(record)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def log_to_journal(journal: Journal | None = None) -> Callable[[int, str], None]:
    """Python's own log goes there, and the stacks of all threads when the watchdog's SIGABRT ends this process.

    Returns the console for the kernel's log. Without the journal's socket both put levels in front of lines.
    """
    import faulthandler

    faulthandler.enable()
    journal = journal or Journal()
    handler = logging.StreamHandler()
    handler.setFormatter(_Leveled("%(name)s: %(message)s"))
    logging.getLogger().addHandler(JournalHandler(journal, handler))
    return journal.kernel(say)
