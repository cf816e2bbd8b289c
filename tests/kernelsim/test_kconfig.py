# SPDX-License-Identifier: GPL-2.0-only
"""Options: which combinations there are, and what is gone on a kernel built without one.

Dependencies, and what belongs to which option, are typed in from Linux's Kconfig files and sources.
"""

import gzip
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import MM_CONFIGFS, NODES_SYSFS, VM, Lab

from kernelsim.kconfig import FIXED, OPTIONS, Kconfig
from kernelsim.machine import MachineConfig

DPU, COMPACTION, MIGRATION = "CONFIG_DPU_COMPACTION", "CONFIG_COMPACTION", "CONFIG_MIGRATION"
DEFAULT_ON = "CONFIG_DPU_COMPACTION_DEFAULT_ON"
NODE0, DEBUGFS = f"{NODES_SYSFS}/node0", "/sys/kernel/debug"
DPU_SYSCTLS = {f"{VM}/dpu_compact_{name}" for name in ("enabled", "min_fragments", "region_order")}
DPU_DEBUGFS = f"{DEBUGFS}/dpu_compact"


def lab(**options: str) -> Lab:
    return Lab((32,), kconfig={f"CONFIG_{name}": value for name, value in options.items()})


def paths(machine: Lab) -> set[str]:
    return {path for path, _, _ in machine.registry.walk()}


def test_by_default_all_of_the_seeds_options_are_on() -> None:
    kconfig = Kconfig()
    assert all(kconfig.IS_ENABLED(name) for name in (COMPACTION, MIGRATION, DPU, DEFAULT_ON))
    assert not kconfig.IS_ENABLED("CONFIG_DEBUG_VM")


@pytest.mark.parametrize(
    ("given", "off"),
    [
        ({COMPACTION: "n"}, {COMPACTION, DPU, DEFAULT_ON}),
        ({MIGRATION: "n"}, {MIGRATION, COMPACTION, DPU, DEFAULT_ON}),
        ({DPU: "n"}, {DPU, DEFAULT_ON}),
        ({DEFAULT_ON: "n"}, {DEFAULT_ON}),
        ({DPU: "y"}, set()),
    ],
)
def test_what_was_not_asked_for_gives_way(given: dict[str, str], off: set[str]) -> None:
    kconfig = Kconfig(given)
    for name in (MIGRATION, COMPACTION, DPU, DEFAULT_ON):
        assert kconfig.IS_ENABLED(name) == (name not in off), name


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({COMPACTION: "n", DPU: "y"}, f"{DPU}: depends on {COMPACTION}"),
        ({DPU: "n", DEFAULT_ON: "y"}, f"{DEFAULT_ON}: depends on {DPU}"),
        ({MIGRATION: "n", COMPACTION: "y"}, f"{MIGRATION}: is selected by {COMPACTION}"),
        ({"CONFIG_FOO": "y"}, "CONFIG_FOO: no such option here"),
        ({"COMPACTION": "y"}, "COMPACTION: no such option here"),
        ({DPU: "m"}, f'{DPU}: must be "y" or "n"; there are no modules'),
        ({DPU: True}, f'{DPU}: must be "y" or "n"; there are no modules'),
        ({"CONFIG_SWAP": "y"}, "CONFIG_SWAP: is always n here"),
        ({"CONFIG_MMU": "n"}, "CONFIG_MMU: is always y here"),
    ],
)
def test_the_impossible_is_refused(given: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        Kconfig(given)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.sampled_from("yn")))
def test_a_kernel_is_as_asked_for_or_refused(given: dict[str, str]) -> None:
    """What was asked for is so, and no dependency is broken; or it is refused."""
    try:
        kconfig = Kconfig(given)
    except ValueError:
        return
    for name, value in given.items():
        assert kconfig.IS_ENABLED(name) == (value == "y")
    for option in OPTIONS.values():
        if kconfig.IS_ENABLED(option.name):
            assert all(map(kconfig.IS_ENABLED, (*option.depends_on, *option.selects)))


def test_the_default_kernel_can_be_asked_for_by_its_own_config() -> None:
    """What config.gz says can be put into [kconfig] as it stands."""
    kconfig = Kconfig()
    assert Kconfig({name: "y" if kconfig.IS_ENABLED(name) else "n" for name in (*OPTIONS, *FIXED)}).enabled == (
        kconfig.enabled
    )


