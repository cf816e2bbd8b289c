# SPDX-License-Identifier: GPL-2.0-only
"""Nothing is ever lost, whatever runs between the slices of whatever else.

Requests run in slices and take turns. Here chance chooses the requests, the turns, who is interrupted, how late the
device moves its pages and when it fails. After every single slice all invariants must hold, contents included, and in
the end every process must read back what it wrote and every page be free again.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from machines import Lab, advance, settle, small_slices

from dpud.bench.soak import (
    GFPS,
    KINDS,
    MAX_RUNNING,
    NAMES,
    OPERATIONS,
    ORDERS,
    PAGE_KINDS,
    SHOWN,
    Chance,
    SoakError,
    World,
    lives,
    run,
    soak,
)
from dpud.dpu.faults import FaultKind
from kernelsim.attr import Operation
from kernelsim.dpu_hw import ENGINES
from kernelsim.filemap import File
from kernelsim.operation import complete

SETTINGS = (
    *(("anon", size) for size in ("0", "1M", "6M", "20M")),
    *(("file", size) for size in ("0", "64K", "3M")),
    *(("holes", text) for text in ("50 seed=1", "30 seed=2", "60 runs", "97 seed=3", "100")),
    *(("touch", text) for text in ("5 seed=4", "50 seed=5", "100")),
    *(("fork", name) for name in NAMES),
    *(("mlock", text) for text in ("0", "30", "100")),
    *(("pin", text) for text in ("0", "3 seed=6", "40")),
    *(("thp", text) for text in "110"),
    *(("same", text) for text in ("60 kinds=9", "20 kinds=300 seed=3", "100 kinds=40")),
    *(("mergeable", text) for text in "1110"),
)


class Requests(RuleBasedStateMachine):
    """The world, under hypothesis, which looks for the shortest way to break it; hence a device without threads."""

    world: World | None = None

    @initialize(
        nodes=st.sampled_from([(32,), (32, 34)]),
        nr_ranks=st.sampled_from([1, 3, None]),
        patience=st.sampled_from([0, 2, 9]),
        slice_pages=st.sampled_from([16, 100, 700]),
    )
    def boot(self, nodes: tuple[int, ...], nr_ranks: int | None, patience: int, slice_pages: int) -> None:
        self.world = World(nodes, nr_ranks, patience, slice_pages)

    @rule(name=st.sampled_from(NAMES), setting=st.sampled_from(SETTINGS))
    def change(self, name: str, setting: tuple[str, str]) -> None:
        self.world.change(name, *setting)

    @rule(name=st.sampled_from(NAMES))
    def look(self, name: str) -> None:
        self.world.look(name)

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: str) -> None:
        self.world.leave(name)

    @rule(nid=st.integers(0, 1))
    def compact(self, nid: int) -> None:
        self.world.compact(nid)

    @rule(which=st.integers(0, MAX_RUNNING - 1), nr=st.sampled_from([1, 2, 5, 30]))
    def turns(self, which: int, nr: int) -> None:
        self.world.turns(which, nr)

    @rule(which=st.integers(0, MAX_RUNNING - 1))
    def interrupt(self, which: int) -> None:
        self.world.interrupt(which)

    @rule(kind=st.sampled_from(KINDS), move=st.sampled_from([0, 1, 40, 300]))
    def break_device(self, kind: FaultKind, move: int) -> None:
        self.world.lab.arm(kind, move)

    @rule(kind=st.sampled_from(PAGE_KINDS), move=st.sampled_from([0, 7]), times=st.integers(0, 3))
    def disturb_pages(self, kind: str, move: int, times: int) -> None:
        self.world.lab.machine.dpu.inject.points[kind].arm(move, times)

    @rule()
    def repair_device(self) -> None:
        self.world.lab.revive()

    @rule(enabled=st.integers(0, 1), order=st.integers(9, 18), least=st.sampled_from([1, 32, 200]))
    def configure(self, enabled: int, order: int, least: int) -> None:
        self.world.configure(enabled, order, least)

    @rule(engine=st.sampled_from(ENGINES), adaptive=st.integers(0, 1))
    def choose(self, engine: str, adaptive: int) -> None:
        self.world.choose(engine, adaptive)

    @rule(nr=st.sampled_from([0, 1, 4]))
    def huge_pages(self, nr: int) -> None:
        self.world.write("/proc/sys/vm/nr_hugepages", str(nr))

    @rule(order=st.sampled_from(ORDERS), gfp=st.sampled_from(GFPS))
    def alloc(self, order: int, gfp: str) -> None:
        self.world.alloc(order, gfp)

    @rule()
    def free(self) -> None:
        self.world.free()

    @rule(run=st.sampled_from("12"))
    def ksm(self, run: str) -> None:
        self.world.write("/sys/kernel/mm/ksm/run", run)

    @rule()
    def threads(self) -> None:
        self.world.wake_threads()

    @rule()
    def finish(self) -> None:
        self.world.finish()

    @invariant()
    def sound(self) -> None:
        if self.world:
            self.world.sound()

    def teardown(self) -> None:
        if self.world:
            try:
                self.world.end()
            finally:
                self.world.patch.undo()


class TestRequests(Requests.TestCase):
    settings = settings(max_examples=examples(15), stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestRequestsAtLength(Requests.TestCase):
    settings = settings(max_examples=examples(60), stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.slow
def test_soak(seed: int) -> None:
    """All kinds of operations there are, the invariants checked after every slice."""
    soak(seed, 30, "stamp", eager=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 108))
def test_soak_at_length(seed: int) -> None:
    soak(seed, 400, eager=True)


@pytest.mark.slow
def test_soak_as_the_benchmark_does() -> None:
    soaked = soak(1, 20_000)
    assert soaked.counts.total() == 20_000
    by_chance = {"CMA alloc", "CMA free"}  # only where the machine has an area
    assert set(soaked.counts) | by_chance == {name for _, name, _ in OPERATIONS}
    assert all(soaked.stats[name] > 100 for name in SHOWN)


def threaded(seed: int, nr_steps: int) -> None:
    """The same with a device that has threads, whose timing is nobody's choice."""
    chance = Chance(seed)
    world = World((32, 34), 2, None, chance.pick((16, 100, 700)), eager=False)
    try:
        for _ in range(nr_steps):
            world.change(chance.pick(NAMES), *chance.pick(SETTINGS))
            world.compact(chance.number(2))
            for _ in range(20):
                world.turns(chance.number(MAX_RUNNING), 1 + chance.number(8))
            world.sound()
        world.end()
    finally:
        world.patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_device_with_threads(seed: int) -> None:
    threaded(seed, 12)


