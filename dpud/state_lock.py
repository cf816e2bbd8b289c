# SPDX-License-Identifier: GPL-2.0-only
"""One daemon at a time has a state directory: a flock(2) on it.

A child that writes a checkpoint has the lock's descriptor too, until it has closed it or died with its parent
(checkpoint_fork.py). So after a kill the lock may be held for a moment by somebody who is about to let it go: the
lock's process, as /proc/locks names it (proc_locks(5)), is dead then, and it is worth waiting.
"""

import errno
import fcntl
import os
import time
from pathlib import Path

_PATIENCE_S = 10.0
_LOOK_S = 0.02


def hold(fd: int) -> None:
    """Raises BlockingIOError if somebody has it who lives, OSError."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline or _holder_lives(fd):
                raise
        time.sleep(_LOOK_S)


def _holder_lives(fd: int) -> bool:
    """Whether it does, or is not known; False where nobody has it any more either."""
    inode = os.fstat(fd).st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
            return _lives(int(words[4]))
    return False


def _lives(pid: int) -> bool:
    if pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True
