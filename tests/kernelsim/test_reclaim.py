# SPDX-License-Identifier: GPL-2.0-only
"""Reclaim: file pages go and come back with what was in them, nothing else goes."""

import errno

import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from machines import VM, Lab, settle
from wiring import errno_of

from kernelsim.machine import Machine
from kernelsim.operation import complete
from kernelsim.task import Task

MIB_PAGES = 256


def file_pages(lab: Lab) -> int:
    return int(lab.mem.nodes["nr_file_pages"].sum())


def run_threads(machine: Machine, rounds: int = 20) -> None:
    """Let kswapd and kcompactd do what they were woken for; time stands still."""
    for _ in range(rounds):
        now_ns = machine.clock.now_ns()
        due_ns = machine.kthreads.peek(now_ns)
        if due_ns is None or due_ns > now_ns:
            return
        machine.step(now_ns)
    raise AssertionError("a kernel thread never rests")


@pytest.mark.slow
def test_a_process_pushes_another_one_s_files_out() -> None:
    """28 MiB of file pages in 32 MiB, and a process that wants 20 MiB: it gets them, and no byte is lost."""
    lab = Lab((32,), nr_ranks=None)
    lab.spawn("reader", file="20M")
    lab.spawn("hog", anon="20M")
    assert file_pages(lab) < 12 * MIB_PAGES
    counted = lab.vmstat()
    assert counted["allocstall_movable"] > 0
    assert counted["pgsteal_direct"] == counted["pgsteal_file"] >= 8 * MIB_PAGES
    assert counted["pgscan_direct"] >= counted["pgsteal_direct"]
    assert counted["pgsteal_kswapd"] == 0
    before = counted["pgmajfault"]
    lab.assert_sound()
    assert lab.vmstat()["pgmajfault"] > before
    assert lab.read("/sys/kernel/config/kernelsim/mm/reader/rss").strip() != str(20 << 20)


def test_anonymous_locked_and_pinned_pages_stay() -> None:
    lab = Lab((32,), nr_ranks=None)
    lab.spawn("a", anon="20M", mlock="30", pin="10")
    nr_anon = int(lab.mem.nodes["nr_anon_pages"].sum())
    with pytest.raises(OSError, match="page fault") as full:
        lab.spawn("b", anon="20M")
    assert full.value.errno == errno.ENOMEM
    assert int(lab.mem.nodes["nr_anon_pages"].sum()) == nr_anon
    assert lab.vmstat()["pgsteal_file"] == 0
    assert any("b: page allocation failure: order:0" in line for line in lab.machine.printk.lines())
    lab.assert_sound()


def test_a_page_that_was_used_gets_another_round() -> None:
    """Used pages are activated; only unused ones go at once."""
    lab = Lab((32,), nr_ranks=None)
    lab.spawn("a", file="8M")
    reclaim = lab.machine.reclaim
    assert complete(reclaim.shrink_node(0, 0, 3, 10_000)) < 8 * MIB_PAGES
    assert lab.vmstat()["pgactivate"] > 0
    for _ in range(40):
        complete(reclaim.shrink_node(0, 0, 3, 10_000))
    assert file_pages(lab) == 0
    assert lab.vmstat()["pgdeactivate"] == lab.vmstat()["pgrefill"] > 0
    lab.assert_sound()
    assert file_pages(lab) == 8 * MIB_PAGES


@pytest.mark.slow
def test_kswapd_brings_the_node_back_to_high() -> None:
    lab = Lab((64,), nr_ranks=None)
    lab.spawn("reader", file="30M")
    lab.spawn("hog", anon="36M")
    zones = lab.mem.zones
    kswapd = lab.machine.kswapds[0]
    assert not kswapd.balanced(0, 3)
    run_threads(lab.machine)
    assert kswapd.balanced(0, 3)
    assert (zones["free_pages"] > zones["watermark"][:, 2]).any()
    counted = lab.vmstat()
    assert counted["pageoutrun"] >= 1
    assert counted["pgsteal_kswapd"] > 0
    lab.assert_sound()


@pytest.mark.slow
def test_a_node_without_file_pages_is_hopeless_after_sixteen_rounds() -> None:
    lab = Lab((32,), nr_ranks=None)
    lab.spawn("hog", anon="28M")
    path = lab.allocator("x", gfp="GFP_KERNEL|__GFP_NOWARN", count="10000")
    lab.alloc(path)
    kswapd = lab.machine.kswapds[0]
    for round_number in range(16):
        assert not kswapd.hopeless, round_number
        lab.alloc(path, count="1")
        run_threads(lab.machine)
    assert kswapd.hopeless
    nr = lab.vmstat()["pageoutrun"]
    lab.alloc(path)
    run_threads(lab.machine)
    assert lab.vmstat()["pageoutrun"] == nr


@pytest.mark.slow
def test_reclaim_stops_where_compaction_can_go_on() -> None:
    """A costly request with free memory in pieces compacts; it does not throw the page cache away."""
    lab = Lab((64,), nr_ranks=None)
    lab.spawn("reader", file="8M")
    lab.spawn("a", anon="44M", holes="50 seed=1")
    lab.alloc(lab.allocator("drain", order="9", gfp="GFP_NOWAIT", count="100"))
    before = file_pages(lab)
    result = lab.alloc(lab.allocator("x", order="9", gfp="GFP_KERNEL", count="2"))
    assert result["allocated"] == 2
    assert file_pages(lab) == before
    lab.assert_sound()


