# SPDX-License-Identifier: GPL-2.0-only
"""What fuzzing finds, and that it finds nothing here: a short run of every target, as `dpud bench fuzz` runs them.

A target that crashed once has its input in corpus/TARGET; those are given again each time.
"""

import logging
import mmap
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpud import bench as benches
from dpud.bench import fuzz as bench
from dpud.bench.fuzz import Job, fuzz, jobs
from dpud.errors import UserError
from dpud.fuzz import coverage, live
from dpud.fuzz.child import drawn, run_one
from dpud.fuzz.live import HANG, Batch, Crash, reduced
from dpud.fuzz.mutate import MAX_BYTES, Mutator
from dpud.fuzz.target import Parser, Target, World
from dpud.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parent / "corpus"
SEED = 20261130


def target_of(parse: Callable[[bytes], object], **options: object) -> Target:
    """A target whose inputs are `abc`, mutated."""
    return Target("toy", "", lambda _seed: Parser(parse, ValueError, Mutator([b"abc"])), **options)  # type: ignore[arg-type]


def raises(problem: BaseException) -> Callable[[bytes], object]:
    def parse(_data: bytes) -> None:
        raise problem

    return parse


# It finds what there is to find.


def test_errors_that_are_documented_are_outcomes_and_others_are_crashes() -> None:
    batch = run_one(target_of(raises(ValueError("no"))), 1, 50)
    assert (batch.crash, batch.outcomes) == (None, {"ValueError": 50})
    batch = run_one(target_of(raises(KeyError("x"))), 1, 50)
    assert batch.crash is not None
    assert (batch.crash.kind, batch.crash.number, batch.crash.is_again) == ("KeyError", 0, True)


def test_an_exception_that_was_only_logged_is_a_crash() -> None:
    def parse(_data: bytes) -> None:
        try:
            raise KeyError("x")
        except KeyError:
            logging.getLogger("dpud.gpu").exception("a mistake")

    crash = run_one(target_of(parse), 1, 5).crash
    assert crash is not None
    assert crash.kind == "KeyError"


def test_a_process_that_dies_is_seen_with_its_input() -> None:
    crash = run_one(target_of(lambda _data: signal.raise_signal(signal.SIGSEGV)), 1, 5).crash
    assert crash is not None
    assert crash.kind == "the process was ended by SIGSEGV"
    assert len(crash.inputs) == 1


def test_an_input_that_takes_too_long_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LIMIT_NS", 50_000_000)

    def parse(_data: bytes) -> None:
        while True:
            pass

    crash = run_one(target_of(parse), 1, 5).crash
    assert crash is not None
    assert crash.kind == HANG


def test_memory_that_stays_is_a_crash() -> None:
    kept: list[mmap.mmap] = []

    def parse(_data: bytes) -> None:
        kept.append(mmap.mmap(-1, 1 << 17))  # of the heap some may be free: this process has done much before
        kept[-1].write(b"x" * (1 << 17))

    crash = run_one(target_of(parse), 1, 1500).crash
    assert crash is not None
    assert crash.kind == "memory grows"


def test_too_much_memory_for_one_input_is_a_crash() -> None:
    crash = run_one(target_of(lambda _data: bytearray(1 << 40)), 1, 5).crash
    assert crash is not None
    assert crash.kind == "MemoryError"


def test_a_child_may_write_nowhere_else_and_speak_to_nobody(tmp_path: Path) -> None:
    def parse(_data: bytes) -> None:
        Path("here").write_text("x")
        for forbidden in (lambda: (tmp_path / "x").write_text("x"), lambda: (tmp_path / "y").mkdir(), os.fork):
            with pytest.raises(PermissionError):
                forbidden()  # type: ignore[operator]

    assert run_one(target_of(parse), 1, 3).crash is None
    assert list(tmp_path.iterdir()) == []


class Fragile:
    """Breaks once it was given an `x`, and then a `y`."""

    def __init__(self) -> None:
        self.seen = b""

    def draw(self, chance: Random) -> bytes:
        return chance.choice((b"aaa", b"axa", b"aya", b"bbb"))

    def run(self, data: bytes) -> str:
        if b"x" in data or self.seen:
            self.seen += data
        if b"y" in self.seen:
            raise RuntimeError(self.seen)
        return "ok"

    def check(self) -> None: ...

    def close(self) -> None: ...


def test_a_life_is_made_short() -> None:
    def new(_seed: int) -> World:
        return Fragile()

    crash = run_one(Target("toy", "", new, life=1000), 1, 500).crash
    assert crash is not None
    assert crash.inputs == [b"x", b"y"]


def test_reduced_keeps_what_matters() -> None:
    assert reduced(list("abcdefghXabcdefYab"), lambda rest: {"X", "Y"} <= set(rest)) == ["X", "Y"]


