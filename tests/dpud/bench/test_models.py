# SPDX-License-Identifier: GPL-2.0-only
"""`dpud bench tables` and `breakeven` against figures typed from reference dpu.md 0, 2.2, 2.3 and 6."""

import pytest

from dpud.bench import breakeven, engines, tables
from dpud.dpu.profile import Work, load_cpu, load_profile

# GB/s as published; whether the model is meant for the row.
PUBLISHED = {
    "Zi Yan 2019, 1 x 4K": 0.312,
    "Zi Yan 2019, 1 x 4K, copy only": 1.385,
    "Zi Yan 2019, 512 x 4K": 0.854,
    "Zi Yan 2019, 512 x 4K, copy only": 1.983,
    "AMD V3, 4K, vanilla": 3.73,
    "AMD V3, 2M, vanilla": 10.67,
    "AMD V3, 4K, CPU threads: 1": 3.84,
    "AMD V3, 4K, CPU threads: 2": 4.04,
    "AMD V3, 4K, CPU threads: 4": 4.72,
    "AMD V3, 4K, CPU threads: 8": 4.91,
    "AMD V3, 4K, CPU threads: 12": 4.84,
    "AMD V3, 4K, CPU threads: 16": 4.77,
    "AMD V3, 4K, PTDMA channels: 1": 2.75,
    "AMD V3, 4K, PTDMA channels: 2": 3.35,
    "AMD V3, 4K, PTDMA channels: 4": 4.01,
    "AMD V3, 4K, PTDMA channels: 8": 4.46,
    "AMD V3, 4K, PTDMA channels: 12": 4.60,
    "AMD V3, 4K, PTDMA channels: 16": 4.61,
    "AMD, copying in move_pages, 512 x 4K": 35,
    "AMD, copying in move_pages, 512 x 2M": 97,
}
NOT_COVERED = {
    "Zi Yan 2019, THP": 2.387,
    "Zi Yan 2019, THP, copy only": 2.481,
    "AMD V3, 16K, vanilla": 5.53,
    "AMD V3, 64K, vanilla": 5.90,
    "AMD V3, 128K, vanilla": 6.34,
    "AMD V3, 256K, vanilla": 6.50,
    "AMD V3, 512K, vanilla": 6.86,
    "AMD V3, 1M, vanilla": 6.92,
    "AMD, copying in move_pages, 1 x 2M": 66,
}


@pytest.mark.parametrize("what", PUBLISHED)
def test_published_rows_come_out_within_ten_percent(what: str) -> None:
    (row,) = [row for row in tables.rows() if row.what == what]
    assert row.published == PUBLISHED[what]
    assert row.ours == pytest.approx(PUBLISHED[what], rel=0.10)
    assert (row.verdict, row.how != tables.OUTSIDE) == ("met", True)


def test_what_the_model_does_not_cover_is_shown_and_says_so() -> None:
    assert {row.what: row.published for row in tables.rows() if row.how == tables.OUTSIDE} == NOT_COVERED
    assert {row.what for row in tables.rows()} == {*PUBLISHED, *NOT_COVERED}
    assert tables.Published("x", 1.0, 1.2, tables.OUTSIDE).verdict == ""
    assert tables.Published("x", 1.0, 1.2, tables.FREE).verdict == "missed"


def test_every_fitted_row_has_its_constant_named() -> None:
    targets = {note.rpartition("fitted to ")[2] for note in tables.fitted_constants()}
    for row in tables.rows():
        assert (row.how == tables.FITTED) is (row.what.partition(":")[0] in targets)


def test_the_seed_s_table() -> None:
    """0.14 to 0.61 ms on a CPU; 1.63, 0.235 and 0.06 ms on 1, 8 and 64 DPUs; no gain like with like."""
    cells = [line.cells() for line in tables.seed_lines()]
    figures = [cell[2] for cell in cells if cell[2]]
    assert figures == [
        "1.07 - 14.1 ms", "1.68 ms", "0.615 ms", "0.141 ms", "1.63 ms", "0.235 ms", "0.06 ms", "0.358 ms", "0.93 x",
    ]  # fmt: skip
    assert cells[-1][-1].endswith("no gain")


ZEN3, UPMEM = load_cpu("zen3-2025"), load_profile("upmem-v1a")


