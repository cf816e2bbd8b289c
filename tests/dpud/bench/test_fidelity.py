# SPDX-License-Identifier: GPL-2.0-only
"""`dpud bench fidelity`: what it reads, what it holds against what, and what it says."""

from pathlib import Path

import pytest
from captures import Machine, machine

from dpud import bench
from dpud.bench import fidelity
from dpud.bench.fidelity import Comparison, parse_result, read_case
from dpud.errors import UserError
from dpud.proctext import CaptureError

RESULT = """pattern random
mb 64
keep_percent 50
pgmigrate_success {}
pgmigrate_fail 0
compact_migrate_scanned 4096
compact_free_scanned 0
seconds 0.000100
ns_per_page inf
"""


def write_case(folder: Path, built: Machine, result: str) -> None:
    built.write(folder / "before", compressed=True)
    built.write(folder / "after", compressed=True)
    (folder / "result.txt").write_text(result)


@pytest.fixture
def case(tmp_path: Path) -> Path:
    built = machine(4, nr_blocks=12)
    write_case(tmp_path / "case", built, RESULT.format(0))
    return tmp_path / "case"


def figures(folder: Path) -> dict[str, Comparison]:
    rows = fidelity.run(str(folder)).figures
    assert all(isinstance(row, Comparison) for row in rows)
    return {row.what: row for row in rows if isinstance(row, Comparison)}


@pytest.mark.slow
def test_counts_and_free_blocks_of_each_zone_are_compared(case: Path) -> None:
    found = figures(case)
    assert found["pages the migrate scanner looked at"].real == 4096
    assert found["pages migrated"].judged
    orders = [9, 10]
    for order in orders:
        zone = found[f"node 0 Normal: free blocks of order {order}"]
        line = next(text for text in (case / "after" / "buddyinfo").read_text().splitlines() if "Normal" in text)
        assert zone.real == int(line.split()[4 + order])
        assert zone.judged
    assert not any(row.judged for what, row in found.items() if what.endswith("order 3"))
    assert "pages isolated" not in found  # hostfrag.c did not write it


@pytest.mark.slow
def test_the_machine_that_is_compacted_is_that_of_before(case: Path) -> None:
    """Our counts come from a compaction of it: they are those of a machine on which the same is done by hand."""
    from dpud.capture import read_capture
    from dpud.physmem import PhysMem
    from kernelsim.machine import Machine as Emulated

    emulated = Emulated.from_image(read_capture(case / "before"), alloc_words=PhysMem().alloc)
    emulated.registry.write("/proc/sys/vm/compact_memory", "1")
    lines = emulated.registry.read("/proc/vmstat").decode().splitlines()
    counters = dict(line.split() for line in lines)
    found = figures(case)
    assert found["pages migrated"].ours == int(counters["pgmigrate_success"]) > 0
    assert found["pages the migrate scanner looked at"].ours == int(counters["compact_migrate_scanned"])


@pytest.mark.slow
def test_it_says_what_was_inferred(case: Path) -> None:
    notes = "\n".join(fidelity.run(str(case)).notes)
    for said in ("real run: pattern random, mb 64", "pageblocks have which type", "pinned", "ran on CPU 0", "LRU"):
        assert said in notes


@pytest.mark.slow
def test_the_cpu_of_the_real_run_is_taken_over(case: Path) -> None:
    (case / "result.txt").write_text(RESULT.format(0) + "cpu 0\n")
    notes = "\n".join(fidelity.run(str(case)).notes)
    assert "ran on CPU" not in notes
    assert "cpu 0" in notes


@pytest.mark.parametrize(
    ("real", "ours", "verdict", "error"),
    [(100, 105, "met", "+5.0 %"), (100, 94, "missed", "-6.0 %"), (0, 0, "met", "+0.0 %"), (0, 1, "missed", "")],
)
def test_the_verdict_is_a_relative_error_of_five_percent(real: int, ours: int, verdict: str, error: str) -> None:
    row = Comparison("x", real, ours, judged=True)
    assert (row.verdict, row.cells()[3]) == (verdict, error)
    assert Comparison("x", real, ours, judged=False).verdict == ""


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["before", "after", "result.txt"])
def test_a_folder_that_is_no_case_is_one_line(case: Path, gone: str) -> None:
    (case / gone).rename(case / "elsewhere")
    with pytest.raises(UserError, match=f"has no `{gone}`"):
        fidelity.run(str(case))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no count pgmigrate_success"),
        (RESULT.format("many"), "no count pgmigrate_success"),
        ("gibberish\n", "not a `name value` line"),
    ],
)
def test_a_broken_result_is_one_line(text: str, said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        parse_result(text)


@pytest.mark.slow
def test_binary_or_endless_files_are_one_line(case: Path) -> None:
    (case / "result.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CaptureError, match=r"result\.txt: not text"):
        read_case(case)
    (case / "result.txt").write_bytes(b"x" * (1 << 20))
    with pytest.raises(CaptureError, match=r"result\.txt: more than"):
        read_case(case)


def test_a_missing_folder_is_one_line() -> None:
    with pytest.raises(UserError, match="/nowhere: no such folder"):
        fidelity.run("/nowhere")


def test_without_a_case_it_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "DEMO", tmp_path)
    report = fidelity.run()
    assert report.figures == []
    assert any("dpud snapshot --compact DIR" in note for note in report.notes)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["fidelity"], [("fidelity",)]),
        (["fidelity", "a", "b"], [("fidelity", "a"), ("fidelity", "b")]),
        (["region", "fidelity", "a", "node"], [("region",), ("fidelity", "a"), ("node",)]),
    ],
)
def test_folders_follow_the_benchmark_they_are_for(words: list[str], wanted: list[tuple[str, ...]]) -> None:
    assert bench._parse(words) == wanted


@pytest.mark.parametrize("words", [["a"], ["region", "a"], ["fidelity", "a", "region", "b"]])
def test_a_word_that_is_neither_is_an_error(words: list[str]) -> None:
    with pytest.raises(UserError, match="no benchmark"):
        bench._parse(words)
