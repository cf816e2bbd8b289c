# SPDX-License-Identifier: GPL-2.0-only
import os
import signal
import time
from array import array

import pytest

from dpud import bench
from dpud.bench import fuse, host, micro, node, prober, real_memory, region
from dpud.errors import UserError


def test_unknown_benchmark_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(bench, "_run", lambda *_: pytest.fail("ran"))
    with pytest.raises(UserError, match=r"no benchmark speed: there are region, node, .*"):
        bench.run("speed")


@pytest.mark.slow
def test_region_is_the_seed_s():
    """2 MiB, 128 fragments of which 64 are mapped; compact_region asserts what the stages found."""
    times = region.measure(2)
    assert len(times) == 2
    assert all(ns > 0 for stages in times for ns in stages)
    assert (region.REGION_PAGES, region.NR_MAPPED, region.NR_UNMAPPED) == (512, 64, 64)
    assert (2 * region.EXECUTE_TARGET_NS, 2 * region.UPDATE_TARGET_NS) == (234_000, 122_000)


def test_overlapping_keeps_what_touches_the_window():
    samples = array("q", [0, 9, 5, 10, 12, 15, 18, 30, 20, 21, 21, 22])
    assert node.overlapping(samples, 10, 20) == (5, 3, 12, 1)


def test_round_divides_by_pages():
    assert node.Round(nr_moved=500, wall_ns=250_000).ns_per_page == 500


def test_counter_reads_name_value_lines():
    text = "pgmigrate_success 12\npgmigrate_fail 3\n"
    assert real_memory.counter(text, "pgmigrate_fail") == 3
    with pytest.raises(KeyError):
        real_memory.counter(text, "pgmigrate")


def test_node_figures_hold_ours_against_a_quarter_of_the_peer():
    ours = [node.Round(10, 1_000), node.Round(10, 4_000, (2_000_000, 30_000_000))]
    figures = node._figures(ours, [node.Round(1, 800), node.Round(1, 400), node.Round(1, 480)], 50.0)
    assert figures[0].cells() == (
        "wall time per moved page",
        "100 ns",
        "120 ns (a quarter of Linux's 480 ns)",
        "0.83",
        "met",
    )
    latency = {figure.what: figure for figure in figures}["buddyinfo during it, 99th percentile"]
    assert (latency.ours, latency.limit, latency.verdict) == (30.0, 20, "missed")


def test_node_figures_without_a_peer_have_no_verdict():
    figures = node._figures([node.Round(10, 1_000), node.Round(10, 1_000, (1,))], [], 50.0)
    assert figures[0].verdict == ""


def test_real_memory_keeps_what_was_not_given_back():
    size = 1 << 20
    memory = real_memory.fragment(size, 50, 7)
    kept = sum(memory[at] == 1 for at in range(0, size, 4096))
    assert 80 < kept < 176  # 256 pages, each kept with probability 1/2: 6 standard deviations
    memory.close()


def test_cpu_model():
    assert host.cpu_model("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t: fpu\n") == "AMD EPYC"
    assert host.cpu_model("") == "unknown"


def test_pinned_to_is_undone():
    before = os.sched_getaffinity(0)
    with host.pinned_to({min(before)}):
        assert os.sched_getaffinity(0) == {min(before)}
        assert f"pinned to CPU {min(before)}" in host.load() or len(before) == 1
    assert os.sched_getaffinity(0) == before


def test_latencies_are_of_each_operation(monkeypatch):
    clock = iter([0, 100, 300, 400, 1_000, 9_999])
    monkeypatch.setattr(fuse, "perf_counter_ns", lambda: next(clock))
    done = []
    assert fuse.latencies(done.append, "file", duration_ns=1_000) == [100, 200, 100, 600]
    assert done == ["file"] * 4


def test_a_job_s_rate_is_the_sum_of_its_readers(monkeypatch):
    """Two readers, one of which takes twice as long; p99 is over all that both did."""

    class Readers:
        def starmap(self, _function, arguments, chunksize):
            assert len(arguments) == 2
            return [[1_000_000] * 10, [2_000_000] * 5]

    job = fuse.Job("x", fuse.cat, "file", 2, os.getpid())
    job.round(Readers())
    assert job.rate == 1500
    assert job.p99_us == 2000


def test_whole_reads_to_the_end(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(3_000_001))
    assert fuse.whole(str(file)) == 3_000_001


def test_cat_and_echo(tmp_path):
    file = tmp_path / "knob"
    file.write_text("old text")
    fuse.echo(str(file))
    assert file.read_text() == "1\n"
    fuse.cat(str(file))


@pytest.mark.slow
def test_prober_reports_pairs_when_told_to_stop(tmp_path):
    file = tmp_path / "buddyinfo"
    file.write_text("Node 0\n")
    begin = time.perf_counter_ns()
    with host.started(host.module("prober", str(file))) as process:
        assert process.stdout.read(1) == b"."
        process.send_signal(signal.SIGTERM)
        samples = array("q", process.stdout.read())
    end = time.perf_counter_ns()
    assert len(samples) % 2 == 0
    assert all(begin < first < last < end for first, last in zip(samples[::2], samples[1::2], strict=True))


def test_prober_keeps_whole_samples_only():
    samples = array("q", [1, 2])
    with pytest.raises(FileNotFoundError):
        prober.probe("/nonexistent", samples)
    assert samples.tolist() == [1, 2]


@pytest.mark.slow
def test_started_ends_the_process():
    with host.started(["sleep", "100"]) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_micro_stages_are_measured(monkeypatch):
    monkeypatch.setattr(micro, "NR_PAGES", 64)
    figures = list(micro._figures("stamp", "stamp"))
    assert [figure.what for figure in figures] == [f"{stage}, stamp" for stage in micro.STAGES]
    assert all(figure.ours > 0 for figure in figures)
