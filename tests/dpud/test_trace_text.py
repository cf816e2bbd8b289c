# SPDX-License-Identifier: GPL-2.0-only
"""Text traces, real ones and made-up ones. The real ones (tests/data/traces) were taken by ftrace, trace-cmd and perf
at the same time, of one program whose name is meant to confuse: `a [b] c:1-2`."""

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dpud.trace_text import TraceError, TraceReader
from kernelsim.trace_scan import ALLOC, EXTFRAG, FREE, LOST, MIGRATED, NR_GFP_TEXTS, UNREAD, event_dtype, scan_lines

TRACES = Path(__file__).parent.parent / "data" / "traces"
FORMATS = ("ftrace", "trace-cmd", "perf")
WHAT = ["kind", "pfn", "order", "migratetype", "gfp", "cpu"]


def read(path: Path) -> Any:
    return np.concatenate([*TraceReader(path).batches()])


@pytest.fixture
def trace(tmp_path: Path) -> Any:
    """Reads a text as a trace."""

    def reader(text: str | bytes) -> Any:
        path = tmp_path / "trace"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read(path)

    return reader


def text_of(name: str) -> str:
    return zstandard.ZstdDecompressor().stream_reader((TRACES / f"{name}.txt.zst").open("rb")).read().decode()


# Real ones.


def test_three_tracers_saw_the_same_events() -> None:
    """On each CPU; how the CPUs' events come to lie between each other is a matter of each tracer's clock readings."""
    each = [read(TRACES / f"{name}.txt.zst") for name in FORMATS]
    ftrace, trace_cmd, perf = (events[np.argsort(events["cpu"], kind="stable")] for events in each)
    for other in (trace_cmd, perf):
        assert other[WHAT].tolist() == ftrace[WHAT].tolist()
        assert abs(other["time_ns"] - ftrace["time_ns"]).max() < 50_000  # each read the clock for itself


@pytest.mark.parametrize("name", FORMATS)
def test_every_event_of_a_real_trace_is_read(name: str) -> None:
    text = text_of(name)
    events = read(TRACES / f"{name}.txt.zst")
    assert np.count_nonzero(events["kind"] == ALLOC) == text.count(" pfn=") - text.count("mm_page_free:")
    assert np.count_nonzero(events["kind"] == FREE) == text.count("mm_page_free:")
    assert events["pfn"].tolist() == [int(pfn, 16) for pfn in re.findall(r" pfn=0x([0-9a-f]+)", text)]
    assert (events["order"] == 9).sum() == text.count(" order=9")


def test_gfp_flags_are_masks_of_the_real_kernel() -> None:
    """include/linux/gfp_types.h: DIRECT_RECLAIM 0x400, KSWAPD_RECLAIM 0x800, IO 0x40, FS 0x80, ..."""
    text = " a-1 [000] 1.000000: mm_page_alloc: page=1 pfn=0x1 order=0 migratetype=0 gfp_flags=GFP_KERNEL"
    (line,) = [line for line in text_of("perf").splitlines() if " order=9 mig" in line]
    assert line.endswith("gfp_flags=GFP_TRANSHUGE|__GFP_NORETRY|__GFP_THISNODE")
    events = read(TRACES / "perf.txt.zst")
    assert events["gfp"][(events["kind"] == ALLOC) & (events["order"] == 9)].tolist() == [0x3D24CA | 0x10000]
    assert TraceReader(Path("x")).read_line(text)[3] == 0xCC0  # type: ignore[index]


# Made-up ones.

COMM = st.text(st.characters(codec="ascii", exclude_characters="\n\r\0"), min_size=1, max_size=15)


