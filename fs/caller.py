# SPDX-License-Identifier: GPL-2.0-only
"""What /proc tells of the thread that makes a request; it waits for its answer, so it is there to be looked at."""

import os

_COMM_LEN = 64  # TASK_COMM_LEN is 16


def comm_of(pid: int) -> str:
    """Its name; "" if it is out of sight."""
    try:
        fd = os.open(f"/proc/{pid}/comm", os.O_RDONLY | os.O_CLOEXEC)  # open() would take longer than all the rest
    except OSError:
        return ""
    try:
        return os.read(fd, _COMM_LEN).decode("utf-8", "replace").removesuffix("\n")
    except OSError:
        return ""
    finally:
        os.close(fd)


def groups_of(pid: int) -> frozenset[int]:
    """Its supplementary groups; none if it is out of sight."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            line = next(line for line in status if line.startswith(b"Groups:"))
    except (OSError, StopIteration):
        return frozenset()
    return frozenset(int(group) for group in line.split()[1:])
