# SPDX-License-Identifier: GPL-2.0-only
"""Large machines: what `dpud bench terabyte` rests on, on a small scale."""

from pathlib import Path

import numpy as np
import pytest
from machines import advance

from dpud.bench import terabyte
from dpud.config import parse
from dpud.daemon import machine_config
from dpud.dpu.driver import DpuDriver
from dpud.physmem import PhysMem, alloc_tables
from kernelsim import dpu_compact
from kernelsim.attr import File
from kernelsim.machine import MM_CONFIGFS, NODES_SYSFS, Machine, MachineConfig, NodeConfig
from kernelsim.mm_configfs import choose

GIB = 1 << 30


@pytest.mark.parametrize(("kind", "words"), [("none", 0), ("stamp", 1)])
def test_the_machine_is_one_tebibyte(kind: str, words: int) -> None:
    config = machine_config(parse(terabyte.config(kind)))
    assert [node.memory_bytes for node in config.nodes] == [512 * GIB, 512 * GIB]
    assert config.words_per_page == words


def test_large_blocks_are_counted_on_node_0(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    zones = ("Node 0, zone    DMA32 ", "Node 0, zone   Normal ", "Node 1, zone   Normal ")
    (tmp_path / "proc/buddyinfo").write_text("".join(f"{zone}{'     7 ' * 9}     3     20 \n" for zone in zones))
    assert terabyte.large_blocks(tmp_path) == 2 * (3 + 2 * 20)


def test_tables_are_zeroed_and_writable() -> None:
    tables = alloc_tables(1000, 4)
    assert (tables.shape, tables.dtype, tables.any()) == ((1000, 4), np.uint64, False)
    tables[999, 3] = 5


def test_a_choice_made_in_slices_is_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for in_runs in (False, True):
        whole = choose(5000, 30, 3, in_runs)
        with monkeypatch.context() as patch:
            patch.setattr("kernelsim.mm_configfs.CHOICE_SLICE_PAGES", 64)
            assert (choose(5000, 30, 3, in_runs) == whole).all()


def start_compact(machine: Machine) -> object:
    file = machine.registry.nodes[f"{NODES_SYSFS}/node0/compact_dpu"]
    assert isinstance(file, File)
    return file.attr.write_text(file.kobj, b"1", file.flavour)


def test_others_get_their_turn_while_empty_regions_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node without a single process: nothing to do in any of its 2 MiB regions, and still many slices."""
    monkeypatch.setattr(dpu_compact, "SURVEY_SLICE_PAGES", 8 * 512)
    machine = Machine(MachineConfig(nodes=(NodeConfig(GIB),), bytes="none"), DpuDriver())
    compaction, nr_slices = start_compact(machine), 0
    while not advance(compaction)[0]:
        nr_slices += 1
    assert nr_slices >= GIB // (2 << 20) // 8 - 2


@pytest.mark.slow
def test_a_machine_of_64_gib_that_keeps_no_contents() -> None:
    """16 million pages: 512 MiB here."""
    config = MachineConfig(nodes=(NodeConfig(64 * GIB),), bytes="none")
    machine = Machine(config, DpuDriver(), alloc_words=PhysMem().alloc, alloc_tables=alloc_tables)
    assert machine.mem.pages.nbytes < 33 * machine.mem.nr_pages
    machine.registry.add(f"{MM_CONFIGFS}/a", machine.new_process("a"))
    for name, text in (("anon", "8G"), ("holes", "50 seed=1")):
        machine.registry.write(f"{MM_CONFIGFS}/a/{name}", text)
    machine.registry.write("/proc/sys/vm/dpu_compact_region_order", "18")
    machine.registry.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    assert machine.registry.read(f"{MM_CONFIGFS}/a/verify") == b"ok\n"
    assert machine.check() == []
