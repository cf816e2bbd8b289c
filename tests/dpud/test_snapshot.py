# SPDX-License-Identifier: GPL-2.0-only
"""Capturing this host. What needs root and the running kernel is marked `host`."""

import os
from pathlib import Path

import numpy as np
import pytest
from captures import machine

from dpud import live, snapshot
from dpud.capture import CaptureError, read_capture, read_host
from dpud.live import LiveCapture, read_live
from dpud.rawcapture import RawCapture, zones_of
from dpud.snapshot import SnapshotReport
from kernelsim.hostimage import HostImage, count_free_blocks, format_buddyinfo

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> LiveCapture:
    """A host that is not this one."""
    built = machine(1, nr_blocks=4)
    texts = {"zoneinfo": built.zoneinfo(), "pagetypeinfo": built.pagetypeinfo(), "maps": built.maps()}
    texts |= {
        "buddyinfo": built.buddyinfo(),
        "buddyinfo.end": built.buddyinfo(),
        "meminfo": "MemTotal: 1 kB\n",
    }
    raw = RawCapture(texts, zones_of(texts), built.flags, built.counts, built.pagemap())
    capture = LiveCapture(raw, quiet=True, attempts=2, nr_tasks=1, nr_tasks_skipped=0)
    monkeypatch.setattr(snapshot, "read_live", lambda attempts, progress: capture)
    return capture


def test_a_snapshot_reads_back_as_the_host_it_was(made_up: LiveCapture, tmp_path: Path) -> None:
    report = snapshot.snapshot(tmp_path / "new")
    there, here = read_capture(tmp_path / "new"), made_up.raw.image()
    for name in ("flags", "mapcount", "free_pfn", "free_order", "block_migratetype", "compound_order"):
        assert (getattr(there, name) == getattr(here, name)).all()
    assert there.zones == here.zones
    assert (there.mappings[0].pfn == here.mappings[0].pfn).all()
    assert len(there.mappings[0].pfn) > 100
    assert (tmp_path / "new" / "meminfo").read_text() == "MemTotal: 1 kB\n"
    assert report.nr_bytes == sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    assert (report.quiet, report.attempts, report.nr_pages, report.nr_tasks) == (True, 2, 4096, 1)


