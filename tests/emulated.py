# SPDX-License-Identifier: GPL-2.0-only
"""A daemon of its own for the tests of a module, and commands run over it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 120
"""Only to end a test that hangs."""

SMALL = '[[machine.nodes]]\nmemory = "512M"\n[[machine.nodes]]\nmemory = "256M"\n'
"""A configuration that is quick to compact."""

DPUD = [sys.executable, "-P", "-m", "dpud"]


@dataclass
class Emulated:
    """A running daemon."""

    mnt: Path
    daemon: subprocess.Popen[str]

    def text(self, path: str) -> str:
        """A file's text, by its path in the emulated tree."""
        return (self.mnt / path.lstrip("/")).read_text()

    def exec(self, *command: str, **options: object) -> subprocess.CompletedProcess[str]:
        """`dpud exec` over this daemon."""
        words = [*DPUD, "exec", "--mount", str(self.mnt), "--", *command]
        stdin = {} if "input" in options else {"stdin": subprocess.DEVNULL}
        defaults = {"capture_output": True, "text": True, "timeout": TIMEOUT_S, **stdin}
        return subprocess.run(words, **(defaults | options))  # type: ignore[call-overload,no-any-return]

    def out(self, *command: str) -> str:
        """Its output; it must not fail or complain."""
        done = self.exec(*command)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def sh(self, script: str) -> str:
        """The output of a shell script."""
        return self.out("sh", "-c", script)


def has_fuse() -> bool:
    return os.access("/dev/fuse", os.R_OK | os.W_OK)


@contextmanager
def emulated(config: str = SMALL, options: Sequence[str] = ()) -> Iterator[Emulated]:
    """Run a daemon in a folder of its own that other users may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="dpud-test-") as folder:
        os.chmod(folder, 0o755)
        with _running(Path(folder), config, options) as found:
            yield found


@contextmanager
def _running(folder: Path, config: str, options: Sequence[str]) -> Iterator[Emulated]:
    mnt, toml = folder / "mnt", folder / "dpud.toml"
    toml.write_text(config)
    command = [*DPUD, "run", "--mount", str(mnt), "--config", str(toml), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        try:
            assert daemon.stderr.readline().startswith("dpud: ready"), "it did not start"
            yield Emulated(mnt, daemon)
        finally:
            daemon.terminate()
            daemon.communicate(timeout=TIMEOUT_S)
