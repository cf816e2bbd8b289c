# SPDX-License-Identifier: GPL-2.0-only
"""Modes, owners and what an ordinary user may do, file by file, against the running kernel's files of the same paths.

Every emulated file and directory that this kernel has too is compared, and those of a process of root's. What an
ordinary user may do is tried on both; all of it is refused, or leaves the file as it is.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated import SMALL, Emulated, emulated, has_fuse
from manners import result_of

pytestmark = [
    pytest.mark.host,
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0 or not has_fuse(), reason="mounts with allow_other and changes users"),
]

OPENS = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR, "w+trunc": os.O_WRONLY | os.O_TRUNC}
MOUNTED_ELSEWHERE = ("sys/kernel/debug", "sys/kernel/tracing", "sys/kernel/config")
UNLIKE = re.compile(
    r"|sys|proc|dev"  # roots of mounts
    r"|sys/devices/system/memory/memory\d+/(online|state)"  # which can be written where memory can be taken offline
)
NOBODY, MEMBER, GROUP = 65534, 1000, 990


@pytest.fixture(scope="module")
def dpud() -> Iterator[Emulated]:
    with emulated() as found:
        restricted = Path("/proc/sys/kernel/dmesg_restrict").read_text()
        (found.mnt / "proc/sys/kernel/dmesg_restrict").write_text(restricted)
        (found.mnt / "sys/kernel/config/kernelsim/mm/p").mkdir()
        yield found


def as_user(uid: int, groups: list[int], fn: Callable[[], Any]) -> Any:
    """What `fn` gives in a child that is somebody else."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups(groups)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.write(writing, json.dumps(fn()).encode() + b"\n")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.readline()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(text)


def tried(path: Path) -> dict[str, object]:
    """Name of an operation -> "ok", or its errno."""
    if os.path.isdir(path):  # of what may not be looked at, that is not known
        operations: dict[str, Callable[[], object]] = {
            "list": lambda: len(os.listdir(path)) >= 0 and "ok",
            "unlink": lambda: os.unlink(path),
        }
    else:
        operations = {name: lambda flags=flags: _opened(path, flags) for name, flags in OPENS.items()}  # type: ignore[misc]
        operations |= {
            "truncate": lambda: os.truncate(path, 0),
            "read": lambda: _opened(path, os.O_RDONLY | os.O_NONBLOCK, 1),
        }
    operations |= {
        "chmod": lambda: os.chmod(path, 0o777),
        "chown": lambda: os.chown(path, NOBODY, NOBODY),
        "access": lambda: [os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)],
    }
    return {name: result_of(operation) for name, operation in operations.items()}


def _opened(path: Path, flags: int, nr_bytes: int = 0) -> str:
    fd = os.open(path, flags)
    try:
        if nr_bytes:
            os.read(fd, nr_bytes)
    finally:
        os.close(fd)
    return "ok"


def twins(dpud: Emulated) -> list[tuple[Path, Path]]:
    """(real, emulated) of each path that both have, but for processes."""
    found = []
    for folder, dirs, files in os.walk(dpud.mnt):
        below = os.path.relpath(folder, dpud.mnt)
        dirs[:] = [name for name in dirs if not (below == "proc" and name.isdigit())]
        for name in (".", *files):
            emulated_path = Path(folder, name)
            real = Path("/", below, name)
            path = str(real).lstrip("/")
            if UNLIKE.fullmatch(path) or path.startswith(MOUNTED_ELSEWHERE) or real.is_symlink() or not real.exists():
                continue
            if real.is_dir() == emulated_path.is_dir() and not os.stat(real).st_mode & stat.S_IWOTH:
                found.append((real, emulated_path))
    return found


def owner_and_mode(path: Path) -> tuple[str, int, int]:
    found = os.stat(path)
    return oct(found.st_mode & 0o7777), found.st_uid, found.st_gid