def test_config_gz_is_a_config_in_the_kernels_format() -> None:
    text = gzip.decompress(lab(DPU_COMPACTION="n").registry.read("/proc/config.gz")).decode()
    assert text.startswith("#\n# Automatically generated file; DO NOT EDIT.\n")
    lines = text.splitlines()[4:]
    assert all(re.fullmatch(r"CONFIG_\w+=y|# CONFIG_\w+ is not set", line) for line in lines)
    assert f"{COMPACTION}=y" in lines
    assert f"# {DPU} is not set" in lines
    assert "# CONFIG_SWAP is not set" in lines


# What hangs on each option.


def test_without_dpu_compaction() -> None:
    machine = lab(DPU_COMPACTION="n")
    gone = paths(lab()) - paths(machine)
    assert gone >= {*DPU_SYSCTLS, f"{DPU_DEBUGFS}/stats", f"{NODE0}/compact_dpu"}
    assert {path for path in gone if "dpu_compact" not in path and "/events/dpu/" not in path} == {
        f"{NODE0}/compact_dpu"
    }
    assert not [path for path in machine.registry.nodes if "dpu_compact" in path]
    assert not [line for line in machine.machine.printk.lines() if "DPU" in line]
    assert not [name for name in machine.vmstat() if name.startswith("dpu_")]
    machine.spawn("a", anon="8M", holes="50 seed=1")
    machine.write(f"{VM}/compact_memory", "1")
    assert machine.vmstat()["pgmigrate_success"] > 0
    machine.assert_at_rest()


def test_without_compaction() -> None:
    machine = lab(COMPACTION="n")
    names = {path.rpartition("/")[2] for path in machine.registry.nodes}
    gone = {"compact_dpu", "dpu_compact", "compact", "compact_memory", "compaction_proactiveness", "extfrag_threshold"}
    gone |= {"compact_unevictable_allowed", "extfrag"}
    assert not names & gone
    assert gone <= {path.rpartition("/")[2] for path in lab().registry.nodes}
    assert not [name for name in machine.vmstat() if "compact_" in name]
    assert "pgmigrate_success" in machine.vmstat()


def test_without_migration() -> None:
    machine = lab(MIGRATION="n")
    assert not [name for name in machine.vmstat() if name.startswith("pgmigrate_")]
    assert f"{NODE0}/compact_dpu" not in machine.registry.nodes


@pytest.mark.parametrize(("value", "enabled"), [("y", "1\n"), ("n", "0\n")])
def test_default_on_is_what_dpu_compact_enabled_begins_with(value: str, enabled: str) -> None:
    machine = lab(DPU_COMPACTION_DEFAULT_ON=value)
    assert machine.read(f"{VM}/dpu_compact_enabled") == enabled
    for other in "01":
        machine.write(f"{VM}/dpu_compact_enabled", other)
        assert machine.read(f"{VM}/dpu_compact_enabled") == f"{other}\n"


def test_without_numa() -> None:
    machine = lab(NUMA="n")
    assert NODES_SYSFS not in machine.registry.nodes
    assert not [name for name in machine.vmstat() if name.startswith("numa_")]
    assert machine.read("/proc/buddyinfo").startswith("Node 0, zone ")
    with pytest.raises(ValueError, match="CONFIG_NUMA: is needed for 2 nodes"):
        MachineConfig(kconfig=Kconfig({"CONFIG_NUMA": "n"}))


@pytest.mark.slow
def test_cma_follows_from_the_areas_there_are() -> None:
    with_area = Lab((64,), cma=16)
    assert "CONFIG_CMA=y\n" in with_area.machine.config.kconfig.text()
    assert "# CONFIG_CMA is not set\n" in lab().machine.config.kconfig.text()
    assert {path for path in paths(with_area) - paths(lab()) if "/cma/" not in path} == set()
    for cma, value, problem in ((16, "n", "CONFIG_CMA: there is a CMA area"), (0, "y", "CONFIG_CMA: there is no CMA")):
        with pytest.raises(ValueError, match=problem):
            Lab((64,), cma=cma, kconfig={"CONFIG_CMA": value})


def test_without_transparent_huge_pages() -> None:
    machine = lab(TRANSPARENT_HUGEPAGE="n")
    assert not [path for path in machine.registry.nodes if "transparent_hugepage" in path]
    assert not [name for name in machine.vmstat() if name.startswith(("thp_fault", "thp_split"))]
    assert "AnonHugePages" not in machine.read("/proc/meminfo") + machine.read(f"{NODE0}/meminfo")
    assert "AnonHugePages" in lab().read("/proc/meminfo")
    machine.spawn("a")
    with pytest.raises(OSError, match="no transparent huge pages"):
        machine.set("a", thp="1")
    machine.set("a", thp="0", anon="8M")
    assert not machine.mem.nodes["nr_anon_thps"].any()
    machine.assert_at_rest()
    assert not Kconfig({COMPACTION: "n"}).IS_ENABLED("CONFIG_TRANSPARENT_HUGEPAGE")


