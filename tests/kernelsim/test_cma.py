# SPDX-License-Identifier: GPL-2.0-only
"""CMA areas through their files: who may live there, who is moved away, and what is counted."""

import errno
import re

import numpy as np
import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from machines import Lab, advance, settle, small_slices
from numpy.typing import NDArray
from wiring import errno_of

from dpud.dpu.faults import FaultKind
from kernelsim import page_alloc as buddy
from kernelsim.machine import MM_CONFIGFS, Machine, MachineConfig, NodeConfig
from kernelsim.mm_configfs import Process

MIB = 1 << 20
DEBUGFS = "/sys/kernel/debug/cma/pernuma0"
SYSFS = "/sys/kernel/mm/cma/pernuma0"
UNMOVABLE, MOVABLE, RECLAIMABLE = range(3)
GFP_HIGHUSER_MOVABLE = 0x100CCA
CMA = 4


def figure(lab: Lab, name: str, directory: str = DEBUGFS) -> int:
    return int(lab.read(f"{directory}/{name}"))


def alloc(lab: Lab, nr: int | str) -> int:
    """0 or the errno of the write."""
    return errno_of(lab.write, f"{DEBUGFS}/alloc", f"{nr}\n")


def free(lab: Lab, nr: int | str) -> None:
    lab.write(f"{DEBUGFS}/free", f"{nr}\n")


def meminfo(lab: Lab) -> dict[str, int]:
    return {name: int(kb) for name, kb in re.findall(r"^(\S+):\s+(\d+)", lab.read("/proc/meminfo"), re.MULTILINE)}


def in_area(lab: Lab, flag: int = 1 << 5) -> int:
    """Pages of the area with a flag (LRU: movable ones in use)."""
    base = figure(lab, "base_pfn")
    return int(np.count_nonzero(lab.mem.pages["flags"][base : base + figure(lab, "count")] & np.uint32(flag)))


def take(lab: Lab, migratetype: int, order: int = 0) -> int:
    mem = lab.mem
    return int(buddy.get_page_from_freelist(mem.pages, mem.zones, mem.blocks, mem.zonelist[0], order, migratetype))


# Boot.


def test_the_area_lies_at_the_end_of_its_nodes_memory_and_is_free() -> None:
    """64 MiB: the memory map takes the last 256 pages, so 8 MiB end at the pageblock boundary below, 0x3e00."""
    lab = Lab((64,), cma=8)
    assert (figure(lab, "base_pfn"), figure(lab, "count")) == (0x3E00 - 2048, 2048)
    assert lab.mem.blocks.tolist() == [MOVABLE] * 27 + [CMA] * 4 + [MOVABLE]
    assert meminfo(lab)["CmaTotal"] == meminfo(lab)["CmaFree"] == 8192
    assert lab.vmstat()["nr_free_cma"] == 2048
    assert "cma: Reserved 8 MiB at 0x0000000003600000 on node 0" in lab.machine.printk.lines()
    lab.assert_at_rest()


def test_pagetypeinfo_has_a_cma_row_and_column() -> None:
    text = Lab((64,), cma=8).read("/proc/pagetypeinfo")
    rows = re.findall(r"zone\s+DMA32, type\s+(\w+) ((?:\s*\d+ )+)\n", text)
    assert [name for name, _ in rows] == ["Unmovable", "Movable", "Reclaimable", "HighAtomic", "CMA", "Isolate"]
    assert dict(rows)["CMA"].split() == ["0"] * 9 + ["2", "1"]
    head, dma, dma32 = text.rstrip("\n").split("\n")[-3:]
    kinds = "Unmovable      Movable  Reclaimable   HighAtomic          CMA      Isolate "
    assert head == "Number of blocks type     " + kinds
    numbers = "            0 {:12d}            0            0 {:12d}            0 "
    assert dma == "Node 0, zone      DMA" + numbers.format(8, 0)
    assert dma32 == "Node 0, zone    DMA32" + numbers.format(20, 4)