def test_modes_and_owners_are_the_kernel_s(dpud: Emulated) -> None:
    pairs = twins(dpud)
    assert len(pairs) > 150
    differences = {
        str(real): (owner_and_mode(real), owner_and_mode(ours))
        for real, ours in pairs
        if owner_and_mode(real) != owner_and_mode(ours)
    }
    assert differences == {}


def test_an_ordinary_user_is_refused_as_the_kernel_refuses(dpud: Emulated) -> None:
    pairs = twins(dpud)
    outcomes = as_user(NOBODY, [], lambda: [[tried(real), tried(ours)] for real, ours in pairs])
    for (real, _), both in zip(pairs, outcomes, strict=True):
        if not (real.is_dir() or real.is_file()):  # truncate(2) takes a device for a wrong file first of all
            assert [found.pop("truncate") for found in both] == ["EINVAL", "EACCES"]
    differences = {str(real): both for (real, _), both in zip(pairs, outcomes, strict=True) if both[0] != both[1]}
    assert differences == {}
    written = [real for (real, _), (_, found) in zip(pairs, outcomes, strict=True) if found.get("w") == "ok"]
    assert written == [], "an ordinary user writes nothing"


def test_a_process_of_root_s_is_as_closed_as_the_kernel_s(dpud: Emulated) -> None:
    ours = next(path for path in (dpud.mnt / "proc").iterdir() if path.name.isdigit())
    names = sorted(os.listdir(ours))
    assert "maps" in names
    real = Path(f"/proc/{os.getpid()}")
    pairs = [(real / name, ours / name) for name in names]
    for one, two in pairs:
        assert owner_and_mode(one) == owner_and_mode(two), one
    outcomes = as_user(NOBODY, [], lambda: [[tried(one), tried(two)] for one, two in pairs])
    assert {name: both for name, both in zip(names, outcomes, strict=True) if both[0] != both[1]} == {}


def test_nobody_gets_into_debugfs_and_tracefs(dpud: Emulated) -> None:
    for path in ("sys/kernel/debug", "sys/kernel/tracing", "sys/kernel/debug/dpu_compact/stats"):
        found = as_user(NOBODY, [], lambda path=path: tried(dpud.mnt / path))  # type: ignore[misc]
        assert {found["chmod"], found["access"][0]} <= {"EPERM", "EACCES", False}
        assert found.get("list", found.get("r")) == "EACCES"


# The control group, through the kernel's own checks.


def test_members_of_the_control_group_drive_the_machine_and_nobody_else_does() -> None:
    with emulated(f"{SMALL}[mount]\ncontrol_group = {GROUP}\n") as dpud:
        assert as_user(MEMBER, [GROUP], lambda: driven(dpud.mnt)) == ["ok"] * 5
        assert as_user(NOBODY, [], lambda: driven(dpud.mnt)) == ["EACCES"] * 5
        knob = dpud.mnt / "sys/devices/system/node/node0/compact"
        os.chmod(knob, 0o200)
        found = as_user(MEMBER, [GROUP], lambda: tried(knob))
        assert (found["w"], found["chmod"]) == ("EACCES", "EPERM")
        assert dpud.text("/proc/sys/vm/extfrag_threshold") == "77\n"


def driven(mnt: Path) -> list[object]:
    """What somebody does who may: "ok" or the errno of each."""
    mm = mnt / "sys/kernel/config/kernelsim/mm/member"

    def write(path: Path, text: str) -> str:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.write(fd, text.encode())
        os.close(fd)
        return "ok"

    def make() -> str:
        os.mkdir(mm)
        write(mm / "anon", "1M")
        os.rmdir(mm)
        return "ok"

    return [
        result_of(write, mnt / "proc/sys/vm/extfrag_threshold", "77\n"),
        result_of(write, mnt / "sys/devices/system/node/node0/compact", "1"),
        result_of(make),
        result_of(lambda: os.listdir(mnt / "sys/kernel/debug") and "ok"),
        result_of(write, mnt / "dev/kmsg", "<6>hello\n"),
    ]
