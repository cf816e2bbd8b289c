# SPDX-License-Identifier: GPL-2.0-only
"""kill -9 of either side at every step: exactly one owner, with every byte; and it goes on from there."""

import os
import signal
from pathlib import Path

import pytest
from crashing import MANIFEST, Place, ended

from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.journal import Journal

OWNS = {"a": {"kept", "begun", "handed-over"}, "b": {"owner", "running", "got", "done"}}
"""Last entries that mean: I am, or I was and may be still, the owner."""


def last_steps(place: Place, side: str) -> list[str]:
    return [str(record["step"]) for record in place.journal(side).last().values()]


def owners(place: Place) -> list[str]:
    """Who says, once everything is settled, that the pages are his."""
    found = []
    if "released" not in last_steps(place, "a"):
        found.append("a")
    if {"owner", "done"} & set(last_steps(place, "b")):
        found.append("b")
    return found


def play(folder: Path, strategy: Strategy, side: str = "", at: int | None = None) -> Place:
    """A migration in which one side is killed at its step `at`, comes back, and everything is settled."""
    place = Place(folder, strategy)
    pids = {each: place.start(each, at if each == side else None) for each in ("b", "a")}
    try:
        if side:
            assert os.WIFSIGNALED(ended(pids[side])), f"{side} was not killed at {at}"
            pids[side] = place.start(side)
        assert ended(pids["a"]) == 0
        del pids["a"]
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return place


def same_bytes(place: Place) -> bool:
    here = place.folder / "b" / "c.pages"
    return here.stat().st_size == MANIFEST.nr_bytes and here.read_bytes() == place.source_path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Strategy.PRECOPY, Strategy.HYBRID])
@pytest.mark.parametrize("side", ["a", "b"])
def test_killed_at_every_step(tmp_path: Path, strategy: Strategy, side: str) -> None:
    steps = play(tmp_path / "whole", strategy).steps(side)
    assert len(steps) > 10
    seen = set()
    for at, step in enumerate(steps):
        place = play(tmp_path / str(at), strategy, side, at)
        assert owners(place) == ["b"], (at, step)
        assert same_bytes(place), (at, step)
        seen.add(step)
    wanted = {
        ("a", Strategy.PRECOPY): {"before begun", "send PAGES", "send FINAL", "after handed-over", "send COMMIT"},
        ("b", Strategy.PRECOPY): {"write", "after prepared", "send PREPARED", "after owner", "send OWNED"},
        ("a", Strategy.HYBRID): {"send MISSING", "send END", "before released"},
        ("b", Strategy.HYBRID): {"after running", "after got", "before done", "send DONE"},
    }
    assert wanted[side, strategy] <= seen


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Strategy.PRECOPY, Strategy.HYBRID])
@pytest.mark.parametrize("side", ["a", "b"])
def test_killed_at_every_step_and_the_other_never_heard_of_again(tmp_path: Path, strategy: Strategy, side: str) -> None:
    """What is left in the files of both, at the moment of the kill: never two owners, and one that has all or, in
    post-copy, all together with what the source keeps."""
    steps = play(tmp_path / "whole", strategy).steps(side)
    for at in range(0, len(steps), 3):
        place = Place(tmp_path / str(at), strategy)
        pids = {each: place.start(each, at if each == side else None) for each in ("b", "a")}
        ended(pids[side])
        other = "b" if side == "a" else "a"
        os.kill(pids[other], signal.SIGKILL)
        os.waitpid(pids[other], 0)
        promised = [step in ("handed-over", "released") for step in last_steps(place, "a")]
        taken = [step in OWNS["b"] for step in last_steps(place, "b")]
        assert not any(taken) or any(promised), "nobody takes what was not promised"
        released = "released" in last_steps(place, "a")
        assert not released or {"owner", "done"} & set(last_steps(place, "b")), "nothing is given up before it is taken"
        if released:
            assert same_bytes(place)


@pytest.mark.slow
def test_a_torn_line_was_never_said(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append("m1", "begun")
    journal.append("m1", "handed-over", postcopy=False)
    journal.close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        again = Journal(path)
        assert [record["step"] for record in again.records] == ["begun"]
        again.append("m1", "kept")
        again.close()
        assert [record["step"] for record in Journal(path).records] == ["begun", "kept"]


def test_a_changed_line_and_all_behind_it_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    for step in ("begun", "handed-over", "released"):
        journal.append("m1", step)
    journal.close()
    data = bytearray(path.read_bytes())
    data[data.index(b"handed")] ^= 1
    path.write_bytes(bytes(data))
    assert [record["step"] for record in Journal(path).records] == ["begun"]
