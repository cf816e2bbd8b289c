# SPDX-License-Identifier: GPL-2.0-only
"""Pages with the same content become one, and part again; what tools see of it. Truth: admin-guide/mm/ksm.rst, ksm(7).

test_ksm_host.py compares the counts with those of the running kernel.
"""

import errno
from collections.abc import Callable

import numpy as np
import pytest
from machines import MM_CONFIGFS, Lab, settle
from wiring import errno_of

from kernelsim.kconfig import Kconfig
from kernelsim.machine import MachineConfig, NodeConfig

KSM = "/sys/kernel/mm/ksm"
KPF_ANON, KPF_KSM = 1 << 12, 1 << 21
PAGE_BYTES = 4096
NR = 64  # pages of a process


def scan(lab: Lab, passes: int = 2) -> None:
    lab.write(f"{KSM}/run", "1")
    for _ in range(passes):
        lab.machine.clock.advance(10**9)  # type: ignore[attr-defined]
        lab.machine.step(lab.machine.clock.now_ns())
    lab.write(f"{KSM}/run", "0")


def merged(words: str = "stamp", names: str = "ab", nodes: tuple[int, ...] = (32,), **settings: str) -> Lab:
    """Processes all of whose pages are the same, merged."""
    lab = Lab(nodes, words, patience=0)
    lab.write(f"{KSM}/pages_to_scan", "100000")
    for name in names:
        lab.spawn(name, mergeable="1", **settings, anon=str(NR * PAGE_BYTES), same="100")
    scan(lab)
    lab.assert_at_rest()
    return lab


def count(lab: Lab, name: str) -> int:
    return int(lab.read(f"{KSM}/{name}"))


def ksm_pfns(lab: Lab) -> list[int]:
    flags = lab.read_numbers("/proc/kpageflags")
    return np.flatnonzero(flags & np.uint64(KPF_KSM)).tolist()


def of_process(lab: Lab, name: str, file: str) -> str:
    return lab.read(f"/proc/{lab.read(f'{MM_CONFIGFS}/{name}/pid').strip()}/{file}")


def line(text: str, name: str) -> int:
    return int(next(line for line in text.splitlines() if line.startswith(f"{name}:")).split()[1])


@pytest.mark.parametrize("words", ["stamp", "full"])
def test_what_is_the_same_becomes_one_page(words: str) -> None:
    lab = merged(words)
    assert (count(lab, "pages_shared"), count(lab, "pages_sharing")) == (1, 2 * NR - 1)
    (pfn,) = ksm_pfns(lab)
    assert lab.read_numbers("/proc/kpageflags", pfn, 1)[0] & np.uint64(KPF_ANON)
    assert lab.read_numbers("/proc/kpagecount", pfn, 1)[0] == 2 * NR
    assert lab.vmstat()["nr_anon_pages"] == 1
    assert line(of_process(lab, "a", "smaps"), "KSM") == line(of_process(lab, "a", "smaps"), "Rss") == NR * 4
    assert line(of_process(lab, "a", "status"), "RssAnon") == NR * 4
    assert of_process(lab, "a", "ksm_merging_pages") == f"{NR}\n"
    assert " mg " in of_process(lab, "a", "smaps")


def test_a_write_gets_a_page_of_its_own() -> None:
    lab = merged()
    lab.set("a", touch="100")
    lab.assert_at_rest()
    assert lab.vmstat()["cow_ksm"] == NR
    assert lab.vmstat()["nr_anon_pages"] == 1 + NR
    assert count(lab, "pages_sharing") == 2 * NR - 1, "ksmd has not seen it"
    scan(lab, 1)
    assert (count(lab, "pages_sharing"), count(lab, "pages_volatile")) == (NR - 1, NR)


def test_the_last_mapping_of_a_merged_page_is_copied_too() -> None:
    """Or whoever finds the page in the stable tree would find another content."""
    lab = merged(names="a")
    vma = lab.machine.processes["a"].anon_vmas[0]
    (pfn,) = ksm_pfns(lab)
    settle([vma.mm.madvise_dontneed(vma, vma.vpns()[1:]), vma.mm.write(vma, vma.vpns()[:1])])
    assert ksm_pfns(lab) == []
    assert lab.read_numbers("/proc/kpagecount", pfn, 1)[0] == 0


