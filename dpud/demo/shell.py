# SPDX-License-Identifier: GPL-2.0-only
"""A terminal session that types itself: real commands, each shown before what it printed."""

import subprocess
import time

from rich.console import Console
from rich.text import Text


class CommandError(Exception):
    """A command of the demo failed."""


class Shell:
    """Runs commands with sh in `cwd`."""

    def __init__(self, console: Console, cwd: str = "/") -> None:
        self.console = console
        self.cwd = cwd
        self.took_s = 0.0
        """Wall time of the last command, the shell's start included."""

    def say(self, text: str) -> None:
        """An explanation between commands."""
        self.console.print(f"\n{text}\n", highlight=False)

    def cd(self, path: str) -> None:
        self._prompt(f"cd {path}")
        self.cwd = path

    def sh(self, command: str) -> str:
        """Run it -> what it printed. Raises CommandError if it failed."""
        self._prompt(command)
        begin = time.perf_counter()
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.took_s = time.perf_counter() - begin
        self.console.print(Text(done.stdout), end="", soft_wrap=True)
        if done.returncode:
            raise CommandError(f"the demo's command failed: {command}")
        return done.stdout

    def _prompt(self, command: str) -> None:
        self.console.print(Text(f"$ {command}", style="bold cyan"), soft_wrap=True)
