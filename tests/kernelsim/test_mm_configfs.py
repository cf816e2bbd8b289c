# SPDX-License-Identifier: GPL-2.0-only
"""A process's files: what each does, and that a bad write changes nothing."""

import errno

import numpy as np
import pytest
import wiring
from machines import MIB, Lab, advance, settle, small_slices

from kernelsim import mmap
from kernelsim.attr import Operation
from kernelsim.machine import MM_CONFIGFS
from kernelsim.mm_configfs import choose, parse_amount

A = f"{MM_CONFIGFS}/a"


@pytest.fixture
def lab() -> Lab:
    lab = Lab((32, 32))
    lab.spawn("a", anon="4M")
    return lab


def errno_of(lab: Lab, attr: str, text: str) -> int:
    return wiring.errno_of(lab.write, f"{A}/{attr}", text)


@pytest.mark.parametrize(
    ("attr", "text"),
    [
        *(("anon", text) for text in ("", "-1", "4X", "1.5M", "4 M", "abc", str(2**63))),
        *(("file", text) for text in ("", "-4K", "K")),
        *(("holes", text) for text in ("", "101", "-1", "x", "50 seed", "50 seed=", "50 seed=x", "50 run", "50%")),
        *(("holes", text) for text in ("50 seed=-1", "50 seed=1 2", f"50 seed={10**19}", "\u0665\u0660")),
        *(("mlock", text) for text in ("", "101", "x", "10 runs")),
        *(("pin", text) for text in ("", "200", "5 runs", "5 seed=a")),
        *(("touch", text) for text in ("", "-5", "5 every")),
        *(("fork", text) for text in ("", ".", "..", "a/b", "-x", "x" * 64, "a b", "é")),
        *(("node", text) for text in ("2", "-1", "x", "")),
    ],
)
@pytest.mark.slow
def test_bad_writes_are_einval_and_change_nothing(lab: Lab, attr: str, text: str) -> None:
    before = lab.machine.state_hash()
    assert errno_of(lab, attr, text) == errno.EINVAL
    assert lab.machine.state_hash() == before


@pytest.mark.slow
@pytest.mark.parametrize(("attr", "text"), [("anon", "1G"), ("anon", "60M"), ("file", "70M"), ("anon", "4E")])
def test_too_much_memory_is_enomem_and_the_old_stays(lab: Lab, attr: str, text: str) -> None:
    lab.set("a", file="64K")
    free = lab.mem.zones["free_pages"].sum()
    assert errno_of(lab, attr, text) == errno.ENOMEM
    assert (lab.read(f"{A}/anon"), lab.read(f"{A}/file")) == ("4194304\n", "65536\n")
    assert free - lab.mem.zones["free_pages"].sum() < 40  # but for page tables, which stay until exit
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "shown"), [("4M", 4 * MIB), ("4096K", 4 * MIB), ("1", 4096), ("5000", 8192), ("0x2000", 8192), ("0", 0)]
)
def test_anon_is_rounded_up_to_pages_and_replaces(lab: Lab, text: str, shown: int) -> None:
    lab.set("a", anon=text)
    assert lab.read(f"{A}/anon") == f"{shown}\n"
    assert lab.read(f"{A}/rss") == f"{shown}\n"
    lab.assert_at_rest()


def test_holes_give_back_about_their_percentage(lab: Lab) -> None:
    lab.set("a", holes="50 seed=7")
    assert 0.4 < int(lab.read(f"{A}/rss")) / (4 * MIB) < 0.6
    assert lab.read(f"{A}/holes") == "50 seed=7\n"
    assert lab.read(f"{A}/anon") == f"{4 * MIB}\n"
    assert lab.verify("a") == "ok"
    lab.set("a", anon="1M")
    assert lab.read(f"{A}/holes") == "0\n"


def test_a_seed_is_a_pattern(lab: Lab) -> None:
    patterns = {
        text: choose(1000, *parse_amount_tuple(text)).tobytes() for text in ("50 seed=1", "50 seed=2", "50 runs seed=1")
    }
    assert len(set(patterns.values())) == 3
    assert choose(1000, *parse_amount_tuple("50 seed=1")).tobytes() == patterns["50 seed=1"]


def parse_amount_tuple(text: str) -> tuple[int, int, bool]:
    percent, options, flags = parse_amount(text, flags=("runs",))
    return percent, options.get("seed", 0), "runs" in flags


