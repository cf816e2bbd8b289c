# SPDX-License-Identifier: GPL-2.0-only
"""The text of /proc and node files: exact on small machines, and line by line as real kernels print them."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from machines import MIB, Lab

from dpud.capture import DEMO, read_capture
from dpud.physmem import PhysMem
from kernelsim.machine import Machine

CAPTURES = Path(__file__).parents[3] / "shared/data/host-fragmentation"
ORDERS = "".join(f"{order:6d} " for order in range(11))
NODE = "/sys/devices/system/node/node{}/{}"


def build(folder: Path) -> Machine:
    return Machine.from_image(read_capture(folder), alloc_words=PhysMem().alloc)


def names(text: str) -> list[str]:
    """First words of lines, `Node 0 ` aside."""
    return [re.sub(r"^Node \d+ ", "", line).split()[0].rstrip(":") for line in text.splitlines() if line.strip()]


def as_template(line: str) -> tuple[str, int]:
    """A line with its numbers taken out, and the column where its last number ends."""
    numbers = list(re.finditer(r"\d+", line))
    return re.sub(r" *\d+", " <n>", line), numbers[-1].end() if numbers else 0


def assert_like(ours: str, theirs: str, width: int) -> None:
    """Every line of ours that they have too is in the same place of the order and spaced alike.

    Columns are compared where the numbers are short enough to be padded, to `width` characters.
    """
    their_lines = dict(zip(names(theirs), theirs.splitlines(), strict=True))
    common = [name for name in names(ours) if name in their_lines]
    assert [name for name in names(theirs) if name in common] == common
    assert len(common) > 3
    for name, line in zip(names(ours), ours.splitlines(), strict=True):
        if name not in their_lines:
            continue
        (template, end), (their_template, their_end) = as_template(line), as_template(their_lines[name])
        assert template == their_template
        longest = max(len(re.findall(r"\d+", text)[-1]) for text in (line, their_lines[name]))
        assert end == their_end or longest > width


# Small machines, to the byte.


def test_buddyinfo() -> None:
    assert Lab((64, 32)).read("/proc/buddyinfo").splitlines() == [
        "Node 0, zone      DMA      1      1      1      1      1      1      1      1      1      1      3 ",
        "Node 0, zone    DMA32      0      0      0      0      0      0      0      0      1      1     11 ",
        "Node 1, zone    DMA32      0      0      0      0      0      0      0      1      1      1      7 ",
    ]


def test_pagetypeinfo() -> None:
    lab = Lab((32,))
    none = "     0 " * 11
    dma = "     1 " * 10 + "     3 "
    dma32 = "     0 " * 7 + "     1      1      1      3 "
    rows = [
        "Page block order: 9",
        "Pages per block:  512",
        "",
        f"Free pages count per migrate type at order  {ORDERS}",
    ]
    for zone, movable in (("     DMA", dma), ("   DMA32", dma32)):
        for kind in ("   Unmovable", "     Movable", " Reclaimable", "  HighAtomic", "     Isolate"):
            rows.append(f"Node    0, zone {zone}, type {kind} {movable if 'Movable' in kind else none}")
    rows += [
        "",
        "Number of blocks type     Unmovable      Movable  Reclaimable   HighAtomic      Isolate ",
        "Node 0, zone      DMA            0            8            0            0            0 ",
        "Node 0, zone    DMA32            0            8            0            0            0 ",
    ]
    assert lab.read("/proc/pagetypeinfo").splitlines() == rows


def test_pagetypeinfo_comes_node_by_node() -> None:
    text = Lab((32, 32)).read("/proc/pagetypeinfo")
    assert text.count("Free pages count per migrate type") == text.count("Number of blocks type") == 2
    assert text.index("Node    0") < text.index("Number of blocks") < text.index("Node    1")


def test_a_long_free_list_is_capped_as_the_kernel_counts_it() -> None:
    """The walk over a list stops at 100000 (kernel-abi.md 1.4), and the number is prefixed with >."""
    lab = Lab((32,))
    lab.mem.zones["nr_free"][0][3, 1] = 100001
    assert " >100000 " in lab.read("/proc/pagetypeinfo")
    assert "100001 " in lab.read("/proc/buddyinfo")


def test_meminfo_adds_up() -> None:
    lab = Lab((64,))
    managed_kb = 64 * 1024 - 4 - 64 * 16
    assert lab.read("/proc/meminfo").startswith(
        f"MemTotal:       {managed_kb:8d} kB\nMemFree:        {managed_kb:8d} kB"
    )
    lab.spawn("a", anon="4M", file="2M", mlock="50")
    values = {name: int(line.split()[1]) for name, line in zip_lines(lab.read("/proc/meminfo"))}
    assert values["AnonPages"] == 4096
    assert values["Cached"] == values["Mapped"] == values["Active(file)"] + values["Inactive(file)"] == 2048
    assert values["Mlocked"] == values["Unevictable"] == 2048
    assert values["Active(anon)"] + values["Inactive(anon)"] == 2048
    assert values["PageTables"] * 1024 == 4096 * int(lab.mem.nodes["nr_page_table_pages"].sum())
    assert values["MemFree"] == managed_kb - 4096 - 2048 - values["PageTables"]
    lab.sysctl(nr_hugepages=3)
    values = {name: int(line.split()[1]) for name, line in zip_lines(lab.read("/proc/meminfo"))}
    assert (values["HugePages_Total"], values["HugePages_Free"], values["Hugetlb"]) == (3, 3, 6144)


def zip_lines(text: str) -> list[tuple[str, str]]:
    return list(zip(names(text), text.splitlines(), strict=True))


def test_a_nodes_files() -> None:
    lab = Lab((32, 64), nr_cpus=3)
    node = {name: [lab.read(NODE.format(nid, name)) for nid in (0, 1)] for name in ("cpulist", "cpumap", "distance")}
    assert node == {"cpulist": ["0-2\n", "3-5\n"], "cpumap": ["07\n", "38\n"], "distance": ["10 20\n", "20 10\n"]}
    root = "/sys/devices/system/node/"
    files = ("online", "possible", "has_cpu", "has_memory", "has_normal_memory")
    assert {lab.read(root + name) for name in files} == {"0-1\n"}


def test_numastat_counts_what_spilled_over() -> None:
    lab = Lab((32, 32))
    lab.spawn("a", anon="40M")
    stats = [dict(line.split() for line in lab.read(NODE.format(nid, "numastat")).splitlines()) for nid in (0, 1)]
    assert list(stats[0]) == ["numa_hit", "numa_miss", "numa_foreign", "interleave_hit", "local_node", "other_node"]
    assert int(stats[0]["numa_hit"]) > 7000
    assert stats[0]["numa_foreign"] == stats[1]["numa_miss"]
    assert int(stats[1]["numa_miss"]) > 2000


def test_node_files_add_up_to_the_machines() -> None:
    lab = Lab((32, 32))
    lab.spawn("a", anon="40M", file="1M", holes="30 seed=1")
    for name, machine in (("vmstat", "/proc/vmstat"), ("meminfo", "/proc/meminfo")):
        total = {key: int(re.findall(r"\d+", line)[-1]) for key, line in zip_lines(lab.read(machine))}
        nodes = [zip_lines(lab.read(NODE.format(nid, name))) for nid in (0, 1)]
        for (key, first), (_, second) in zip(*nodes, strict=True):
            if key in total and key not in ("numa_local", "numa_other"):
                assert int(re.findall(r"\d+", first)[-1]) + int(re.findall(r"\d+", second)[-1]) == total[key], key


def test_vmstat_follows_events() -> None:
    lab = Lab((32,))
    before = lab.vmstat()
    lab.spawn("a", anon="1M", file="1M")
    after = lab.vmstat()
    change = {name: after[name] - before[name] for name in after}
    assert change["pgfault"] == 512
    assert change["pgmajfault"] == 256
    assert change["nr_anon_pages"] == change["nr_file_pages"] == change["nr_mapped"] == 256
    assert change["nr_free_pages"] == -(512 + change["nr_page_table_pages"])
    allocated = sum(change[f"pgalloc_{zone}"] for zone in ("dma", "dma32", "normal", "movable"))
    assert allocated == 512 + change["nr_page_table_pages"]


def test_nr_free_pages_blocks() -> None:
    """Free pages in blocks of 2 MiB and more: 3 * 1024 + 512 and 11 * 1024 + 512 here."""
    assert Lab((64,)).vmstat()["nr_free_pages_blocks"] == 3584 + 11776


# A real machine's.


@pytest.fixture(scope="module")
def demo() -> Machine:
    return build(DEMO)


@pytest.mark.parametrize(("name", "width"), [("vmstat", 0), ("meminfo", 8)])
@pytest.mark.slow
def test_lines_are_the_kernels(demo: Machine, name: str, width: int) -> None:
    assert_like(demo.registry.read(f"/proc/{name}").decode(), (DEMO / name).read_text(), width)


def rows(text: str) -> dict[str, list[int]]:
    """Zone rows by their text up to the numbers."""
    split = [re.fullmatch(r"(Node.*?)((?: +\d+)+ )", line) for line in text.splitlines()]
    return {row[1]: [int(nr) for nr in row[2].split()] for row in split if row}


def assert_as_captured(machine: Machine, folder: Path) -> None:
    """DMA and DMA32 to the byte; Normal moved while it was captured: within 3 % or half of how far it moved."""
    ours = machine.registry.read("/proc/buddyinfo").decode()
    before, after = ((folder / name).read_text() for name in ("buddyinfo", "buddyinfo.end"))
    for line, real in zip(ours.splitlines(), before.splitlines(), strict=True):
        if "Normal" not in line:
            assert line == real
    for key, counts in rows(ours).items():
        for nr, first, last in zip(counts, rows(before)[key], rows(after)[key], strict=True):
            slack = max(0.03 * max(first, last), abs(first - last) / 2)
            assert min(first, last) - slack <= nr <= max(first, last) + slack, key


def assert_types_as_captured(machine: Machine, folder: Path) -> None:
    """pagetypeinfo: head and all pageblock counts equal; free lists of the zones that held still, too."""
    ours = machine.registry.read("/proc/pagetypeinfo").decode().splitlines()
    theirs = (folder / "pagetypeinfo").read_text().splitlines()
    assert ours[:4] == theirs[:4]
    blocks = next(at for at, line in enumerate(ours) if line.startswith("Number of blocks"))
    assert ours[blocks:] == theirs[blocks:]
    assert [line for line in ours[4:blocks] if "Normal" not in line] == [
        line for line in theirs[4:blocks] if "Normal" not in line
    ]


@pytest.mark.slow
def test_the_demos_free_lists(demo: Machine) -> None:
    assert_as_captured(demo, DEMO)
    assert_types_as_captured(demo, DEMO)
    assert demo.check() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random50", "runs40"])
def test_captures_free_lists(name: str) -> None:
    folder = CAPTURES / name / "before"
    if not folder.is_dir():
        pytest.skip("the shared captures are not here")
    machine = build(folder)
    assert_as_captured(machine, folder)
    assert_types_as_captured(machine, folder)
    assert machine.check() == []


@pytest.mark.slow
def test_imported_totals_are_the_real_ones(demo: Machine) -> None:
    """MemTotal is zoneinfo's managed pages (that host's own meminfo counts memory it has not initialised yet).
    Anonymous and locked memory keep their amount, but for what changed while the files were read."""
    real = {name: int(line.split()[1]) for name, line in zip_lines((DEMO / "meminfo").read_text())}
    ours = {name: int(line.split()[1]) for name, line in zip_lines(demo.registry.read("/proc/meminfo").decode())}
    managed = sum(int(nr) for nr in re.findall(r"managed +(\d+)", (DEMO / "zoneinfo").read_text()))
    assert ours["MemTotal"] == 4 * managed
    for name in ("AnonPages", "Unevictable", "Mlocked"):
        assert abs(ours[name] - real[name]) <= max(0.03 * real[name], 4 * MIB // 1024), name


# The running kernel's.


@pytest.mark.host
@pytest.mark.parametrize(("path", "width"), [("/proc/vmstat", 0), ("/proc/meminfo", 8)])
def test_proc_files_read_like_the_hosts(path: str, width: int) -> None:
    assert_like(Lab((64,)).read(path), Path(path).read_text(), width)


@pytest.mark.host
@pytest.mark.parametrize(("name", "width"), [("meminfo", 8), ("vmstat", 0), ("numastat", 0)])
def test_node_files_read_like_the_hosts(name: str, width: int) -> None:
    path = NODE.format(0, name)
    assert_like(Lab((64,)).read(path), Path(path).read_text(), width)


@pytest.mark.host
def test_zone_rows_read_like_the_hosts() -> None:
    lab = Lab((64,))
    for path in ("/proc/buddyinfo", "/proc/pagetypeinfo"):
        ours, theirs = (
            [re.sub(r" *\d+ ", "  n ", line) for line in text.splitlines() if "DMA" in line]
            for text in (lab.read(path), Path(path).read_text())
        )
        assert ours == theirs
        for line in lab.read(path).splitlines():
            if line.startswith("Node") and "blocks" not in line:
                ends = [match.end() for match in re.finditer(r"\d+ ", line[22:])]
                assert {b - a for a, b in pairwise(ends)} in ({7}, {13}) or "type" in line


@pytest.mark.host
def test_node_lists_read_like_the_hosts() -> None:
    root = Path("/sys/devices/system/node")
    lab = Lab((64,))
    for name in ("online", "possible", "has_memory", "has_normal_memory", "has_cpu"):
        theirs = (root / name).read_text()
        assert re.fullmatch(r"[\d,-]*\n", theirs)
        assert re.fullmatch(r"[\d,-]*\n", lab.read(f"{root}/{name}"))
    assert re.fullmatch(r"[\da-f,]+\n", (root / "node0/cpumap").read_text())
    assert lab.read(f"{root}/node0/distance") == "10\n"
