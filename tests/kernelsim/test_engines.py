# SPDX-License-Identifier: GPL-2.0-only
"""Every engine moves the same bytes to the same places; what differs is who copies and whose time counts."""

import errno

import numpy as np
import pytest
from machines import Lab, advance, settle, small_slices
from numpy.typing import NDArray
from wiring import errno_of

from dpud.dpu.faults import FaultKind
from kernelsim.page import PG_lru

DEBUGFS = "/sys/kernel/debug/dpu_compact"
ENGINE = f"{DEBUGFS}/engine"
ENGINES = ["cpu", "cpu-batched", "ptdma", "dsa", "upmem-v1a", "upmem-v1b", "host", "seed", "ideal"]
OF_THE_CPU = ["cpu", "cpu-batched"]


def loaded_lab(engine: str | None = None, words: str = "full", order: int = 12, nr_ranks: int | None = 1) -> Lab:
    lab = Lab((64,), words, nr_ranks=nr_ranks)
    lab.sysctl(dpu_compact_region_order=order)
    lab.spawn("a", anon="30M", file="2M", holes="50 seed=3", fork="child", mlock="10", pin="2 seed=1")
    lab.set("child", touch="20 seed=4")
    if engine is not None:
        lab.write(ENGINE, engine)
    return lab


def lru_frames(lab: Lab) -> NDArray[np.int64]:
    return np.flatnonzero(lab.mem.pages["flags"][: lab.mem.nr_pages] & np.uint32(PG_lru))


