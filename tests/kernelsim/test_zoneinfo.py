# SPDX-License-Identifier: GPL-2.0-only
"""/proc/zoneinfo: to the byte on a small machine, its sums against the other files, and as a real machine's."""

import re
from pathlib import Path

import pytest
from machines import Lab

from dpud.capture import DEMO, read_capture
from dpud.physmem import PhysMem
from kernelsim.machine import Machine

Zone = dict[str, int | list[int]]

FIRST_ZONE = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 0
      nr_active_anon 0
      nr_inactive_file 0
      nr_active_file 0
      nr_unevictable 0
      nr_isolated_anon 0
      nr_isolated_file 0
      nr_anon_pages 0
      nr_mapped    0
      nr_file_pages 0
      nr_anon_transparent_hugepages 0
      nr_page_table_pages 0
      nr_hugetlb   0
  pages free     4095
        boost    0
        min      90
        low      112
        high     134
        promo    156
        spanned  4095
        present  4095
        managed  4095
        cma      0
        protection: (0, 15, 15, 15)
      nr_free_pages 4095
      nr_free_pages_blocks 3584
"""
"""min_free_kbytes is isqrt(16 * 32252 kB) = 718, so 179 pages, of which DMA gets 4095/8063; a gap is a quarter
of that; 3968 / 256 = 15."""

MOVABLE = """\
Node 0, zone  Movable
  pages free     0
        boost    0
        min      32
        low      32
        high     32
        promo    32
        spanned  0
        present  0
        managed  0
        cma      0
        protection: (0, 0, 0, 0)
"""

LAST_LINES = "  vm stats threshold: 0\n  node_unreclaimable:  0\n  start_pfn:           4096\n"


def parse(text: str) -> dict[tuple[int, str], Zone]:
    """Numbers by name of each zone; protection, and what each CPU has, as lists. Node statistics are `node NAME`."""
    zones: dict[tuple[int, str], Zone] = {}
    for section in re.split(r"^(?=Node )", text, flags=re.MULTILINE)[1:]:
        head = re.match(r"Node (\d+), zone +(\w+)\n", section)
        assert head
        zone: Zone = {}
        prefix = ""
        for line in section.splitlines()[1:]:
            if "per-node stats" in line or line.startswith("  pages free"):
                prefix = "node " if "per-node" in line else ""
            name, _, rest = line.strip().replace("pages free", "free").partition(" ")
            name, numbers = prefix + name.rstrip(":"), [int(number) for number in re.findall(r"\d+", rest)]
            if name in ("count", "high", "batch", "high_min", "high_max") and line.startswith(" " * 14):
                listed = zone.setdefault(f"cpu {name}", [])
                assert isinstance(listed, list)
                listed += numbers
            elif numbers:
                zone[name] = numbers if name == "protection" else numbers[-1]
        zones[int(head[1]), head[2]] = zone
    return zones


def total(zones: dict[tuple[int, str], Zone], name: str) -> int:
    return sum(zone.get(name, 0) for zone in zones.values())  # type: ignore[misc]


def test_a_small_machine_s_text() -> None:
    text = Lab((32,)).read("/proc/zoneinfo")
    assert text.startswith(FIRST_ZONE)
    normal = MOVABLE.replace("Movable", " Normal").replace("32", "0")
    assert text.endswith(LAST_LINES + normal + MOVABLE)


def test_every_node_has_every_zone_and_its_counters_once() -> None:
    text = Lab((32, 64)).read("/proc/zoneinfo")
    heads = re.findall(r"^Node \d+, zone +\w+$", text, re.MULTILINE)
    assert [head.split() for head in heads] == [
        ["Node", f"{nid},", "zone", name] for nid in (0, 1) for name in ("DMA", "DMA32", "Normal", "Movable")
    ]
    assert text.count("per-node stats") == 2
    assert text.index("zone    DMA32", text.index("Node 1")) < text.rindex("per-node stats")


def test_zones_add_up_to_the_machine() -> None:
    lab = Lab((32, 64))
    lab.spawn("a", anon="40M", file="3M", mlock="20", holes="30 seed=1")
    zones, vmstat = parse(lab.read("/proc/zoneinfo")), lab.vmstat()
    for name in vmstat:
        if name.startswith(("nr_zone_", "nr_free", "nr_mlock", "numa_")):
            assert total(zones, name) == vmstat[name], name
        elif name.startswith("nr_") and "tlb" not in name:
            assert total(zones, f"node {name}") == vmstat[name], name
    assert total(zones, "free") == vmstat["nr_free_pages"]
    assert total(zones, "managed") * 4 == int(lab.read("/proc/meminfo").split()[1])
    assert vmstat["nr_zone_unevictable"] > 1000


def test_pages_count_for_the_zone_they_lie_in() -> None:
    """20 MiB do not fit into the 15.5 MiB of DMA32."""
    lab = Lab((32,))
    lab.spawn("a", anon="20M")
    zones = parse(lab.read("/proc/zoneinfo"))
    on_lists = {name: zones[0, name]["nr_zone_inactive_anon"] for name in ("DMA", "DMA32")}
    assert sum(on_lists.values()) == 5120  # type: ignore[arg-type]
    flags = lab.read_numbers("/proc/kpageflags")
    lru = flags & 1 << 5 > 0
    assert on_lists == {"DMA": lru[:4096].sum(), "DMA32": lru[4096:].sum()}


@pytest.fixture(scope="module")
def demo() -> Machine:
    return Machine.from_image(read_capture(DEMO), alloc_words=PhysMem().alloc)


@pytest.mark.slow
def test_an_imported_machine_has_the_real_one_s_zones(demo: Machine) -> None:
    ours = parse(demo.registry.read("/proc/zoneinfo").decode())
    theirs = parse((DEMO / "zoneinfo").read_text())
    assert set(theirs) - set(ours) == {(0, "Device")}
    for key, zone in ours.items():
        for name in ("spanned", "present", "managed", "cma", "boost", "min", "low", "high", "promo", "start_pfn"):
            assert zone.get(name) == theirs[key].get(name), (key, name)
        assert zone["protection"] == theirs[key]["protection"][:4]  # type: ignore[index]
        for name in ("cpu high", "cpu batch", "cpu high_min", "cpu high_max"):
            assert zone.get(name) == theirs[key].get(name), (key, name)


@pytest.mark.host
def test_lines_are_the_running_kernel_s() -> None:
    """Same names, order and spacing, of what both have."""
    ours, theirs = (
        [re.sub(r" *\d+", " n", line) for line in text.splitlines()]
        for text in (Lab((64,), nr_cpus=1).read("/proc/zoneinfo"), Path("/proc/zoneinfo").read_text())
    )
    known = {line for line in theirs if "protection" not in line}
    assert [line for line in ours if line not in known and "protection" not in line and "Node" not in line] == []
    first = [line for line in theirs[: theirs.index("  start_pfn: n")] if line in ours]
    assert [line for line in ours[: ours.index("  start_pfn: n")] if line in first] == list(dict.fromkeys(first))