def test_a_kernel_without_areas_shows_nothing_of_them() -> None:
    lab = Lab((64,))
    text = lab.read("/proc/pagetypeinfo")
    types = re.findall(r", type\s+(\w+)", text)
    assert types == ["Unmovable", "Movable", "Reclaimable", "HighAtomic", "Isolate"] * 2  # DMA and DMA32
    assert "CMA" not in text
    assert "Cma" not in lab.read("/proc/meminfo")
    assert "cma_alloc_success" not in lab.vmstat()
    assert lab.vmstat()["nr_free_cma"] == 0  # a zone counter in every kernel
    assert not [path for path, _, _ in lab.registry.walk() if "/cma/" in path]


@pytest.mark.parametrize("cma", [-2 * MIB, MIB, 3 * MIB, 64 * MIB, 80 * MIB])
def test_an_area_that_cannot_be_is_refused(cma: int) -> None:
    with pytest.raises(ValueError, match="CMA area"):
        Machine(MachineConfig(nodes=(NodeConfig(64 * MIB, 1, cma),)))


def test_an_area_lies_in_one_zone() -> None:
    """Of 64 MiB the first 16 are zone DMA."""
    with pytest.raises(ValueError, match="zone DMA32 is too small"):
        Machine(MachineConfig(nodes=(NodeConfig(64 * MIB, 1, 48 * MIB),)))


# Who may use the area meanwhile.


@pytest.mark.slow
def test_only_movable_pages_get_in() -> None:
    lab = Lab((64,), cma=16)
    for migratetype in (UNMOVABLE, RECLAIMABLE):
        while take(lab, migratetype) >= 0:
            pass
        assert meminfo(lab)["CmaFree"] == 16384
    assert lab.machine.check() == []
    pfn = take(lab, MOVABLE)
    assert lab.mem.blocks[pfn >> 9] == CMA


def test_free_cma_pages_do_not_meet_the_watermark_of_others() -> None:
    """An unmovable request fails although the zone has thousands of free pages; all but the min watermark is had."""
    lab = Lab((64,), cma=16)
    while take(lab, UNMOVABLE) >= 0:
        pass
    zone = lab.mem.zones[1]
    assert int(zone["free_pages"]) - int(zone["free_cma"]) == int(zone["watermark"][0])
    assert int(zone["free_cma"]) == 4096
    assert not buddy.zone_watermark_ok(lab.mem.zones, 1, 0, int(zone["watermark"][0]), 1)
    assert buddy.zone_watermark_ok(lab.mem.zones, 1, 0, int(zone["watermark"][0]), 1, True)
    assert not buddy.zone_watermark_ok(lab.mem.zones, 1, 9, 0, 1)
    assert buddy.zone_watermark_ok(lab.mem.zones, 1, 9, 0, 1, True)


def test_a_fault_without_memory_for_its_page_table_fails() -> None:
    """Movable pages are left, in the area, but no others: reclaim has nothing to give, and the fault must end."""
    lab = Lab((64,), cma=16)
    lab.spawn("a")
    while take(lab, UNMOVABLE) >= 0:
        pass
    assert errno_of(lambda: lab.set("a", anon="1M")) == errno.ENOMEM
    assert meminfo(lab)["CmaFree"] == 16384
    assert any("page allocation failure: order:0" in line for line in lab.machine.printk.lines())
    assert lab.machine.check() == []


def test_the_area_is_used_first_while_it_is_most_of_what_is_free() -> None:
    """Balance of __rmqueue(): from the area while it has more than half of the zone's free pages."""
    lab = Lab((64,), cma=16)
    while lab.mem.zones["free_cma"][1] * 2 <= lab.mem.zones["free_pages"][1]:
        pfn = take(lab, MOVABLE)
        assert lab.mem.blocks[pfn >> 9] == MOVABLE
    nr_others = int(lab.mem.zones["free_pages"][1] - lab.mem.zones["free_cma"][1])
    assert lab.mem.blocks[take(lab, MOVABLE) >> 9] == CMA
    for _ in range(500):
        take(lab, MOVABLE)
    zone = lab.mem.zones[1]
    assert abs(2 * int(zone["free_cma"]) - int(zone["free_pages"])) <= 1
    assert int(zone["free_pages"] - zone["free_cma"]) < nr_others


