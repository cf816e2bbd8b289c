# SPDX-License-Identifier: GPL-2.0-only
"""Run a command as uid 65534, as root, for tests of what an ordinary user sees.

    python tests/ordinary_user.py [--fuse] CMD...

In a mount namespace of its own, so that the machine stays as it is: the interpreter is made reachable where
it lies below a folder that others may not enter (/root), and with --fuse /dev/fuse is open to everybody.
"""

import os
import stat
import sys
from pathlib import Path

from dpud import namespace

NOBODY = 65534


def make_reachable(path: Path) -> None:
    """Replace each closed folder above `path` by one that is open and holds only the way to `path`."""
    for folder in reversed(path.parents):
        if folder.stat().st_mode & stat.S_IXOTH:
            continue
        child = folder / path.relative_to(folder).parts[0]
        held = os.open(child, os.O_PATH)
        namespace.mount("test", str(folder), "tmpfs", data="mode=755")
        child.mkdir()
        namespace.mount(f"/proc/self/fd/{held}", str(child), flags=namespace.MS_BIND | namespace.MS_REC)
        os.close(held)


def open_fuse_to_all() -> None:
    """Bind a world-writable node of the same device over /dev/fuse."""
    device = os.stat("/dev/fuse").st_rdev
    namespace.mount("test", "/mnt", "tmpfs")
    os.mknod("/mnt/fuse", stat.S_IFCHR, device)
    os.chmod("/mnt/fuse", 0o666)
    namespace.mount("/mnt/fuse", "/dev/fuse", flags=namespace.MS_BIND)


def main(command: list[str]) -> None:
    namespace.enter()
    if command[0] == "--fuse":
        open_fuse_to_all()
        command = command[1:]
    make_reachable(Path(sys.executable).resolve())
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
