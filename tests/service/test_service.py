# SPDX-License-Identifier: GPL-2.0-only
"""What is said to systemd, seen from its end of the socket; what a reload does to a daemon's files."""

import array
import logging
import os
import socket
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpud import config, reload, service
from dpud.config_file import ConfigFile
from dpud.errors import UserError
from fs.kernfs import Tree
from fs.mountpoint import MountError
from kernelsim.attr import Registry


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Its end."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind(path)
        ours.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield ours


def test_states_are_lines_and_descriptors_go_along(systemd: socket.socket, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    fd = os.open(file, os.O_RDONLY)
    service.notify("FDSTORE=1", "FDNAME=fuse", fds=[fd])
    data, ancillary, _, _ = systemd.recvmsg(4096, socket.CMSG_SPACE(16))
    assert data == b"FDSTORE=1\nFDNAME=fuse"
    ((_, _, packed),) = ancillary
    (received,) = array.array("i", packed)
    assert os.fstat(received).st_ino == file.stat().st_ino
    os.close(fd)
    os.close(received)


def test_nothing_is_said_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service.notify("READY=1")
    with pytest.raises(MountError, match="service-mount is for"):
        service.hand_over("/nonexistent")


def test_the_connection_is_found_by_its_name_and_only_by_whom_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd numbers them from 3 on, as many as there are names."""
    monkeypatch.setenv("LISTEN_FDNAMES", "other:fuse")
    monkeypatch.setattr(service.os, "set_inheritable", lambda fd, inheritable: None)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert service.inherited() is None
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert service.inherited() == 4
    monkeypatch.setenv("LISTEN_FDNAMES", "other")
    assert service.inherited() is None


@pytest.mark.slow
def test_the_watchdog_is_fed_while_the_file_can_be_read(
    systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = tmp_path / "probe"
    probe.write_text("x")
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    stop = service.watch(str(probe))
    assert stop is not None
    assert systemd.recv(4096) == b"WATCHDOG=1"
    probe.unlink()
    systemd.setblocking(False)
    deadline, quiet_since = time.monotonic() + 20, time.monotonic()
    while time.monotonic() - quiet_since < 0.2:  # ten periods
        assert time.monotonic() < deadline, "it is fed although nothing answers"
        try:
            systemd.recv(4096)
            quiet_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    stop.set()


def test_no_watchdog_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert service.watch("/dev/null") is None
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert service.watch("/dev/null") is None


def test_every_line_of_a_traceback_has_its_level() -> None:
    try:
        raise ValueError("what")
    except ValueError:
        record = logging.LogRecord("dpud", logging.ERROR, "x", 1, "it failed", (), sys.exc_info())
    lines = service._Leveled("%(name)s: %(message)s").format(record).splitlines()
    assert lines[0] == "<3>dpud: it failed"
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines)


# Reloading, with ordinary files in place of a mount.

RUNNING = "[machine]\ncpus = 2\n[sysctl]\nvm.x = 1\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path, text in {
        "proc/dpud_config": text_of(RUNNING),
        "proc/sys/vm/x": "1\n",
        "proc/sys/kernel/printk": "4\t4\t1\t7\n",
        "dev/kmsg": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def text_of(toml: str) -> str:
    registry = Registry()
    registry.add("/proc", ConfigFile(config.parse(toml)))
    return registry.read("/proc/dpud_config").decode()


def test_the_file_shows_what_it_was_started_with() -> None:
    assert config.parse(text_of(RUNNING)) == config.parse(RUNNING)
    registry = Registry()
    registry.add("/proc", ConfigFile(config.Config()))
    facts = tomllib.loads((Path(__file__).parents[1] / "abi" / "service.toml").read_text())
    assert {path: {"mode": attr.mode} for path, _, attr in registry.walk()} == facts
    with pytest.raises(OSError, match="Input/output error"):  # of proc files without a write
        Tree(registry).open("/proc/dpud_config", os.O_WRONLY).write(b"x", 0)


def test_only_what_differs_is_written(tree: Path) -> None:
    before = (tree / "proc/sys/kernel/printk").stat().st_mtime_ns
    assert reload.reload(str(tree), config.parse(RUNNING)) == []
    assert reload.reload(str(tree), config.parse('[machine]\ncpus = 2\n[log]\nlevel = "err"\n')) == []
    assert (tree / "proc/sys/kernel/printk").stat().st_mtime_ns == before
    report = reload.reload(str(tree), config.parse(RUNNING.replace("x = 1", "x = 2") + '[log]\nlevel = "debug"\n'))
    assert report == ["log.level: 4 4 1 7 -> 8", "sysctl.vm.x: 1 -> 2"]
    assert (tree / "proc/sys/vm/x").read_text() == "2"


def test_what_needs_a_restart_is_named(tree: Path) -> None:
    wanted = config.parse('[machine]\ncpus = 3\n[gpu]\nmemory = "64M"\n[mount]\nallow_other = false\n')
    needs = [f"{key}: needs a restart" for key in ("machine.cpus", "gpu.memory", "mount.allow_other")]
    assert reload.reload(str(tree), wanted) == needs


def test_what_is_refused_is_named_and_the_rest_is_done(tree: Path) -> None:
    with pytest.raises(UserError, match=r"^sysctl\.vm\.y: /proc/sys/vm/y: No such file or directory$"):
        reload.reload(str(tree), config.parse("[machine]\ncpus = 2\n[sysctl]\nvm.y = 1\nvm.x = 5\n"))
    assert (tree / "proc/sys/vm/x").read_text() == "5"
    assert (tree / "dev/kmsg").read_text().startswith("<6>dpud: reload: ")


def test_without_a_daemon_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dpud answers"):
        reload.reload(str(tmp_path), config.Config())