def test_compaction_fills_cma_blocks_too() -> None:
    lab = Lab((64,), cma=16)
    lab.spawn("a", anon="40M", holes="70 seed=1")
    lab.sysctl(dpu_compact_region_order=18)
    lab.compact()
    assert lab.stats()["pages_moved"] > 500
    lab.assert_at_rest()


# Allocating and freeing.


@pytest.mark.slow
@pytest.mark.parametrize("words", ["stamp", "full"])
@pytest.mark.parametrize("enabled", [1, 0], ids=["dpu", "cpu"])
def test_a_process_that_lives_in_the_area_is_moved_away(words: str, enabled: int) -> None:
    lab = Lab((64,), words, cma=16)
    lab.sysctl(dpu_compact_enabled=enabled)
    lab.spawn("a", anon="38M", holes="20 seed=1", fork="child")
    lived_there = in_area(lab)
    assert lived_there > 1500
    assert alloc(lab, 4096) == 0
    assert in_area(lab) == 0
    assert (figure(lab, "used"), figure(lab, "maxchunk")) == (4096, 0)
    assert meminfo(lab)["CmaFree"] == 0
    assert lab.vmstat()["pgmigrate_success"] == lived_there
    assert lab.verify("a") == lab.verify("child") == "ok"
    lab.assert_at_rest()
    free(lab, 4096)
    assert meminfo(lab)["CmaFree"] == 16384
    lab.assert_at_rest()


def test_the_first_run_that_is_long_enough_is_taken() -> None:
    lab = Lab((64,), cma=8)
    for nr in (100, 300, 5):
        assert alloc(lab, nr) == 0
    words = [int(word) for word in lab.read(f"{DEBUGFS}/bitmap").split()]
    assert words == [2**32 - 1] * 12 + [2**21 - 1] + [0] * 51  # 405 pages
    assert (figure(lab, "used"), figure(lab, "maxchunk")) == (405, 2048 - 405)
    lab.assert_at_rest()


def test_free_takes_the_newest_first_and_splits_the_last() -> None:
    """cma_free_mem(): a list with its newest entry in front; an entry that is too long gives its first pages."""
    lab = Lab((64,), cma=8)
    for nr in (100, 50, 8):
        alloc(lab, nr)
    free(lab, 18)  # the 8 at 150..157, and 10 of the 50 at 100..149
    words = [int(word) for word in lab.read(f"{DEBUGFS}/bitmap").split()]
    used = {at for at in range(2048) if words[at // 32] >> at % 32 & 1}
    assert used == set(range(100)) | set(range(110, 150))
    free(lab, 0)
    assert figure(lab, "used") == 140
    free(lab, 100000)  # more than there is
    assert figure(lab, "used") == 0
    free(lab, 1)  # none left: nothing happens
    lab.assert_at_rest()


def test_the_number_is_an_int() -> None:
    """Files take u64, and hand it on as int: 2^32 + 3 is 3, 2^32 - 1 is -1, which no allocation can be."""
    lab = Lab((64,), cma=8)
    assert alloc(lab, 2**32 + 3) == 0
    assert figure(lab, "used") == 3
    assert alloc(lab, 2**32 - 1) == errno.ENOMEM
    assert alloc(lab, "0x10") == 0
    assert figure(lab, "used") == 19
    free(lab, 2**32 - 1)  # counts down from beyond everything
    assert figure(lab, "used") == 0


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "-1", "abc", "1 2", "1.5", str(2**64)])
def test_what_is_no_number_is_einval(text: str) -> None:
    lab = Lab((64,), cma=8)
    assert alloc(lab, text) == errno.EINVAL
    assert errno_of(lab.write, f"{DEBUGFS}/free", text) == errno.EINVAL
    assert figure(lab, "used") == 0