@pytest.mark.slow
def test_the_same_seed_makes_the_same_run() -> None:
    def run() -> str:
        world, chance = World((32,), 2, 3, 100, eager=False), Chance(5)
        try:
            for _ in range(60):
                chance.pick(OPERATIONS)[2](world, chance)
                world.turns(chance.number(MAX_RUNNING), 8)
            world.finish()
        finally:
            world.patch.undo()
        return world.lab.machine.state_hash()

    assert run() == run()


def test_a_long_soak_is_many_worlds() -> None:
    assert list(lives(7, 50_000)) == [(7, 20_000), (8, 20_000), (9, 10_000)]
    assert list(lives(7, 30)) == [(7, 30)]


@pytest.mark.slow
def test_the_benchmark_reports_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(seed=4, ops=60)
    assert "seed 4, 60 operations" in capsys.readouterr().err
    assert next(figure.ours for figure in report.figures if figure.what == "operations") == 60
    assert sum(figure.ours for figure in report.figures if figure.what.endswith(", times")) == 60


@pytest.mark.slow
def test_what_the_soak_finds_names_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_a_page(world: World, _chance: Chance) -> None:
        world.lab.mem.zones["free_pages"][0] -= 1

    monkeypatch.setattr("dpud.bench.soak.OPERATIONS", (*OPERATIONS, (30, "lose a page", lose_a_page)))
    with pytest.raises(SoakError, match=r"seed 3, operation \d+: .*free_pages.*dpud bench soak --seed 3 --ops 50"):
        soak(3, 50, "stamp", eager=True)


# What chance seldom finds.


@pytest.fixture
def slow_lab() -> Iterator[Lab]:
    """A process with holes on a machine whose device takes its time, and a compaction with a batch in flight."""
    patch = small_slices(16)
    lab = Lab((32,), nr_ranks=3, patience=60)
    lab.spawn("a", anon="12M", holes="50 seed=1")
    yield lab
    patch.undo()


def batch_in_flight(lab: Lab) -> Operation[object]:
    """A compaction, run until the device has its first batch."""
    compaction = lab.start_compact()
    while not any(region.completion for region in lab.machine.dpu.vm.in_flight):
        assert not advance(compaction)[0]
    return compaction


def runs_on(operation: Operation[object], nr_slices: int = 20) -> bool:
    """It does not come to its end in so many slices."""
    return not any(over for over, _ in (advance(operation) for _ in range(nr_slices)))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["exit", "unmap"])