def test_the_same_seed_draws_the_same_and_never_more_than_it_may() -> None:
    one, other = ([Mutator([b"a 1\nb"], [b"w"]).draw(Random(seed)) for seed in range(300)] for _ in range(2))
    assert one == other
    assert len(set(one)) > 200
    assert max(map(len, one)) <= MAX_BYTES


def test_jobs_share_the_inputs_out() -> None:
    work = list(jobs(TARGETS, 100_000, 1))
    assert {job.target.name for job in work} == {target.name for target in TARGETS}
    assert abs(sum(job.nr for job in work) - 100_000) < 2 * len(TARGETS)
    assert [(job.target.name, job.seed) for job in work] == [
        (job.target.name, job.seed) for job in jobs(TARGETS, 100_000, 1)
    ]


def keep_a_secret(data: bytes) -> None:
    if data[:1] == b"q" and data[1:2] == b"7" and data[2:3] == b"z":
        raise KeyError("x")


@pytest.mark.skipif(not coverage.is_there(), reason="atheris has no wheel for this Python or machine")
def test_atheris_finds_what_chance_would_not() -> None:
    target = target_of(keep_a_secret, modules=(__name__,))
    batch = run_one(target, 1, 200_000, coverage.explore)
    assert batch.crash is not None
    assert batch.crash.inputs == [b"q7z"]


# And nothing in our own.

NR = {"files": 900, "capture": 120, "incoming": 120, "outgoing": 100, "promises": 150, "slots": 150}
"""Inputs of a target in this run; others get more, for they are quick."""


def summary(batch: Batch) -> str:
    crash = batch.crash
    return "" if crash is None else f"{crash.kind}\n{crash.text}\n{crash.inputs[:20]}"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_short_run_finds_nothing(target: Target) -> None:
    batch = run_one(target, SEED, NR.get(target.name, 500))
    assert batch.crash is None, summary(batch)
    assert batch.nr_inputs == NR.get(target.name, 500)
    assert len(batch.outcomes) > 1, "it refuses everything, or nothing"


PARSERS = [target for target in TARGETS if target.modules]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, World]]:
    """In a folder of their own, where they write what they read."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("fuzz"))
    yield {target.name: target.open(0) for target in PARSERS}
    os.chdir(before)


@pytest.mark.parametrize("name", [target.name for target in PARSERS])
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))))
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.too_slow])
def test_what_hypothesis_thinks_of_is_taken_or_refused(worlds: dict[str, World], name: str, data: bytes) -> None:
    worlds[name].run(data)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_once_is_mended(path: Path) -> None:
    target = next(target for target in TARGETS if target.name == path.parent.name)
    inputs = path.read_bytes().splitlines() if target.life else [path.read_bytes()]

    class Given:
        """The target's world, and these inputs."""

        def __init__(self, seed: int) -> None:
            self.world, self.left = target.open(seed), list(inputs)
            self.run, self.check, self.close = self.world.run, self.world.check, self.world.close

        def draw(self, _chance: Random) -> bytes:
            return self.left.pop(0)

    batch = run_one(Target(target.name, "", Given, target.life), 0, len(inputs))
    assert batch.crash is None, summary(batch)


def test_a_run_that_is_ended_tells_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(_work: object, told: Callable[[Batch], object], _nr: int) -> None:
        told(Batch("units", 1, 5, Counter(ok=5)))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "fuzz", ended)
    report = bench.run(1, 10, "units")
    assert [line.cells()[:2] for line in report.figures] == [("units", "5")]


def test_a_run_that_found_something_is_an_error_and_prints_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    crash = Crash("units", 1, 3, "KeyError in dpud/x.py parse", "the traceback", [b"a\0"])
    monkeypatch.setattr(bench, "fuzz", lambda _work, told, _nr: told(Batch("units", 1, 3, crash=crash)))
    with pytest.raises(UserError, match="crashes: units"):
        bench.run(1, 10, "units")
    said = capsys.readouterr().err
    assert "the traceback" in said
    assert r"b'a\x00'" in said


def test_a_target_that_is_none_is_an_error() -> None:
    with pytest.raises(UserError, match="no target x"):
        bench.run(1, 10, "x")
    with pytest.raises(UserError, match="--inputs is for fuzz alone"):
        benches.run("soak", inputs=3)


def test_batches_run_side_by_side_and_all_are_told() -> None:
    told: list[Batch] = []
    work = [Job(target_of(lambda data: int(data)), seed, 100, drawn) for seed in range(5)]
    fuzz(iter(work), told.append, 2)
    assert sorted(batch.seed for batch in told) == list(range(5))
    assert sum(batch.nr_inputs for batch in told) == 500