@pytest.mark.parametrize("nr", [0, 2049, 10**6])
def test_impossible_sizes_are_enomem_without_a_word(nr: int) -> None:
    lab = Lab((64,), cma=8)
    nr_lines = len(lab.machine.printk.lines())
    assert alloc(lab, nr) == errno.ENOMEM
    assert lab.vmstat()["cma_alloc_fail"] == 0
    assert len(lab.machine.printk.lines()) == nr_lines


def test_a_full_area_is_enomem_and_logged() -> None:
    lab = Lab((64,), cma=8)
    assert alloc(lab, 2000) == 0
    assert alloc(lab, 49) == errno.ENOMEM
    assert lab.machine.printk.lines()[-1] == "cma: __cma_alloc: pernuma0: alloc failed, req-size: 49 pages, ret: -12"
    vmstat = lab.vmstat()
    assert (vmstat["cma_alloc_success"], vmstat["cma_alloc_fail"]) == (1, 1)
    assert [figure(lab, name, SYSFS) for name in ("alloc_pages_success", "alloc_pages_fail")] == [2000, 49]
    free(lab, 2000)
    assert figure(lab, "release_pages_success", SYSFS) == 2000
    assert figure(lab, "available_pages", SYSFS) == figure(lab, "total_pages", SYSFS) == 2048


def short_pins(lab: Lab, every: int) -> NDArray[np.int64]:
    """Pin pages of the area for a while, as direct I/O does: such pins do not make pages leave it first."""
    base = figure(lab, "base_pfn")
    mapped = np.flatnonzero(lab.mem.pages["mapcount"][base : base + figure(lab, "count")]) + base
    lab.mem.pages["refcount"][mapped[::every]] += 1024
    return mapped[::every]


@pytest.mark.slow
def test_pinned_pages_make_it_ebusy_in_the_log_and_enomem_in_the_shell() -> None:
    lab = Lab((64,), cma=16)
    lab.spawn("a", anon="40M")
    pinned = short_pins(lab, 10)
    lived_there = in_area(lab)
    assert alloc(lab, 2048) == errno.ENOMEM
    assert lab.machine.printk.lines()[-1] == "cma: __cma_alloc: pernuma0: alloc failed, req-size: 2048 pages, ret: -16"
    assert "alloc_contig_range: [2e00, 3600) PFNs busy" in lab.machine.printk.lines()
    assert (figure(lab, "used"), lab.vmstat()["cma_alloc_fail"]) == (0, 1)
    assert 0 < in_area(lab) <= lived_there
    lab.assert_at_rest()
    lab.mem.pages["refcount"][pinned] -= 1024
    assert alloc(lab, 4096) == 0
    lab.assert_at_rest()


