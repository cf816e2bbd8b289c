# SPDX-License-Identifier: GPL-2.0-only
"""The folder of compiled loops follows the sources, and whatever place can be written to."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpud import jitcache


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home and a shared cache in `tmp_path`; the environment comes back afterwards."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(jitcache, "_SHARED", tmp_path / "shared")
    return tmp_path


def closed(path: Path) -> None:
    """A place that nobody can make folders in, root included: a file."""
    path.write_text("")


def test_fingerprint_changes_with_any_source_and_only_with_sources(tmp_path: Path) -> None:
    (tmp_path / "kernelsim").mkdir()
    (tmp_path / "dpud/dpu").mkdir(parents=True)
    before = jitcache.fingerprint(tmp_path)
    (tmp_path / "dpud/cli.py").write_text("x = 1")
    assert jitcache.fingerprint(tmp_path) == before
    for name in ("kernelsim/page.py", "dpud/dpu/move.py"):
        (tmp_path / name).write_text("x = 1")
        changed = jitcache.fingerprint(tmp_path)
        assert changed != before
        before = changed


def test_places_are_tried_in_order(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jitcache.use().parent == places / "shared/dpud"
    closed(places / "closed")
    monkeypatch.setattr(jitcache, "_SHARED", places / "closed")
    assert jitcache.use().parent == places / "home/.cache/dpud"
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "xdg"))
    chosen = jitcache.use()
    assert chosen.parent == places / "xdg/dpud"
    assert os.environ["NUMBA_CACHE_DIR"] == str(chosen)


def test_without_a_place_there_is_a_temporary_one(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed(places / "closed")
    monkeypatch.setattr(jitcache, "_SHARED", places / "closed")
    monkeypatch.setenv("HOME", str(places / "closed"))
    folder = jitcache.use()
    assert folder.is_dir()
    assert places not in folder.parents


def test_a_user_s_choice_stays(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(places / "mine"))
    assert jitcache.use() == places / "mine"


def test_a_new_folder_starts_from_the_shared_one(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed = jitcache.use()
    (warmed / "loop.nbc").write_text("machine code")
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "xdg"))
    own = jitcache.use()
    assert own != warmed
    assert (own / "loop.nbc").read_text() == "machine code"


def test_old_folders_go(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate("abcdefghij"):
        monkeypatch.setattr(jitcache, "fingerprint", lambda name=name: name)
        os.utime(jitcache.use(), (1000 + age, 1000 + age))
    kept = {path.name for path in (places / "shared/dpud").iterdir()}
    assert kept == {f"jit-{name}" for name in "cdefghij"}
