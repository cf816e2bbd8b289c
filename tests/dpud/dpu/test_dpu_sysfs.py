# SPDX-License-Identifier: GPL-2.0-only
from dpud.dpu.dpu_set import DpuSet
from dpud.dpu.driver import DpuConfig, DpuDriver
from dpud.dpu.sysfs import add_rank_files
from kernelsim.attr import Dir, Registry

DIR = "/sys/class/dpu_rank"


def test_files_of_a_rank() -> None:
    registry = Registry()
    dpu = DpuDriver(DpuConfig(nr_ranks=2, profile="upmem-v1b"))
    add_rank_files(registry, dpu.pool)
    shown = {
        path.removeprefix(f"{DIR}/dpu_rank1/"): registry.read(path)
        for path, _, attr in registry.walk()
        if path.startswith(f"{DIR}/dpu_rank1/") and attr.mode == 0o444
    }
    assert shown == {
        "is_owned": b"0\n",
        "usage_count": b"0\n",
        "rank_id": b"1\n",
        "rank_index": b"1\n",
        "rank_count": b"2\n",
        "nb_ci": b"8\n",
        "nb_dpus_per_ci": b"8\n",
        "mram_size": b"67108864\n",
        "fck_frequency": b"400\n",
    }


def test_they_follow_the_rank() -> None:
    registry = Registry()
    dpu = DpuDriver()
    add_rank_files(registry, dpu.pool)
    dpus = DpuSet.alloc_ranks(dpu.pool, 1)
    assert registry.read(f"{DIR}/dpu_rank0/is_owned") == b"1\n"
    assert registry.read(f"{DIR}/dpu_rank0/usage_count") == b"1\n"
    dpus.free()
    assert registry.read(f"{DIR}/dpu_rank0/is_owned") == b"0\n"


def test_without_ranks_the_class_is_there_and_empty() -> None:
    registry = Registry()
    add_rank_files(registry, DpuDriver(DpuConfig(nr_ranks=0)).pool)
    directory = registry.nodes[DIR]
    assert isinstance(directory, Dir)
    assert directory.entries == {}
