# SPDX-License-Identifier: GPL-2.0-only
"""Breaking the device through its files."""

from collections.abc import Iterator

import pytest

from dpud.dpu.debugfs import DEBUGFS_PATH, add_fault_files
from dpud.dpu.driver import DpuConfig, DpuDriver
from kernelsim.machine import MM_CONFIGFS, NODES_SYSFS, Machine, MachineConfig, NodeConfig


@pytest.fixture
def machine() -> Iterator[Machine]:
    driver = DpuDriver(DpuConfig(nr_ranks=1))
    machine = Machine(MachineConfig(nodes=(NodeConfig(64 << 20, 1),), bytes="stamp"), driver)
    add_fault_files(machine.registry, driver)
    machine.registry.add(f"{MM_CONFIGFS}/a", machine.new_process("a"))
    machine.registry.write("/proc/sys/vm/dpu_compact_region_order", "14")
    yield machine
    driver.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("dpu_fault", "dpu is in fault"),
        ("timeout", "result timeout"),
        ("partial", "internal error"),
        ("corrupt", "corrupted memory"),
        ("rank_lost", "driver error"),
    ],
)
def test_a_fault_in_mid_batch_loses_nothing_and_the_cpu_finishes(machine: Machine, kind: str, text: str) -> None:
    read, write = machine.registry.read, machine.registry.write
    write(f"{MM_CONFIGFS}/a/anon", "32M")
    write(f"{MM_CONFIGFS}/a/holes", "50 seed=1")
    write(f"{DEBUGFS_PATH}/fail_{kind}/move", "64")
    write(f"{DEBUGFS_PATH}/fail_{kind}/probability", "100")
    write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    assert read(f"{DEBUGFS_PATH}/fail_{kind}/times") == b"0\n"
    assert any(f"DPU compaction failed: {text}, 64 of" in line for line in machine.printk.lines())
    stats = dict(line.split() for line in read(f"{DEBUGFS_PATH}/stats").decode().splitlines())
    assert int(stats["failures"]) == 1
    assert int(stats["pages_moved"]) >= 64
    assert int(stats["cpu_pages_moved"]) > 1000
    assert read(f"{MM_CONFIGFS}/a/verify") == b"ok\n"
    assert machine.check() == []


def test_lost_ranks_come_back(machine: Machine) -> None:
    read, write = machine.registry.read, machine.registry.write
    write(f"{MM_CONFIGFS}/a/anon", "32M")
    write(f"{DEBUGFS_PATH}/fail_rank_lost/nth", "1")
    for seed, moved_by_dpu in ((1, False), (2, False), (3, True)):
        if moved_by_dpu:
            write(f"{DEBUGFS_PATH}/revive", "1")
        write(f"{MM_CONFIGFS}/a/holes", f"30 seed={seed}")
        before = machine.dpu.stats.pages_moved
        write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
        assert (machine.dpu.stats.pages_moved > before) is moved_by_dpu
    assert any("using the CPU" in line for line in machine.printk.lines())
    assert read(f"{MM_CONFIGFS}/a/verify") == b"ok\n"
    assert machine.check() == []