def test_others_cannot_read_a_snapshot(made_up: LiveCapture, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    snapshot.snapshot(tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


def test_a_target_with_files_in_it_is_refused(made_up: LiveCapture, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(CaptureError, match="not empty"):
        snapshot.snapshot(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["no/parent", "file"])
def test_an_impossible_target_is_one_line(made_up: LiveCapture, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CaptureError, match=target):
        snapshot.snapshot(tmp_path / target)


def test_a_failed_snapshot_leaves_nothing(
    made_up: LiveCapture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CaptureError, match="No space left"):
        snapshot.snapshot(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("quiet", "said"), [(True, "held still (attempt 3)"), (False, "never held still in 3")])
def test_the_report_says_whether_the_host_held_still(quiet: bool, said: str) -> None:
    report = SnapshotReport(Path("/x"), quiet, 3, 4096, 5, 0, 1000)
    assert said in str(report)


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc of plain files, with one process whose pagemap has a hole."""
    built = machine(2, nr_blocks=4)
    built.tasks = []
    built.write(tmp_path / "proc", compressed=False)
    folder = tmp_path / "proc" / "41"
    folder.mkdir()
    (folder / "comm").write_text("a b\n")
    (folder / "maps").write_text(
        "2000-6000 rw-p 00000000 00:00 0 \n6000-7000 ---p 00000000 00:00 0 \n7000-8000 r--s 00000000 fd:00 9  /x y\n"
    )
    mapped = np.flatnonzero(built.counts)
    entries = np.zeros(8, dtype=np.uint64)
    entries[[2, 4, 6, 7]] = mapped[:4].astype(np.uint64) | np.uint64(1 << 63)
    (folder / "pagemap").write_bytes(entries.tobytes())
    monkeypatch.setattr(live, "PROC", tmp_path / "proc")
    monkeypatch.setattr(live, "INFORMATION", ())
    monkeypatch.setattr(live, "PAUSE_S", 0.0)
    return tmp_path / "proc"


def test_page_tables_are_read_where_pages_are(proc: Path) -> None:
    capture = read_live()
    assert (capture.quiet, capture.attempts, capture.nr_tasks) == (True, 1, 1)
    (task,) = capture.raw.image().mappings
    assert (task.pid, task.comm) == (41, "a b")
    assert task.vmas == ((2, 6, 3), (6, 7, 0), (7, 8, 9))
    assert task.vpn.tolist() == [2, 4, 7]


def test_a_process_that_ends_while_it_is_read_is_skipped(proc: Path) -> None:
    (proc / "41" / "pagemap").unlink()
    capture = read_live()
    assert (capture.nr_tasks, capture.nr_tasks_skipped) == (0, 1)
    assert capture.raw.image().mappings == ()


def test_a_host_that_never_holds_still_is_said_to(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = live._read_words
    reads: list[str] = []

    def meanwhile(fd: int, name: str, words: np.ndarray, needed: int) -> None:
        original(fd, name, words, needed)
        reads.append(name)
        lines = (proc / "buddyinfo").read_text().split("DMA", 1)
        (proc / "buddyinfo").write_text(f"{lines[0]}DMA {len(reads):6d}{lines[1][7:]}")

    monkeypatch.setattr(live, "_read_words", meanwhile)
    capture = read_live(attempts=3)
    assert not capture.quiet
    assert capture.attempts == 3
    assert reads == ["kpageflags", "kpagecount"] * 3


def test_a_kernel_without_kpageflags_is_one_line(proc: Path) -> None:
    (proc / "kpageflags").unlink()
    with pytest.raises(CaptureError, match="kpageflags: No such file"):
        read_live()


def test_progress_is_told(proc: Path) -> None:
    told: list[tuple[str, float]] = []
    read_live(progress=lambda what, done: told.append((what, done)))
    assert [what.split()[0] for what, _ in told] == ["kpageflags", "kpagecount", "pagemap"]
    assert all(0 <= done <= 1 for _, done in told)


def assert_like_buddyinfo(image: HostImage, quiet: bool) -> None:
    """To the byte if the host held still, else near it. (Lists that are as before at the end may have changed
    in between: then the image says so.)"""
    ours = format_buddyinfo(image.zones, count_free_blocks(image))
    if quiet and not any("changed while it was read" in note for note in image.notes):
        assert ours == image.buddyinfo
        return
    totals = [
        sum(int(nr) << order for line in text.splitlines() for order, nr in enumerate(line.split()[4:]))
        for text in (ours, image.buddyinfo)
    ]
    assert totals[0] == pytest.approx(totals[1], rel=0.1)


@needs_root
@pytest.mark.host
def test_this_host(tmp_path: Path) -> None:
    report = snapshot.snapshot(tmp_path / "host", attempts=10)
    image = read_capture(tmp_path / "host")
    assert report.quiet == (image.buddyinfo == image.buddyinfo_end)
    assert report.quiet or "never held still" in str(report)
    assert_like_buddyinfo(image, report.quiet)
    me = next(task for task in image.mappings if task.pid == os.getpid())
    assert len(me.vpn) > 1000


@needs_root
@pytest.mark.host
def test_this_host_at_once() -> None:
    image = read_host(attempts=10)
    assert_like_buddyinfo(image, image.buddyinfo == image.buddyinfo_end)


@pytest.mark.host
def test_an_ordinary_user_is_told_to_be_root(tmp_path: Path) -> None:
    pid = os.fork() if os.geteuid() == 0 else -1
    if pid > 0:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return
    try:
        if pid == 0:
            os.setuid(65534)
        read_live()
    except CaptureError as error:
        told = "needs root" in str(error)
    if pid == 0:
        os._exit(0 if told else 1)
    assert told
