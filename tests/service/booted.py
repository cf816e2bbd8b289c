# SPDX-License-Identifier: GPL-2.0-only
"""A real systemd to try the service on: pid 1 of namespaces of its own, over this machine's root.

What it writes goes to a tmpfs, over an overlay. /sys and /proc/sys are read-only, there is no network, /dev has only
what is listed, /tmp and /run are empty, of what the host has enabled nothing starts, and its processes are in a
cgroup of their own. So the machine stays as it is, and everything goes with pid 1.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 120
"""Only to end a test that hangs."""

_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

_BOOT = """
set -eu
root=$1
mount -t tmpfs -o size=2G,mode=755 tmpfs "$root"
mkdir "$root/upper" "$root/work" "$root/merged"
mount -t overlay -o "lowerdir=/,upperdir=$root/upper,workdir=$root/work" overlay "$root/merged"
cd "$root/merged"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty fuse; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
rm -rf etc/systemd/system/*.wants
: >etc/fstab
mkdir .host
pivot_root . .host
umount -l .host
exec env -i container=dpud-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
    setpriv --bounding-set -sys_module,-sys_rawio,-sys_time,-syslog,-sys_boot \\
    /lib/systemd/systemd --unit=basic.target --show-status=no
"""


def can_boot() -> bool:
    """systemd is installed, and we may make namespaces and cgroups."""
    return os.geteuid() == 0 and os.path.exists("/lib/systemd/systemd") and _cgroup2() is not None


def _cgroup2() -> Path | None:
    """Where this machine has its cgroup2 hierarchy."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next((Path(where) for _, where, kind, *_ in lines if kind == "cgroup2"), None)


@dataclass
class Booted:
    """A running system."""

    pid: int
    """Of its pid 1, as it is seen here."""

    def run(self, *command: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup"]
        defaults = {
            "capture_output": True,
            "text": True,
            "timeout": TIMEOUT_S,
            "stdin": subprocess.DEVNULL,
            "env": _ENV,
        }
        words = [*enter, "--root", "--", "env", "--chdir=/", *command]
        return subprocess.run(words, **(defaults | options))  # type: ignore[call-overload,no-any-return]

    def out(self, *command: str) -> str:
        """Its output; it must not fail."""
        done = self.run(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr, self.journal())
        return done.stdout.strip()

    def sh(self, script: str) -> str:
        return self.out("sh", "-c", script)

    def journal(self, *options: str) -> str:
        """What the unit wrote."""
        return self.run("journalctl", "--no-pager", "--unit=dpud.service", *options).stdout

    def show(self, key: str) -> str:
        """A property of the unit."""
        return self.out("systemctl", "show", "--property", key, "--value", "dpud.service")

    def is_active(self) -> bool:
        return self.run("systemctl", "is-active", "--quiet", "dpud.service").returncode == 0


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is about to happen."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


@contextmanager
def booted(folder: Path) -> Iterator[Booted]:
    """Boot, with `folder` to mount things in."""
    cgroups = _cgroup2()
    assert cgroups is not None
    group = cgroups / f"dpud-test-{os.getpid()}"
    group.mkdir()
    join = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(group)]
    kinds = ["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--fork", "--kill-child"]
    command = [*join, "unshare", *kinds, "--propagation=private", "sh", "-c", _BOOT, "boot", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as outer:
        try:
            system = Booted(_pid_1(outer))
            until(lambda: system.run("systemctl", "is-active", "basic.target").returncode == 0)
            yield system
        finally:
            outer.kill()
            outer.communicate()
            _remove(group)


def _pid_1(outer: "subprocess.Popen[bytes]") -> int:
    """The child of unshare, once it is systemd."""
    found: list[int] = []

    def is_there() -> bool:
        assert outer.poll() is None, outer.communicate()[0].decode()
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        found[:] = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "systemd\n"]
        return bool(found)

    until(is_there)
    return found[0]


def _remove(group: Path) -> None:
    """Its processes die with pid 1, which takes a moment."""

    def is_gone() -> bool:
        for path in [*sorted(group.rglob("*/"), reverse=True), group]:
            if path.is_dir():
                try:
                    path.rmdir()
                except OSError:
                    return False
        return True

    until(is_gone)
