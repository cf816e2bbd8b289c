# SPDX-License-Identifier: GPL-2.0-only
"""Capturing a host around its own compaction, on a /proc of plain files; fragmenting a little real memory."""

import os
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from captures import machine
from click.testing import CliRunner

from dpud import fragment, live, prepare, realcompact
from dpud.bench.fidelity import read_case
from dpud.capture import CaptureError, read_capture
from dpud.cli import cli
from dpud.errors import UserError
from dpud.realcompact import Fragmentation, snapshot_compact

VMSTAT = "nr_free_pages 1\npgmigrate_success {}\npgmigrate_fail 5\ncompact_migrate_scanned 7\ncompact_free_scanned 9\n"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of plain files whose compact_memory lets 100 pages migrate and one page become free."""
    proc = tmp_path / "proc"
    built = machine(2, nr_blocks=4)
    built.tasks = []
    built.write(proc, compressed=False)
    (proc / "compact_memory").touch()
    (proc / "vmstat").write_text(VMSTAT.format(1000) + "compact_isolated 0\nthp_migration_split 3\ncompact_stall 4\n")
    monkeypatch.setattr(live, "PROC", proc)
    monkeypatch.setattr(live, "INFORMATION", ())
    monkeypatch.setattr(live, "PAUSE_S", 0.0)
    monkeypatch.setattr(realcompact, "COMPACT_MEMORY", proc / "compact_memory")
    monkeypatch.setattr(realcompact, "VMSTAT", proc / "vmstat")
    (proc / "fraction").write_text("0\n")
    monkeypatch.setattr(prepare, "HIGH_FRACTION", proc / "fraction")
    monkeypatch.setattr(prepare, "ZONEINFO", proc / "zoneinfo")
    monkeypatch.setattr(os, "sync", lambda: (proc / "synced").touch())

    def compact(self: realcompact._Compactor) -> None:
        original(self)
        assert (proc / "compact_memory").read_text() == "1"
        (proc / "vmstat").write_text(
            VMSTAT.format(1100) + "compact_isolated 250\nthp_migration_split 3\ncompact_stall 4\n"
        )
        self._texts[1].fill()
        flags = np.fromfile(proc / "kpageflags", dtype=np.uint64)
        flags[np.flatnonzero(flags & np.uint64(1 << 5))[0]] = 1 << 10
        flags.tofile(proc / "kpageflags")

    original = realcompact._Compactor.compact
    monkeypatch.setattr(realcompact._Compactor, "compact", compact)
    return proc


def result_of(folder: Path) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in (folder / "result.txt").read_text().splitlines())


@pytest.mark.slow
def test_the_folder_has_the_host_before_and_after_and_what_happened(host: Path, tmp_path: Path) -> None:
    affinity = os.sched_getaffinity(0)
    report = snapshot_compact(tmp_path / "case")
    before, after = (read_capture(tmp_path / "case" / part) for part in ("before", "after"))
    assert (before.flags != after.flags).sum() == 1
    result = result_of(tmp_path / "case")
    assert (result["pgmigrate_success"], result["pgmigrate_fail"], result["compact_isolated"]) == ("100", "0", "250")
    assert (result["pattern"], result["mb"], result["keep_percent"]) == ("none", "0", "100")
    assert result["kernel"] == os.uname().release
    assert int(result["cpu"]) in affinity
    assert "thp_migration_split" not in result  # did not change
    assert float(result["ns_per_page"]) == pytest.approx(float(result["seconds"]) * 1e7, rel=0.5, abs=20)
    assert os.sched_getaffinity(0) == affinity
    assert "100 pages migrated" in str(report)
    assert read_case(tmp_path / "case").result == result


@pytest.mark.slow
@pytest.mark.parametrize("as_is", [False, True])
def test_the_host_is_prepared_unless_it_is_to_be_as_it_is(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_is: bool
) -> None:
    seen: list[str] = []
    compact = realcompact._Compactor.compact

    def look(self: realcompact._Compactor) -> None:
        seen.append((host / "fraction").read_text().strip())
        compact(self)

    monkeypatch.setattr(realcompact._Compactor, "compact", look)
    snapshot_compact(tmp_path / "case", as_is=as_is)
    assert seen == ["0" if as_is else str(2**31 - 1)]
    assert (host / "fraction").read_text() == "0\n"
    assert (host / "synced").exists() != as_is
    prepared = result_of(tmp_path / "case")["prepared"]
    assert prepared == ("no" if as_is else "synced, per-CPU lists drained and kept short")


def test_what_others_did_meanwhile_is_counted() -> None:
    before = {"pgalloc_dma": 1, "pgalloc_normal": 10, "pgfree": 100, "pgmigrate_success": 1000}
    after = {"pgalloc_dma": 3, "pgalloc_normal": 15, "pgfree": 160, "pgmigrate_success": 1050}
    run = realcompact.RealCompaction(before, after, 0.1, 0)
    assert (run.others_allocated, run.others_freed) == (7, 10)


def test_a_kernel_that_cannot_compact_is_one_line_and_leaves_nothing(host: Path, tmp_path: Path) -> None:
    (host / "compact_memory").unlink()
    with pytest.raises(CaptureError, match="compact_memory: No such file"):
        snapshot_compact(tmp_path / "case")
    assert not (tmp_path / "case").exists()


@pytest.mark.slow
def test_a_write_that_fails_leaves_nothing(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: realcompact._Compactor) -> None:
        raise OSError(5, "Input/output error", "/proc/sys/vm/compact_memory")

    monkeypatch.setattr(realcompact._Compactor, "compact", refuse)
    with pytest.raises(CaptureError, match="compact_memory: Input/output error"):
        snapshot_compact(tmp_path / "case")
    assert [path.name for path in tmp_path.iterdir()] == ["proc"]


def test_a_target_in_use_is_refused_before_anything_is_compacted(host: Path, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="not empty"):
        snapshot_compact(tmp_path)
    assert (host / "compact_memory").read_text() == ""


def test_fragmenting_more_than_there_is_memory_is_refused(host: Path, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="--mb 999999999: needs"):
        snapshot_compact(tmp_path / "case", Fragmentation("random", 999999999, 50))


@pytest.mark.parametrize("option", [["--fragment", "runs"], ["--as-is"]])
def test_options_of_compact_are_refused_without_it(option: list[str]) -> None:
    outcome = CliRunner().invoke(cli, ["snapshot", *option, "/nowhere"], standalone_mode=False)
    assert isinstance(outcome.exception, UserError)
    assert f"{option[0]} is for --compact" in str(outcome.exception)


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) / 256


@pytest.mark.parametrize("pattern", fragment.PATTERNS)
@pytest.mark.slow
def test_fragmented_memory_is_there_until_it_is_no_longer_wanted(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def remember(*arguments: object, **options: object) -> "subprocess.Popen[str]":
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    with fragment.fragmented(pattern, 64, 50, tmp_path):
        (process,) = started
        assert process.poll() is None
        present = entries_of(process.pid, 64)
        assert 0.3 < present.mean() < 0.7
        nr_changes = int((present[1:] != present[:-1]).sum())
        assert nr_changes > len(present) / (60 if pattern == "runs" else 4)
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def entries_of(pid: int, mb: int) -> np.ndarray:
    """Which pages of the process' large mapping are there."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if end - start >= mb << 20 and line.split()[1] == "rw-p":
            with open(f"/proc/{pid}/pagemap", "rb") as file:
                file.seek(start // 512)
                words = np.frombuffer(file.read((mb << 20) // 512), dtype=np.uint64)
            return (words >> np.uint64(63)).astype(bool)
    raise AssertionError("no such mapping")


@pytest.mark.slow
def test_a_fragmenter_dies_with_who_wanted_it(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom dpud.fragment import fragmented\n"
        f"with fragmented('random', 16, 50, Path({str(tmp_path)!r})):\n"
        "    import subprocess, os\n"
        "    print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline().split()[0]))
        parent.kill()
    assert select.select([child], [], [], 60)[0] == [child]  # readable once it is dead
    os.close(child)


@pytest.mark.host
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_this_host_compacts(tmp_path: Path) -> None:
    snapshot_compact(tmp_path / "case", Fragmentation("random", 64, 50), attempts=1)
    case = read_case(tmp_path / "case")
    assert int(case.result["compact_migrate_scanned"]) > 0
    assert read_capture(tmp_path / "case" / "before").mappings
