# SPDX-License-Identifier: GPL-2.0-only
"""The demo: its arithmetic, its picture, its shell session; and, mounted, that it plays to its end."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from dpud import demo
from dpud.capture import DEMO
from dpud.cli import cli
from dpud.demo.blockmap import BlockMap
from dpud.demo.cost import Cost
from dpud.demo.scenes import free_pages, parse_stats, scattered
from dpud.demo.shell import CommandError, Shell
from dpud.errors import UserError
from kernelsim.machine import Machine, MachineConfig, NodeConfig

ROOT = Path(__file__).parent.parent.parent
BUDDYINFO = """\
Node 0, zone      DMA      1      0      0      0      0      0      0      0      0      1      3 
Node 0, zone   Normal      4      2      0      0      0      0      0      0      0      0      1 
"""  # noqa: W291


def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def printed(shell: Shell) -> str:
    assert isinstance(shell.console.file, io.StringIO)
    return shell.console.file.getvalue()


# The model. dpu.md section 6: 512 pages, 64 DPUs, 8 rounds of 12.49 us and 35 us overhead against Zen 3.


def test_the_gain_of_512_pages_is_the_published_one() -> None:
    cost = Cost.of(512, 135_000)
    assert cost.copy_ms == pytest.approx(0.197, rel=0.01)
    assert cost.metadata_ms == pytest.approx(512 * 0.714 / 1000, rel=0.01)
    assert cost.gain == pytest.approx(1.12, abs=0.005)


def test_a_device_slower_than_memcpy_is_a_loss() -> None:
    assert Cost.of(32, 47_500).gain < 1


# Texts.


def test_free_pages_by_order_over_all_zones() -> None:
    pages = free_pages(BUDDYINFO)
    assert pages[0] == 5
    assert pages[1] == 4
    assert pages[9] == 512
    assert pages[10] == 4 * 1024
    assert scattered(BUDDYINFO) == pytest.approx(9 / (9 + 512 + 4096))


def test_stats_are_name_and_number() -> None:
    assert parse_stats("regions 2\npages_moved 130816\n") == {"regions": 2, "pages_moved": 130816}


# The picture.


def block_map(nr_free: list[int], holes: int = 0) -> BlockMap:
    hole = np.arange(len(nr_free) + holes) >= len(nr_free)
    return BlockMap(np.array(nr_free + [0] * holes), hole)


def test_a_block_is_broken_if_partly_free() -> None:
    assert block_map([0, 1, 511, 512], holes=1).broken.tolist() == [False, True, True, False, False]


def test_cells_show_use_by_character_and_broken_blocks_by_colour() -> None:
    full, half, free = [0] * 16, [256] * 16, [512] * 16
    (row,) = block_map(full + half + free, holes=16).rows()
    assert row.plain == "  0 GiB █▒ ·"
    styles = [str(span.style) for span in row.spans]
    assert styles == ["blue", "red", "blue", "bright_black"]


def test_a_row_is_2_gib_and_rows_without_memory_are_left_out() -> None:
    rows = block_map([512] * 1024, holes=1024).rows()
    assert [row.plain[:8] for row in rows] == ["  0 GiB "]
    assert len(rows[0].plain) == 8 + 64


@pytest.mark.slow
def test_the_map_of_a_machine_counts_what_buddyinfo_counts() -> None:
    machine = Machine(MachineConfig(nodes=(NodeConfig(64 << 20, 1),), bytes="stamp"))
    machine.registry.write("/proc/sys/vm/nr_hugepages", "3")
    memory = BlockMap.of(machine.mem)
    assert memory.nr_free.sum() == sum(free_pages(machine.registry.read("/proc/buddyinfo").decode()))
    assert memory.nr_free.max() == 512
    assert (memory.nr_free == 0).sum() == 3
    assert not memory.hole.any()


# The session.


def test_a_command_is_shown_before_its_output() -> None:
    shell = Shell(console())
    assert shell.sh("echo one; echo two >&2") == "one\ntwo\n"
    assert printed(shell) == "$ echo one; echo two >&2\none\ntwo\n"


def test_output_is_shown_as_it_is() -> None:
    """No markup, no line breaks: it is not our text."""
    shell = Shell(console())
    line = "[red]x[/red] " * 20
    shell.sh(f"echo '{line}'")
    assert printed(shell).splitlines()[1] == line


def test_cd_is_where_the_next_command_runs(tmp_path: Path) -> None:
    shell = Shell(console())
    shell.cd(str(tmp_path))
    assert shell.sh("pwd") == f"{tmp_path}\n"


def test_a_command_that_fails_ends_the_demo() -> None:
    with pytest.raises(CommandError, match="exit 3"):
        Shell(console()).sh("exit 3")


def test_an_unknown_demo_is_the_user_s_mistake() -> None:
    with pytest.raises(UserError, match='no demo "fragment"; there are: ') as caught:
        demo.run("fragment")
    offered = str(caught.value).partition("there are: ")[2].split(", ")
    assert {"capture", "process", "compression", "fault", "migration", "qos", "swap", "unified", "all"} <= set(offered)
    told = CliRunner().invoke(cli, ["demo", "--help"]).output
    assert [name for name in offered if not re.search(rf"\b{name}\b", told)] == []


def test_the_daemon_and_the_twin_read_the_same_capture() -> None:
    assert str(DEMO) in demo._command("capture")


# All of it.


def output_of(name: str | None, folder: Path | None = None) -> str:
    """What a demo (None: the usual ones) prints, played to its end; its pictures are in `folder`, if that is given."""
    command = [sys.executable, "-m", "dpud", "demo", *([name] if name else [])]
    environment = os.environ | ({} if folder is None else {"TMPDIR": str(folder)})
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def played() -> str:
    return output_of(None)


@pytest.mark.mount
def test_the_demo_gets_more_huge_pages(played: str) -> None:
    before, after = map(int, re.findall(r"^\$ cat \S+/huge/allocated\n(\d+)$", played, re.MULTILINE))
    assert after > before + 900
    assert f"{after - before:,} more huge pages" in played


@pytest.mark.mount
def test_the_demo_starts_from_the_real_machine_s_free_lists(played: str) -> None:
    """Zones that held still while they were captured, to the byte."""
    captured = (ROOT / "dpud/data/captures/demo/buddyinfo").read_text().splitlines()
    assert "\n".join(captured[:2]) in played


@pytest.mark.mount
def test_the_demo_loses_no_byte(played: str) -> None:
    assert len(re.findall(r"^\$ cat web/verify worker/verify\nok\nok$", played, re.MULTILINE)) == 2
    assert "DPU compaction failed: dpu is in fault, 5000 of" in played


@pytest.mark.mount
def test_the_unified_demo_says_where_pages_are_and_loses_none() -> None:
    out = output_of("unified")
    sums = re.findall(r"^([0-9a-f]{64})  -$", out, re.MULTILINE)
    assert len(sums) == 7
    assert len(set(sums[:5])) == 1
    assert sums[5] == sums[6]
    where = re.findall(r"^(on_device0|on_device1|on_host|copies) (\d+)$", out, re.MULTILINE)
    assert ("on_host", "1024") in where
    assert ("on_device1", "1024") in where
    assert [nr for name, nr in where if name == "copies"][3:5] == ["2048", "2046"]
    assert re.search(r"client=train at=host va=0x\w+ access=w error=EACCES page=RESIDENT why=permissions are r--", out)
    assert out.endswith("\nok\n")


@pytest.mark.mount
@pytest.mark.slow
def test_the_compression_demo_gets_every_byte_back_from_less_memory() -> None:
    out = output_of("compression")
    assert len(re.findall(r"^(\w+): the same$", out, re.MULTILINE)) == 8
    columns = re.search(r"^\$ cat \S+/mm_stat\n([\d ]+)$", out, re.MULTILINE)
    assert columns is not None
    raw, _, used = map(int, columns[1].split()[:3])
    assert raw == 16 << 20
    assert used < raw // 2
    before, after = map(int, re.findall(r"^\$ cat \S+/mem_used_total\n(\d+)$", out, re.MULTILINE))
    assert after < 0.75 * before


@pytest.mark.mount
@pytest.mark.slow
def test_the_overcommit_demo_refuses_queues_and_grants() -> None:
    out = output_of("overcommit")
    assert "write error: Cannot allocate memory\n" in out
    assert re.search(r"^serve 209715200 of 419430400$", out, re.MULTILINE)  # all that it wrote is on the device
    assert re.search(r"^other +335544320 +0 +\d+ +\d+ +\d+\ngranted$", out, re.MULTILINE)
    waited_us = re.findall(r"^other\nsome avg10=\S+ avg60=\S+ avg300=\S+ total=(\d+)$", out, re.MULTILINE)
    assert int(waited_us[0]) > 0


@pytest.mark.mount
@pytest.mark.slow
def test_the_swap_demo_gets_every_byte_back_from_four_tiers() -> None:
    out = output_of("swap")
    assert re.search(r"^the same$", out, re.MULTILINE)
    pages = dict(re.findall(r"^(memory|nvme|ssd|hdd) (\d+) pages", out, re.MULTILINE))
    assert all(int(nr) > 0 for nr in pages.values())
    assert sum(map(int, pages.values())) >= 48 << 8
    assert "corrupt 0\n" in out
    closed = re.findall(r"device0 .* (-?[\d.]+)$", out, re.MULTILINE)
    assert float(closed[0]) == 0
    assert float(closed[1]) > 0


@pytest.mark.mount
@pytest.mark.slow
def test_the_migration_demo_moves_every_byte_to_another_gpu_and_another_daemon() -> None:
    out = output_of("migration")
    assert "on_device0 0\non_device1 4096\n" in out
    sums = re.findall(r"^([0-9a-f]{64})  -$", out, re.MULTILINE)
    assert sums[0] == sums[1]
    assert sums[2] == sums[4]
    assert len(re.findall(r" completed +(precopy|postcopy) ", out)) >= 2
    picture = re.search(r"picture:\s+(\S+)", out)
    assert picture is not None
    assert Path(picture[1]).read_text().count("<circle") > 15


@pytest.mark.mount
@pytest.mark.slow
def test_the_qos_demo_keeps_its_promises_and_draws_them() -> None:
    out = output_of("qos")
    assert "write error: Device or resource busy\n" in out
    serve, train = (re.findall(rf"^{name}: ([\d.]+) MB/s$", out, re.MULTILINE) for name in ("serve", "train"))
    assert len(serve) == len(train) == 5
    assert all(float(one) + float(other) < 110 for one, other in zip(serve, train, strict=True))
    assert float(train[2]) < 11  # limited to 10
    assert out.count("\nok\n") == 1
    chart = Path(re.findall(r"^.* (/\S+/bandwidth\.html)$", out.replace(":\n", ": "), re.MULTILINE)[0])
    assert chart.read_text().count("<polyline") == 2
    shutil.rmtree(chart.parent)


@pytest.mark.mount
@pytest.mark.slow
def test_the_fault_demo_gets_every_byte_back_or_says_so(tmp_path: Path) -> None:
    out = output_of("fault", tmp_path)
    assert len(re.findall(r"^the same$", out, re.MULTILINE)) == 7
    assert "Input/output error" in out
    counts = dict(re.findall(r"^(\w+) (\d+)$", out, re.MULTILINE))
    assert int(counts["corrected"]) == 200
    assert (counts["retried"], counts["remapped"]) == ("3", "3")
    assert int(counts["rollbacks"]) == 1
    assert re.search(r"^device0 max=\d+ high=\d+ partial=\d+ low=\d+ none=1$", out, re.MULTILINE)
    assert "device1\n" in out
    assert "rolled_back=16" in out
    assert re.search(r"^ok$", out, re.MULTILINE)
    (picture,) = tmp_path.glob("dpud-demo-fault-*/fault.html")
    text = picture.read_text()
    assert text.count("<rect") > 30
    assert "dbe" in text


@pytest.mark.mount
@pytest.mark.slow
def test_the_performance_demo_times_every_stage(tmp_path: Path) -> None:
    out = output_of("performance", tmp_path)
    assert len(re.findall(r"│ +[\d,]+ │ +\d+ % │$", out, re.MULTILINE)) == 7
    moved = dict(re.findall(r"^train (\w+) (\d+)$", out, re.MULTILINE))
    assert int(moved["access"]) == 4 * 48 << 20
    assert int(moved["swap"]) == 2 * 48 << 20
    assert re.search(r"^ok$", out, re.MULTILINE)
    (chart,) = tmp_path.glob("dpud-demo-performance-*/performance.html")
    assert chart.read_text().count("<rect") == 7


@pytest.mark.mount
@pytest.mark.slow
def test_the_defrag_demo_moves_pages_but_no_pinned_ones_and_loses_nothing(tmp_path: Path) -> None:
    out = output_of("defrag", tmp_path)
    assert len(re.findall(r"^the same$", out, re.MULTILINE)) == 2
    assert re.search(r"^ok$", out, re.MULTILINE)
    blocks = [int(row.split()[-1]) for row in re.findall(r"^(?:\d+ ){10}\d+$", out, re.MULTILINE)]
    assert blocks[1] > blocks[0]
    assert blocks[2] >= blocks[1] - 14  # 13 of them are in use now
    counts = dict(re.findall(r"^(\w+) (\d+)$", out, re.MULTILINE))
    assert int(counts["bytes_moved"]) < int(counts["gained_bytes"])
    (picture,) = tmp_path.glob("dpud-demo-defrag-*/memory.html")
    text = picture.read_text()
    assert text.count("<svg") == 3
    before, after, last = (part.count('fill="#b91c1c"') for part in text.split("<svg")[1:])
    assert (before, last) == (after, 0)
    assert before >= 8  # 512 KiB in parts of 64 KiB


@pytest.mark.mount
@pytest.mark.slow
def test_the_numa_demo_brings_every_page_to_the_gpu_that_uses_it(tmp_path: Path) -> None:
    out = output_of("numa", tmp_path)
    nodes = re.findall(r"^on_node0 (\d+)\non_node1 (\d+)$", out, re.MULTILINE)
    assert nodes[0] == ("128", "0")
    assert int(nodes[1][1]) > 120
    assert len(set(re.findall(r"^([0-9a-f]{32})  -$", out, re.MULTILINE))) == 1
    assert re.search(r"node0 node1 promoted:pays benefit=\d+ cost=\d+ net=\d+$", out, re.MULTILINE)
    assert re.search(r"^ok$", out, re.MULTILINE)
    (picture,) = tmp_path.glob("dpud-demo-numa-*/numa.html")
    assert picture.read_text().count("<rect") == 3 * 4
