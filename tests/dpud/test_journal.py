# SPDX-License-Identifier: GPL-2.0-only
"""The file: whatever happens to it, what is read is what was written, as far as it is whole, and damage is named."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud.journal import CHUNK_BYTES, HEADER_BYTES, Journal, Reader, frame

payloads = st.lists(st.binary(max_size=200), min_size=1, max_size=8)


def written(path: Path, records: list[bytes]) -> bytes:
    journal = Journal(path)
    for record in records:
        assert journal.reserve(len(record))
        journal.append(record)
    journal.close()
    return path.read_bytes()


def read(data: bytes) -> tuple[list[bytes], Reader]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "journal")
        path.write_bytes(data)
        reader = Reader(path)
        return [payload for _, payload in reader], reader


def test_what_is_written_is_read(tmp_path: Path) -> None:
    records = [b"", b"one", bytes(100_000), b"\xff" * 7]
    written(tmp_path / "j", records)
    reader = Reader(tmp_path / "j")
    assert [payload for _, payload in reader] == records
    assert (reader.end.number, reader.end.problem) == (4, None)
    assert reader.end.offset == (tmp_path / "j").stat().st_size


def test_room_that_was_taken_and_not_used_is_no_record(tmp_path: Path) -> None:
    """What a killed daemon leaves: the file goes on with zeros."""
    journal = Journal(tmp_path / "j")
    assert journal.reserve(10)
    journal.append(b"one")
    assert (tmp_path / "j").stat().st_size > CHUNK_BYTES
    reader = Reader(tmp_path / "j")
    assert [payload for _, payload in reader] == [b"one"]
    assert reader.end.problem is None


@pytest.mark.slow
@given(payloads, st.data())
@settings(max_examples=examples(60), deadline=None)
def test_a_file_cut_anywhere_gives_the_records_before_and_never_another(
    records: list[bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        whole = written(Path(scratch, "j"), records)
    cut = data.draw(st.integers(0, len(whole)))
    found, reader = read(whole[:cut] + bytes(data.draw(st.integers(0, 100))))
    assert found == records[: len(found)]
    lengths = [HEADER_BYTES + len(record) for record in records]
    sure = max(nr for nr in range(len(records) + 1) if sum(lengths[:nr]) <= cut)
    assert len(found) >= sure, "a whole record was not found"
    assert reader.end.next_whole is None


@given(payloads, st.data())
@settings(max_examples=examples(100), deadline=None)
@pytest.mark.slow
def test_a_flipped_bit_is_found_and_told_from_a_torn_end(records: list[bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        whole = bytearray(written(Path(scratch, "j"), records))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    found, reader = read(bytes(whole))
    starts = [sum(HEADER_BYTES + len(record) for record in records[:nr]) for nr in range(len(records) + 1)]
    hit = max(nr for nr in range(len(records)) if starts[nr] <= at)
    assert found == records[:hit]
    assert (reader.end.number, reader.end.offset) == (hit, starts[hit])
    assert reader.end.problem
    assert reader.end.next_whole == (starts[hit + 1] if hit + 1 < len(records) else None)


def test_a_record_in_the_wrong_place_is_no_record() -> None:
    one, two, three = (frame(number, b"x") for number in range(3))
    assert read(one + three + two)[0] == [b"x"]
    assert read(one + one)[0] == [b"x"]
    assert "says that it is record 2" in str(read(one + three + two)[1].end.problem)


def test_it_goes_on_where_the_whole_records_end(tmp_path: Path) -> None:
    path = tmp_path / "j"
    data = written(path, [b"one", b"two"])
    path.write_bytes(data[:-1])
    reader = Reader(path)
    list(reader)
    journal = Journal(path, reader.end)
    journal.append(b"other")
    journal.close()
    assert [payload for _, payload in Reader(path)] == [b"one", b"other"]


@pytest.mark.slow
def test_no_room_is_known_before_anything_is_written(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: both are among the errors that say so."""
    code = f"""
import resource, signal
from pathlib import Path
from dpud.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
journal = Journal(Path({str(tmp_path / "j")!r}))
nr = 0
while journal.reserve(990):
    journal.append(bytes(990))
    nr += 1
print(nr, journal.reserve(100))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    nr, room = done.stdout.split()
    assert int(nr) == (1 << 16) // (990 + HEADER_BYTES)
    assert room == "True", "a smaller one still fits"
    assert len(list(Reader(tmp_path / "j"))) == int(nr)


def test_append_says_when_it_could_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    os.close(journal._fd)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        journal.append(b"x")
    assert caught.value.errno == errno.EBADF
    assert journal.nr_records == 0


@pytest.mark.parametrize(("sync_ms", "least"), [(0, 3), (None, 0)])
def test_always_means_before_append_returns(
    tmp_path: Path, sync_ms: int | None, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_size))
    journal = Journal(tmp_path / "j", sync_ms=sync_ms)
    for nr in range(3):
        journal.append(bytes(10))
        assert len(synced) == (nr + 1 if least else 0)


def test_a_disk_that_failed_later_is_told_to_the_next_who_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(_fd: int) -> None:
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    journal = Journal(tmp_path / "j", sync_ms=1)
    journal.append(b"one")
    assert failed.wait(10)
    assert journal._syncer is not None
    journal._syncer.join(10)
    with pytest.raises(OSError, match="Input/output error"):
        journal.append(b"two")