@pytest.mark.slow
@pytest.mark.parametrize("percent", [0, 1, 10, 50, 90, 99, 100])
@pytest.mark.parametrize("in_runs", [False, True])
def test_choosing(percent: int, in_runs: bool) -> None:
    """The share is right, runs are runs, and 0 and 100 are exact."""
    chosen = choose(100_000, percent, 3, in_runs)
    assert abs(100 * chosen.mean() - percent) < (6 if in_runs else 1)
    if percent in (0, 100):
        assert chosen.all() == (percent == 100)
        assert chosen.any() == (percent == 100)
    if in_runs and percent == 50:
        edges = np.count_nonzero(np.diff(chosen))
        assert edges < 100_000 / 20


def test_mlock_locks_from_the_start_and_can_shrink(lab: Lab) -> None:
    for percent, pages in ((25, 256), (75, 768), (100, 1024), (10, 102), (0, 0)):
        lab.set("a", mlock=str(percent))
        assert int(lab.mem.zones["nr_mlock"].sum()) == pages
        assert lab.read(f"{A}/mlock") == f"{percent}\n"
        assert lab.machine.check() == []
    lab.assert_at_rest()


def test_new_pages_of_a_locked_range_are_locked(lab: Lab) -> None:
    lab.set("a", holes="100", mlock="100", touch="100")
    assert int(lab.mem.zones["nr_mlock"].sum()) == 1024
    lab.set("a", holes="100")
    assert int(lab.mem.zones["nr_mlock"].sum()) == 0
    lab.assert_at_rest()


def test_locks_are_not_inherited(lab: Lab) -> None:
    lab.set("a", mlock="100", fork="b")
    assert lab.read(f"{MM_CONFIGFS}/b/mlock") == "0\n"
    settle([lab.end("a")])
    assert int(lab.mem.zones["nr_mlock"].sum()) == 0
    lab.assert_at_rest()


def test_pinning_replaces_and_0_unpins(lab: Lab) -> None:
    process = lab.machine.processes["a"]
    lab.set("a", pin="10 seed=1")
    first = set(process.mm.pinned.tolist())
    assert 50 < len(first) < 160
    assert all(int(lab.mem.pages["refcount"][pfn]) == 1025 for pfn in first)
    lab.set("a", pin="10 seed=2")
    assert set(process.mm.pinned.tolist()) != first
    lab.set("a", pin="0")
    assert len(process.mm.pinned) == 0
    assert lab.read(f"{A}/pin") == "0\n"
    lab.assert_at_rest()


def test_pinned_pages_outlive_their_mapping(lab: Lab) -> None:
    free = int(lab.mem.zones["free_pages"].sum())
    lab.set("a", pin="100", holes="100")
    assert int(lab.mem.zones["free_pages"].sum()) == free
    lab.assert_at_rest()
    lab.set("a", pin="0")
    assert int(lab.mem.zones["free_pages"].sum()) == free + 1024
    lab.assert_at_rest()


def test_fork_makes_a_directory_beside_it(lab: Lab) -> None:
    lab.set("a", file="128K", fork="child")
    assert lab.verify("child") == "ok"
    assert lab.read(f"{MM_CONFIGFS}/child/anon") == lab.read(f"{A}/anon")
    assert lab.read(f"{MM_CONFIGFS}/child/pid") != lab.read(f"{A}/pid")
    assert errno_of(lab, "fork", "child") == errno.EEXIST
    assert errno_of(lab, "fork", "a") == errno.EEXIST


def test_verify_counts_what_differs(lab: Lab) -> None:
    pages = lab.mem.pages[: lab.mem.nr_pages]
    mapped = np.flatnonzero(pages["mapcount"])
    lab.vm.memory[mapped[[3, 70, 900]], 0] += np.uint64(1)
    assert lab.verify("a") == "3"


def test_home_node_is_where_memory_comes_from(lab: Lab) -> None:
    lab.spawn("b", node="1", anon="4M")
    assert int(lab.mem.nodes["nr_anon_pages"][1]) == 1024
    lab.set("b", anon="40M")
    assert int(lab.mem.nodes["nr_anon_pages"][0]) > 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "a b", "x" * 64, "ü"])
def test_bad_names_make_no_process(lab: Lab, name: str) -> None:
    with pytest.raises(OSError, match="bad name") as caught:
        lab.spawn(name)
    assert caught.value.errno == errno.EINVAL
    assert list(lab.machine.processes) == ["a"]


# Two requests at once.


def test_requests_on_one_process_queue(lab: Lab) -> None:
    """Without that, the second would pull the memory away from under the first."""
    lab.spawn("b", anon="16M")
    outcomes = settle(
        [
            lab.start_set("b", "touch", "100"),
            lab.start_set("b", "anon", "1M"),
            lab.start_set("b", "mlock", "50"),
            lab.start_set("b", "file", "2M"),
            lab.start_verify("b"),
        ]
    )
    assert outcomes[4] == b"ok\n"
    assert lab.read(f"{MM_CONFIGFS}/b/anon") == f"{MIB}\n"
    lab.assert_at_rest()