def test_without_debugfs() -> None:
    machine = lab(DEBUG_FS="n")
    assert DEBUGFS not in machine.registry.nodes
    assert {*DPU_SYSCTLS, f"{NODE0}/compact_dpu"} < paths(machine)


@pytest.mark.slow
def test_without_tracing() -> None:
    machine = lab(FTRACE="n")
    assert not [path for path in machine.registry.nodes if "tracing" in path or "ftrace" in path]
    assert not Kconfig({"CONFIG_FTRACE": "n"}).IS_ENABLED("CONFIG_FUNCTION_TRACER")
    machine = lab(FUNCTION_TRACER="n")
    assert machine.read("/sys/kernel/tracing/available_tracers") == "nop\n"
    assert "/sys/kernel/tracing/set_ftrace_filter" not in machine.registry.nodes
    machine = lab(FUNCTION_GRAPH_TRACER="n")
    assert machine.read("/sys/kernel/tracing/available_tracers") == "function nop\n"
    assert "/sys/kernel/tracing/events/compaction" not in lab(COMPACTION="n").registry.nodes
    assert "/sys/kernel/tracing/events/dpu" not in lab(DPU_COMPACTION="n").registry.nodes


def test_without_dynamic_debug() -> None:
    machine = lab(DYNAMIC_DEBUG="n")
    assert not [path for path in machine.registry.nodes if "dynamic_debug" in path]
    assert "/proc/dynamic_debug/control" in lab().registry.nodes


def test_without_hugetlb() -> None:
    machine = lab(HUGETLB_PAGE="n")
    assert not [path for path in machine.registry.nodes if "hugepages" in path]
    assert f"{VM}/nr_hugepages" not in machine.registry.nodes
    meminfo = machine.read("/proc/meminfo") + machine.read(f"{NODE0}/meminfo")
    assert not re.findall("HugePages_|Hugepagesize|Hugetlb", meminfo)
    assert not [name for name in machine.vmstat() if "htlb" in name or "hugetlb" in name]
    assert "nr_hugetlb" in lab().vmstat()


# A kernel with DPU compaction on a machine without a DPU.


@pytest.fixture(params=[0, None])
def no_dpu(request: pytest.FixtureRequest) -> Lab:
    return Lab((32,), "full", nr_ranks=request.param)


@pytest.mark.slow
def test_without_a_dpu_the_files_are_those_of_one_with(no_dpu: Lab) -> None:
    assert paths(no_dpu) == paths(lab())
    for value in "01":
        no_dpu.write(f"{VM}/dpu_compact_enabled", value)
        assert no_dpu.read(f"{VM}/dpu_compact_enabled") == f"{value}\n"


@pytest.mark.slow
def test_without_a_dpu_one_line_at_boot_says_so(no_dpu: Lab) -> None:
    found = [line for line in no_dpu.machine.printk.lines() if "DPU" in line]
    assert found == ["DPU Memory Compaction: no DPU found, compact_dpu does as compact"]
    no_dpu.spawn("a", anon="8M", holes="50 seed=1")
    no_dpu.compact()
    assert [line for line in no_dpu.machine.printk.lines() if "DPU" in line] == found


@pytest.mark.slow
def test_without_a_dpu_compact_dpu_compacts_all_the_same(no_dpu: Lab) -> None:
    no_dpu.sysctl(dpu_compact_region_order=12)
    no_dpu.spawn("a", anon="16M", holes="50 seed=1")
    before = no_dpu.mem.zones["nr_free"].sum(axis=(0, 2))[9:].sum()
    no_dpu.compact()
    after = no_dpu.mem.zones["nr_free"].sum(axis=(0, 2))[9:].sum()
    assert after > before
    assert no_dpu.vmstat()["pgmigrate_success"] > 0
    stats = no_dpu.stats()
    assert (stats["pages_moved"], stats["regions"], stats["failures"]) == (0, 0, 0)
    no_dpu.assert_at_rest()
    assert f"{MM_CONFIGFS}/a" in no_dpu.registry.nodes
