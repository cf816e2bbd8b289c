# SPDX-License-Identifier: GPL-2.0-only
"""The machine as a whole: the same inputs bring the same state, time moves only when told, and nothing leaks."""

import subprocess
import sys
from pathlib import Path

import pytest
from machines import MIB, Lab, settle, small_slices

from kernelsim.machine import MM_CONFIGFS, Machine, MachineConfig, NodeConfig
from kernelsim.timer import ManualClock


def script(seed: int = 7, words: str = "stamp", nr_ranks: int = 1) -> Lab:
    """A bit of everything."""
    lab = Lab((32, 32), words, nr_ranks=nr_ranks)
    lab.spawn("a", anon="20M", file="1M", holes=f"50 seed={seed}")
    lab.set("a", fork="b", touch=f"10 seed={seed}", mlock="20", pin="1")
    lab.set("b", holes="20 runs", touch="30")
    for nid in (0, 1):
        lab.compact(nid)
    lab.sysctl(nr_hugepages=2, dpu_compact_region_order=13)
    lab.compact()
    return lab


@pytest.mark.slow
@pytest.mark.parametrize("words", ["stamp", "full"])
def test_the_same_inputs_bring_the_same_state(words: str) -> None:
    assert script(words=words).machine.state_hash() == script(words=words).machine.state_hash()


@pytest.mark.slow
def test_other_inputs_bring_another_state() -> None:
    assert script(seed=7).machine.state_hash() != script(seed=8).machine.state_hash()


@pytest.mark.slow
def test_one_bit_of_content_changes_the_hash() -> None:
    lab = script()
    before = lab.machine.state_hash()
    lab.vm.memory[lab.machine.processes["a"].mm.pinned[0], 0] ^= 1
    assert lab.machine.state_hash() != before