@pytest.mark.parametrize(("nr_dpus", "pages"), [(32, None), (40, 488), (64, 185), (128, 122), (512, 97)])
def test_breakeven_batches_of_section_6(nr_dpus: int, pages: int | None) -> None:
    found = breakeven.breakeven_pages(ZEN3, 4372 / 350 * 1000 / nr_dpus, 35_000)
    assert found == (None if pages is None else pytest.approx(pages, abs=1))


def test_33_dpus_are_needed_to_beat_one_core() -> None:
    first = next(nr for nr in range(1, 100) if breakeven.breakeven_pages(ZEN3, 4372 / 350 * 1000 / nr, 35_000))
    assert first == 33


def test_amdahl_s_cap() -> None:
    assert breakeven.cap(ZEN3) == pytest.approx(1.54, abs=0.005)
    assert breakeven.cap(load_cpu("haswell-2019")) == pytest.approx(4.80 / 2.73, abs=0.005)


def test_end_to_end_at_512_pages() -> None:
    """1.12x on a Zen 3; 1.60x on a Haswell, 4.4x over a call for each page there."""
    copy_ns = breakeven.dpu_copy_ns(UPMEM, 512, 64, 35.0)
    assert copy_ns == pytest.approx(135_000, rel=0.002)
    assert breakeven.speedup(ZEN3, 512, copy_ns).startswith("1.12 (")
    (note,) = breakeven.haswell_notes(load_cpu("haswell-2019"), UPMEM)
    assert "1.60 over one batch, 4.4 over a call for each page" in note


def test_a_batch_of_32_never_gains() -> None:
    """12.3 us of copying against 47.5."""
    assert ZEN3.copy.ns(32 * 4096) == pytest.approx(12_300, rel=0.003)
    assert breakeven.dpu_copy_ns(UPMEM, 32, 64, 35.0) == pytest.approx(47_500, rel=0.001)
    rows = [line.cells() for line in breakeven.dpu_rows(ZEN3, UPMEM)]
    assert all(cells[2].startswith("no gain") for cells in rows if cells[0] == "35 us")


def test_no_engine_gains_more_than_the_cap() -> None:
    rows = [*breakeven.dpu_rows(ZEN3, UPMEM), *breakeven.engine_rows(ZEN3)]
    gains = [cell.split()[0] for line in rows for cell in line.cells()[2:-1] if not cell.startswith(("no gain", "?"))]
    assert len(gains) > 40
    assert 1.5 < max(map(float, gains)) <= 1.54


def test_packing_takes_more_waves_the_larger_the_region() -> None:
    """Of a random half, the hole in front grows with the distance: the number of waves is its logarithm."""
    small, large = (breakeven.packed(nr, 64) for nr in (512, 262144))
    assert 200 < small.nr_pages < 256
    assert 4 <= small.nr_waves < large.nr_waves <= 2 * 18
    assert UPMEM.device_ns(small) > 35_000 * small.nr_waves
    texts = [line.cells()[-1] for line in breakeven.packed_rows(ZEN3, UPMEM)]
    assert texts[0].startswith("no gain")
    assert texts[-1].startswith("1.")


def test_the_models_copy_as_the_engines_do() -> None:
    assert UPMEM.device_ns(Work(512, 1, 8, 0)) == round(breakeven.dpu_copy_ns(UPMEM, 512, 64, 35.0))


def test_reports_print_as_tables_and_markdown() -> None:
    for report in (tables.run(), breakeven.run()):
        for part in (report, *report.parts):
            assert part.table().row_count == len(part.figures) > 3
            assert all(len(row.cells()) == len(part.headings) for row in part.figures)
        assert report.markdown().count("## ") == 1 + len(report.parts)


@pytest.mark.slow
def test_every_engine_has_a_row_and_the_batched_cpu_lies_between() -> None:
    rows = {engine: engines.engine_row(engine, "60M").cells() for engine in ("cpu", "cpu-batched", "ideal")}
    per_page = {engine: int(cells[-2]) for engine, cells in rows.items()}
    assert per_page["ideal"] < per_page["cpu-batched"] < per_page["cpu"]
    away = {engine: float(cells[-3].replace(",", "")) for engine, cells in rows.items()}
    assert away["cpu"] < away["ideal"] < away["cpu-batched"]
    assert len({cells[-1] for cells in rows.values()}) == 1
    assert all(len(cells) == 9 for cells in rows.values())
