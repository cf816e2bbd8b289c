# SPDX-License-Identifier: GPL-2.0-only
"""Sysctls of /proc/sys/vm that limit address space, keep reserves, or bound per-CPU lists: what each of them does."""

import errno
import re

import pytest
from machines import MM_CONFIGFS, VM, Lab, settle
from wiring import errno_of

from dpud.capture import DEMO, read_capture
from dpud.physmem import PhysMem
from kernelsim.machine import Machine


def meminfo(lab: Lab, name: str) -> int:
    """kB."""
    found = re.search(rf"^{name}: +(\d+) kB$", lab.read("/proc/meminfo"), re.MULTILINE)
    assert found
    return int(found[1])


def anon(lab: Lab, name: str, size: str) -> int:
    """errno of `echo SIZE > NAME/anon`."""
    return errno_of(lab.write, f"{MM_CONFIGFS}/{name}/anon", size)


def test_private_memory_is_committed_and_file_mappings_are_not() -> None:
    lab = Lab((64,))
    lab.spawn("a", anon="8M", file="4M", mlock="50")
    assert meminfo(lab, "Committed_AS") == 8192
    lab.set("a", fork="b", holes="90")
    assert meminfo(lab, "Committed_AS") == 16384
    lab.set("b", anon="1M")
    assert meminfo(lab, "Committed_AS") == 8192 + 1024
    settle([lab.end("a"), lab.end("b")])
    assert meminfo(lab, "Committed_AS") == 0


def test_by_default_only_the_absurd_is_refused() -> None:
    lab = Lab((64,))
    lab.spawn("a", anon="40M", holes="100")
    lab.spawn("b", anon="40M", holes="100")
    assert meminfo(lab, "Committed_AS") > meminfo(lab, "MemTotal")
    lab.spawn("c")
    assert anon(lab, "c", "64M") == errno.ENOMEM  # the kernel itself has a part of the 64 MiB


def test_strict_accounting_keeps_the_commit_limit() -> None:
    lab = Lab((64,))
    lab.sysctl(overcommit_memory=2, overcommit_ratio=25)
    limit = meminfo(lab, "CommitLimit")
    assert limit == meminfo(lab, "MemTotal") // 4 // 4 * 4
    lab.spawn("a", anon="8M", holes="100")
    lab.spawn("b")
    assert anon(lab, "b", "8M") == errno.ENOMEM
    assert lab.read(f"{MM_CONFIGFS}/b/anon") == "0\n"
    assert errno_of(lab.set, "a") == 0
    with pytest.raises(OSError, match="promised"):
        lab.set("a", fork="c")
    assert lab.machine.check() == []
    assert meminfo(lab, "Committed_AS") == 8192
    lab.sysctl(overcommit_memory=1)
    assert anon(lab, "b", "8M") == 0


def test_the_limit_in_kbytes_takes_the_ratio_s_place() -> None:
    lab = Lab((64,))
    lab.sysctl(overcommit_memory=2, overcommit_kbytes=4096)
    assert meminfo(lab, "CommitLimit") == 4096
    assert lab.read(f"{VM}/overcommit_ratio") == "0\n"
    lab.spawn("a")
    assert anon(lab, "a", "4M") == errno.ENOMEM  # must stay below
    assert anon(lab, "a", "3M") == 0
    lab.sysctl(overcommit_ratio=50)
    assert lab.read(f"{VM}/overcommit_kbytes") == "0\n"
    assert meminfo(lab, "CommitLimit") == meminfo(lab, "MemTotal") // 2 // 4 * 4


def test_huge_pages_lower_the_limit() -> None:
    lab = Lab((64,))
    before = meminfo(lab, "CommitLimit")
    lab.sysctl(nr_hugepages=4)
    assert meminfo(lab, "CommitLimit") == before - 4 * 2048 // 2


def test_a_large_process_leaves_a_reserve() -> None:
    """1/32 of its size: 256 kB of 8 MiB, or user_reserve_kbytes where that is less."""
    lab = Lab((64,))
    lab.sysctl(overcommit_memory=2, overcommit_kbytes=(8 << 10) + (8 << 10) + 200)
    lab.spawn("a", anon="8M")
    lab.sysctl(user_reserve_kbytes=1 << 20)
    assert anon(lab, "a", "8M") == errno.ENOMEM
    lab.sysctl(user_reserve_kbytes=100)
    assert anon(lab, "a", "8M") == 0


def test_the_default_reserve_is_a_32nd_of_what_is_free() -> None:
    lab = Lab((64,))
    assert int(lab.read(f"{VM}/user_reserve_kbytes")) == meminfo(lab, "MemFree") // 32


def test_max_map_count() -> None:
    lab = Lab((64,))
    lab.sysctl(max_map_count=1)
    lab.spawn("a", anon="1M", file="1M")  # as on Linux one more than the limit fits in
    lab.spawn("b", anon="1M")
    assert errno_of(lab.set, "b") == 0
    with pytest.raises(OSError, match="too many"):
        lab.set("b", mlock="50")  # cuts the mapping in two
    lab.sysctl(max_map_count=2)
    lab.set("b", mlock="50")
    assert errno_of(lab.write, f"{MM_CONFIGFS}/b/file", "1M") == 0
    assert errno_of(lab.write, f"{MM_CONFIGFS}/a/anon", "1M") == 0
    lab.assert_sound()