@st.composite
def lines(draw: Any) -> tuple[str, tuple[int, ...]]:
    """A line as one of the three programs prints it, and what it says: kind, pfn, order, migratetype, gfp, cpu, ns."""
    comm, pid = draw(COMM), draw(st.integers(0, 4_194_304))
    cpu, usecs = draw(st.integers(0, 511)), draw(st.integers(0, 10**12))
    pfn, order, migratetype = draw(st.integers(1, 1 << 36)), draw(st.integers(0, 10)), draw(st.integers(0, 5))
    free = draw(st.booleans())
    name = "mm_page_free" if free else "mm_page_alloc"
    number = draw(st.sampled_from((f"{pfn:#x}", str(pfn))))
    page = draw(st.sampled_from(("00000000ab12cd34", "0xffffea0000", "(____ptrval____)")))
    text = f"page={page} pfn={number} order={order}"
    if not free:
        text += f" migratetype={migratetype} gfp_flags=GFP_KERNEL|__GFP_ZERO"
    time = f"{usecs // 10**6}.{usecs % 10**6:06d}"
    flags = draw(st.sampled_from((" .....", " d..2.", " dNh1", "")))
    line = draw(
        st.sampled_from(
            (
                f"{comm:>16}-{pid:<7} [{cpu:03d}]{flags} {time:>12}: {name}: {text}",
                f"{comm:>16}-{pid:<5} [{cpu:03d}] {time:>12}: {name + ':':<22}{text}",
                f"{comm:>16} {pid:>5} [{cpu:03d}] {time:>12}: {'kmem:' + name:>25}: {text}",
                f"{comm:>16}-{pid:<7} (  {pid}) [{cpu:03d}] {time:>12}: {name}: {text}",
            )
        )
    )
    said = (FREE if free else ALLOC, pfn, order, 0 if free else migratetype, 0 if free else 0xDC0, cpu, usecs * 1000)
    return line, said


@pytest.mark.slow
@given(lines())
def test_both_readers_read_what_was_printed(case: tuple[str, tuple[int, ...]]) -> None:
    """The scanner may leave a line to the other reader; what it reads, it reads right."""
    line, said = case
    rows = np.zeros(1, dtype=event_dtype)
    hashes, places = np.zeros(NR_GFP_TEXTS, dtype=np.uint64), np.zeros((NR_GFP_TEXTS, 2), dtype=np.int64)
    text = np.frombuffer(line.encode() + b"\n", dtype=np.uint8)
    assert scan_lines(text, rows.view(np.recarray), hashes, places) == (1, len(text))
    if rows["kind"][0] != UNREAD:
        fast = [int(rows[name][0]) for name in ("kind", "pfn", "order", "migratetype", "cpu", "time_ns")]
        assert fast == [*said[:4], *said[5:]]
        if said[0] == ALLOC:
            start, length = places[int(rows["gfp"][0])]
            assert line[start : start + length] == "GFP_KERNEL|__GFP_ZERO"
    time_ns, pfn, _nr, gfp, cpu, kind, order, migratetype = TraceReader(Path("x")).read_line(line)  # type: ignore[misc]
    assert (kind, pfn, order, migratetype, gfp, cpu, time_ns) == said


def test_the_scanner_reads_the_usual_lines_itself() -> None:
    for name in FORMATS:
        text = np.frombuffer(text_of(name).encode(), dtype=np.uint8)
        rows = np.zeros(int((text == 10).sum()), dtype=event_dtype).view(np.recarray)
        scan_lines(text, rows, np.zeros(NR_GFP_TEXTS, dtype=np.uint64), np.zeros((NR_GFP_TEXTS, 2), dtype=np.int64))
        assert np.count_nonzero(rows["kind"] == UNREAD) == text_of(name).count("\n") - 763  # the headers


LINE = " sh-7 [001] .....   3.000005: mm_page_alloc: page=0000abcd pfn=0x1f order=2 migratetype=1 gfp_flags=GFP_USER"


