# SPDX-License-Identifier: GPL-2.0-only
"""The files that start and steer compaction (kernel-abi 1.1 to 1.3)."""

import errno

import pytest
from machines import VM, Lab, advance
from wiring import errno_of

from fs.kernfs import Cred, Tree
from kernelsim import compaction

ROOT = Cred(0, 0)
NODE = "/sys/devices/system/node/node{}/compact"


def fragmented() -> Lab:
    lab = Lab((32, 32), nr_ranks=None)
    for node in (0, 1):
        lab.spawn(f"p{node}", node=str(node), anon="20M", holes="50 seed=2")
    return lab


def moved(lab: Lab) -> int:
    return lab.vmstat()["pgmigrate_success"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["0", "2", "-1", "+1", "abc", "", "\n", " ", "1.5", "01x", "0x2", "9" * 20])
def test_compact_memory_takes_a_one_and_nothing_else(text: str) -> None:
    lab = fragmented()
    assert errno_of(lab.write, f"{VM}/compact_memory", text) == errno.EINVAL
    assert (moved(lab), lab.vmstat()["compact_migrate_scanned"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["1", "1\n", " 1 \n", "0x1", "01"])
def test_a_one_in_any_spelling_compacts_every_node(text: str) -> None:
    lab = fragmented()
    before = lab.mem.zones["nr_free"][:, 9:].sum(axis=(1, 2))
    lab.write(f"{VM}/compact_memory", text)
    after = lab.mem.zones["nr_free"][:, 9:].sum(axis=(1, 2))
    grown = {int(nid) for nid in lab.mem.zones["node"][after > before]}
    assert grown == {0, 1}
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["1", "0", "abc", "\n", "-", "all of it"])
def test_a_nodes_file_takes_any_text(text: str) -> None:
    lab = fragmented()
    before = lab.read("/proc/buddyinfo").splitlines()
    lab.write(NODE.format(1), text)
    after = lab.read("/proc/buddyinfo").splitlines()
    assert moved(lab) > 0
    changed = {line[:6] for line, was in zip(after, before, strict=True) if line != was}
    assert changed == {"Node 1"}
    lab.assert_at_rest()


@pytest.mark.slow
@pytest.mark.parametrize("path", [f"{VM}/compact_memory", NODE.format(0)])
def test_not_even_root_can_read_the_triggers(path: str) -> None:
    """Mode 0200: the kernel refuses to open it for reading."""
    tree = Tree(fragmented().registry)
    assert tree.getattr(path).st_mode == 0o100200
    for flags in (0, 2):
        assert errno_of(tree.open, path, flags, ROOT) == errno.EACCES


def test_compacting_by_hand_touches_no_counter_of_others() -> None:
    lab = fragmented()
    lab.write(f"{VM}/compact_memory", "1")
    lab.write(NODE.format(0), "1")
    names = ("stall", "fail", "success", "daemon_wake", "daemon_migrate_scanned", "daemon_free_scanned")
    assert [lab.vmstat()[f"compact_{name}"] for name in names] == [0] * 6


def test_by_hand_indices_deferral_and_skip_bits_do_not_count() -> None:
    lab = fragmented()
    lab.sysctl(extfrag_threshold=1000)
    lab.mem.skip[:] = 1
    for zone in range(len(lab.mem.zones)):
        lab.machine.compaction.defer_compaction(zone, 1)
    lab.write(f"{VM}/compact_memory", "1")
    assert moved(lab) > 1000


@pytest.mark.slow
def test_an_interrupted_write_stops_between_two_slices() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(compaction, "SLICE_PAGES", 4096)
    lab = fragmented()
    free = lab.mem.zones["free_pages"].tolist()
    run = lab.start(f"{VM}/compact_memory", "1")
    for _ in range(3):
        assert not advance(run)[0]
    run.close()
    patch.undo()
    part = moved(lab)
    assert part > 0
    assert lab.mem.zones["free_pages"].tolist() == free
    lab.assert_at_rest()
    lab.write(f"{VM}/compact_memory", "1")
    assert moved(lab) > part
    lab.assert_at_rest()


@pytest.mark.slow
def test_two_compactions_at_once_take_turns() -> None:
    """The second waits; together they leave what one would."""
    patch = pytest.MonkeyPatch()
    patch.setattr(compaction, "SLICE_PAGES", 4096)
    lab = fragmented()
    first, second = lab.start(f"{VM}/compact_memory", "1"), lab.start(NODE.format(1), "1")
    assert not advance(first)[0]
    before = lab.vmstat()["compact_migrate_scanned"]
    for _ in range(5):
        assert not advance(second)[0]
    assert lab.vmstat()["compact_migrate_scanned"] == before
    while not advance(first)[0]:
        pass
    while not advance(second)[0]:
        pass
    patch.undo()
    lab.assert_at_rest()


# Knobs.


def test_a_proactiveness_above_zero_wakes_kcompactd() -> None:
    lab = Lab((32,), nr_ranks=None)
    woken: list[int] = []
    lab.machine.compaction_sysctl.proactiveness_written = lambda: woken.append(1)
    for value, nr in (("0", 0), ("20", 1), ("20", 2), ("100", 3)):
        lab.write(f"{VM}/compaction_proactiveness", value)
        assert len(woken) == nr
    assert errno_of(lab.write, f"{VM}/compaction_proactiveness", "101") == errno.EINVAL
    assert (len(woken), lab.read(f"{VM}/compaction_proactiveness")) == (3, "100\n")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("extfrag_threshold", ("0", "1000"), ("-1", "1001")),
        ("compaction_proactiveness", ("0", "100"), ("-1", "101")),
        ("compact_unevictable_allowed", ("0", "1"), ("-1", "2")),
        ("defrag_mode", ("0", "1"), ("-1", "2")),
    ],
)
def test_ranges(name: str, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    lab = Lab((32,), nr_ranks=None)
    for text in good:
        lab.write(f"{VM}/{name}", text)
        assert lab.read(f"{VM}/{name}") == f"{text}\n"
    for text in (*bad, "abc", "1.5"):
        assert errno_of(lab.write, f"{VM}/{name}", text) == errno.EINVAL
        assert lab.read(f"{VM}/{name}") == f"{good[-1]}\n"
