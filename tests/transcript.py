# SPDX-License-Identifier: GPL-2.0-only
"""Sessions in docs/: what a page says one types and sees, typed and compared.

A fenced block ```console is typed as root into a `dpud exec` shell; all such blocks of a page are one session. So
are those of ```console host, typed outside with `dpud` in PATH. A command begins with `# `, its further lines with
`> `; what follows is its output, standard error included. `...` in a line stands for any text, and a line that is only
`...` for any number of lines. A command that shows no output must print nothing. No line of output may begin with
`# ` or `> `. The time stamps of kernel log lines are not compared.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 300
"""Only to end a session that hangs."""

_BLOCK = re.compile(r"^```console( host)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STAMP = re.compile(r"^\[ *[0-9]+\.[0-9]{6}\]", re.MULTILINE)
_MARK = "@@dpud-transcript@@"


@dataclass(frozen=True)
class Step:
    """One command, and the output that the page shows."""

    command: str
    shown: str


def session(page: Path, *, host: bool) -> list[Step]:
    """The steps of all blocks of one kind, in order."""
    steps: list[Step] = []
    for where, body in _BLOCK.findall(page.read_text()):
        if bool(where) == host:
            for part in re.split(r"^# ", body, flags=re.MULTILINE)[1:]:
                lines = part.splitlines(keepends=True)
                nr = 1 + next((i for i, line in enumerate(lines[1:]) if not line.startswith("> ")), len(lines) - 1)
                command = "".join(line.removeprefix("> ") for line in lines[:nr]).rstrip("\n")
                steps.append(Step(command, "".join(lines[nr:])))
    return steps


def outputs(steps: Sequence[Step], shell: Sequence[str], folder: Path) -> list[str]:
    """What each command printed, in one bash that begins in `folder`."""
    script = "".join(f"echo {_MARK}\n{step.command}\n" for step in steps) + f"echo {_MARK}\n"
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8", "COLUMNS": "120"}
    done = subprocess.run(
        [*shell, "bash", "-c", f"exec 2>&1\n{script}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        cwd=folder,
        env=env,
    )
    parts = done.stdout.split(f"{_MARK}\n")[1:-1]
    assert len(parts) == len(steps), f"the session ended early:\n{done.stdout}"
    return parts


def matches(shown: str, printed: str) -> bool:
    """Whether a page's output stands for what was printed."""
    shown, printed = (_STAMP.sub("[time]", text) for text in (shown, printed))
    parts = [".*" if line == "..." else re.escape(line).replace(r"\.\.\.", "[^\n]*") for line in shown.splitlines()]
    pattern = ""
    for part in parts:
        pattern += r"(?:[^\n]*\n)*" if part == ".*" else part + "\n"
    text = "\n".join(line.rstrip() for line in printed.splitlines())
    return re.fullmatch(pattern, text + "\n" if text else "") is not None