@pytest.mark.slow
def test_another_process_comes_to_the_same_hash() -> None:
    """No address, hash seed or clock of this process is in it."""
    code = "from test_machine import script; print(script().machine.state_hash())"
    env = {"PYTHONPATH": ":".join([*sys.path, str(Path(__file__).parent)]), "PYTHONHASHSEED": "5"}
    told = subprocess.run(
        [sys.executable, "-c", f"import dpud; {code}"], env=env, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == script().machine.state_hash()


def placement(lab: Lab) -> dict[int, int]:
    """Content of every page that is in use, by frame."""
    pages = lab.mem.pages[: lab.mem.nr_pages]
    return {int(pfn): int(lab.vm.memory[pfn, 0]) for pfn in (pages["mapcount"] > 0).nonzero()[0]}


@pytest.mark.parametrize("slice_pages", [50, 511, 3000])
@pytest.mark.parametrize("nr_ranks", [1, 3])
@pytest.mark.slow
def test_slices_and_ranks_do_not_change_the_outcome(slice_pages: int, nr_ranks: int) -> None:
    """However long operations are cut up, and however many batches are in flight."""
    expected = placement(script())
    patch = small_slices(slice_pages)
    try:
        assert placement(script(nr_ranks=nr_ranks)) == expected
    finally:
        patch.undo()


def test_time_stands_still_unless_told() -> None:
    clock = ManualClock()
    machine = Machine(MachineConfig(nodes=(NodeConfig(32 * MIB),), bytes="stamp"), None, clock)
    machine.registry.write("/proc/sys/vm/compaction_proactiveness", "0")
    assert machine.peek() is None
    machine.printk("one")
    clock.advance(1_500_000)
    machine.printk("two")
    assert machine.registry.nodes["/dev/kmsg"]
    assert machine.printk.lines()[-2:] == ["one", "two"]
    machine.step(clock.now_ns())
    assert clock.now_ns() == 1_500_000


# Free page reporting.


def reporting_machine() -> tuple[Machine, ManualClock, list[tuple[int, int]]]:
    given: list[tuple[int, int]] = []
    clock = ManualClock()
    config = MachineConfig(nodes=(NodeConfig(64 * MIB),), bytes="stamp")
    machine = Machine(config, None, clock, discard=lambda pfn, nr: given.append((pfn, nr)))
    machine.registry.write("/proc/sys/vm/compaction_proactiveness", "0")  # kcompactd's timer never rests
    return machine, clock, given


def test_freed_memory_goes_back_to_the_host_after_two_seconds() -> None:
    machine, clock, given = reporting_machine()
    process = machine.new_process("a")
    machine.registry.add(f"{MM_CONFIGFS}/a", process)
    machine.registry.write(f"{MM_CONFIGFS}/a/anon", "24M")
    assert machine.peek() == 2_000_000_000
    machine.step(1_999_999_999)
    assert given == []
    machine.registry.write(f"{MM_CONFIGFS}/a/anon", "0")
    clock.advance(2_000_000_000)
    run_timers(machine)
    discarded = {pfn for start, nr in given for pfn in range(start, start + nr)}
    orders = machine.mem.pages["order"]
    free = {
        pfn
        for head in (machine.mem.pages["flags"][: machine.mem.nr_pages] & (1 << 10)).nonzero()[0].tolist()
        if orders[head] >= 9
        for pfn in range(head, head + (1 << int(orders[head])))
    }
    assert discarded == free
    assert machine.peek() is None


def test_no_page_in_use_is_ever_reported() -> None:
    machine, clock, given = reporting_machine()
    process = machine.new_process("a")
    machine.registry.add(f"{MM_CONFIGFS}/a", process)
    machine.registry.write(f"{MM_CONFIGFS}/a/anon", "30M")
    machine.peek()
    clock.advance(3_000_000_000)
    run_timers(machine)
    in_use = set((machine.mem.pages["refcount"][: machine.mem.nr_pages] > 0).nonzero()[0].tolist())
    assert given
    assert not in_use & {pfn for start, nr in given for pfn in range(start, start + nr)}


def run_timers(machine: Machine) -> None:
    for _ in range(10_000):
        due = machine.peek()
        if due is None:
            return
        machine.step(due)
    raise AssertionError("the timer never rests")


# Processes come and go.


def test_everything_is_free_again_when_all_have_gone() -> None:
    lab = Lab((32, 32))
    at_boot = lab.read("/proc/buddyinfo")
    lab.spawn("a", anon="20M", file="1M", fork="b", holes="40 seed=1", mlock="30", pin="5")
    lab.set("b", fork="c", touch="50", anon="2M")
    lab.sysctl(nr_hugepages=2)
    lab.compact()
    settle([lab.end(name) for name in ("b", "a", "c")])
    lab.sysctl(nr_hugepages=0)
    assert lab.read("/proc/buddyinfo") == at_boot
    assert (lab.vm.mms_in_use, lab.vm.vma_objects, lab.vm.files) == (set(), [], [])
    lab.assert_at_rest()


def test_pids_are_not_used_twice() -> None:
    lab = Lab((32,))
    first = lab.spawn("a")
    settle([lab.end("a")])
    second = lab.spawn("a", fork="b")
    pids = [lab.read(f"{MM_CONFIGFS}/{name}/pid") for name in ("a", "b")]
    assert pids == ["101\n", "102\n"]
    assert first is not second


def test_nodes_without_cpus_lend_their_memory() -> None:
    config = MachineConfig(nodes=(NodeConfig(32 * MIB, 0), NodeConfig(32 * MIB, 2)), bytes="stamp")
    machine = Machine(config)
    assert machine.registry.read("/sys/devices/system/node/has_cpu") == b"1\n"
    assert machine.registry.read("/sys/devices/system/node/node0/cpulist") == b"\n"
    assert machine.new_process("a").mm.node == 1
    assert machine.check() == []


# Hugetlb.


def test_nr_hugepages_reads_what_could_be_had() -> None:
    lab = Lab((64,))
    lab.sysctl(nr_hugepages=4)
    assert lab.read("/proc/sys/vm/nr_hugepages") == "4\n"
    lab.sysctl(nr_hugepages=1000)
    got = int(lab.read("/proc/sys/vm/nr_hugepages"))
    assert 20 < got < 32
    assert lab.vmstat()["htlb_buddy_alloc_success"] == got
    assert lab.vmstat()["htlb_buddy_alloc_fail"] == 1
    assert lab.vmstat()["nr_hugetlb"] == got * 512
    lab.assert_at_rest()
    lab.sysctl(nr_hugepages=0)
    assert lab.read("/proc/buddyinfo") == Lab((64,)).read("/proc/buddyinfo")


def test_huge_pages_come_from_the_nodes_in_turn() -> None:
    lab = Lab((64, 64))
    lab.sysctl(nr_hugepages=6)
    assert lab.mem.nodes["nr_hugetlb"].tolist() == [3 * 512, 3 * 512]


@pytest.mark.slow
def test_compaction_makes_room_for_huge_pages() -> None:
    """The selftest's story: fragmented memory has few 2 MiB blocks, the DPU makes more."""
    lab = Lab((64,))
    lab.spawn("a", anon="56M", holes="50 seed=1")
    path = lab.allocator("x", order="9", gfp="GFP_TRANSHUGE_LIGHT", count="100")
    before = lab.alloc(path)["allocated"]
    lab.write(f"{path}/free", "1")
    lab.sysctl(dpu_compact_region_order=18)
    lab.compact()
    assert lab.alloc(path)["allocated"] >= before + 8
    lab.assert_at_rest()