# drop_caches.


def test_drop_caches_drops_what_nobody_maps() -> None:
    lab = Lab((32,), nr_ranks=None)
    lab.spawn("a", file="4M")
    lab.sysctl(drop_caches=1)
    assert file_pages(lab) == 4 * MIB_PAGES
    process = lab.machine.processes["a"]
    for vma in process.file_vmas:
        complete(process.mm.madvise_dontneed(vma, vma.vpns()[:512]))
    lab.sysctl(drop_caches=3)
    assert file_pages(lab) == 4 * MIB_PAGES - 512
    assert lab.vmstat()["drop_pagecache"] == 2
    assert lab.vmstat()["drop_slab"] == 1
    lab.assert_sound()


def test_drop_caches_logs_until_it_is_told_not_to() -> None:
    lab = Lab((32,), nr_ranks=None)
    for value in (1, 2, 4, 3):
        with lab.machine.tracing.trace.current.as_task(Task(4711, lambda: "bash")):
            lab.sysctl(drop_caches=value)
    assert [line for line in lab.machine.printk.lines() if "drop_caches" in line] == [
        f"bash (4711): drop_caches: {value}" for value in (1, 2, 4)
    ]
    for text in ("0", "5", "x"):
        assert errno_of(lab.write, f"{VM}/drop_caches", text) == errno.EINVAL


# Watermarks.


def test_min_free_kbytes_moves_the_watermarks() -> None:
    lab = Lab((64,), nr_ranks=None)
    assert lab.read(f"{VM}/min_free_kbytes") == f"{int(lab.mem.zones['watermark'][:, 0].sum()) * 4}\n"
    lab.sysctl(min_free_kbytes=4096)
    assert lab.read(f"{VM}/min_free_kbytes") == "4096\n"
    low, high = (int(lab.mem.zones["watermark"][:, mark].sum()) for mark in (0, 2))
    assert low in (1022, 1023, 1024)
    assert high == pytest.approx(1.5 * 1024, abs=4)
    lab.sysctl(watermark_scale_factor=1000)
    gap = lab.mem.zones["watermark"][:, 1] - lab.mem.zones["watermark"][:, 0]
    assert gap.tolist() == [managed // 10 for managed in lab.mem.zones["managed"].tolist()]


# Everything together.


class Pressure(RuleBasedStateMachine):
    """Processes with files and memory that come and go on a machine too small for them."""

    def __init__(self) -> None:
        super().__init__()
        self.lab = Lab((48,))
        self.at_boot = int(self.lab.mem.zones["free_pages"].sum())
        self.lab.spawn("a", file="10M")
        self.lab.spawn("b", anon="10M")
        self.block = self.lab.allocator("x", gfp="GFP_KERNEL|__GFP_NOWARN")

    def _set(self, name: str, attr: str, text: str) -> None:
        try:
            self.lab.set(name, **{attr: text})
        except OSError as full:
            if full.errno != errno.ENOMEM:
                raise

    @rule(name=st.sampled_from("ab"), size=st.sampled_from(("0", "1M", "9M", "22M")))
    def file(self, name: str, size: str) -> None:
        self._set(name, "file", size)

    @rule(name=st.sampled_from("ab"), size=st.sampled_from(("1M", "9M", "20M")))
    def anon(self, name: str, size: str) -> None:
        self._set(name, "anon", size)

    @rule(name=st.sampled_from("ab"), percent=st.integers(1, 60), seed=st.integers(0, 9))
    def holes(self, name: str, percent: int, seed: int) -> None:
        self.lab.set(name, holes=f"{percent} seed={seed}")

    @rule(name=st.sampled_from("ab"))
    def touch(self, name: str) -> None:
        self._set(name, "touch", "50 seed=3")

    @rule(order=st.sampled_from((0, 2, 3, 4, 9)), count=st.sampled_from((1, 20)), gfp=st.integers(0, 3))
    def alloc(self, order: int, count: int, gfp: int) -> None:
        flags = ("GFP_ATOMIC", "GFP_KERNEL", "GFP_HIGHUSER_MOVABLE|__GFP_COMP", "GFP_KERNEL|__GFP_RETRY_MAYFAIL")[gfp]
        self.lab.alloc(self.block, order=str(order), count=str(count), gfp=f"{flags}|__GFP_NOWARN")

    @rule()
    def free(self) -> None:
        self.lab.write(f"{self.block}/free", "1")

    @rule()
    def threads(self) -> None:
        self.lab.machine.clock.advance(600_000_000)  # type: ignore[attr-defined]
        run_threads(self.lab.machine)

    @rule(what=st.sampled_from((1, 3)))
    def drop(self, what: int) -> None:
        self.lab.sysctl(drop_caches=what)

    @invariant()
    def sound(self) -> None:
        assert self.lab.machine.check() == []

    def teardown(self) -> None:
        self.lab.write(f"{self.block}/free", "1")
        self.lab.assert_at_rest()
        settle([self.lab.end(name) for name in "ab"])
        assert int(self.lab.mem.zones["free_pages"].sum()) == self.at_boot


TestPressure = Pressure.TestCase
TestPressure.settings = settings(max_examples=examples(15), stateful_step_count=12, deadline=None)
