# SPDX-License-Identifier: GPL-2.0-only
"""`dpud record` and `dpud replay` as their users see them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import captures
import numpy as np
import pytest

from dpud.proctext import parse_buddyinfo
from dpud.replay import MAX_SAMPLES, ReplayOptions, Sample, Sampler, fragmentation, replay
from dpud.trace_text import TraceReader

NORMAL = 2048
GFP = {0: "GFP_KERNEL", 1: "GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP", 2: "GFP_KERNEL|__GFP_RECLAIMABLE"}


class Recording:
    """A folder as `dpud record` makes it, of a made-up machine."""

    def __init__(self, folder: Path, nr_blocks: int = 12) -> None:
        self.folder = folder
        self.machine = captures.machine(1, nr_blocks)
        self.machine.write(folder / "before")
        self.machine.write(folder / "after")
        self.lines: list[str] = []
        self.now_us = 5_000_000_000

    def add(self, name: str, pfn: int, order: int, rest: str = "", after_us: int = 100) -> None:
        self.now_us += after_us
        time = f"{self.now_us // 10**6}.{self.now_us % 10**6:06d}"
        text = f"page=00000000{pfn:08x} pfn={pfn:#x} order={order}{rest}"
        self.lines.append(f"{'sh-77':>24} [000] ..... {time}: {name}: {text}\n")

    def alloc(self, pfn: int, order: int = 0, migratetype: int = 1, after_us: int = 100) -> None:
        self.add("mm_page_alloc", pfn, order, f" migratetype={migratetype} gfp_flags={GFP[migratetype]}", after_us)

    def free(self, pfn: int, order: int = 0, after_us: int = 100) -> None:
        self.add("mm_page_free", pfn, order, "", after_us)

    def write(self) -> Path:
        (self.folder / "trace.txt").write_text("".join(self.lines))
        return self.folder


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(tmp_path / "recording")


def dpud(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dpud", *words], capture_output=True, text=True, timeout=300, **how)


@pytest.mark.slow
def test_a_trace_that_undoes_itself_ends_where_it_began(recording: Recording) -> None:
    """Blocks of order 4, which no per-CPU list holds back."""
    frames = range(NORMAL + 1536, NORMAL + 2048, 16)  # a free pageblock
    for pfn in frames:
        recording.alloc(pfn, 4)
    for pfn in frames:
        recording.free(pfn, 4)
    outcome = replay(ReplayOptions(recording.write()))
    assert outcome.nr_free == outcome.real_after == outcome.real_before
    assert (outcome.counts["allocs"], outcome.counts["frees"]) == (32, 32)
    assert outcome.counts["alloc_pages"] == outcome.counts["free_pages"] == 512


@pytest.mark.slow
def test_samples_follow_the_free_memory(recording: Recording) -> None:
    """One order-4 block every 10 ms: each line of the report has 16 pages less for each that it counts."""
    for pfn in [first + 16 * i for first in (NORMAL + 1536, NORMAL + 3584) for i in range(32)]:  # free pageblocks
        recording.alloc(pfn, 4, 0, after_us=10_000)
    outcome = replay(ReplayOptions(recording.write()))
    first = outcome.samples[0]
    assert outcome.counts["unseen_free"] == 0
    assert MAX_SAMPLES // 2 <= len(outcome.samples) <= MAX_SAMPLES
    assert [sample.time_ns for sample in outcome.samples] == sorted({sample.time_ns for sample in outcome.samples})
    assert outcome.samples[-1].free_pages == first.free_pages - 64 * 16
    for sample in outcome.samples[:-1]:
        assert abs(sample.time_ns / 1e7 + 1 - sample.allocs) <= 1
    assert outcome.samples[-1].time_ns == 63 * 10_000_000


def test_a_sampler_keeps_evenly_spaced_samples() -> None:
    sampler = Sampler()
    for now in range(0, 10**10, 10**6):
        if now >= sampler.due_ns:
            sampler.add(Sample(now, 0, 0, 0, 0, 0, 0, 0))
    times = [sample.time_ns for sample in sampler.samples]
    assert MAX_SAMPLES // 2 <= len(times) <= MAX_SAMPLES
    assert len(set(np.diff(times))) == 1


def test_fragmentation_is_the_kernel_s_unusable_index() -> None:
    """Of a real machine: its zones' buddyinfo, and what its extfrag/unusable_index said for order 9."""
    folder = Path(__file__).parents[2] / "dpud" / "data" / "captures" / "demo"
    nr_free = parse_buddyinfo((folder / "buddyinfo").read_text())
    for line in (folder / "unusable_index").read_text().splitlines():
        words = line.split()
        free_pages, _, unusable = fragmentation(nr_free[(int(words[1].rstrip(",")), words[3])])
        assert free_pages > 0
        assert unusable / 1000 == pytest.approx(float(words[4 + 9]), abs=0.01)  # it was read a moment later


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--traditional", "--dpu"])
def test_compaction_in_trace_time(recording: Recording, tmp_path: Path, how: str) -> None:
    """Every second page is freed: compaction makes whole blocks of those; pages can still be freed by their names."""
    frames = [pfn for pfn in range(NORMAL, NORMAL + 12 * 512) if recording.machine.flags[pfn] & captures.BUDDY]
    for pfn in frames:
        recording.alloc(pfn)
    for pfn in frames[::2]:
        recording.free(pfn)
    recording.free(frames[1], after_us=2_000_000)
    for pfn in frames[3::2]:
        recording.free(pfn)
    folder = str(recording.write())
    done = dpud("replay", folder, how, "--compact-at", "1.5", "--json", str(tmp_path / "json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "json").read_text())
    assert figures["compaction_counters"]["pgmigrate_success"] > 100
    assert ("dpu_pages_moved" in figures["compaction_counters"]) == (how == "--dpu")
    assert figures["counts"]["free_unknown"] == 0
    assert figures["counts"]["frees"] == len(frames)
    blocks = [sample["huge_blocks"] for sample in figures["samples"]]
    at_1s, at_2s = (
        next(sample["huge_blocks"] for sample in reversed(figures["samples"]) if sample["time_ns"] < seconds * 1e9)
        for seconds in (1.4, 2.1)
    )
    assert at_2s > at_1s, blocks


@pytest.mark.slow
def test_the_report_and_the_json_say_the_same(recording: Recording, tmp_path: Path) -> None:
    for i in range(20):
        recording.alloc(NORMAL + 1536 + i, 0, 2)
    recording.lines.append("CPU:1 [LOST 5 EVENTS]\n")
    recording.free(NORMAL + 1536)
    done = dpud("replay", str(recording.write()), "--json", str(tmp_path / "json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "json").read_text())
    text = " ".join(done.stdout.split())
    assert "22 events" in text
    assert "20 allocations (20 pages), 1 frees (1 pages)" in text
    assert "5 events (or more) were lost by the tracer" in text
    assert f"fallbacks: ours {figures['fallbacks']}, real 0" in text
    assert figures["counts"]["lost"] == 5
    assert figures["real_nr_free_after"]["0 Normal"] == list(
        parse_buddyinfo(recording.machine.buddyinfo())[(0, "Normal")]
    )


@pytest.mark.slow
def test_a_trace_with_a_capture(recording: Recording) -> None:
    recording.alloc(NORMAL + 1536)
    folder = recording.write()
    options = ReplayOptions(folder / "trace.txt", folder / "before")
    outcome = replay(options)
    assert outcome.real_after is None
    assert outcome.counts["allocs"] == 1


@pytest.mark.slow
def test_a_bad_line_is_named(recording: Recording) -> None:
    recording.alloc(NORMAL)
    recording.lines.insert(0, " sh-7 [001] 1.000000: mm_page_free: page=1 pfn=0x1 order=99\n")
    done = dpud("replay", str(recording.write()))
    assert done.returncode == 2
    assert done.stderr == f"dpud: {recording.folder}/trace.txt:1: mm_page_free: order=99 is more than 10\n"


# A real machine.

RECORD = [sys.executable, "-m", "dpud", "record"]
WORK = """
import fcntl, os
b = [bytearray(1 << 20) for _ in range(60)]; del b[::2]; c = bytearray(40 << 20)
for reading, writing in [os.pipe() for _ in range(300)]:  # pages that cannot be moved, more than there are blocks for
    os.write(writing, bytes(fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)))
"""


def instances() -> set[str]:
    """Those of this host's tracefs that are ours."""
    from dpud.tracefs import open_root

    root = open_root()
    try:
        return {name for name in os.listdir(f"/proc/self/fd/{root}/instances") if name.startswith("dpud-")}
    finally:
        os.close(root)


def assert_none_left(before: set[str]) -> None:
    """Whoever cleans up may still be at it, or be another's."""
    deadline = time.monotonic() + 30
    while instances() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert instances() <= before


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="recording needs root")
def test_a_real_recording_replayed(tmp_path: Path) -> None:
    """What is free in the end, and where, is what the real kernel had: within a tenth of what changed hands, for
    free pages with those on per-CPU lists, and to a few blocks for large ones. As many blocks of another migratetype
    had to be taken, give or take what no capture shows."""
    folder = tmp_path / "recording"
    before = instances()
    done = dpud("record", str(folder), "--", sys.executable, "-c", f"{WORK}raise SystemExit(7)")
    assert done.returncode == 7, done.stderr
    assert "lines of trace" in done.stdout
    assert_none_left(before)
    events = np.concatenate([*TraceReader(folder / "trace.zst").batches()])
    assert len(events) > 10_000
    outcome = replay(ReplayOptions(folder))
    assert outcome.real_after is not None
    ours, real = (
        sum(nr << order for row in state.values() for order, nr in enumerate(row)) + pcp
        for state, pcp in ((outcome.nr_free, outcome.nr_pcp), (outcome.real_after, outcome.real_pcp))
    )
    assert outcome.counts["allocs"] > 10_000
    real_fallbacks = outcome.counts["real_fallbacks"]
    if real_fallbacks >= 40:  # else the host had enough free memory of each type
        assert outcome.fallbacks[0] > 0  # how close they come depends on what else the host does: docs/guide.md
    notes = dict(line.split(" ", 1) for line in (folder / "record.txt").read_text().splitlines())
    assert notes["exit_code"] == "7"
    if (notes["quiet_before"], notes["quiet_after"], notes["lost_places"]) != ("1", "1", "0"):
        pytest.skip("this host is too busy: its free lists moved while they were captured, or events were lost")
    assert abs(ours - real) <= outcome.counts["alloc_pages"] // 10 + outcome.counts["unseen_free"]
    for key, row in outcome.real_after.items():
        assert sum(outcome.nr_free[key][10:]) == pytest.approx(sum(row[10:]), rel=0.05, abs=16)


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="recording needs root")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_recording_that_is_ended_leaves_nothing(tmp_path: Path, signum: int) -> None:
    """Ctrl-C ends it with a result; SIGTERM and SIGKILL without one."""
    before = instances()
    recorder = subprocess.Popen([*RECORD, str(tmp_path / "recording")], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(_is_tracing(name) for name in instances() - before):
        assert time.monotonic() < deadline, "it does not begin to trace"
        time.sleep(0.05)
    recorder.send_signal(signum)
    output, _ = recorder.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while instances() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert_none_left(before)
    assert (tmp_path / "recording" / "after").is_dir() == (signum == signal.SIGINT)
    assert ("lines of trace" in output) == (signum == signal.SIGINT)
    assert recorder.returncode == {signal.SIGINT: 0, signal.SIGTERM: 143, signal.SIGKILL: -9}[signum]


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="recording needs root")
def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    before = instances()
    done = dpud("record", str(tmp_path / "recording"), "--", "/no/such/command")
    assert (done.returncode, done.stderr) == (2, "dpud: /no/such/command: No such file or directory\n")
    assert list(tmp_path.iterdir()) == []
    assert_none_left(before)


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes an ordinary user")
@pytest.mark.parametrize(
    "tracefs",
    ["mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing", "umount -aqt tracefs; true"],
)
def test_an_ordinary_user_is_told_to_be_root(tracefs: str) -> None:
    ordinary_user = [sys.executable, "-P", str(Path(__file__).parent.parent / "ordinary_user.py")]
    private = ["unshare", "-m", "sh", "-c", f'{tracefs} && exec "$@"', "-"]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        command = [*private, *ordinary_user, *RECORD, f"{folder}/recording"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("dpud: ")
    assert "needs root" in done.stderr
    assert done.stderr.count("\n") == 1


def _is_tracing(name: str) -> bool:
    from dpud.tracefs import open_root

    root = open_root()
    try:
        place = Path(f"/proc/self/fd/{root}/instances/{name}")
        files = ("events/kmem/mm_page_free/enable", "tracing_on")  # a new instance has the latter on, without events
        return all((place / file).read_text() == "1\n" for file in files)
    except OSError:
        return False
    finally:
        os.close(root)