@pytest.mark.slow
@given(st.integers(0, len(LINE) - 1), st.booleans())
def test_a_line_that_is_cut_off(at: int, last: bool) -> None:
    """At the end of a file it is left out, or is an event in what is left of it; in the middle it may be an error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        cut = LINE[:at]
        path.write_text(f"{LINE}\n{cut}" if last else f"{LINE}\n{cut}\n{LINE}\n")
        reader = TraceReader(path)
        if not last and "mm_page_alloc" in cut and "gfp_flags=G" not in cut:
            with pytest.raises(TraceError, match=rf"^{path}:2: "):
                list(reader.batches())
            return
        events = np.concatenate([*reader.batches()])
        whole = [row for row in events.tolist() if row[1] == 0x1F and row[5] == ALLOC]
        assert len(whole) >= (1 if last else 2)
        assert reader.notes.is_cut == (last and "mm_page_alloc" in cut and "gfp_flags=G" not in cut)


def test_fields_in_another_order_and_unknown_ones(trace: Any) -> None:
    text = " sh-7 [001] 3.000005: mm_page_alloc: migratetype=1 gfp_flags=GFP_USER|__GFP_COLD node=3 order=2 pfn=77"
    assert trace(text + " page=1\n")[WHAT].tolist() == [(ALLOC, 77, 2, 1, 0x100CC0, 1)]


TAIL = "page=0x1f404 pfn=0x1f404 order=0 migratetype=1 gfp_flags=GFP_USER"


@pytest.mark.parametrize(
    ("line", "time_ns"),
    [
        (
            f"      sh-4850    3..... 55254.912816: mm_page_alloc:        {TAIL}",
            55254_912816_000,
        ),  # trace-cmd report -l
        (f"  sh-4850  [003] 55254.912816: (+11742) mm_page_alloc:        {TAIL}", 55254_912816_000),  # --ts-diff
        (f"  sh-4850  [003] 55254.912816:          mm_page_alloc:        {TAIL}", 55254_912816_000),
        (f"    sh-4850      3d..1.   17us : mm_page_alloc: {TAIL}", 17_000),  # the option latency-format
        (f"    sh-4850      3.N.1.   17us+: mm_page_alloc: {TAIL}", 17_000),
        (
            f"sh  4850 [003] 7.000002:          1     kmem:mm_page_alloc: {TAIL}",
            7_000_002_000,
        ),  # perf script -F +period
        (f"sh  4850 [003] 7.000002:     kmem:mm_page_alloc:k: {TAIL}", 7_000_002_000),  # perf record -e kmem:..:k
        (f"sh-4850 [003] d..1. 7.000002: mm_page_alloc: {TAIL.replace('GFP_USER', '1051840')}", 7_000_002_000),
        (  # the option fields
            "sh-4850 [003] d..1. 7.000002: mm_page_alloc: migratetype=0x1 (1) gfp_flags=0x100cc0 (1051840) "
            "order=0x0 (0) pfn=0x1f404 (128004)",
            7_000_002_000,
        ),
    ],
)
def test_other_options_of_the_programs(trace: Any, line: str, time_ns: int) -> None:
    events = trace(line + "\n")
    assert events[WHAT].tolist() == [(ALLOC, 0x1F404, 0, 1, 0x100CC0, 3)]
    assert events["time_ns"].tolist() == [time_ns]


@pytest.mark.parametrize("page", ["(null)", "0000000000000000", "0x0", "(nil)"])
def test_an_allocation_that_failed(trace: Any, page: str) -> None:
    text = f" sh-7 [001] 3.000005: mm_page_alloc: page={page} pfn=0x0 order=9 migratetype=1 gfp_flags=GFP_TRANSHUGE\n"
    assert trace(text)[["kind", "pfn", "order"]].tolist() == [(ALLOC, -1, 9)]


@pytest.mark.parametrize(
    ("line", "kind", "nr"),
    [
        ("CPU:1 [LOST 5 EVENTS]", LOST, 5),
        ("CPU:0 [12 EVENTS DROPPED]", LOST, 12),
        ("CPU:0 [EVENTS DROPPED]", LOST, 1),
        ("  sh 7 [001] 3.1: PERF_RECORD_LOST lost 44", LOST, 44),
        (" k-1 [000] ..... 1.000001: mm_compaction_migratepages: nr_migrated=31 nr_failed=1", MIGRATED, 31),
        (
            " k-1 [000] d..3. 1.000001: mm_page_alloc_extfrag: page=1 pfn=0x2c1800 alloc_order=0 fallback_order=10 "
            "pageblock_order=9 alloc_migratetype=2 fallback_migratetype=1 fragmenting=0 change_ownership=1",
            EXTFRAG,
            0,
        ),
    ],
)
def test_other_lines_that_count(trace: Any, line: str, kind: int, nr: int) -> None:
    events = trace(f"{line}\n")
    assert events[["kind", "nr"]].tolist() == [(kind, nr)]
    assert kind != EXTFRAG or events[["order", "migratetype"]].tolist() == [(10, 2)]


def test_events_behind_later_ones_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in per_cpu/cpu0/trace and per_cpu/cpu1/trace, one after the other; in as many chunks as you like."""
    monkeypatch.setattr("dpud.trace_text.CHUNK_BYTES", 200)
    times = [*range(1, 6), *range(3, 8)]
    lines = [LINE.replace("3.000005", f"{second}.000005") for second in times]
    lines.insert(7, "CPU:1 [LOST 5 EVENTS]")
    (tmp_path / "trace").write_text("\n".join(lines))
    reader = TraceReader(tmp_path / "trace")
    assert len(np.concatenate([*reader.batches()])) == 11
    assert reader.notes.nr_late == 2  # 3 and 4: they came after 5


