# SPDX-License-Identifier: GPL-2.0-only
"""The toy registry, mounted for real by a process of its own."""

import ctypes.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BINDINGS = {
    "mfusepy-libfuse2": ("fuse", []),
    "mfusepy-libfuse3": ("fuse3", []),
    "fusepy-libfuse2": ("fuse", ["--fusepy"]),
    "dev-fuse": ("c", ["--dev"]),
}
"""Library, and arguments of toy.py, for each way to talk FUSE; the last one needs no library but libc."""

DEADLINE_S = 20.0
"""Only to end a test that hangs."""

AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@dataclass
class Mounted:
    """A mount and the daemon behind it."""

    root: Path
    daemon: "subprocess.Popen[str]"
    log: Path

    def sh(self, script: str, *prefix: str) -> "subprocess.CompletedProcess[str]":
        """Run a shell script in the root of the mount."""
        command = [*prefix, "sh", "-c", script]
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    def out(self, script: str, *prefix: str) -> str:
        """Its output; the script must not fail."""
        done = self.sh(script, *prefix)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.daemon.send_signal(number)
        return self.daemon.wait(DEADLINE_S)


def is_available(binding: str) -> bool:
    return os.path.exists("/dev/fuse") and ctypes.util.find_library(BINDINGS[binding][0]) is not None


@contextmanager
def mounted(folder: Path, binding: str = "mfusepy-libfuse2", *arguments: str) -> Iterator[Mounted]:
    """Mount below `folder`; whatever the test did, nothing is left mounted."""
    library, flags = BINDINGS[binding]
    root, log = folder / "mnt", folder / "log"
    root.mkdir(exist_ok=True)
    toy = Path(__file__).with_name("toy.py")
    with log.open("w") as stderr:
        daemon = subprocess.Popen(
            [sys.executable, str(toy), str(root), *flags, *arguments],
            env={**os.environ, "FUSE_LIBRARY_NAME": library},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "ready\n", log.read_text()
        yield Mounted(root, daemon, log)
    finally:
        daemon.kill()
        daemon.communicate()
        subprocess.run(["umount", "-l", str(root)], stderr=subprocess.DEVNULL, check=False)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is about to happen."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