def table(lab: Lab, name: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """(engine, what) -> count, p50, p95, p99, max."""
    lines = [line.split() for line in lab.read(f"{DEBUGFS}/{name}").splitlines()[1:]]
    return {(line[0], line[1]): tuple(map(int, line[2:])) for line in lines}


def regions(lab: Lab) -> list[list[str]]:
    """base, fragments, retired, engine, device_ns, total_ns, wall_ns, error."""
    return [line.split(maxsplit=7) for line in lab.read(f"{DEBUGFS}/regions").splitlines()[1:]]


@pytest.fixture(scope="module")
def by_upmem() -> Lab:
    lab = loaded_lab()
    lab.compact()
    return lab


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.slow
def test_every_engine_moves_the_same_bytes_to_the_same_places(engine: str, by_upmem: Lab) -> None:
    lab = loaded_lab(engine)
    lab.compact()
    lab.assert_at_rest()
    frames = lru_frames(lab)
    assert (frames == lru_frames(by_upmem)).all()
    assert (lab.vm.memory[frames] == by_upmem.vm.memory[frames]).all()
    stats = lab.stats()
    moved = {"device": stats["pages_moved"], "cpu": stats["cpu_pages_moved"]}
    assert moved.pop("cpu" if engine in OF_THE_CPU else "device") == by_upmem.stats()["pages_moved"] > 2000
    assert list(moved.values()) == [0]
    assert stats["fallbacks"] == 0
    assert {line[3] for line in regions(lab)} == {engine}


def test_the_file_shows_the_choice_and_refuses_what_is_none() -> None:
    lab = Lab((32,))
    assert lab.read(ENGINE) == "cpu cpu-batched ptdma dsa [upmem-v1a] upmem-v1b host seed ideal\n"
    for engine in ENGINES:
        lab.write(ENGINE, f"{engine}\n")
        assert f"[{engine}]" in lab.read(ENGINE)
    assert errno_of(lab.write, ENGINE, "zen3-2025") == errno.EINVAL
    assert "[ideal]" in lab.read(ENGINE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_configured_profile_is_the_first_engine(engine: str) -> None:
    assert f"[{engine}]" in Lab((32,), profile=engine).read(ENGINE)


def test_the_profile_says_what_its_constants_are_worth() -> None:
    lab = Lab((32,))
    lines = lab.read(f"{DEBUGFS}/profile").splitlines()
    assert lines[0].startswith("upmem-v1a: ")
    found = {line.split()[0]: line.split()[1:4] for line in lines[1:]}
    assert found["device.launch_overhead_us"] == ["35", "us", "estimate:"]
    assert found["device.dma_read_fixed_cycles"] == ["77", "cycles", "published:"]
    assert found["cpu.metadata.metadata_ns"] == ["714", "ns", "fitted:"]
    lab.write(ENGINE, "ptdma")
    assert lab.read(f"{DEBUGFS}/profile").startswith("ptdma: ")
    assert Lab((32,), nr_ranks=None).read(f"{DEBUGFS}/profile").startswith("No model")


@pytest.mark.slow
@pytest.mark.parametrize("nr_ranks", [None, 0], ids=["no device", "no rank"])
def test_without_a_rank_there_are_the_cpu_s_engines(nr_ranks: int | None) -> None:
    lab = loaded_lab(nr_ranks=nr_ranks)
    assert "[cpu]" in lab.read(ENGINE)
    assert errno_of(lab.write, ENGINE, "ideal") == errno.ENODEV
    assert "[cpu]" in lab.read(ENGINE)
    lab.write(ENGINE, "cpu-batched")
    lab.compact()
    lab.assert_at_rest()
    assert lab.stats()["cpu_pages_moved"] > 2000
    assert {line[3] for line in regions(lab)} == {"cpu-batched"}


@pytest.mark.slow
def test_batches_in_flight_end_on_the_engine_they_began_with() -> None:
    patch = small_slices(4096)
    try:
        lab = Lab((64,), patience=3)
        lab.sysctl(dpu_compact_region_order=11)
        lab.spawn("a", anon="40M", holes="50 seed=1")
        compaction = lab.start_compact()
        while not lab.vm.in_flight:
            assert not advance(compaction)[0]
        lab.write(ENGINE, "ideal")
        assert settle([compaction]) == [1]
    finally:
        patch.undo()
    lines = regions(lab)
    engines = [line[3] for line in lines]
    assert engines[0] == "upmem-v1a"
    assert engines[-1] == "ideal"
    assert {line[3]: int(line[4]) > 0 for line in lines} == {"upmem-v1a": True, "ideal": False}
    lab.assert_at_rest()


@pytest.mark.parametrize("nr_steps", [1, 2, 3, 5, 8, 13, 21])
@pytest.mark.parametrize("engine", OF_THE_CPU)
@pytest.mark.slow
def test_an_interrupted_engine_leaves_nothing_behind(engine: str, nr_steps: int) -> None:
    patch = small_slices(300)
    try:
        lab = loaded_lab(engine)
        compaction = lab.start_compact()
        for _ in range(nr_steps):
            advance(compaction)
        compaction.close()
        lab.assert_at_rest()
    finally:
        patch.undo()


def test_the_modelled_time_of_a_region_is_the_sum_of_its_parts() -> None:
    """Figures of dpu.md 6: 714 ns of metadata a page, 384 ns to copy it, 1.2 us a flush on 2 CPUs, 30 ns a frame."""
    lab = Lab((32,))
    lab.sysctl(dpu_compact_region_order=18)
    lab.write(ENGINE, "cpu-batched")
    lab.spawn("a", anon="8M", holes="50 seed=1")
    lab.compact()
    ((_, nr, retired, engine, device_ns, total_ns, _, error),) = [line for line in regions(lab) if int(line[1]) > 500]
    assert (retired, engine, error) == (nr, "cpu-batched", "-")
    assert int(device_ns) == pytest.approx(int(nr) * 4096 / 10.67, abs=1)
    nr_scanned = 8192 - 4096  # the DMA32 zone
    assert int(total_ns) == pytest.approx(int(nr) * (714 + 4096 / 10.67) + 1200 + 30 * nr_scanned, rel=1e-4)


@pytest.mark.slow
def test_in_a_batch_pages_wait_for_all_others_in_a_cluster_for_32() -> None:
    """Nobody waits for less than the device; in a cluster, 32 pages at 1098 ns and two flushes are the most."""
    batched, clusters = loaded_lab("cpu-batched"), loaded_lab("cpu")
    for lab in (batched, clusters):
        lab.compact()
    count, p50, *_, longest = table(batched, "unavailable")["cpu-batched", "modelled"]
    assert count == batched.stats()["cpu_pages_moved"]
    assert table(batched, "batch_size")["cpu-batched", "pages"][-1] > 1000
    assert p50 > 1000 * 384
    assert longest < max(int(line[5]) for line in regions(batched))
    count, *_, longest = table(clusters, "unavailable")["cpu", "modelled"]
    assert count == clusters.stats()["cpu_pages_moved"]
    assert table(clusters, "batch_size")["cpu", "pages"][-1] == 32
    assert longest < 32 * 1098 + 2 * 1200


def test_a_huge_page_that_moves_alone_is_away_for_one_unmapping_and_one_copy() -> None:
    """By the figures above: 714 ns of metadata for the folio, a flush, 512 pages of 384 ns; for each of its pages."""
    lab = Lab((64,))
    lab.sysctl(dpu_compact_region_order=18)
    lab.write(ENGINE, "cpu")
    lab.spawn("low", anon="20M")
    lab.spawn("huge", thp="1", anon="8M")
    lab.set("low", anon="0")
    lab.compact()
    nr_moved = lab.stats()["thp_moved"]
    assert nr_moved == 4
    count, p50, *_, longest = table(lab, "unavailable")["cpu", "modelled"]
    assert count >= nr_moved * 512
    assert 512 * 4096 / 10.67 < longest <= 714 + 1200 + 512 * 4096 / 10.67 + 32 * 1098
    assert p50 == pytest.approx(longest, rel=1 / 16)
    assert table(lab, "batch_size")["cpu", "pages"][-1] >= 512
    ((_, nr, *_),) = [line for line in regions(lab) if int(line[1]) >= nr_moved]
    assert int(nr) < 512  # folios, not pages


@pytest.mark.slow
def test_a_fault_is_in_the_table_of_regions_and_the_cpu_behind_it() -> None:
    lab = loaded_lab(words="stamp")
    lab.arm(FaultKind.DPU_FAULT, 50)
    lab.compact()
    failed = next(nr for nr, line in enumerate(regions(lab)) if line[7] != "-")
    line, after = regions(lab)[failed : failed + 2]
    assert (line[2], line[3], line[7]) == ("50", "upmem-v1a", "dpu is in fault")
    assert (after[0], after[3]) == (line[0], "cpu")
    assert int(after[1]) == int(line[1]) - 50


def test_modelled_ns_is_the_sum_over_regions() -> None:
    lab = loaded_lab("dsa", words="stamp")
    lab.arm(FaultKind.TIMEOUT, 20)
    lab.compact()
    assert lab.stats()["modelled_ns"] == sum(int(line[5]) for line in regions(lab)) > 10_000_000  # the timeout


def test_gained_huge_pages_are_what_buddyinfo_gained() -> None:
    lab = loaded_lab(words="stamp")

    def nr_huge() -> int:
        orders = lab.mem.zones["nr_free"].sum(axis=(0, 2))
        return int(orders[9] + 2 * orders[10])

    before = nr_huge()
    lab.compact()
    stats = lab.stats()
    assert stats["runs"] == 2  # zones DMA and DMA32
    assert stats["huge_pages_gained"] == nr_huge() - before > 0
    assert stats["pages_per_huge_page"] == stats["pages_moved"] // stats["huge_pages_gained"]


# The adaptive choice.


def adaptive_lab(engine: str, seed: int = 3) -> Lab:
    lab = Lab((256,))
    lab.sysctl(dpu_compact_adaptive=1)
    lab.write(ENGINE, engine)
    lab.spawn("a", anon="180M", holes=f"50 seed={seed}")
    lab.compact()
    lab.assert_at_rest()
    return lab


def told(lab: Lab) -> list[str]:
    return [line for line in lab.machine.printk.lines() if " takes " in line]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ideal", "ptdma", "dsa"])
def test_an_engine_that_gains_is_used(engine: str) -> None:
    lab = adaptive_lab(engine)
    stats = lab.stats()
    assert stats["breakeven_pages"] >= 1
    assert stats["adaptive_dpu"] > 10 * stats["adaptive_cpu"] > 0
    assert told(lab)[0].endswith("pages on")
    assert told(lab)[0].startswith(f"DPU: {engine} takes ")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["upmem-v1a", "seed"])
def test_an_engine_that_does_not_gain_is_left_alone_but_tried_again(engine: str) -> None:
    """2 MiB regions: several launches of 35 us each for 250 pages; 3.7 us a page."""
    lab = adaptive_lab(engine)
    stats = lab.stats()
    assert stats["breakeven_pages"] == -1
    assert stats["adaptive_cpu"] > 10 * stats["adaptive_dpu"] > 0
    assert told(lab)[-1].endswith("using the CPU")
    tried = stats["adaptive_dpu"]
    lab.set("a", holes="60 seed=5")
    lab.compact()
    assert lab.stats()["adaptive_dpu"] > tried


@pytest.mark.slow
def test_the_adaptive_choice_is_the_same_each_time() -> None:
    first, second = (adaptive_lab("upmem-v1a", seed=8) for _ in range(2))
    assert told(first) == told(second)
    assert [line[:6] for line in regions(first)] == [line[:6] for line in regions(second)]


@pytest.mark.slow
def test_off_is_the_rule_of_min_fragments_alone() -> None:
    lab = Lab((64,))
    lab.write(ENGINE, "seed")
    lab.spawn("a", anon="40M", holes="50 seed=3")
    lab.compact()
    stats = lab.stats()
    assert (stats["adaptive_dpu"], stats["adaptive_cpu"], stats["breakeven_pages"]) == (0, 0, 0)
    assert stats["regions"] > 10
