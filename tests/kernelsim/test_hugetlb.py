# SPDX-License-Identifier: GPL-2.0-only
"""The hugetlb pools through their files: of the machine and of each node, 2 MiB and 1 GiB."""

import errno

import numpy as np
import pytest
from machines import NODES_SYSFS, Lab, advance, settle
from wiring import errno_of

KIB_2M, KIB_1G = 2048, 1 << 20
POOL = "/sys/kernel/mm/hugepages/hugepages-{}kB"
NODE_POOL = NODES_SYSFS + "/node{}/hugepages/hugepages-{}kB"


def nr(lab: Lab, directory: str, name: str = "nr_hugepages") -> int:
    return int(lab.read(f"{directory}/{name}"))


def nodes(lab: Lab, size: int = KIB_2M) -> list[int]:
    return [nr(lab, NODE_POOL.format(nid, size)) for nid in range(lab.mem.nr_nodes)]


def meminfo(lab: Lab, path: str = "/proc/meminfo") -> dict[str, int]:
    lines = [line.removeprefix("Node 0 ").removeprefix("Node 1 ").split() for line in lab.read(path).splitlines()]
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


def test_the_sysctl_and_sysfs_are_one_pool() -> None:
    lab = Lab((64, 64))
    lab.sysctl(nr_hugepages=5)
    assert nr(lab, POOL.format(KIB_2M)) == nr(lab, POOL.format(KIB_2M), "free_hugepages") == 5
    assert nr(lab, POOL.format(KIB_2M), "surplus_hugepages") == 0
    assert nodes(lab) == [3, 2]
    lab.write(POOL.format(KIB_2M) + "/nr_hugepages", "2\n")
    assert lab.read("/proc/sys/vm/nr_hugepages") == "2\n"
    assert nodes(lab) == [1, 1]  # the newest went first
    assert meminfo(lab)["HugePages_Total"] == meminfo(lab)["HugePages_Free"] == 2
    lab.assert_at_rest()


def test_a_nodes_file_changes_that_node_only() -> None:
    lab = Lab((64, 64))
    lab.sysctl(nr_hugepages=4)
    lab.write(NODE_POOL.format(1, KIB_2M) + "/nr_hugepages", "7")
    assert nodes(lab) == [2, 7]
    assert lab.read("/proc/sys/vm/nr_hugepages") == "9\n"
    lab.write(NODE_POOL.format(0, KIB_2M) + "/nr_hugepages", "0")
    assert nodes(lab) == [0, 7]
    assert [meminfo(lab, f"{NODES_SYSFS}/node{nid}/meminfo")["HugePages_Total"] for nid in (0, 1)] == [0, 7]
    lab.assert_at_rest()


def test_a_node_gives_what_it_has_and_the_other_is_not_asked() -> None:
    lab = Lab((32, 64))
    lab.write(NODE_POOL.format(0, KIB_2M) + "/nr_hugepages", "1000")
    got = nodes(lab)
    assert 5 < got[0] < 16
    assert got[1] == 0
    assert lab.vmstat()["htlb_buddy_alloc_success"] == got[0]
    assert lab.vmstat()["htlb_buddy_alloc_fail"] == 1
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "-1", "abc", "1.5", "3 4", str(2**64)])
def test_what_is_no_number_is_einval(text: str) -> None:
    lab = Lab((32,))
    lab.sysctl(nr_hugepages=1)
    for directory in (POOL.format(KIB_2M), NODE_POOL.format(0, KIB_2M), POOL.format(KIB_1G)):
        assert errno_of(lab.write, f"{directory}/nr_hugepages", text) == errno.EINVAL
    assert nodes(lab) == [1]


def test_two_writers_take_turns() -> None:
    lab = Lab((64,))
    path = POOL.format(KIB_2M) + "/nr_hugepages"
    settle([lab.start(path, "9"), lab.start(path, "3"), lab.start(path, "6")])
    assert nr(lab, POOL.format(KIB_2M)) == 6
    lab.assert_at_rest()


# 1 GiB pages.


def gib_lab(words: str = "stamp", nr_ranks: int | None = 1, patience: int | None = None) -> Lab:
    """2.5 GiB on one node, with a process all over the place."""
    lab = Lab((2560,), words, nr_ranks=nr_ranks, patience=patience)
    lab.spawn("a", anon="1900M", holes="70 seed=1")
    return lab


@pytest.mark.parametrize("enabled", [1, 0], ids=["dpu", "cpu"])
@pytest.mark.slow
def test_a_gigantic_page_is_made_by_emptying_a_range(enabled: int) -> None:
    lab = gib_lab()
    lab.sysctl(dpu_compact_enabled=enabled)
    assert not [order for order in (9, 10) if int(lab.mem.zones["nr_free"].sum(axis=(0, 2))[order]) > 400]
    lab.write(POOL.format(KIB_1G) + "/nr_hugepages", "1")
    assert nr(lab, POOL.format(KIB_1G)) == nr(lab, POOL.format(KIB_1G), "free_hugepages") == 1
    assert nodes(lab, KIB_1G) == [1]
    (pfn,) = lab.machine.hugetlb.hstates[1].pfns
    pages = lab.mem.pages[pfn : pfn + (1 << 18)]
    assert pfn % (1 << 18) == 0
    assert (pages["flags"] & np.uint32(1 << 17) != 0).all()
    assert int(pages["order"][0]) == 18
    info = meminfo(lab)
    assert (info["HugePages_Total"], info["Hugetlb"]) == (0, KIB_1G)
    assert lab.vmstat()["nr_hugetlb"] == 1 << 18
    stats = dict(line.split() for line in lab.read("/sys/kernel/debug/dpu_compact/contig_stats").splitlines())
    moved = int(stats["dpu_pages_moved"]), int(stats["cpu_pages_moved"])
    assert moved[0 if enabled else 1] > 10_000
    assert moved[1 if enabled else 0] == 0
    lab.assert_at_rest()
    free = int(lab.mem.zones["free_pages"].sum())
    lab.write(POOL.format(KIB_1G) + "/nr_hugepages", "0")
    assert int(lab.mem.zones["free_pages"].sum()) == free + (1 << 18)
    assert lab.vmstat()["nr_hugetlb"] == 0
    lab.assert_at_rest()


@pytest.mark.slow
def test_no_more_gigantic_pages_than_there_are_ranges() -> None:
    """Of 2.5 GiB only the second one is whole and free of zone DMA, page 0 and the memory map."""
    lab = Lab((2560,))
    lab.write(POOL.format(KIB_1G) + "/nr_hugepages", "5")
    assert nr(lab, POOL.format(KIB_1G)) == 1
    assert lab.machine.hugetlb.hstates[1].pfns == [1 << 18]
    lab.assert_at_rest()


def test_a_small_machine_has_the_file_but_no_page() -> None:
    lab = Lab((32,))
    lab.write(POOL.format(KIB_1G) + "/nr_hugepages", "1")
    assert nr(lab, POOL.format(KIB_1G)) == 0


@pytest.mark.slow
def test_an_interrupted_write_keeps_what_it_got() -> None:
    lab = gib_lab(patience=3)
    growing = lab.start(POOL.format(KIB_1G) + "/nr_hugepages", "1")
    for _ in range(3):
        assert not advance(growing)[0]
    growing.close()
    assert nr(lab, POOL.format(KIB_1G)) == 0
    lab.assert_at_rest()
    lab.write(POOL.format(KIB_1G) + "/nr_hugepages", "1")
    assert nr(lab, POOL.format(KIB_1G)) == 1
