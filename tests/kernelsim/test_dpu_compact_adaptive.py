# SPDX-License-Identifier: GPL-2.0-only
"""The running fit, and the choice that is made by it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelsim.dpu_compact_adaptive import NO_BREAK_EVEN, PROBE_PERIOD, Adaptive, Cost, breakeven


def cost(batch_ns: int, page_ns: int, sizes: tuple[int, ...] = (32, 200, 512, 100, 4096)) -> Cost:
    result = Cost()
    for nr_pages in sizes:
        result.add(nr_pages, batch_ns + page_ns * nr_pages)
    return result


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(1, 10**5), st.lists(st.integers(1, 10**5), min_size=2, max_size=30))
def test_a_straight_line_is_found(batch_ns: int, page_ns: int, sizes: list[int]) -> None:
    if max(sizes[-2:]) < 2 * min(sizes[-2:]):
        return
    found_batch, found_page = cost(batch_ns, page_ns, tuple(sizes)).fit()
    for nr_pages in sizes[-2:]:
        assert found_batch + found_page * nr_pages == pytest.approx(batch_ns + page_ns * nr_pages, rel=1e-3, abs=1)


def test_one_size_tells_nothing_of_the_batch() -> None:
    assert cost(35_000, 200, (512, 512, 512)).fit() == (0.0, pytest.approx(200 + 35_000 / 512))


def test_old_figures_fade() -> None:
    running = cost(0, 100, (512,) * 50)
    for _ in range(50):
        running.add(512, 512 * 300)
    assert running.fit()[1] == pytest.approx(300, rel=0.01)


@pytest.mark.parametrize(
    ("engine", "cpu", "pages"),
    [
        ((35_000, 195), (0, 384), 186),  # dpu.md 6: 64 DPUs against one core's memcpy
        ((35_000, 312), (0, 384), 487),  # 40 DPUs
        ((35_000, 400), (0, 384), NO_BREAK_EVEN),
        ((10, 100), (1000, 200), 1),
    ],
)
def test_breakeven(engine: tuple[int, int], cpu: tuple[int, int], pages: int) -> None:
    assert breakeven(cost(*engine), cost(*cpu)) == pages


class World:
    """Regions of given sizes, each done before the next by the path that is chosen."""

    def __init__(self, engine: tuple[int, int], cpu: tuple[int, int]) -> None:
        self.adaptive = Adaptive()
        self.costs = {"x": engine, "cpu": cpu}
        self.news: list[str] = []

    def region(self, nr_pages: int) -> str:
        number = self.adaptive.begin(0)
        path = "x" if self.adaptive.use_engine("x", "modelled", nr_pages) else "cpu"
        if self.adaptive.news:
            self.news.append(self.adaptive.news)
        batch_ns, page_ns = self.costs[path]
        self.adaptive.sample(number, path, nr_pages, batch_ns + page_ns * nr_pages, 0)
        return path


def test_large_batches_go_to_the_engine_and_small_ones_to_the_cpu() -> None:
    world = World((35_000, 714 + 195), (0, 714 + 384))
    for nr_pages in (64, 64, 512, 512, 128):
        world.region(nr_pages)
    assert world.adaptive.breakeven_pages == pytest.approx(186, abs=2)
    assert [world.region(nr_pages) for nr_pages in (32, 100, 300, 4096)] == ["cpu", "cpu", "x", "x"]
    assert len(world.news) == 1
    assert "x takes 35000 ns + 909 ns/page" in world.news[0]


@pytest.mark.slow
def test_a_change_is_noticed_by_probing_and_told_once() -> None:
    world = World((0, 500), (0, 1000))
    paths = [world.region(512) for _ in range(10)]
    assert paths[4:] == ["x"] * 6
    world.costs["cpu"] = (0, 100)
    paths = [world.region(512) for _ in range(40 * PROBE_PERIOD)]
    assert paths[-2 * PROBE_PERIOD :].count("cpu") == 2 * PROBE_PERIOD - 2
    assert [news.rpartition(": ")[2] for news in world.news] == ["using x from 1 pages on", "using the CPU"]


def test_regions_that_may_not_be_done_are_not_looked_at() -> None:
    adaptive = Adaptive()
    for _ in range(3):
        number = adaptive.begin(2)
        adaptive.sample(number, "x", 512, 10, 10)
        adaptive.sample(number, "cpu", 512, 1000, 1000)
    assert adaptive.use_engine("x", "modelled", 512)  # region 3 knows of none yet
    assert adaptive.breakeven_pages == 0
    for _ in range(2):
        adaptive.begin(2)
    assert adaptive.use_engine("x", "modelled", 512)
    assert adaptive.breakeven_pages == 1


def test_the_first_region_by_the_wall_clock_is_a_warm_up() -> None:
    adaptive = Adaptive()
    for ns in (10**9, 1000, 1000, 1000):
        number = adaptive.begin(0)
        adaptive.sample(number, "x", 10, 500, ns)
        adaptive.sample(number, "cpu", 10, 700, ns * 2)
    adaptive.begin(0)
    assert adaptive.use_engine("x", "wall", 10)
    assert adaptive.news == "x takes 0 ns + 100 ns/page, the CPU 0 ns + 200 ns/page: using x from 1 pages on"
