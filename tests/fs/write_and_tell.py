# SPDX-License-Identifier: GPL-2.0-only
"""`write_and_tell.py FILE`: write numbers into a sysctl, read each back, and have another process read it too.

Prints how many readings were of an older number, and how many numbers there were.
"""

import os
import sys
from collections.abc import Callable

NR = 1000


def write(path: str, number: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, b"%d\n" % number)
    os.close(fd)


def reader(path: str, keep_open: bool) -> Callable[[], int]:
    """Reads a number, each time from a new open file or from the same one."""
    kept = os.open(path, os.O_RDONLY)

    def read() -> int:
        fd = kept if keep_open else os.open(path, os.O_RDONLY)
        number = int(os.pread(fd, 100, 0))
        if not keep_open:
            os.close(fd)
        return number

    return read


def listen(path: str, told: int, heard: int) -> int:
    """Read the file for each byte that comes, and say so -> how many readings were too old."""
    read, nr_stale, expected = reader(path, keep_open=True), 0, 0
    while os.read(told, 1):
        expected += 1
        nr_stale += read() != expected
        os.write(heard, b".")
    return nr_stale


def main() -> None:
    path = sys.argv[1]
    (told, tell), (hear, heard) = os.pipe(), os.pipe()
    if not (child := os.fork()):
        os.close(tell)
        os._exit(min(listen(path, told, heard), 255))
    read, nr_stale = reader(path, keep_open=False), 0
    for number in range(1, NR + 1):
        write(path, number)
        os.write(tell, b".")
        nr_stale += read() != number
        os.read(hear, 1)
    os.close(tell)
    print(nr_stale + os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), NR)


if __name__ == "__main__":
    main()
