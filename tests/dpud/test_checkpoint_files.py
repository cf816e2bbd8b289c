# SPDX-License-Identifier: GPL-2.0-only
"""Checkpoints and journals that are damaged or missing: what is used instead, what is refused, what is said."""

import random
import shutil
from pathlib import Path

import pytest
from kept import VM, alive, cat, configured, echo, hash_of, keeper_of, killed, still

from dpud import checkpoint_file, state
from dpud.errors import UserError

pytestmark = pytest.mark.slow  # each is about checkpoints that only a whole machine makes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a state directory with checkpoints 2 and 3 and journals from 2 on; the hash of its machine)."""
    folder = tmp_path_factory.mktemp("made")
    with alive(configured(folder / "a")) as live:
        for number in range(1, 4):
            echo(live, f"{VM}/extfrag_threshold", str(number))
            keeper_of(live).make()
        echo(live, f"{VM}/extfrag_threshold", "4")
        before = killed(live, folder / "a", folder / "state")
    return folder / "state", before


@pytest.fixture
def directory(made: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "state"))


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes((byte ^ 1,)))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "stores")


def refused(directory: Path, more: str = "", recover: bool = False) -> str:
    with pytest.raises(UserError) as caught, state.opened(configured(directory, more), recover):
        pass
    return str(caught.value)


def test_what_is_left_after_three(directory: Path) -> None:
    assert names(directory) == ["checkpoint.2", "checkpoint.3", "journal.2", "journal.3"]


def test_a_flipped_bit_or_a_lost_end_is_found_wherever_it_is(directory: Path) -> None:
    path = directory / "checkpoint.3"
    whole = path.read_bytes()
    checkpoint_file.check(path)
    chance = random.Random(1)
    for at in [0, 5, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(20))]:
        flip(path, at)
        with pytest.raises(checkpoint_file.Unusable):
            checkpoint_file.check(path)
        path.write_bytes(whole)
    for nr in [0, 1, 24, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:nr])
        with pytest.raises(checkpoint_file.Unusable):
            checkpoint_file.check(path)


def test_the_one_before_is_used_and_a_line_says_so(
    directory: Path, made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flip(directory / "checkpoint.3", 5000)
    with still(configured(directory)) as again:
        assert hash_of(again) == made[1]
    said = capsys.readouterr().err
    assert "its checksum is wrong: kept as checkpoint.3.damaged-1; what was before it is used\n" in said
    with alive(configured(directory)) as live:
        keeper_of(live).make()
        assert cat(live, f"{VM}/extfrag_threshold") == "4\n"
    assert names(directory) == [
        "checkpoint.2",
        "checkpoint.3.damaged-1",
        "checkpoint.4",
        "journal.2",
        "journal.3",
        "journal.4",
    ]


def test_both_bad_is_no_fresh_start(directory: Path) -> None:
    for name in ("checkpoint.2", "checkpoint.3"):
        flip(directory / name, 5000)
    for recover in (False, True):
        said = refused(directory, recover=recover)
        assert "no other checkpoint is there, and the journal from the boot on is gone" in said
        assert "move the directory away to begin anew" in said
    assert {"journal.2", "journal.3"} < set(names(directory))


def test_missing_files_are_no_fresh_start(directory: Path, tmp_path: Path) -> None:
    for missing, said in (
        (("checkpoint.2", "checkpoint.3"), "journal.2 goes on from a checkpoint that is not there"),
        (("checkpoint.3", "journal.2"), "journal.2 is not there"),
        (("journal.3",), "journal.3 is not there"),
        (("journal.2", "journal.3"), "journal.3 is not there"),
    ):
        copy = Path(shutil.copytree(directory, tmp_path / "copy"))
        for name in missing:
            (copy / name).unlink()
        assert said in refused(copy)
        assert "checkpoint.2" in names(copy) or "checkpoint.2" in missing
        shutil.rmtree(copy)


def test_a_journal_that_lost_its_end_before_the_next_one_began(directory: Path) -> None:
    """As after a loss of power; and the newer checkpoint is damaged too."""
    flip(directory / "checkpoint.3", 5000)
    path = directory / "journal.2"
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[:-3])
    said = refused(directory)
    assert "records were in journal.2" in said
    assert "--recover" in said
    with alive(configured(directory), recover=True) as live:
        assert cat(live, f"{VM}/extfrag_threshold") in ("2\n", "3\n")
        echo(live, f"{VM}/extfrag_threshold", "44")
    assert "journal.3.damaged-1" in names(directory)
    with still(configured(directory)) as again:
        assert cat(again, f"{VM}/extfrag_threshold") == "44\n"


def test_what_was_being_written_goes(directory: Path, made: tuple[Path, str]) -> None:
    (directory / "checkpoint.4.new").write_bytes(b"half")
    (directory / "journal.new").write_bytes(b"half")
    with still(configured(directory)) as again:
        assert hash_of(again) == made[1]
    assert names(directory) == ["checkpoint.2", "checkpoint.3", "journal.2", "journal.3"]


def test_another_build_or_configuration_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(directory, '[dpu]\nprofile = "upmem-v1b"')
    assert said.endswith("another configuration: dpu.profile: it was upmem-v1a, and is upmem-v1b now")
    monkeypatch.setattr(state, "build_of", lambda: "0.0.1+abc")
    for recover in (False, True):
        assert refused(directory, recover=recover).endswith("this is 0.0.1+abc: start that one")


def test_a_machine_that_the_boot_made_otherwise_does_not_come_up(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpud.checkpoint_born.Born.fingerprint", "1-0")
    with pytest.raises(UserError, match="built of other objects"), still(configured(directory)):
        pass
    with pytest.raises(UserError, match="start again"), alive(configured(directory), recover=True):
        pass
    assert "checkpoint.3.damaged-1" in names(directory)
