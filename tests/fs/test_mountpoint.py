# SPDX-License-Identifier: GPL-2.0-only
"""Places that cannot be mounted on, each with one clear line."""

import os
from pathlib import Path

import pytest

from fs import mountpoint
from fs.mountpoint import MountError, check_mountable, detach_stale, is_stale


def test_ordinary_directories_are_not_stale(tmp_path: Path) -> None:
    assert not is_stale(str(tmp_path))
    assert not is_stale(str(tmp_path / "missing"))
    assert not detach_stale(str(tmp_path))


def test_unfit_mount_points(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, why in (
        (tmp_path / "missing", "no such directory"),
        (tmp_path / "file", "not a directory"),
        (tmp_path, "not empty"),
        (Path("/proc"), "mounted there already"),
    ):
        with pytest.raises(MountError, match=why) as caught:
            check_mountable(str(path))
        assert str(caught.value).startswith(str(path))


def test_dev_fuse_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(mountpoint.os, "open", refuse)
    with pytest.raises(MountError, match=f"cannot open /dev/fuse as uid {os.geteuid()}: Permission denied"):
        check_mountable(str(tmp_path))


def test_a_stale_mount_that_stays_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "is_stale", lambda _path: True)
    monkeypatch.setattr(mountpoint, "_detach", lambda _path: None)
    with pytest.raises(MountError, match="stale"):
        detach_stale("/nowhere")