COMPACTIONS: dict[str, Callable[[Lab], None]] = {
    "DPU": lambda lab: lab.compact(),
    "CPU, batched": lambda lab: (lab.write("/sys/kernel/debug/dpu_compact/engine", "cpu-batched"), lab.compact())[1],
    "traditional": lambda lab: lab.write("/proc/sys/vm/compact_memory", "1"),
}


@pytest.mark.parametrize("how", COMPACTIONS)
def test_compaction_moves_a_merged_page_with_all_its_mappings(how: str) -> None:
    lab = Lab((32,), patience=0)
    lab.sysctl(dpu_compact_min_fragments=1)
    lab.write(f"{KSM}/pages_to_scan", "100000")
    lab.spawn("filler", anon="8M")
    for name in "ab":
        lab.spawn(name, mergeable="1", anon=str(NR * PAGE_BYTES), same="100 kinds=8")
    scan(lab)
    before = ksm_pfns(lab)
    lab.set("a", fork="c")
    lab.set("filler", holes="60 seed=2")
    COMPACTIONS[how](lab)
    lab.assert_at_rest()
    after = ksm_pfns(lab)
    assert len(before) == len(after) == 8
    assert not set(before) & set(after)
    assert sum(lab.read_numbers("/proc/kpagecount")[after].tolist()) == 3 * NR


def test_a_child_s_pages_are_found_when_its_parent_has_gone() -> None:
    lab = merged(names="a")
    lab.set("a", fork="b")
    settle([lab.end("a")])
    lab.assert_at_rest()
    assert count(lab, "pages_shared") == 0, "nothing was looked at in the child"
    scan(lab, 1)
    assert (count(lab, "pages_shared"), count(lab, "pages_sharing")) == (1, NR - 1)
    lab.write("/proc/sys/vm/compact_memory", "1")
    settle([lab.end("b")])
    assert lab.machine.ksm is not None
    assert lab.machine.ksm.stable.nodes == {}


def test_a_page_that_is_pinned_stays_itself() -> None:
    lab = Lab((32,), patience=0)
    lab.spawn("a", mergeable="1", anon=str(NR * PAGE_BYTES), same="100", pin="100")
    scan(lab)
    assert (count(lab, "pages_shared"), lab.vmstat()["nr_anon_pages"]) == (0, NR)
    lab.set("a", pin="0")
    scan(lab, 5)
    assert count(lab, "pages_sharing") == NR - 1
    lab.set("a", pin="100")
    assert ksm_pfns(lab) == []
    lab.assert_at_rest()


def test_huge_pages_are_split_for_it() -> None:
    lab = Lab((64,), patience=0)
    lab.write(f"{KSM}/pages_to_scan", "100000")
    lab.spawn("a", thp="1", mergeable="1", anon="4M", same="100")
    assert lab.vmstat()["nr_anon_transparent_hugepages"] == 2
    scan(lab)
    assert lab.vmstat()["thp_split_page"] == 2
    assert (count(lab, "pages_shared"), count(lab, "stable_node_dups")) == (4, 4)
    lab.assert_at_rest()


def test_locked_pages_stay_locked() -> None:
    lab = merged(names="ab", mlock="0")
    lab.set("a", mlock="100")
    assert lab.vmstat()["nr_mlock"] == 1
    lab.set("a", same="100")
    scan(lab)
    assert (lab.vmstat()["nr_mlock"], lab.vmstat()["nr_unevictable"]) == (1, 1)
    lab.set("a", mlock="0")
    assert lab.vmstat()["nr_mlock"] == 0
    lab.assert_at_rest()


@pytest.mark.parametrize(("path", "text"), [(f"{KSM}/run", "2"), ("mergeable", "0")])
def test_all_is_unmerged(path: str, text: str) -> None:
    lab = merged()
    lab.set("a", fork="c")
    if path == "mergeable":
        for name in "abc":
            lab.set(name, mergeable=text)
    else:
        lab.write(path, text)
    assert ksm_pfns(lab) == []
    assert [count(lab, f"pages_{name}") for name in ("shared", "sharing", "unshared", "volatile")] == [0, 0, 0, 0]
    assert lab.vmstat()["nr_anon_pages"] == 3 * NR
    lab.assert_at_rest()


