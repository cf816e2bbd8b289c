# SPDX-License-Identifier: GPL-2.0-only
"""Nothing is ever lost, whatever runs between the slices of whatever else.

Requests run in slices and take turns. Here chance chooses the requests, the turns, who is interrupted, how late the
device moves its pages and when it fails. After every single slice all invariants must hold, contents included, and in
the end every process must read back what it wrote and every page be free again.
"""

import errno
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from machines import Lab, advance, settle, small_slices

from dpud.dpu.faults import FaultKind
from kernelsim.attr import Operation
from kernelsim.dpu_hw import ENGINES

NAMES = ("a", "b", "c", "d")
KINDS = tuple(FaultKind)
ENGINE = "/sys/kernel/debug/dpu_compact/engine"
PAGE_KINDS = ("page_busy", "page_dirtied", "page_forked", "page_freed", "page_pinned")
MAY_HAPPEN = {errno.ENOMEM, errno.EEXIST, errno.ESRCH}
MAX_RUNNING = 5

SETTINGS = (
    *(("anon", size) for size in ("0", "1M", "6M", "20M")),
    *(("file", size) for size in ("0", "64K", "3M")),
    *(("holes", text) for text in ("50 seed=1", "30 seed=2", "60 runs", "97 seed=3", "100")),
    *(("touch", text) for text in ("5 seed=4", "50 seed=5", "100")),
    *(("fork", name) for name in NAMES),
    *(("mlock", text) for text in ("0", "30", "100")),
    *(("pin", text) for text in ("0", "3 seed=6", "40")),
    *(("thp", text) for text in "110"),
)


