# SPDX-License-Identifier: GPL-2.0-only
import errno

from wiring import errno_of

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
        if path.startswith(f"{DIR}/dpu_rank1/") and attr.mode in (0o444, 0o644)
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
        "fck_frequency": b"800\n",  # 400 MHz for the DPUs: dpu.md 1.5, 1.7 (f/2)
        "clock_division": b"2\n",
        "dpu_chip_id": b"68\n",
        "mode": b"0\n",
        "debug_mode": b"0\n",
    }


def test_modes_follow_the_driver_s_rules() -> None:
    """1 perf, 2 safe; from safe to perf only while nobody has the rank; a free rank has none, nor a debugger."""
    registry = Registry()
    dpu = DpuDriver()
    add_rank_files(registry, dpu.pool)
    rank = f"{DIR}/dpu_rank0"
    assert registry.nodes[f"{rank}/mode"].attr.mode == registry.nodes[f"{rank}/debug_mode"].attr.mode == 0o644  # type: ignore[attr-defined]
    for bad in ("0", "3", "4", "256", "-1", "x"):
        assert errno_of(registry.write, f"{rank}/mode", bad) == errno.EINVAL
    registry.write(f"{rank}/mode", "2")
    registry.write(f"{rank}/mode", "1")
    registry.write(f"{rank}/mode", "2")
    dpus = DpuSet.alloc_ranks(dpu.pool, 1)
    assert errno_of(registry.write, f"{rank}/mode", "1") == errno.EBUSY
    assert registry.read(f"{rank}/mode") == b"2\n"
    registry.write(f"{rank}/debug_mode", "1")
    dpus.free()
    assert (registry.read(f"{rank}/mode"), registry.read(f"{rank}/debug_mode")) == (b"0\n", b"0\n")


def test_a_profile_string_shows() -> None:
    registry = Registry()
    config = DpuConfig(properties="fckFrequency=900,clockDivision=3,chipId=68,regionMode=safe,mramSize=0x2000000")
    dpu = DpuDriver(config)
    add_rank_files(registry, dpu.pool)
    names = ("fck_frequency", "clock_division", "dpu_chip_id", "mode", "mram_size")
    values = [int(registry.read(f"{DIR}/dpu_rank0/{name}")) for name in names]
    assert values == [900, 3, 68, 2, 32 << 20]
    assert dpu.profile.chip.fck_frequency_mhz.value == 300
    assert dpu.profile.chip.nr_tasklets.value == 16


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
