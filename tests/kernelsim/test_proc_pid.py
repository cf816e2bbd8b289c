# SPDX-License-Identifier: GPL-2.0-only
"""/proc/PID of emulated processes: what the texts say, against each other, the machine, and the running kernel's."""

import errno
import re
import subprocess

import numpy as np
import pytest
from machines import MIB, MM_CONFIGFS, Lab, advance, small_slices
from numpy.typing import NDArray
from wiring import errno_of

from dpud.capture import DEMO, read_capture
from dpud.physmem import PhysMem
from kernelsim.machine import Machine

# proc_pid_maps(5)
MAPS_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<perms>[r-][w-][x-][ps]) (?P<offset>[0-9a-f]{8,}) "
    r"(?P<major>[0-9a-f]{2,}):(?P<minor>[0-9a-f]{2,}) (?P<inode>\d+) (?: *(?P<path>\S.*))?"
)
SIZE_LINE = re.compile(r"(\w+): +(\d+) kB")


def kbytes(text: str) -> dict[str, int]:
    """`Name: n kB` lines of smaps_rollup or status."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def mappings(text: str) -> list[tuple[dict[str, str], dict[str, int]]]:
    """Mappings of smaps: the head's fields, and the sizes in kB."""
    found: list[tuple[dict[str, str], dict[str, int]]] = []
    for line in text.splitlines():
        if match := MAPS_LINE.fullmatch(line):
            found.append((match.groupdict(), {}))
        elif match := SIZE_LINE.fullmatch(line):
            found[-1][1][match[1]] = int(match[2])
    return found


