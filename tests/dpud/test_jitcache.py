# SPDX-License-Identifier: GPL-2.0-only
"""The folder of compiled loops follows the sources, and whatever place can be written to."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpud import jitcache


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home, a shared cache and a small source tree in `tmp_path`; the environment comes back afterwards."""
    (tmp_path / "tree/kernelsim").mkdir(parents=True)
    (tmp_path / "tree/kernelsim/page.py").write_text("")
    monkeypatch.setattr(jitcache, "_ROOT", tmp_path / "tree")
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
    monkeypatch.setattr(jitcache, "_KEEP", 8)
    for age, name in enumerate("abcdefghij"):
        monkeypatch.setattr(jitcache, "fingerprint", lambda _root, name=name: name)
        os.utime(jitcache.use(), (1000 + age, 1000 + age))
    kept = {path.name for path in (places / "shared/dpud").iterdir()}
    assert kept == {f"jit-{name}" for name in "cdefghij"}


@pytest.mark.slow
def test_a_folder_in_use_stays_however_old_it_is(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a daemon, a test run, that loads a loop late would have to compile it."""
    monkeypatch.setattr(jitcache, "_KEEP", 1)
    child = os.fork()
    if child == 0:  # somebody else, who uses the oldest
        os.utime(jitcache.use(), (1, 1))
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        old = {path.name for path in (places / "shared/dpud").iterdir()}
        for name in "abc":  # b is in use when c is made
            monkeypatch.setattr(jitcache, "fingerprint", lambda _root, name=name: name)
            jitcache.use()
        assert {path.name for path in (places / "shared/dpud").iterdir()} == {*old, "jit-b", "jit-c"}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    monkeypatch.setattr(jitcache, "fingerprint", lambda _root: "d")
    jitcache.use()
    assert {path.name for path in (places / "shared/dpud").iterdir()} == {"jit-c", "jit-d"}


def write_sources(root: Path, **texts: str) -> None:
    for name, text in texts.items():
        (root / "kernelsim").mkdir(exist_ok=True)
        (root / f"kernelsim/{name}.py").write_text(text)


def test_a_closure_changes_with_what_is_imported_however_indirectly(tmp_path: Path) -> None:
    write_sources(tmp_path, a="", b="from kernelsim import a as other", c="import kernelsim.b", d="x = 1")
    before = jitcache.closures(tmp_path)
    assert set(before) == {f"kernelsim/{name}.py" for name in "abcd"}
    write_sources(tmp_path, a="y = 2")
    after = jitcache.closures(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {f"kernelsim/{name}.py" for name in "abc"}


def test_an_edit_keeps_the_loops_it_cannot_have_changed(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jitcache, "_ROOT", places)
    write_sources(places, a="", b="from kernelsim.a import x", c="")
    old = jitcache.use()
    for name in "abc":
        compiled = old / f"kernelsim_of_another_checkout/{name}.loop-1.py311.nbi"
        compiled.parent.mkdir(exist_ok=True)
        compiled.write_text(name)
    write_sources(places, a="x = 1")
    new = jitcache.use()
    assert new != old
    assert [path.name for path in new.rglob("*.nbi")] == ["c.loop-1.py311.nbi"]
