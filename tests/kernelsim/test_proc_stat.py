# SPDX-License-Identifier: GPL-2.0-only
"""CPU time, load, memory blocks and slab objects: the files that programs combine."""

import os

import pytest

from kernelsim.cputime import CpuTime
from kernelsim.machine import Machine, MachineConfig, NodeConfig
from kernelsim.memory_block import MEMORY_SYSFS, memory_block_size_bytes
from kernelsim.timer import ManualClock

SECOND = 1_000_000_000
MIB = 1 << 20


def machine(*mib: int, cpus: int = 2, clock: ManualClock | None = None) -> Machine:
    nodes = tuple(NodeConfig(size * MIB, cpus) for size in mib)
    return Machine(MachineConfig(nodes=nodes, bytes="none"), clock=clock)


def stat(made: Machine) -> dict[str, list[int]]:
    lines = made.registry.read("/proc/stat").decode().splitlines()
    return {line.split()[0]: [int(word) for word in line.split()[1:]] for line in lines}


def test_work_is_charged_to_the_cpu_of_its_node_and_the_rest_is_idle() -> None:
    clock = ManualClock()
    made = machine(64, 64, clock=clock)
    clock.advance(10 * SECOND)
    made.cputime.charge("kcompactd1", 3 * SECOND)
    made.cputime.charge("Thread-7", 1 * SECOND)
    found = stat(made)
    assert found["cpu0"][2:4] == [100, 900]
    assert found["cpu2"][2:4] == [300, 700]
    assert found["cpu"][2:4] == [400, 3600]
    assert found["ctxt"] == [2]
    assert made.registry.read("/proc/uptime") == b"10.00 36.00\n"


def test_load_is_the_kernel_s_average_of_busy_threads() -> None:
    """One CPU busy for a minute: 1 - 1/e of one after a minute, as get_avenrun() gives it."""
    clock = ManualClock()
    times = CpuTime([[0]], clock.now_ns)
    for _ in range(12):
        clock.advance(5 * SECOND)
        times.charge("x", 5 * SECOND)
        averages = times.loadavg()
    assert averages == [pytest.approx(expected, abs=0.02) for expected in (0.632, 0.181, 0.064)]
    clock.advance(3600 * SECOND)
    assert times.loadavg()[0] == pytest.approx(0, abs=0.01)


def test_cpuinfo_and_the_cpu_tree_agree() -> None:
    made = machine(64, 64, cpus=3)
    text = made.registry.read("/proc/cpuinfo").decode()
    assert text.count("processor\t: ") == 6
    base = "/sys/devices/system/cpu"
    assert made.registry.read(f"{base}/online") == b"0-5\n"
    assert made.registry.read(f"{base}/cpu4/topology/core_siblings_list") == b"3-5\n"
    assert made.registry.read(f"{base}/cpu4/topology/thread_siblings") == b"10\n"
    assert made.registry.read(f"{base}/cpu4/topology/physical_package_id") == b"1\n"
    for link in (f"{base}/cpu4/node1", "/sys/devices/system/node/node1/cpu4", "/sys/devices/system/node/node1/memory1"):
        node = made.registry.nodes[link]
        assert os.path.normpath(f"{os.path.dirname(link)}/{node.target}") in made.registry.nodes  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize(("mib", "block_mib"), [((512, 256), 128), ((32, 32), 32), ((34, 64), 2), ((4096,), 128)])
def test_memory_blocks_add_up_to_the_machine(mib: tuple[int, ...], block_mib: int) -> None:
    made = machine(*mib)
    size = memory_block_size_bytes(made.mem)
    assert size == block_mib * MIB
    assert made.registry.read(f"{MEMORY_SYSFS}/block_size_bytes") == b"%x\n" % size
    blocks = [
        path for path in made.registry.nodes if path.startswith(f"{MEMORY_SYSFS}/memory") and path.count("/") == 5
    ]
    assert len(blocks) * size == sum(mib) * MIB


def test_blocks_name_their_zone() -> None:
    made = machine(4096, 2048)
    zones = [made.registry.read(f"{MEMORY_SYSFS}/memory{index}/valid_zones") for index in (0, 1, 40)]
    assert zones == [b"none\n", b"DMA32\n", b"Normal\n"]


def test_slabinfo_counts_what_there_is() -> None:
    made = machine(64)
    made.registry.write("/proc/sys/vm/drop_caches", "4")

    def in_use(name: str) -> int:
        lines = made.registry.read("/proc/slabinfo").decode().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    assert in_use("mm_struct") == 0
    process = made.new_process("one")
    assert in_use("mm_struct") == 1
    assert in_use("vm_area_struct") == 0
    made.registry.add("/sys/kernel/config/kernelsim/mm/one", process)
    made.registry.write("/sys/kernel/config/kernelsim/mm/one/anon", "1M")
    assert in_use("vm_area_struct") == 1