# Reserves.


def protection(text: str, zone: int) -> list[int]:
    return [int(nr) for nr in re.findall(r"protection: \((.*)\)", text)[zone].split(",")]


def test_lowmem_reserve_ratio_sets_what_zones_keep_back() -> None:
    lab = Lab((64,))
    managed = [int(nr) for nr in re.findall(r"managed +(\d+)", lab.read("/proc/zoneinfo"))]
    assert protection(lab.read("/proc/zoneinfo"), 0) == [0] + 3 * [managed[1] // 256]
    lab.write(f"{VM}/lowmem_reserve_ratio", "16 8")
    assert lab.read(f"{VM}/lowmem_reserve_ratio") == "16\t8\t32\t0\n"
    assert protection(lab.read("/proc/zoneinfo"), 0) == [0] + 3 * [managed[1] // 16]
    lab.write(f"{VM}/watermark_scale_factor", "20")
    assert protection(lab.read("/proc/zoneinfo"), 0) == [0] + 3 * [managed[1] // 16]
    lab.write(f"{VM}/lowmem_reserve_ratio", "0")
    assert protection(lab.read("/proc/zoneinfo"), 0) == [0, 0, 0, 0]


@pytest.mark.slow
def test_a_reserve_keeps_requests_out_of_a_zone() -> None:
    """Requests that could be met in DMA32, until there are none: all of DMA but its reserve and watermark is taken."""
    left = {}
    for ratio in (256, 4):
        lab = Lab((64,))
        lab.write(f"{VM}/lowmem_reserve_ratio", f"{ratio}")
        path = lab.allocator("x", order="0", gfp="GFP_NOWAIT|__GFP_NOWARN", count="20000")
        lab.alloc(path)
        left[ratio] = int(re.findall(r"pages free +(\d+)", lab.read("/proc/zoneinfo"))[0])
        reserve = protection(lab.read("/proc/zoneinfo"), 0)[2]
        assert reserve <= left[ratio] <= reserve + 512
    assert left[4] > left[256] + 2000


def test_lowmem_reserve_ratio_takes_what_linux_takes() -> None:
    """Bytes taken and what is shown, as seen on a live 6.18 (which has one zone more)."""
    lab = Lab((64,))
    path = f"{VM}/lowmem_reserve_ratio"
    for text, taken, shown in (
        ("abc", 3, "256\t256\t32\t0"),
        ("256 256 32 0 7", 13, "256\t256\t32\t0"),
        ("256 x", 4, "256\t256\t32\t0"),
        ("-1 255", 6, "0\t255\t32\t0"),
        ("254", 3, "254\t255\t32\t0"),
    ):
        assert lab.registry.write(path, text) == taken
        assert lab.read(path) == shown + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["node", "Node\n", "d", "D\n", "n extra", "zone", "xn"])
def test_zonelists_go_by_node(text: str) -> None:
    lab = Lab((32,))
    refused = errno_of(lab.write, f"{VM}/numa_zonelist_order", text)
    assert refused == (errno.EINVAL if text in ("zone", "xn") else 0)
    assert lab.read(f"{VM}/numa_zonelist_order") == "Node\n"


# Per-CPU lists, which only an imported machine has.


def pagesets(machine: Machine, name: str) -> list[int]:
    return [int(nr) for nr in re.findall(rf"{name}: +(\d+)", machine.registry.read("/proc/zoneinfo").decode())]


@pytest.mark.slow
def test_percpu_pagelist_high_fraction_bounds_the_lists() -> None:
    """The limits of 0 are the captured kernel's own; 1/N of a zone is shared by its two CPUs."""
    machine = Machine.from_image(read_capture(DEMO), alloc_words=PhysMem().alloc)
    path = f"{VM}/percpu_pagelist_high_fraction"
    captured = pagesets(machine, "high_min"), pagesets(machine, "high_max")
    assert errno_of(machine.registry.write, path, "7") == errno.EINVAL
    assert machine.registry.read(path) == b"0\n"
    machine.registry.write(path, "100")
    managed = [int(nr) for nr in re.findall(r"managed +([1-9]\d*)", machine.registry.read("/proc/zoneinfo").decode())]
    expected = [max(nr // 100 // 2, 4 * batch) for nr, batch in zip(managed, (1, 63, 63), strict=True) for _ in "ab"]
    assert pagesets(machine, "high_min") == pagesets(machine, "high_max") == expected
    before = sum(pagesets(machine, "count"))
    machine.registry.write("/proc/sys/vm/compact_memory", "1")  # frees pages, and so meets the new limit
    assert sum(pagesets(machine, "count")) < before
    machine.registry.write(path, "0")
    assert (pagesets(machine, "high_min"), pagesets(machine, "high_max")) == captured


def test_a_machine_without_such_lists_has_no_such_knob() -> None:
    assert f"{VM}/percpu_pagelist_high_fraction" not in Lab((32,)).registry.nodes