def test_a_request_that_waited_for_the_last_one_finds_the_process_gone(lab: Lab) -> None:
    waiting = lab.start_set("a", "touch", "100")
    outcomes = settle([lab.end("a"), waiting])
    assert isinstance(outcomes[1], OSError)
    assert outcomes[1].errno == errno.ESRCH
    assert lab.machine.check() == []


def test_two_forks_of_one_name_make_one_child(lab: Lab) -> None:
    lab.spawn("b", anon="4M")
    outcomes = settle([lab.start_set("a", "fork", "child"), lab.start_set("b", "fork", "child")])
    failed = [outcome for outcome in outcomes if isinstance(outcome, OSError)]
    assert [error.errno for error in failed] == [errno.EEXIST]
    assert len(lab.vm.mms_in_use) == 3
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attr", "text"), [("anon", "12M"), ("file", "12M"), ("holes", "50"), ("touch", "100"), ("fork", "c"), ("pin", "9")]
)
def test_an_interrupted_request_leaves_the_machine_sound(lab: Lab, attr: str, text: str) -> None:
    """Closed at its first and at its second yield."""
    lab.spawn("b", anon="14M")
    for nr_slices in (1, 2):
        operation = lab.start_set("b", attr, text)
        for _ in range(nr_slices):
            next(operation, None)
        operation.close()
        lab.assert_at_rest()
        assert "c" not in lab.machine.processes or attr == "fork"


def change_under_way(attr: str, thp: str, busy: bool) -> tuple[Lab, Operation[object], Operation[object]]:
    """A process, a write of more memory to it, and a compaction that has a batch in flight, or is over."""
    lab = Lab((32,), nr_ranks=2, patience=7)
    lab.spawn("a", thp=thp, anon="4M", file="1M", holes="50 seed=1")
    compaction = lab.start_compact()
    while not (lab.vm.in_flight if busy else advance(compaction)[0]):
        assert not (busy and advance(compaction)[0])
    return lab, lab.start_set("a", attr, "6M"), compaction


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "batch in flight"])
@pytest.mark.parametrize(("attr", "thp"), [("anon", "0"), ("anon", "1"), ("file", "0")])
@pytest.mark.slow
def test_a_signal_leaves_the_old_memory_or_the_new_as_a_whole(attr: str, thp: str, busy: bool) -> None:
    patch = small_slices(100)
    try:
        lab, change, compaction = change_under_way(attr, thp, False)
        nr_slices = 1
        while not advance(change)[0]:
            nr_slices += 1
        outcomes = []
        for after in (1, nr_slices // 2, nr_slices - 2, nr_slices - 1):
            lab, change, compaction = change_under_way(attr, thp, busy)
            old = lab.read(f"{A}/{attr}")
            if not any(over for over, _ in (advance(change) for _ in range(after))):
                change.close()
            assert lab.machine.check() == []
            now = lab.read(f"{A}/{attr}")
            outcomes.append(now)
            assert now in (old, f"{6 * MIB}\n")
            process = lab.machine.processes["a"]
            assert [len(process.anon_vmas), len(process.file_vmas)] == [1, 1]
            assert lab.read(f"{A}/holes") == ("50 seed=1\n" if now == old or attr == "file" else "0\n")
            settle([compaction] if busy else [])
            lab.assert_at_rest()
            settle([lab.end("a")])
            assert lab.vm.files == []
            lab.assert_at_rest()
        assert outcomes[0] == old
        assert busy or outcomes[-1] == f"{6 * MIB}\n"
    finally:
        patch.undo()


# Large processes let others have their turns.


def slices(lab: Lab, operation: Operation[object]) -> int:
    """How many slices it takes; after every fourth all invariants are checked."""
    nr = 1
    while not advance(operation)[0]:
        nr += 1
        if nr % 4 == 0:
            assert lab.machine.check() == []
    return nr


@pytest.mark.slow
def test_exit_mlock_pins_and_files_go_slice_by_slice() -> None:
    """Slices of 100 pages, of 10 page tables, and of 2 MiB at least where huge pages may be."""
    patch = small_slices(100)
    patch.set(mmap, "FREE_TABLES_SLICE_PAGES", 10)
    try:
        lab = Lab((32,))
        before = lab.mem.zones["free_pages"].tolist()
        mm = lab.spawn("a", anon="8M", file="4M", pin="50").mm
        for _ in range(30):  # a mapping of one page each 2 MiB: a page table each
            vma = mm.mmap(1)
            settle([mm.write(vma)])
            assert vma.start == mm.next_vpn - 512
        nr_pinned, nr_tables = len(mm.pinned), lab.vmstat()["nr_page_table_pages"]
        assert nr_pinned > 900
        assert nr_tables > 30
        assert slices(lab, lab.start_set("a", "mlock", "100")) >= 4
        assert slices(lab, lab.start_set("a", "pin", "0")) >= nr_pinned // 100
        assert slices(lab, lab.start_set("a", "mlock", "0")) >= 4
        assert slices(lab, lab.start_set("a", "file", "0")) >= 1024 // 400 + 1024 // 100
        assert slices(lab, lab.end("a")) >= 2048 // 400 + nr_tables // 10
        assert lab.mem.zones["free_pages"].tolist() == before
        lab.assert_at_rest()
    finally:
        patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("words", ["exit", "file"])
def test_an_end_that_was_interrupted_is_brought_to_its_end_by_the_next(words: str) -> None:
    patch = small_slices(50)
    try:
        lab = Lab((32,))
        before = lab.mem.zones["free_pages"].tolist()
        for nr_slices in range(1, 60, 4):
            lab.spawn("a", anon="1M", file="1M")
            operation = lab.end("a") if words == "exit" else lab.start_set("a", "file", "0")
            if not any(over for over, _ in (advance(operation) for _ in range(nr_slices))):
                operation.close()
            assert lab.machine.check() == []
            if "a" in lab.machine.processes:
                settle([lab.end("a")])
            assert lab.mem.zones["free_pages"].tolist() == before
            assert lab.vm.files == []
    finally:
        patch.undo()


@pytest.mark.slow
def test_who_waits_for_an_exit_that_is_interrupted_finds_no_process() -> None:
    patch = small_slices(50)
    try:
        lab = Lab((32,))
        before = lab.mem.zones["free_pages"].tolist()
        for nr_slices in range(1, 60, 4):
            lab.spawn("a", anon="1M", file="1M")
            waiting, exiting = lab.start_set("a", "anon", "64K"), lab.end("a")
            if not any(over for over, _ in (advance(exiting) for _ in range(nr_slices))):
                assert advance(waiting)[0] is False
                exiting.close()
            (outcome,) = settle([waiting])
            assert isinstance(outcome, OSError)
            assert outcome.errno == errno.ESRCH
            assert lab.machine.check() == []
            if "a" in lab.machine.processes:
                settle([lab.end("a")])
            assert lab.mem.zones["free_pages"].tolist() == before
    finally:
        patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["100", "0"])
