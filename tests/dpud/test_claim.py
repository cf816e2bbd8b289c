# SPDX-License-Identifier: GPL-2.0-only
"""Claiming a mount point, without mounting."""

import os
from pathlib import Path

import pytest

from dpud.claim import claimed, default
from dpud.errors import UserError


@pytest.fixture(autouse=True)
def _fuse_can_be_opened() -> None:
    """These tests are about the directory."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened")


def test_a_directory_made_here_is_removed(tmp_path: Path) -> None:
    with claimed(str(tmp_path / "new")):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


def test_a_directory_that_was_there_stays(tmp_path: Path) -> None:
    with claimed(str(tmp_path)):
        pass
    assert tmp_path.is_dir()


def test_remove_takes_it_along(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    with claimed(str(tmp_path / "given"), remove=True):
        pass
    assert not (tmp_path / "given").exists()


def test_two_daemons_on_one_directory_are_one_too_many(tmp_path: Path) -> None:
    path = str(tmp_path / "new")
    with claimed(path):
        with pytest.raises(UserError, match="another dpud is starting there"), claimed(path):
            pass
        assert Path(path).is_dir()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file", "not a directory"),
        ("full", "not empty"),
        ("absent/deep", "cannot make that directory: No such file or directory"),
        ("file/below", "cannot make that directory: Not a directory"),
    ],
)
def test_what_cannot_be_mounted_on(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/content").write_text("")
    with pytest.raises(UserError, match=problem) as caught, claimed(str(tmp_path / name)):
        pass
    assert str(tmp_path / name) in str(caught.value)
    assert (tmp_path / "full/content").exists()


def test_a_place_where_something_is_mounted() -> None:
    with pytest.raises(UserError, match="/proc: something is mounted there already"), claimed("/proc"):
        pass


def test_default_for_root_and_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default() == "/run/dpud"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default() == "/run/user/1000/dpud"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(UserError, match="give --mount DIR"):
        default()
