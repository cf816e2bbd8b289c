# SPDX-License-Identifier: GPL-2.0-only
"""A link of a given rate between this machine and a network namespace of it: veth(4) with tc-tbf(8). Needs root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HERE, THERE, PREFIX = "198.18.77.1", "198.18.77.2", 30
"""Of the range that RFC 2544 sets aside for benchmarks."""


@dataclass(frozen=True)
class Link:
    namespace: str

    def there(self, *command: str) -> list[str]:
        """The command, run at the other end."""
        return ["ip", "netns", "exec", self.namespace, *command]


def why_not() -> str:
    """Empty where a link can be made."""
    if os.geteuid() != 0:
        return "not root"
    return "" if shutil.which("ip") and shutil.which("tc") else "no ip or tc"


@contextmanager
def link(mbit_per_s: int) -> Iterator[Link]:
    """Raises subprocess.CalledProcessError where the kernel does not allow it."""
    name = f"dpud{os.getpid()}"
    near, far = f"{name}a"[-15:], f"{name}b"[-15:]
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _run("ip", "addr", "add", f"{HERE}/{PREFIX}", "dev", near)
        _run("ip", "link", "set", near, "up")
        found = Link(name)
        _run(*found.there("ip", "addr", "add", f"{THERE}/{PREFIX}", "dev", far))
        _run(*found.there("ip", "link", "set", far, "up"))
        rate = f"{mbit_per_s}mbit"
        _run("tc", "qdisc", "add", "dev", near, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
        yield found
    finally:
        _run("ip", "netns", "del", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