def test_page_tables_and_rmap_stay_while_a_batch_is_in_flight(slow_lab: Lab, which: str) -> None:
    """The batch remembers where its PTEs are, and finds the others through the rmap chains."""
    compaction = batch_in_flight(slow_lab)
    mm = slow_lab.machine.processes["a"].mm
    nr_tables = slow_lab.vmstat()["nr_page_table_pages"]
    ending = slow_lab.end("a") if which == "exit" else slow_lab.start_set("a", "anon", "0")
    patient = [region.completion for region in slow_lab.vm.in_flight if region.completion]
    while all(completion._result is None for completion in patient):
        assert not advance(ending)[0]
        assert slow_lab.vmstat()["nr_page_table_pages"] == nr_tables
        assert mm.vma
        assert slow_lab.machine.check() == []
    settle([compaction, ending])
    slow_lab.assert_at_rest()


@pytest.mark.slow
def test_a_child_gets_the_pages_in_flight_too(slow_lab: Lab) -> None:
    compaction = batch_in_flight(slow_lab)
    settle([slow_lab.start_set("a", "fork", "child"), compaction])
    assert slow_lab.verify("child") == "ok"
    slow_lab.assert_at_rest()


@pytest.mark.slow
def test_no_batch_begins_while_a_fork_copies(slow_lab: Lab) -> None:
    """So that an interrupted fork can take its half-made child down at once."""
    fork, compaction = slow_lab.start_set("a", "fork", "child"), slow_lab.start_compact()
    assert runs_on(fork, 5)
    assert runs_on(compaction)
    if slow_lab.vm.in_flight:
        settle([fork, compaction])  # else the fork would wait for ever as it is closed
        pytest.fail("a batch began")
    fork.close()
    assert len(slow_lab.vm.mms_in_use) == 1
    settle([compaction])
    slow_lab.assert_at_rest()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_childs_name_is_taken_while_its_fork_goes_on(interrupted: bool) -> None:
    """So that no finished child is left over (found by the soak: seed 1030)."""
    lab = Lab((32,))
    lab.spawn("a", anon="12M")
    fork = lab.start_set("a", "fork", "child")
    assert not advance(fork)[0]
    with pytest.raises(OSError, match="name is taken"):
        lab.spawn("child")
    if interrupted:
        fork.close()
    else:
        settle([fork])
    assert lab.names == (["a"] if interrupted else ["a", "child"])
    assert len(lab.vm.mms_in_use) == len(lab.names)
    if interrupted:
        lab.spawn("child")
    lab.assert_at_rest()


@pytest.mark.slow
def test_a_cached_page_that_nobody_maps_is_not_mapped_while_in_flight(slow_lab: Lab) -> None:
    """No migration entry tells who faults it in that it is on the move (found by the soak: seed 1002)."""
    mm = slow_lab.machine.processes["a"].mm
    file = File(slow_lab.vm, 600)
    for mapped in range(2):
        vma = mm.mmap(600, file)
        if mapped:
            break
        complete(mm.write(vma))
        complete(mm.munmap(vma))  # the page cache keeps them
    compaction = batch_in_flight(slow_lab)
    isolated = slow_lab.mem.pages["flags"][slow_lab.vm.i_pages[file.i_base : file.i_base + 600]] & np.uint32(1 << 30)
    assert isolated.any()
    settle([compaction, mm.write(vma)])
    slow_lab.assert_at_rest()


@pytest.mark.slow
def test_a_page_faulted_in_anew_is_not_taken_for_the_one_in_flight(slow_lab: Lab) -> None:
    """Freed while its batch is under way, touched again, and the new page is in a later batch: the first batch must
    leave the PTE alone when it ends."""
    compaction = batch_in_flight(slow_lab)
    for attr, text in (("holes", "100"), ("touch", "100"), ("holes", "50 seed=3")):
        settle([slow_lab.start_set("a", attr, text)])
        assert any(region.completion and not region.completion._result for region in slow_lab.vm.in_flight)
    settle([compaction])
    assert slow_lab.stats()["regions"] > 2
    slow_lab.assert_at_rest()


@pytest.mark.slow
def test_a_file_that_was_unmapped_goes_later_if_the_request_is_interrupted(slow_lab: Lab) -> None:
    """An interrupted request must not wait for the batch in flight, and the page cache must not keep the file."""
    process = slow_lab.machine.processes["a"]
    slow_lab.set("a", file="64K")
    compaction = batch_in_flight(slow_lab)
    change = slow_lab.start_set("a", "file", "1M")
    while len(process.file_vmas) < 2:
        assert not advance(change)[0]
    change.close()
    assert len(process.file_vmas) == 1
    assert len(slow_lab.vm.files) == 2
    settle([compaction])
    slow_lab.assert_at_rest()
    settle([slow_lab.end("a")])
    assert slow_lab.vm.files == []
    slow_lab.assert_at_rest()