class World:
    """A machine under several requests at once."""

    def __init__(
        self,
        nodes: tuple[int, ...],
        nr_ranks: int | None,
        patience: int | None,
        slice_pages: int,
        words: str = "stamp",
    ) -> None:
        self.patch = small_slices(slice_pages)
        self.lab = Lab(nodes, words, nr_ranks=nr_ranks, patience=patience)
        self.lab.sysctl(dpu_compact_min_fragments=4)
        self.at_boot = self.lab.mem.zones["free_pages"].tolist()
        self.running: list[Operation[object]] = []
        self.lab.spawn("a", anon="12M", holes="50 seed=9")

    def sound(self) -> None:
        assert self.lab.machine.check() == []

    def begin(self, operation: Operation[object]) -> None:
        if len(self.running) < MAX_RUNNING:
            self.running.append(operation)
            self.turns(len(self.running) - 1, 1)

    def change(self, name: str, attr: str, text: str) -> None:
        """echo into a process's file; mkdir first where there is none."""
        if name not in self.lab.machine.processes:
            try:
                self.lab.spawn(name)
            except OSError as full:
                if full.errno != errno.ENOMEM:
                    raise
        if name in self.lab.names:
            self.begin(self.lab.start_set(name, attr, text))

    def look(self, name: str) -> None:
        if name in self.lab.names:
            self.begin(self.lab.start_verify(name))

    def leave(self, name: str) -> None:
        """rmdir."""
        if name in self.lab.names and len(self.running) < MAX_RUNNING:
            self.begin(self.lab.end(name))

    def compact(self, nid: int) -> None:
        self.begin(self.lab.start_compact(nid % self.lab.mem.nr_nodes))

    def turns(self, which: int, nr: int) -> None:
        """Some slices of one request; every one leaves the machine sound."""
        for _ in range(nr):
            if not self.running:
                return
            which %= len(self.running)
            over, outcome = advance(self.running[which])
            self.sound()
            if over:
                del self.running[which]
                self.judge(outcome)
                return

    def judge(self, outcome: object) -> None:
        if isinstance(outcome, OSError):
            assert outcome.errno in MAY_HAPPEN, outcome
        elif isinstance(outcome, bytes):
            assert outcome == b"ok\n"

    def interrupt(self, which: int) -> None:
        if self.running:
            self.running.pop(which % len(self.running)).close()

    def configure(self, enabled: int, order: int, least: int) -> None:
        self.lab.sysctl(dpu_compact_enabled=enabled, dpu_compact_region_order=order, dpu_compact_min_fragments=least)

    def choose(self, engine: str, adaptive: int) -> None:
        """Another engine; without a device, there are the CPU's."""
        self.lab.sysctl(dpu_compact_adaptive=adaptive)
        if self.lab.hw or engine in ("cpu", "cpu-batched"):
            self.lab.write(ENGINE, engine)

    def finish(self) -> None:
        """Let everything that runs come to its end."""
        running, self.running = self.running, []
        for outcome in settle(running):
            self.judge(outcome)
        self.lab.assert_at_rest()

    def end(self) -> None:
        """Everything goes; every page is free again."""
        self.finish()
        settle([self.lab.end(name) for name in sorted(self.lab.machine.processes)])
        self.lab.sysctl(nr_hugepages=0)
        self.lab.assert_at_rest()
        assert self.lab.mem.zones["free_pages"].tolist() == self.at_boot
        assert self.lab.vm.mms_in_use == set()
        assert self.lab.vm.vma_objects == []
        assert self.lab.vm.files == []


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
        self.world.lab.sysctl(nr_hugepages=nr)

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
    settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestRequestsAtLength(Requests.TestCase):
    settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def soak(seed: int, nr_steps: int) -> World:
    """A world left to chance: many requests in flight, many turns, now and then a blow."""
    rng = np.random.default_rng(seed)

    def pick(choices: tuple[object, ...]) -> object:
        return choices[int(rng.integers(len(choices)))]

    world = World(pick(((32,), (32, 34))), pick((1, 2, None)), pick((None, 0, 3, 20)), pick((16, 100, 700)))
    world.configure(1, pick((9, 10, 12, 18)), 4)
    blows = (
        (0.13, lambda: world.change(pick(NAMES), *pick(SETTINGS))),
        (0.10, lambda: world.compact(int(rng.integers(2)))),
        (0.02, lambda: world.look(pick(NAMES))),
        (0.01, lambda: world.leave(pick(NAMES))),
        (0.02, lambda: world.interrupt(int(rng.integers(MAX_RUNNING)))),
        (0.01, lambda: world.lab.arm(pick(KINDS), pick((0, 3, 60)))),
        (0.01, lambda: world.lab.revive()),
        (0.02, lambda: world.lab.machine.dpu.inject.points[pick(PAGE_KINDS)].arm(pick((0, 7)), pick((1, 3)))),
        (0.01, lambda: world.configure(int(rng.random() < 0.9), pick((9, 10, 12, 18)), pick((1, 4, 200)))),
        (0.01, lambda: world.lab.sysctl(nr_hugepages=pick((0, 3)))),
        (0.02, lambda: world.choose(pick(ENGINES), int(rng.integers(2)))),
        (0.64, lambda: world.turns(int(rng.integers(MAX_RUNNING)), int(rng.integers(1, 8)))),
    )
    weights = [weight for weight, _ in blows]
    try:
        for which in rng.choice(len(blows), nr_steps, p=weights):
            blows[which][1]()
            world.sound()
        world.end()
    finally:
        world.patch.undo()
    return world


@pytest.mark.parametrize("seed", range(6))
def test_soak(seed: int) -> None:
    soak(seed, 150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_soak_at_length(seed: int) -> None:
    soak(seed, 800)


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


def test_a_child_gets_the_pages_in_flight_too(slow_lab: Lab) -> None:
    compaction = batch_in_flight(slow_lab)
    settle([slow_lab.start_set("a", "fork", "child"), compaction])
    assert slow_lab.verify("child") == "ok"
    slow_lab.assert_at_rest()


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


def test_a_file_that_was_unmapped_goes_later_if_the_request_is_interrupted(slow_lab: Lab) -> None:
    """An interrupted request must not wait for the batch in flight, and the page cache must not keep the file."""
    process = slow_lab.machine.processes["a"]
    slow_lab.set("a", file="64K")
    half = slow_lab.start_set("a", "file", "1M")
    advance(half)
    half.close()
    assert len(process.file_vmas) == 2
    change = slow_lab.start_set("a", "file", "0")
    while len(process.file_vmas) == 2:
        assert not advance(change)[0]
    compaction = batch_in_flight(slow_lab)
    change.close()
    settle([compaction])
    slow_lab.assert_at_rest()
    settle([slow_lab.end("a")])
    assert slow_lab.vm.files == []
    slow_lab.assert_at_rest()
