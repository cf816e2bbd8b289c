# SPDX-License-Identifier: GPL-2.0-only
"""The trace of a machine through its files, in library mode: nothing here needs a mount."""

import errno
import itertools
import os
import re

import pytest
from machines import Lab
from wiring import errno_of

from fs.kernfs import Tree
from kernelsim import trace_key
from kernelsim.operation import Operation, complete
from kernelsim.task import Current, Task

T = "/sys/kernel/tracing"
EVENTS = f"{T}/events"
COMPACT = "/sys/devices/system/node/node0/compact"

HEADER = """\
# tracer: nop
#
# entries-in-buffer/entries-written: {}   #P:2
#
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""
"""As a 6.18 kernel prints it."""


@pytest.fixture
def lab() -> Lab:
    return Lab((32,))


@pytest.fixture(autouse=True)
def _key_off() -> object:
    """The static key belongs to the process."""
    yield
    trace_key.set_key(0)
    trace_key.take_rows()


def mark(lab: Lab, text: str) -> None:
    Tree(lab.registry).open(f"{T}/trace_marker", os.O_WRONLY).write(text.encode(), 0)


def entries(lab: Lab, file: str = f"{T}/trace") -> list[str]:
    """`event: text` of each record."""
    return [line[line.index(": ") + 2 :] for line in lab.read(file).splitlines() if not line.startswith("#")]


def names(lab: Lab) -> list[str]:
    return [entry.split(":")[0] for entry in entries(lab)]


def read_pipe(lab: Lab, size: int = 4096, pos: int = 0, file: str = f"{T}/trace_pipe") -> bytes:
    """A reader who does not wait."""
    return Tree(lab.registry).open(file, 0).read(size, pos, nonblock=True)


def test_an_empty_trace_has_the_kernels_header(lab: Lab) -> None:
    assert lab.read(f"{T}/trace") == HEADER.format("0/0")


def test_a_line_has_the_kernels_columns(lab: Lab) -> None:
    lab.machine.clock.ns = 818_774_190_999
    mark(lab, "hello")
    assert lab.read(f"{T}/trace") == HEADER.format("1/1") + (
        "       kernelsim-1       [000] .....   818.774190: tracing_mark_write: hello\n"
    )
    lab.write(f"{T}/options/irq-info", "0")
    assert lab.read(f"{T}/trace").splitlines()[-2:] == [
        "#              | |         |         |         |",
        "       kernelsim-1       [000]   818.774190: tracing_mark_write: hello",
    ]
    lab.write(f"{T}/trace_options", "nocontext-info")
    assert lab.read(f"{T}/trace").splitlines()[-1] == "tracing_mark_write: hello"


def test_compaction_tells_what_it_does(lab: Lab) -> None:
    """By zone, as a real one of compact_memory: begin, rounds that each end with `finished`, end."""
    lab.spawn("a", anon="8M", holes="50 seed=1")
    lab.write(f"{EVENTS}/compaction/enable", "1")
    lab.write(COMPACT, "1")
    found = names(lab)
    assert found[0] == "mm_compaction_begin"
    assert found[-1] == "mm_compaction_end"
    assert found.count("mm_compaction_begin") == found.count("mm_compaction_end")
    assert {"mm_compaction_isolate_migratepages", "mm_compaction_isolate_freepages"} < set(found)
    for before, after in itertools.pairwise(found):
        assert after != "mm_compaction_end" or before == "mm_compaction_finished"
        assert before != "mm_compaction_isolate_freepages" or after in (before, "mm_compaction_migratepages")


@pytest.mark.slow
def test_what_is_traced_adds_up_to_the_counters(lab: Lab) -> None:
    lab.spawn("a", anon="8M", holes="50 seed=1")
    before = lab.vmstat()
    lab.write(f"{EVENTS}/compaction/enable", "1")
    lab.write(f"{EVENTS}/migrate/enable", "1")
    lab.write(f"{T}/buffer_size_kb", "16384")
    lab.write(COMPACT, "1")
    after = lab.vmstat()
    text = lab.read(f"{T}/trace")

    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, text)))

    moved = after["pgmigrate_success"] - before["pgmigrate_success"]
    assert moved > 100
    assert total(r"mm_compaction_migratepages: nr_migrated=(\d+)") == moved
    assert total(r"mm_migrate_pages: nr_succeeded=(\d+)") == moved
    assert text.count("remove_migration_pte: ") == text.count(": set_migration_pte: ") == moved
    for scanner, name in (("isolate_migratepages", "migrate"), ("isolate_freepages", "free")):
        scanned = after[f"compact_{name}_scanned"] - before[f"compact_{name}_scanned"]
        assert total(rf"mm_compaction_{scanner}: .* nr_scanned=(\d+)") == scanned


@pytest.mark.slow
def test_pages_that_a_process_takes_and_gives_back(lab: Lab) -> None:
    lab.spawn("a")
    lab.write(f"{EVENTS}/kmem/mm_page_alloc/enable", "1")
    lab.write(f"{EVENTS}/kmem/mm_page_free/enable", "1")
    lab.write(f"{T}/buffer_size_kb", "4096")
    lab.set("a", anon="4M")
    taken = [entry for entry in entries(lab) if entry.endswith("gfp_flags=GFP_HIGHUSER_MOVABLE")]
    assert len(taken) == 1024
    lab.registry.truncate(f"{T}/trace")
    complete(lab.end("a"))
    given = {entry.split()[2] for entry in entries(lab) if entry.startswith("mm_page_free: ")}
    assert {entry.split()[2] for entry in taken} <= given


def test_off_is_off(lab: Lab) -> None:
    lab.spawn("a", anon="4M", holes="50 seed=1")
    lab.write(COMPACT, "1")
    assert trace_key.key() == 0
    assert not trace_key.rows_waiting()
    assert entries(lab) == []


def test_enable_of_a_group_says_x_for_some(lab: Lab) -> None:
    lab.write(f"{EVENTS}/compaction/mm_compaction_begin/enable", "1\n")
    assert [lab.read(f"{EVENTS}/{where}enable") for where in ("", "compaction/", "kmem/")] == ["X\n", "X\n", "0\n"]
    lab.write(f"{EVENTS}/compaction/enable", "1")
    assert lab.read(f"{EVENTS}/compaction/enable") == "1\n"
    lab.write(f"{EVENTS}/enable", "0")
    assert lab.read(f"{EVENTS}/compaction/mm_compaction_begin/enable") == "0\n"
    for text in ("2", "x", "0x1", " 1 ", "Y", "1 0"):
        assert errno_of(lab.write, f"{EVENTS}/enable", text) == errno.EINVAL


def test_set_event(lab: Lab) -> None:
    def on() -> list[str]:
        return lab.read(f"{T}/set_event").split()

    lab.write(f"{T}/set_event", "compaction:*\n")
    assert len(on()) == 15
    lab.write(f"{T}/set_event", "!compaction:mm_compaction_begin mm_page_free\n")
    assert "kmem:mm_page_free" in on()
    assert len(on()) == 15
    lab.registry.truncate(f"{T}/set_event")
    assert on() == []
    for system in ("kmem", "kmem:"):
        lab.write(f"{T}/set_event", system)
        assert len(on()) == 5
        lab.registry.truncate(f"{T}/set_event")
    for word in ("kmem:nothing", "*", "kmem:mm_page_*", "km*:*", "KMEM"):
        assert errno_of(lab.write, f"{T}/set_event", word) == errno.EINVAL
    assert set(lab.read(f"{T}/available_events").split()) >= {"dpu:dpu_batch_submit", "migrate:mm_migrate_pages"}


def test_filters_of_one_event_and_of_a_system(lab: Lab) -> None:
    finished, begin = (f"{EVENTS}/compaction/mm_compaction_{name}" for name in ("finished", "begin"))
    lab.write(f"{finished}/enable", "1")
    lab.write(f"{finished}/filter", "ret == 5\n")
    lab.write(COMPACT, "1")
    assert entries(lab)
    assert all(entry.endswith("ret=complete") for entry in entries(lab))
    assert lab.read(f"{finished}/filter") == "ret == 5\n"
    assert errno_of(lab.write, f"{finished}/filter", "nofield == 1") == errno.EINVAL
    assert lab.read(f"{finished}/filter") == "nofield == 1\n        ^\nparse_error: Field not found\n\n"
    assert lab.read(f"{T}/error_log") == (
        "[    0.000000] event filter parse error: error: Field not found\n"
        "  Command: nofield == 1\n                   ^\n"
    )
    lab.registry.truncate(f"{T}/error_log")
    assert lab.read(f"{T}/error_log") == ""
    lab.write(f"{EVENTS}/compaction/filter", "order == 9")
    assert lab.read(f"{finished}/filter") == "order == 9\n"
    assert lab.read(f"{begin}/filter") == (
        "order == 9\n^\nparse_error: Couldn't find or set field in one of a subsystem's events\n\n"
    )
    lab.write(f"{EVENTS}/compaction/filter", "0")
    assert lab.read(f"{finished}/filter") == lab.read(f"{begin}/filter") == "none\n"


def test_trace_stays_and_trace_pipe_is_consumed(lab: Lab) -> None:
    for word in ("one", "two"):
        mark(lab, word)
    assert entries(lab) == entries(lab) == ["tracing_mark_write: one", "tracing_mark_write: two"]
    shown = lab.read(f"{T}/trace").splitlines()[-2:]
    assert read_pipe(lab).decode().splitlines() == shown
    assert lab.read(f"{T}/trace") == HEADER.format("0/0")
    assert errno_of(read_pipe, lab) == errno.EAGAIN


def test_the_pipe_gives_whole_lines_and_nothing_twice(lab: Lab) -> None:
    for number in range(5):
        mark(lab, f"number {number}")
    length = len(lab.read(f"{T}/trace").splitlines()[-1]) + 1
    parts = [read_pipe(lab, size) for size in (length + 5, 10, length, 4096)]
    assert [part.count(b"\n") for part in parts] == [1, 0, 1, 3]
    assert [line.split(b": ")[-1] for line in b"".join(parts).splitlines()] == [
        f"number {number}".encode() for number in range(5)
    ]


def test_who_has_read_meets_the_end_once_tracing_is_off(lab: Lab) -> None:
    mark(lab, "last")
    lab.write(f"{T}/tracing_on", "0")
    assert b"last" in read_pipe(lab)
    assert read_pipe(lab, pos=100) == b""
    assert errno_of(read_pipe, lab) == errno.EAGAIN  # who has not, waits


def test_tracing_on_freezes(lab: Lab) -> None:
    lab.write(f"{EVENTS}/compaction/enable", "1")
    lab.write(f"{T}/tracing_on", "0")
    lab.write(COMPACT, "1")
    assert entries(lab) == []
    assert errno_of(mark, lab, "x") == errno.EBADF
    lab.write(f"{T}/tracing_on", "7")
    assert lab.read(f"{T}/tracing_on") == "1\n"
    lab.write(COMPACT, "1")
    assert entries(lab)


def test_trace_is_emptied_by_truncation_only(lab: Lab) -> None:
    mark(lab, "one")
    lab.write(f"{T}/trace", "0\n")
    assert entries(lab) == ["tracing_mark_write: one"]
    lab.registry.truncate(f"{T}/trace")
    assert entries(lab) == []


def test_buffer_size(lab: Lab) -> None:
    assert lab.read(f"{T}/buffer_size_kb") == "7 (expanded: 1408)\n"
    lab.write(f"{T}/per_cpu/cpu1/buffer_size_kb", "16\n")
    assert lab.read(f"{T}/buffer_size_kb") == "X\n"
    lab.write(f"{T}/buffer_size_kb", "1\n")
    assert lab.read(f"{T}/buffer_total_size_kb") == "2\n"
    for number in range(100):
        mark(lab, f"{number:03}")
    stats = dict(line.split(": ") for line in lab.read(f"{T}/per_cpu/cpu0/stats").splitlines())
    assert int(stats["entries"]) + int(stats["overrun"]) == 100
    assert 512 < int(stats["bytes"]) <= 1024
    assert f"# entries-in-buffer/entries-written: {stats['entries']}/100 " in lab.read(f"{T}/trace")
    assert entries(lab)[-1] == "tracing_mark_write: 099"
    lab.write(f"{T}/options/overwrite", "0")
    mark(lab, "lost")
    assert "dropped events: 1\n" in lab.read(f"{T}/per_cpu/cpu0/stats")
    assert errno_of(lab.write, f"{T}/buffer_size_kb", "0") == errno.EINVAL


def test_clocks(lab: Lab) -> None:
    mark(lab, "one")
    lab.write(f"{T}/trace_clock", "counter\n")
    assert lab.read(f"{T}/trace_clock") == "local global [counter] mono boot\n"
    assert entries(lab) == []
    for word in ("two", "three"):
        mark(lab, word)
    stamps = [int(line.split(": ")[0].split()[-1]) for line in lab.read(f"{T}/trace").splitlines()[-2:]]
    assert stamps[1] == stamps[0] + 1
    assert errno_of(lab.write, f"{T}/trace_clock", "x86-tsc") == errno.EINVAL


def test_options(lab: Lab) -> None:
    lab.write(f"{T}/trace_options", "nooverwrite\n")
    assert lab.read(f"{T}/options/overwrite") == "0\n"
    assert "nooverwrite\n" in lab.read(f"{T}/trace_options")
    assert errno_of(lab.write, f"{T}/trace_options", "nothing") == errno.EINVAL
    lab.write(f"{T}/options/markers", "0")
    assert errno_of(mark, lab, "x") == errno.EINVAL


def test_tasks_have_names_and_can_be_chosen(lab: Lab) -> None:
    trace = lab.machine.tracing.trace
    lab.write(f"{EVENTS}/compaction/mm_compaction_begin/enable", "1")
    for pid, comm in ((7, "seven"), (8, "eight")):
        with trace.current.as_task(Task(pid, lambda comm=comm: comm)):
            lab.write(COMPACT, "1")
    assert {line.split()[0] for line in lab.read(f"{T}/trace").splitlines()[12:]} == {"seven-7", "eight-8"}
    assert lab.read(f"{T}/saved_cmdlines") == "7 seven\n8 eight\n"
    lab.registry.truncate(f"{T}/trace")
    lab.write(f"{T}/set_event_pid", "8\n")
    for pid in (7, 8):
        with trace.current.as_task(Task(pid, str)):
            lab.write(COMPACT, "1")
    assert {line.split()[0] for line in lab.read(f"{T}/trace").splitlines()[12:]} == {"eight-8"}
    assert errno_of(lab.write, f"{T}/set_event_pid", "x") == errno.EINVAL


def test_a_cpu_can_be_left_out(lab: Lab) -> None:
    assert lab.read(f"{T}/tracing_cpumask") == "3\n"
    lab.write(f"{T}/tracing_cpumask", "2\n")
    mark(lab, "x")
    assert entries(lab) == []
    assert errno_of(lab.write, f"{T}/tracing_cpumask", "4") == errno.EOVERFLOW
    assert errno_of(lab.write, f"{T}/tracing_cpumask", "g") == errno.EINVAL


def test_kcompactd_is_named(lab: Lab) -> None:
    """Its rounds are its own, whoever makes the machine step."""
    lab.spawn("a", anon="16M", holes="50 seed=1")
    lab.write(f"{EVENTS}/compaction/enable", "1")
    lab.machine.kcompactds[0].wakeup_kcompactd(9, 3)
    lab.machine.step(0)
    lines = lab.read(f"{T}/trace").splitlines()
    assert any(re.match(r" +kcompactd0-\d+ .*mm_compaction_kcompactd_wake: nid=0 order=9", line) for line in lines)
    assert any(re.match(r" +kernelsim-1 .*mm_compaction_wakeup_kcompactd: nid=0 order=9", line) for line in lines)
    assert lines[-1].endswith("mm_compaction_kcompactd_sleep: nid=0")


def test_current_is_whom_an_operation_runs_for() -> None:
    current, seen = Current(), []

    def operation() -> Operation[str]:
        try:
            seen.append(current.task.comm)
            yield None
        finally:
            seen.append(current.task.comm)
        return "done"

    mine = current.run_as(Task(7, lambda: "seven"), operation())
    next(mine)
    assert current.task.comm == "kernelsim"
    mine.close()
    assert seen == ["seven", "seven"]
    assert current.task is current.init


def test_who_migrates_is_told_apart() -> None:
    """Compaction, the DPU's CPU path, and a range that is emptied for a CMA allocation."""
    lab = Lab((64,), cma=8)
    lab.spawn("a", anon="40M", holes="30 seed=1")
    lab.write(f"{EVENTS}/migrate/mm_migrate_pages/enable", "1")
    lab.sysctl(dpu_compact_enabled=0)
    before = lab.vmstat()["pgmigrate_success"]
    lab.compact()
    by_cpu = entries(lab)
    assert all(entry.endswith("mode=MIGRATE_SYNC reason=compaction") for entry in by_cpu)
    moved = lab.vmstat()["pgmigrate_success"] - before
    assert moved == sum(int(entry.split("nr_succeeded=")[1].split()[0]) for entry in by_cpu) > 100
    lab.registry.truncate(f"{T}/trace")
    lab.write("/sys/kernel/debug/cma/pernuma0/alloc", "1024")
    assert entries(lab)
    assert all(entry.endswith("mode=MIGRATE_SYNC reason=contig_range") for entry in entries(lab))