def test_what_is_no_event_is_passed_over(trace: Any) -> None:
    noise = (
        "# tracer: nop\n\n\tffffffff81234567 __alloc_pages+0x1 ([kernel.kallsyms])\ncpus=2\n"
        " sh-7 [0] 1.000000: sched_switch: prev=mm_page_free\n"
    )
    assert len(trace(noise + LINE + "\n" + noise)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "no mm_page_alloc"),
        (b"hello\n", "no mm_page_alloc"),
        (b"PERFILE2 and so on", "perf script"),
        (b"\x17\x08Dtracing6\0", "trace-cmd report"),
        (b"\x1f\x8b\x08\0", "a gzip file"),
        (b"\0\0\0", "not text"),
        (b"\x28\xb5\x2f\xfdxxxxxxxxxx", "broken zstd"),
        (b"x" * 100_000, "a line of more than"),
        (b" sh-7 [001] 1.5: mm_page_free: page=1 pfn=0x1 order=0\n", ":1: an event without a CPU"),
        (b"\n sh-7 [001] 1.000000: mm_page_free: page=1 pfn=0x1\n\n", ":2: mm_page_free without order"),
        (
            b" sh-7 [001] 1.000000: mm_page_free: page=1 pfn=0x1 order=11\n",
            ":1: mm_page_free: order=11 is more than 10",
        ),
        (b" sh-7 [001] 1.000000: mm_page_free: page=1 pfn=zero order=1\n", ":1: mm_page_free: pfn is not a number"),
        (b" sh-7 [001] 1.000000: mm_page_free: page=1 pfn=0xfffffffffffff order=1\n", "is more than"),
    ],
)
def test_a_bad_trace_is_one_line(trace: Any, tmp_path: Path, text: bytes, problem: str) -> None:
    with pytest.raises(TraceError) as failed:
        trace(text)
    assert str(failed.value).startswith(str(tmp_path / "trace"))
    assert problem in str(failed.value)
    assert "\n" not in str(failed.value)


@pytest.mark.slow
@given(st.lists(st.one_of(st.binary(max_size=200), lines().map(lambda case: case[0].encode())), max_size=5))
def test_any_bytes_are_events_or_an_error(parts: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        path.write_bytes(b"\n".join(parts))
        try:
            events = read(path)
        except TraceError:
            return
        assert (events["order"] <= 10).all()
        assert (events["pfn"] >= -1).all()


def test_chunks_end_where_they_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(TRACES / "ftrace.txt.zst").tolist()
    monkeypatch.setattr("dpud.trace_text.CHUNK_BYTES", 997)
    (tmp_path / "trace").write_text(text_of("ftrace"))
    assert read(tmp_path / "trace").tolist() == whole
