# SPDX-License-Identifier: GPL-2.0-only
"""The state directory: what is refused, what is cut off, what is put aside; and that nothing is ever lost silently."""

import shutil
from pathlib import Path

import pytest
from kept import VM, alive, cat, configured, echo, hash_of, killed, still

from dpud import state
from dpud.daemon import Live
from dpud.errors import UserError
from dpud.journal import HEADER_BYTES, Reader
from kernelsim.compaction_sysctl import CompactionSysctl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory in which extfrag_threshold was set to 1 .. 9, one after the other."""
    folder = tmp_path_factory.mktemp("made")
    with alive(configured(folder / "a")) as live:
        for number in range(1, 10):
            echo(live, f"{VM}/extfrag_threshold", str(number))
        killed(live, folder / "a", folder / "state")
    return folder / "state"


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "state"))


def threshold(live: Live) -> int:
    return int(cat(live, f"{VM}/extfrag_threshold"))


def writes(directory: Path) -> list[int]:
    """Offset of each record that sets the threshold."""
    return [offset for offset, payload in Reader(directory / "journal") if b"extfrag_threshold" in payload]


def refused(directory: Path, more: str = "") -> str:
    with pytest.raises(UserError) as caught, still(configured(directory, more)):
        pass
    return str(caught.value)


def damage(path: Path, offset: int) -> bytes:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.slow
def test_wherever_the_last_records_are_cut_the_ones_before_are_there(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = directory / "journal"
    whole, (second, last) = journal.read_bytes(), writes(directory)[-2:]
    for cut in range(second, last + HEADER_BYTES + 1):
        journal.write_bytes(whole[:cut] + bytes(5 * (cut % 2)))
        with state.opened(configured(directory)) as kept:
            assert kept is not None
            assert kept.end is not None
            assert kept.end.offset <= cut
            assert (kept.end.offset >= last) == (cut >= last)
        said = capsys.readouterr().err
        assert said.endswith("cut off\n") or cut in (second, kept.end.offset), (cut, said)
    for cut, left in ((second, 7), (second + 30, 7), (last, 8), (last + HEADER_BYTES, 8)):
        journal.write_bytes(whole[:cut])
        with still(configured(directory)) as live:
            assert threshold(live) == left


@pytest.mark.slow
def test_the_prefix_gives_the_state_of_then(tmp_path: Path) -> None:
    with alive(configured(tmp_path / "a")) as live:
        echo(live, f"{VM}/extfrag_threshold", "5")
        before = killed(live, tmp_path / "a", tmp_path / "b")
        echo(live, f"{VM}/extfrag_threshold", "6")
        after = killed(live, tmp_path / "a", tmp_path / "c")
    for name, expected in (("b", before), ("c", after)):
        with still(configured(tmp_path / name)) as again:
            assert hash_of(again) == expected


@pytest.mark.slow
def test_damage_before_the_end_is_refused_with_place_and_way_out(directory: Path) -> None:
    offset = writes(directory)[4]
    damage(directory / "journal", offset + HEADER_BYTES + 3)
    said = refused(directory)
    assert f"at offset {offset}: its checksum is wrong, and there are whole records from offset" in said
    assert "--recover" in said
    assert sorted(path.name for path in directory.iterdir()) == ["journal", "stores"]


@pytest.mark.slow
def test_recover_goes_on_before_the_damage_and_keeps_the_file(directory: Path) -> None:
    bad = damage(directory / "journal", writes(directory)[4] + HEADER_BYTES + 3)
    with alive(configured(directory), recover=True) as live:
        assert threshold(live) == 4
        echo(live, f"{VM}/extfrag_threshold", "44")
    assert (directory / "journal.damaged-1").read_bytes() == bad
    with still(configured(directory)) as again:
        assert threshold(again) == 44


@pytest.mark.slow
def test_a_journal_without_its_beginning_is_no_fresh_start(directory: Path) -> None:
    (directory / "journal").write_bytes(b"")
    assert "it has no beginning" in refused(directory)
    (directory / "journal").write_bytes(bytes(100))
    assert "it has no beginning" in refused(directory)


@pytest.mark.slow
def test_a_turn_that_comes_to_something_else_is_noticed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with code that has changed: here writing 5 is not legal any more."""
    offset = writes(directory)[4]
    kind = CompactionSysctl.extfrag_threshold.kind
    legal = kind.parse
    monkeypatch.setattr(kind, "parse", lambda data, flavour: legal(b"-1" if data == b"5\n" else data, flavour))
    assert f"at offset {offset}: it came to -EINVAL where it had come to 2" in refused(directory)
    with pytest.raises(UserError, match="start again to go on from there"), alive(configured(directory), recover=True):
        pass
    assert (directory / "journal.damaged-1").exists()
    with still(configured(directory)) as live:
        assert threshold(live) == 4


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ('[dpu]\nprofile = "upmem-v1b"', "dpu.profile: it was upmem-v1a, and is upmem-v1b now"),
        ('[kconfig]\nCONFIG_DEBUG_VM = "y"', "kconfig.CONFIG_DEBUG_VM: it was not there, and is y now"),
    ],
)
def test_another_configuration_is_refused_by_key(directory: Path, more: str, key: str) -> None:
    assert refused(directory, more).endswith(f"the machine was begun with another configuration: {key}")


@pytest.mark.slow
def test_where_it_is_mounted_may_change(directory: Path) -> None:
    with still(configured(directory, '[mount]\npath = "/elsewhere"')) as live:
        assert threshold(live) == 9


def test_another_build_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "build_of", lambda: "0.0.1+abc")
    assert "this is 0.0.1+abc: start that one" in refused(directory)


def test_a_build_is_known_by_every_file(tmp_path: Path) -> None:
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs/a.py").write_text("1")
    before = state.build_of.__wrapped__(tmp_path)
    (tmp_path / "fs/a.py").write_text("2")
    assert state.build_of.__wrapped__(tmp_path) != before


@pytest.mark.slow
def test_two_daemons_do_not_share_it(directory: Path) -> None:
    with still(configured(directory)):
        assert refused(directory).endswith("another dpud uses it")


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file/state") == f"state.directory: {tmp_path}/file/state: Not a directory"