def test_an_interrupted_mlock_has_done_the_lower_part(lock: str) -> None:
    patch = small_slices(100)
    try:
        lab = Lab((32,))
        lab.spawn("a", thp="1", anon="7M", mlock="0" if lock == "100" else "100")
        operation = lab.start_set("a", "mlock", lock)
        assert not advance(operation)[0]
        assert not advance(operation)[0]
        operation.close()
        nr_locked = 1024 if lock == "100" else 1792 - 1024
        assert lab.vmstat()["nr_mlock"] == nr_locked
        assert lab.read(f"{A}/mlock") == f"{round(100 * nr_locked / 1792)}\n"
        lab.assert_at_rest()
        lab.set("a", mlock="0")
        assert lab.vmstat()["nr_mlock"] == 0
        lab.assert_at_rest()
    finally:
        patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["100", "0"])
def test_what_is_moved_or_split_while_it_is_being_locked_is_locked_once(lock: str) -> None:
    """Batches in flight, unmapping by another process, and an emptied range, between any two slices."""
    patch = small_slices(64)
    try:
        lab = Lab((64,), nr_ranks=2, patience=3)
        lab.spawn("a", thp="1", anon="12M", fork="b", mlock="0" if lock == "100" else "100")
        lab.set("b", touch="20 seed=1")
        settle([lab.start_set("a", "mlock", lock), lab.start_compact(), lab.start_set("b", "holes", "60 seed=2"),
                lab.machine.contig.alloc_contig_range(0x2000, 0x2400)])  # fmt: skip
        settle([lab.end("b")])
        assert lab.vmstat()["nr_mlock"] == (3072 if lock == "100" else 0)
        lab.set("a", mlock="0")
        assert lab.vmstat()["nr_mlock"] == 0
        assert not (lab.mem.pages["mlock_count"] > 0).any()
        lab.assert_at_rest()
    finally:
        patch.undo()