def pagemap(lab: Lab, pid: int) -> NDArray[np.uint64]:
    """The entries of all mappings, one behind the other."""
    parts = []
    for line in lab.read(f"/proc/{pid}/maps").splitlines():
        start, end = (int(address, 16) // 4096 for address in line.split()[0].split("-"))
        parts.append(lab.read_numbers(f"/proc/{pid}/pagemap", start, end - start))
    return np.concatenate(parts)


def bit(entries: NDArray[np.uint64], number: int) -> NDArray[np.bool_]:
    return entries >> np.uint64(number) & np.uint64(1) == 1


def family() -> Lab:
    """a: 16 MiB with holes, partly locked and pinned, and a file; b: its child, which has written some of it anew."""
    lab = Lab((64, 32))
    lab.spawn("a", anon="16M", file="4M", mlock="25", pin="2", holes="20 seed=1", fork="b")
    lab.set("b", touch="30 seed=2")
    return lab


# The texts.


def test_a_process_s_directory_comes_and_goes_with_it() -> None:
    lab = Lab((32,))
    process = lab.spawn("a", anon="1M", fork="b")
    assert lab.read(f"{MM_CONFIGFS}/a/pid") == "100\n"
    assert lab.read("/proc/101/comm") == "b\n"
    assert re.search(r"^PPid:\t100$", lab.read("/proc/101/status"), re.MULTILINE)
    lab.registry.remove(f"{MM_CONFIGFS}/a", process)
    for _ in lab.machine.end_process(process):
        pass
    assert [path for path in lab.registry.nodes if path.startswith("/proc/100")] == []
    assert "/proc/101/maps" in lab.registry.nodes
    lab.spawn("c")
    assert lab.read("/proc/102/comm") == "c\n"


def test_maps() -> None:
    lab = Lab((32,))
    lab.spawn("a", anon="1M", file="64K")
    file = lab.vm.files[0].mapping
    base = 0x7F0000000000
    assert lab.read("/proc/100/maps").splitlines() == [
        f"{base:x}-{base + MIB:x} rw-p 00000000 00:00 0 ",
        f"{base + 2 * MIB:x}-{base + 2 * MIB + 65536:x} rw-s 00000000 00:01 {file} ".ljust(73) + f"/kernelsim/{file}",
    ]


def test_smaps_has_the_mappings_of_maps_and_adds_up_to_its_rollup() -> None:
    lab = family()
    for pid in (100, 101):
        smaps = mappings(lab.read(f"/proc/{pid}/smaps"))
        heads = [MAPS_LINE.fullmatch(line) for line in lab.read(f"/proc/{pid}/maps").splitlines()]
        assert [head for head, _ in smaps] == [head.groupdict() for head in heads if head]
        rollup = kbytes(lab.read(f"/proc/{pid}/smaps_rollup"))
        for name in rollup.keys() & smaps[0][1].keys():
            slack = len(smaps) if "Pss" in name or name == "Locked" else 0  # each rounded down
            assert 0 <= rollup[name] - sum(sizes[name] for _, sizes in smaps) <= slack, name
        for head, sizes in smaps:
            assert sizes["Size"] == (int(head["end"], 16) - int(head["start"], 16)) // 1024
            kinds = ("Shared_Clean", "Shared_Dirty", "Private_Clean", "Private_Dirty")
            assert sizes["Rss"] == sum(sizes[name] for name in kinds)


def test_smaps_against_pagemap_and_kpagecount() -> None:
    """Proportional and private shares, page by page from the other files."""
    lab = family()
    count = lab.read_numbers("/proc/kpagecount")
    for pid in (100, 101):
        entries = pagemap(lab, pid)
        present = entries[bit(entries, 63)]
        sharers = count[(present & np.uint64((1 << 55) - 1)).astype(np.int64)]
        rollup = kbytes(lab.read(f"/proc/{pid}/smaps_rollup"))
        assert rollup["Rss"] == 4 * len(present)
        assert rollup["Pss"] == int((4096 / sharers).sum()) // 1024
        assert rollup["Private_Clean"] + rollup["Private_Dirty"] == 4 * (sharers == 1).sum()
        assert (bit(present, 56) == (sharers == 1)).all()
        assert rollup["Anonymous"] == 4 * (~bit(present, 61)).sum()
        assert 0 < (sharers == 1).sum() < len(present)


def test_all_proportional_shares_are_the_machine_s_mapped_pages() -> None:
    """The sum of all processes' Pss is what is mapped at all."""
    lab = family()
    vmstat = lab.vmstat()
    pss = sum(kbytes(lab.read(f"/proc/{pid}/smaps_rollup"))["Pss"] for pid in (100, 101))
    assert abs(pss - 4 * (vmstat["nr_anon_pages"] + vmstat["nr_mapped"])) <= 2


def test_status_statm_and_stat_agree() -> None:
    lab = family()
    for pid, name in ((100, "a"), (101, "b")):
        status = kbytes(lab.read(f"/proc/{pid}/status"))
        size, resident, shared, _text, _lib, data, _dirty = map(int, lab.read(f"/proc/{pid}/statm").split())
        rss = int(lab.read(f"{MM_CONFIGFS}/{name}/rss")) // 1024
        assert (status["VmSize"], status["VmRSS"], status["VmData"]) == (4 * size, 4 * resident, 4 * data)
        assert status["VmRSS"] == status["RssAnon"] + status["RssFile"] == rss
        assert (status["RssFile"], status["VmSize"]) == (4 * shared, 20 * 1024)
        head, _, tail = lab.read(f"/proc/{pid}/stat").rpartition(") ")
        fields = tail.split()
        assert head == f"{pid} ({name}"
        assert len(fields) == 50
        assert (int(fields[22 - 2]), int(fields[23 - 2 - 0])) == (size * 4096, resident)
    assert kbytes(lab.read("/proc/100/status"))["VmLck"] == 4096
    assert kbytes(lab.read("/proc/101/status"))["VmLck"] == 0  # locks are not inherited
    assert kbytes(lab.read("/proc/100/status"))["VmPin"] > 0


def test_page_table_pages_are_shared_out_over_the_processes() -> None:
    """VmPTE of all of them, and one top level each."""
    lab = family()
    lab.spawn("huge", thp="1", anon="8M")
    lab.set("huge", holes="3 seed=3")  # some of its 2 MiB pages are taken apart, others are not
    tables = sum(kbytes(lab.read(f"/proc/{pid}/status"))["VmPTE"] for pid in (100, 101, 102)) // 4
    assert tables + 3 == lab.vmstat()["nr_page_table_pages"]


def test_peaks_stay() -> None:
    lab = Lab((32,))
    lab.spawn("a", anon="8M")
    lab.set("a", holes="100")
    status = kbytes(lab.read("/proc/100/status"))
    assert (status["VmHWM"], status["VmRSS"], status["VmPeak"]) == (8192, 0, 8192)
    lab.set("a", anon="1M")
    status = kbytes(lab.read("/proc/100/status"))
    assert (status["VmPeak"], status["VmSize"], status["VmHWM"]) == (9 * 1024, 1024, 8192)
    lab.write("/proc/100/clear_refs", "5")
    assert kbytes(lab.read("/proc/100/status"))["VmHWM"] == 1024


@pytest.mark.slow
def test_numa_maps_says_which_node_has_the_pages() -> None:
    lab = Lab((32, 64))
    lab.spawn("a", anon="40M", file="1M")
    lines = [line.split() for line in lab.read("/proc/100/numa_maps").splitlines()]
    anon, file = ({k: v for k, _, v in (word.partition("=") for word in line[2:])} for line in lines)
    assert int(anon["N0"]) + int(anon["N1"]) == int(anon["anon"]) == int(anon["dirty"]) == 10240
    assert file["file"].startswith("/kernelsim/")
    assert "anon" not in file
    for nid in (0, 1):
        here = lab.read(f"/sys/devices/system/node/node{nid}/vmstat")
        assert f"nr_anon_pages {anon[f'N{nid}']}\n" in here
    assert anon["kernelpagesize_kB"] == "4"


def test_huge_pages_show_as_huge() -> None:
    lab = Lab((64,))
    lab.spawn("a", thp="1", anon="8M")
    ((_, sizes),) = mappings(lab.read("/proc/100/smaps"))
    assert sizes["AnonHugePages"] == sizes["Rss"] == sizes["Private_Dirty"] == 8192
    assert "THPeligible:           1\n" in lab.read("/proc/100/smaps")
    assert "VmFlags: rd wr mr mw me ac hg \n" in lab.read("/proc/100/smaps")
    lab.set("a", fork="b")
    ((_, sizes),) = mappings(lab.read("/proc/100/smaps"))
    assert (sizes["Pss"], sizes["Shared_Dirty"]) == (4096, 8192)
    entries = pagemap(lab, 100)
    assert bit(entries, 63).all()
    assert not bit(entries, 56).any()
    assert (np.diff(entries.reshape(-1, 512) & np.uint64((1 << 55) - 1)) == 1).all()


# What can be written.


def test_clear_refs_forgets_and_an_access_is_remembered() -> None:
    lab = Lab((32,))
    lab.spawn("a", anon="4M", file="1M")

    def referenced() -> list[int]:
        return [sizes["Referenced"] for _, sizes in mappings(lab.read("/proc/100/smaps"))]

    assert referenced() == [4096, 1024]
    lab.write("/proc/100/clear_refs", "2\n")
    assert referenced() == [0, 1024]
    lab.write("/proc/100/clear_refs", "3")
    assert referenced() == [0, 0]
    lab.set("a", touch="25 seed=1")
    anon, file = referenced()
    assert 900 < anon < 1150
    assert 200 < file < 320
    lab.write("/proc/100/clear_refs", " 1 ")
    assert referenced() == [0, 0]
    lab.write("/proc/100/clear_refs", "4")  # no soft-dirty bits in this kernel
    lab.assert_sound()


def test_comm_is_cut_at_15_bytes() -> None:
    """As seen on a live 6.18: the newline of echo is kept."""
    lab = Lab((32,))
    lab.spawn("a")
    for text, shown in (("abc\n", "abc\n\n"), ("abcdefghijklmnopqrst", "abcdefghijklmno\n"), ("ab\0cd", "ab\n")):
        lab.write("/proc/100/comm", text)
        assert lab.read("/proc/100/comm") == shown
    assert lab.read("/proc/100/cmdline") == "ab\0"
    assert lab.read("/proc/100/stat").startswith("100 (ab) S 0 ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "value"), [("5\n", 5), (" 7 ", 7), ("0x10", 16), ("010", 8), ("+4", 4), ("0" * 20 + "1", 0), ("-3", -3)]
)
def test_oom_score_adj_takes_what_linux_takes(text: str, value: int) -> None:
    """As seen on a live 6.18: only the first 12 bytes count."""
    lab = Lab((32,))
    lab.spawn("a")
    lab.write("/proc/100/oom_score_adj", text)
    assert lab.read("/proc/100/oom_score_adj") == f"{value}\n"


def test_oom_score_grows_with_memory_and_adjustment() -> None:
    """666 for nothing, as a live kernel shows for small processes; 1333 for all of memory or an adjustment of 1000."""
    lab = Lab((64,))
    lab.spawn("a")
    assert lab.read("/proc/100/oom_score") == "666\n"
    lab.set("a", anon="32M")
    half = int(lab.read("/proc/100/oom_score"))
    assert 995 <= half <= 1020
    lab.write("/proc/100/oom_score_adj", "500")
    assert 330 <= int(lab.read("/proc/100/oom_score")) - half <= 334
    lab.set("a", fork="b")
    assert lab.read("/proc/101/oom_score_adj") == "500\n"
    lab.write("/proc/100/oom_score_adj", "-1000")
    assert lab.read("/proc/100/oom_score") == "0\n"
    assert errno_of(lab.write, "/proc/100/oom_score_adj", "5 6") == errno.EINVAL


# While something goes on.


def test_a_process_at_work_is_running() -> None:
    lab = Lab((32,))
    lab.spawn("a", anon="8M")
    touching = lab.start_set("a", "touch", "100")
    advance(touching)
    assert "State:\tR (running)\n" in lab.read("/proc/100/status")
    while not advance(touching)[0]:
        pass
    assert "State:\tS (sleeping)\n" in lab.read("/proc/100/status")


def test_a_page_on_the_move_is_a_swap_entry(request: pytest.FixtureRequest) -> None:
    """Type 24 or 26 (a migration entry to read or to write), the frame as its offset; resident all the same."""
    slices = small_slices(64)
    request.addfinalizer(slices.undo)
    lab = Lab((32,), patience=3)
    lab.spawn("a", anon="16M", holes="50 seed=1")
    before = pagemap(lab, 100)
    resident = kbytes(lab.read("/proc/100/smaps_rollup"))["Rss"]
    lab.sysctl(dpu_compact_region_order=11)
    compacting = lab.start_compact()
    over = False
    while not over and not bit(pagemap(lab, 100), 62).any():
        over, _ = advance(compacting)
    moving = pagemap(lab, 100)
    swap = bit(moving, 62)
    assert swap.any()
    assert set((moving[swap] & np.uint64(31)).tolist()) <= {24, 26}
    assert ((moving[swap] >> np.uint64(5)) & np.uint64((1 << 50) - 1) == before[swap] & np.uint64((1 << 55) - 1)).all()
    assert kbytes(lab.read("/proc/100/smaps_rollup"))["Rss"] == resident
    while not over:
        over, _ = advance(compacting)
    assert not bit(pagemap(lab, 100), 62).any()
    assert (bit(pagemap(lab, 100), 63) == bit(before, 63)).all()


def test_reading_smaps_of_a_process_that_ends() -> None:
    lab = Lab((32,))
    lab.spawn("a", anon="2M", file="1M")
    file = lab.registry.nodes["/proc/100/smaps"]
    reading = file.attr.read_text(file.kobj)  # type: ignore[attr-defined]
    advance(reading)
    for _ in lab.end("a"):
        pass
    outcome = advance(reading)[1]
    assert isinstance(outcome, OSError)
    assert outcome.errno == errno.ESRCH


# A real machine's processes.


@pytest.mark.slow
def test_imported_processes_have_directories() -> None:
    machine = Machine.from_image(read_capture(DEMO), alloc_words=PhysMem().alloc)
    pids = sorted(int(path.split("/")[2]) for path in machine.registry.nodes if re.fullmatch(r"/proc/\d+/maps", path))
    assert len(pids) == len(machine.imported)
    resident = 0
    for pid in pids:
        resident += int(machine.registry.read(f"/proc/{pid}/statm").split()[1])
    assert resident == sum(mm.rss_pages for mm in machine.imported.values())
    machine.new_process("mine")
    assert machine.registry.read(f"/proc/{pids[-1] + 1}/comm") == b"mine\n"


@pytest.mark.host
@pytest.mark.parametrize("name", ["smaps", "smaps_rollup", "status"])
def test_lines_are_the_running_kernel_s(name: str) -> None:
    """Same names, order and spacing."""
    lab = Lab((32,))
    lab.spawn("a", anon="1M", file="1M")

    def shape(text: str) -> list[str]:
        lines = [re.sub(r"^[0-9a-f]+-[0-9a-f]+ .*", "head", line) for line in text.splitlines()]
        lines = [re.sub(r"\(\w+\)", "", line) for line in lines if not line.startswith("VmFlags")]
        return [re.sub(r"[ \d]+(?= kB|$)", lambda match: str(match.end() - match.start()), line) for line in lines]

    def label(line: str) -> str:
        return line.split(":")[0]

    ours = {label(line): line for line in shape(lab.read(f"/proc/100/{name}"))}
    theirs = {label(line): line for line in shape(subprocess.check_output(["cat", f"/proc/self/{name}"], text=True))}
    assert [key for key in ours if key in theirs] == list(ours)
    assert [key for key in theirs if key in ours] == list(ours)
    sized = {key for key in ours if " kB" in ours[key] or ours[key].endswith("kB")}
    assert {key: ours[key] for key in sized} == {key: theirs[key] for key in sized}


@pytest.mark.slow
def test_page_faults_are_counted_for_who_had_them() -> None:
    """256 pages of anonymous memory, and as many that had to be read in from the file."""
    lab = Lab((32,))
    lab.spawn("a", anon="1M", file="1M")
    lab.spawn("b")
    faults = [lab.read(f"/proc/{pid}/stat").rpartition(") ")[2].split()[10 - 3 : 13 - 3] for pid in (100, 101)]
    assert faults == [["256", "0", "256"], ["0", "0", "0"]]
    assert lab.vmstat()["pgfault"] == 512
