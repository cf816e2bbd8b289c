# SPDX-License-Identifier: GPL-2.0-only
"""A `dpud run` with a state directory, as a process that can be killed and started again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dpud import namespace
from dpud.errors import UserError

SMALL = """
[machine]
cpus = 2
[[machine.nodes]]
memory = "32M"
[[machine.nodes]]
memory = "32M"
[gpu]
memory = "8M"
host_memory = "8M"
pool = "4M"
swap_nvme = "4M"
swap_ssd = "4M"
swap_hdd = "0"
"""


class Daemon:
    """One daemon at a time, on `folder`/mnt; its state is in `folder`/state unless `keeps` is False."""

    def __init__(
        self, folder: Path, machine: str = SMALL, *, keeps: bool = True, sync: str = '"none"', checkpoints: str = "0"
    ) -> None:
        self.mount, self.state = folder / "mnt", folder / "state"
        self._config = folder / "dpud.toml"
        kept = f'[state]\ndirectory = "{self.state}"\nsync = {sync}\ncheckpoint_bytes = "{checkpoints}"\n'
        kept = kept if keeps else ""
        folder.mkdir(parents=True, exist_ok=True)
        self._config.write_text(machine + kept)
        self.process: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> str:
        """Returns what it says until it is ready. Raises UserError with it if it ends before."""
        command = [sys.executable, "-P", "-m", "dpud", "run", "--mount", str(self.mount), "--config", str(self._config)]
        die_with_us = partial(namespace.die_with_parent, os.getpid(), signal.SIGKILL)
        self.process = subprocess.Popen(
            [*command, *options], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_us
        )
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if line.startswith("dpud: ready "):
                return said
        self.process.wait()
        raise UserError(said.strip())

    def cpu_ns(self) -> int:
        """What it has used so far, all threads."""
        assert self.process is not None
        tasks = Path(f"/proc/{self.process.pid}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir())

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """End it and clear its mount away."""
        if self.process is not None:
            self.process.send_signal(signum)
            self.process.wait()
            assert self.process.stderr is not None
            self.process.stderr.close()
            self.process = None
        if os.path.ismount(self.mount) or not _is_there(self.mount):
            namespace.detach(str(self.mount))


def _is_there(mount: Path) -> bool:
    try:
        mount.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False  # the mount of a dead server
    return True


@contextmanager
def started(daemon: Daemon) -> Iterator[Daemon]:
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.kill(signal.SIGTERM)