@pytest.mark.slow
def test_a_busy_place_is_passed_over() -> None:
    """The second place is behind the pinned page, and is had."""
    lab = Lab((64,), cma=16)
    lab.spawn("a", anon="40M")
    base = figure(lab, "base_pfn")
    assert lab.mem.pages["mapcount"][base + 700] == 1
    lab.mem.pages["refcount"][base + 700] += 1024
    assert alloc(lab, 1000) == 0
    words = [int(word) for word in lab.read(f"{DEBUGFS}/bitmap").split()]
    used = [at for at in range(4096) if words[at // 32] >> at % 32 & 1]
    assert used == list(range(701, 1701))
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FaultKind)
def test_a_failing_device_does_not_matter(kind: FaultKind) -> None:
    lab = Lab((64,), "full", cma=16)
    lab.spawn("a", anon="38M", fork="child")
    lab.arm(kind, 300)
    assert alloc(lab, 3000) == 0
    lab.assert_at_rest()


def test_a_movable_block_that_does_not_move_is_in_the_way() -> None:
    """Asked for as movable, held by the kernel: what a bad driver does to CMA on Linux too."""
    lab = Lab((64,), cma=16)
    lab.spawn("a", anon="30M")
    holder = lab.machine.direct_blocks
    pfn = take(lab, MOVABLE, 4)
    while lab.mem.blocks[pfn >> 9] != CMA:
        pfn = take(lab, MOVABLE, 4)
    holder.adopt(pfn, 4, GFP_HIGHUSER_MOVABLE)
    assert lab.machine.check() == []
    assert alloc(lab, 4096) == errno.ENOMEM
    assert lab.machine.printk.lines()[-1].endswith("req-size: 4096 pages, ret: -16")
    assert lab.machine.check() == []
    holder.free(pfn)
    assert alloc(lab, 4096) == 0
    lab.assert_at_rest()


@pytest.mark.slow
def test_two_at_once_get_different_pages() -> None:
    patch = small_slices(50)
    try:
        lab = Lab((64,), patience=4, cma=16)
        lab.spawn("a", anon="38M", holes="10 seed=1")
        outcomes = settle([lab.start(f"{DEBUGFS}/alloc", "1000") for _ in range(4)])
        assert outcomes == [4] * 4
        assert figure(lab, "used") == 4000
        lab.assert_at_rest()
    finally:
        patch.undo()


@pytest.mark.slow
def test_an_interrupted_one_holds_nothing() -> None:
    patch = small_slices(50)
    try:
        for nr_slices in range(1, 60, 4):
            lab = Lab((64,), patience=4, cma=16)
            lab.spawn("a", anon="38M", holes="10 seed=1")
            allocation = lab.start(f"{DEBUGFS}/alloc", "3000")
            over = any(advance(allocation)[0] for _ in range(nr_slices))
            allocation.close()
            assert figure(lab, "used") == (3000 if over else 0)
            lab.assert_at_rest()
    finally:
        patch.undo()


class CmaUsers(RuleBasedStateMachine):
    """Processes, allocations, pins and faults in any order: every invariant holds after each, and bytes are right."""

    lab: Lab | None = None

    @initialize(nodes=st.sampled_from([(64,), (48, 40)]), nr_ranks=st.sampled_from([1, None]))
    def boot(self, nodes: tuple[int, ...], nr_ranks: int | None) -> None:
        self.lab = Lab(nodes, nr_ranks=nr_ranks, patience=2, cma=12)
        self.lab.spawn("a", anon="20M")
        self.lab.spawn("b")

    @rule(name=st.sampled_from("ab"), size=st.sampled_from(["0", "8M", "30M"]))
    def grow(self, name: str, size: str) -> None:
        self._set(name, "anon", size)

    @rule(
        name=st.sampled_from("ab"), attr=st.sampled_from(["holes", "touch", "pin", "mlock"]), percent=st.integers(0, 60)
    )
    def change(self, name: str, attr: str, percent: int) -> None:
        self._set(name, attr, str(percent))

    @rule(name=st.sampled_from("ab"), thp=st.sampled_from("01"))
    def huge(self, name: str, thp: str) -> None:
        self._set(name, "thp", thp)

    @rule(size=st.sampled_from(["0", "1M", "6M"]))
    def cache(self, size: str) -> None:
        self._set("b", "file", size)

    def _set(self, name: str, attr: str, text: str) -> None:
        assert errno_of(lambda: self.lab.set(name, **{attr: text})) in (0, errno.ENOMEM)

    @rule(nr=st.sampled_from([1, 31, 512, 1000, 3072]))
    def allocate(self, nr: int) -> None:
        before = figure(self.lab, "used")
        error = alloc(self.lab, nr)
        assert error in (0, errno.ENOMEM)
        assert figure(self.lab, "used") == before + (nr if not error else 0)

    @rule(nr=st.sampled_from([1, 40, 600, 3072]))
    def release(self, nr: int) -> None:
        before = figure(self.lab, "used")
        free(self.lab, nr)
        assert figure(self.lab, "used") == max(before - nr, 0)

    @rule(kind=st.sampled_from(list(FaultKind)), move=st.sampled_from([0, 10, 200]))
    def break_device(self, kind: FaultKind, move: int) -> None:
        self.lab.arm(kind, move)

    @rule(nid=st.integers(0, 1))
    def compact(self, nid: int) -> None:
        self.lab.revive()
        self.lab.compact(nid % self.lab.mem.nr_nodes)

    @rule(nr=st.sampled_from([0, 2, 9]))
    def huge_pages(self, nr: int) -> None:
        self.lab.sysctl(nr_hugepages=nr)

    @invariant()
    def sound(self) -> None:
        if self.lab:
            assert self.lab.machine.check() == []

    def teardown(self) -> None:
        if self.lab:
            self.lab.assert_at_rest()
            free(self.lab, 10**6)
            self.lab.sysctl(nr_hugepages=0)
            settle([self.lab.end(name) for name in "ab"])
            self.lab.assert_at_rest()
            assert self.lab.vmstat()["nr_free_cma"] == 3072 * self.lab.mem.nr_nodes


class TestCmaUsers(CmaUsers.TestCase):
    settings = settings(max_examples=examples(8), stateful_step_count=20, deadline=None)


@pytest.mark.slow
class TestCmaUsersAtLength(CmaUsers.TestCase):
    settings = settings(max_examples=examples(60), stateful_step_count=50, deadline=None)


# Long-term pins do not stay in a CMA area (check_and_migrate_movable_pages).


def in_areas(lab: Lab, process: Process) -> int:
    """Pinned pages of a process that lie in a CMA area."""
    pinned = process.mm.pinned
    return sum(int(((pinned >= area.base) & (pinned < area.base + area.nr_pages)).sum()) for area in lab.vm.cma_areas)


@pytest.mark.slow
@pytest.mark.parametrize("thp", ["0", "1"])
@pytest.mark.parametrize("words", ["stamp", "full"])
def test_what_is_pinned_for_long_leaves_the_area(words: str, thp: str) -> None:
    lab = Lab((64,), words, cma=16)
    process = lab.spawn("a", thp=thp, anon="50M")
    area = lab.vm.cma_areas[0]
    mapped = lab.mem.pages["mapcount"][area.base : area.base + area.nr_pages] > 0
    assert mapped.sum() >= (7 if thp == "1" else 1000)  # it has pages there
    lab.set("a", holes="30 seed=1")
    moved = lab.vmstat()["pgmigrate_success"]
    lab.set("a", pin="5 seed=2")
    assert len(process.mm.pinned) > 300
    assert in_areas(lab, process) == 0
    assert lab.vmstat()["pgmigrate_success"] > moved
    lab.assert_at_rest()
    assert alloc(lab, area.nr_pages) == 0  # nothing in it is in the way
    lab.assert_at_rest()


def test_a_page_of_the_area_that_somebody_else_holds_fails_the_pin() -> None:
    """ENOMEM, and no pin is left."""
    lab = Lab((64,), cma=16)
    process = lab.spawn("a", anon="50M", holes="20 seed=1")
    area = lab.vm.cma_areas[0]
    pages = lab.mem.pages
    victim = int(np.flatnonzero(pages["mapcount"][area.base : area.base + area.nr_pages])[0]) + area.base
    pages["refcount"][victim] += 1  # as get_user_pages_fast() of some I/O under way
    refcounts = int(pages["refcount"].sum())
    assert errno_of(lab.write, f"{MM_CONFIGFS}/a/pin", "100") == errno.ENOMEM
    assert (len(process.mm.pinned), lab.read(f"{MM_CONFIGFS}/a/pin")) == (0, "0\n")
    assert int(pages["refcount"].sum()) == refcounts
    pages["refcount"][victim] -= 1
    lab.assert_at_rest()


@pytest.mark.slow
def test_without_room_outside_the_area_the_pin_fails() -> None:
    lab = Lab((64,), cma=16)
    process = lab.spawn("a", anon="56M")
    lab.alloc(lab.allocator("rest", gfp="GFP_NOWAIT", count="20000"))
    assert errno_of(lab.write, f"{MM_CONFIGFS}/a/pin", "100") == errno.ENOMEM
    assert len(process.mm.pinned) == 0
    lab.assert_at_rest()