def test_without_room_to_unmerge_it_stops_halfway() -> None:
    lab = merged()
    lab.spawn("c", mergeable="1", anon="8M", same="100")
    scan(lab)
    lab.spawn("most", anon="27M")
    assert errno_of(lab.write, f"{KSM}/run", "2") == errno.ENOMEM
    assert lab.read(f"{KSM}/run") == "0\n"
    lab.assert_at_rest()


def test_max_page_sharing_makes_more_pages_of_one_content() -> None:
    lab = Lab((32,), patience=0)
    lab.write(f"{KSM}/max_page_sharing", "10")
    lab.spawn("a", mergeable="1", anon=str(NR * PAGE_BYTES), same="100")
    scan(lab)
    assert (count(lab, "stable_node_chains"), count(lab, "stable_node_dups")) == (1, 7)
    assert max(lab.read_numbers("/proc/kpagecount")[ksm_pfns(lab)].tolist()) == 10


@pytest.mark.parametrize(("across", "nr_pages"), [("1", 1), ("0", 2)])
def test_merge_across_nodes(across: str, nr_pages: int) -> None:
    lab = Lab((32, 32), patience=0)
    lab.write(f"{KSM}/merge_across_nodes", across)
    for node in "01":
        lab.spawn(f"n{node}", node=node, mergeable="1", anon=str(NR * PAGE_BYTES), same="100")
    scan(lab, 4)
    assert count(lab, "pages_shared") == nr_pages


def test_knobs_of_the_stable_tree_wait_until_nothing_is_merged() -> None:
    lab = merged()
    for name, text in (("merge_across_nodes", "0"), ("max_page_sharing", "9")):
        before = lab.read(f"{KSM}/{name}")
        assert errno_of(lab.write, f"{KSM}/{name}", text) == errno.EBUSY
        assert lab.read(f"{KSM}/{name}") == before
        lab.write(f"{KSM}/{name}", before)
    lab.write(f"{KSM}/run", "2")
    lab.write(f"{KSM}/max_page_sharing", "9")


def test_words_for_yes_and_no() -> None:
    """As the running kernel's smart_scan took them (6.18)."""
    lab = Lab((32,))
    for text, value in (("off", 0), ("on", 1), ("N", 0), ("t", 1), ("disable", 0), ("enable", 1), ("0", 0), ("11", 1)):
        lab.write(f"{KSM}/smart_scan", text)
        assert lab.read(f"{KSM}/smart_scan") == f"{value}\n"
    assert errno_of(lab.write, f"{KSM}/max_page_sharing", "2147483648") == errno.ERANGE


def test_ksmd_sleeps_between_and_rests_when_there_is_nothing() -> None:
    lab = Lab((32,))
    lab.sysctl(compaction_proactiveness=0)
    lab.write(f"{KSM}/run", "1")
    assert lab.machine.peek() is None
    lab.spawn("a", mergeable="1", anon="4M")
    lab.machine.step(5)
    assert lab.machine.peek() == 5 + 20_000_000
    assert (count(lab, "pages_scanned"), count(lab, "full_scans")) == (100, 0)
    lab.set("a", anon="0")
    assert lab.machine.peek() is None


@pytest.mark.parametrize("config", [{"kconfig": {"CONFIG_KSM": "n"}}, {"words": "none"}])
def test_a_kernel_without_it(config: dict[str, str]) -> None:
    """Nothing can be the same where nothing is kept of a page."""
    lab = Lab((32,), **config)  # type: ignore[arg-type]
    lab.spawn("a")
    assert not [path for path in lab.registry.nodes if "ksm" in path]
    assert "cow_ksm" not in lab.vmstat()
    assert errno_of(lab.write, f"{MM_CONFIGFS}/a/mergeable", "1") == errno.EINVAL
    lab.set("a", anon="1M", same="50", mergeable="0")


def test_the_same_inputs_bring_the_same_state() -> None:
    def run() -> str:
        lab = merged(names="abc")
        lab.set("a", fork="d", touch="30")
        scan(lab, 1)
        return lab.machine.whole_hash()

    assert run() == run()


def test_ksm_cannot_be_had_without_contents() -> None:
    nodes = (NodeConfig(32 << 20, 1),)
    with pytest.raises(ValueError, match="CONFIG_KSM: needs the contents"):
        MachineConfig(nodes=nodes, bytes="none", kconfig=Kconfig({"CONFIG_KSM": "y"}))
